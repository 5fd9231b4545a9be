"""Gathers rows of a request that come before the request's own: a sink needs them together. Tables need no order.

While a collector runs, a prefill chunk is final when its step is over, and a run of steps when the request leaves the
batch (a preemption ends one); the request's row, which says what trace they are in, comes when the request is over.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_ROWS = 200_000  # held at a time: some 100 MB
MOST_HANDLES = 100_000  # of requests that were let go

_Row = dict[str, Any]
_INNER = ("states", "members")


class Gather:
    """Rows of requests that are not over; when memory is short, those that have waited longest are given up."""

    def __init__(self, most_rows: int = MOST_ROWS, most_handles: int = MOST_HANDLES):
        self._most_rows = most_rows
        self._most_handles = most_handles
        self._held: dict[int, list[tuple[str, _Row]]] = {}
        self._rows = 0
        self._gone: dict[int, None] = {}

    def add(self, rows: dict[str, Sequence[_Row]]) -> tuple[dict[str, Sequence[_Row]], Counter[str]]:
        """The rows that can go: all but the states and members of requests that have no row yet.

        Also returns how many rows can never go, by reason: they came after their request's, or were given up.
        """
        left_out: Counter[str] = Counter()
        over = {row["handle"]: row for row in rows["requests"]}
        ready: dict[str, list[_Row]] = {name: [] for name in _INNER}
        for handle in over:
            for name, row in self._held.pop(handle, ()):
                ready[name].append(row)
                self._rows -= 1
        for name in _INNER:
            for row in rows[name]:
                if row["handle"] in over:
                    ready[name].append(row)
                elif row["handle"] in self._gone:
                    left_out[f"{name}_after_their_request"] += 1
                else:
                    self._held.setdefault(row["handle"], []).append((name, row))
                    self._rows += 1
        self._gone |= dict.fromkeys(over)
        while len(self._gone) > self._most_handles:
            del self._gone[next(iter(self._gone))]
        while self._rows > self._most_rows:
            handle = next(iter(self._held))
            for name, _ in self._held.pop(handle):
                left_out[f"{name}_given_up"] += 1
                self._rows -= 1
        return {**rows, **ready}, left_out
