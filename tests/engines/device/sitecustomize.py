"""Stands in for a GPU in every process that has this folder on its path: what is launched is done, by the host's clock.

Event pairs note the host's time when they are launched, marks are run by Triton's interpreter and get it as the
device's; what a rank computes on its processor is as if its device had. So a real engine's hooks, and the objects that
marks are put on, are those of a GPU's but for graphs. TRITON_INTERPRET=1 has to be set. For tests alone.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from stagetrace.adapters import device_time, marks

_BEGIN = time.monotonic_ns() - 5_000_000_000  # of the device's timer, which begins elsewhere than the host's clock


class Event:
    """A moment of the host's."""

    def __init__(self) -> None:
        self.at = 0

    def record(self, stream: int | None = None) -> None:
        """Now."""
        self.at = time.monotonic_ns()

    def query(self) -> bool:
        """It is over."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return (end.at - self.at) / 1e6


class Events:
    """As device_time.CudaEvents."""

    event = Event

    def stream(self) -> int:
        """There is one."""
        return 1

    def capturing(self) -> bool:
        """No graphs here."""
        return False

    def record_aside(self, event: Event) -> None:
        """As any."""
        event.record()


def opens(self: Any, kind: str, recorder: Any) -> Any:
    """Whatever the engine names its device."""
    sys.modules["torch"].cuda.is_current_stream_capturing = lambda: False
    return _open(self, "cuda", recorder)


def noted(self: Any, index: int) -> Any:
    """The interpreter's kernel takes the time from memory."""
    self.clock.fill_(time.monotonic_ns() - _BEGIN)
    return _mark(self, index)


_open, _mark = device_time.DeviceTime.open, marks.Marks.mark
device_time.built = lambda: True
device_time.CudaEvents = Events  # type: ignore[misc, assignment]
device_time.DeviceTime.open = opens  # type: ignore[method-assign]
marks.Marks.mark = noted  # type: ignore[method-assign]
