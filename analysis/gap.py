"""What steps took beyond the speed of light, divided into host, launch, communication, imbalance and kernel. Pure.

Every nanosecond of a step is, on each of its ranks, of what was innermost on the rank's thread just then; a step's time
is the mean over its ranks. So the parts add up to what was measured, and without the least time to the gap. What every
part means, and what it does not, is in docs/numbers.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from stagetrace.exporters.session import not_visible_of
from stagetrace.instrument.stages import BY_NAME

from .device import DEVICE_STAGES, union
from .layers import with_waiting

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy.typing as npt

    from stagetrace.exporters.session import Manifest, Process

    Whole = npt.NDArray[np.int64]
    Flags = npt.NDArray[np.bool_]

# The columns that are read of segments.
SEGMENTS = [
    *("process", "sequence", "thread", "stage", "begin_ns", "end_ns", "parent_stage", "instance", "step"),
    *("a0", "a1", "a2", "a3", "a4"),
]


class Part(StrEnum):
    """A part of a gap."""

    HOST = "host"
    LAUNCH = "launch"
    COMMUNICATION = "communication"
    IMBALANCE = "imbalance"
    KERNEL = "kernel"


# What a stage's own time is, on a rank's thread; all that is not here is the host's.
STAGES: dict[Part, tuple[str, ...]] = {
    Part.KERNEL: (
        *("forward", "sample", "draft", "verify", "embed", "attention", "mlp", "moe_route"),
        *("expert_dispatch", "expert_compute", "expert_combine", "shared_experts", "logits", "encode"),
    ),
    Part.COMMUNICATION: ("collective",),  # those of a dispatch or combine are segments within it
}
_FORWARD, _COLLECTIVE = (BY_NAME[name].id for name in ("forward", "collective"))
_KIND = {part: number for number, part in enumerate(STAGES, 1)}  # 0: the host's
_BOOKKEEPING = len(_KIND) + 1
_KINDS = np.zeros(1 << 15, np.int8)  # by stage id, of as many as the column's type can hold
for _part, _names in STAGES.items():
    _KINDS[[BY_NAME[name].id for name in _names]] = _KIND[_part]
_KINDS[BY_NAME["bookkeep"].id] = _BOOKKEEPING
_STEP_KEY = ["instance", "step"]
_DEVICE_FORWARD = BY_NAME["device_forward"].id
_ENOUGH = 0.99  # of a rank's forward passes, that their times on the device must be known of


@dataclass(frozen=True)
class Gap:
    """Measured minus least time of some steps, in ns: the parts and `untold_ns` add up to `total_ns`, exactly.

    A part that is None could not be told apart: it is in the kernels' part, which is then not of kernels alone. A part
    can be below 0 where something was faster than its ceiling.
    """

    total_ns: int
    host_ns: int
    launch_ns: int | None
    communication_ns: int | None
    imbalance_ns: int | None
    kernel_ns: int
    untold_ns: int = 0  # of steps of which no rank was recorded

    @staticmethod
    def names() -> list[str]:
        """Of the parts, in the order in which they are shown."""
        return [part.value for part in Part]

    @property
    def parts(self) -> dict[Part, int | None]:
        """By name, in the order in which they are shown."""
        return {part: getattr(self, f"{part.value}_ns") for part in Part}


@dataclass(frozen=True, eq=False)
class Spent:
    """Where the time of each of some steps went: sums over its ranks, in ns; `launch` and so on are 0 if not told."""

    times: pd.DataFrame  # a column for each Part, `ranks` (that were recorded), `time` (of the step); the steps' index
    launch_told: bool
    exchange_told: bool  # communication and imbalance

    @property
    def untold(self) -> list[Part]:
        """The parts that could not be told apart, and are in the kernels'."""
        exchange = [] if self.exchange_told else [Part.COMMUNICATION, Part.IMBALANCE]
        return [*([] if self.launch_told else [Part.LAUNCH]), *exchange]

    def note(self) -> str:
        """What could not be told apart, and why; empty where all was."""
        why = []
        if not self.launch_told:
            why.append(
                "without records of the device's own clock launching is not told from the kernels that it starts"
            )
        if not self.exchange_told:
            why.append(
                "communication and imbalance are told where level layer recorded the collectives on the host's clock,"
                " uncompiled"
            )
        are = "is" if len(self.untold) == 1 else "are"
        return f"in the gap, {', '.join(self.untold)} {are} in the kernels' part: {'; '.join(why)}" if why else ""


class Cover:
    """How often each moment is covered: intervals add to it, or take away where their weight is -1. All in integers."""

    def __init__(self, begin: Whole, end: Whole, weight: Whole):
        at = np.concatenate([begin, end])
        order = np.argsort(at, kind="stable")
        self._at = at[order]
        self._count = np.cumsum(np.concatenate([weight, -weight])[order])
        # Covered time until each point.
        self._until = np.concatenate([[0], np.cumsum(np.diff(self._at) * self._count[:-1])]) if len(at) else self._count

    def within(self, begin: Whole, end: Whole) -> Whole:
        """Covered time in each interval."""
        return self._before(end) - self._before(begin) if len(self._at) else np.zeros_like(begin)

    def _before(self, times: Whole) -> Whole:
        place = np.searchsorted(self._at, times, side="right") - 1
        known = np.maximum(place, 0)
        found: Whole = self._until[known] + (times - self._at[known]) * self._count[known]
        return np.where(place >= 0, found, 0)

    def both(self, other: Cover) -> Cover:
        """What both cover."""
        at = np.unique(np.concatenate([self._at, other._at]))
        count = self._at_times(at) * other._at_times(at)
        return Cover(at[:-1], at[1:], count[:-1])

    def negative(self) -> Cover:
        """As much taken away."""
        return Cover(self._at[:-1], self._at[1:], -self._count[:-1])

    def _at_times(self, times: Whole) -> Whole:
        if not len(self._at):
            return np.zeros_like(times)
        place = np.searchsorted(self._at, times, side="right") - 1
        return np.where(place >= 0, self._count[np.maximum(place, 0)], 0)


def spent(
    steps: pd.DataFrame, begins: Whole, segments: pd.DataFrame, manifest: Manifest, names: Mapping[int, str]
) -> Spent:
    """Where the time of each step from `begins` to its end went, on the threads that ran its ranks.

    `segments` with SEGMENTS, also of other steps: where steps overlap, a rank works on another one meanwhile.
    """
    ends = steps["end_ns"].to_numpy(dtype=np.int64)
    begins = np.minimum(begins, ends)
    times = pd.DataFrame(0, index=steps.index, columns=[*(part.value for part in Part), "ranks"], dtype="int64")
    forwards = segments.loc[segments["stage"] == _FORWARD, ["process", "thread", *_STEP_KEY]].dropna()
    threads = forwards[["instance", "process", "thread"]].drop_duplicates()
    processes = {each.key: each for each in manifest.processes}
    on_device = segments.loc[segments["stage"].isin(DEVICE_STAGES), ["process", "stage", "begin_ns", "end_ns"]]
    collectives = segments[segments["stage"] == _COLLECTIVE]
    collectives = collectives.assign(duration=collectives["end_ns"] - collectives["begin_ns"])
    waits = with_waiting(collectives, names)
    waits = waits[(waits["waiting"].fillna(0) > 0).to_numpy(dtype=bool)]
    launch_told = _launch_told(forwards, on_device)
    ranks = len(threads) > threads["instance"].nunique()
    exchange_told = _exchange_told(manifest.processes, _of(steps, forwards), collectives, several=ranks)
    turns = _turns(segments)
    instances, numbers = (steps[name].to_numpy(dtype=np.int64) for name in _STEP_KEY)
    for instance, process, thread in threads.itertuples(index=False):
        own, late, ran = (
            each[(each["process"] == process) & (each["thread"] == thread)] for each in (turns, waits, forwards)
        )
        ran = ran.loc[ran["instance"] == instance, "step"]
        chosen = (instances == instance) & np.isin(numbers, ran.to_numpy(dtype=np.int64))
        if not chosen.any():
            continue
        covers = _host_covers(own, late, device_waits=not (_synchronous(processes.get(process)) or launch_told))
        if launch_told:
            covers = _with_device(covers, on_device[on_device["process"] == process])
        if not exchange_told:
            covers = _together(covers)
        width = ends[chosen] - begins[chosen]
        for part, several in covers.items():
            found = sum((cover.within(begins[chosen], ends[chosen]) for cover in several), np.zeros_like(width))
            times.loc[chosen, part.value] += found
            width = width - found
        times.loc[chosen, Part.HOST.value] += width
        times.loc[chosen, "ranks"] += 1
    times["time"] = ends - begins
    return Spent(times, launch_told, exchange_told)


def gap(spent: Spent, least_ns: npt.NDArray[np.float64], link_bound: Flags, chosen: Flags) -> Gap:
    """Of the `chosen` steps. The least time is taken off the kernels' part, off communication's where the link bounds
    a step and communication could be told.
    """
    known = chosen & (spent.times["ranks"] > 0).to_numpy()
    times, ranks = spent.times[known], spent.times["ranks"].to_numpy()[known]

    def of(part: Part) -> int:
        return round(float((times[part.value].to_numpy() / ranks).sum()))

    def told(part: Part, less: float = 0.0) -> int | None:
        return None if part in spent.untold else of(part) - round(less)

    measured = int(spent.times.loc[chosen, "time"].sum())
    total = measured - round(float(least_ns[chosen].sum()))
    by_link = float(least_ns[known & link_bound].sum()) if spent.exchange_told else 0.0
    host, launch, imbalance = of(Part.HOST), told(Part.LAUNCH), told(Part.IMBALANCE)
    communication = told(Part.COMMUNICATION, by_link)
    untold = measured - int(times["time"].sum()) - round(float(least_ns[chosen & ~known].sum()))
    kernel = total - untold - host - (launch or 0) - (communication or 0) - (imbalance or 0)
    return Gap(total, host, launch, communication, imbalance, kernel, untold)


def gap_columns(spent: Spent, least_ns: npt.NDArray[np.float64], link_bound: Flags) -> pd.DataFrame:
    """`gap_ns` and its parts, `gap_host_ns` ..., of each step: floats, as they are means over ranks.

    Without a column for what could not be told apart; NaN for steps of which no rank was recorded.
    """
    ranks = spent.times["ranks"].replace(0, np.nan)
    parts = {part: spent.times[part.value] / ranks for part in Part if part not in spent.untold}
    off = np.where(link_bound, 0.0, least_ns) if spent.exchange_told else least_ns
    parts[Part.KERNEL] = parts[Part.KERNEL] - off
    if spent.exchange_told:
        parts[Part.COMMUNICATION] = parts[Part.COMMUNICATION] - np.where(link_bound, least_ns, 0.0)
    columns = {"gap_ns": spent.times["time"] - least_ns} | {f"gap_{part}_ns": values for part, values in parts.items()}
    return pd.DataFrame(columns, index=spent.times.index)


def _synchronous(process: Process | None) -> bool:
    """Whether kernels run within the calls that start them."""
    return process is None or process.info.get("device", "cpu") == "cpu"


def _launch_told(forwards: pd.DataFrame, on_device: pd.DataFrame) -> bool:
    """Whether it is known of every rank when its device ran what it launched, but for a few steps."""
    launched = forwards["process"].value_counts()
    ran = on_device.loc[on_device["stage"] == _DEVICE_FORWARD, "process"].value_counts()
    ran = ran.reindex(launched.index, fill_value=0)
    return bool(len(ran)) and bool(((ran > 0) & (ran + 1 >= _ENOUGH * launched)).all())


def _exchange_told(
    processes: Iterable[Process], steps: pd.DataFrame, collectives: pd.DataFrame, *, several: bool
) -> bool:
    """Whether what ranks exchange is known: there is but one rank, or the collectives of all steps were recorded."""
    infos = [each.info for each in processes]
    sizes = ("tensor_parallel", "pipeline_parallel", "data_parallel", "attention_data_parallel")
    alone = not several and all(info.get(name, 1) in (0, 1) for info in infos for name in sizes)
    hidden = any("collective" in not_visible_of(each) for each in processes)
    own_clock = all(_synchronous(each) for each in processes)  # a GPU's collectives are launched on the host's
    return alone or (0 < len(steps) == len(_of(steps, collectives)) and not hidden and own_clock)


def _of(steps: pd.DataFrame, segments: pd.DataFrame) -> pd.DataFrame:
    """The keys of the steps that have some of these segments."""
    return steps[_STEP_KEY].merge(segments[_STEP_KEY].dropna().drop_duplicates().astype("int64"), on=_STEP_KEY)


def _turns(segments: pd.DataFrame) -> pd.DataFrame:
    """Segments with which a thread turns to another kind of work, and those kinds, of _KINDS: few of all segments."""
    kind = _KINDS[segments["stage"].to_numpy(dtype=np.int16)]
    outer = _KINDS[segments["parent_stage"].to_numpy(dtype=np.int16, na_value=0)]
    turns = kind != outer
    found: pd.DataFrame = segments.loc[turns, ["process", "thread", "begin_ns", "end_ns"]]
    return found.assign(kind=kind[turns], outer=outer[turns])


def _host_covers(turns: pd.DataFrame, late: pd.DataFrame, *, device_waits: bool) -> dict[Part, list[Cover]]:
    """When a rank's thread was in what, but for the host's part.

    `late`: its collectives that waited for another rank. With `device_waits`, bookkeep waits for the device.
    """
    begin, end, kind, outer = (turns[name].to_numpy() for name in ("begin_ns", "end_ns", "kind", "outer"))
    since = late["begin_ns"].to_numpy(dtype=np.int64)
    until = since + late["waiting"].to_numpy(dtype=np.int64)
    covers = {}
    for part in STAGES:
        those = [_KIND[part], *([_BOOKKEEPING] if device_waits and part is Part.KERNEL else [])]
        within, around = np.isin(kind, those), np.isin(outer, those)
        enters, leaves = within & ~around, around & ~within
        at = [np.concatenate([times[enters], times[leaves]]) for times in (begin, end)]
        covers[part] = [Cover(at[0], at[1], np.repeat([1, -1], [enters.sum(), leaves.sum()]))]
    waiting = Cover(since, until, np.ones(len(since), np.int64))
    covers[Part.COMMUNICATION].append(waiting.negative())
    covers[Part.IMBALANCE] = [waiting]
    return covers


def _with_device(covers: dict[Part, list[Cover]], device: pd.DataFrame) -> dict[Part, list[Cover]]:
    """What the host did counts as launching where the device stood still meanwhile, else not at all."""
    begin, end = union(*(device[name].to_numpy(dtype=np.int64) for name in ("begin_ns", "end_ns")))
    busy = Cover(begin, end, np.ones(len(begin), np.int64))
    calls = [cover for part in covers for cover in covers[part]]
    less = [cover.both(busy).negative() for cover in calls]
    return {Part.KERNEL: [busy], Part.LAUNCH: [*calls, *less]}


def _together(covers: dict[Part, list[Cover]]) -> dict[Part, list[Cover]]:
    """Communication and imbalance among the kernels."""
    exchange = covers.pop(Part.COMMUNICATION, []) + covers.pop(Part.IMBALANCE, [])
    covers[Part.KERNEL] = covers[Part.KERNEL] + exchange
    return covers
