"""Exact accounting on timelines: segments nest or follow; each gets its parent and its self time. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterable

Column = npt.NDArray[np.int64]

_LARGEST = 1 << 62
_DEEPEST = 32  # levels; calls nest a handful deep


@dataclass(frozen=True)
class Nested:
    """Segments in the order of their timelines and begins, an outer one before those inside it. Times in ns."""

    order: Column  # where each was among those given
    end: Column  # as cut
    parent: Column  # row of the segment that it is directly inside of, -1 for none
    self_ns: Column  # its time less that of the segments directly inside it
    conflicts: int  # how many had to be cut


def nest(timeline: Column, begin: Column, end: Column, sequence: Column) -> Nested:
    """Gives every segment its parent among those of its timeline. `timeline`: any number from 0 on that names it.

    A segment that crosses the end of the one it began in is cut there. Of two with the same times the one recorded
    later (its `sequence` is higher) is the outer one, since a segment is recorded at its end.
    """
    order = np.lexsort((-sequence, -end, begin, timeline))
    timeline, begin, end = timeline[order], begin[order], end[order]
    conflicts = 0
    parent = _level_by_level(timeline, begin, end) if len(order) else order
    if parent is None:
        parent, end, conflicts = _one_by_one(timeline, begin, end)
    self_ns = end - begin
    inner = np.flatnonzero(parent >= 0)
    np.subtract.at(self_ns, parent[inner], (end - begin)[inner])
    return Nested(order, end, parent, self_ns, conflicts)


def _level_by_level(timeline: Column, begin: Column, end: Column) -> Column | None:
    """Parents of segments that nest; None where one crosses another, or they nest too deep.

    A segment is outermost when all before it have ended by its begin. What is left is inside the outermost one before
    it, and with that one taken away the same holds for the next level.
    """
    firsts = np.flatnonzero(np.diff(timeline, prepend=timeline[0] - 1))
    span = int(np.max(np.maximum.reduceat(end, firsts) - begin[firsts])) + 1
    if span * len(firsts) >= _LARGEST:
        return None
    # The timelines are laid one behind the other, so that nothing of one is open in the next.
    shift = np.repeat(np.arange(len(firsts)) * span - begin[firsts], np.diff(firsts, append=len(timeline)))
    begin, end = begin + shift, end + shift
    parent = np.full(len(begin), -1)
    rows = np.arange(len(begin))
    for _ in range(_DEEPEST):
        ended = np.full(len(rows), -1)
        np.maximum.accumulate(end[rows[:-1]], out=ended[1:])
        outer = ended <= begin[rows]
        holder = rows[outer][np.cumsum(outer)[~outer] - 1]
        rows = rows[~outer]
        if not len(rows):
            return parent
        if (end[rows] > end[holder]).any():
            return None
        parent[rows] = holder
    return None


def _one_by_one(timeline: Column, begin: Column, end: Column) -> tuple[Column, Column, int]:
    """The same with a stack, for any segments: parents, ends as cut, and how many were cut."""
    parents: list[int] = []
    ends: list[int] = []
    conflicts = 0
    stack: list[int] = []
    before = None
    for row, (line, start, stop) in enumerate(zip(timeline.tolist(), begin.tolist(), end.tolist(), strict=True)):
        if line != before:
            stack, before = [], line
        while stack and ends[stack[-1]] <= start:
            stack.pop()
        cut = bool(stack) and stop > ends[stack[-1]]
        conflicts += cut
        parents.append(stack[-1] if stack else -1)
        ends.append(ends[stack[-1]] if cut else stop)
        stack.append(row)
    return np.array(parents), np.array(ends), conflicts


def inherited(parent: Column, own: npt.NDArray[np.bool_]) -> Column:
    """For every segment the row of the nearest one around it, itself first, that has its `own`; else its outermost."""
    source = np.where(own | (parent < 0), np.arange(len(parent)), parent)
    while True:
        further = source[source]
        if (further == source).all():
            return source
        source = further


def overlap(segments: Iterable[tuple[int, int]], begin: int, end: int) -> int:
    """How much of [begin, end) intervals cover together, in ns; where two overlap it counts once."""
    covered, reached = 0, begin
    for first, last in sorted(segments):
        start = first if first > reached else reached  # not max() and min(): this is called for every step
        stop = last if last < end else end
        if stop > start:
            covered += stop - start
            reached = stop
    return covered
