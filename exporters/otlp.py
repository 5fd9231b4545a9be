"""The OTLP sink: sends a session's spans to a trace backend by the OpenTelemetry SDK's own exporters.

OTEL_* variables mean what they mean in OpenTelemetry's Python SDK. Without OTEL_EXPORTER_OTLP_TRACES_PROTOCOL and
OTEL_EXPORTER_OTLP_PROTOCOL it therefore speaks gRPC (port 4317 of most backends); a backend's HTTP port (4318) needs
`http/protobuf`. No global tracer provider is touched, no thread is started, and none of the SDK's span limits applies.

What a backend does not take in time is dropped and counted: nothing is stored for a later attempt (yet).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from stagetrace.exporters.gather import Gather
from stagetrace.exporters.spans import (
    LINK_LIMIT,
    Clock,
    Source,
    model_of,
    resource_attributes,
    rows_of,
    spans_of_rows,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pyarrow as pa
    from opentelemetry.sdk.trace import ReadableSpan

    from stagetrace.exporters.session import Manifest

log = logging.getLogger(__name__)

# A request to the backend stays under gRPC's usual 4 MiB: a span takes about 1 KiB, a link about 60 bytes.
BATCH_SPANS = 512
BATCH_LINKS = 16384

_SDK_TIMEOUT_S = 10.0
_PAUSE_S = (1.0, 30.0)  # after a call of which nothing arrived: the first pause, doubled up to the second


@dataclass(frozen=True)
class ExportResult:
    """What became of one call's rows."""

    sent: int = 0  # spans that the backend confirmed
    failed: int = 0  # spans that it did not; rows, where no spans could be made of them
    left_out: dict[str, int] = field(default_factory=dict)  # rows that become no spans, by reason


class OtlpSink:
    """Exports tables as spans. Used by one thread."""

    def __init__(self, exporter: SpanExporter, key: bytes, *, timeout_s: float, link_limit: int, target: str):
        self._exporter = exporter
        self._key = key
        self._timeout_s = timeout_s
        self._link_limit = link_limit
        self._target = target
        self._gather = Gather()
        self._closed = False
        self._pause_s = 0.0
        self._resume_at = 0.0
        self._resources: dict[tuple[tuple[str, str | int], ...], Resource] = {}

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str], key: bytes, *, timeout_s: float = 3.0, link_limit: int = LINK_LIMIT
    ) -> OtlpSink | None:
        """The sink that the OTEL_* variables ask for; None when they ask for none, or (logged) cannot be followed.

        They ask for it by OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT, unless
        OTEL_TRACES_EXPORTER names no OTLP exporter (`none`) or OTEL_SDK_DISABLED is true. `environ` is the process's
        environment: headers, certificates, compression and resource attributes the SDK reads from os.environ itself.
        `key` is the session's (Identity.key). `timeout_s`: see `export`.
        """
        endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        if not endpoint or not _wanted(environ):
            return None
        protocol = (
            environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
        ).strip()
        try:
            exporter = _exporter(environ, endpoint, protocol, timeout_s)
        except Exception as error:  # a mistake in a variable is no reason to stop recording
            log.error("no spans are exported to %s by %s: %s", endpoint, protocol, error)
            return None
        return cls(exporter, key, timeout_s=timeout_s, link_limit=link_limit, target=f"{endpoint} by {protocol}")

    def export(self, tables: Mapping[str, pa.Table], manifest: Manifest) -> ExportResult:
        """Sends the spans of these tables (by name, as in session.TABLES).

        A step comes with its segments in one call; the states and members of a request come with its row or earlier.
        Never raises: what fails is logged and counted. No request is begun after `timeout_s` seconds, and the SDK gives
        each as long at most, its retries included, so that a call takes about twice that at worst; what is left then
        has failed. After a call of which nothing arrived the backend is left alone for a while, from 1 s up to 30 s:
        what comes meanwhile fails at once.
        """
        try:
            rows, left_out = self._gather.add(rows_of(tables))
            made = spans_of_rows(rows, self._source(manifest), self._link_limit)
        except Exception:
            log.exception("spans could not be made of a part of the session; they are missing in the trace backend")
            return ExportResult(failed=sum(tables[name].num_rows for name in _COUNTED if name in tables))
        sent = self._send(made.spans) if made.spans else 0
        return ExportResult(sent, len(made.spans) - sent, dict(made.left_out + left_out))

    def shutdown(self) -> None:
        """Closes the connection; what is exported afterwards fails. Can be called again."""
        if not self._closed:
            self._closed = True
            self._exporter.shutdown()

    def _send(self, spans: Sequence[ReadableSpan]) -> int:
        begin = time.monotonic()
        if self._closed or begin < self._resume_at:
            return 0
        sent = 0
        for batch in batches(spans):
            if time.monotonic() - begin >= self._timeout_s:
                break
            if self._send_batch(batch):
                sent += len(batch)
        self._judge(sent, len(spans))
        return sent

    def _send_batch(self, batch: Sequence[ReadableSpan]) -> bool:
        try:
            return self._exporter.export(batch) is SpanExportResult.SUCCESS
        except Exception:
            log.exception("the OTLP exporter failed")
            return False

    def _judge(self, sent: int, total: int) -> None:
        """Pauses after a call of which nothing arrived; says so once, and when the backend is back."""
        if sent:
            if self._pause_s:
                log.warning("spans arrive at %s again", self._target)
            self._pause_s = 0.0
        else:
            if not self._pause_s:
                log.warning(
                    "%d spans did not reach %s and are dropped, as are others until it answers: check that it runs,"
                    " and that OTEL_EXPORTER_OTLP_PROTOCOL (grpc or http/protobuf) is the one of this port",
                    total,
                    self._target,
                )
            first, longest = _PAUSE_S
            self._pause_s = min(max(self._pause_s * 2, first), longest)
            self._resume_at = time.monotonic() + self._pause_s

    def _source(self, manifest: Manifest) -> Source:
        return Source(
            self._key,
            Clock(manifest.anchors),
            self._resource(resource_attributes(manifest)),
            {process.key: self._resource(resource_attributes(manifest, process)) for process in manifest.processes},
            model_of(manifest),
        )

    def _resource(self, attributes: dict[str, str | int]) -> Resource:
        """The resource with these attributes; OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME go before them."""
        which = tuple(attributes.items())
        if which not in self._resources:
            self._resources[which] = Resource.create({**attributes, **OTELResourceDetector().detect().attributes})
        return self._resources[which]


_COUNTED = ("requests", "states", "steps", "segments")


def batches(spans: Sequence[ReadableSpan]) -> Iterator[Sequence[ReadableSpan]]:
    """The spans in their order, in lists of at most BATCH_SPANS, and BATCH_LINKS where more than one span is in it."""
    begin = links = 0
    for at, span in enumerate(spans):
        own = len(span.links)
        if at > begin and (at - begin == BATCH_SPANS or links + own > BATCH_LINKS):
            yield spans[begin:at]
            begin, links = at, 0
        links += own
    if begin < len(spans):
        yield spans[begin:]


def _wanted(environ: Mapping[str, str]) -> bool:
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    named = environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    return any(name.strip().startswith("otlp") for name in named.split(","))


def _exporter(environ: Mapping[str, str], endpoint: str, protocol: str, timeout_s: float) -> SpanExporter:
    """Raises ValueError for a protocol that there is none for, and whatever the SDK raises for its variables."""
    asked = environ.get("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT") or environ.get("OTEL_EXPORTER_OTLP_TIMEOUT")
    timeout = min(float(asked) if asked else _SDK_TIMEOUT_S, timeout_s)
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint=endpoint, timeout=timeout)
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        if not environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):  # the general endpoint is a base, this one is whole
            endpoint = endpoint.rstrip("/") + "/v1/traces"
        return HttpExporter(endpoint=endpoint, timeout=timeout)
    raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL must be grpc or http/protobuf, not {protocol}")
