"""The OTLP sink: spans of a session, encoded (otlp_encode.py) and sent (otlp_send.py).

What OTEL_* variables ask for is in otel_settings.py. No global tracer provider is touched, no thread is started, and
none of the SDK's span limits applies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .otlp_encode import Encoder, resource_bytes
from .otlp_send import sender
from .span_sink import BadSettings, SpanSink
from .spans import LINK_LIMIT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .otel_settings import Destination
    from .otlp_send import Sender
    from .sampling import Rules
    from .spans import Span


class OtlpSink(SpanSink):
    """Sends spans as OTLP."""

    usual = "Check that it runs, and that OTEL_EXPORTER_OTLP_PROTOCOL (grpc or http/protobuf) is the one of its port"

    def __init__(self, connection: Sender, key: bytes, link_limit: int = LINK_LIMIT, rules: Rules | None = None):
        super().__init__(connection, key, link_limit, rules)
        self._encoder = Encoder()
        self._encoded: dict[int, bytes] = {}  # resources, by their identity: the sink keeps them

    @classmethod
    def to(
        cls,
        destination: Destination,
        key: bytes,
        *,
        timeout_s: float | None = None,
        link_limit: int = LINK_LIMIT,
        rules: Rules | None = None,
    ) -> OtlpSink:
        """A sink for that destination; `timeout_s` goes before its own. Raises BadSettings."""
        try:
            return cls(sender(destination, timeout_s or destination.timeout_s), key, link_limit, rules)
        except Exception as error:
            raise BadSettings(f"no spans can be exported to {destination.target}: {error}") from error

    def encode(self, batch: Sequence[Span]) -> bytes:
        """An ExportTraceServiceRequest."""
        return self._encoder.request(batch, self._resource_bytes)

    def _resource_bytes(self, process: int | None) -> bytes:
        attributes = self._of[process]
        found = self._encoded.get(id(attributes))
        if found is None:
            found = self._encoded[id(attributes)] = resource_bytes(attributes)
        return found
