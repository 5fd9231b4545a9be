"""Tests of the GPU's benchmark with a real engine, where there is neither: its arithmetic, its tables, what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

import engine
from figures import Kernel, Quartiles, Span, Stretch, compared, kernels_of, quartiles, stretches

BEGINS, ENDS = "begins ", "ends "
BASE = 1_700_000_000_000_000_000


def event(kind: str, name: str, ts: float, dur: float, thread: int = 1, **args: Any) -> dict[str, Any]:
    """One of a trace, in us as they are there."""
    return {"ph": "X", "cat": kind, "name": name, "ts": ts, "dur": dur, "tid": thread, "args": args}


def step_of(number: int, at: float) -> list[dict[str, Any]]:
    """A step whose forward launches two kernels that overlap and a copy, and whose sampling launches one kernel.

    What is launched on another thread meanwhile, before the forward and after it, belongs to none of them.
    """
    return [
        event("cuda_runtime", "cudaLaunchKernel", at - 1, 0.5, correlation=10 * number),
        event("user_annotation", "begins device_forward", at, 1),
        event("cuda_runtime", "cudaLaunchKernel", at + 2, 0.5, correlation=10 * number + 1),
        event("cuda_driver", "cuLaunchKernelEx", at + 3, 0.5, correlation=10 * number + 2),
        event("cuda_runtime", "cudaMemcpyAsync", at + 4, 0.5, correlation=10 * number + 3),
        event("cuda_runtime", "cudaLaunchKernel", at + 4, 0.5, thread=2, correlation=10 * number + 4),
        event("user_annotation", f"ends device_forward {number}", at + 5, 1),
        event("user_annotation", "begins device_sample", at + 7, 1),
        event("cuda_runtime", "cudaLaunchKernel", at + 9, 0.5, correlation=10 * number + 5),
        event("user_annotation", f"ends device_sample {number}", at + 10, 1),
        event("kernel", "early", at + 15, 5, thread=7, correlation=10 * number),
        event("kernel", "first", at + 20, 10, thread=7, correlation=10 * number + 1),
        event("kernel", "second", at + 25, 10.5, thread=8, correlation=10 * number + 2),
        event("gpu_memcpy", "copy", at + 40, 2, thread=7, correlation=10 * number + 3),
        event("kernel", "another's", at + 90, 9, thread=7, correlation=10 * number + 4),
        event("kernel", "sampler", at + 50, 4, thread=7, correlation=10 * number + 5),
        event("gpu_user_annotation", f"ends device_forward {number}", at + 20, 30, thread=7),
    ]


def test_what_a_stage_launched_is_found_on_the_device():
    events = [*step_of(4, 1000.0), *step_of(3, 100.0), {"ph": "M", "name": "process_name"}]
    found = stretches({"traceEvents": events, "baseTimeNanoseconds": BASE}, BEGINS, ENDS)
    forward = {
        step: Stretch(BASE + at + 20_000, BASE + at + 42_000, 17_500, 3) for step, at in ((3, 100_000), (4, 1_000_000))
    }
    assert {step: each for (stage, step), each in found.items() if stage == "device_forward"} == forward
    assert found["device_sample", 3] == Stretch(BASE + 150_000, BASE + 154_000, 4000, 1)
    assert len(found) == 4


def test_what_launched_nothing_or_was_not_opened_is_left_out():
    events = [
        event("user_annotation", "ends device_forward 1", 10, 1),
        event("user_annotation", "begins device_forward", 20, 1),
        event("user_annotation", "ends device_forward 2", 30, 1),
    ]
    assert stretches({"traceEvents": events}, BEGINS, ENDS) == {}


def test_spans_beside_their_kernels():
    """The host's clock is 1 ms behind the profiler's; of the third step no kernel is known."""
    spans = {1: Span(9_000, 30_500, 500), 2: Span(49_000, 71_000, 500), 3: Span(0, 1, 1)}
    kernels = {1: Stretch(1_010_000, 1_030_000, 15_000, 2), 2: Stretch(1_048_400, 1_070_000, 21_600, 9)}
    found = compared(spans, kernels, 1_000_000)
    assert found.length.count == 2 and found.length.worst_ns == 1500 and found.length.within == 1
    assert found.ahead.median == 200 and found.behind.median == 750
    assert found.outside == 1, "the second step's first kernel is 600 ns ahead of its span, more than the clock's error"
    assert found.busy == pytest.approx(36_600 / 41_600)
    nothing = compared({}, kernels, 0)
    assert nothing.length.count == 0 and nothing.busy is None and nothing.ahead == Quartiles(None, None, None)


@given(st.lists(st.floats(-1e9, 1e9), min_size=1))
def test_quartiles_are_in_order_and_in_range(values: list[float]):
    found = quartiles(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)  # type: ignore[operator]


def test_what_is_shown(capsys: pytest.CaptureFixture[str]):
    spread = {"median": 1500.0, "low": 1000.0, "high": 2000.0}
    length = {"count": 31, "median_ns": 900.0, "worst_ns": 4000.0, "within": 0.968}
    said = {"length": length, "ahead": spread, "behind": spread, "outside": 0, "busy": 0.5, "spans": 900}
    times = {"p50_ns": 12_000}
    report = {
        "observed_ns": 1000,
        "busy_ns": 600,
        "still": [{"reason": "no work", "total_ns": 400}],
        "launch_delay": times,
        "clock_error": times,
        "clock_error_most_ns": None,
        "contradictions": 0,
        "skipped": 0,
    }
    run = {
        "model": "moe",
        "mode": "graphs",
        "info": {"vllm": "0.32.0", "torch": "2", "runner": 2, "graphs": "FULL", "overlapped": True},
        "compared": {"device_forward": said},
        "step_ns": spread,
        "cost_pct": {"median": 0.25, "low": -0.1, "high": 0.6},
        "report": [report],
        "device": {"by": "event pairs"},
        "marks": [{"by": "marks"}],
        "layers": {"attention": length | {"kernels_ns": 9000}},
        "experts": {"right": 7, "of": 8},
    }
    engine.show({"runs": [run], "failed": {"dense, eager": "an engine did not start\nits log"}})
    text = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any(line.startswith("moe, graphs device_forward 31 0.90 4.00 97 % 1.50 (1.00 to 2.00)") for line in lines)
    assert "moe, graphs V2 FULL yes 1.50 (1.00 to 2.00) 0.25 (-0.10 to 0.60)" in lines
    assert "busy 60.0 %, still 40.0 % no work; launch delay p50 12.00 us" in text and "most - us" in text
    assert "dense, eager: failed: an engine did not start" in lines
    assert "moe, graphs attention 31 9.00 0.90 4.00 97 %" in lines
    assert "moe, graphs: tokens by expert right in 7 of 8 layers" in lines
    engine.show_layers([run | {"layers": {"why": "4 marks in the profile"}}])
    assert "marks are not compared: 4 marks in the profile" in capsys.readouterr().out


def test_marks_beside_the_kernels_between_them():
    """Two steps of two layers; in the second step's last layer the mark's span is 3 us longer than its kernel."""
    us = 1000
    said = {"by": "marks", "stages": ["attention"], "layers": [0, 11]}
    kernels, rows = [], []
    for number, step in enumerate((7, 8)):
        at = 1_000 * us * number
        for name in "mmmmkmkmkmm":  # the pass, the empty span, a layer, what is between, the other layer, the pass
            width = {"m": 1, "k": 10}[name] * us
            kernels.append(Kernel({"m": "mark_kernel", "k": "gemm"}[name], at, at + width))
            at += width
        for layer in (0, 11):
            lasted = (10 + 3 * (number == 1 and layer == 11)) * us
            rows.append({"stage": 60, "step": step, "a0": layer, "begin_ns": 0, "end_ns": lasted})
    found = engine.marked_beside(said, kernels, pd.DataFrame(rows), [7, 8])
    assert found["attention"] == {
        "count": 4, "median_ns": 0, "worst_ns": 3 * us, "within": 0.75, "kernels_ns": 10 * us
    }  # fmt: skip
    assert (
        engine.marked_beside(said, kernels[:-1], pd.DataFrame(rows), [7, 8])["why"]
        == "15 marks in the profile, 8 in a step"
    )
    assert "1 were profiled" in engine.marked_beside(said, kernels, pd.DataFrame(rows), [7])["why"]
    assert engine.marked_beside({"by": "nothing", "why": "no"}, [], pd.DataFrame(rows), []) == {"why": "no"}


def test_every_token_is_counted_for_as_many_experts_as_it_is_sent_to():
    steps = pd.DataFrame({"instance": [1, 1], "step": [1, 2], "prefill_tokens": [3, 0], "decode_tokens": [1, 2]})
    counts = [[8, 8], [4, 5]]
    experts = pd.DataFrame({"instance": [1, 1], "step": [1, 2], "layer": [0, 0], "counts": counts})
    assert engine.experts_right(steps, experts) == {"right": 1, "of": 2}
    assert engine.experts_right(steps, experts[:0]) == {"right": 0, "of": 0}


def test_kernels_of_a_trace():
    found = kernels_of({"traceEvents": step_of(3, 100.0), "baseTimeNanoseconds": BASE})
    assert len(found) == 6 and Kernel("first", BASE + 120_000, BASE + 130_000) in found


def test_the_checkout_is_lent_with_its_plugin(tmp_path: Path):
    """A Python that has no stagetrace finds the package and the plugin there; one that has it is lent nothing."""
    source = f"import sys; sys.path.insert(0, {engine.HERE.as_posix()!r}); import engine, pathlib; "
    code = f"{source} print(engine.lend(pathlib.Path({tmp_path.as_posix()!r})))"
    away: dict[str, Any] = {"cwd": tmp_path.parent, "capture_output": True, "text": True, "timeout": 60}
    bare = subprocess.run([sys.executable, "-S", "-c", code], check=True, **away)
    assert bare.stdout.strip() == str(tmp_path)
    asks = (
        "import importlib.metadata as m, stagetrace.adapters.vllm.plugin, json;"
        "print(json.dumps([e.value for e in m.entry_points(group='vllm.general_plugins')]))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", asks], check=True, env={"PYTHONPATH": str(tmp_path)}, **away)
    assert json.loads(done.stdout) == ["stagetrace.adapters.vllm.plugin:register"]
    assert engine.lend(tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--modes", "fast"], "--modes takes some of"), (["--settings", "[1]"], "takes a JSON object")],
)
def test_bad_arguments(arguments: list[str], said: str):
    done = subprocess.run(
        [sys.executable, engine.__file__, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2 and said in done.stderr


def test_without_an_engine_it_says_what_to_do():
    done = subprocess.run(
        [sys.executable, engine.__file__, "--json"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "What to do: run it where there is a CUDA or HIP device" in done.stderr
