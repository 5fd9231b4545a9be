"""OTLP over TLS, with certificates of the server's and of the client's: what arrives, and what each mistake is called.

Receivers are real servers on loopback; an authority made for the tests has signed their certificates.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from backends.authority import Authority
from backends.receiver import GrpcReceiver, HttpReceiver, Receiver
from backends.tables import KEY, MS, Builder
from unit.commands import commands_in

from stagetrace.exporters.metrics import MetricsSink
from stagetrace.exporters.otel_settings import destination
from stagetrace.exporters.otlp import OtlpSink
from stagetrace.exporters.session import Export, Manifest, Session
from stagetrace.exporters.span_sink import BadSettings
from stagetrace.instrument.identity import claim_identity

if TYPE_CHECKING:
    from pathlib import Path

KINDS = [GrpcReceiver, HttpReceiver]
Pair = tuple["Path", "Path"]


@dataclass(frozen=True)
class Files:
    """Certificates with their keys, and who signed them."""

    authority: Path
    server: Pair
    elsewhere: Pair  # of another host
    client: Pair
    another_authority: Path
    stranger: Pair  # a client that the other has signed


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tls")
    authority, another = Authority(folder / "authority"), Authority(folder / "another")
    return Files(
        authority.certificate,
        authority.sign("server", "IP:127.0.0.1"),
        authority.sign("elsewhere", "DNS:elsewhere.test"),
        authority.sign("client", "DNS:client"),
        another.certificate,
        another.sign("stranger", "DNS:stranger"),
    )


def variables(
    receiver: Receiver, authority: Path | None, client: Pair | None = None, signal: str = "", scheme: str = "https"
) -> dict[str, str]:
    """The endpoint for all signals; the files for all, or for one (`TRACES_`)."""
    given = {"CERTIFICATE": authority}
    if client:
        given |= {"CLIENT_CERTIFICATE": client[0], "CLIENT_KEY": client[1]}
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"{scheme}://127.0.0.1:{receiver.port}",
        "OTEL_EXPORTER_OTLP_PROTOCOL": receiver.protocol,
        **{f"OTEL_EXPORTER_OTLP_{signal}{name}": str(path) for name, path in given.items() if path},
    }


def sink_for(environ: dict[str, str]) -> OtlpSink:
    wanted = destination(environ)
    assert wanted is not None
    return OtlpSink.to(wanted, KEY)


def sent(environ: dict[str, str]) -> tuple[bool, str]:
    """Whether one step was taken, and if not what there is to do; empty where there is hope."""
    build = Builder()
    build.step(7, 1, 1 * MS, 2 * MS, decode_tokens=1)
    sink = sink_for(environ)
    try:
        taken = sink.send(sink.spans(build.tables(), Manifest(session="s", host="h", anchors=[(0, 10**18)])).spans)
        assert sink.hopeless == bool(sink.remedy), sink.why
        return taken, sink.remedy
    finally:
        sink.shutdown()


@pytest.mark.parametrize("kind", KINDS)
def test_the_variable_of_the_authority_goes_before_those_of_the_library(
    kind: type[Receiver], files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(files.another_authority))
    with kind(certificate=files.server) as receiver:
        assert sent(variables(receiver, files.authority)) == (True, "")


@pytest.mark.parametrize("signal", ["", "TRACES_"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_client_with_a_certificate_is_let_in(kind: type[Receiver], files: Files, signal: str, tmp_path: Path) -> None:
    with kind(certificate=files.server, clients=files.authority) as receiver:
        assert sent(variables(receiver, files.authority, files.client, signal)) == (True, "")
        both = tmp_path / "both.pem"
        both.write_bytes(b"".join(path.read_bytes() for path in files.client))
        environ = variables(receiver, files.authority) | {"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(both)}
        assert sent(environ) == (True, "")
        assert len(receiver.received()) == 2


@pytest.mark.parametrize("signal", ["", "METRICS_"])
@pytest.mark.parametrize("kind", KINDS)
def test_metrics_go_the_same_way(kind: type[Receiver], files: Files, signal: str) -> None:
    with kind(certificate=files.server, clients=files.authority) as receiver:
        environ = variables(receiver, files.authority, files.client, signal)
        wanted = destination(environ | {"OTEL_EXPORTER_OTLP_METRICS_HEADERS": "x-scope-orgid=one"}, "metrics")
        assert wanted is not None
        sink = MetricsSink(wanted)
        sink.send(Manifest(session="s", started_ns=1, derived=3), Export("here"))
        sink.shutdown()
        assert receiver.counts()["stagetrace.export.waiting",] == 3


WRONG = {
    "nobody known has signed the server's": ("OTEL_EXPORTER_OTLP_CERTIFICATE names the file", None),
    "another has signed the server's": ("OTEL_EXPORTER_OTLP_CERTIFICATE names the file", None),
    "it is another host's": ("of another name", None),
    "the server speaks no TLS": ("does not speak TLS", None),
    "the endpoint says no TLS": ("begin the endpoint with https://", None),
    "the endpoint says no TLS, and clients need one": ("begin the endpoint with https://", None),
    "the client has none": ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and OTEL_EXPORTER_OTLP_CLIENT_KEY", "wants"),
    "another has signed the client's": ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "does not accept"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_is_named_with_what_to_do(kind: type[Receiver], files: Files, wrong: str) -> None:
    certificate: Pair | None = files.server
    authority: Path | None = files.authority
    if "another host" in wrong:
        certificate = files.elsewhere
    elif "no TLS" in wrong and "server" in wrong:
        certificate = None
    elif "nobody" in wrong:
        authority = None
    elif "signed the server's" in wrong:
        authority = files.another_authority
    client = files.stranger if "client's" in wrong else None
    clients = files.authority if "client" in wrong else None
    with kind(certificate=certificate, clients=clients) as receiver:
        for _ in range(2):
            environ = variables(receiver, authority, client, scheme="http" if "endpoint" in wrong else "https")
            taken, remedy = sent(environ)
            assert not taken
            for part in WRONG[wrong]:
                assert part is None or part in remedy
        assert not receiver.received()


def test_files_that_cannot_be_used_are_told_before_anything_is_sent(files: Files, tmp_path: Path) -> None:
    text = tmp_path / "text.pem"
    text.write_text("not a certificate")
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "pkey", "-in", files.client[1], "-aes128", "-passout", "pass:1234", "-out", locked],
        check=True,
        capture_output=True,
    )
    certificate, key = files.client
    nowhere = tmp_path / "nowhere.pem"
    for given, says in (
        ({"CERTIFICATE": nowhere}, "OTEL_EXPORTER_OTLP_CERTIFICATE: .*nowhere.pem cannot be read"),
        ({"CERTIFICATE": text}, "OTEL_EXPORTER_OTLP_CERTIFICATE: .*text.pem holds no certificate"),
        ({"CLIENT_KEY": key}, "CLIENT_KEY needs OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"),
        ({"CLIENT_CERTIFICATE": certificate}, "holds no key: name its file in OTEL_EXPORTER_OTLP_CLIENT_KEY"),
        ({"CLIENT_CERTIFICATE": nowhere, "CLIENT_KEY": key}, "CLIENT_CERTIFICATE: .*nowhere.pem cannot be read"),
        ({"CLIENT_CERTIFICATE": certificate, "CLIENT_KEY": files.server[1]}, "server.key is not the key of"),
        ({"CLIENT_CERTIFICATE": certificate, "CLIENT_KEY": text}, "no certificate and key in PEM form"),
        ({"CLIENT_CERTIFICATE": certificate, "CLIENT_KEY": locked}, "the key is encrypted"),
    ):
        for receiver in (GrpcReceiver(1), HttpReceiver(1)):
            environ = variables(receiver, files.authority)
            environ |= {f"OTEL_EXPORTER_OTLP_{name}": str(path) for name, path in given.items()}
            with pytest.raises(BadSettings, match=says):
                sink_for(environ)


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_says_it_and_loses_nothing(kind: type[Receiver], files: Files, tmp_path: Path) -> None:
    session = Session(tmp_path / "session", claim_identity(tmp_path / "session"))
    build = Builder()
    build.step(7, 1, 1 * MS, 2 * MS, decode_tokens=1)
    for name, table in build.tables().items():
        session.write_table(name, table, 1)
    session.write_manifest(
        Manifest(session=session.identity.session, anchors=[(0, 10**18)], derived=1, complete=True, started_ns=1)
    )
    command = [sys.executable, "-m", "stagetrace.cli.main", "export", session.path]
    with kind(certificate=files.server, clients=files.authority) as receiver, commands_in(tmp_path) as commands:
        commands.environment["NO_PROXY"] = "127.0.0.1"
        for client, status, says in (
            (None, 1, b"OTEL_EXPORTER_OTLP_CLIENT_KEY name its files"),
            ((files.client[0], files.server[1]), 2, b"is not the key of"),
            (files.client, 0, b"1 spans sent"),
        ):
            environ = variables(receiver, files.authority, client)
            running = commands.start(*command, env={**commands.environment, **environ})
            out, err = running.communicate(timeout=60)
            assert running.returncode == status, err
            assert says in out + err and b"Traceback" not in err
            assert status != 1 or b"1 commits wait" in out
        assert len(receiver.received()) == 1
