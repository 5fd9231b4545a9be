"""What OpenTelemetry's environment variables ask for: whether spans go out, where to, by which protocol. Pure.

They mean what they mean in OpenTelemetry's Python SDK. Without OTEL_EXPORTER_OTLP_TRACES_PROTOCOL and
OTEL_EXPORTER_OTLP_PROTOCOL it speaks gRPC (port 4317 of most backends); a backend's HTTP port (4318) needs
`http/protobuf`. Headers, certificates, compression and resource attributes the SDK reads from the environment itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

_SDK_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Destination:
    """Where spans go. `endpoint` is as the variable has it; for HTTP the whole URL of the traces."""

    endpoint: str
    protocol: str
    timeout: str  # of one request, in seconds, as the variable has it

    @property
    def target(self) -> str:
        """The destination in words, without credentials."""
        parts = urlsplit(self.endpoint)
        return f"{urlunsplit(parts._replace(netloc=parts.netloc.rpartition('@')[2]))} by {self.protocol}"

    @property
    def name(self) -> str:
        """A short name that is the same for the same destination."""
        return f"otlp-{blake2b(f'{self.endpoint} {self.protocol}'.encode(), digest_size=4).hexdigest()}"

    def timeout_s(self, most: float) -> float:
        """Seconds that one request may take, `most` at most. Raises ValueError for what is no number."""
        return min(float(self.timeout) if self.timeout else _SDK_TIMEOUT_S, most)


def destination(environ: Mapping[str, str]) -> Destination | None:
    """Where the variables want spans to go; None when they want none.

    They want some by OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT, unless OTEL_TRACES_EXPORTER
    names no OTLP exporter (`none`) or OTEL_SDK_DISABLED is true.
    """
    whole = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    base = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not (whole or base) or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    named = environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if not any(name.strip().startswith("otlp") for name in named.split(",")):
        return None
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    protocol = protocol.strip()
    endpoint = whole or base or ""
    if not whole and protocol == "http/protobuf":  # the general endpoint is a base, this one is whole
        endpoint = endpoint.rstrip("/") + "/v1/traces"
    asked = environ.get("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT") or environ.get("OTEL_EXPORTER_OTLP_TIMEOUT") or ""
    return Destination(endpoint, protocol, asked)
