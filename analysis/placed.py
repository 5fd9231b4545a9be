"""Places every segment: on which thread and timeline it is, and in which step. Arrays alone, for sessions of millions.

Which timeline a segment is on is a question of its thread: where the worker runs on the scheduler's thread its segments
nest in `execute` there, and one timeline holds all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from stagetrace.instrument.stages import BY_ID, BY_NAME, STAGES, Kind, Timeline

if TYPE_CHECKING:
    from collections.abc import Iterable

# The columns of segments that this needs.
COLUMNS = ["process", "sequence", "thread", "stage", "begin_ns", "end_ns", "self_ns", "parent", "instance", "step"]

SCHEDULER = Timeline.SCHEDULER.value
RANK = Timeline.RANK.value
# Such a stage off the scheduler's or a rank's own thread has no envelope there.
HELPERS = {timeline: f"{timeline}, helper threads" for timeline in (Timeline.SCHEDULER, Timeline.RANK)}
RANK_STEP = BY_NAME["rank_step"].id
NOWHERE = -1

_KEY = ["process", "thread"]
_SPARSE = 4  # a table of all step numbers between first and last may be so many times as long as the steps are many

Flags = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.int32]
Times = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Placed:
    """Segments as arrays, one element each, and the threads that they are on."""

    stage: npt.NDArray[np.int16]
    begin: Times
    end: Times
    self_ns: Times
    thread: Codes  # row of `threads`
    step: Codes  # row of the steps that were given, NOWHERE for none of them
    in_step: Flags  # it has a step, its own or that of the segment it is in; whether given or not
    own_step: Flags
    nested: Flags  # in a segment
    threads: pd.DataFrame  # process, thread, timeline (None: nothing but occasions)

    @property
    def duration(self) -> Times:
        """With what is inside, ns."""
        return self.end - self.begin

    def on(self, timelines: Iterable[str]) -> Flags:
        """Which segments are on threads of these timelines."""
        flags: Flags = self.threads["timeline"].isin([*timelines]).to_numpy(bool)
        return flags[self.thread] if len(flags) else np.zeros(0, bool)

    def of_kind(self, kind: Kind) -> Flags:
        """Which are of a kind; a stage of a newer vocabulary is taken for a segment."""
        of = np.zeros(np.iinfo(np.uint16).max + 1, bool)  # by stage, negative ones from the end
        if kind is Kind.SEGMENT:
            of[:] = True
            of[[*BY_ID]] = False
        of[[stage.id for stage in STAGES if stage.kind is kind]] = True
        return of[self.stage]


def placed(segments: pd.DataFrame, steps: pd.DataFrame, all_steps: pd.DataFrame) -> Placed:
    """Segments (COLUMNS) in their steps. `steps` are those to place them in, `all_steps` say which thread schedules."""
    stage = segments["stage"].to_numpy(np.int16)
    self_ns = segments["self_ns"].to_numpy(np.int64)
    thread, threads = _threads(segments, all_steps, stage, self_ns)
    own_step = segments["step"].notna().to_numpy(bool)
    nested = segments["parent"].notna().to_numpy(bool)
    step = step_places(steps, segments["instance"], segments["step"])
    step, in_step = _with_step_of_parent(segments, step, own_step, nested)
    begin, end = (segments[name].to_numpy(np.int64) for name in ("begin_ns", "end_ns"))
    return Placed(stage, begin, end, self_ns, thread, step, in_step, own_step, nested, threads)


def step_places(steps: pd.DataFrame, instance: pd.Series, step: pd.Series) -> Codes:
    """The row of `steps` that has each instance and step number, NOWHERE where there is none or either is null."""
    found = np.full(len(step), NOWHERE, np.int32)
    known = step.notna().to_numpy(bool) & instance.notna().to_numpy(bool)
    of = instance.to_numpy(np.int64, na_value=0)
    numbers = step.to_numpy(np.int64, na_value=0)
    owner, number = (steps[name].to_numpy(np.int64) for name in ("instance", "step"))
    for each in np.unique(owner):
        rows = np.flatnonzero(owner == each).astype(np.int32)
        mine = known & (of == each)
        if mine.all():
            return _look_up(number[rows], rows, numbers)
        found[mine] = _look_up(number[rows], rows, numbers[mine])
    return found


def _look_up(numbers: Times, rows: Codes, wanted: Times) -> Codes:
    low, high = int(numbers.min()), int(numbers.max())
    if high - low < _SPARSE * len(numbers) + 1000:
        table = np.full(high - low + 3, NOWHERE, np.int32)  # with a place at either end for what is outside
        table[numbers - low + 1] = rows
        return table[np.clip(wanted, low - 1, high + 1) - low + 1]
    order = np.argsort(numbers, kind="stable")
    place = order[np.minimum(np.searchsorted(numbers, wanted, sorter=order), len(order) - 1)]
    return np.where(numbers[place] == wanted, rows[place], np.int32(NOWHERE))


def _with_step_of_parent(segments: pd.DataFrame, step: Codes, own: Flags, nested: Flags) -> tuple[Codes, Flags]:
    """What belongs to no step by itself, but is inside a segment of one (a gc_pause), takes that step."""
    in_step = own.copy()
    seeking = np.flatnonzero(~own & nested)
    parents = segments["parent"].iloc[seeking].to_numpy(np.int64)
    processes = segments["process"].to_numpy(np.int64)
    candidates = np.flatnonzero(segments["sequence"].isin(parents).to_numpy(bool)) if len(seeking) else seeking
    keys = ["process", "sequence"]
    holders = segments[keys].iloc[candidates].assign(row=candidates).drop_duplicates(keys)
    sought = pd.DataFrame({"process": processes[seeking], "sequence": parents})
    row = sought.merge(holders, how="left", on=keys)["row"].fillna(NOWHERE).to_numpy(np.int64)
    while len(seeking):
        ready = (row >= 0) & in_step[row]
        if not ready.any():
            break
        step[seeking[ready]] = step[row[ready]]
        in_step[seeking[ready]] = True
        seeking, row = seeking[~ready], row[~ready]
    return step, in_step


def _threads(
    segments: pd.DataFrame, steps: pd.DataFrame, stage: npt.NDArray[np.int16], self_ns: Times
) -> tuple[Codes, pd.DataFrame]:
    """Each segment's thread, and the threads' timelines.

    One with steps is the scheduler's, one with rank_steps a rank's. Any other goes by the stage that took most of its
    time; a thread with occasions alone has none.
    """
    process, processes = pd.factorize(segments["process"])
    thread, threads = pd.factorize(segments["thread"])
    codes, pairs = pd.factorize(process.astype(np.int32) * np.int32(max(len(threads), 1)) + thread.astype(np.int32))
    del process, thread
    known = pd.DataFrame(
        {
            "process": np.asarray(processes, np.int64)[pairs // max(len(threads), 1)],
            "thread": np.asarray(threads, np.int64)[pairs % max(len(threads), 1)],
        }
    )
    code_of = codes.astype(np.int32)
    numbers = np.unique(stage)
    del codes
    place = code_of * np.int32(len(numbers)) + np.searchsorted(numbers, stage).astype(np.int32)
    shape = len(known), len(numbers)
    time = np.bincount(place, weights=self_ns, minlength=shape[0] * shape[1]).reshape(shape)
    seen = np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape) > 0
    homes = [_home(int(number)) for number in numbers]
    schedules = steps[_KEY].drop_duplicates().assign(schedules=True)
    scheduling = known.merge(schedules, how="left", on=_KEY)["schedules"].notna().to_numpy(bool)
    timelines: list[str | None] = []
    for code in range(len(known)):
        if scheduling[code]:
            timelines.append(SCHEDULER)
        elif (seen[code] & (numbers == RANK_STEP)).any():
            timelines.append(RANK)
        else:
            sums: dict[str, float] = {}
            for number, home in enumerate(homes):
                if home is not None and seen[code, number]:
                    sums[home] = sums.get(home, 0.0) + time[code, number]
            timelines.append(max(sums, key=lambda home: sums[home]) if sums else None)
    return code_of, known.assign(timeline=pd.Series(timelines, dtype="object"))


def _home(stage: int) -> str | None:
    known = BY_ID.get(stage)
    if known is None or known.kind is not Kind.SEGMENT:
        return None
    return HELPERS.get(known.timeline, known.timeline.value)
