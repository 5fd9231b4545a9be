"""Tests of calibrations: the file, the ceilings that follow from it, how two compare, what a report makes of one."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner
from unit.test_report import shown
from unit.test_speed_of_light import built

from stagetrace.analysis.calibration import results, show
from stagetrace.analysis.calibration.cases import size_text
from stagetrace.analysis.calibration.ceilings import ceilings_of
from stagetrace.analysis.calibration.results import Calibration, CalibrationError, Row, by_chance, changes, load, save
from stagetrace.analysis.report import summarise
from stagetrace.analysis.speed_of_light import MEASURED
from stagetrace.cli.main import app

PROCESSOR = {"name": "A Processor", "device": "cpu", "threads": 2, "torch": "2.13.0"}


def row(component: str = "memory", op: str = "read", **values: Any) -> Row:
    seconds = values.pop("seconds", 1.0)
    rounds = values.pop("rounds", [seconds, seconds])
    defaults: dict[str, Any] = {"arithmetic": "", "kernel": "", "size": "1 KiB", "bytes": 1024, "operations": 0}
    times = {"best_s": seconds, "median_s": seconds, "q1_s": seconds, "q3_s": seconds, "rounds_s": rounds}
    return Row(component, op, **{**defaults, "ranks": 1, "shape": {}, "samples": 10, **times, **values})


def calibration(*rows: Row, **values: Any) -> Calibration:
    return Calibration(**{"device": PROCESSOR, "rows": list(rows), "made_ns": 1_764_000_000_000_000_000, **values})


def test_a_calibration_is_kept_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    made = calibration(row(), skipped={"gemm": "no such thing"}, other_processors=0.01)
    path = results.directory() / results.file_name(made.name, made.threads)
    assert results.find("A Processor", 2) is None
    save(made, path)
    assert load(path) == made
    assert results.find("A Processor", 2) == path == tmp_path / "stagetrace/calibrations/a-processor-2-threads.json"
    assert results.find("A Processor", 1) is None
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[:-9], "not JSON"),
        (lambda text: text.replace('"version": 1', '"version": 9'), "of this version"),
        (lambda text: text.replace('"best_s": 1.0', '"best_s": 0'), "not above 0"),
        (lambda text: text.replace('"best_s": 1.0', '"best_s": NaN'), "not above 0"),
        (lambda text: text.replace('"bytes": 1024', '"bytes": -1'), "negative"),
        (lambda text: text.replace('"op"', '"operation"'), "damaged"),
        (lambda text: text.replace('"rounds_s": [', '"rounds_s": [], "x": ['), "damaged"),
        (lambda text: "[]", "of this version"),
    ],
)
def test_a_file_that_is_none_is_refused_with_a_way_on(tmp_path: Path, change: Any, said: str):
    path = tmp_path / "calibration.json"
    save(calibration(row()), path)
    path.write_text(change(path.read_text()))
    with pytest.raises(CalibrationError, match=said) as error:
        load(path)
    assert "stagetrace calibrate" in str(error.value)


def test_ceilings_are_the_most_that_was_measured():
    found = ceilings_of(
        calibration(
            row(size="1 KiB", bytes=1_000, seconds=1e-3),  # 1 MB/s: the cost of a call, not of the memory
            row(size="4 KiB", bytes=4_000, seconds=1e-3),
            row(op="copy", size="4 KiB", bytes=8_000, seconds=4e-3),
            row(size="1 MiB", bytes=1_000_000, seconds=1.0),
            row("gemm", "linear", arithmetic="bf16", operations=10, seconds=1.0),
            row("gemm", "linear", arithmetic="bf16", operations=10, seconds=0.5),
            row("attention", "prefill", arithmetic="fp32", operations=10, seconds=1.0),
            row("collective", "all_reduce", bytes=100, seconds=1.0, ranks=4),
            row("collective", "send_to_the_moon", bytes=100, seconds=1e-9, ranks=4),
        )
    )
    assert found.peaks == {"bf16": 20.0, "fp32": 10.0}
    assert found.bandwidths == ((1_000, 4e6), (4_000, 4e6), (8_000, 2e6), (1_000_000, 1e6))
    assert found.bandwidth == 1e6
    assert found.link == 150.0  # 2 (n - 1) / n of the bytes


@given(st.lists(st.tuples(st.integers(1, 1 << 40), st.floats(1e-9, 1e3)), min_size=1, max_size=20))
def test_no_measured_rate_is_above_the_ceiling_of_its_working_set(measured: list[tuple[int, float]]):
    found = ceilings_of(calibration(*(row(bytes=size, seconds=seconds) for size, seconds in measured)))
    rates = [rate for _, rate in found.bandwidths]
    assert rates == sorted(rates, reverse=True)
    for size, seconds in measured:
        ceiling = found.bandwidth_at(size)  # type: ignore[arg-type]
        assert ceiling is not None and size / seconds <= float(ceiling) * (1 + 1e-9)


def test_two_calibrations_differ_where_they_differ_by_more_than_their_spread():
    before = calibration(row(size="1", seconds=1.0, rounds=[1.0, 1.2]), row(size="2"), row(size="3"))
    now = calibration(row(size="1", seconds=1.15), row(size="2", seconds=0.5), row(size="4"))
    beyond, both = changes(now, before)
    assert both == 2
    assert [(change.row.size, change.ratio) for change in beyond] == [("2", 2.0)]
    assert changes(now, now) == ([], 3)
    assert by_chance(now, before) == pytest.approx(2 / 6 + 2 / 6)  # of two rounds each


def test_what_repeats_is_within_its_spread():
    """Of rows whose times vary alike in both, as many differ by more than their spread as chance has it."""
    chance = random.Random(5)
    for rounds, rows in ((5, 3000), (3, 1000)):

        def made(rounds: int = rounds, rows: int = rows) -> Calibration:
            times = [[chance.lognormvariate(0, 0.1) for _ in range(rounds)] for _ in range(rows)]
            return calibration(*(row(size=str(i), seconds=min(one), rounds=one) for i, one in enumerate(times)))

        now, before = made(), made()
        beyond, both = changes(now, before)
        expected = by_chance(now, before)
        assert both == rows and expected == pytest.approx(rows * 2 / math.comb(2 * rounds, rounds))
        assert len(beyond) <= expected + 4 * math.sqrt(expected)  # the other's spread is one more condition
    # Where the machine has become half as fast, nearly all do.
    slower = calibration(*(replace(each, **scaled(each, 2.0)) for each in now.rows))
    assert len(changes(slower, now)[0]) > 0.9 * rows


def scaled(one: Row, by: float) -> dict[str, Any]:
    return {"best_s": one.best_s * by, "rounds_s": [each * by for each in one.rounds_s]}


def test_a_busy_machine_is_said():
    assert calibration(row()).busy == ""
    assert "1.5 processors" in calibration(row(), other_processors=1.5).busy
    assert "the rounds differ by 40%" in calibration(row(rounds=[1.0, 1.4])).busy
    exchange = row("collective", "all_reduce", ranks=2, rounds=[1.0, 2.5])
    assert calibration(row(), exchange, exchange).busy == ""
    assert "the rounds differ by 150%" in calibration(exchange).busy
    text = "\n".join(
        part for part in show.parts(calibration(row(), other_processors=1.5), None) if isinstance(part, str)
    )
    assert "THE MACHINE WAS BUSY: other programs took 1.5 processors" in text


def test_sizes_for_people():
    assert [size_text(size) for size in (512, 32 << 10, 1 << 20, 3 << 30)] == ["512 B", "32 KiB", "1 MiB", "3 GiB"]


def rows_of_all() -> list[Row]:
    return [
        row(bytes=1_000, seconds=1e-9),
        row("gemm", "linear", arithmetic="bf16", operations=10**12, seconds=1.0),
        row("collective", "all_reduce", bytes=10**9, seconds=1.0, ranks=2),
    ]


def test_a_report_compares_with_what_was_measured_on_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    session = built(tmp_path / "s", device="cpu", device_name="A Processor", device_threads=2).write()
    assert "Measure it: `stagetrace calibrate`." in shown(summarise(session))
    made = calibration(*rows_of_all())
    save(made, results.directory() / results.file_name(made.name, made.threads))
    summary = summarise(session)
    prefill = summary.light.phases["prefill"]
    assert prefill.mfu(MEASURED) == pytest.approx(prefill.operations / 1e12 / 0.2)
    assert f"ceilings: {made.source}" in shown(summary)
    # One that is named holds for whatever device, and that is said.
    other = replace(made, device={**PROCESSOR, "name": "Another"}, other_processors=1.0)
    save(other, tmp_path / "other.json")
    text = shown(summarise(session, calibration=tmp_path / "other.json"))
    assert "The calibration is of Another with 2 threads, and the session of A Processor with 2" in text
    assert "The machine was busy when it was calibrated: other programs took 1.0 processors" in text


def test_a_kept_calibration_that_is_damaged_is_a_note_and_a_named_one_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    session = built(tmp_path / "s", device="cpu", device_name="A Processor", device_threads=2).write()
    path = results.directory() / "a-processor-2-threads.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert "A calibration is left out" in shown(summarise(session))
    found = CliRunner().invoke(app, ["report", str(session.path), "--calibration", str(path)])
    assert found.exit_code == 2 and "is no calibration" in found.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--python", "/nowhere/python"], "Name a Python that has torch"),
        (["--only", "disks"], "name some of memory, gemm"),
        (["--plot", "picture.txt"], "ends in .svg, .png, .pdf"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(tmp_path: Path, arguments: list[str], said: str):
    found = CliRunner().invoke(app, ["calibrate", "--out", str(tmp_path / "c.json"), *arguments])
    assert found.exit_code == 2
    assert said in " ".join(found.output.split())
    assert not (tmp_path / "c.json").exists()


def test_a_python_without_torch_is_named(tmp_path: Path):
    found = CliRunner().invoke(app, ["calibrate", "--out", str(tmp_path / "c.json")])  # this one has none
    assert found.exit_code == 2 and "has no torch: name a Python that has" in " ".join(found.output.split())


def test_a_calibration_as_json_is_what_is_kept(tmp_path: Path):
    path = tmp_path / "c.json"
    made = calibration(*rows_of_all())
    save(made, path)
    assert json.loads(path.read_text()) == {"version": 1, **json.loads(json.dumps(asdict(made)))}
