"""A scrape endpoint for Prometheus: a session's metrics (metrics.py, stage_metrics.py) in its exposition formats.

It follows the session by itself, so that a trace backend that hangs does not hold it up. Names are made of
OpenTelemetry's as its specification says ("Prometheus and OpenMetrics Compatibility"): dots become underscores, units
and `_total` are added. Exemplars are in the OpenMetrics format alone, which Prometheus asks for when it stores them.
"""

from __future__ import annotations

import logging
import re
import time
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIServer

from opentelemetry.sdk.metrics.export import Gauge, Histogram, Sum
from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.samples import Exemplar

from .light_metrics import LightMetrics
from .metrics import metrics_of
from .parts import END
from .session import TABLES, Export, Manifest, Session, names_of
from .spans import Clock
from .stage_metrics import StageMetrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from opentelemetry.sdk.metrics.export import HistogramDataPoint, Metric
    from prometheus_client.metrics_core import Metric as Family

    from .follow import Enrich

log = logging.getLogger(__name__)

_UNITS = {"s": "seconds", "By": "bytes", "1": "ratio"}
_LOOK_S = 0.5


def families(metrics: list[Metric]) -> Iterator[Family]:
    """The same metrics as the client library has them. Pure."""
    for metric in metrics:
        name = metric.name.replace(".", "_")
        unit = _UNITS.get(metric.unit or "", "")
        if unit and not name.endswith(unit):
            name = f"{name}_{unit}"
        points: list[Any] = list(metric.data.data_points)
        means = metric.description or ""
        labels = sorted({key for point in points for key in point.attributes})
        names = [re.sub(r"\W", "_", label.removeprefix("stagetrace.")) for label in labels]

        def values(point: Any, labels: list[str] = labels) -> list[str]:
            return [str(point.attributes.get(label, "")) for label in labels]

        if isinstance(metric.data, Sum) and metric.data.is_monotonic:
            counter = CounterMetricFamily(name, means, labels=names)
            for point in points:
                counter.add_metric(values(point), point.value)
            yield counter
        elif isinstance(metric.data, (Sum, Gauge)):
            gauge = GaugeMetricFamily(name, means, labels=names)
            for point in points:
                gauge.add_metric(values(point), point.value)
            yield gauge
        elif isinstance(metric.data, Histogram):
            histogram = HistogramMetricFamily(name, means, labels=names)
            for point in points:
                histogram.add_metric(values(point), _buckets(point), point.sum)
            yield histogram


def _buckets(point: HistogramDataPoint) -> list[Any]:
    """Bounds and counts up to them, with the exemplar of those between."""
    found: list[Any] = []
    below, before = 0, float("-inf")
    for bound, count in zip((*point.explicit_bounds, float("inf")), point.bucket_counts, strict=True):
        below += count
        inside = [each for each in point.exemplars if before < each.value <= bound]
        text = "+Inf" if bound == float("inf") else repr(float(bound))
        if inside:
            each = inside[-1]
            trace = {"trace_id": f"{each.trace_id:032x}", "span_id": f"{each.span_id:016x}"}
            found.append((text, below, Exemplar(trace, each.value, each.time_unix_nano / 1e9)))
        else:
            found.append((text, below))
        before = bound
    return found


class SessionMetrics(Collector):
    """All metrics of a session, followed commit by commit. `collect` is called by the server's threads."""

    def __init__(self, session: Session, enrich: Enrich | None = None):
        self.session = session
        self._enrich = enrich
        self._light = LightMetrics()
        self._stages: StageMetrics | None = None
        self._read = 0
        self._ended = False
        self._found: list[Family] = []  # replaced as a whole, so that threads see an old or a new one
        self.manifest = Manifest()

    def collect(self) -> list[Family]:
        """What was found last."""
        return self._found

    def step(self) -> bool:
        """Takes in the next commit, if there is one. Raises SessionError."""
        if self._read >= self.manifest.derived:
            self.manifest = self.session.read_manifest()
        self._read = max(self._read, self.manifest.rotated)
        if self._read < self.manifest.derived:
            number = self._read = self._read + 1
        elif self.manifest.complete and not self._ended:
            self._ended, number = True, END
        else:
            return False
        self._take(number)
        if self._read >= self.manifest.derived:
            self.refresh()
        return True

    def _take(self, number: int) -> None:
        if not self.manifest.anchors:
            self.manifest = self.session.read_manifest()
        if self._stages is None:
            self._stages = StageMetrics(self.session.identity.key, self.manifest.started_ns)
        tables: Mapping[str, Any] = {name: self.session.read_table(name, numbers=(number, number)) for name in TABLES}
        try:
            if self._enrich is not None:
                tables = self._enrich(tables, self.manifest)
                self._light.add(tables)
        except Exception:
            log.exception("the metrics of the speed of light end with commit %d", number)
            self._enrich = None
        self._stages.add(tables, names_of(self.manifest.processes), Clock(self.manifest.anchors))

    def refresh(self) -> None:
        """Makes what `collect` gives."""
        now_ns = time.time_ns()
        others = [*self._light.metrics(now_ns), *(self._stages.metrics(now_ns) if self._stages else [])]
        exported = next(iter(self.session.read_exports().values()), Export("", commit=self.manifest.derived))
        data = metrics_of(self.manifest, exported, now_ns, others)
        self._found = list(families(list(data.resource_metrics[0].scope_metrics[0].metrics)))


def serve(
    session: Session,
    where: tuple[str, int],
    told: Callable[[], bool],
    enrich: Enrich | None = None,
    ready: Callable[[int], None] = lambda port: None,
) -> None:
    """Serves a session's metrics until told; `ready` is called with the port once they are there.

    Raises OSError when the address cannot be had, and SessionError.
    """
    metrics = SessionMetrics(session, enrich)
    registry = CollectorRegistry()
    server, thread = start_http_server(where[1], where[0], registry)
    assert isinstance(server, WSGIServer)
    try:
        while metrics.step() and not told():
            pass
        registry.register(metrics)
        ready(server.server_port)
        while not told():
            if not metrics.step():
                time.sleep(_LOOK_S)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
