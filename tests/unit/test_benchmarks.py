"""The benchmarks' own arithmetic, and record_cost as a program. No figure of this machine's speed is asserted."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import analysis_scale
import collector
import measure
import record_cost
import rings
import soak
import timeline_scale
from stream import Seen
from windows import STOPPED, WITH, WITHOUT, Window, client_figures, cpu_figures, cpu_seconds, difference, differences

from stagetrace.analysis.report import summarise
from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.exporters.session import Session
from stagetrace.instrument.records import RecordType, header_word

BENCHMARKS = Path(measure.__file__).parent


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


# Programs


def test_record_cost_prints_tables_and_one_object_last() -> None:
    done = run("record_cost.py", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    *tables, last = done.stdout.splitlines()
    assert any("two clock reads" in line for line in tables)
    assert "\x1b" not in done.stdout
    found = json.loads(last)
    keys = ("ratio_to_two_clock_reads", "hooked_call_ratio", "off_ratio", "sdk_span_over_hooked_call")
    for key in keys:
        low, high = found[f"{key}_iqr"]
        assert 0 < low <= found[key] <= high, key
    assert found["no_system_call"] is not False
    assert found["python_bytes"] < found["records"] / 100
    assert found["read_write_calls"] == 0
    assert found["threads"] == 0


def test_without_json_there_is_no_object() -> None:
    done = run("record_cost.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stdout.splitlines() if line.startswith("{")]


def test_step_cost_names_what_is_missing(tmp_path: Path) -> None:
    done = run("step_cost.py", "--quick", "--python", str(tmp_path / "python"))
    assert done.returncode == 2
    assert "make engines-env" in done.stderr


def test_soak_prints_what_is_held_over_time_and_accounts_for_every_step(tmp_path: Path) -> None:
    done = run("soak.py", "--quick", "--json", "--directory", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    *shown, last = done.stdout.splitlines()
    assert any(line.startswith("minute") and "collector MiB" in line for line in shown)
    found = json.loads(last)
    assert found["steps"] > 5_000
    assert found["slots_read"] > 10 * found["steps"]
    assert found["steps_twice"] == 0
    assert found["steps_missing"] == 0 or sum(found["lost"].values()) > 0
    assert found["accounting_conflicts"] == 0
    assert (
        set(found["verdict"])
        == set(found["per_hour"])
        == {f"{who}_{what}" for who in ("collector", "writer") for what in ("rss", "descriptors", "threads")}
    )
    assert found["last"]["session_mib"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_trend_is_flat_grows_or_is_not_resolved() -> None:
    seconds = np.arange(0.0, 3600, 15)
    noise = np.random.default_rng(4).normal(0, 0.2, len(seconds))
    verdicts = {
        "flat": 200 + noise,
        "GROWS": 200 + seconds / 300 + noise,
        "falls": 200 - seconds / 300 + noise,
        "not resolved: run longer": 200 + 60 * noise,
    }
    for verdict, values in verdicts.items():
        found = soak.trend(seconds, values)
        assert found.verdict == verdict
        assert found.low < found.per_hour < found.high
    assert soak.trend(seconds, verdicts["GROWS"]).per_hour == pytest.approx(12, rel=0.05)
    assert soak.trend(seconds, 10 + noise, tolerance=1).verdict == "flat"
    assert soak.trend(seconds[:3], noise[:3]).verdict == "not resolved: run longer"
    # Samples that hang together say less than their number: the same values, each four times.
    apart, together = soak.trend(seconds, noise), soak.trend(seconds, np.repeat(noise[::4], 4))
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_collector_prints_tables_and_one_object_last() -> None:
    done = run("collector.py", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    *tables, last = done.stdout.splitlines()
    assert any("records a second" in line for line in tables)
    found = json.loads(last)
    assert 0 < found["records_per_s"] <= found["records_per_s_raw"]
    for key in ("records_per_s", "otlp_spans_per_s"):
        low, high = found[f"{key}_iqr"]
        assert 0 < low <= found[key] <= high, key
    assert found["cpu_pct_at_200_steps"] > 0
    assert found["peak_rss_mb"] > 0


def test_timeline_scale_writes_whole_timelines() -> None:
    done = run("timeline_scale.py", "--quick", "--records", "30000", "--formats", "perfetto", "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    (figures,) = found["formats"]["perfetto"].values()
    assert figures["events"] > 30_000 and figures["bytes"] > 1_000_000 and found["flat"]
    assert timeline_scale.flat([300.0]) and timeline_scale.flat([200.0, 300.0, 320.0])
    assert not timeline_scale.flat([200.0, 300.0, 340.0])


def test_analysis_scale_measures_commands_by_the_number_of_records() -> None:
    done = run("analysis_scale.py", "--quick", "--commands", "report", "--json")
    assert done.returncode == 0, done.stderr
    *tables, last = done.stdout.splitlines()
    assert any("report" in line for line in tables)
    found = json.loads(last)
    assert [*found["seconds"]] == [*found["peak_rss_mb"]] and len(found["seconds"]) == 2
    for command in found["commands"].values():
        for figures in command.values():
            assert all(figure > 0 for figure in figures.values())
    assert found["met"] is None  # of sessions so small nothing is asked


def test_a_larger_session_is_the_same_again_later(tmp_path: Path) -> None:
    found = collector.stream(analysis_scale.CASE, 10_000)
    count = analysis_scale.write(found, 3 * found.slots, tmp_path / "session")
    session = Session.open(tmp_path / "session")
    assert count == 3 * found.slots
    steps, segments = (session.read_table(name) for name in ("steps", "segments"))
    one = analysis_scale.tables_of(found)
    assert steps.num_rows == 3 * one["steps"].num_rows and segments.num_rows == 3 * one["segments"].num_rows
    numbers = steps["step"].to_numpy()
    assert len(np.unique(numbers)) == len(numbers)
    summary = summarise(session)
    rest = [stage.share for stage in (*summary.stages.timelines[0].stages, summary.stages.timelines[0].unattributed)]
    assert (
        sum(share or 0 for share in rest) == pytest.approx(1) and summary.requests.count == 3 * one["requests"].num_rows
    )


@pytest.mark.parametrize(
    ("seconds", "megabytes", "met"), [((1.0, 10.0), 1500, True), ((1.0, 21.0), 1500, False), ((1.0, 10.0), 2500, False),
                                      ((0.5, 15.0), 1500, False)]
)  # fmt: skip
def test_the_goal_is_seconds_memory_and_a_line(seconds: tuple[float, float], megabytes: float, met: bool) -> None:
    own = {
        records: analysis_scale.Measured(taken, taken, megabytes)
        for records, taken in zip((1_000_000, 10_000_000), seconds, strict=True)
    }
    assert analysis_scale.met({"report": own}) is met


def test_the_synthetic_engine_writes_what_can_be_assembled() -> None:
    """Every request whole, every step complete, nothing in conflict: else the benchmark measures something else."""
    found = collector.stream(collector.Case(batch=8, workers=2), 30_000)
    assembler = Assembler(found.key)
    for _, batches in found.commits:
        for batch in batches:
            assembler.add(batch)
    tables = assembler.finish()
    steps, requests = tables["steps"].to_pylist(), tables["requests"].to_pylist()
    assert {(row["status"], row["ranks_reported"], row["members"], row["output_tokens"]) for row in steps} == {
        ("complete", 2, 8, 8)
    }
    assert len(steps) == found.steps
    finished = [row for row in requests if row["status"] == "finished" and row["arrival_ns"]]
    assert len(requests) - len(finished) == 8  # those that are in the batch at the end
    assert not assembler.counts.total()


def test_nothing_is_left_behind() -> None:
    with rings.recording() as (recorder, ring):
        path = ring.path
        assert path.is_file()
        assert recorder.ring is ring
    assert not path.exists()
    assert "STAGETRACE_SESSION" not in os.environ


def test_slots_of_the_detail_ring_are_counted() -> None:
    with rings.recording() as (recorder, ring):
        assert rings.detail_slots(ring) == 0
        for _ in range(ring.detail_slots + 5):
            recorder.segment(header_word(RecordType.SEGMENT, 1), 1, 2, 3, 4)
        assert rings.detail_slots(ring) == ring.detail_slots + 5


def test_room_is_made_for_control_records_and_drops_are_seen() -> None:
    header = header_word(RecordType.STATE, 1)
    with rings.recording() as (recorder, ring):
        for _ in range(3 * ring.control_slots // 1000):
            rings.make_room(ring)
            for _ in range(1000):
                recorder.state(header, 1, 1)
        assert rings.dropped(ring) == 0
        for _ in range(ring.control_slots):
            recorder.state(header, 1, 1)
        assert rings.dropped(ring) > 0


# What must not happen


def test_a_system_call_is_noticed() -> None:
    assert record_cost.makes_no_system_call(lambda: None, 10) is not False
    if record_cost.makes_no_system_call(lambda: None, 10):  # the kernel offers it
        assert record_cost.makes_no_system_call(lambda: os.getppid() and None, 10) is False


def test_growing_memory_is_noticed() -> None:
    kept: list[bytes] = []
    assert record_cost.memory_growth(lambda: kept.append(bytes(100)), 1000)["python_bytes"] > 100_000
    assert record_cost.memory_growth(lambda: None, 1000)["python_bytes"] < 1000


def test_reads_and_writes_are_counted() -> None:
    descriptor = os.open("/dev/null", os.O_WRONLY)
    try:
        assert record_cost.counters(lambda: os.write(descriptor, b"x") and None, 10)["read_write_calls"] == 10
    finally:
        os.close(descriptor)
    assert record_cost.counters(lambda: None, 10)["read_write_calls"] == 0


# Timing


def test_a_statement_is_run_as_it_stands() -> None:
    calls = itertools.count()
    # Names that the timing could have used itself: with one of them it would time something else.
    names: dict[str, Any] = dict.fromkeys(("clock", "times", "begin", "run", "now"), lambda: next(calls))
    assert measure.per_call("clock(); times(); begin(); run(); now()", names, 7)() > 0
    assert next(calls) == 35


def test_every_alternative_is_measured_once_a_round_and_the_first_round_is_left_out() -> None:
    called: list[str] = []

    def alternative(name: str) -> float:
        called.append(name)
        assert not gc.isenabled()
        return float(len(called))

    found = measure.rounds({name: (lambda name=name: alternative(name)) for name in "abc"}, 20)
    assert gc.isenabled()
    assert [len(values) for values in found.values()] == [20] * 3
    turns = [tuple(called[at : at + 3]) for at in range(0, len(called), 3)]
    assert len(turns) == 21
    assert {tuple(sorted(turn)) for turn in turns} == {("a", "b", "c")}
    assert len(set(turns)) > 1, "always in the same order"
    assert min(values.min() for values in found.values()) > 3


def test_spread_is_median_and_quartiles() -> None:
    found = measure.spread(np.arange(101.0))
    assert (found.low, found.median, found.high) == (25, 50, 75)
    assert measure.figure(found) == "50 (25 to 75)"


def test_interval_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(3.0, 1.0, 400)
    low, high = measure.interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert measure.interval(np.array([1.0, 2.0])) == (-np.inf, np.inf)


def test_json_has_no_number_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    measure.print_json({"a": float("nan"), "b": [np.float64(1.23456), np.inf], "c": {1: True, "d": 7}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.235, None], "c": {"1": True, "d": 7}}


# Windows


def test_what_the_client_saw_in_a_window() -> None:
    seen = Seen()
    seen.tokens = [(0.9, 1, 9.0), (1.0, 1, 0.1), (1.5, 2, 0.5), (2.0, 1, 9.0)]
    seen.firsts = [(1.1, 0.3), (2.5, 9.0)]
    found = client_figures(Window(0, WITH, 1.0, 2.0), seen)
    assert found == {"tpot": pytest.approx(0.6 / 3), "ttft": 0.3, "throughput": 4.0}
    assert cpu_figures(Window(0, WITH, 1.0, 2.0, {"worker": 0.8}), seen) == {"worker": pytest.approx(0.2)}


def windows(pairs: int) -> list[Window]:
    return [Window(pair, kind, 0, 1) for pair in range(pairs) for kind in (WITH, WITHOUT)]


def test_a_difference_is_taken_within_pairs() -> None:
    # The machine gets three times slower meanwhile; with is always 2 % above without.
    values = [base * change for base in np.linspace(1, 3, 10) for change in (1.02, 1.0)]
    found = difference(windows(10), values)
    assert found.pct == pytest.approx(2.0)
    assert (found.low, found.high) == (pytest.approx(2.0), pytest.approx(2.0))
    assert found.resolved
    assert found.json("tpot")["tpot_resolved"] is True
    assert str(found) == "+2.00 % (+2.00 to +2.00)"


def test_a_wide_interval_is_not_resolved() -> None:
    chance = np.random.default_rng(2)
    values = [base for _ in range(10) for base in (chance.uniform(0.8, 1.2), 1.0)]
    found = difference(windows(10), values)
    assert not found.resolved
    assert str(found).startswith("not resolved")


def test_a_third_kind_of_window_has_a_difference_of_its_own() -> None:
    kinds = (WITH, WITHOUT, STOPPED)
    made = [Window(pair, kind, 0, 1) for pair in range(4) for kind in kinds]
    values = [base * change for base in (1.0, 2.0, 3.0, float("nan")) for change in (1.10, 1.0, 1.03)]
    assert difference(made, values).pct == pytest.approx(10)
    assert difference(made, values, STOPPED).pct == pytest.approx(3)
    assert difference(made, values, WITH, STOPPED).pct == pytest.approx(100 * (1.10 / 1.03 - 1))


def test_a_pair_that_is_not_whole_is_left_out() -> None:
    values = [1.1, 1.0, float("nan"), 1.0, 1.1, 1.0, 1.1, 1.0]
    assert difference(windows(4), values).pct == pytest.approx(10)
    nothing = difference(windows(1), [float("nan"), 1.0])
    assert not nothing.resolved
    assert np.isnan(nothing.pct)


def test_every_metric_and_process_has_a_difference() -> None:
    made = [Window(pair, kind, pair, pair + 1, {"worker": 0.1}) for pair in range(3) for kind in (WITH, WITHOUT)]
    seen = Seen(tokens=[(pair + 0.5, 10, 1.0) for pair in range(3)], firsts=[(pair + 0.1, 0.2) for pair in range(3)])
    client, cpu = differences(made, seen)
    assert {name: one.pct for name, one in client.items()} == {"tpot": 0, "ttft": 0, "throughput": 0}
    assert {name: one.pct for name, one in cpu.items()} == {"worker": 0}


def test_cpu_time_of_another_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            before = cpu_seconds(busy.pid)
            deadline = time.monotonic() + 30
            while cpu_seconds(busy.pid) < before + 0.02:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            busy.kill()
    assert np.isnan(cpu_seconds(busy.pid))
