"""Counts since the last that a backend confirmed, for one that wants those: OTLP's temporality "delta".

Metrics are kept as totals since the session's start (cumulative). Some backends take only what was added; what a
request carries that is not confirmed is in the next one, with its times.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.metrics.export import AggregationTemporality, Histogram, HistogramDataPoint, Metric, Sum

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_Key = tuple[str, tuple[tuple[str, Any], ...]]  # of a series: the metric's name, and the point's attributes


class Deltas:
    """Remembers what was confirmed, and makes of totals what was added since."""

    def __init__(self) -> None:
        self._confirmed: dict[_Key, Any] = {}  # the points that were sent last
        self._sending: dict[_Key, Any] = {}

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
        for point in data.data_points:
            key = metric.name, _items(point.attributes or {})
            self._sending[key] = point
            before = self._confirmed.get(key)
            points.append(point if before is None else _less(point, before))
        either: Any = data
        made = replace(either, data_points=points, aggregation_temporality=AggregationTemporality.DELTA)
        return replace(metric, data=made)


def _items(attributes: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(attributes.items()))


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
