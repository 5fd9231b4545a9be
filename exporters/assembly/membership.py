"""Who is in an engine's batch, and how long each waited for a token. Costs follow the changes, not the batch's size.

In steady decode everybody in the batch got the last token from the same step. So only those are kept apart of whom that
is not true: who has just joined, who is in the middle of a prefill, and who left the batch and is not over.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from stagetrace.instrument.records import Change
from stagetrace.instrument.stages import BY_NAME, MAX_ATTRIBUTES

from ..session import INTERVALS_SCHEMA, MEMBERS_SCHEMA, STATES_SCHEMA
from .columns import choices, column, integers, table_of
from .steps import PHASES

if TYPE_CHECKING:
    from collections.abc import Container

    from .steps import Step

_MOST_CHANGES = 20_000  # that wait for their step
_MOST_MEMBERS = 1 << 16
_MOST_DROPPED = 256  # steps
_CHUNK = BY_NAME["prefill_chunk"]
_SNAPSHOT = 0  # beside the values of records.Change


@dataclass
class Found:
    """Rows of the tables on membership, as tuples of integers."""

    runs: list[tuple[int, ...]] = field(default_factory=list)
    chunks: list[tuple[int, ...]] = field(default_factory=list)
    intervals: list[tuple[int, ...]] = field(default_factory=list)

    def clear(self) -> None:
        """Forgets the rows."""
        self.runs, self.chunks, self.intervals = [], [], []

    def members_table(self) -> pa.Table:
        """Rows of the members table."""
        if not self.runs:
            return MEMBERS_SCHEMA.empty_table()
        handle, instance, first, last = integers(self.runs)
        return table_of(MEMBERS_SCHEMA, handle=handle, instance=instance, first_step=first, last_step=last)

    def intervals_table(self) -> pa.Table:
        """Rows of the intervals table."""
        if not self.intervals:
            return INTERVALS_SCHEMA.empty_table()
        instance, step, phase, interval, tokens = integers(self.intervals)
        return table_of(
            INTERVALS_SCHEMA,
            instance=instance,
            step=step,
            phase=choices(phase, PHASES),
            interval_ns=interval,
            tokens=tokens,
        )

    def chunks_table(self) -> pa.Table:
        """Rows of the states table: prefill chunks."""
        if not self.chunks:
            return STATES_SCHEMA.empty_table()
        handle, begin, end, instance, step, *values = integers(self.chunks)
        known = len(_CHUNK.attributes)
        return table_of(
            STATES_SCHEMA,
            handle=handle,
            stage=np.full(len(handle), _CHUNK.id),
            begin_ns=begin,
            end_ns=end,
            instance=column(instance, instance == 0),
            step=column(step, step == 0),
            **{f"a{i}": values[i] for i in range(known)},
            **{f"a{i}": pa.nulls(len(handle), pa.int64()) for i in range(known, MAX_ATTRIBUTES)},
        )


@dataclass(slots=True)
class Batch:
    """The batch of one engine instance. `requests` are those that are not over, of any instance."""

    instance: int
    requests: Container[int]
    found: Found
    known: bool = False  # whether `members` is what the engine has
    members: dict[int, int] = field(default_factory=dict)  # request -> first step of its run
    changes: deque[tuple[int, ...]] = field(default_factory=deque)  # step, record, change, request, q, kv, last, cached
    snapshots: dict[int, list[int]] = field(default_factory=dict)  # record -> requests
    dropped: dict[int, set[int]] = field(default_factory=dict)  # step -> requests in it that get no token of it
    # The last token of each: a time from which its next interval counts (None: there is none), and that token's time.
    # Of members that are not kept apart: the same for all. Of others: in `apart`, or in `left` when no member.
    since: int | None = None
    given: int = 0
    apart: dict[int, tuple[int | None, int]] = field(default_factory=dict)
    left: dict[int, tuple[int | None, int]] = field(default_factory=dict)

    def add_snapshot(self, step: int, record: int, requests: list[int]) -> None:
        """Takes in all requests of a step, in the order of the records."""
        self.snapshots[record] = requests
        self.changes.append((step, record, _SNAPSHOT))

    def drop(self, step: int, request: int) -> None:
        """A request gets no token of a step that it is in. (The step's own changes may all have come.)"""
        self.dropped.setdefault(step, set()).add(request)
        if len(self.dropped) > _MOST_DROPPED:
            del self.dropped[next(iter(self.dropped))]

    def give_up(self, last_step: int) -> int:
        """When too many changes wait for a step that never comes, forgets them; how many."""
        given_up = len(self.changes)
        if given_up <= _MOST_CHANGES:
            return 0
        self.changes.clear()
        self.snapshots.clear()
        self.forget(last_step)
        return given_up

    def forget(self, last_step: int) -> None:
        """A change was lost: until the next snapshot after it nobody's part in a step is known."""
        for request in [*self.members]:
            self.leave(request, last_step)
        self.known = False

    def leave(self, request: int, last_step: int) -> None:
        """A request takes part no longer after a step."""
        first = self.members.pop(request, None)
        if first is None:
            return
        self.found.runs.append((request, self.instance, first, max(first, last_step)))
        token = self.apart.pop(request, None) or (self.since, self.given)
        if request in self.requests:
            self.left[request] = token

    def close(self, request: int, last_step: int) -> None:
        """A request is over."""
        self.leave(request, last_step)
        self.left.pop(request, None)

    def last_token(self, request: int) -> int:
        """When a request got its last token in this batch, in ns; 0 where that is not known."""
        if request in self.members:
            return self.apart.get(request, (None, self.given))[1]
        return self.left.get(request, (None, 0))[1]

    def break_intervals(self) -> None:
        """Tokens came of which nothing is known: the next of each has no interval."""
        self.since = None
        self.apart = {request: (None, token) for request, (_, token) in self.apart.items()}
        self.left = {request: (None, token) for request, (_, token) in self.left.items()}

    def advance(self, step: Step, healed_after: int) -> int:
        """Applies the changes up to a step, then gives its members their tokens.

        While membership is unknown a snapshot counts if its record is after `healed_after`. Returns how many chunks
        are of other steps, whose end was lost.
        """
        unfinished, strays = self._apply(step, healed_after)
        for number in [number for number in self.dropped if number <= step.number]:
            requests = self.dropped.pop(number)
            if number == step.number:
                unfinished |= {request for request in requests if request in self.members}
        if not self.known:
            self.break_intervals()
            return strays
        members, apart = self.members, self.apart
        for request in unfinished:
            if request in members and request not in apart:
                apart[request] = (self.since, self.given)
        intervals: dict[int, int] = {}  # how long -> how many waited so long
        if self.since is not None and len(members) > len(apart):
            intervals[step.end - self.since] = len(members) - len(apart)
        without = 0
        for request in [*apart]:
            if request in unfinished:
                without += 1
                continue
            since, _ = apart.pop(request)
            if since is not None:
                intervals[step.end - since] = intervals.get(step.end - since, 0) + 1
        self.since = self.given = step.end
        step.members, step.output_tokens = len(members), len(members) - without
        for interval, tokens in intervals.items():
            self.found.intervals.append((self.instance, step.number, step.phase, interval, tokens))
        return strays

    def _apply(self, step: Step, healed_after: int) -> tuple[set[int], int]:
        """The changes up to a step; whose chunk in it does not complete the prefill, and how many are of others."""
        last_chunk: dict[int, int] = {}
        strays = 0
        changes = self.changes
        while changes and changes[0][0] <= step.number:
            at, record, change, *words = changes.popleft()
            if change == _SNAPSHOT:
                requests = self.snapshots.pop(record, [])
                if self.known or record > healed_after:
                    self._snapshot(at, requests)
                continue
            request, *values = words
            if change == Change.LEAVE:
                self.leave(request, at - 1)
                continue
            if self.known:
                self._join(request, at)
            if change == Change.CHUNK:
                if at != step.number:  # the end of its step was lost, and so are the chunk's times
                    strays += 1
                    continue
                last_chunk[request] = values[2]
                self.found.chunks.append((request, step.begin, step.end, self.instance, at, *values))
        if len(self.members) > _MOST_MEMBERS:
            self.forget(step.number - 1)
        return {request for request, last in last_chunk.items() if not last}, strays

    def _join(self, request: int, step: int) -> None:
        if request not in self.members:
            self.members[request] = step
            self.apart[request] = self.left.pop(request, (None, 0))

    def _snapshot(self, step: int, requests: list[int]) -> None:
        members = dict.fromkeys(requests)
        for request in [request for request in self.members if request not in members]:
            self.leave(request, step - 1)
        for request in members:
            self._join(request, step)
        self.known = True
