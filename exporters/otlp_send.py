"""Sends OTLP bytes by gRPC or HTTP: thin, over grpc and requests.

The OpenTelemetry SDK's exporters take its own span objects alone, and have no public way to hand them bytes; so the
connection is made here as they make it, from the settings that otel_settings.py reads with the SDK's own parser of
headers. They also try again by themselves; here that is the follower's business (follow.py).
"""

from __future__ import annotations

import gzip
import logging
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import grpc
import requests

from .remedies import remedy
from .tls import check_files

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
    remedy: str = ""  # what is the matter then, and what to change, where that is known


class Sender(Protocol):
    """A connection to one backend. Used by one thread; `send` never raises."""

    def send(self, body: bytes) -> Answer:
        """Sends one ExportTraceServiceRequest and waits for the answer, no longer than the timeout."""

    def close(self) -> None:
        """Closes the connection."""


def sender(destination: Destination, timeout_s: float) -> Sender:
    """The sender for a destination. Raises ValueError for settings that cannot be followed."""
    check(destination)
    return (GrpcSender if destination.protocol == "grpc" else HttpSender)(destination, timeout_s)


def check(destination: Destination) -> None:
    """Raises ValueError for settings that cannot be followed: it names the variable and what it can be."""
    if destination.protocol not in ("grpc", "http/protobuf"):
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL must be grpc or http/protobuf, not {destination.protocol}")
    kinds = ("gzip", "none") if destination.protocol == "grpc" else tuple(_COMPRESS)
    if destination.compression not in ("", *kinds):
        known = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
        raise ValueError(f"OTEL_EXPORTER_OTLP_COMPRESSION must be {known}, not {destination.compression}")
    if destination.protocol == "http/protobuf" and not destination.endpoint.startswith(("http://", "https://")):
        raise ValueError("an endpoint of http/protobuf begins with http:// or https://")
    destination.host_and_port()
    check_files(destination)


class GrpcSender:
    """OTLP by gRPC."""

    def __init__(self, destination: Destination, timeout_s: float):
        compression = grpc_compression(destination)
        target = destination.address
        if destination.secure:
            credentials = grpc_credentials(destination)
            self._channel = grpc.secure_channel(target, credentials, options=_CHANNEL, compression=compression)
        else:
            self._channel = grpc.insecure_channel(target, options=_CHANNEL, compression=compression)
        self._destination = destination
        self._timeout_s = timeout_s
        self._metadata = tuple(destination.headers.items())
        self._call = self._channel.unary_unary(_TRACES)  # no serializer: bytes as they are

    def send(self, body: bytes) -> Answer:
        """As Sender.send."""
        try:
            self._call(body, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            return _failed(f"{error.code().name}: {error.details() or ''}", self._destination)
        except ValueError as error:  # a header that gRPC does not send, a channel that is closed
            return Answer(False, str(error), True)
        return Answer(True)

    def close(self) -> None:
        """As Sender.close."""
        self._channel.close()


def grpc_compression(destination: Destination) -> grpc.Compression:
    """The compression as gRPC names it."""
    return grpc.Compression.Gzip if destination.compression == "gzip" else grpc.Compression.NoCompression


def grpc_credentials(destination: Destination) -> grpc.ChannelCredentials:
    """The files of TLS as gRPC takes them. A client's certificate and its key may be in one file."""
    root, key, chain = (
        Path(name).read_bytes() if name else None
        for name in (
            destination.certificate,
            destination.client_key or destination.client_certificate,
            destination.client_certificate,
        )
    )
    return grpc.ssl_channel_credentials(root, key, chain)


def _failed(why: str, destination: Destination) -> Answer:
    found = remedy(why, destination)
    return Answer(False, why[:_LONGEST_WHY], bool(found), found)


_COMPRESS = {"gzip": gzip.compress, "deflate": zlib.compress, "none": None}


def reason(error: requests.RequestException) -> str:
    """What went wrong with a connection, without the URL and what was tried."""
    below = error.args[0] if error.args else error
    return str(getattr(below, "reason", None) or error)


class HttpSender:
    """OTLP by HTTP with protobuf bodies."""

    def __init__(self, destination: Destination, timeout_s: float):
        self._destination = destination
        self._url = destination.endpoint
        self._timeout_s = timeout_s
        self._compress = _COMPRESS.get(destination.compression)
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
        except requests.exceptions.Timeout:
            return Answer(False, f"no answer within {self._timeout_s:g} s")
        except requests.exceptions.ConnectionError as error:  # those of TLS among them
            return _failed(reason(error), self._destination)
        except (requests.RequestException, OSError, ValueError) as error:
            return Answer(False, str(error)[:_LONGEST_WHY], True)
        if answer.ok and not answer.is_redirect:
            return Answer(True)
        said = next(
            (line.strip()[:_LONGEST_WHY] for line in answer.text.splitlines() if line.strip().isprintable()), ""
        )
        why = f"it answers {answer.status_code} {answer.reason}" + (f": {said}" if said else "")
        found = _failed(why, self._destination)
        return replace(found, hopeless=found.hopeless or answer.is_redirect)

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
