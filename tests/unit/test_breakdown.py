"""Tests of load and breakdown: small sessions whose numbers were worked out by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.sessions import INSTANCE, PROCESS, THREAD, SessionBuilder

from stagetrace.analysis.breakdown import (
    COLUMNS,
    Distribution,
    HookTrouble,
    Requests,
    Stages,
    Steps,
    TimelineBreakdown,
    distribution,
    health,
    request_breakdown,
    stage_breakdown,
    step_breakdown,
    weighted_percentiles,
)
from stagetrace.analysis.load import load
from stagetrace.exporters.session import TABLES, Session, SessionError
from stagetrace.instrument.stages import Level

if TYPE_CHECKING:
    from pathlib import Path


def requests_of(session: Session) -> Requests:
    frames = load(session)
    return request_breakdown(frames["requests"], frames["intervals"], frames["steps"])


def steps_of(session: Session) -> Steps:
    return step_breakdown(load(session)["steps"])


def stages_of(session: Session, level: Level = Level.STEP) -> Stages:
    frames = load(session, None, COLUMNS)
    return stage_breakdown(frames["requests"], frames["steps"], frames["segments"], level)


def self_times(timeline: TimelineBreakdown) -> dict[str, int]:
    return {row.stage: row.self_ns for row in [*timeline.stages, timeline.unattributed]}


def assert_partition(timeline: TimelineBreakdown) -> None:
    """Shares add up to one, over the whole timeline and within each kind of step."""
    for rows in ([*timeline.stages, timeline.unattributed], *timeline.by_phase.values()):
        assert sum(row.share or 0 for row in rows) == pytest.approx(1, abs=1e-12)
    assert sum(self_times(timeline).values()) == timeline.accounted_ns


# Requests


@pytest.fixture
def three_requests(tmp_path: Path) -> Session:
    """Two finished requests and an aborted one that are measured; one lost, one open and one partial that are not."""
    builder = SessionBuilder(tmp_path / "s")
    builder.request(
        1,
        2_000_000_900,
        prompt_tokens=10,
        output_tokens=5,
        cached_tokens=4,
        received_ns=1_000_000_000 - 30,
        arrival_ns=1_000_000_000,
        first_token_ns=1_000_000_180,
        first_output_ns=1_000_000_200,
        first_sent_ns=1_000_000_250,
        last_token_ns=1_000_000_580,
        last_output_ns=1_000_000_600,
        last_sent_ns=1_000_000_900,
        tokenize_ns=10,
        queue_ns=30,
        prefill_ns=100,
        decode_ns=400,
    )
    builder.request(
        2,
        2_000_000_000,
        prompt_tokens=20,
        output_tokens=1,
        cached_tokens=0,
        received_ns=1_000_000_100,
        arrival_ns=1_000_000_100,
        first_token_ns=1_000_000_390,
        first_output_ns=1_000_000_400,
        first_sent_ns=1_000_000_500,
        last_token_ns=1_000_000_395,
        last_output_ns=1_000_000_400,
        last_sent_ns=1_000_000_510,
        tokenize_ns=20,
        queue_ns=50,
        prefill_ns=200,
    )
    builder.request(
        3,
        1_500_000_000,
        status="aborted",
        finish="abort",
        prompt_tokens=30,
        output_tokens=4,
        arrival_ns=1_000_000_000,
        first_token_ns=1_000_000_600,
        first_output_ns=1_000_000_700,
        last_token_ns=1_000_000_900,
        queue_ns=100,
        preempted_ns=7,
        preemptions=1,
    )
    unmeasured = {
        "arrival_ns": 1_000_000_000,
        "first_output_ns": 1_900_000_000,
        "queue_ns": 10**9,
        "output_tokens": 100,
    }
    builder.request(4, 2_000_000_000, status="lost", finish="unknown", **unmeasured)
    builder.request(5, 3_000_000_000, status="open", finish="unknown", **unmeasured)
    builder.request(6, 2_000_000_000, partial=True, **unmeasured)
    return builder.write()


def test_requests_are_counted_by_status(three_requests: Session):
    found = requests_of(three_requests)
    assert found.count == 6
    assert found.by_status == {"finished": 3, "aborted": 1, "error": 0, "lost": 1, "open": 1}
    assert (found.partial, found.measured, found.preemptions) == (1, 3, 1)
    assert (found.prompt_tokens, found.output_tokens, found.cached_tokens) == (60, 310, 4)


def test_latencies(three_requests: Session):
    found = requests_of(three_requests).latencies
    # ttft 200, 300, 700: p95 lies 0.9 and p99 0.98 of the way from 300 to 700.
    assert found["ttft"] == Distribution(3, 400, 300, 660, 692)
    # ttft_client 280, 400; the aborted request was sent nothing.
    assert found["ttft_client"] == Distribution(2, 340, 340, 394, 398.8)
    # tpot (580-180)/4 = 100 and (900-600)/3 = 100; the request with one token has none.
    assert found["tpot"] == Distribution(2, 100, 100, 100, 100)
    assert found["e2e"] == Distribution(2, 450, 450, 585, 597)  # 600, 300
    assert found["e2e_client"] == Distribution(2, 670, 670, 904, 924.8)  # 930, 410
    assert found["queue"] == Distribution(3, 60, 50, 95, 99)  # 30, 50, 100
    assert found["decode"] == Distribution(1, 400, 400, 400, 400)
    assert found["preempted"].count == 1
    assert found["dispatch"] == Distribution()
    assert {"tokenize", "dispatch", "queue", "prefill", "decode", "preempted", "output"} <= set(found)


def test_rates(three_requests: Session):
    # From the first arrival, 1.0 s, to the last end, 3.0 s, of all six.
    found = requests_of(three_requests).rates
    assert found.span_ns == 2_000_000_000
    assert (found.requests, found.output_tokens, found.total_tokens) == (1.5, 155.0, 185.0)


def test_rates_begin_with_the_first_time_known(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s")
    builder.request(1, 3_000_000_000, queued_ns=1_000_000_000, output_tokens=10)
    assert requests_of(builder.write()).rates.output_tokens == 5.0


def test_inter_token_latency_is_weighted_and_leaves_cut_steps_out(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s")
    builder.step(1, 0, 10, "decode")
    builder.step(2, 10, 20, "mixed")
    builder.step(3, 20, 30, "decode", status="partial")
    builder.interval(1, 1000, 3)
    builder.interval(2, 5000, 1, "mixed")
    builder.interval(3, 10**9, 50)
    found = requests_of(builder.write())
    # 1000, 1000, 1000, 5000
    assert found.latencies["itl"] == Distribution(4, 2000, 1000, pytest.approx(4400), pytest.approx(4880))
    assert {name: each.count for name, each in found.intervals_by_phase.items()} == {"decode": 3, "mixed": 1}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(1, 60)), min_size=1, max_size=40))
def test_weighted_percentiles_are_those_of_the_repeated_array(pairs: list[tuple[int, int]]):
    values, weights = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    wanted = np.percentile(np.repeat(values, weights), [0, 37.5, 50, 95, 99, 100])
    assert weighted_percentiles(values, weights, [0, 37.5, 50, 95, 99, 100]) == pytest.approx(
        wanted.tolist(), rel=1e-12
    )


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 60)), max_size=40))
def test_weighted_distribution_is_that_of_the_repeated_array(pairs: list[tuple[int, int]]):
    values, weights = (pd.Series([pair[i] for pair in pairs], dtype="int64") for i in (0, 1))
    repeated = np.repeat(values.to_numpy(), weights.to_numpy())
    found = distribution(values, weights)
    assert found.count == len(repeated)
    if len(repeated):
        assert found.mean == pytest.approx(repeated.mean())
        assert [found.p50, found.p95, found.p99] == pytest.approx(np.percentile(repeated, [50, 95, 99]).tolist())


# Steps


def test_steps_by_kind(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s")
    builder.step(1, 0, 100, "prefill", prefill_tokens=64, prefill_requests=2, output_tokens=2)
    builder.step(2, 100, 120, "decode", decode_tokens=3, decode_requests=3, output_tokens=3)
    builder.step(3, 120, 150, "decode", decode_tokens=4, decode_requests=4)
    builder.step(4, 150, 990, "mixed", status="incomplete", decode_tokens=9)
    builder.step(5, 150, 990, "decode", status="ranks_missing", output_tokens=9)
    found = steps_of(builder.write())
    assert found.count == 5
    assert found.by_status == {"complete": 3, "incomplete": 1, "ranks_missing": 1, "partial": 0}
    assert list(found.kinds) == ["prefill", "decode"]
    decode = found.kinds["decode"]
    assert (decode.count, decode.total_ns, decode.tokens, decode.requests) == (2, 50, 3.5, 3.5)
    assert (decode.output_tokens, decode.membership_unknown) == (3, 1)
    assert decode.duration == Distribution(2, 25, 25, 29.5, pytest.approx(29.9))
    assert (found.kinds["prefill"].tokens, found.kinds["prefill"].requests) == (64, 2)


# Stages


@pytest.fixture
def one_thread(tmp_path: Path) -> Session:
    """Scheduler and worker on one thread: a prefill step of 1000 ns, a decode step of 500 ns, and one that was cut."""
    builder = SessionBuilder(tmp_path / "s")
    builder.step(1, 1000, 2000, "prefill", unattributed_ns=70)
    builder.segment("schedule", 1000, 1100, 1)
    execute = builder.segment("execute", 1150, 1900, 1, self_ns=100)
    rank = builder.segment("rank_step", 1200, 1850, 1, self_ns=60, parent=execute)
    builder.segment("prepare", 1210, 1300, 1, parent=rank)
    builder.segment("forward", 1300, 1700, 1, parent=rank)
    builder.segment("sample", 1700, 1800, 1, parent=rank)
    builder.segment("update", 1900, 1980, 1)
    builder.segment("between", 2000, 3000, self_ns=900)
    builder.segment("emit", 2100, 2200)
    builder.step(2, 3000, 3500, "decode")
    builder.segment("schedule", 3000, 3050, 2)
    execute = builder.segment("execute", 3050, 3400, 2, self_ns=150)
    forward = builder.segment("forward", 3100, 3300, 2, self_ns=180, parent=execute)
    builder.segment("gc_pause", 3150, 3170, parent=forward)  # it does not know the step: its parent does
    builder.segment("update", 3400, 3500, 2)
    builder.segment("idle", 3500, 4000)
    builder.step(3, 4000, 4100, "decode", status="incomplete", unattributed_ns=100)
    builder.segment("schedule", 4000, 4050, 3)
    builder.segment("model_load", 0, 900, thread=71)
    return builder.write()


def test_one_thread_is_one_timeline(one_thread: Session):
    found = stages_of(one_thread)
    (timeline,) = found.timelines
    assert (timeline.name, timeline.threads, timeline.of) == ("scheduler", 1, "step")
    assert timeline.envelope_ns == timeline.accounted_ns == 1500
    # unattributed: 70 of step 1 in no segment, and 60 of its rank_step
    assert self_times(timeline) == {
        "schedule": 150,
        "execute": 250,
        "update": 180,
        "prepare": 90,
        "forward": 580,
        "sample": 100,
        "gc_pause": 20,
        "unattributed": 130,
    }
    assert_partition(timeline)
    forward = next(row for row in timeline.stages if row.stage == "forward")
    assert forward.share == pytest.approx(580 / 1500)
    assert forward.duration == Distribution(2, 300, 300, 390, 398)  # 400 and 200, what is in it included
    assert timeline.unattributed.duration == Distribution(2, 65, 65, 123.5, pytest.approx(128.7))  # 130 and 0
    by_phase = {phase: {row.stage: row.self_ns for row in rows} for phase, rows in timeline.by_phase.items()}
    assert by_phase["prefill"]["forward"] == 400 and by_phase["decode"]["forward"] == 180
    assert by_phase["prefill"]["unattributed"] == 130 and by_phase["decode"]["unattributed"] == 0
    assert "gc_pause" not in by_phase["prefill"]


def test_what_belongs_to_no_step_stands_apart(one_thread: Session):
    found = stages_of(one_thread)
    rows = {row.stage: (row.count, row.total_ns, row.inside_ns) for row in found.outside}
    assert rows == {
        "emit": (1, 100, 0),
        "between": (1, 1000, 0),
        "model_load": (1, 900, 0),
        "gc_pause": (1, 20, 20),
        "idle": (1, 500, 0),
    }
    assert found.left_out == 1


def test_stages_without_rows_are_named_by_reason(one_thread: Session):
    found = stages_of(one_thread)
    assert "attention" in found.above_level and "collective" in found.above_level
    assert "grammar" in found.no_rows
    assert not [name for name in (*found.no_rows, *found.above_level) if name.startswith("device_")]  # none was timed
    assert not {"schedule", "forward"} & {*found.no_rows, *found.above_level}
    assert "attention" in stages_of(one_thread, Level.LAYER).no_rows
    assert stages_of(one_thread, Level.LAYER).above_level == []


@pytest.fixture
def processes(tmp_path: Path) -> Session:
    """Front end, scheduler and two ranks in processes of their own; the first rank returns on a helper thread."""
    builder = SessionBuilder(tmp_path / "s")
    builder.request(1, 2500, arrival_ns=500)
    builder.step(1, 1000, 2000, "decode", unattributed_ns=40)
    builder.segment("schedule", 1000, 1100, 1)
    builder.segment("execute", 1100, 1900, 1)
    builder.segment("update", 1900, 1960, 1)
    # The ranks' keys are the scheduler's but for the last digits, which a float would lose, and so are their threads.
    for process, end, forward_end in ((PROCESS + 1, 1800, 1700), (PROCESS + 2, 1900, 1850)):
        at = {"process": process, "thread": THREAD}
        rank = builder.segment("rank_step", 1100, end, 1, self_ns=end - forward_end, **at)
        builder.segment("prepare", 1100, 1200, 1, parent=rank, **at)
        builder.segment("forward", 1200, forward_end, 1, parent=rank, **at)
    builder.segment("return", 1800, 1850, 1, process=PROCESS + 1, thread=81)
    builder.segment("prepare", 2100, 2200, process=PROCESS + 1, thread=THREAD)  # a dummy run: of no step
    front = {"process": 5, "thread": 50}
    builder.segment("detokenize", 2000, 2100, **front)
    outer = builder.segment("detokenize", 2200, 2300, self_ns=90, **front)
    builder.segment("gc_pause", 2210, 2220, parent=outer, **front)
    return builder.write()


def test_processes_are_timelines_of_their_own(processes: Session):
    found = stages_of(processes)
    timelines = {timeline.name: timeline for timeline in found.timelines}
    assert list(timelines) == ["scheduler", "rank", "front end", "rank, helper threads"]
    for timeline in found.timelines:
        assert_partition(timeline)
    assert self_times(timelines["scheduler"]) == {"schedule": 100, "execute": 800, "update": 60, "unattributed": 40}
    rank = timelines["rank"]
    assert (rank.threads, rank.of, rank.envelope_ns, rank.accounted_ns) == (2, "rank_step", 1500, 1500)
    assert self_times(rank) == {"prepare": 200, "forward": 1150, "unattributed": 150}
    assert rank.stages[1].share == pytest.approx(1150 / 1500)
    # Nothing holds the front end's work together: it is measured against the time observed, 500 to 2500.
    front = timelines["front end"]
    assert (front.threads, front.of, front.envelope_ns) == (1, "observed time", 2000)
    assert self_times(front) == {"detokenize": 190, "gc_pause": 10, "unattributed": 1800}
    assert front.unattributed.share == pytest.approx(0.9)
    assert self_times(timelines["rank, helper threads"]) == {"return": 50, "unattributed": 1950}
    assert {row.stage: (row.total_ns, row.inside_ns) for row in found.outside} == {
        "prepare": (100, 0),
        "gc_pause": (10, 10),
    }


def test_ranks_without_their_envelope_are_measured_against_the_time_observed(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s")
    builder.step(1, 0, 1000, unattributed_ns=1000)
    builder.segment("forward", 100, 400, 1, process=8)
    timelines = {timeline.name: timeline for timeline in stages_of(builder.write()).timelines}
    assert self_times(timelines["scheduler"]) == {"unattributed": 1000}
    assert self_times(timelines["rank, helper threads"]) == {"forward": 300, "unattributed": 700}


def test_shares_add_up_where_steps_overlap(tmp_path: Path):
    """The second step is scheduled while the first runs: each step's own segments leave the other's to the other."""
    builder = SessionBuilder(tmp_path / "s")
    builder.step(1, 0, 1000)
    builder.segment("schedule", 0, 100, 1)
    builder.segment("execute", 200, 900, 1)
    builder.segment("update", 900, 1000, 1)
    builder.step(2, 100, 1600)
    builder.segment("schedule", 100, 200, 2)
    builder.segment("execute", 1000, 1500, 2)
    builder.segment("update", 1500, 1600, 2)
    (timeline,) = stages_of(builder.write()).timelines
    assert (timeline.envelope_ns, timeline.accounted_ns) == (2500, 1600)
    assert_partition(timeline)
    assert timeline.stages[1].share == pytest.approx(1200 / 1600)


def test_stage_of_a_newer_vocabulary_goes_by_its_number(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s")
    builder.step(1, 0, 100)
    builder.segment("schedule", 0, 100, 1, stage=999)
    (timeline,) = stages_of(builder.write()).timelines
    assert self_times(timeline) == {"stage 999": 100, "unattributed": 0}


def test_empty_session_breaks_down_to_nothing(tmp_path: Path):
    session = SessionBuilder(tmp_path / "s").write()
    assert requests_of(session).count == 0
    assert requests_of(session).latencies["ttft"] == Distribution()
    assert requests_of(session).rates.requests is None
    assert steps_of(session).kinds == {}
    assert stages_of(session).timelines == [] and stages_of(session).outside == []


# Losses and hooks


def test_losses_and_hooks(tmp_path: Path):
    builder = SessionBuilder(
        tmp_path / "s", counts={"accounting_conflict": 2, "spans": 9, "corrupt": 1, "incomplete": 6}
    )
    builder.losses(read=100, overwritten=5, torn=1)
    builder.losses(ring="control", read=50)
    builder.losses(ring="control", process=1, read=1, overwritten=1, dropped=4, unfinished=2, corrupt=2)
    waiting = {"name": "worker", "status": "waiting", "why": "not imported"}
    missing = {"name": "core", "status": "missing", "why": "no attribute"}
    unused = {"name": "nowhere", "status": "waiting", "why": "not imported"}
    installed = {"name": "worker", "status": "installed", "why": ""}
    made = {"name": "connector", "status": "unused", "why": "on 0 objects"}
    builder.process(hooks=[waiting, missing, unused, made], errors={"core": 1})
    not_made = {**made, "status": "waiting", "why": "it is put on objects"}
    builder.process(1, hooks=[installed, missing, unused, not_made], errors={"core": 2, "worker": 1})
    found = health(builder.write().read_manifest())
    assert found.lost == {
        "overwritten": 6,
        "dropped": 4,
        "torn": 1,
        "unfinished": 2,
        "corrupt": 3,
        "given_up": 0,
        "incomplete": 6,
    }
    assert (found.read, len(found.rings), found.accounting_conflicts) == (151, 2, 2)
    assert found.hooks == [
        HookTrouble("core", "missing", "no attribute", 2),
        HookTrouble("nowhere", "waiting", "not imported", 2),
    ]
    assert found.errors == {"core": 3, "worker": 1}


# Load


def test_columns_have_the_types_of_the_schema(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s")
    builder.request(2**62 + 5, 10)
    builder.segment("idle", 0, 10)
    builder.step(1, 0, 10)
    frames = load(builder.write())
    assert set(frames.tables) == set(TABLES)
    requests, segments = frames["requests"], frames["segments"]
    assert requests["handle"].dtype == "int64" and requests["handle"][0] == 2**62 + 5
    assert requests["prompt_tokens"].dtype == "Int64" and requests["prompt_tokens"].isna().all()
    assert requests["partial"].dtype == "bool"
    assert segments["stage"].dtype == "int16" and segments["parent_stage"].dtype == "Int16"
    assert segments["process"][0] == PROCESS
    assert frames["steps"]["instance"][0] == INSTANCE
    for name, schema in TABLES.items():
        assert frames[name].columns.tolist() == schema.names


def windowed(path: Path, **manifest: object) -> SessionBuilder:
    builder = SessionBuilder(path, **manifest)
    for number in range(1, 4):
        end = number * 10_000_000_000
        builder.request(number, end)
        builder.row("states", handle=number, stage=12, begin_ns=end - 9_000_000_000, end_ns=end - 8_000_000_000)
        builder.row("members", handle=number, instance=INSTANCE, first_step=number, last_step=number)
        builder.step(number, end - 5_000_000_000, end)
        builder.segment("schedule", end - 5_000_000_000, end - 4_000_000_000, number)
        builder.segment("between", end, end + 1)
        builder.interval(number, number, 1)
    return builder


def test_window_holds_what_ended_in_it(tmp_path: Path):
    frames = load(windowed(tmp_path / "s").write(), 11)
    # The last thing recorded ends at 30 s and 1 ns. A segment goes with its step, a state with its request.
    assert frames.since_ns == 19_000_000_001
    assert frames["requests"]["handle"].tolist() == [2, 3]
    assert frames["states"]["handle"].tolist() == [2, 3]
    assert frames["members"]["handle"].tolist() == [2, 3]
    assert frames["steps"]["step"].tolist() == [2, 3]
    assert frames["segments"]["step"].dropna().tolist() == [2, 3] and len(frames["segments"]) == 4
    assert frames["intervals"]["interval_ns"].tolist() == [2, 3]
    assert frames.rows["requests"] == 3


def test_window_keeps_a_step_and_its_segments_together(tmp_path: Path):
    frames = load(windowed(tmp_path / "s").write(), 1, {"segments": ["stage", "self_ns"]})
    assert frames["segments"]["self_ns"].tolist() == [1_000_000_000, 1]  # schedule ended 4 s before its step did


def test_window_of_a_session_still_being_written_ends_with_its_manifest(tmp_path: Path):
    builder = windowed(tmp_path / "s", complete=False, anchors=[(0, 0)])
    session = builder.write()  # the manifest is written now, long after 30 s
    frames = load(session, 60)
    assert all(frames[name].empty for name in TABLES)
    builder.manifest.complete = True
    assert len(load(builder.write(), 60)["requests"]) == 3


def test_damaged_part_is_an_error_that_names_it(tmp_path: Path):
    session = windowed(tmp_path / "s").write()
    (session.path / "tables" / "steps" / "part-00000001.parquet").write_bytes(b"PAR1 not parquet")
    with pytest.raises(SessionError, match="tables/steps"):
        load(session)
