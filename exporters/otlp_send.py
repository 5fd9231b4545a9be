"""Sends OTLP bytes by gRPC or HTTP: thin, over grpc and requests.

The OpenTelemetry SDK's exporters take its own span objects alone, and have no public way to hand them bytes; so the
connection is made here as they make it, from the settings that otel_settings.py reads with the SDK's own parser of
headers. They also try again by themselves; here that is the follower's business (follow.py).
"""

from __future__ import annotations

import gzip
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import grpc
import requests

if TYPE_CHECKING:
    from .otel_settings import Destination

_TRACES = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_USER_AGENT = "stagetrace-OTLP-exporter"
_LONGEST_WHY = 300

# So that a backend that was away is noticed soon: by default gRPC waits up to two minutes between connections.
_CHANNEL = (
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.primary_user_agent", _USER_AGENT),
)


@dataclass(frozen=True)
class Answer:
    """What became of one request."""

    confirmed: bool
    why: str = ""  # it was not
    hopeless: bool = False  # it will not be until somebody changes a setting


class Sender(Protocol):
    """A connection to one backend. Used by one thread; `send` never raises."""

    def send(self, body: bytes) -> Answer:
        """Sends one ExportTraceServiceRequest and waits for the answer, no longer than the timeout."""

    def close(self) -> None:
        """Closes the connection."""


def sender(destination: Destination, timeout_s: float) -> Sender:
    """The sender for a destination. Raises ValueError or OSError for settings that cannot be followed."""
    if destination.protocol == "grpc":
        return GrpcSender(destination, timeout_s)
    if destination.protocol == "http/protobuf":
        return HttpSender(destination, timeout_s)
    raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL must be grpc or http/protobuf, not {destination.protocol}")


class GrpcSender:
    """OTLP by gRPC."""

    def __init__(self, destination: Destination, timeout_s: float):
        kinds = {"": grpc.Compression.NoCompression, "none": grpc.Compression.NoCompression,
                 "gzip": grpc.Compression.Gzip}  # fmt: skip
        if destination.compression not in kinds:
            raise ValueError(f"OTEL_EXPORTER_OTLP_COMPRESSION must be gzip or none, not {destination.compression}")
        compression = kinds[destination.compression]
        target = destination.address
        if destination.secure:
            root, key, chain = (
                Path(name).read_bytes() if name else None
                for name in (destination.certificate, destination.client_key, destination.client_certificate)
            )
            credentials = grpc.ssl_channel_credentials(root, key, chain)
            self._channel = grpc.secure_channel(target, credentials, options=_CHANNEL, compression=compression)
        else:
            self._channel = grpc.insecure_channel(target, options=_CHANNEL, compression=compression)
        self._timeout_s = timeout_s
        self._metadata = tuple(destination.headers.items())
        self._call = self._channel.unary_unary(_TRACES)  # no serializer: bytes as they are

    def send(self, body: bytes) -> Answer:
        """As Sender.send."""
        try:
            self._call(body, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            details = (error.details() or "")[:_LONGEST_WHY]
            return Answer(False, f"{error.code().name}: {details}", _hopeless_grpc(error.code(), details))
        except ValueError as error:  # a header that gRPC does not send, a channel that is closed
            return Answer(False, str(error), True)
        return Answer(True)

    def close(self) -> None:
        """As Sender.close."""
        self._channel.close()


def _hopeless_grpc(code: grpc.StatusCode, details: str) -> bool:
    if code is grpc.StatusCode.UNAVAILABLE:  # also what is no gRPC, or no TLS, at the other end
        signs = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "Failed parsing HTTP/2", "http1.x server")
        return any(sign in details for sign in signs)
    return code in (
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
    )


class HttpSender:
    """OTLP by HTTP with protobuf bodies."""

    def __init__(self, destination: Destination, timeout_s: float):
        kinds = {"": None, "none": None, "gzip": gzip.compress, "deflate": zlib.compress}
        if destination.compression not in kinds:
            raise ValueError(
                f"OTEL_EXPORTER_OTLP_COMPRESSION must be gzip, deflate or none, not {destination.compression}"
            )
        if not destination.endpoint.startswith(("http://", "https://")):
            raise ValueError(f"{destination.target}: an endpoint of http/protobuf begins with http:// or https://")
        for name in (destination.certificate, destination.client_key, destination.client_certificate):
            if name:
                Path(name).read_bytes()
        self._url = destination.endpoint
        self._timeout_s = timeout_s
        self._compress = kinds[destination.compression]
        # Given with each request: on a session REQUESTS_CA_BUNDLE would go before it.
        self._verify: str | None = destination.certificate or None
        self._cert = (destination.client_certificate, destination.client_key)
        self._session = requests.Session()
        self._session.headers.update({"User-Agent": _USER_AGENT, "Content-Type": "application/x-protobuf"})
        if self._compress:
            self._session.headers["Content-Encoding"] = destination.compression
        self._session.headers.update(destination.headers)
        # urllib3 warns of every attempt that fails; the answer says it.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)

    def send(self, body: bytes) -> Answer:
        """As Sender.send."""
        if self._compress:
            body = self._compress(body)
        try:
            answer = self._post(body)
        except requests.exceptions.SSLError as error:
            return Answer(False, str(error)[:_LONGEST_WHY], True)
        except requests.exceptions.Timeout:
            return Answer(False, f"no answer within {self._timeout_s:g} s")
        except requests.exceptions.ConnectionError as error:
            # What a gRPC server says to a client that speaks HTTP/1.1.
            return Answer(False, str(error)[:_LONGEST_WHY], "BadStatusLine" in str(error))
        except (requests.RequestException, OSError, ValueError) as error:
            return Answer(False, str(error)[:_LONGEST_WHY], True)
        if answer.ok and not answer.is_redirect:
            return Answer(True)
        said = next(
            (line.strip()[:_LONGEST_WHY] for line in answer.text.splitlines() if line.strip().isprintable()), ""
        )
        why = f"it answers {answer.status_code} {answer.reason}" + (f": {said}" if said else "")
        return Answer(False, why, answer.status_code in _HOPELESS or answer.is_redirect)

    def _post(self, body: bytes) -> requests.Response:
        """Once more where the backend has closed a connection that was kept open."""
        for again in (True, False):
            try:
                return self._session.post(
                    self._url,
                    data=body,
                    timeout=self._timeout_s,
                    verify=self._verify,
                    cert=self._cert if all(self._cert) else self._cert[0] or None,
                    allow_redirects=False,
                )
            except (requests.exceptions.SSLError, requests.exceptions.Timeout):
                raise
            except requests.exceptions.ConnectionError:
                if not again:
                    raise
        raise AssertionError

    def close(self) -> None:
        """As Sender.close."""
        self._session.close()


_HOPELESS = (401, 403, 404, 405, 415, 501)
