"""Tests of the join of a profiler's trace with segments: exact on traces that are made, whole on random ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagetrace.analysis.kernels import (
    UNATTRIBUTED,
    RankKernels,
    clock_offset,
    covered,
    own_times,
    rank_kernels,
    read_trace,
    trace_of,
)
from stagetrace.analysis.show_kernels import by_kernel, by_stage, kernel_parts, kernels_dict
from stagetrace.exporters.session import SessionError
from stagetrace.instrument.kernel_request import STEP_RANGE, KernelRequest, read_request, withdraw
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from pathlib import Path

OFFSET = 5_000_000.0  # what the profiler's clock is ahead, ns
THREAD = 77  # ours; the trace has the system's
TID = 4242
PID = 99


def event(name: str, begin_us: float, duration_us: float, category: str = "cpu_op", **words: Any) -> dict[str, Any]:
    """As in Chrome's format; `begin_us` on our clock."""
    when = begin_us + OFFSET / 1e3
    return {"ph": "X", "cat": category, "name": name, "tid": TID, "ts": when, "dur": duration_us, **words}


def step_range(begin_us: float) -> dict[str, Any]:
    return event(STEP_RANGE, begin_us, 1.0, "user_annotation")


def segment(stage: str, begin_us: float, end_us: float, thread: int = THREAD) -> dict[str, int]:
    return {
        "thread": thread,
        "stage": BY_NAME[stage].id,
        "begin_ns": round(begin_us * 1e3),
        "end_ns": round(end_us * 1e3),
    }


def of(events: list[dict[str, Any]], segments: list[dict[str, int]], steps: int = 1) -> RankKernels:
    said = {
        "rank": 3,
        "thread": THREAD,
        "ended": "all steps",
        "steps": [[1, 1 + at, at * 1_000_000 + 9_000, at * 1_000_000 + 12_000] for at in range(steps)],
        "begin_ns": 8_000,
        "end_ns": 1_000_000 * steps,
        "held_ns": 7,
    }
    ranges = [step_range(at * 1000 + 10.0) for at in range(steps)]
    frame = pd.DataFrame(segments, columns=["thread", "stage", "begin_ns", "end_ns"])
    return rank_kernels(trace_of([*ranges, *events]), said, frame, PID)


STEP = [
    segment("rank_step", 10, 900),
    segment("prepare", 20, 100),
    segment("forward", 100, 700),
    segment("attention", 200, 300),
    segment("sample", 700, 800),
]


def test_operators_go_to_the_innermost_segment_or_by_their_name():
    rank = of(
        [
            event("aten::mul", 30, 10),  # prepare
            event("aten::mm", 120, 50),  # forward
            event("_C::onednn_mm", 130, 20),  # inside the one before
            event("vllm::unified_attention_with_output", 180, 15),  # before the attention's segment
            event("aten::mm", 210, 40),  # attention
            event("aten::argmax", 710, 30),  # sample
            event("aten::mm", 950, 10),  # after the step
            event("c10d::allreduce_", 970, 5),
        ],
        STEP,
    )
    found = rank.events.set_index(["name", "stage"])["own_ns"].round().to_dict()
    assert found == {
        ("aten::mul", "prepare"): 10_000,
        ("aten::mm", "forward"): 30_000,
        ("_C::onednn_mm", "forward"): 20_000,
        ("vllm::unified_attention_with_output", "attention"): 15_000,
        ("aten::mm", "attention"): 40_000,
        ("aten::argmax", "sample"): 30_000,
        ("aten::mm", UNATTRIBUTED): 10_000,
        ("c10d::allreduce_", "collective"): 5_000,
    }
    how = dict(zip(rank.events["name"] + " " + rank.events["stage"], rank.events["how"], strict=True))
    assert how["vllm::unified_attention_with_output attention"] == "name"
    assert how["aten::mm attention"] == "segment" and how[f"aten::mm {UNATTRIBUTED}"] == "none"
    assert rank.attributed == pytest.approx(1 - 10 / 160)
    assert rank.gap_ns == pytest.approx(992_000 - 160_000, abs=2)
    assert not rank.on_device and rank.steps == 1 and rank.error_ns <= 1_000


def test_kernels_go_where_they_were_launched_whenever_they_ran():
    def launched(name: str, launch_us: float, begin_us: float, duration_us: float, number: int) -> list[dict[str, Any]]:
        return [
            event("cudaLaunchKernel", launch_us, 2, "cuda_runtime", args={"correlation": number}),
            event(name, begin_us, duration_us, "kernel", args={"correlation": number}) | {"tid": 7},
        ]

    rank = of(
        [
            *launched("nvjet_tst_128x24", 50, 500, 100, 1),  # launched in prepare, ran in forward
            *launched("flash_fwd_kernel", 650, 720, 100, 2),  # a graph's: launched in forward
            event("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 820, 10, "kernel") | {"tid": 7},  # no launch is known
            event("my_kernel", 830, 10, "kernel") | {"tid": 7},
            event("aten::mm", 120, 50),  # the host's operators are no kernels
        ],
        STEP,
    )
    assert rank.on_device
    assert dict(zip(rank.events["name"], rank.events["stage"], strict=True)) == {
        "nvjet_tst_128x24": "prepare",
        "flash_fwd_kernel": "attention",
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL": "collective",
        "my_kernel": UNATTRIBUTED,
    }
    assert rank.busy_ns == pytest.approx(220_000)
    assert rank.gap_ns == pytest.approx(992_000 - 220_000, abs=2)


def test_segments_of_other_threads_say_nothing():
    rank = of([event("aten::mm", 120, 50)], [segment("forward", 100, 700, thread=THREAD + 1)])
    assert rank.events["stage"].tolist() == [UNATTRIBUTED]


def test_what_is_shown_adds_up():
    rank = of([event("aten::mm", 120, 50), event("aten::mul", 950, 10), event("aten::mm", 1120, 50)], STEP, steps=2)
    stages, kernels = by_stage(rank), by_kernel(rank)
    assert stages.index.tolist()[-1] == UNATTRIBUTED
    assert stages["own_ns"].sum() == pytest.approx(rank.busy_ns) == pytest.approx(kernels["own_ns"].sum())
    text = "\n".join(part if isinstance(part, str) else part.title for part in kernel_parts([rank]))
    assert "rank 3 (pid 99): 2 steps" in text
    assert json.loads(json.dumps(kernels_dict(rank)))["attributed"] == pytest.approx(rank.attributed)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 500)), min_size=1, max_size=20))
def test_every_range_bounds_the_clocks_offset(pauses: list[tuple[int, int]]):
    """However long it took from one clock read to the range, the true offset is within the error."""
    begins, steps, now = [], [], 0
    for gap, pause in pauses:
        now += gap
        before = now
        now += pause
        begins.append((now + OFFSET, now + 100 + OFFSET, TID))
        now += 100 + pause // 2
        steps.append([1, len(steps), before, now])
    offset, error = clock_offset(pd.DataFrame(begins, columns=["begin_ns", "end_ns", "thread"]), steps)
    assert abs(offset - OFFSET) <= error + 1e-6
    assert error <= min(pause * 1.5 + 100 for _, pause in pauses) / 2 + 1


def nested(draw: st.DrawFn, begin: int, end: int, depth: int) -> list[tuple[int, int]]:
    cuts = sorted(draw(st.lists(st.integers(begin, end), max_size=6)))
    found = []
    for first, last in zip(cuts[::2], cuts[1::2], strict=False):
        found.append((first, last))
        if depth:
            found += nested(draw, first, last, depth - 1)
    return found


@given(st.data())
def test_own_times_add_up_to_the_time_that_is_covered(data: st.DataObject):
    calls = nested(data.draw, 0, 1000, 3)
    frame = pd.DataFrame([(b, e, 1) for b, e in calls], columns=["begin_ns", "end_ns", "thread"]).astype(float)
    own = own_times(frame)
    assert (own >= 0).all()
    whole = covered(frame["begin_ns"].to_numpy(), frame["end_ns"].to_numpy(), 0.0, 1000.0)
    assert own.sum() == pytest.approx(whole)
    brute = np.zeros(1000, bool)
    for begin, end in calls:
        brute[begin:end] = True
    assert whole == pytest.approx(brute.sum())


def test_a_file_that_is_no_trace_is_named(tmp_path: Path):
    (tmp_path / "a.trace.json").write_text("{")
    with pytest.raises(SessionError, match=r"a\.trace\.json is no trace"):
        read_trace(tmp_path / "a.trace.json")
    with pytest.raises(SessionError, match="cannot be tied to its steps"):
        rank_kernels(trace_of([]), {"steps": []}, pd.DataFrame(columns=["thread", "stage"]), PID)


def test_a_request_is_read_as_it_was_written(tmp_path: Path):
    assert read_request(tmp_path) is None
    request = KernelRequest(2, 20, 30.0, 2000)
    request.write(tmp_path)
    assert read_request(tmp_path) == request
    withdraw(tmp_path)
    withdraw(tmp_path)
    assert read_request(tmp_path) is None
    for damaged in (b"", b"{}", b"[]", b"\xff", b'{"number": 1, "steps": 0, "seconds": 1, "megabytes": 1}'):
        (tmp_path / "kernel" / "request.json").write_bytes(damaged)
        assert read_request(tmp_path) is None


@pytest.mark.parametrize("bounds", [(1, 0, 1, 1), (1, 2000, 1, 1), (1, 1, 0, 1), (1, 1, 1, 10**9), (0, 1, 1, 1)])
def test_bounds_that_make_no_sense_are_refused(bounds: tuple[int, int, float, int]):
    with pytest.raises(ValueError, match="window"):
        KernelRequest(*bounds)
