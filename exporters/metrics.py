"""What reached the session and the backend, and what did not, as OTLP metrics: cumulative counts by reason.

With them go where the time went (stage_metrics.py) and the speed of light (light_metrics.py). The counts come from the
manifest and the state of the export alone, so a value is as old as the last commit. A backend that takes no metrics is
left alone for a while after each attempt; counts are cumulative, so nothing is lost by that.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import requests
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from .light_metrics import LightMetrics
from .otel_settings import Reading
from .otlp_send import check, grpc_compression, grpc_credentials
from .session import FATES, names_of
from .spans import SCOPE_NAME, SCOPE_VERSION, Clock, resource_attributes
from .stage_metrics import StageMetrics
from .temporality import Deltas, totals_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pyarrow as pa

    from .otel_settings import Destination
    from .session import Export, Manifest

log = logging.getLogger(__name__)

PAUSE_S = 300.0  # after a refusal
SCOPE = InstrumentationScope(SCOPE_NAME, SCOPE_VERSION)
_Points = list[tuple[int, dict[str, str]]]  # value, attributes


def metrics_of(manifest: Manifest, export: Export, now_ns: int, others: Iterable[Metric] = ()) -> MetricsData:
    """The counts of a session at `now_ns` (wall clock), from its start on, and `others` with them."""
    return _sent(manifest, [*counts_of(manifest, export, now_ns), *others])


def _sent(manifest: Manifest, metrics: list[Metric]) -> MetricsData:
    resource = Resource.create({**resource_attributes(manifest), **OTELResourceDetector().detect().attributes})
    return MetricsData([ResourceMetrics(resource, [ScopeMetrics(SCOPE, metrics, "")], "")])


def counts_of(manifest: Manifest, export: Export, now_ns: int) -> list[Metric]:
    """What was lost, sent and went wrong, at `now_ns` (wall clock), since the session's start."""
    slots: _Points = []
    for fate in FATES:
        for ring in ("control", "detail"):
            count = sum(getattr(loss, fate) for loss in manifest.losses if loss.ring == ring)
            slots.append((count, {"stagetrace.fate": fate, "stagetrace.ring": ring}))
    errors: dict[str, int] = {}
    for process in manifest.processes:
        for hook, count in process.errors.items():
            errors[hook] = errors.get(hook, 0) + count
    sums: dict[str, tuple[str, str, _Points]] = {
        "stagetrace.slots": ("{slot}", "slots of the rings, by what became of them", slots),
        "stagetrace.spans": (
            "{span}",
            "spans, by whether this backend confirmed them",
            [(export.sent, {"stagetrace.fate": "sent"}), (export.refused, {"stagetrace.fate": "refused"})],
        ),
        "stagetrace.export.left_out": (
            "{row}",
            "rows that became no spans for this backend, by reason",
            [(max(count, 0), {"stagetrace.reason": name}) for name, count in sorted(export.left_out.items())],
        ),
        "stagetrace.hook.errors": (
            "{error}",
            "contained errors of stagetrace's own, by hook",
            [(count, {"stagetrace.hook": hook}) for hook, count in sorted(errors.items())],
        ),
        "stagetrace.records.damaged": (
            "{record}",
            "what was read and is no whole record, or could not be assembled, by reason",
            [
                (manifest.counts.get(name, 0), {"stagetrace.reason": name})
                for name in ("corrupt", "incomplete", "accounting_conflict", "assembly_errors")
            ],
        ),
    }
    metrics = [
        Metric(
            name, what, unit, Sum(_points(points, manifest.started_ns, now_ns), AggregationTemporality.CUMULATIVE, True)
        )
        for name, (unit, what, points) in sums.items()
        if points
    ]
    waiting = _points([(max(manifest.derived - export.commit, 0), {})], manifest.started_ns, now_ns)
    metrics.append(
        Metric("stagetrace.export.waiting", "commits whose spans wait for this backend", "{commit}", Gauge(waiting))
    )
    return metrics


def _points(points: Iterable[tuple[int, Mapping[str, str]]], start_ns: int, now_ns: int) -> list[NumberDataPoint]:
    return [NumberDataPoint(dict(attributes), start_ns, now_ns, value) for value, attributes in points]


class MetricsSink:
    """Sends the counts now and then. Used by one thread; never raises once it is made."""

    def __init__(self, destination: Destination, key: bytes = b"", reading: Reading | None = None):
        """Raises ValueError for settings that cannot be followed."""
        self._exporter = _exporter(destination)
        self._reading = reading or Reading()
        self._deltas = Deltas()
        self._taken_up = False  # what an earlier process was confirmed
        self._target = destination.target
        self._light = LightMetrics()
        self._stages = StageMetrics(key, time.time_ns())
        self._next_s = 0.0
        self._refused = False

    def add(self, tables: Mapping[str, pa.Table], manifest: Manifest) -> None:
        """Takes in what the tables of a commit say."""
        try:
            self._light.add(tables)
        except Exception:
            log.exception("the metrics of the speed of light lack a commit")
        try:
            self._stages.add(tables, names_of(manifest.processes), Clock(manifest.anchors))
        except Exception:
            log.exception("the metrics of stages lack a commit")

    def send(self, manifest: Manifest, export: Export, last: bool = False) -> None:
        """Sends the counts if it is time, or the `last` time, unless the backend refused them a while ago.

        `export` is told what the backend was confirmed, for the process that goes on after this one.
        """
        now_s = time.monotonic()
        if not manifest.started_ns or (now_s < self._next_s and not (last and not self._refused)):
            return
        self._next_s = now_s + self._reading.every_s
        try:
            now_ns = time.time_ns()
            counts = counts_of(manifest, export, now_ns)
            metrics = [*counts, *self._light.metrics(now_ns), *self._stages.metrics(now_ns)]
            if self._reading.deltas:
                if not self._taken_up:
                    self._deltas.take_up(export.counted, export.counted_ns)
                    self._taken_up = True
                metrics = self._deltas.since(metrics)
            arrived = self._exporter.export(_sent(manifest, metrics)) is MetricExportResult.SUCCESS
            if arrived and self._reading.deltas:
                self._deltas.confirm()
                export.counted, export.counted_ns = totals_of(counts), now_ns
        except Exception:
            log.exception("the OTLP exporter of metrics failed")
            arrived = False
        if not arrived:
            self._next_s = now_s + PAUSE_S
            if not self._refused:
                log.warning(
                    "metrics do not reach %s; OTEL_METRICS_EXPORTER=none turns them off where a backend takes none",
                    self._target,
                )
        self._refused = not arrived

    def shutdown(self) -> None:
        """Closes the connection."""
        self._exporter.shutdown()


def _exporter(destination: Destination) -> MetricExporter:
    """The SDK's exporter. What it would read from the environment by itself it is told, so that both signals agree."""
    check(destination)
    if destination.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcExporter

        return GrpcExporter(
            endpoint=destination.endpoint,
            insecure=not destination.secure,
            credentials=grpc_credentials(destination) if destination.secure else None,
            headers=dict(destination.headers),
            timeout=destination.timeout_s,
            compression=grpc_compression(destination),
        )
    from opentelemetry.exporter.otlp.proto.http import Compression as HttpCompression
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpExporter

    return HttpExporter(
        endpoint=destination.endpoint,
        certificate_file=destination.certificate or None,
        client_key_file=destination.client_key or None,
        client_certificate_file=destination.client_certificate or None,
        headers=dict(destination.headers),
        timeout=destination.timeout_s,
        compression=HttpCompression(destination.compression or "none"),
        session=_Session(),
    )


class _Session(requests.Session):
    """One whose own authority, the file of OTEL_EXPORTER_OTLP_CERTIFICATE, goes before REQUESTS_CA_BUNDLE."""

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        """As in requests."""
        own = self.verify if verify is None else verify
        return super().merge_environment_settings(url, proxies, stream, own, cert)
