"""Tests of the GPU's benchmark where there is none: its arithmetic, its tables, and what it says of this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

import device_time
import figures
from figures import Agreement, Kernel, Misfit, agreement, cost, microseconds, steps_of, table

from stagetrace.instrument.device_marks import Marked, MarkReader, MarkSpan

GPU = Path(device_time.__file__).parent
US = 1000


def run_of(*names: str, begin: int = 0) -> list[Kernel]:
    """Kernels one after the other: `m` is a mark of 1 us, `k` takes 10, `.` is a pause of 5."""
    found = []
    for name in names:
        width = {"m": 1, "k": 10, ".": 5}[name] * US
        if name != ".":
            found.append(Kernel({"m": "mark_kernel_0d1d2", "k": "gemm"}[name], begin, begin + width))
        begin += width
    return found


def test_what_runs_between_two_marks():
    one = run_of(*"mk.kmkmkm")  # the whole (0, 1) with a stage (2, 3) in it would need four: these follow one another
    (step,) = steps_of(one, [0, 1, 2, 3])
    assert step[0] == (1 * US, 26 * US, 0, 27 * US)
    assert step[1] == (38 * US, 48 * US, 37 * US, 49 * US)
    (step,) = steps_of(run_of(*"mmkmkm"), [0, 2, 3, 1])
    assert step[1] == (2 * US, 12 * US, 1 * US, 13 * US)
    assert step[0].first == 2 * US and step[0].last == 23 * US, "marks inside are no kernels of it"


def test_several_steps_in_whatever_order_the_profiler_gives_them():
    kernels = [kernel for number in range(3) for kernel in run_of(*"mkm", begin=100 * US * number)]
    found = steps_of(kernels[::-1], [0, 1])
    assert [step[0].first for step in found] == [1 * US, 101 * US, 201 * US]
    assert steps_of(run_of(*"mm"), [0, 1]) == [{0: (US, US, 0, 2 * US)}], "nothing ran between"


@pytest.mark.parametrize(
    ("names", "order"), [("mkmm", [0, 1]), ("mkm", []), ("mkm", [1, 0]), ("m", [0, 1]), ("kk", [0, 1])]
)
def test_a_profile_of_something_else_is_a_misfit(names: str, order: list[int]):
    with pytest.raises(Misfit):
        steps_of(run_of(*names), order)


def test_agreement_is_within_two_microseconds_or_two_percent():
    found = agreement([(10_000, 11_900), (10_000, 12_100), (1_000_000, 1_015_000)])
    assert found == Agreement(3, 2100, 15_000, pytest.approx(2 / 3))
    assert agreement([]) == Agreement(0, None, None, None)


@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats(-50, 500)), min_size=2), st.integers(1, 200))
@example([(1.0, 171.56202644101643), (7978.0, 171.56202644101643)], 49)
def test_a_cost_is_what_each_of_them_adds(rounds: list[tuple[float, float]], number: int):
    found = cost([plain for plain, _ in rounds], [plain + number * each for plain, each in rounds], number)
    each = [more for _, more in rounds]
    assert min(each) - 1e-3 <= found.low <= found.median <= found.high <= max(each) + 1e-3


def test_table():
    text = table(("mode", "us"), [("eager", "1.00"), ("x", "200.50")])
    assert text.splitlines() == ["mode       us", "eager    1.00", "x      200.50"]
    assert microseconds(1234) == "1.23" and microseconds(None) == "-"
    assert figures.MARK in "mark_kernel_0d1d2"


def test_measurements_beside_the_profilers(capsys: pytest.CaptureFixture[str]):
    """Two steps with one stage, of which the second step's marks are not told; the host's clock is 3 us off."""
    marked = [Marked("forward", -1), Marked("moe", 0)]
    kernels = run_of(*"mmkmkm") + run_of(*"mmkmkm", begin=500 * US)
    spans: dict[int, list[Any]] = {
        1: [MarkSpan(marked[0], 50_000, 74_000), MarkSpan(marked[1], 51_500, 63_000)],
        2: [],
    }
    pairs = SimpleNamespace(contradictions=0)
    marks = SimpleNamespace(reader=MarkReader(marked))
    written = [(1, 1_003_000, 1_028_000, 4000), (2, 1_503_000, 1_527_000, 5000)]
    found = device_time.compared(kernels, spans, device_time.Timed(marks, pairs, written, [0, 2, 3, 1]), -1_000_000)
    assert found["marks"]["moe"]["count"] == 1 and found["marks"]["moe"]["worst_ns"] == 1500
    assert found["marks"]["forward"]["worst_ns"] == 3000 and found["marks"]["forward"]["within"] == 0
    assert found["pairs"]["count"] == 2 and found["pairs"]["worst_ns"] == 1000
    assert found["begins"]["median_ns"] == 3000 and found["clock_error_ns"] == 5000
    assert found["timer_resolution_ns"] == 500
    with pytest.raises(Misfit, match="2 steps in the profile, 1 were run"):
        device_time.compared(kernels, {1: []}, device_time.Timed(marks, pairs, [], [0, 2, 3, 1]), 0)
    spread = {"median": 900.0, "low": 800.0, "high": 1100.0}
    costs = [
        {"mode": "eager", "layers": 4, "step_ns": 2e6, "marks": 16, "mark": spread, "pair": spread, "nothing": spread}
    ]
    whole = {"device": "a GPU", "ranks": 1, "torch": "2", "accuracy": {"eager": found}, "costs": costs}
    others = {"host_ns": {"a mark": 7000}, "experts": {"eager": {"right": 7, "of": 8}}}
    device_time.show(whole | others | {"waits": False, "misfits": {"compiled": "3 marks"}})
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert ["eager", "marks,", "moe", "1", "1.50", "1.50", "100", "%"] in lines
    assert "compiled: its profile is not understood: 3 marks" in text
    assert "0.90 (0.80 to 1.10)" in text and "clock error at most 5.00 us" in text
    assert ["a", "mark", "7.00"] in lines and "eager: tokens by expert right in 7 of 8 layers of steps" in text


def test_without_a_gpu_it_says_what_to_do():
    done = subprocess.run(
        [sys.executable, GPU / "device_time.py", "--json"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "What to do: run it where there is a CUDA or HIP device" in done.stderr


def test_modes_and_stages_are_those_of_the_docs():
    text = (GPU.parents[1] / "docs" / "performance.md").read_text("utf-8")
    section = text[text.index("## On a GPU") :]
    assert all(mode in section for mode in device_time.MODES) and "not been run" in section
