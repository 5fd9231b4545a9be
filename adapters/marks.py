"""Marks on a device, for every engine: rows in its memory, the kernel that notes times in them, and the way back.

A mark is launched from the Python around the work that it delimits, on the engine's stream: in an eager run, and while
a graph is captured, whose replays then pass it. The step's number is written on that stream before the step's work; its
row is copied to the host after it, without waiting, and read when the copy is there. On one stream the copy comes
before the next step's marks; the ring's depth is for streams that run apart. marking.py puts them around layers.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.device_marks import WORDS, MarkReader

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stagetrace.instrument.device_marks import Marked, MarkSpan
    from stagetrace.instrument.device_pairs import Event

DEPTH = 64  # rows: steps until a place is used again
_MOST_COPIES = 16  # rows on their way; where there are more, a step's marks are left out and counted


class Marks:
    """The marks of one process, all on one device."""

    def __init__(self, marked: Sequence[Marked], device: Any, event: Callable[[], Event], depth: int = DEPTH):
        """Allocates the ring and compiles the kernel, which a capture could not. `event` makes one of the device's.

        `device` as torch has it. Raises ImportError where there is no Triton, and whatever Triton raises.
        """
        from . import mark_kernel

        torch: Any = sys.modules["torch"]
        self.reader = MarkReader(marked)
        self.left_out = 0  # steps for which no buffer was free
        self._event = event
        self._depth = depth
        on_gpu = str(getattr(device, "type", device)) != "cpu"
        self._timer = (mark_kernel.HIP if torch.version.hip else mark_kernel.CUDA) if on_gpu else mark_kernel.NONE
        self._kernel = mark_kernel.mark_kernel[(1,)]
        self._ring = torch.zeros((depth, 2 * len(marked), WORDS), dtype=torch.int64, device=device)
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.clock = torch.zeros(1, dtype=torch.int64, device=device)  # the time, where there is no timer
        self._free = [torch.zeros(self.reader.words, dtype=torch.int64, pin_memory=on_gpu) for _ in range(_MOST_COPIES)]
        self._copies: deque[tuple[int, Any, Event]] = deque()  # step, buffer, event
        self._compiled: Callable[..., object] | None = None
        compiled = self.mark(0)
        if hasattr(compiled, "__getitem__"):  # not in the interpreter
            self._compiled = compiled[(1, 1, 1)]
            try:
                self.mark(1)
            except Exception:  # a Triton that launches otherwise: through its own door, which looks the kernel up
                self._compiled = None
        for mark in range(2 * len(marked)):
            self.mark(mark)
        self._ring.zero_()

    def begin_step(self, step: int) -> None:
        """Before the step's work, on its stream: what is noted from now on is of this step. Steps count from 1."""
        self._counter.fill_(step)

    def mark(self, index: int) -> Any:
        """Notes the time, on the current stream; into a graph, where that is captured."""
        ring, counter, clock = self._ring, self._counter, self.clock
        marks = 2 * len(self.reader.marked)
        if self._compiled is not None:
            return self._compiled(ring, counter, clock, index, marks, self._depth, self._timer)
        return self._kernel(ring, counter, clock, index, marks=marks, depth=self._depth, timer=self._timer, num_warps=1)

    def end_step(self, step: int) -> bool:
        """The step has been launched: its row is copied as soon as the device is there. False: no buffer is free."""
        if not self._free:
            self.left_out += 1
            return False
        buffer = self._free.pop()
        buffer.copy_(self._ring[step % self._depth].reshape(-1), non_blocking=True)
        event = self._event()
        event.record()
        self._copies.append((step, buffer, event))
        return True

    def read(self) -> list[tuple[int, list[MarkSpan]]]:
        """The spans of the steps whose rows are there, oldest first, on the device's timer."""
        found = []
        while self._copies and self._copies[0][2].query():
            step, buffer, _ = self._copies.popleft()
            found.append((step, self.reader.read(step, buffer.tolist())))
            self._free.append(buffer)
        return found
