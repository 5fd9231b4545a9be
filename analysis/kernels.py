"""Which kernels each stage's time goes to: a kernel window's trace, joined with the segments of the same steps.

An operator's time is its own, without the operators that it calls; a kernel's is the time that it ran on the device.
Each is owed to a stage: that of the innermost segment in which it ran or was launched; where that one is a whole
forward pass, its name may say more closely. What no segment covers goes by its name, else it is unattributed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from stagetrace.exporters.session import Session, SessionError
from stagetrace.instrument.kernel_request import STEP_RANGE
from stagetrace.instrument.stages import BY_ID, BY_NAME, Kind

from .kernel_names import rule_for
from .load import read

if TYPE_CHECKING:
    from pathlib import Path

UNATTRIBUTED = "unattributed"
SEGMENTS = ["process", "sequence", "thread", "stage", "begin_ns", "end_ns", "instance", "step"]

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver", "hip_runtime", "privateuse1_runtime")
_WHOLE = {BY_NAME[name].id for name in ("rank_step", "forward", "execute")}  # whose parts may not be recorded
_PARTITIONS = [stage.id for stage in BY_ID.values() if stage.kind is Kind.SEGMENT or stage.name == "rank_step"]
_WITHIN_FORWARD = {stage.name for stage in BY_ID.values() if "forward" in stage.inside}

Times = npt.NDArray[np.float64]


class How(StrEnum):
    """How an operator or a kernel came to its stage."""

    SEGMENT = "segment"  # it ran, or was launched, in a segment of that stage
    NAME = "name"  # by its name: in a whole forward pass, or where there is no segment
    NONE = "none"  # it did not


@dataclass(frozen=True)
class Trace:
    """What torch.profiler saw in one rank. `events`: name, category, begin_ns, end_ns, thread, launch (of a kernel)."""

    events: pd.DataFrame
    ranges: pd.DataFrame  # the ranges at the begin of each step, in order: begin_ns, end_ns, thread


@dataclass(frozen=True)
class RankKernels:
    """A kernel window in one rank. Times in ns on the profiler's clock; `error_ns` bounds what ties it to segments."""

    rank: int
    pid: int
    ended: str
    steps: int
    window_ns: int  # from the first step's begin to the last one's end
    held_ns: int  # for how long the engine waited for the profiler
    error_ns: int
    on_device: bool  # kernels of a device; else operators of the host
    events: pd.DataFrame  # name, kind, stage, segment, how, begin_ns, end_ns, own_ns
    gap_ns: int  # of the window, while none of them ran

    @property
    def busy_ns(self) -> int:
        """The own times of all."""
        return int(self.events["own_ns"].sum())

    @property
    def attributed(self) -> float:
        """The share of these that a stage has."""
        return float(self.events.loc[self.events["stage"] != UNATTRIBUTED, "own_ns"].sum() / max(self.busy_ns, 1))


def summarise_kernels(session: Session, number: int | None = None) -> list[RankKernels]:
    """The ranks of a kernel window, or of the newest one. Raises SessionError when there is none that can be read."""
    folder = session.kernel_window(number)
    pids = {process.pid: process.key for process in session.read_manifest().processes}
    segments = read(session, "segments", SEGMENTS)
    found = []
    for path in sorted(folder.glob("*.trace.json")):
        said = _said(path.with_name(path.name.replace(".trace.json", ".json")))
        if said is not None:
            pid = int(path.name.split(".")[0])
            of_rank = segments[segments["process"] == pids.get(pid, -1)]
            found.append(rank_kernels(read_trace(path), said, of_rank, pid))
    if not found:
        raise SessionError(f"{folder} has no trace of a rank that can be read")
    return found


def newest_window(session: Session) -> tuple[list[RankKernels], str]:
    """The ranks of the newest kernel window, none where there is no window, and why it cannot be read."""
    try:
        session.kernel_window()
    except SessionError:
        return [], ""
    try:
        return summarise_kernels(session), ""
    except SessionError as error:
        return [], f"The newest kernel window cannot be shown: {error}"


def _said(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and data.get("steps") else None


def read_trace(path: Path) -> Trace:
    """A trace in Chrome's format, as torch.profiler writes it. Raises SessionError when it is none."""
    try:
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SessionError(f"{path} is no trace of torch.profiler: {error}") from error
    return trace_of(events)


def trace_of(events: list[dict[str, Any]]) -> Trace:
    """The same from a trace's events. Pure."""
    rows, ranges, launches = [], [], {}
    for event in events:
        if event.get("ph") != "X":
            continue
        category, name = str(event.get("cat", "")), str(event.get("name", ""))
        begin = float(event.get("ts", 0)) * 1e3
        end = begin + float(event.get("dur", 0)) * 1e3
        thread = event.get("tid", 0)
        if name == STEP_RANGE:
            if category in ("user_annotation", "cpu_op"):
                ranges.append((begin, end, thread))
        elif category in _LAUNCHES:
            launches[(event.get("args") or {}).get("correlation")] = begin
        elif category == "cpu_op" or category in _ON_DEVICE:
            rows.append((name, category, begin, end, thread, (event.get("args") or {}).get("correlation")))
    frame = pd.DataFrame(rows, columns=["name", "category", "begin_ns", "end_ns", "thread", "correlation"])
    frame["launch"] = frame.pop("correlation").map(launches).astype(float) if launches else np.nan
    found = pd.DataFrame(ranges, columns=["begin_ns", "end_ns", "thread"]).sort_values("begin_ns", ignore_index=True)
    return Trace(frame, found)


def clock_offset(ranges: pd.DataFrame, steps: list[list[int]]) -> tuple[float, float]:
    """What to add to a time of ours to have the profiler's, and by how much that may be wrong, both in ns.

    `steps` has (instance, step, before, after) of each range, in order: ours is read before a range begins and after it
    ends, so each range bounds the offset from both sides. Raises ValueError where there is no range.
    """
    count = min(len(ranges), len(steps))
    if not count:
        raise ValueError("the trace has none of the ranges at the begin of a step")
    before = np.array([step[2] for step in steps[:count]], dtype=np.float64)
    after = np.array([step[3] for step in steps[:count]], dtype=np.float64)
    most = float((ranges["begin_ns"].to_numpy(dtype=np.float64)[:count] - before).min())
    least = float((ranges["end_ns"].to_numpy(dtype=np.float64)[:count] - after).max())
    return (most + least) / 2, abs(most - least) / 2


def rank_kernels(trace: Trace, said: dict[str, Any], segments: pd.DataFrame, pid: int) -> RankKernels:
    """One rank's window: its trace, what the rank said of it, and the segments of its process. Pure."""
    try:
        offset, error = clock_offset(trace.ranges, said["steps"])
    except ValueError as missing:
        raise SessionError(f"the window of pid {pid} cannot be tied to its steps: {missing}") from missing
    events = trace.events
    on_device = bool(events["category"].isin(_ON_DEVICE).any())
    main = trace.ranges["thread"].iloc[0]
    chosen = events[events["category"].isin(_ON_DEVICE) if on_device else events["category"] == "cpu_op"]
    first, last = float(said["begin_ns"]) + offset, float(said["end_ns"]) + offset
    chosen = chosen[(chosen["end_ns"] > first) & (chosen["begin_ns"] < last)].reset_index(drop=True)
    own = (chosen["end_ns"] - chosen["begin_ns"]).to_numpy(dtype=np.float64)
    if not on_device:
        own = own_times(chosen)
    thread = int(said.get("thread", 0))
    on_thread = segments[segments["thread"] == thread]
    edges, stages = innermost(on_thread, offset)
    when = chosen["launch"].where(chosen["launch"].notna(), np.nan) if on_device else chosen["begin_ns"]
    seen = chosen["thread"].eq(main).to_numpy() | on_device
    segment = stage_at(edges, stages, when.to_numpy(dtype=np.float64), seen)
    rules = [rule_for(name) for name in chosen["name"]]
    named = np.array([rule.stage for rule in rules], dtype=object)
    stage, how = attributed(segment, named)
    table = pd.DataFrame(
        {
            "name": chosen["name"],
            "kind": [rule.kind for rule in rules],
            "stage": stage,
            "segment": [BY_ID[each].name if each in BY_ID else "" for each in segment],
            "how": how,
            "begin_ns": chosen["begin_ns"] - offset,
            "end_ns": chosen["end_ns"] - offset,
            "own_ns": own,
        }
    )
    begin, end = said["begin_ns"], said["end_ns"]
    return RankKernels(
        int(said.get("rank", 0)),
        pid,
        str(said.get("ended", "")),
        len(said["steps"]),
        int(end - begin),
        int(said.get("held_ns", 0)),
        round(error),
        on_device,
        table,
        round((end - begin) - covered(table["begin_ns"].to_numpy(), table["end_ns"].to_numpy(), begin, end)),
    )


def own_times(events: pd.DataFrame) -> Times:
    """The duration of each less that of what it encloses on its thread. Pure."""
    order = np.lexsort((-events["end_ns"].to_numpy(), events["begin_ns"].to_numpy(), pd.factorize(events["thread"])[0]))
    begins, ends = events["begin_ns"].to_numpy(dtype=float)[order], events["end_ns"].to_numpy(dtype=float)[order]
    threads = pd.factorize(events["thread"])[0][order]
    own = ends - begins
    stack: list[int] = []
    for at in range(len(order)):
        while stack and (threads[stack[-1]] != threads[at] or ends[stack[-1]] <= begins[at]):
            stack.pop()
        if stack:
            own[stack[-1]] -= min(ends[at], ends[stack[-1]]) - begins[at]
        stack.append(at)
    result: Times = np.empty_like(own)
    result[order] = np.maximum(own, 0.0)
    return result


def innermost(segments: pd.DataFrame, offset: float) -> tuple[Times, npt.NDArray[np.int64]]:
    """Which segment of one thread is the innermost at any time: edges, and the stage from each to the next (-1: none).

    Envelopes that are not segments (a step) count for nothing; the rank's own part of a step does.
    """
    kept = segments[segments["stage"].isin(_PARTITIONS)].sort_values(
        ["begin_ns", "end_ns"], ascending=[True, False], ignore_index=True
    )
    edges, stages = [-np.inf], [-1]
    stack: list[tuple[float, int]] = []

    def leave(until: float) -> None:
        while stack and stack[-1][0] <= until:
            end, _ = stack.pop()
            edges.append(end)
            stages.append(stack[-1][1] if stack else -1)

    rows = zip(kept["begin_ns"].tolist(), kept["end_ns"].tolist(), kept["stage"].tolist(), strict=True)
    for begin, end, stage in rows:
        leave(begin)
        edges.append(begin)
        stages.append(stage)
        stack.append((end, stage))
    leave(np.inf)
    return np.array(edges) + offset, np.array(stages, dtype=np.int64)


def stage_at(
    edges: Times, stages: npt.NDArray[np.int64], when: Times, seen: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """The stage at each time, -1 where there is none, where the time is not known, and where not `seen`."""
    known = seen & ~np.isnan(when)
    at = np.searchsorted(edges, np.where(known, when, -np.inf), side="right") - 1
    return np.where(known, stages[np.maximum(at, 0)], -1)


def attributed(segment: npt.NDArray[np.int64], named: npt.NDArray[Any]) -> tuple[list[str], list[str]]:
    """The stage that each is owed to, and how that is known. Pure."""
    stages, hows = [], []
    for each, name in zip(segment.tolist(), named.tolist(), strict=True):
        if each in BY_ID and (each not in _WHOLE or name not in _WITHIN_FORWARD):
            stages.append(BY_ID[each].name)
            hows.append(How.SEGMENT.value)
        elif name:
            stages.append(name)
            hows.append(How.NAME.value)
        else:
            stages.append(UNATTRIBUTED)
            hows.append(How.NONE.value)
    return stages, hows


def covered(begins: Times, ends: Times, first: float, last: float) -> float:
    """How much of a stretch of time is in at least one of the intervals. Pure."""
    order = np.argsort(begins, kind="stable")
    begins, ends = np.clip(begins[order], first, last), np.clip(ends[order], first, last)
    if not len(begins):
        return 0.0
    reached = np.maximum.accumulate(np.concatenate(([first], ends[:-1])))
    return float(np.maximum(ends - np.maximum(begins, reached), 0.0).sum())
