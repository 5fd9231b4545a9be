"""What devices did while steps ran, by their own clock: busy, and why they stood still. Pure; times in ns.

Told where the session has device stages (`device_forward` and so on). A device stands still between two of them; what
the host of its rank was in just then is the reason. What every number means is in docs/numbers.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stagetrace.instrument.stages import BY_ID, BY_NAME, STAGES, IdleReason, Level, Timeline

from .breakdown import Distribution, distribution, distribution_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import pandas as pd

    from stagetrace.exporters.session import Process

    Whole = npt.NDArray[np.int64]

DEVICE_STAGES = [stage.id for stage in STAGES if stage.timeline is Timeline.DEVICE]
_STEP_LEVEL = [stage for stage in DEVICE_STAGES if BY_ID[stage].level <= Level.STEP]  # by event pairs
SEGMENTS = ["process", "thread", "stage", "begin_ns", "end_ns", "instance", "a0", "a1", "a2"]
LAUNCHING = f"{IdleReason.HOST_BOUND.text}, launching"
_FORWARD, _IDLE = BY_NAME["forward"].id, BY_NAME["idle"].id
_CALLS = [BY_NAME[name].id for name in ("forward", "sample", "draft", "verify")]
# The first that holds counts: a rank whose scheduler has no work waits for the scheduler as well.
_WAITS = (IdleReason.NO_WORK, IdleReason.WAITING_FOR_RANK, IdleReason.WAITING_FOR_SCHEDULER)


@dataclass(frozen=True)
class Still:
    """Time in which a device stood still for one reason."""

    reason: str
    total_ns: int
    share: float | None  # of the observed time


@dataclass(frozen=True)
class DeviceTime:
    """One rank's device, from the begin of its first device stage to the end of its last."""

    process: int
    observed_ns: int
    busy_ns: int  # in a device stage of any stream; with the times below it adds up to the observed time
    still: list[Still]
    pauses: Distribution  # single times between two device stages
    launch_delay: Distribution  # of device_forward
    clock_error: Distribution
    clock_error_most_ns: int | None
    skipped: int  # pairs of events that there was no room for
    contradictions: int  # of the clocks


def device_times(steps: pd.DataFrame, segments: pd.DataFrame, processes: Sequence[Process]) -> list[DeviceTime]:
    """What every device did that was recorded, in the order of the session's processes.

    `segments` with SEGMENTS; of `steps` the instance and the process of their scheduler.
    """
    rows = segments[segments["stage"].isin(DEVICE_STAGES)]
    present = set(rows["process"].unique().tolist())
    return [
        _of_rank(process, rows[rows["process"] == process.key], steps, segments)
        for process in processes
        if process.key in present
    ]


def _of_rank(process: Process, rows: pd.DataFrame, steps: pd.DataFrame, segments: pd.DataFrame) -> DeviceTime:
    begin, end = union(*(rows[name].to_numpy(dtype=np.int64) for name in ("begin_ns", "end_ns")))
    first, last = int(begin[0]), int(end[-1])
    pairs = rows[rows["stage"].isin(_STEP_LEVEL)]  # what marks tell is placed by these
    forwards = rows[rows["stage"] == BY_NAME["device_forward"].id]
    told = process.info.get("device_time")
    counts = told if isinstance(told, dict) else {}
    gaps = begin[1:] - end[:-1]
    reasons = _reasons(process.key, rows, steps, segments)
    times = partition(first, last, [(begin, end), *reasons.values()])
    names = [*reasons, IdleReason.HOST_BOUND.text]
    return DeviceTime(
        process=process.key,
        observed_ns=last - first,
        busy_ns=times[0],
        still=[
            Still(name, time, time / (last - first) if last > first else None)
            for name, time in zip(names, times[1:], strict=True)
            if time
        ],
        pauses=distribution_of(gaps[gaps > 0]),
        launch_delay=distribution(forwards["a1"]),
        clock_error=distribution(pairs["a2"]),
        clock_error_most_ns=int(pairs["a2"].max()) if pairs["a2"].notna().any() else None,
        skipped=_count(counts.get("skipped")),
        contradictions=_count(counts.get("contradictions")),
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _reasons(
    key: int, rows: pd.DataFrame, steps: pd.DataFrame, segments: pd.DataFrame
) -> dict[str, tuple[Whole, Whole]]:
    """When what was so that a device may stand still for it, by reason, the first that counts first."""
    instances = rows["instance"].dropna().unique()
    schedulers = steps.loc[steps["instance"].isin(instances), "process"].unique()
    own = segments["process"] == key
    theirs = own | segments["process"].isin(schedulers)
    # A rank's own waits are on the thread that runs its steps; whether there is work the scheduler knows.
    threads = segments.loc[own & (segments["stage"] == _FORWARD), "thread"].unique()
    idle = segments["stage"] == _IDLE
    found = {}
    for reason in _WAITS:
        where = theirs if reason is IdleReason.NO_WORK else own & segments["thread"].isin(threads)
        found[reason.text] = _times(segments[idle & where & (segments["a0"] == int(reason))])
    found[LAUNCHING] = _times(segments[own & segments["stage"].isin(_CALLS)])
    return found


def _times(rows: pd.DataFrame) -> tuple[Whole, Whole]:
    return rows["begin_ns"].to_numpy(dtype=np.int64), rows["end_ns"].to_numpy(dtype=np.int64)


def union(begin: Whole, end: Whole) -> tuple[Whole, Whole]:
    """The same times as intervals that neither overlap nor touch, in order. Pure."""
    if not len(begin):
        return begin, end
    order = np.argsort(begin, kind="stable")
    begin, reached = begin[order], np.maximum.accumulate(end[order])
    opens = np.append(True, begin[1:] > reached[:-1])
    return begin[opens], reached[np.append(np.flatnonzero(opens)[1:] - 1, len(reached) - 1)]


def partition(first: int, last: int, layers: Sequence[tuple[Whole, Whole]]) -> list[int]:
    """How much of [first, last) each layer of intervals covers that none before it does, then what none covers. Pure.

    The numbers add up to last - first.
    """
    clipped = [tuple(np.clip(times, first, last) for times in layer) for layer in layers]
    at = np.unique(
        np.concatenate([np.array([first, last], np.int64), *(times for layer in clipped for times in layer)])
    )
    width = np.diff(at)
    free = np.ones(len(width), bool)
    found = []
    for begin, end in clipped:
        change = np.zeros(len(at), np.int64)
        np.add.at(change, np.searchsorted(at, begin), 1)
        np.add.at(change, np.searchsorted(at, end), -1)
        covered = np.cumsum(change)[:-1] > 0
        found.append(int(width[covered & free].sum()))
        free &= ~covered
    return [*found, int(width[free].sum())]
