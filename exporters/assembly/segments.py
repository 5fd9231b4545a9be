"""Segments on their way to their table: they wait for what is around them, then for their step. Columns throughout.

A block is an array of a row for each field below and a column for each segment.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stagetrace.instrument.stages import BY_ID, BY_NAME, MAX_ATTRIBUTES, Kind, Level

from ..session import SEGMENTS_SCHEMA
from .columns import choices, column, table_of
from .steps import PHASES
from .timelines import inherited, nest

if TYPE_CHECKING:
    import pyarrow as pa

    from .decode import Rows

Block = npt.NDArray[np.int64]
Column = npt.NDArray[np.int64]

# What a record has, in the order of its words, and what settling adds; 0 for a parent that there is none of.
SEQUENCE, STAGE, THREAD, BEGIN, END, INSTANCE, STEP, FIRST_ATTRIBUTE = range(8)
_RECORDED = FIRST_ATTRIBUTE + MAX_ATTRIBUTES
PROCESS, SELF, PARENT, PARENT_STAGE = range(_RECORDED, _RECORDED + 4)
_FIELDS = PARENT_STAGE + 1

_RANK_STEP = BY_NAME["rank_step"].id
_MOST_PENDING = 20_000  # segments of a timeline held back for a parent
_MOST_PENDING_IN_ALL = 10 * _MOST_PENDING
_MOST_HELD = 500_000  # segments held back for their step
_MOST_SCHEDULERS = 256  # threads of a process
_NEVER = np.iinfo(np.int64).max

# A segment that can have no segment around it closes what was recorded on its timeline before it. Occasions can come
# inside anything.
_OUTERMOST = np.zeros(1 << 16, np.bool_)
_OUTERMOST[
    [
        stage.id
        for stage in BY_ID.values()
        if stage.kind in (Kind.SEGMENT, Kind.ENVELOPE) and not {*stage.inside} - {"step"}
    ]
] = True
_ATTRIBUTES = np.zeros(1 << 16, np.int64)  # stage -> how many attributes it has
_LEVELS = np.zeros(1 << 16, np.int64)
for _stage in BY_ID.values():
    _ATTRIBUTES[_stage.id], _LEVELS[_stage.id] = len(_stage.attributes), int(_stage.level)


def _nothing(fields: int) -> Block:
    return np.empty((fields, 0), np.int64)


@dataclass
class Cover:
    """The outermost segments of a scheduler's timeline, in the order in which they were settled."""

    groups: list[int]
    spans: list[tuple[int, int]]
    taken: int = 0

    def up_to(self, group: int) -> list[tuple[int, int]]:
        """Those that were settled up to a group's end, and were not taken yet."""
        first, self.taken = self.taken, bisect_right(self.groups, group, self.taken)
        return self.spans[first : self.taken]

    def rest(self) -> list[tuple[int, int]]:
        """Those that were not taken."""
        return self.spans[self.taken :]


@dataclass
class Settled:
    """Segments whose place on their timeline is known."""

    block: Block
    conflicts: int = 0
    covers: dict[int, Cover] = field(default_factory=dict)  # thread of a scheduler
    groups: list[int] = field(default_factory=list)  # of each end of a step: the group that it closed


@dataclass
class Timelines:
    """One process's timelines: segments that may still get a parent."""

    process: int
    schedulers: dict[int, int] = field(default_factory=dict)  # thread -> engine instance whose scheduler runs on it
    pending: Block = field(default_factory=lambda: _nothing(_RECORDED))

    def settle(self, segments: Rows, begins: Rows, ends: Rows) -> Settled:
        """Takes in segments, and begins and ends of steps, in the order of their records; settles what is closed.

        What was recorded on a timeline is closed by an outermost segment, on a scheduler's by the end of a step: all
        of it nests among itself.
        """
        block = np.empty((_RECORDED, len(segments)), np.int64)
        block[SEQUENCE], block[STAGE], block[THREAD:] = segments.number, segments.stage, segments.words
        before = self.pending.shape[1]
        if before:
            block = np.concatenate([self.pending, block], axis=1)
        threads, code = np.unique(block[THREAD], return_inverse=True)
        since = self._schedulers_since(threads, begins)
        keys = _Keys(code, block.shape[1])
        closing = _OUTERMOST[block[STAGE]] & (block[SEQUENCE] < since[code])
        end_code = np.searchsorted(threads, ends.words[0])
        there = end_code < len(threads)
        there[there] = threads[end_code[there]] == ends.words[0][there]
        end_keys = end_code * keys.width + 2 * (before + np.searchsorted(segments.number, ends.number))
        bounds = np.sort(np.concatenate([keys.rows[closing] + 1, end_keys[there]]))
        if block.shape[1] > _MOST_PENDING:
            bounds = keys.with_longest(bounds)
        group, closed = keys.groups(bounds)
        self.pending = block[:, ~closed]
        rows = np.flatnonzero(closed)
        settled = self._nested(block[:, rows], group[rows])
        settled.groups = np.where(there, np.searchsorted(bounds, end_keys) + end_code, -1).tolist()
        if self.pending.shape[1] > _MOST_PENDING_IN_ALL:
            rest = self.rest()
            settled.block = np.concatenate([settled.block, rest.block], axis=1)
            settled.conflicts += rest.conflicts
        return settled

    def rest(self) -> Settled:
        """Settles all that is pending."""
        block, self.pending = self.pending, _nothing(_RECORDED)
        return self._nested(block, np.unique(block[THREAD], return_inverse=True)[1])

    def _schedulers_since(self, threads: Column, begins: Rows) -> Column:
        """For each thread the number of the record from which on a scheduler runs on it."""
        since = np.full(len(threads), _NEVER)
        since[np.isin(threads, np.array([*self.schedulers], np.int64))] = -1
        for thread, instance, number in zip(
            begins.words[0].tolist(), begins.words[3].tolist(), begins.number.tolist(), strict=True
        ):
            if thread in self.schedulers:
                self.schedulers[thread] = instance
            elif len(self.schedulers) < _MOST_SCHEDULERS:
                self.schedulers[thread] = instance
                since[threads == thread] = number
        return since

    def _nested(self, block: Block, group: Column) -> Settled:
        nested = nest(group, block[BEGIN], block[END], block[SEQUENCE])
        block, group = block[:, nested.order], group[nested.order]
        block[END] = nested.end
        inner = nested.parent >= 0
        source = inherited(nested.parent, block[STEP] != 0)  # a gc_pause, say: it belongs to the step that it fell in
        found = np.empty((_FIELDS, block.shape[1]), np.int64)
        found[:_RECORDED] = block
        found[INSTANCE], found[STEP] = block[INSTANCE][source], block[STEP][source]
        found[PROCESS] = self.process
        found[SELF] = nested.self_ns
        found[PARENT] = np.where(inner, block[SEQUENCE][nested.parent], 0)
        found[PARENT_STAGE] = np.where(inner, block[STAGE][nested.parent], 0)
        covers = {}
        for thread in self.schedulers:
            at = np.flatnonzero(~inner & (block[THREAD] == thread))
            if len(at):
                spans = zip(block[BEGIN][at].tolist(), block[END][at].tolist(), strict=True)
                covers[thread] = Cover(group[at].tolist(), [*spans])
        return Settled(found, nested.conflicts, covers)


class _Keys:
    """Places on the timelines as one number each: rows of a timeline are even, what closes it lies between them."""

    def __init__(self, code: Column, count: int):
        self.width = 2 * (count + 1)
        self.code = code
        self.rows = code * self.width + 2 * np.arange(count)

    def groups(self, bounds: Column) -> tuple[Column, npt.NDArray[np.bool_]]:
        """For each row which group it belongs to, numbered along the timelines, and whether that is closed."""
        group = np.searchsorted(bounds, self.rows, "right")
        closed = np.append(bounds, -1)[group] // self.width == self.code
        return group + self.code, closed

    def with_longest(self, bounds: Column) -> Column:
        """The same bounds and more, so that no group gets longer than it may."""
        group, _ = self.groups(bounds)
        order = np.argsort(group, kind="stable")
        firsts = np.flatnonzero(np.diff(group[order], prepend=-1))
        place = np.arange(len(order)) - np.repeat(firsts, np.diff(firsts, append=len(order)))
        full = order[place % (_MOST_PENDING + 1) == _MOST_PENDING]
        return np.sort(np.concatenate([bounds, self.rows[full] + 1])) if len(full) else bounds


class Held:
    """Settled segments that wait for the end of their step."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        # With the phase of each, -1 for none, and the level from which on a switch cut its step.
        self._ready: list[tuple[Block, Column, Column]] = []

    def add(self, block: Block) -> None:
        """Takes in settled segments; those of no step are ready."""
        waiting = block[STEP] != 0
        if waiting.all():
            self._blocks.append(block)
            return
        self._blocks.append(block[:, waiting])
        self._release(block[:, ~waiting])

    def merge(self) -> None:
        """Brings what is held together; beyond what may be held the oldest no longer wait."""
        if len(self._blocks) > 1:
            self._blocks = [np.concatenate(self._blocks, axis=1)]
        if len(self) > _MOST_HELD:
            self._release(self._blocks[0][:, : -(_MOST_HELD // 2)])
            self._blocks = [self._blocks[0][:, -(_MOST_HELD // 2) :]]

    def ranks(self, instance: int) -> dict[int, int]:
        """How many ranks have reported each step of an instance, as far as what is held was merged."""
        if not self._blocks:
            return {}
        block = self._blocks[0]
        at = np.flatnonzero((block[STAGE] == _RANK_STEP) & (block[INSTANCE] == instance))
        step, rank = block[STEP][at], block[FIRST_ATTRIBUTE][at]
        order = np.lexsort((rank, step))
        step, rank = step[order], rank[order]
        new = np.ones(len(step), np.bool_)
        new[1:] = (step[1:] != step[:-1]) | (rank[1:] != rank[:-1])
        steps, counts = np.unique(step[new], return_counts=True)
        return dict(zip(steps.tolist(), counts.tolist(), strict=True))

    def release(
        self, instance: int, steps: dict[int, int], cuts: dict[int, int], waiting: list[int], closed: int
    ) -> None:
        """Lets go of the segments of steps that are closed (step -> phase, step -> level of a cut), and of strays.

        Strays are of steps up to `closed` that are not `waiting`: they were closed before, or their begin was lost.
        """
        if not self._blocks or not (steps or closed):
            return
        block = self._blocks[0]
        mine = block[INSTANCE] == instance
        step = block[STEP]
        phase, cut = np.full(block.shape[1], -1), np.full(block.shape[1], int(Level.KERNEL))
        going = mine & (step <= closed) & ~np.isin(step, np.array(waiting, np.int64))
        if steps:
            known = np.array(sorted(steps), np.int64)
            phases = np.array([steps[number] for number in known.tolist()], np.int64)
            place = np.minimum(np.searchsorted(known, step), len(known) - 1)
            found = mine & (known[place] == step)
            phase[found] = phases[place[found]]
            if cuts:
                cut[found] = np.array([cuts[number] for number in known.tolist()], np.int64)[place[found]]
            going |= found
        if going.all():
            self._ready.append((block, phase, cut))
            self._blocks = []
        elif going.any():
            self._ready.append((block[:, going], phase[going], cut[going]))
            self._blocks = [block[:, ~going]]

    def release_all(self) -> None:
        """Nothing more will come."""
        for block in self._blocks:
            self._release(block)
        self._blocks = []

    def _release(self, block: Block) -> None:
        if block.shape[1]:
            self._ready.append((block, np.full(block.shape[1], -1), np.full(block.shape[1], int(Level.KERNEL))))

    def table(self) -> pa.Table:
        """What is ready, as rows of the segments table."""
        ready, self._ready = self._ready, []
        if not ready:
            return SEGMENTS_SCHEMA.empty_table()
        block = np.concatenate([block for block, _, _ in ready], axis=1)
        phase, cut = (np.concatenate([one[i] for one in ready]) for i in (1, 2))
        known = _ATTRIBUTES[block[STAGE]]
        return table_of(
            SEGMENTS_SCHEMA,
            process=block[PROCESS],
            sequence=block[SEQUENCE],
            thread=block[THREAD],
            stage=block[STAGE],
            begin_ns=block[BEGIN],
            end_ns=block[END],
            self_ns=block[SELF],
            parent=column(block[PARENT], block[PARENT_STAGE] == 0),
            parent_stage=column(block[PARENT_STAGE], block[PARENT_STAGE] == 0),
            instance=column(block[INSTANCE], block[INSTANCE] == 0),
            step=column(block[STEP], block[STEP] == 0),
            phase=choices(phase, PHASES),
            partial=_LEVELS[block[STAGE]] >= cut,
            **{f"a{i}": column(block[FIRST_ATTRIBUTE + i], known <= i) for i in range(MAX_ATTRIBUTES)},
        )

    def __len__(self) -> int:
        return sum(block.shape[1] for block in self._blocks)
