"""Tests of the gap between measured and least time: its parts add up exactly, and what cannot be told is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.sessions import INSTANCE
from unit.test_report import shown
from unit.test_speed_of_light import H100, built

from stagetrace.analysis.gap import Cover, Part, spent
from stagetrace.analysis.load import load
from stagetrace.analysis.report import as_dict, summarise
from stagetrace.analysis.speed_of_light import DATA_SHEET, own_times
from stagetrace.analysis.step_light import step_gap
from stagetrace.exporters.session import names_of
from stagetrace.exporters.spans import GAP_PARTS, STEP_GAP
from stagetrace.instrument.stages import BY_NAME, Collective

if TYPE_CHECKING:
    from pathlib import Path

    from unit.sessions import SessionBuilder

    from stagetrace.analysis.gap import Spent
    from stagetrace.exporters.session import Session

MS = 1_000_000
ALONE = {"tensor_parallel": 1, "data_parallel": 1, "pipeline_parallel": 1}
intervals = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15), st.sampled_from([1, -1])), max_size=6)


def cover(parts: list[tuple[int, int, int]]) -> Cover:
    begin, width, weight = (np.array([each[i] for each in parts], np.int64) for i in range(3))
    return Cover(begin, begin + width, weight)


@given(intervals, intervals, st.integers(-5, 60), st.integers(0, 60))
def test_covers_are_what_counting_moments_gives(one: Any, other: Any, begin: int, width: int):
    def at(parts: list[tuple[int, int, int]], moment: int) -> int:
        return sum(weight for first, long, weight in parts if first <= moment < first + long)

    moments = range(begin, begin + width)
    ends = np.array([begin], np.int64), np.array([begin + width], np.int64)
    first, second = cover(one), cover(other)
    assert first.within(*ends) == sum(at(one, moment) for moment in moments)
    assert first.negative().within(*ends) == -sum(at(one, moment) for moment in moments)
    assert first.both(second).within(*ends) == sum(at(one, moment) * at(other, moment) for moment in moments)


def taken(session: Session) -> Spent:
    frames = load(session)
    steps = frames["steps"][frames["steps"]["status"] == "complete"]
    begins = (steps["end_ns"] - own_times(steps)).to_numpy(dtype=np.int64)
    return spent(steps, begins, frames["segments"], frames.manifest, names_of(frames.manifest.processes))


def in_parts(session: Session, step: int = 0) -> dict[str, int]:
    return {part: int(taken(session).times.iloc[step][part.value]) for part in Part}


def on_thread(builder: SessionBuilder, rank: int, step: int, begin: int, **at: Any) -> None:
    """One rank's part of a step, in ms from `begin`: 1 prepare, 10 forward with 2 of the collector in it, 1 return."""
    where = {"process": rank, "thread": rank}
    begin *= MS
    forward = BY_NAME["forward"].id
    builder.segment("rank_step", begin, begin + 13 * MS, step, **where)
    inner = {**where, "parent_stage": BY_NAME["rank_step"].id}
    builder.segment("prepare", begin, begin + MS, step, **inner)
    builder.segment("forward", begin + MS, begin + 11 * MS, step, **inner)
    builder.segment("attention", begin + 2 * MS, begin + 4 * MS, step, **where, parent_stage=forward)
    builder.segment("gc_pause", begin + 5 * MS, begin + 7 * MS, **where, parent_stage=forward)
    builder.segment("return", begin + 11 * MS, begin + 12 * MS, step, **inner)


def worker(builder: SessionBuilder, rank: int, **info: Any) -> None:
    builder.process(rank, "worker", info={"device": "cpu", **info})


def test_one_rank_on_a_processor(tmp_path: Path):
    builder = built(tmp_path / "s", device_name=H100, **ALONE)
    worker(builder, 1, **ALONE)
    on_thread(builder, 1, 1, 20)
    session = builder.write()
    # Of 200 ms the forward pass took 10, with 2 of garbage collection that are the host's.
    assert in_parts(session) == dict.fromkeys(Part, 0) | {Part.HOST: 192 * MS, Part.KERNEL: 8 * MS}
    light = summarise(session).light
    gap = light.phases["prefill"].gap
    assert gap is not None
    least = light.phases["prefill"].roofs[DATA_SHEET].whole_ns
    assert least is not None
    assert gap.total_ns == 200 * MS - round(least)
    assert (gap.host_ns, gap.launch_ns, gap.communication_ns, gap.imbalance_ns) == (192 * MS, None, 0, 0)
    assert gap.kernel_ns == 8 * MS - round(least)
    assert any("launch is in the kernels' part: without records of the device's own clock" in x for x in light.notes)
    # The decode steps have no rank's record: nothing is said of where their time went, and it adds up.
    decode = light.phases["decode"].gap
    assert decode is not None and decode.untold_ns == decode.total_ns and decode.host_ns == decode.kernel_ns == 0


def test_parts_add_up_in_every_kind_of_step(tmp_path: Path):
    session = two_ranks(tmp_path / "s")
    for done in summarise(session).light.phases.values():
        gap = done.gap
        assert gap is not None and done.time_ns is not None
        assert sum(part or 0 for part in gap.parts.values()) + gap.untold_ns == gap.total_ns
        least = done.roofs[DATA_SHEET].whole_ns
        assert least is not None and gap.total_ns == done.time_ns - round(least)
    text = shown(summarise(session))
    assert "Between the least time and the time that steps took" in text
    found = as_dict(summarise(session))["speed_of_light"]["by_phase"]["prefill"]["gap"]
    assert set(found) == {"total_ns", "untold_ns", *(f"{part}_ns" for part in GAP_PARTS)}
    assert tuple(GAP_PARTS) == tuple(part.value for part in Part)


def two_ranks(path: Path, **info: Any) -> Session:
    """Of two ranks the second comes to the all_reduce just as the first has waited 3 ms in it; nothing takes time."""
    ranks = {"tensor_parallel": 2, **info}
    builder = built(path, device_name=H100, **ranks)
    for rank, late in ((1, 0), (2, 3)):
        worker(builder, rank, **ranks)
        on_thread(builder, rank, 1, 20)
        builder.segment(
            "collective",
            (27 + late) * MS,
            30 * MS,
            1,
            process=rank,
            thread=rank,
            parent_stage=BY_NAME["forward"].id,
            a0=int(Collective.ALL_REDUCE),
            a1=77,
            a2=1000,
            a3=0,
            a4=5,
        )
    return builder.write()


def test_ranks_that_wait_for_one_another(tmp_path: Path):
    session = two_ranks(tmp_path / "s")
    found = taken(session)
    assert found.exchange_told and not found.launch_told
    row = found.times.iloc[0]
    assert row["ranks"] == 2 and row["time"] == 200 * MS
    assert sum(int(row[part.value]) for part in Part) == 2 * 200 * MS
    assert row[Part.IMBALANCE.value] == 3 * MS and row[Part.COMMUNICATION.value] == 0
    assert row[Part.KERNEL.value] == (8 + 8 - 3) * MS


@pytest.mark.parametrize("hidden", [True, False])
def test_what_cannot_be_told_is_named(tmp_path: Path, hidden: bool):
    """Collectives inside compiled graphs, or on a GPU, where the host only launches them."""
    info = {"not_visible_under_compile": ["collective"], "visible": []} if hidden else {"device": "cuda"}
    light = summarise(two_ranks(tmp_path / "s", **info)).light
    gap = light.phases["prefill"].gap
    assert gap is not None and gap.communication_ns is None and gap.imbalance_ns is None and gap.launch_ns is None
    assert any("communication and imbalance are told where level layer" in note for note in light.notes)


def test_with_the_devices_own_clock_launching_is_told(tmp_path: Path):
    builder = built(tmp_path / "s", device_name=H100, **ALONE)
    worker(builder, 1, device="cuda", **ALONE)
    on_thread(builder, 1, 1, 20)  # the host is in forward from 21 to 31 ms
    builder.segment("device_forward", 24 * MS, 60 * MS, 1, process=1, thread=9)
    session = builder.write()
    # It launches for 3 ms until the device begins; what it does then is hidden behind the device.
    parts = in_parts(session)
    assert parts[Part.LAUNCH] == 3 * MS and parts[Part.KERNEL] == 36 * MS and parts[Part.HOST] == 161 * MS
    gap = summarise(session).light.phases["prefill"].gap
    assert gap is not None and gap.launch_ns == 3 * MS and gap.communication_ns == 0


def test_without_it_a_gpus_kernels_are_until_bookkeep_is_over(tmp_path: Path):
    builder = built(tmp_path / "s", device_name=H100, **ALONE)
    worker(builder, 1, device="cuda", **ALONE)
    on_thread(builder, 1, 1, 20)
    builder.segment("bookkeep", 40 * MS, 70 * MS, 1, process=1, thread=1, parent_stage=BY_NAME["rank_step"].id)
    assert in_parts(builder.write())[Part.KERNEL] == 38 * MS


def test_each_step_has_it_in_frames(tmp_path: Path):
    session = two_ranks(tmp_path / "s")
    frames = load(session)
    steps = frames["steps"][frames["steps"]["status"] == "complete"]
    found = step_gap(session, frames.manifest, steps, frames["segments"], frames["experts"])
    assert set(found.columns) == {*STEP_GAP} - {"gap_launch_ns"}
    first = found.iloc[0]
    assert sum(first[f"gap_{part}_ns"] for part in GAP_PARTS if part != "launch") == pytest.approx(first["gap_ns"])
    assert found.iloc[1].drop("gap_ns").isna().all()  # no rank was recorded
    assert (frames["steps"]["instance"] == INSTANCE).all()
