"""What holds waiting requests back, and how long it held each: for the scheduler of every engine.

After each schedule an engine can say, in constant time, what kept it from taking one more request in. So there is one
sum of time for each cause, and a request's own time is by how much the sums grew while it waited: nothing is done for
each waiting request in a step.
"""

from __future__ import annotations

from stagetrace.instrument.stages import QueueCause

TURN = int(QueueCause.TURN)
OWN = int(QueueCause.UNKNOWN)  # what only the request itself can say


class Waiting:
    """One scheduler's requests that wait to be scheduled; used on its thread alone."""

    def __init__(self) -> None:
        self.since: dict[str, tuple[int, ...]] = {}  # request -> held_ns when it began to wait
        # Time that waiting requests were held back so far, by QueueCause, in ns; replaced when it grows.
        self.held_ns: tuple[int, ...] = (0,) * len(QueueCause)
        self.held = TURN  # what holds them back now: TURN stands for nothing that is known
        self.held_since = 0

    def forget(self) -> None:
        """What has happened meanwhile is not known."""
        self.since.clear()
        self.held = TURN

    def begins(self, request_id: str, time_ns: int) -> None:
        """A request waits from now on to be scheduled."""
        self.since[request_id] = self.held_ns if self.held == TURN else self._held_until(time_ns)

    def holds_back(self, cause: int, time_ns: int) -> None:
        """From now on this QueueCause, or OWN, is what holds waiting requests back."""
        if cause == self.held:
            return
        if self.held != TURN:
            self.held_ns = self._held_until(time_ns)
        self.held, self.held_since = cause, time_ns

    def ends(self, request_id: str, time_ns: int, own: int = OWN) -> list[tuple[int, int]]:
        """A request waits no longer: each cause that held it back, and for how many ns.

        `own` is the cause where it was held back by something of its own; OWN for none that is known.
        """
        since = self.since.pop(request_id, None)
        if since is None or (since is self.held_ns and self.held == TURN):
            return []
        found = []
        for held, (before, after) in enumerate(zip(since, self._held_until(time_ns), strict=True)):
            cause = held or own
            if cause != OWN and held != TURN and after != before:
                found.append((cause, after - before))
        return found

    def _held_until(self, time_ns: int) -> tuple[int, ...]:
        """What `held_ns` would be, were it brought up to that time."""
        held = [*self.held_ns]
        held[self.held] += max(time_ns - self.held_since, 0)
        return tuple(held)
