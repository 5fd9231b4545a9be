"""Tests of the reader: every slot number gets exactly one fate, in any order of bursts and polls, from any file."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from unit.decoded import decoded
from unit.rings import (
    DECODE,
    FORWARD,
    SLOTS,
    die,
    environment,
    forge,
    opened,
    read_all,
    reader_of,
    sized,
    variables,
)

from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.exporters.drain import SLOT, Batch, NotARing, RingReader, Slots
from stagetrace.instrument import records
from stagetrace.instrument.recorder import Recorder
from stagetrace.instrument.records import RecordType, header_word
from stagetrace.instrument.stages import STEP_COMPOSITION, Level

if TYPE_CHECKING:
    from pathlib import Path

DETAIL = 1  # of a reader's areas


def sequences(batches: list[Batch], area: str) -> list[int]:
    """The numbers of the slots that were read, in the order of reading."""
    return [int(number) - 1 for batch in batches for number in getattr(batch, area)["first"]]


class Draining(RuleBasedStateMachine):
    """Bursts of writes and polls in any order, against the numbers that were written."""

    directory: Path

    @initialize(control=st.sampled_from([1024, 2048]), detail=st.sampled_from([1024, 4096]))
    def open(self, control: int, detail: int) -> None:
        self.recorder = Recorder()
        with environment(**variables(self.directory)), sized(control, detail):
            assert self.recorder.open("worker", {})
        assert self.recorder.ring is not None
        self.reader = reader_of(self.recorder.ring.path)
        self.batches: list[Batch] = []
        self.written = 0
        self.accepted: list[int] = []
        self.dropped = 0

    @rule(count=st.integers(1, 400))
    def write(self, count: int) -> None:
        for _ in range(count):
            self.recorder.segment(FORWARD, self.written, self.written, 1, 1)
            self.written += 1

    @rule(count=st.integers(1_000, 13_000))
    def write_laps(self, count: int) -> None:
        self.write(count)

    @rule(count=st.sampled_from([1, 2, 500, 1_500]))
    def write_control(self, count: int) -> None:
        for _ in range(count):
            number = len(self.accepted) + self.dropped
            if self.recorder.state(DECODE, number, 1):
                self.accepted.append(number)
            else:
                self.dropped += 1

    @rule(commit=st.booleans())
    def poll(self, commit: bool) -> None:
        self.batches.append(self.reader.poll())
        if commit:
            self.reader.committed()

    @rule()
    def another_collector(self) -> None:
        """The reader's process dies; the next one goes on from the cursors in the session."""
        losses = [area.losses for area in self.reader.areas]
        cursors = self.reader.cursors
        self.reader.close()
        self.reader = reader_of(self.reader.path)
        self.reader.resume(cursors, losses)

    @invariant()
    def nothing_is_counted_twice(self) -> None:
        if not hasattr(self, "reader"):
            return
        for area, written in zip(self.reader.areas, (1 + len(self.accepted), self.written), strict=True):
            losses = area.losses
            assert losses.read + losses.overwritten == area.cursor <= written
            assert losses.torn == losses.unfinished == losses.corrupt == 0

    def teardown(self) -> None:
        if not hasattr(self, "reader"):
            return
        die(self.recorder)
        self.batches.append(self.reader.poll())
        assert self.batches[-1].ended
        control, detail = (area.losses for area in self.reader.areas)
        assert detail.read + detail.overwritten == self.written
        assert control.read == 1 + len(self.accepted)
        assert control.overwritten == 0
        assert control.dropped == self.dropped
        numbers = sequences(self.batches, "detail")
        assert len(numbers) == detail.read
        assert numbers == sorted(set(numbers))
        kept = min(self.written, len(self.reader.areas[DETAIL].slots))
        assert set(numbers) >= {*range(self.written - kept, self.written)}
        found = decoded(
            np.concatenate([batch.control for batch in self.batches]),
            np.concatenate([batch.detail for batch in self.batches]),
        )
        assert [row[3] for row in found.segments] == numbers, "a slot's content is another's"
        assert [words[1] for _, type_, _, words in found.controls if type_ == RecordType.STATE] == self.accepted
        self.reader.close()


def test_draining(tmp_path_factory: pytest.TempPathFactory):
    class Here(Draining):
        def __init__(self) -> None:
            super().__init__()
            self.directory = tmp_path_factory.mktemp("ring")

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


def test_a_slot_is_read_at_the_poll_after_the_one_that_saw_it(tmp_path: Path):
    with opened(tmp_path) as (recorder, reader):
        recorder.segment(FORWARD, 1, 1, 1, 1)
        assert len(reader.poll().detail) == 0
        recorder.segment(FORWARD, 2, 2, 1, 1)
        assert sequences([reader.poll()], "detail") == [0]
        assert sequences([reader.poll()], "detail") == [1]


def test_what_explains_a_detail_record_is_there_before_it(tmp_path: Path):
    with opened(tmp_path) as (recorder, reader):
        seen = 0
        for number in range(200):
            recorder.state(DECODE, number, 1)
            recorder.segment(FORWARD, number, number, 1, 1)
            if number % 3 == 0:
                batch = reader.poll()
                seen += len(batch.control)
                assert reader.areas[DETAIL].cursor <= seen


def test_a_collector_that_comes_late_counts_what_it_missed(tmp_path: Path):
    with opened(tmp_path) as (recorder, reader):
        for number in range(5 * SLOTS + 3):
            recorder.segment(FORWARD, number, number, 1, 1)
        batch = read_all(reader)
        assert sequences([batch], "detail") == [*range(4 * SLOTS + 3, 5 * SLOTS + 3)]
        assert reader.areas[DETAIL].losses.overwritten == 4 * SLOTS + 3


def test_resuming_reads_nothing_twice(tmp_path: Path):
    with opened(tmp_path) as (recorder, reader):
        for number in range(100):
            recorder.segment(FORWARD, number, number, 1, 1)
        first = read_all(reader)
        second = reader_of(reader.path)
        second.resume(reader.cursors, [area.losses for area in reader.areas])
        assert len(read_all(second)) == 0
        recorder.segment(FORWARD, 100, 100, 1, 1)
        assert sequences([first, read_all(second)], "detail") == [*range(101)]
        assert second.areas[DETAIL].losses.read == 101
        second.close()


# Slots that no writer finished


def unread(directory: Path, count: int = 10) -> tuple[Recorder, RingReader]:
    """A recorder with that many segments and nothing read yet."""
    recorder = Recorder()
    with environment(**variables(directory)), sized():
        assert recorder.open("worker", {})
    for number in range(count):
        recorder.segment(FORWARD, number, number, 1, 1)
    assert recorder.ring is not None
    return recorder, reader_of(recorder.ring.path)


FORGED = {
    "never written": ({"first": 0, "last": 0}, "unfinished"),
    "only its begin": ({"last": 0}, "torn"),
    "only its end": ({"first": 0}, "torn"),
    "numbers of nobody": ({"first": 1 << 40 | 9, "last": 1 << 40 | 9}, "corrupt"),
    "a number too large": ({"first": 2**64 - SLOTS + 5, "last": 2**64 - SLOTS + 5}, "corrupt"),
}


@pytest.mark.parametrize("what", FORGED)
@pytest.mark.parametrize("dead", [False, True], ids=["alive", "dead"])
def test_a_slot_that_is_not_whole_is_waited_for_then_counted_by_what_it_is(tmp_path: Path, what: str, dead: bool):
    words, fate = FORGED[what]
    recorder, reader = unread(tmp_path)
    forge(reader.path, "detail", 4, **words)
    if dead:
        die(recorder)
        batches = [reader.poll()]
        assert batches[0].ended
    else:
        reader.poll()  # finds the head
        batches = [reader.poll(), reader.poll()]
        assert sequences(batches, "detail") == [0, 1, 2, 3]
        assert getattr(reader.areas[DETAIL].losses, fate) == 0
        batches.append(reader.poll())
    assert sequences(batches, "detail") == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    losses = reader.areas[DETAIL].losses
    counted = {name: getattr(losses, name) for name in ("torn", "unfinished", "corrupt", "overwritten")}
    assert counted == {"torn": 0, "unfinished": 0, "corrupt": 0, "overwritten": 0, fate: 1}
    assert losses.read == 9
    if not dead:
        die(recorder)


@pytest.mark.parametrize("polls", [1, 2, 3])
def test_a_slot_that_is_finished_late_is_read_in_its_place(tmp_path: Path, polls: int):
    recorder, reader = unread(tmp_path)
    forge(reader.path, "detail", 4, first=0, last=0)
    batches = [reader.poll() for _ in range(polls)]
    forge(reader.path, "detail", 4, first=5, last=5)
    batches += [reader.poll(), reader.poll()]
    assert sequences(batches, "detail") == [*range(10)]
    assert reader.areas[DETAIL].losses.lost == 0
    die(recorder)


def test_every_slot_that_is_not_whole_has_its_own_patience(tmp_path: Path):
    """One that was begun two polls after another is given up two polls after it."""
    recorder, reader = unread(tmp_path)
    forge(reader.path, "detail", 4, first=0, last=0)
    reader.poll()
    reader.poll()
    for number in range(10, 20):
        recorder.segment(FORWARD, number, number, 1, 1)
    forge(reader.path, "detail", 14, first=0, last=0)
    reader.poll()
    losses = reader.areas[DETAIL].losses
    unfinished = [losses.unfinished]
    for _ in range(4):
        reader.poll()
        unfinished.append(losses.unfinished)
    assert unfinished == [0, 1, 1, 2, 2]
    assert losses.read == 18
    die(recorder)


def test_unfinished_slots_at_the_very_head_are_counted_at_death(tmp_path: Path):
    recorder, reader = unread(tmp_path)
    forge(reader.path, "detail", 9, last=0)
    die(recorder)
    assert sequences([reader.poll()], "detail") == [*range(9)]
    assert reader.areas[DETAIL].losses.torn == 1


def test_a_slot_that_is_being_overwritten_is_counted_once(tmp_path: Path):
    """The writer is a lap ahead and in the middle of a slot: its old content is gone, its new one not there yet."""
    recorder, reader = unread(tmp_path, SLOTS)
    reader.poll()
    recorder.segment(FORWARD, SLOTS, SLOTS, 1, 1)
    forge(reader.path, "detail", 0, last=1)  # first is SLOTS + 1 already
    batches = [reader.poll()]
    assert reader.areas[DETAIL].losses.overwritten == 1
    forge(reader.path, "detail", 0, last=SLOTS + 1)
    batches += [reader.poll(), reader.poll()]
    assert sequences(batches, "detail") == [*range(1, SLOTS + 1)]
    die(recorder)


def test_detail_waits_while_control_waits(tmp_path: Path):
    """Else a step would be read before the changes of its batch that lie behind an unwritten control slot."""
    with opened(tmp_path) as (recorder, reader):
        read_all(reader)
        recorder.state(DECODE, 1, 1)
        recorder.state(DECODE, 2, 1)
        recorder.segment(FORWARD, 3, 3, 1, 1)
        forge(reader.path, "control", 1, first=0, last=0)
        batches = [reader.poll() for _ in range(3)]
        assert [(len(batch.control), len(batch.detail), batch.gap) for batch in batches] == [(0, 0, False)] * 3
        batch = reader.poll()
        assert (len(batch.control), len(batch.detail), batch.gap, batch.gap_end) == (1, 1, True, 2)
        assert not reader.poll().gap


def test_a_number_far_ahead_costs_the_ring_but_no_time(tmp_path: Path):
    """A slot that was altered to a number that a recorder could have written there, some day."""
    recorder, reader = unread(tmp_path)
    number = (1 << 50) + 4
    forge(reader.path, "detail", 4, first=number + 1, last=number + 1)
    die(recorder)
    assert sequences([reader.poll()], "detail") == [number]
    losses = reader.areas[DETAIL].losses
    assert losses.read + losses.overwritten + losses.unfinished == number + 1


def test_an_altered_header_word_is_counted_as_corrupt(tmp_path: Path):
    recorder, reader = unread(tmp_path)
    for index, header in enumerate((0, 255, header_word(RecordType.SEGMENT, 9_999), header_word(RecordType.STATE, 14))):
        forge(reader.path, "detail", index, header=header)
    assembler = Assembler(bytes(16))
    assembler.add(read_all(reader))
    assert assembler.counts["corrupt"] == 4
    assert len(assembler.finish()["segments"]) == 6
    die(recorder)


def test_a_file_that_is_cut_short_ends_its_ring_and_not_the_reader(tmp_path: Path):
    """To touch what is no longer there would be a SIGBUS."""
    recorder, reader = unread(tmp_path)
    first = [reader.poll(), reader.poll()]
    assert sequences(first, "detail") == [*range(10)]
    for number in range(10, 14):
        recorder.segment(FORWARD, number, number, 1, 1)
    recorder.errors[3] = 2
    reader.poll()
    os.truncate(reader.path, records.HEADER_SIZE + 5)
    batch = reader.poll()
    assert (len(batch), batch.ended, reader.ended) == (0, True, True)
    losses = reader.areas[DETAIL].losses
    assert (losses.read, losses.unfinished, losses.lost) == (10, 4, 4)
    assert (reader.level, reader.errors) == (Level.STEP, {3: 2})
    os.truncate(reader.path, 0)
    assert reader.poll().ended
    reader.committed()
    reader.close()
    die(recorder)


# Files that are no ring


def header(**changed: object) -> bytes:
    """A header page of a ring with 1024 slots each."""
    fields = {
        "magic": records.MAGIC,
        "version": records.VERSION,
        "slot_size": records.SLOT_SIZE,
        "control": SLOTS,
        "detail": SLOTS,
    } | changed
    words = (*fields.values(), 1, 2, 3, 0, b"worker", b"session", b"host")
    return records.HEADER.pack(*words).ljust(records.HEADER_SIZE, b"\0")


BODY = bytes(2 * SLOTS * records.SLOT_SIZE)
NO_RINGS = {
    "empty": (b"", "too short for a ring"),
    "short": (header()[:100], "too short for a ring"),
    "zeros": (bytes(8192), "is not a ring"),
    "text": (b"hello\n" * 2_000, "is not a ring"),
    "another version": (header(version=2) + BODY, "has ring format 2, this stagetrace reads 1"),
    "another slot size": (header(slot_size=256) + BODY, "has ring format"),
    "cut": ((header() + BODY)[:-1], "damaged header"),
    "too long": (header() + BODY + b"\0", "damaged header"),
    "no slots": (header(control=0) + BODY, "damaged header"),
    "no power of two": (header(control=1_000, detail=1_048) + BODY, "damaged header"),
    "huge": (header(detail=2**31) + BODY, "damaged header"),
}


@pytest.mark.parametrize("what", NO_RINGS)
def test_a_file_that_is_no_ring_is_refused_with_the_reason(tmp_path: Path, what: str):
    content, message = NO_RINGS[what]
    path = tmp_path / "worker-1-1.ring"
    path.write_bytes(content)
    with pytest.raises(NotARing, match=message) as error:
        reader_of(path)
    assert str(path) in str(error.value)
    assert path.read_bytes() == content


def test_an_empty_ring_of_nobody_is_read_and_ended(tmp_path: Path):
    path = tmp_path / "worker-1-1.ring"
    path.write_bytes(header() + BODY)
    reader = reader_of(path)
    batch = reader.poll()
    assert (len(batch), batch.ended, reader.role, reader.host) == (0, True, "worker", "host")


SLOT_FIELD = st.one_of(
    st.just(0),
    st.integers(0, 4 * SLOTS),
    st.integers(0, 2**64 - 1),
    st.sampled_from([2**63 - 1, 2**63, 2**64 - 1, 2**64 - SLOTS]),
)


@given(
    st.binary(max_size=300),
    st.lists(st.tuples(st.integers(0, 2 * SLOTS - 1), SLOT_FIELD, SLOT_FIELD, st.binary(min_size=112, max_size=112))),
    st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_a_damaged_file_never_stops_the_reader(
    tmp_path_factory: pytest.TempPathFactory, head: bytes, slots: list[tuple[int, int, int, bytes]], keep: bool
):
    content = bytearray(header() + BODY)
    if not keep:
        content[: len(head)] = head
    for index, first, last, rest in slots:
        offset = records.HEADER_SIZE + index * records.SLOT_SIZE
        content[offset : offset + records.SLOT_SIZE] = struct.pack("<Q112sQ", first, rest, last)
    path = tmp_path_factory.mktemp("garbage") / "worker-1-1.ring"
    path.write_bytes(content)
    try:
        reader = reader_of(path)
    except NotARing:
        assert not keep
        return
    assembler = Assembler(bytes(16))
    for _ in range(2):
        assembler.add(reader.poll())
        assembler.take(1 << 62)
    assembler.finish()
    for area in reader.areas:
        losses = area.losses
        fates = losses.read + losses.overwritten + losses.torn + losses.unfinished + losses.corrupt
        assert fates == area.cursor
    assert reader.level in Level
    assert all(index < records.MAX_HOOKS for index in reader.errors)


_WORD = st.one_of(st.integers(-2, 30), st.integers(-(2**63), 2**63 - 1))
_STAGE = st.one_of(st.integers(0, 20), st.sampled_from([2, 30, 51, 128, 129]), st.integers(0, 65_535))
_PARTS = st.sampled_from([(0, 1), (0, 1), (0, 2), (1, 2), (0, 0), (2, 1), (4, 255)])
_TYPE = st.one_of(st.sampled_from(RecordType).map(int), st.integers(0, 255))
_ROW = st.tuples(_TYPE, _STAGE, _PARTS, st.booleans(), st.tuples(*[_WORD] * 6))


def slots_of(rows: list[tuple[int, int, tuple[int, int], bool, tuple[int, ...]]]) -> Slots:
    """Slots with their numbers in order and everything else as it comes; some in the order of a long record."""
    found = np.zeros(len(rows), SLOT)
    for i, (type_, stage, (part, parts), in_order, words) in enumerate(rows):
        first = i + 1 - part if in_order else words[0]
        found[i] = (i + 1, header_word(type_, stage, part, parts), (first, *words[1:], *words, words[0]), i + 1)
    return found


@given(st.lists(_ROW, max_size=8), st.lists(_ROW, max_size=8), st.integers(0, 2**63))
@settings(max_examples=100, deadline=None)
def test_slots_of_any_content_never_stop_the_assembly(control: list, detail: list, now_ns: int):
    """What the reader takes and no recorder wrote."""
    assembler = Assembler(bytes(16))
    for process in (1, 2):
        assembler.add(Batch(process, slots_of(control), slots_of(detail)))
        assembler.take(now_ns)
    assembler.add(Batch(1, ended=True))
    assembler.finish("lost")


def test_a_batch_of_slots_becomes_records_or_is_counted(tmp_path: Path):
    """Nothing is left over: every slot that was read is a record, a part of one, or corrupt."""
    with opened(tmp_path) as (recorder, reader):
        recorder.step_begin(1, 2, 3, 4, [0] * len(STEP_COMPOSITION))
        forge(reader.path, "detail", 1, header=header_word(RecordType.STEP_BEGIN, 0, 1, 3))
        assembler = Assembler(bytes(16))
        assembler.add(read_all(reader))
        assembler.finish()
        assert assembler.counts["incomplete"] == 1


def test_losses_name_their_ring(tmp_path: Path):
    recorder, reader = unread(tmp_path, 3)
    read_all(reader)
    found = [(area.losses.process, area.losses.ring, area.losses.read, area.losses.lost) for area in reader.areas]
    assert found == [(reader.key, "control", 1, 0), (reader.key, "detail", 3, 0)]
    die(recorder)
