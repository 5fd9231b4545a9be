"""rotel, a real collector written in Rust: takes the sessions of real engines by gRPC and by HTTP, and relays them."""

from __future__ import annotations

import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import requests
import rotel
from backends.exported import export_otlp
from backends.receiver import HttpReceiver, Receiver
from unit.commands import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stagetrace.exporters.session import Session

AGENT = Path(rotel.__file__).with_name("rotel-agent")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def whole(receiver: Receiver) -> list[tuple[bytes, dict[str, object], str]]:
    """Every span that arrived, to the byte, with its resource and scope; sorted."""
    return sorted(
        ((item.span.SerializeToString(deterministic=True), item.resource, item.scope) for item in receiver.received()),
        key=lambda each: each[0],
    )


@contextmanager
def agent(log: Path, **options: str) -> Iterator[dict[str, str]]:
    """The endpoints of a running rotel by protocol; `options` are those of its exporter."""
    grpc, http = free_ports(2)
    given = {
        "otlp-grpc-endpoint": f"127.0.0.1:{grpc}",
        "otlp-http-endpoint": f"127.0.0.1:{http}",
        "batch-timeout": "50ms",
        **{name.replace("_", "-"): value for name, value in options.items()},
    }
    arguments = [word for name, value in given.items() for word in (f"--{name}", value)]
    with open(log, "wb") as output:
        process = subprocess.Popen([AGENT, "start", *arguments], stdout=output, stderr=output)

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return requests.post(f"http://127.0.0.1:{http}/v1/traces", timeout=1).status_code > 0
        except requests.ConnectionError:
            return False

    try:
        wait_for(is_ready)
        yield {"grpc": f"http://127.0.0.1:{grpc}", "http/protobuf": f"http://127.0.0.1:{http}"}
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HttpReceiver, dict[str, str]]]:
    """A rotel that relays to a receiver of ours, which comes with it; the endpoints of rotel by protocol."""
    log = tmp_path_factory.mktemp("rotel") / "log"
    with (
        HttpReceiver() as receiver,
        agent(
            log, exporter="otlp", otlp_exporter_endpoint=receiver.endpoint, otlp_exporter_protocol="http"
        ) as endpoints,
    ):
        yield receiver, endpoints


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_what_rotel_relays_is_what_was_sent(
    relay: tuple[HttpReceiver, dict[str, str]], recording: Session, protocol: str, compression: str
) -> None:
    receiver, endpoints = relay
    receiver.requests.clear()
    variables = {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol, "OTEL_EXPORTER_OTLP_COMPRESSION": compression}
    spans = export_otlp(recording, {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoints[protocol], **variables})
    wait_for(lambda: len(receiver.received()) == len(spans))
    with HttpReceiver() as direct:
        export_otlp(
            recording,
            {"OTEL_EXPORTER_OTLP_ENDPOINT": direct.endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": direct.protocol},
        )
        assert whole(receiver) == whole(direct)
