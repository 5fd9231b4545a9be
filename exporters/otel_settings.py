"""What OpenTelemetry's environment variables ask for: whether spans and metrics go out, where to, how. Pure.

They mean what they mean in OpenTelemetry's Python SDK. Without OTEL_EXPORTER_OTLP_PROTOCOL, or that of the signal
(OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, OTEL_EXPORTER_OTLP_METRICS_PROTOCOL), it speaks gRPC (port 4317 of most backends);
a backend's HTTP port (4318) needs `http/protobuf`. The timeout is in seconds, as in that SDK; 10 where none is given.
Resource attributes the SDK reads from the environment itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from opentelemetry.util.re import parse_env_headers

if TYPE_CHECKING:
    from collections.abc import Mapping

_TIMEOUT_S = 10.0  # where none is given
MOST_TIMEOUT_S = 60.0  # else one who thinks of milliseconds, as the specification does, waits for hours
EVERY_S = 10.0  # between metrics, where no interval is given


@dataclass(frozen=True)
class Destination:
    """Where one signal goes. `endpoint` is as the variable has it; for HTTP the whole URL of the signal."""

    endpoint: str
    protocol: str
    timeout: str  # of one request, in seconds, as the variable has it
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # may have credentials
    compression: str = ""
    insecure: bool = False  # for an endpoint that does not say by http:// or https://
    certificate: str = ""  # file of those that sign the backend's
    client_key: str = ""
    client_certificate: str = ""

    @property
    def target(self) -> str:
        """The destination in words, without credentials."""
        parts = urlsplit(self.endpoint)
        return f"{urlunsplit(parts._replace(netloc=parts.netloc.rpartition('@')[2]))} by {self.protocol}"

    @property
    def secure(self) -> bool:
        """Whether TLS is spoken."""
        scheme = urlsplit(self.endpoint).scheme if "://" in self.endpoint else ""
        return scheme == "https" or (scheme not in ("http", "unix", "dns") and not self.insecure)

    @property
    def address(self) -> str:
        """Host and port, as gRPC wants them."""
        return urlsplit(self.endpoint).netloc or self.endpoint

    def host_and_port(self) -> tuple[str, int]:
        """Where connections go, by the usual port where none is given. Raises ValueError for what is neither."""
        if self.endpoint.startswith(("unix:", "dns:")):  # gRPC's own names
            return "", 0
        parts = urlsplit(self.endpoint if "://" in self.endpoint else f"//{self.endpoint}")
        try:
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{error} in {self.target}") from error
        if not parts.hostname:
            raise ValueError(f"{self.target} names no host: http://127.0.0.1:4317 is an endpoint")
        return parts.hostname, port or (4317 if self.protocol == "grpc" else 443 if self.secure else 80)

    @property
    def name(self) -> str:
        """A short name that is the same for the same destination."""
        return f"otlp-{blake2b(f'{self.endpoint} {self.protocol}'.encode(), digest_size=4).hexdigest()}"

    @property
    def timeout_s(self) -> float:
        """Seconds that one request may take, MOST_TIMEOUT_S at most. Raises ValueError for what is no such number."""
        try:
            seconds = float(self.timeout) if self.timeout else _TIMEOUT_S
        except ValueError:
            seconds = 0.0
        if not seconds > 0:
            raise ValueError(f"OTEL_EXPORTER_OTLP_TIMEOUT: {self.timeout} is no number of seconds")
        return min(seconds, MOST_TIMEOUT_S)


def destination(environ: Mapping[str, str], signal: str = "traces") -> Destination | None:
    """Where the variables want a signal, `traces` or `metrics`, to go; None when they want none.

    They want it by OTEL_EXPORTER_OTLP_<SIGNAL>_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT, unless OTEL_<SIGNAL>_EXPORTER
    names no OTLP exporter (`none`) or OTEL_SDK_DISABLED is true.
    """

    def setting(name: str) -> str:
        own = environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}")
        return (own or environ.get(f"OTEL_EXPORTER_OTLP_{name}") or "").strip()

    endpoint = setting("ENDPOINT")
    if not endpoint or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    named = environ.get(f"OTEL_{signal.upper()}_EXPORTER") or "otlp"
    if not any(name.strip().startswith("otlp") for name in named.split(",")):
        return None
    protocol = setting("PROTOCOL") or "grpc"
    base = not environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT")  # the signal's own is whole
    if base and protocol == "http/protobuf":
        endpoint = f"{endpoint.rstrip('/')}/v1/{signal}"
    return Destination(
        endpoint,
        protocol,
        setting("TIMEOUT"),
        parse_env_headers(setting("HEADERS"), liberal=True),
        setting("COMPRESSION").lower(),
        setting("INSECURE").lower() == "true",
        setting("CERTIFICATE"),
        setting("CLIENT_KEY"),
        setting("CLIENT_CERTIFICATE"),
    )


@dataclass(frozen=True)
class Reading:
    """How metrics are to be sent."""

    every_s: float = EVERY_S
    deltas: bool = False  # what was added since the last, instead of totals


def reading(environ: Mapping[str, str]) -> Reading:
    """What OTEL_METRIC_EXPORT_INTERVAL and OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE ask for.

    Raises ValueError for what they cannot mean.
    """
    interval = environ.get("OTEL_METRIC_EXPORT_INTERVAL", "").strip()
    if interval and not (interval.isdecimal() and int(interval)):
        raise ValueError(f"OTEL_METRIC_EXPORT_INTERVAL: {interval} is no number of milliseconds")
    preference = environ.get("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "").strip().lower() or "cumulative"
    if preference not in ("cumulative", "delta", "lowmemory"):
        raise ValueError(
            "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE must be cumulative, delta or lowmemory,"
            f" not {preference}"
        )
    return Reading(int(interval) / 1000 if interval else EVERY_S, preference != "cumulative")


def scrape_address(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Host and port that OTEL_EXPORTER_PROMETHEUS_HOST and _PORT ask for, where OTEL_METRICS_EXPORTER names prometheus.

    Raises ValueError for a port that is none.
    """
    named = environ.get("OTEL_METRICS_EXPORTER", "")
    if "prometheus" not in [name.strip() for name in named.split(",")]:
        return None
    port = environ.get("OTEL_EXPORTER_PROMETHEUS_PORT") or "9464"
    if not port.isdecimal() or not 0 <= int(port) < 65536:
        raise ValueError(f"OTEL_EXPORTER_PROMETHEUS_PORT: {port} is no port")
    return environ.get("OTEL_EXPORTER_PROMETHEUS_HOST") or "127.0.0.1", int(port)
