"""Counts since the last that a backend confirmed, for one that wants those: OTLP's temporality "delta".

Metrics are kept as totals since the session's start (cumulative). Some backends take only what was added; what a
request carries that is not confirmed is in the next one, with its times. What is counted since the session's start
outlives the process that sends it, which then goes on from the totals that were confirmed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    Sum,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_Points = list[tuple[str, Any]]  # series -> its point


class Deltas:
    """Remembers what was confirmed, and makes of totals what was added since."""

    def __init__(self) -> None:
        self._confirmed: dict[str, Any] = {}  # by series: the points that were sent last
        self._sending: dict[str, Any] = {}

    def take_up(self, totals: Mapping[str, int], at_ns: int) -> None:
        """Goes on from totals that another process was confirmed, by series, at a time (wall clock)."""
        nothing: dict[str, str] = {}
        self._confirmed |= {key: NumberDataPoint(nothing, 0, at_ns, value) for key, value in totals.items()}

    def since(self, metrics: Sequence[Metric]) -> list[Metric]:
        """The metrics with what was added since the last that was confirmed; what only grows, and histograms."""
        self._sending = {}
        return [self._since(metric) for metric in metrics]

    def confirm(self) -> None:
        """Takes what `since` gave last for sent."""
        self._confirmed |= self._sending

    def _since(self, metric: Metric) -> Metric:
        data = metric.data
        if not isinstance(data, Histogram) and not (isinstance(data, Sum) and data.is_monotonic):
            return metric
        points = []
        for key, point in _by_series(metric):
            self._sending[key] = point
            before = self._confirmed.get(key)
            points.append(point if before is None else _less(point, before))
        either: Any = data
        made = replace(either, data_points=points, aggregation_temporality=AggregationTemporality.DELTA)
        return replace(metric, data=made)


def totals_of(metrics: Sequence[Metric]) -> dict[str, int]:
    """The totals of counters, by series: what `take_up` goes on from."""
    counters = (metric for metric in metrics if isinstance(metric.data, Sum) and metric.data.is_monotonic)
    return {key: int(point.value) for metric in counters for key, point in _by_series(metric)}


def _by_series(metric: Metric) -> _Points:
    """A series is a metric's name and a point's attributes."""
    return [
        (json.dumps([metric.name, *sorted((point.attributes or {}).items())]), point)
        for point in metric.data.data_points
    ]


def _less(point: Any, before: Any) -> Any:
    """A point less an earlier one of its series, from whose time on it counts."""
    start = before.time_unix_nano
    exemplars = [each for each in point.exemplars if each not in before.exemplars]
    if not isinstance(point, HistogramDataPoint):
        return replace(point, start_time_unix_nano=start, value=point.value - before.value, exemplars=exemplars)
    buckets = [now - then for now, then in zip(point.bucket_counts, before.bucket_counts, strict=True)]
    nothing: Any = None  # of the time in between no extremes are known
    return replace(
        point,
        start_time_unix_nano=start,
        count=point.count - before.count,
        sum=point.sum - before.sum,
        bucket_counts=buckets,
        min=nothing,
        max=nothing,
        exemplars=exemplars,
    )
