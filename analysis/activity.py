"""What an engine did at every time, as pieces that partition it, so that any stretch of time can be split by them.

A step's own time goes from its begin, or the end of the step before it if that is later, to its end: where an engine
has two steps in flight their durations overlap, these times do not. Times are nanoseconds of the host's clock, and
every split adds up to the stretch that was split.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from stagetrace.instrument.stages import Phase

if TYPE_CHECKING:
    from collections.abc import Mapping

Times = npt.NDArray[np.int64]

# The columns of steps that this needs.
COLUMNS = ["instance", "step", "phase", "begin_ns", "end_ns", "decode_requests", "prefill_tokens"]
_FEWEST_STEPS = 3  # of a batch size, for a median that says something


class Doing(IntEnum):
    """What an engine does at a time."""

    PREFILL = 0  # a step with prefill alone
    DECODE = 1  # a step with decode alone
    MIXED = 2  # of a step with both: as long as a step with its decode alone takes
    INTERFERENCE = 3  # of a step with both: what it takes beyond that
    BETWEEN = 4  # no step
    UNKNOWN = 5  # steps whose numbers are not among those recorded


@dataclass(frozen=True, eq=False)
class Pieces:
    """Stretches of time that follow one another, each of one kind; before the first and after the last is `outside`."""

    bounds: Times  # n + 1 of them, ascending
    kinds: npt.NDArray[np.int8]
    sums: Times  # kinds x (n + 1): how much time of a kind there is before a bound
    outside: int

    @classmethod
    def of(cls, bounds: Times, kinds: npt.NDArray[np.int8], how_many: int, outside: int) -> Pieces:
        """Pieces from their bounds; those without a length are dropped."""
        lengths = np.diff(bounds)
        kept = lengths > 0
        bounds = np.concatenate([bounds[:-1][kept], bounds[-1:]])
        kinds, lengths = kinds[kept], lengths[kept]
        sums = np.zeros((how_many, len(kinds) + 1), np.int64)
        for kind in range(how_many):
            np.cumsum(np.where(kinds == kind, lengths, 0), out=sums[kind, 1:])
        return cls(bounds, kinds, sums, outside)

    def until(self, times: Times) -> Times:
        """How much time of each kind there is from the first bound until each of `times`: kinds x times."""
        if not len(self.kinds):
            return np.zeros((len(self.sums), len(times)), np.int64)
        inside = np.clip(times, self.bounds[0], self.bounds[-1])
        place = np.clip(np.searchsorted(self.bounds, inside, side="right") - 1, 0, len(self.kinds) - 1)
        found = self.sums[:, place]
        found[self.kinds[place], np.arange(len(times))] += inside - self.bounds[place]
        return found

    def within(self, begin: Times, end: Times) -> Times:
        """How much time of each kind there is between each `begin` and `end`: kinds x times; they add up to it."""
        found = self.until(end) - self.until(begin)
        found[self.outside] += (end - begin) - found.sum(axis=0)
        return found


@dataclass(frozen=True, eq=False)
class Steps:
    """Of one engine instance, in the order of their ends: their own times, and what of these other prefill takes."""

    numbers: Times
    ends: Times
    own: Times
    prefill_tokens: Times
    beyond_decode: Times  # of mixed steps the excess over their decode alone, of prefill steps all, else 0
    pieces: Pieces

    def find(self, numbers: Times) -> Times:
        """The place of each step number, -1 for one that was not recorded."""
        order = np.argsort(self.numbers, kind="stable")
        place = np.searchsorted(self.numbers, numbers, sorter=order)
        place = order[np.minimum(place, len(order) - 1)] if len(order) else np.zeros(len(numbers), np.int64)
        return np.where(self.numbers[place] == numbers, place, -1) if len(order) else place - 1


def activity(steps: pd.DataFrame) -> dict[int, Steps]:
    """What each engine instance did, from its steps (COLUMNS), of any status."""
    order = np.argsort(steps["end_ns"].to_numpy(), kind="stable")
    instances = steps["instance"].to_numpy()[order]
    return {int(instance): _of_instance(steps, order[instances == instance]) for instance in np.unique(instances)}


def _of_instance(steps: pd.DataFrame, order: Times) -> Steps:
    names = ("begin_ns", "end_ns", "step", "decode_requests", "prefill_tokens")
    begin, end, numbers, width, tokens = (steps[name].to_numpy(np.int64)[order] for name in names)
    phase = steps["phase"].to_numpy()[order]
    before = np.concatenate([begin[:1], end[:-1]])
    starts = np.clip(begin, before, end)
    own = end - starts
    decode, mixed = phase == Phase.DECODE.value, phase == Phase.MIXED.value
    alone = np.minimum(decode_alone(width, own, decode), own)
    cut = np.where(mixed, starts + alone, starts)
    step_kind = np.where(decode, Doing.DECODE, Doing.PREFILL).astype(np.int8)
    step_kind[mixed] = Doing.INTERFERENCE
    gap = np.full(len(end), Doing.BETWEEN, np.int8)
    gap[1:][np.diff(numbers) > 1] = Doing.UNKNOWN
    bounds = np.concatenate([np.stack([before, starts, cut], axis=1).ravel(), end[-1:]])
    kinds = np.stack([gap, np.full(len(end), Doing.MIXED, np.int8), step_kind], axis=1).ravel()
    pieces = Pieces.of(bounds, kinds, len(Doing), Doing.BETWEEN)
    beyond = np.where(decode, 0, np.where(mixed, own - alone, own))
    return Steps(numbers, end, own, tokens, beyond, pieces)


def decode_alone(width: Times, own: Times, decode: npt.NDArray[np.bool_]) -> Times:
    """How long a step with as many requests in decode takes without prefill: the median of those that had none.

    Between the batch sizes that such steps had it is interpolated, beyond them that of the nearest size. Where there is
    no such step nothing can be told apart, and a mixed step's time is all taken for decode.
    """
    if not decode.any():
        return own
    grouped = pd.Series(own[decode]).groupby(width[decode])
    sizes, medians = grouped.size(), grouped.median()
    often = sizes >= _FEWEST_STEPS
    medians = medians[often] if often.any() else medians
    found: Times = np.rint(np.interp(width, medians.index.to_numpy(float), medians.to_numpy(float))).astype(np.int64)
    return found


def split(pieces: Mapping[int, Pieces], instance: pd.Series, begin: Times, end: Times, kinds: int, other: int) -> Times:
    """Each stretch of time split by the pieces of its instance, kinds x times; by `other` where it has none."""
    found = np.zeros((kinds, len(begin)), np.int64)
    found[other] = end - begin
    of = instance.fillna(0).to_numpy(np.int64)
    for each, own in pieces.items():
        chosen = np.flatnonzero(of == each)
        if len(chosen):
            found[:, chosen] = own.within(begin[chosen], end[chosen])
    return found
