"""One engine instance: its steps in flight, who is in its batch, and what of its scheduler's time was in no segment."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .steps import PARTIAL, RANKS_MISSING, Step
from .timelines import overlap

if TYPE_CHECKING:
    from .membership import Batch

_MOST_OVERTAKEN = 64  # a step that so many later ones have overtaken has no end to come
_MOST_OPEN = 256  # steps whose end has not come
_MOST_WAITING = 100_000  # steps whose ranks have not all reported
_MOST_COVERED = 20_000


@dataclass
class Instance:
    """One engine instance."""

    number: int
    batch: Batch
    process: int = 0
    ended: bool = False  # its process is dead
    ranks: int = 1
    open: dict[int, Step] = field(default_factory=dict)  # by number: those without an end yet
    waiting: dict[int, Step] = field(default_factory=dict)  # those that ended and wait for their ranks
    closed: list[Step] = field(default_factory=list)  # those that wait for no more, since the last take
    last_end: int = 0  # of the last step that ended
    newest: int = 0  # highest step whose end came
    # Outermost segments of the scheduler's timeline.
    covered: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=_MOST_COVERED))

    def begin(self, step: Step) -> None:
        """A step was scheduled."""
        self.open[step.number] = step
        if len(self.open) > _MOST_OPEN:
            self.cut(self.open[next(iter(self.open))])

    def cut(self, step: Step) -> None:
        """An open step has no end to come: recording was switched, or its end was lost."""
        step.end = step.scheduled
        self.close(step, PARTIAL)

    def close(self, step: Step, status: int) -> None:
        """A step gets its row at the next take."""
        self.open.pop(step.number, None)
        self.waiting.pop(step.number, None)
        step.status = status
        self.closed.append(step)

    def end(self, number: int, end: int, covered: list[tuple[int, int]]) -> Step | None:
        """A step ended at `end`, ns; the step, if its begin is known. `covered`: outermost segments since the last."""
        self.cover(covered)
        step = self.open.pop(number, None)
        if step is None:
            return None
        step.end = end
        self.waiting[number] = step
        if len(self.waiting) > _MOST_WAITING:
            self.close(self.waiting[next(iter(self.waiting))], RANKS_MISSING)
        oldest = step.begin
        if self.open:
            for overtaken in [other for other in self.open.values() if other.number < number - _MOST_OVERTAKEN]:
                self.cut(overtaken)
            oldest = min([oldest, *(other.begin for other in self.open.values())])
        while self.covered and self.covered[0][1] <= oldest:
            self.covered.popleft()
        step.unattributed = end - step.begin - overlap(self.covered, step.begin, end)
        return step

    def cover(self, spans: list[tuple[int, int]]) -> None:
        """Takes in outermost segments of the scheduler's timeline."""
        self.covered.extend(spans)

    @property
    def is_idle(self) -> bool:
        """Whether nothing more can come of it: its process is dead, or never said that it has it."""
        return (self.ended or not self.process) and not (self.open or self.waiting or self.closed)
