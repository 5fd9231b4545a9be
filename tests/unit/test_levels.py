"""The level: where it comes from, how a running process is switched, and what a switch cuts."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
from unit.decoded import decoded_batch
from unit.rings import FORWARD, environment, opened, read_all, variables

from stagetrace.exporters.assembly.assemble import SWITCH_PATIENCE_NS, Assembler
from stagetrace.exporters.control import Switch, read_switches, set_level
from stagetrace.exporters.session import Session
from stagetrace.instrument import gc_pauses
from stagetrace.instrument.levels import LEVEL_FILE, maximum_level, session_level
from stagetrace.instrument.records import Event, RecordType, header_word
from stagetrace.instrument.ring import CONTROL_SLOTS, DETAIL_SLOTS, chosen_slots
from stagetrace.instrument.stages import BY_NAME, STEP_COMPOSITION, Level

if TYPE_CHECKING:
    from pathlib import Path

COMPOSITION = (0,) * len(STEP_COMPOSITION)


@pytest.mark.parametrize(
    ("start", "maximum", "expected"),
    [
        (None, None, Level.STEP),
        ("off", None, Level.STEP),
        ("request", None, Level.STEP),
        ("layer", None, Level.LAYER),
        ("off", "kernel", Level.KERNEL),
        ("nonsense", "nonsense", Level.STEP),
    ],
)
def test_maximum_level(start: str | None, maximum: str | None, expected: Level) -> None:
    with environment(STAGETRACE_LEVEL=start, STAGETRACE_MAX_LEVEL=maximum):
        assert maximum_level() is expected


def test_a_switch_counts_for_processes_that_start_later(tmp_path: Path) -> None:
    with environment(STAGETRACE_LEVEL="request"):
        assert session_level(tmp_path) is Level.REQUEST
        (tmp_path / LEVEL_FILE).write_text("off\n")
        assert session_level(tmp_path) is Level.OFF
        for damaged in (b"damaged", b"", b"\xff\xfe\x00"):
            (tmp_path / LEVEL_FILE).write_bytes(damaged)
            assert session_level(tmp_path) is Level.REQUEST


def test_a_running_process_is_switched(tmp_path: Path) -> None:
    with opened(tmp_path) as (recorder, reader), environment(**variables(tmp_path)):
        session = Session.open(tmp_path / "session")
        assert (recorder.level[0], recorder.epoch[0]) == (Level.STEP, 0)
        (switched,) = set_level(session, Level.LAYER)
        assert (recorder.level[0], recorder.epoch[0]) == (Level.LAYER, 1)
        assert (switched.before, switched.after, switched.beyond) == (Level.STEP, Level.LAYER, True)
        (switched,) = set_level(session, Level.OFF)
        assert (recorder.level[0], recorder.epoch[0]) == (Level.OFF, 2)
        assert not switched.beyond
        assert reader.level is Level.OFF
        first, second = read_switches(session)
        assert (first.before, first.after, second.before) == (Level.STEP, Level.LAYER, Level.LAYER)
        assert first.begin_ns <= first.end_ns <= second.begin_ns
        with opened(tmp_path, role="worker") as (later, _):
            assert later.level[0] == Level.OFF
            assert len(set_level(session, Level.STEP)) == 2
    with environment(**variables(tmp_path)):
        assert set_level(session, Level.STEP) == []  # they are dead


def test_a_damaged_line_of_switches_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path), environment(**variables(tmp_path)):
        session = Session.open(tmp_path / "session")
        set_level(session, Level.OFF)
        with open(session.path / "switches.jsonl", "a") as file:
            file.write('{"begin_ns": 1, "before": "no"}\n{"begin_ns": 1e400, "end_ns": 2}\n[]\n' + "[" * 9_000)
        with open(session.path / "switches.jsonl", "ab") as binary:
            binary.write(b"\n\xff\xfe")
    for _ in range(2):  # the collector reads them at every commit, and says so once
        assert len(read_switches(session)) == 1
    assert caplog.text.count("5 lines that are no switch") == 1


def test_what_a_switch_cuts_is_partial(tmp_path: Path) -> None:
    tokenize, finished = (
        header_word(RecordType.STATE, BY_NAME["request_tokenize"].id),
        header_word(RecordType.EVENT, Event.FINISHED),
    )
    queue = header_word(RecordType.STATE, BY_NAME["queue"].id)
    with opened(tmp_path) as (recorder, reader):
        for request, begin, end in ((1, 100, 200), (2, 150, 350), (3, 400, 500)):
            recorder.state(queue, begin, request)
            recorder.state(finished, end, request, 0, 0, 2, 5, 5)
        recorder.state(tokenize, 160, 4)  # it ends while nothing is recorded
        for step, begin, end in ((1, 100, 200), (2, 210, 320), (3, 400, 500)):
            recorder.step_begin(begin, begin + 1, 9, step, COMPOSITION)
            if end:
                recorder.step_end(end, 9, step)
        recorder.step_begin(290, 295, 9, 4, COMPOSITION)
        assembler = Assembler(b"key")
        assembler.switches = [Switch(300, 310, Level.STEP, Level.OFF), Switch(390, 395, Level.OFF, Level.STEP)]
        assembler.add(read_all(reader))
        assembler.instances[9].ranks = 0
        assembler.take(1000)
        tables = assembler.take(311 + SWITCH_PATIENCE_NS)
    requests = {row["handle"]: (row["status"], row["partial"]) for row in tables["requests"].to_pylist()}
    assert requests == {1: ("finished", False), 2: ("finished", True), 3: ("finished", False), 4: ("open", True)}
    tables = assembler.finish()
    assert not tables["requests"].num_rows


def test_a_request_that_was_cut_has_one_row(tmp_path: Path) -> None:
    """It has its row when it is seen again: by its last tokens, or because it was preempted and is resumed."""
    names = ("request_tokenize", "queue", "prefill", "decode")
    tokenize, queue, prefill, decode = (header_word(RecordType.STATE, BY_NAME[name].id) for name in names)
    finished = header_word(RecordType.EVENT, Event.FINISHED)
    with opened(tmp_path) as (recorder, reader):
        recorder.state(tokenize, 160, 4)
        recorder.state(queue, 170, 4)
        assembler = Assembler(b"key")
        assembler.switches = [Switch(300, 310, Level.STEP, Level.OFF), Switch(390, 395, Level.OFF, Level.STEP)]
        assembler.add(read_all(reader))
        (row,) = assembler.take(311 + SWITCH_PATIENCE_NS)["requests"].to_pylist()
        assert (row["handle"], row["status"], row["partial"]) == (4, "open", True)
        for request in (4, 5):
            recorder.state(prefill, 6 * 10**9, request, 9, 1)
            recorder.state(decode, 7 * 10**9, request, 9, 1, 1)
            recorder.state(finished, 8 * 10**9, request, 9, 2, 2, 5, 5)
        assembler.add(read_all(reader))
    assert [row["handle"] for row in assembler.finish()["requests"].to_pylist()] == [5]


def test_steps_that_a_switch_cuts(tmp_path: Path) -> None:
    with opened(tmp_path) as (recorder, reader):
        for step, begin, end in ((1, 100, 200), (2, 210, 320), (3, 290, 0), (4, 400, 500)):
            recorder.step_begin(begin, begin + 1, 9, step, COMPOSITION)
            if end:
                recorder.step_end(end, 9, step)
        assembler = Assembler(b"key")
        assembler.switches = [Switch(300, 310, Level.STEP, Level.REQUEST), Switch(390, 395, Level.REQUEST, Level.LAYER)]
        assembler.add(read_all(reader))
        assembler.instances[9].ranks = 0
        steps = assembler.take(311 + SWITCH_PATIENCE_NS)["steps"].to_pylist()
    assert {row["step"]: row["status"] for row in steps} == {1: "complete", 2: "partial", 3: "partial", 4: "complete"}


def test_layers_of_a_step_that_a_switch_cuts_are_partial(tmp_path: Path) -> None:
    """The step is whole where only its layers were switched on or off; where it is cut itself, so is all of it."""
    stages = ("rank_step", "forward", "attention")
    with opened(tmp_path) as (recorder, reader):
        for step, begin in ((1, 100), (2, 200), (3, 300), (4, 400)):
            recorder.step_begin(begin, begin + 1, 9, step, COMPOSITION)
            for number, stage in enumerate(reversed(stages)):
                header = header_word(RecordType.SEGMENT, BY_NAME[stage].id)
                recorder.segment(header, begin + 30 - number, begin + 40 + number, 9, step)
            recorder.step_end(begin + 60, 9, step)
        assembler = Assembler(b"key")
        assembler.switches = [Switch(230, 235, Level.STEP, Level.LAYER), Switch(330, 331, Level.LAYER, Level.OFF)]
        assembler.add(read_all(reader))
        tables = assembler.finish()
    statuses = {row["step"]: row["status"] for row in tables["steps"].to_pylist()}
    assert statuses == {1: "complete", 2: "complete", 3: "partial", 4: "complete"}
    partial = {(row["step"], row["stage"]) for row in tables["segments"].to_pylist() if row["partial"]}
    assert partial == {(2, BY_NAME["attention"].id), *((3, BY_NAME[stage].id) for stage in stages)}


def test_an_error_in_recording_a_collection_is_contained_and_said_once(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with opened(tmp_path) as (recorder, _):
        monkeypatch.setattr(recorder, "segment", None)
        callback = gc_pauses.GcPauses(recorder)
        gc.callbacks.append(callback)
        try:
            for _ in range(3):
                gc.collect()
        finally:
            gc.callbacks.remove(callback)
    assert caplog.text.count("error in recording gc_pause") == 1
    assert "Exception ignored" not in capsys.readouterr().err


def test_ring_sizes_follow_the_seconds_asked_for() -> None:
    with environment(STAGETRACE_RING_SECONDS=None):
        assert chosen_slots(Level.STEP) == (CONTROL_SLOTS, DETAIL_SLOTS)
        assert chosen_slots(Level.LAYER) == (CONTROL_SLOTS, 8 * DETAIL_SLOTS)
    with environment(STAGETRACE_RING_SECONDS="60"):
        assert chosen_slots(Level.STEP) == (4 * CONTROL_SLOTS, 4 * DETAIL_SLOTS)  # powers of two
    for odd in ("0", "-3", "nan", "inf", "many", ""):
        with environment(STAGETRACE_RING_SECONDS=odd):
            assert chosen_slots(Level.STEP) == (CONTROL_SLOTS, DETAIL_SLOTS), odd
    for extreme in ("0.0001", "1e12", "1e308", "1e-320"):
        with environment(STAGETRACE_RING_SECONDS=extreme):
            assert all(1024 <= slots <= 1 << 20 for slots in chosen_slots(Level.KERNEL))


def test_gc_pauses_are_recorded(tmp_path: Path) -> None:
    with opened(tmp_path) as (recorder, reader):
        before = [*gc.callbacks]
        try:
            gc_pauses.watch(recorder)
            gc_pauses.watch(recorder)
            assert len(gc.callbacks) == len(before) + 1
            recorder.segment(FORWARD, 1, 2, 0, 0)
            gc.collect()
        finally:
            gc.callbacks[:] = before
        batch = read_all(reader)
    segments = decoded_batch(batch).segments
    pauses = [row for row in segments if row[1] == BY_NAME["gc_pause"].id]
    _, _, _, begin, end, _, _, generation, *_ = pauses[-1]
    assert begin < end
    assert generation == 2


def test_a_request_that_ended_in_the_dark_is_partial_also_at_the_end_of_the_session(tmp_path: Path) -> None:
    decode_state = header_word(RecordType.STATE, BY_NAME["queue"].id)
    with opened(tmp_path) as (recorder, reader):
        recorder.state(decode_state, 100, 1)
        recorder.state(decode_state, 400, 2)  # begun after the switches: lost with its process
        assembler = Assembler(b"key")
        assembler.switches = [Switch(300, 310, Level.STEP, Level.OFF), Switch(390, 395, Level.OFF, Level.STEP)]
        assembler.add(read_all(reader))
        rows = assembler.finish("lost")["requests"].to_pylist()
    assert {row["handle"]: (row["status"], row["partial"]) for row in rows} == {1: ("open", True), 2: ("lost", False)}
