"""A device for tests: a host's clock that a test moves, streams that work off what was launched, events as CUDA has
them. It has no way to wait. Its timer begins elsewhere than the host's clock and drifts from it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

NEVER = 1 << 62
ASIDE = -1  # a stream on which there is nothing else


@dataclass
class FakeEvent:
    """As torch.cuda.Event(enable_timing=True), but for what waits."""

    device: FakeDevice
    reached: int | None = None  # host ns; None: it was not recorded

    def record(self, stream: int | None = None) -> None:
        assert not self.device.capturing_now, "recorded in a capture: it would be part of the graph"
        self.reached = self.device.launch(0, stream)

    def query(self) -> bool:
        assert not self.device.capturing_now, "asked in a capture, which that would break"
        self.device.asked += 1
        return self.reached is None or self.reached <= self.device.now

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.query() and end.query(), "one of both is not there yet: CUDA raises"
        assert self.reached is not None and end.reached is not None, "one of both was not recorded: CUDA raises"
        return float(np.float32((self.device.timer(end.reached) - self.device.timer(self.reached)) / 1e6))


@dataclass
class FakeDevice:
    """Where events come from, and what they are recorded on. Times are host ns; the timer is the device's own."""

    now: int = 1_000_000_000
    drift_ppm: int = 0
    resolution: int = 500
    latency: int = 4_000  # of a launch
    cost: int = 200  # of a reading of the clock
    current: int = 7  # stream
    capturing_now: bool = False
    free: dict[int, int] = field(default_factory=dict)  # by stream: when it has worked off what was launched
    asked: int = 0
    made: int = 0

    def clock(self) -> int:
        self.now += self.cost
        return self.now

    def timer(self, host_ns: int) -> int:
        own = 77_000_000_000 + host_ns + host_ns * self.drift_ppm // 1_000_000
        return own // self.resolution * self.resolution

    def launch(self, width: int, stream: int | None = None) -> int:
        """Work on a stream, the current one if none is named; when it will be done."""
        stream = self.current if stream is None else stream
        begin = max(self.free.get(stream, 0), self.now + self.latency)
        self.free[stream] = begin + width
        return begin + width

    def record_aside(self, event: FakeEvent) -> None:
        event.record(ASIDE)

    def event(self) -> FakeEvent:
        self.made += 1
        return FakeEvent(self)

    def stream(self) -> int:
        return self.current

    def capturing(self) -> bool:
        return self.capturing_now


class LiveDevice(FakeDevice):
    """One whose clock is the host's own."""

    @property
    def now(self) -> int:  # type: ignore[override]
        return time.monotonic_ns()

    @now.setter
    def now(self, _: int) -> None:
        pass

    def wait(self) -> None:
        """As an engine waits for what it has launched."""
        time.sleep(max(0, max(self.free.values()) - self.now) / 1e9)
