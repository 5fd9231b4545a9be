"""A real OTLP receiver on a loopback port, gRPC or HTTP: keeps what arrives, and can misbehave in many ways."""

from __future__ import annotations

import gzip
import socket
import ssl
import struct
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

if TYPE_CHECKING:
    from pathlib import Path

    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
    from opentelemetry.proto.trace.v1.trace_pb2 import Span


# What gRPC says in place of an HTTP status (OTLP specification, "OTLP/gRPC response").
_GRPC = {
    503: grpc.StatusCode.UNAVAILABLE,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    401: grpc.StatusCode.UNAUTHENTICATED,
}


_UNPACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, "gzip": gzip.decompress, "deflate": zlib.decompress}


@dataclass
class Received:
    """A span as it came over the wire, with its resource and scope."""

    span: Span
    resource: dict[str, Any]
    scope: str

    @property
    def id(self) -> tuple[bytes, bytes]:
        return self.span.trace_id, self.span.span_id

    @property
    def attributes(self) -> dict[str, Any]:
        return values(self.span.attributes)


class Receiver:
    """What both protocols have in common. Use as a context manager; `port` is known inside it."""

    protocol: str
    default_port = 0

    def __init__(self, port: int = 0, certificate: tuple[Path, Path] | None = None, clients: Path | None = None):
        """Over TLS with a certificate and its key (files); then only for clients that `clients` has signed."""
        self.port = port
        self.certificate = certificate
        self.clients = clients
        self.requests: list[ExportTraceServiceRequest] = []
        self.metrics: list[ExportMetricsServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.refuse = 0  # how many of the next requests are refused, not to be tried again
        self.refuses: Callable[[ExportTraceServiceRequest], bool] = lambda request: False  # those that always are
        self.status = 0  # an HTTP status that every request is answered with instead of being taken; 0: taken
        self.metrics_status = 0  # not 0: metrics are refused
        self.reset = False  # connections are reset in the middle of a request
        self.delay_s = 0.0  # before each answer
        self.stuck = threading.Event()  # while it is set no request is answered
        self.waits = 0  # requests that have come, answered or not

    @property
    def endpoint(self) -> str:
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}"

    def received(self) -> list[Received]:
        """All spans so far, in the order of arrival."""
        return [
            Received(span, values(group.resource.attributes), scope.scope.name)
            for request in self.requests
            for group in request.resource_spans
            for scope in group.scope_spans
            for span in scope.spans
        ]

    def counts(self) -> dict[tuple[str, ...], int]:
        """The newest value of every metric, by its name and the values of its attributes."""
        return {
            (metric.name, *sorted(values(point.attributes).values())): point.as_int
            for request in self.metrics
            for group in request.resource_metrics
            for scope in group.scope_metrics
            for metric in scope.metrics
            for point in (metric.sum if metric.HasField("sum") else metric.gauge).data_points
        }

    def take(self, body: bytes, headers: dict[str, str], path: str) -> bool:
        """Whether a request is accepted; then it is kept."""
        self.headers.append(headers)
        self.paths.append(path)
        request = ExportTraceServiceRequest.FromString(body)
        if self.refuse or self.refuses(request):
            self.refuse = max(self.refuse - 1, 0)
            return False
        self.requests.append(request)
        return True

    def wait(self) -> None:
        self.waits += 1
        self._over.wait(self.delay_s)
        while self.stuck.is_set() and not self._over.wait(0.01):
            pass

    def __enter__(self) -> Receiver:
        self._over = threading.Event()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.stop()

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError


class GrpcReceiver(Receiver):
    """With gRPC's own limit of 4 MiB a message."""

    protocol = "grpc"

    def start(self) -> None:
        receiver = self

        class Service(trace_service_pb2_grpc.TraceServiceServicer):
            def Export(self, request: ExportTraceServiceRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
                receiver.wait()
                headers = {key: str(value) for key, value in context.invocation_metadata()}
                if receiver.status:
                    context.abort(_GRPC[receiver.status], "told so by the test")
                if not receiver.take(request.SerializeToString(), headers, ""):
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused by the test")
                return ExportTraceServiceResponse()

        class Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
            def Export(self, request: ExportMetricsServiceRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
                if receiver.metrics_status:
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused by the test")
                receiver.metrics.append(request)
                return ExportMetricsServiceResponse()

        self.server = grpc.server(ThreadPoolExecutor(2))
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(Metrics(), self.server)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), self.server)
        if self.certificate:
            certificate, key = (file.read_bytes() for file in self.certificate)
            clients = self.clients.read_bytes() if self.clients else None
            credentials = grpc.ssl_server_credentials([(key, certificate)], clients, clients is not None)
            self.port = self.server.add_secure_port(f"127.0.0.1:{self.port}", credentials)
        else:
            self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        self.server.start()

    def stop(self) -> None:
        self.server.stop(0).wait()


class HttpReceiver(Receiver):
    """Protobuf over HTTP, on any path."""

    protocol = "http/protobuf"

    def start(self) -> None:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.wait()
                headers = {key.lower(): value for key, value in self.headers.items()}
                body = _UNPACK[headers.get("content-encoding", "")](body)
                if receiver.reset:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    self.connection.close()  # unread and unanswered: a reset
                    return
                if self.path.endswith("/v1/metrics"):
                    accepted = not receiver.metrics_status
                    if accepted:
                        receiver.metrics.append(ExportMetricsServiceRequest.FromString(body))
                else:
                    accepted = not receiver.status and receiver.take(body, headers, self.path)
                answer = ExportTraceServiceResponse().SerializeToString()
                try:
                    self.send_response(receiver.status or (200 if accepted else 400))
                    self.send_header("Content-Type", "application/x-protobuf")
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                except ConnectionError:
                    pass  # the exporter gave up: what the tests with `stuck` are about

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.certificate)
            if self.clients:
                context.load_verify_locations(self.clients)
                context.verify_mode = ssl.CERT_REQUIRED
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def values(attributes: Any) -> dict[str, Any]:
    """Attributes as plain Python values."""
    pairs: list[KeyValue] = list(attributes)
    assert len({pair.key for pair in pairs}) == len(pairs), "an attribute twice"
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)
