"""The speed of light as metrics: what a commit's tables say of it (spans.STEP_LIGHT), summed up by kind of step.

Cumulative since it was made: a process that is started again begins at zero, as its points' start time says. Shares are
of the last minute of steps. What is not known (no model, no ceilings) has no metric.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    Sum,
)

from .spans import GAP_PARTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt
    import pyarrow as pa

WINDOW_NS = 60_000_000_000  # of the shares
BOUNDS_S = tuple(digit * 10.0**power for power in range(-5, 3) for digit in (1, 2, 5))
_ROOFS = {"compute": "mfu", "memory": "mbu", "link": "link_share", "all": "light_share"}  # and the column's share
_SHARES = {
    "mfu": ("compute", "operations of steps over the peak of their arithmetic"),
    "mbu": ("memory", "bytes of weights and cache that steps move over the memory's bandwidth"),
    "link_share": ("link", "bytes of collectives over the link's bandwidth"),
    "light_share": ("all", "the least time of steps over the time that they took"),
}
_REQUESTS = {
    "stagetrace.request.least_time_to_first_token": ("least_ttft_ns", "to the first token"),
    "stagetrace.request.least_time_per_output_token": ("least_tpot_ns", "per output token"),
}
_Sums = dict[tuple[str, str, str], float]  # by what, phase, and roof or part


@dataclass
class _Distribution:
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(BOUNDS_S) + 1, np.int64))
    total: float = 0.0
    least: float = float("inf")
    most: float = 0.0

    def add(self, seconds: npt.NDArray[np.float64]) -> None:
        self.counts += np.bincount(np.searchsorted(BOUNDS_S, seconds), minlength=len(self.counts))
        self.total += float(seconds.sum())
        self.least, self.most = min(self.least, float(seconds.min())), max(self.most, float(seconds.max()))


class LightMetrics:
    """Takes in the tables of one commit after the other. Used by one thread."""

    def __init__(self) -> None:
        self._started_ns = time.time_ns()
        self._sums: _Sums = {}
        self._recent: deque[tuple[int, _Sums]] = deque()  # of each commit: its last step's end, what it added
        self._requests = {name: _Distribution() for name in _REQUESTS}

    def add(self, tables: Mapping[str, pa.Table]) -> None:
        """Takes in complete steps and finished requests; what has none of the columns adds nothing."""
        self._add_steps(tables["steps"])
        requests = tables["requests"]
        for name, (column, _) in _REQUESTS.items():
            if column in requests.column_names:
                finished = np.array([each == "finished" for each in requests["status"].to_pylist()], bool)
                whole = finished & ~requests["partial"].to_numpy()
                values = requests[column].to_numpy()[whole]
                if len(known := values[np.isfinite(values)]):
                    self._requests[name].add(known / 1e9)

    def _add_steps(self, steps: pa.Table) -> None:
        if "own_ns" not in steps.column_names or not steps.num_rows:
            return
        complete = np.array([each == "complete" for each in steps["status"].to_pylist()], bool)
        phases = np.array(steps["phase"].to_pylist())
        ends = steps["end_ns"].to_numpy()
        seconds = np.maximum(ends - steps["begin_ns"].to_numpy(), 1) / 1e9
        columns: dict[tuple[str, str], Any] = {("time", ""): steps["own_ns"].to_numpy() / 1e9}
        columns |= {(name, ""): _numbers(steps, name) for name in ("operations", "moved_bytes", "link_bytes")}
        for roof, share in _ROOFS.items():
            if share in steps.column_names:
                columns["least", roof] = _numbers(steps, share) * seconds
        for part in GAP_PARTS:
            if f"gap_{part}_ns" in steps.column_names:
                columns["gap", part] = _numbers(steps, f"gap_{part}_ns") / 1e9
        added: _Sums = {}
        for phase in dict.fromkeys(phases[complete].tolist()):
            chosen = complete & (phases == phase)
            for (what, which), values in columns.items():
                added[what, phase, which] = float(np.nansum(values[chosen]))
        if not added:
            return
        _add(self._sums, added)
        self._recent.append((int(ends.max()), added))
        while self._recent[0][0] < self._recent[-1][0] - WINDOW_NS:
            self._recent.popleft()

    def metrics(self, now_ns: int) -> list[Metric]:
        """What there is at `now_ns` (wall clock)."""
        return [*self._of_steps(now_ns), *self._shares(now_ns), *self._of_requests(now_ns)]

    def _of_steps(self, now_ns: int) -> list[Metric]:
        sums = (
            ("stagetrace.step.time", "time", "s", "time of complete steps that is their own, by kind", ""),
            ("stagetrace.step.operations", "operations", "{operation}", "operations that the steps needed", ""),
            ("stagetrace.step.moved_bytes", "moved_bytes", "By", "bytes of weights and cache that they needed", ""),
            ("stagetrace.step.link_bytes", "link_bytes", "By", "bytes of collectives on the busiest link", ""),
            ("stagetrace.step.least_time", "least", "s", "least time of the steps, by roof", "roof"),
            ("stagetrace.step.gap", "gap", "s", "what the steps took beyond their least time, by part", "part"),
        )
        found = []
        for name, what, unit, means, attribute in sums:
            points = [
                self._point(value, phase, now_ns, {f"stagetrace.{attribute}": which} if attribute else {})
                for (of, phase, which), value in sorted(self._sums.items())
                if of == what
            ]
            if points:  # a part of a gap can become smaller
                found.append(Metric(name, means, unit, Sum(points, AggregationTemporality.CUMULATIVE, what != "gap")))
        return found

    def _shares(self, now_ns: int) -> list[Metric]:
        window: _Sums = {}
        for _, added in self._recent:
            _add(window, added)
        found = []
        for name, (roof, means) in _SHARES.items():
            points = [
                self._point(value / window["time", phase, ""], phase, now_ns, {})
                for (what, phase, which), value in sorted(window.items())
                if (what, which) == ("least", roof) and window["time", phase, ""] > 0
            ]
            if points:
                found.append(Metric(f"stagetrace.step.{name}", f"{means}, last minute of steps", "1", Gauge(points)))
        return found

    def _point(self, value: float, phase: str, now_ns: int, attributes: Mapping[str, str]) -> NumberDataPoint:
        return NumberDataPoint({"stagetrace.phase": phase, **attributes}, self._started_ns, now_ns, value)

    def _of_requests(self, now_ns: int) -> list[Metric]:
        found = []
        for name, (_, what) in _REQUESTS.items():
            each = self._requests[name]
            if count := int(each.counts.sum()):
                counts, bounds = each.counts.tolist(), list(BOUNDS_S)
                extremes = (each.least, each.most)
                point = HistogramDataPoint({}, self._started_ns, now_ns, count, each.total, counts, bounds, *extremes)
                means = f"least time {what} of finished requests, each alone on the device"
                found.append(Metric(name, means, "s", Histogram([point], AggregationTemporality.CUMULATIVE)))
        return found


def _add(sums: _Sums, added: _Sums) -> None:
    for key, value in added.items():
        sums[key] = sums.get(key, 0.0) + value


def _numbers(table: pa.Table, name: str) -> npt.NDArray[np.float64]:
    """A column with NaN where it is null or not there."""
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    found: npt.NDArray[np.float64] = table[name].to_numpy().astype(np.float64)
    return found
