"""Tests of what a report says of devices: busy and still add up, and every reason; the gap reads the same rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.sessions import PROCESS, THREAD
from unit.test_gap import ALONE, MS, in_parts, on_thread, worker
from unit.test_report import shown
from unit.test_speed_of_light import H100, built

from stagetrace.analysis.definitions import explain
from stagetrace.analysis.device import LAUNCHING, partition, union
from stagetrace.analysis.gap import Part
from stagetrace.analysis.report import as_dict, summarise
from stagetrace.instrument.stages import BY_NAME, IdleReason

if TYPE_CHECKING:
    from pathlib import Path

    from unit.sessions import SessionBuilder

intervals = st.lists(st.tuples(st.integers(-5, 40), st.integers(0, 15)), max_size=6)


def arrays(pairs: list[tuple[int, int]]) -> tuple[Any, Any]:
    begin = np.array([first for first, _ in pairs], np.int64)
    return begin, begin + np.array([long for _, long in pairs], np.int64)


@given(intervals)
def test_a_union_covers_the_same_moments(pairs: list[tuple[int, int]]):
    begin, end = union(*arrays(pairs))
    assert (begin[1:] > end[:-1]).all() and (end >= begin).all()
    inside = {moment for first, long in pairs for moment in range(first, first + long)}
    assert {moment for a, b in zip(begin.tolist(), end.tolist(), strict=True) for moment in range(a, b)} == inside


@given(intervals, intervals, st.integers(-3, 20), st.integers(0, 30))
def test_a_partition_is_what_counting_moments_gives(one: Any, other: Any, first: int, width: int):
    first_layer, second_layer, rest = partition(first, first + width, [arrays(one), arrays(other)])

    def inside(pairs: list[tuple[int, int]], moment: int) -> bool:
        return any(begin <= moment < begin + long for begin, long in pairs)

    moments = range(first, first + width)
    assert first_layer == sum(inside(one, moment) for moment in moments)
    assert second_layer == sum(inside(other, moment) and not inside(one, moment) for moment in moments)
    assert first_layer + second_layer + rest == width


def on_device(builder: SessionBuilder, stage: str, begin: int, end: int, step: int, **at: Any) -> None:
    """A device's row, in ms, as the pairs write it: rank, launch delay and clock error are its attributes."""
    where = {"process": 1, "thread": 1, "a0": 0, "a1": 2 * MS, "a2": 7_000, **at}
    builder.segment(stage, begin * MS, end * MS, step, **where)


def idle(builder: SessionBuilder, reason: IdleReason, begin: int, end: int, **at: Any) -> None:
    builder.segment("idle", begin * MS, end * MS, **at, a0=int(reason))


def recorded(path: Path, **info: Any) -> SessionBuilder:
    """Two steps of a rank whose thread is 5 (the stream's timeline is 1), and why its device stood still between."""
    builder = built(path, device_name=H100, **ALONE)
    worker(builder, 1, device="cuda", **ALONE, **info)
    for step, begin in ((1, 20), (2, 300)):
        at = {"process": 1, "thread": 5}
        builder.segment("rank_step", begin * MS, (begin + 40) * MS, step, **at)
        inner = {**at, "parent_stage": BY_NAME["rank_step"].id}
        builder.segment("forward", (begin + 1) * MS, (begin + 11) * MS, step, **inner)
        builder.segment("sample", (begin + 12) * MS, (begin + 15) * MS, step, **inner)
        on_device(builder, "device_forward", begin + 4, begin + 40, step)
        on_device(builder, "device_sample", begin + 45, begin + 50, step)
    return builder


def test_why_a_device_stood_still(tmp_path: Path):
    builder = recorded(tmp_path / "s", device_time={"by": "event pairs", "skipped": 3, "contradictions": 1})
    idle(builder, IdleReason.WAITING_FOR_SCHEDULER, 70, 300, process=1, thread=5)
    idle(builder, IdleReason.NO_WORK, 100, 250, process=PROCESS, thread=THREAD)
    idle(builder, IdleReason.NO_WORK, 71, 73, process=77, thread=THREAD)  # of a process that is no scheduler of it
    session = builder.write()
    (device,) = summarise(session).device
    assert device.observed_ns == (350 - 24) * MS and device.busy_ns == 2 * (36 + 5) * MS
    assert device.busy_ns + sum(each.total_ns for each in device.still) == device.observed_ns
    still = {each.reason: each.total_ns // MS for each in device.still}
    # Twice 5 ms before sampling; then 230 without a step, of which the scheduler had no work for 150, and 4 until the
    # device began: 1 of them before the host launched.
    assert still == {"no work": 150, "waiting for scheduler": 80, LAUNCHING: 3, "host bound": 11}
    assert device.pauses.count == 3 and device.launch_delay.count == 2 and device.launch_delay.p50 == 2 * MS
    assert device.clock_error.p50 == device.clock_error_most_ns == 7_000
    assert (device.skipped, device.contradictions) == (3, 1)
    text = shown(summarise(session))
    assert "Devices, from the first stage on each to the last" in text and "still: no work" in text
    (told,) = as_dict(summarise(session))["device"]
    assert told["still"][0] == {"reason": "no work", "total_ns": 150 * MS, "share": pytest.approx(150 / 326)}
    for name in (*told, "reason"):
        if name not in ("process", "reason"):
            assert explain(name), name


def test_without_device_rows_nothing_is_shown(tmp_path: Path):
    builder = built(tmp_path / "s", device_name=H100, **ALONE)
    worker(builder, 1, device="cuda", **ALONE)
    on_thread(builder, 1, 1, 20)
    session = builder.write()
    assert summarise(session).device == [] and "Devices" not in shown(summarise(session))


def test_the_gap_counts_a_nested_draft_once(tmp_path: Path):
    builder = built(tmp_path / "s", device_name=H100, **ALONE)
    worker(builder, 1, device="cuda", **ALONE)
    on_thread(builder, 1, 1, 20)
    on_device(builder, "device_forward", 24, 60, 1, thread=9)
    on_device(builder, "device_sample", 60, 90, 1, thread=9)
    on_device(builder, "device_draft", 70, 80, 1, thread=9, parent_stage=BY_NAME["device_sample"].id)
    parts = in_parts(builder.write())
    assert parts[Part.KERNEL] == 66 * MS and parts[Part.LAUNCH] == 3 * MS


def test_launching_is_not_told_where_a_ranks_device_was_not_timed(tmp_path: Path):
    builder = built(tmp_path / "s", device_name=H100, tensor_parallel=2)
    for rank in (1, 2):
        worker(builder, rank, device="cuda", tensor_parallel=2)
        on_thread(builder, rank, 1, 20)
    on_device(builder, "device_forward", 24, 60, 1, thread=9)
    gap = summarise(builder.write()).light.phases["prefill"].gap
    assert gap is not None and gap.launch_ns is None
