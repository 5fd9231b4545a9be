"""Tests of decoding: records from slots, long ones from their parts in any batches, and what cannot be is counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.decoded import decoded
from unit.rings import DECODE, FORWARD, opened, read_all

from stagetrace.exporters.assembly.long_records import Parts
from stagetrace.exporters.drain import SLOT, Slots
from stagetrace.instrument.records import PART_WORDS, SLOT_WORDS, Change, Event, RecordType, Text, header_word
from stagetrace.instrument.stages import BY_ID, STAGES, STEP_COMPOSITION, Kind

if TYPE_CHECKING:
    from pathlib import Path

COMPOSITION = tuple(range(len(STEP_COMPOSITION)))


def slots(*rows: tuple[int, int, tuple[int, ...]]) -> Slots:
    """Slots of (number, header word, words); the words are filled up with zeros."""
    found = np.zeros(len(rows), SLOT)
    for slot, (number, header, words) in zip(found, rows, strict=True):
        slot["first"] = slot["last"] = number
        slot["header"] = header
        slot["words"][: len(words)] = words
    return found


def long(type_: int, first: int, words: tuple[int, ...], *, numbers: list[int] | None = None) -> Slots:
    """The slots of a long record, in a row from number `first` on or at `numbers`."""
    parts = -(-len(words) // PART_WORDS)
    at = numbers or [*range(first, first + parts)]
    return slots(
        *(
            (at[i], header_word(type_, 0, i, parts), (at[0], *words[i * PART_WORDS : (i + 1) * PART_WORDS]))
            for i in range(parts)
        )
    )


SNAPSHOT = (5, 6, 20, *range(1_000, 1_020))
STEP_BEGIN = (1, 10, 20, 5, 6, *COMPOSITION)


def test_records_come_in_the_order_of_their_slots(tmp_path: Path):
    with opened(tmp_path) as (recorder, reader):
        read_all(reader)
        recorder.state(DECODE, 1, 1)
        recorder.snapshot(5, 6, range(40))
        recorder.member(header_word(RecordType.MEMBER, Change.JOIN), 1, 0, 0, 5, 6)
        batch = read_all(reader)
    found = decoded(batch.control)
    assert [type_ for _, type_, _, _ in found.controls] == [RecordType.STATE, RecordType.SNAPSHOT, RecordType.MEMBER]
    assert [sequence for sequence, *_ in found.controls] == [2, 3, 7], "a long record's is that of its first slot"


@given(st.permutations(range(4)), st.lists(st.booleans(), min_size=4, max_size=4))
def test_parts_in_any_order_and_in_any_batches_make_the_record(order: list[int], breaks: list[bool]):
    """Interleaved with another record, as when a garbage collection comes in the middle of a write."""
    one = long(RecordType.SNAPSHOT, 0, SNAPSHOT, numbers=[1, 4])
    other = long(RecordType.SNAPSHOT, 0, (7, *SNAPSHOT[1:]), numbers=[2, 3])
    pieces = np.concatenate([one, other])[order]
    parts = Parts(), Parts()
    found = []
    start = 0
    for end, cut in enumerate(breaks, 1):
        if cut or end == len(pieces):
            records = decoded(pieces[start:end], parts=parts)
            assert (records.corrupt, records.incomplete) == (0, 0)
            found += records.controls
            start = end
    assert sorted(words[: len(SNAPSHOT)] for *_, words in found) == [SNAPSHOT, (7, *SNAPSHOT[1:])]
    assert len(parts[0]) == 0


def test_a_record_without_all_its_parts_is_given_up_and_counted():
    """The part that is missing was overwritten: it never comes, and nothing is kept of it for ever."""
    parts = Parts(), Parts()
    begin = long(RecordType.STEP_BEGIN, 1, STEP_BEGIN)
    assert decoded(detail=begin[1:], parts=parts).incomplete == 0
    assert len(parts[1]) == 1
    near = slots((60_000, FORWARD, (1, 5, 6)))
    assert decoded(detail=near, parts=parts).incomplete == 0
    far = slots((70_000, FORWARD, (1, 5, 6)))
    assert decoded(detail=far, parts=parts).incomplete == 1
    assert len(parts[1]) == 0


def test_many_incomplete_records_do_not_pile_up():
    parts = Parts(), Parts()
    given_up = 0
    for number in range(1, 400_000, 1_000):
        given_up += decoded(detail=long(RecordType.STEP_BEGIN, number, STEP_BEGIN)[:1], parts=parts).incomplete
        assert len(parts[1]) <= 67
    assert given_up + len(parts[1]) == 400


GOOD = {
    "segment": slots((1, FORWARD, (1, 5, 5))),
    "step end": slots((1, header_word(RecordType.STEP_END), (1, 5, 0, 5, 6))),
    "step begin": long(RecordType.STEP_BEGIN, 1, STEP_BEGIN),
}
GOOD_CONTROL = {
    "state": slots((1, DECODE, (1, 5, 7))),
    "event": slots((1, header_word(RecordType.EVENT, Event.FINISHED), (1, 5, 7))),
    "member": slots((1, header_word(RecordType.MEMBER, Change.JOIN), (7, 0, 0, 5, 6))),
    "snapshot": long(RecordType.SNAPSHOT, 1, SNAPSHOT),
    "empty snapshot": long(RecordType.SNAPSHOT, 1, (5, 6, 0)),
    "text": long(RecordType.TEXT, 1, (7, Text.REQUEST_ID, 3, 0x636261)),
}
BAD = {
    "no type": slots((1, 0, ())),
    "unknown type": slots((1, header_word(max(RecordType) + 1), ())),
    "no parts": slots((1, header_word(RecordType.SEGMENT, 51, 0, 0), (1, 5, 6))),
    "a part too many": slots((1, header_word(RecordType.SNAPSHOT, 0, 2, 2), (1, 5, 6))),
    "a short record in parts": slots((1, header_word(RecordType.SEGMENT, 51, 0, 2), (1, 5, 6))),
    "unknown stage": slots((1, header_word(RecordType.SEGMENT, 9), (1, 5, 6))),
    "a state as a segment": slots((1, header_word(RecordType.SEGMENT, 14), (1, 5, 6))),
    "a segment as a state": slots((1, header_word(RecordType.STATE, 51), (1, 5, 6))),
    "unknown event": slots((1, header_word(RecordType.EVENT, 99), (1, 5, 6))),
    "unknown change": slots((1, header_word(RecordType.MEMBER, 0), (1, 5, 6))),
    "end before begin": slots((1, FORWARD, (1, 6, 5))),
    "a segment before time began": slots((1, FORWARD, (1, -1, 5))),
    "a state before time began": slots((1, DECODE, (1, -1, 5))),
    "a step end before time began": slots((1, header_word(RecordType.STEP_END), (1, -1, 0, 5, 6))),
    "a step scheduled before it began": long(RecordType.STEP_BEGIN, 1, (1, 10, 9, *STEP_BEGIN[3:])),
    "a step of one part": long(RecordType.STEP_BEGIN, 1, STEP_BEGIN[:PART_WORDS]),
    "a snapshot longer than its record": long(RecordType.SNAPSHOT, 1, (5, 6, 22, *range(9))),
    "a snapshot of negative length": long(RecordType.SNAPSHOT, 1, (5, 6, -1)),
    "a text longer than its record": long(RecordType.TEXT, 1, (7, 1, 80, 0)),
    "a first part of another record": slots((2, header_word(RecordType.SNAPSHOT, 0, 0, 1), (1, 5, 6, 0))),
    "a later part of a record to come": slots((2, header_word(RecordType.SNAPSHOT, 0, 1, 2), (2, 5, 6, 0))),
}


@pytest.mark.parametrize("what", BAD)
def test_what_no_recorder_writes_is_corrupt(what: str):
    for ring in ({"control": BAD[what]}, {"detail": BAD[what]}):
        found = decoded(**ring)
        assert found.corrupt >= 1
        assert not found.segments
        assert not found.controls
        assert not found.steps


@pytest.mark.parametrize("what", [*GOOD, *GOOD_CONTROL])
def test_a_record_in_its_own_ring_is_good_and_in_the_other_corrupt(what: str):
    rings = ["detail", "control"] if what in GOOD else ["control", "detail"]
    pieces = (GOOD | GOOD_CONTROL)[what]
    own, other = (decoded(**{ring: pieces}) for ring in rings)
    assert own.corrupt == 0
    assert len(own.segments) + len(own.controls) + len(own.steps) == 1
    assert other.corrupt == len(pieces)
    assert not other.segments + other.controls + other.steps


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_of_the_vocabulary_can_be_recorded(stage):
    if stage.kind is Kind.STATE:
        found = decoded(slots((1, header_word(RecordType.STATE, stage.id), (1, 5, 7)))).controls
    else:
        found = decoded(detail=slots((1, header_word(RecordType.SEGMENT, stage.id), (1, 5, 7)))).segments
    assert len(found) == 1


@given(st.integers(0, 2**16 - 1))
@settings(max_examples=200)
def test_no_other_stage_can(number: int):
    found = decoded(detail=slots((1, header_word(RecordType.SEGMENT, number), (1, 5, 7))))
    assert bool(found.segments) == (number in BY_ID and BY_ID[number].kind is not Kind.STATE)
    assert len(found.segments) + found.corrupt == 1


@given(st.text(max_size=100))
def test_a_text_is_what_was_written(text: str):
    data = text.encode("utf-8", "replace")
    words = np.frombuffer(data.ljust(-(-len(data) // 8) * 8 + 32, b"\0"), "<i8")
    found = decoded(long(RecordType.TEXT, 1, (7, 1, len(data), *words.tolist())))
    assert found.texts == [(7, 1, data.decode())]


def test_a_slot_holds_what_the_table_says():
    assert SLOT.itemsize == 128
    assert PART_WORDS == SLOT_WORDS - 1
