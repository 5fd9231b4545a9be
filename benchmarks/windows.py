"""Windows of a run, in pairs that differ in one thing alone, and what that thing cost. Pure, but for the CPU clocks."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import measure
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stream import Seen

RESOLVED_PCT = 1.0  # a 95 % interval that reaches further from its middle says nothing
WITH, WITHOUT = "with", "without"
STOPPED = "with, the collector stopped"
METRICS = {"tpot": "time per output token", "ttft": "time to first token", "throughput": "output tokens per second"}


@dataclass(frozen=True)
class Window:
    """A stretch of a run. Times are s of time.monotonic(); `cpu_s` is what each process used in it."""

    pair: int
    kind: str  # WITH, WITHOUT or STOPPED
    begin: float
    end: float
    cpu_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """What it cost, in percent of the value without: mean over the pairs and its 95 % confidence interval."""

    pct: float
    low: float
    high: float
    without: float  # the median without, in the metric's own unit

    @property
    def resolved(self) -> bool:
        """Whether the interval is narrow enough to say something."""
        return (self.high - self.low) / 2 <= RESOLVED_PCT

    def __str__(self) -> str:
        said = f"{self.pct:+.2f} % ({self.low:+.2f} to {self.high:+.2f})"
        return said if self.resolved else f"not resolved: {said}"

    def json(self, name: str) -> dict[str, Any]:
        """Its keys, which begin with `name`."""
        return {f"{name}_pct": self.pct, f"{name}_pct_ci95": [self.low, self.high], f"{name}_resolved": self.resolved}


def client_figures(window: Window, seen: Seen) -> dict[str, float]:
    """What the client saw in a window: tpot and ttft in s, tokens a second. NaN where nothing came."""
    tokens = [(count, gap) for when, count, gap in seen.tokens if window.begin <= when < window.end]
    firsts = [wait for when, wait in seen.firsts if window.begin <= when < window.end]
    count = sum(one for one, _ in tokens)
    return {
        "tpot": sum(gap for _, gap in tokens) / count if count else float("nan"),
        "ttft": float(np.median(firsts)) if firsts else float("nan"),
        "throughput": (count + len(firsts)) / (window.end - window.begin),
    }


def cpu_figures(window: Window, seen: Seen) -> dict[str, float]:
    """CPU seconds of each process for a token that the client got in the window: at equal load, what differs."""
    tokens = client_figures(window, seen)["throughput"] * (window.end - window.begin)
    return {name: used / tokens if tokens else float("nan") for name, used in window.cpu_s.items()}


def difference(
    windows: Sequence[Window], values: Sequence[float], kind: str = WITH, against: str = WITHOUT
) -> Difference:
    """What a metric changes by in windows of one kind against those of another, pair by pair.

    A pair's windows follow one another, so that drift is in all of them.
    """
    pairs: dict[int, dict[str, float]] = {}
    for window, value in zip(windows, values, strict=True):
        pairs.setdefault(window.pair, {})[window.kind] = value
    both = [(pair[kind], pair[against]) for pair in pairs.values() if {kind, against} <= set(pair)]
    whole = [pair for pair in both if np.isfinite(pair).all()]
    changes = np.array([100 * (with_ / without - 1) for with_, without in whole if without])
    if not len(changes):
        return Difference(float("nan"), -np.inf, np.inf, float("nan"))
    typical = float(np.median([without for _, without in whole]))
    return Difference(float(changes.mean()), *measure.interval(changes), typical)


def differences(
    windows: Sequence[Window], seen: Seen, kind: str = WITH, against: str = WITHOUT
) -> tuple[dict[str, Difference], dict[str, Difference]]:
    """Of the client's metrics, and of the CPU time of each process: windows of one kind against those of another."""
    client = [client_figures(window, seen) for window in windows]
    cpu = [cpu_figures(window, seen) for window in windows]
    processes = list(windows[0].cpu_s) if windows else []
    return (
        {name: difference(windows, [one[name] for one in client], kind, against) for name in METRICS},
        {name: difference(windows, [one[name] for one in cpu], kind, against) for name in processes},
    )


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used so far, its ended threads included, to the nanosecond; NaN once it is gone."""
    clock = ctypes.c_int()
    if ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
        return float("nan")
    try:
        return time.clock_gettime(clock.value)
    except OSError:
        return float("nan")
