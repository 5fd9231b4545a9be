"""The OTLP sink: makes spans of a session's tables and sends them by the OpenTelemetry SDK's own exporters.

What OTEL_* variables ask for is in otel_settings.py. No global tracer provider is touched, no thread is started, and
none of the SDK's span limits applies. When to send what, and again, is the follower's business (follow.py).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from .gather import Gather
from .session import names_of
from .spans import LINK_LIMIT, Clock, Source, Spans, model_of, resource_attributes, rows_of, spans_of_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pyarrow as pa
    from opentelemetry.sdk.trace import ReadableSpan

    from .otel_settings import Destination
    from .session import Manifest

log = logging.getLogger(__name__)

# A request to the backend stays under gRPC's usual 4 MiB: a span takes about 1 KiB, a link about 60 bytes.
BATCH_SPANS = 512
BATCH_LINKS = 16384

_SDK_LOG = logging.getLogger("opentelemetry.exporter")
_LONGEST_WHY = 300
REQUEST_S = 3.0  # that one request may take, the SDK's own retries included


class BadSettings(Exception):
    """The OTEL_* variables cannot be followed; the message says which and why."""


class _LastWords(logging.Handler):
    """Keeps what the SDK's exporters log, so that one line can say why instead of one for each attempt."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.words = ""

    def emit(self, record: logging.LogRecord) -> None:
        words = record.getMessage()
        if not (self.words and "max retries" in words):  # that says less than what came before it
            self.words = words[:_LONGEST_WHY]


class OtlpSink:
    """Makes spans and sends them. Used by one thread; while it is open, what the SDK's exporters log comes here."""

    def __init__(self, exporter: SpanExporter, key: bytes, link_limit: int = LINK_LIMIT):
        self._exporter = exporter
        self._key = key
        self._link_limit = link_limit
        self._gather = Gather()
        self._closed = False
        self._said = _LastWords()
        _SDK_LOG.addHandler(self._said)
        _SDK_LOG.propagate = False
        self._resources: dict[tuple[tuple[str, str | int], ...], Resource] = {}

    @classmethod
    def to(
        cls, destination: Destination, key: bytes, *, timeout_s: float = REQUEST_S, link_limit: int = LINK_LIMIT
    ) -> OtlpSink:
        """A sink for that destination; `key` is the session's (Identity.key). Raises BadSettings."""
        try:
            return cls(_exporter(destination, timeout_s), key, link_limit)
        except Exception as error:
            raise BadSettings(f"no spans can be exported to {destination.target}: {error}") from error

    def spans(self, tables: Mapping[str, pa.Table], manifest: Manifest) -> Spans:
        """The spans of these tables (by name, as in session.TABLES), and what became none.

        A step comes with its segments in one call; the states and members of a request come with its row or earlier.
        Raises ValueError when the manifest has no clock anchor.
        """
        rows, left_out = self._gather.add(rows_of(tables))
        made = spans_of_rows(rows, self._source(manifest), self._link_limit)
        return Spans(made.spans, made.left_out + left_out)

    def remember(self, tables: Mapping[str, pa.Table]) -> None:
        """Takes in tables whose spans the backend has: states of requests that are not over are still to come."""
        self._gather.add(rows_of(tables))

    def send(self, batch: Sequence[ReadableSpan]) -> bool:
        """Sends one request with these spans (see `batches`). Whether the backend confirmed it; never raises."""
        if self._closed:
            return False
        self._said.words = ""
        try:
            return self._exporter.export(batch) is SpanExportResult.SUCCESS
        except Exception:
            log.exception("the OTLP exporter failed")
            return False

    def shutdown(self) -> None:
        """Closes the connection; nothing is sent afterwards. Can be called again."""
        if not self._closed:
            self._closed = True
            self._exporter.shutdown()
            _SDK_LOG.removeHandler(self._said)
            _SDK_LOG.propagate = True

    @property
    def why(self) -> str:
        """Why the last request was not confirmed, in the SDK's words; empty when it said nothing."""
        return self._said.words

    def _source(self, manifest: Manifest) -> Source:
        return Source(
            self._key,
            Clock(manifest.anchors),
            self._resource(resource_attributes(manifest)),
            {process.key: self._resource(resource_attributes(manifest, process)) for process in manifest.processes},
            model_of(manifest),
            names_of(manifest.processes),
        )

    def _resource(self, attributes: dict[str, str | int]) -> Resource:
        """The resource with these attributes; OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME go before them."""
        which = tuple(attributes.items())
        if which not in self._resources:
            self._resources[which] = Resource.create({**attributes, **OTELResourceDetector().detect().attributes})
        return self._resources[which]


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


def _exporter(destination: Destination, timeout_s: float) -> SpanExporter:
    """Raises ValueError for a protocol that there is none for, and whatever the SDK raises for its variables."""
    timeout = destination.timeout_s(timeout_s)
    if destination.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint=destination.endpoint, timeout=timeout)
    if destination.protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter(endpoint=destination.endpoint, timeout=timeout)
    raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL must be grpc or http/protobuf, not {destination.protocol}")
