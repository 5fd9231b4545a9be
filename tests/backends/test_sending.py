"""OTLP's connections: compression, and what a wrong setting is called; with real servers (TLS: test_tls.py)."""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest
from backends.receiver import GrpcReceiver, HttpReceiver, Receiver
from backends.tables import KEY, MS, Builder
from unit.commands import commands_in, wait_for

from stagetrace.exporters.otel_settings import destination
from stagetrace.exporters.otlp import OtlpSink
from stagetrace.exporters.session import Manifest, Session
from stagetrace.exporters.span_sink import BadSettings
from stagetrace.instrument.identity import claim_identity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KINDS = [GrpcReceiver, HttpReceiver]
ANCHORED = Manifest(session="s", host="h", anchors=[(0, 10**18)])


def sent(environ: dict[str, str]) -> tuple[bool, str, bool, str]:
    """Whether one step arrived, why not, whether it never will, and what to do."""
    wanted = destination(environ)
    assert wanted is not None
    build = Builder()
    build.step(7, 1, 1 * MS, 2 * MS, decode_tokens=1)
    sink = OtlpSink.to(wanted, KEY)
    try:
        confirmed = sink.send(sink.spans(build.tables(), ANCHORED).spans)
        return confirmed, sink.why, sink.hopeless, sink.remedy
    finally:
        sink.shutdown()


def variables(receiver: Receiver, **more: str) -> dict[str, str]:
    names = {f"OTEL_EXPORTER_OTLP_{name}": value for name, value in more.items()}
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": receiver.protocol,
        **names,
    }


@pytest.mark.parametrize("how", ["gzip", "deflate", "none", "br"])
@pytest.mark.parametrize("kind", KINDS)
def test_compression(kind: type[Receiver], how: str) -> None:
    with kind() as receiver:
        if how == "br" or (how == "deflate" and kind is GrpcReceiver):
            with pytest.raises(BadSettings, match="COMPRESSION must be"):
                sent(variables(receiver, COMPRESSION=how))
            return
        confirmed, why, _, _ = sent(variables(receiver, COMPRESSION=how))
        assert confirmed, why
        assert len(receiver.received()) == 1
        if kind is HttpReceiver:
            assert receiver.headers[0].get("content-encoding", "none") == how


def test_a_wrong_protocol_is_told_and_hopeless() -> None:
    with HttpReceiver() as receiver:
        confirmed, why, hopeless, remedy = sent(variables(receiver) | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
        assert not confirmed and hopeless, why
        assert "PROTOCOL=http/protobuf" in remedy
    with GrpcReceiver() as receiver:
        confirmed, why, hopeless, remedy = sent(variables(receiver) | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"})
        assert not confirmed and hopeless, why
        assert "PROTOCOL=grpc" in remedy


@pytest.mark.parametrize(
    ("endpoint", "insecure", "secure", "address"),
    [
        ("http://a:4317", "false", False, "a:4317"),
        ("https://a:4317", "true", True, "a:4317"),
        ("a:4317", "true", False, "a:4317"),
        ("a:4317", "", True, "a:4317"),
    ],
)
def test_tls_is_by_the_scheme_and_else_by_insecure(endpoint: str, insecure: str, secure: bool, address: str) -> None:
    wanted = destination({"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_INSECURE": insecure})
    assert wanted is not None
    assert (wanted.secure, wanted.address) == (secure, address)


@pytest.mark.parametrize(
    ("protocol", "endpoint"),
    [
        *(("grpc", each) for each in ("http://a:99999", "http://", "a:port", "https://:4317")),
        *(("http/protobuf", each) for each in ("http://a:99999", "http://", "a:4318", "ftp://a:4318")),
    ],
)
def test_an_endpoint_that_is_none_is_told(protocol: str, endpoint: str) -> None:
    with pytest.raises(BadSettings, match=r"[Pp]ort|host|begins with http"):
        sent({"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol})


def test_secrets_are_not_shown() -> None:
    wanted = destination({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_EXPORTER_OTLP_HEADERS": "key=geheim"})
    assert wanted is not None and wanted.headers == {"key": "geheim"}
    assert "geheim" not in repr(wanted)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    made = Session(tmp_path / "session", claim_identity(tmp_path / "session"))
    build = Builder()
    build.step(7, 1, 1 * MS, 2 * MS, decode_tokens=1)
    for name, table in build.tables().items():
        made.write_table(name, table, 1)
    made.write_manifest(Manifest(session=made.identity.session, anchors=[(0, 10**18)], derived=1, complete=True))
    return made


@pytest.mark.parametrize(
    ("protocol", "options", "status", "says"),
    [
        ("grpc", [], 1, b"set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"),
        ("http/json", [], 2, b"must be grpc or http/protobuf"),
        ("http/protobuf", ["--to", "zipkin"], 2, b"perfetto"),
        ("http/protobuf", [], 0, b"1 spans sent"),
    ],
)
def test_export_says_what_is_wrong_and_loses_nothing(
    session: Session, tmp_path: Path, protocol: str, options: list[str], status: int, says: bytes
) -> None:
    with HttpReceiver() as receiver, commands_in(tmp_path) as commands:
        commands.environment |= variables(receiver) | {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol, "NO_PROXY": "127.0.0.1"}
        stagetrace = [sys.executable, "-m", "stagetrace.cli.main", "export", session.path]
        out, err = (running := commands.start(*stagetrace, *options)).communicate(timeout=60)
        assert running.returncode == status, err
        assert says in out + err
        assert len(receiver.received()) == (status == 0)


def test_export_gives_up_on_a_backend_that_is_not_there_when_its_patience_ends(
    session: Session, tmp_path: Path
) -> None:
    with commands_in(tmp_path) as commands:
        commands.environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
        command = [sys.executable, "-m", "stagetrace.cli.main", "export", session.path, "--patience", "0.5"]
        out, err = (running := commands.start(*command)).communicate(timeout=60)
    assert running.returncode == 1
    assert b"taken nothing for 0.5 s" in err and b"1 commits wait" in out


def test_a_second_signal_ends_an_export_that_hangs(session: Session, tmp_path: Path) -> None:
    with HttpReceiver() as receiver, commands_in(tmp_path) as commands:
        receiver.stuck.set()
        commands.environment |= variables(receiver) | {"NO_PROXY": "127.0.0.1", "OTEL_EXPORTER_OTLP_TIMEOUT": "60"}
        running = commands.start(sys.executable, "-m", "stagetrace.cli.main", "export", session.path)
        wait_for(lambda: receiver.waits)
        for _ in range(2):
            running.send_signal(signal.SIGTERM)
            time.sleep(0.5)  # two that come together are one
        out, err = running.communicate(timeout=20)
        assert running.returncode not in (0, None) and b"Traceback" not in err
        receiver.stuck.clear()
        done = commands.start(sys.executable, "-m", "stagetrace.cli.main", "export", session.path)
        out, err = done.communicate(timeout=60)
        assert done.returncode == 0 and b"1 spans sent" in out, err
