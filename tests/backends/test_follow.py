"""The export against backends that are away, refuse, hang or reset: the session is the spool, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from backends.receiver import GrpcReceiver, HttpReceiver, Receiver
from backends.tables import MS, Builder, serving
from unit.commands import RECORDING, Commands, commands_in, said, wait_for

from stagetrace.analysis.step_light import with_light
from stagetrace.exporters import follow
from stagetrace.exporters.follow import Follower, Taken
from stagetrace.exporters.otel_settings import destination
from stagetrace.exporters.otlp import OtlpSink
from stagetrace.exporters.parts import END
from stagetrace.exporters.sampling import rules_of
from stagetrace.exporters.session import TABLES, Manifest, Session
from stagetrace.instrument.identity import claim_identity
from stagetrace.instrument.ids import request_span_id, segment_span_id, state_span_id, step_span_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STEPS = 40  # of each commit
_SELF_SIGNED = (
    *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=a"),
    *("-addext", "subjectAltName=IP:127.0.0.1"),
)

# Ways to misbehave, and to behave again.
TROUBLES: dict[str, tuple[Callable[[Receiver], None], Callable[[Receiver], None]]] = {
    "answers 503": (lambda it: setattr(it, "status", 503), lambda it: setattr(it, "status", 0)),
    "answers 429": (lambda it: setattr(it, "status", 429), lambda it: setattr(it, "status", 0)),
    "answers 401": (lambda it: setattr(it, "status", 401), lambda it: setattr(it, "status", 0)),
    "hangs": (lambda it: it.stuck.set(), lambda it: it.stuck.clear()),
}


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "PAUSE_S", (0.05, 0.2))
    monkeypatch.setattr(follow, "LOOK_S", 0.02)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """A complete session of three commits and an end, each with steps."""
    path = tmp_path / "session"
    session = Session(path, claim_identity(path))
    for number in (1, 2, 3, END):
        build = Builder()
        for step in range(STEPS):
            begin = (min(number, 4) * STEPS + step) * MS
            build.step(7, begin // MS, begin, begin + MS, decode_tokens=1)
        for name, table in build.tables().items():
            session.write_table(name, table, number)
    session.write_manifest(
        Manifest(session=session.identity.session, anchors=[(0, 10**18)], derived=3, complete=True, started_ns=1)
    )
    return session


def follower_of(
    session: Session, receiver: Receiver | None = None, timeout_s: float = 0.3, enrich: Any = None, rules: Any = None
) -> Follower:
    environ = dict(os.environ)
    if receiver is not None:
        environ |= {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": receiver.protocol,
        }
    wanted = destination(environ)
    assert wanted is not None
    sink = OtlpSink.to(wanted, session.identity.key, timeout_s=timeout_s, rules=rules)
    made = Follower(session, sink, wanted, enrich=enrich)
    made.remember()
    return made


def finish(follower: Follower, patience_s: float = 20.0) -> None:
    """Follows to the end."""
    deadline = time.monotonic() + patience_s
    follower.follow(lambda: time.monotonic() > deadline)
    follower.close()
    assert follower.done, follower.state


def steps_of(receiver: Receiver) -> Counter[int]:
    return Counter(item.attributes["stagetrace.step"] for item in receiver.received())


ALL_STEPS = set(range(STEPS, 5 * STEPS))


def test_everything_arrives_once(session: Session, receiver: Receiver) -> None:
    finish(follower_of(session, receiver))
    assert steps_of(receiver) == dict.fromkeys(ALL_STEPS, 1)
    (state,) = session.read_exports().values()
    assert (state.commit, state.end, state.sent, state.refused) == (3, True, 4 * STEPS, 0)
    finish(follower_of(session, receiver))  # another time there is nothing to send
    assert steps_of(receiver) == dict.fromkeys(ALL_STEPS, 1)


def test_what_cannot_be_added_to_the_spans_keeps_none_of_them(session: Session, receiver: Receiver) -> None:
    calls = []

    def enrich(tables: Any, manifest: Manifest) -> Any:
        calls.append(manifest.session)
        if len(calls) > 1:
            raise ValueError("nobody thought of this model")
        steps = tables["steps"]
        return {**tables, "steps": steps.append_column("operations", pa.array([1.0] * steps.num_rows))}

    finish(follower_of(session, receiver, enrich=enrich))
    assert steps_of(receiver) == dict.fromkeys(ALL_STEPS, 1)
    assert calls == [session.identity.session] * 2  # not again after it failed
    known = [
        item.attributes["stagetrace.step"] for item in receiver.received() if "stagetrace.operations" in item.attributes
    ]
    assert sorted(known) == list(range(STEPS, 2 * STEPS))


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_backend_in_trouble_gets_everything_when_it_is_well_again(
    session: Session, receiver: Receiver, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    begin, end = TROUBLES[trouble]
    begin(receiver)
    follower = follower_of(session, receiver)
    deadline = time.monotonic() + 1.5
    follower.follow(lambda: time.monotonic() > deadline)
    assert (follower.state.sent, follower.state.commit, follower.state.refused) == (0, 0, 0)
    assert follower.state.trouble
    end(receiver)
    finish(follower)
    assert set(steps_of(receiver)) == ALL_STEPS
    told = [record.getMessage() for record in caplog.records if record.name == follow.__name__]
    assert len(told) == 2, "once when it began and once when it was over"
    assert "OTEL_EXPORTER_OTLP_" in told[0] and "again" in told[1]


def test_connections_that_are_reset(session: Session) -> None:
    with HttpReceiver() as receiver:
        receiver.reset = True
        follower = follower_of(session, receiver)
        deadline = time.monotonic() + 1.0
        follower.follow(lambda: time.monotonic() > deadline)
        assert follower.state.sent == 0
        receiver.reset = False
        finish(follower)
        assert set(steps_of(receiver)) == ALL_STEPS


@pytest.mark.parametrize("kind", [GrpcReceiver, HttpReceiver])
def test_a_backend_that_is_not_there_yet(session: Session, kind: type[Receiver]) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        follower = follower_of(session, kind(port), timeout_s=1.0)
        deadline = time.monotonic() + 1.0
        follower.follow(lambda: time.monotonic() > deadline)
        assert (follower.state.sent, follower.waiting) == (0, 3)
    with kind(port) as receiver:
        finish(follower)
        assert set(steps_of(receiver)) == ALL_STEPS


def test_a_slow_backend_gets_everything(session: Session, receiver: Receiver) -> None:
    receiver.delay_s = 0.1
    finish(follower_of(session, receiver))
    assert steps_of(receiver) == dict.fromkeys(ALL_STEPS, 1)


def test_what_is_refused_while_others_are_taken_is_given_up_and_counted(session: Session, receiver: Receiver) -> None:
    def of_second_commit(request: Any) -> bool:
        spans = [span for group in request.resource_spans for scope in group.scope_spans for span in scope.spans]
        return any(item.value.int_value == 2 * STEPS for span in spans for item in span.attributes)

    receiver.refuses = of_second_commit
    follower = follower_of(session, receiver)
    deadline = time.monotonic() + 10
    follower.follow(lambda: time.monotonic() > deadline or follower.state.sent == 3 * STEPS)
    build = Builder()
    for number in range(4, 9):  # others come and are taken
        build.step(7, 1000 + number, number * MS, (number + 1) * MS, decode_tokens=1)
        for name, table in build.tables().items():
            session.write_table(name, table, number)
    manifest = session.read_manifest()
    manifest.derived = 8
    session.write_manifest(manifest)
    finish(follower)
    assert follower.state.refused == STEPS
    assert {*range(2 * STEPS, 3 * STEPS)} == ALL_STEPS - set(steps_of(receiver))


def test_a_bad_certificate_sends_nothing_and_a_good_one_everything(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [*_SELF_SIGNED, "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    ssl.create_default_context(cafile=str(certificate))  # it is one
    with HttpReceiver(certificate=(certificate, key)) as receiver:
        follower = follower_of(session, receiver, timeout_s=2.0)
        follower.follow(lambda: bool(follower.state.trouble))
        follower.close()
        assert (follower.state.sent, follower.state.refused) == (0, 0)
        assert "CERTIFICATE_VERIFY_FAILED" in follower.state.trouble
        assert not receiver.received()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(certificate))
        for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # they would go before it
            monkeypatch.delenv(name, raising=False)
        finish(follower_of(session, receiver))
        assert set(steps_of(receiver)) == ALL_STEPS


def test_it_goes_on_where_another_was_stopped(session: Session, receiver: Receiver) -> None:
    first = follower_of(session, receiver)
    first.follow(lambda: first.state.commit >= 1)
    first.close()
    before = steps_of(receiver)
    finish(follower_of(session, receiver))
    after = steps_of(receiver)
    assert set(after) == ALL_STEPS
    assert all(after[step] == 1 for step in before if step < 2 * STEPS), "what was confirmed is not sent again"


def test_what_was_removed_before_it_was_sent_is_counted(session: Session, receiver: Receiver) -> None:
    manifest = session.read_manifest()
    manifest.rotated = 2
    session.write_manifest(manifest)
    session.remove_through(2)
    follower = follower_of(session, receiver)
    finish(follower)
    assert follower.state.left_out["commits_rotated"] == 2
    assert set(steps_of(receiver)) == {step for step in ALL_STEPS if step >= 3 * STEPS}


def test_commits_are_sent_one_by_one_out_of_merged_parts(session: Session, receiver: Receiver) -> None:
    first = follower_of(session, receiver)
    first.follow(lambda: first.state.commit >= 1)
    first.close()
    for number in range(4, 65):
        for name, table in Builder().tables().items():
            session.write_table(name, table, number)
    manifest = session.read_manifest()
    manifest.derived = 64
    session.write_manifest(manifest)
    session.merge(64)
    assert len(list((session.path / "tables" / "steps").iterdir())) == 2, "one merged part, and the end"
    before = steps_of(receiver)
    finish(follower_of(session, receiver))
    assert set(steps_of(receiver)) == ALL_STEPS
    assert sum(steps_of(receiver).values()) - sum(before.values()) <= 3 * STEPS


def test_two_do_not_send_the_same(session: Session, receiver: Receiver) -> None:
    first = follower_of(session, receiver)
    with pytest.raises(Taken):
        follower_of(session, receiver)
    first.close()
    finish(follower_of(session, receiver))


def test_a_request_whose_states_came_in_commits_that_were_sent_before(tmp_path: Path, receiver: Receiver) -> None:
    whole = serving()
    path = tmp_path / "session"
    session = Session(path, claim_identity(path))
    early = {
        name: table if name in ("states", "members") else table.slice(0, 0) for name, table in whole.tables.items()
    }
    late = {name: table.slice(0, 0) if name in ("states", "members") else table for name, table in whole.tables.items()}
    for number, tables in ((1, early), (2, late)):
        for name, table in tables.items():
            session.write_table(name, table, number)
        whole.manifest.derived = number
        whole.manifest.complete = number == 2
        session.write_manifest(whole.manifest)
        follower = follower_of(session, receiver)
        follower.follow(lambda number=number, follower=follower: follower.state.commit >= number)
        follower.close()
    finish(follower_of(session, receiver))
    ids = {item.id: item.span.name for item in receiver.received()}
    assert set(ids) == {item.id for item in whole_at_once(tmp_path / "other", session, whole)}


def whole_at_once(path: Path, session: Session, whole: Any) -> list[Any]:
    """What a backend receives of the same tables in one commit."""
    path.mkdir()
    shutil.copy(session.path / "session.json", path)
    other = Session(path, session.identity)
    for name, table in whole.tables.items():
        other.write_table(name, table, 1)
    whole.manifest.derived = 1
    other.write_manifest(whole.manifest)
    with HttpReceiver() as receiver:
        finish(follower_of(other, receiver))
        return receiver.received()


# Sampling


def sampled_session(path: Path, derived: int) -> Session:
    """Twelve commits of ten steps and a request; the failed one, in the eighth, took part in steps of four commits."""
    session = Session(path, claim_identity(path))
    for number in range(1, 13):
        build = Builder()
        for step in range(number * 10, number * 10 + 10):
            build.step(7, step, step * MS, (step + 1) * MS, decode_tokens=1)
            build.segment("forward", 3, step * MS, (step + 1) * MS, of=(7, step, "decode"), record=step)
        status = "error" if number == 8 else "finished"
        begin = number * 10 * MS
        handle = build.request(f"r{number}", instance=7, status=status, arrival_ns=begin, end_ns=2 * begin)
        build.add("members", handle=handle, instance=7, first_step=number * 10 - 15, last_step=number * 10 + 14)
        for name, table in build.tables().items():
            session.write_table(name, table, number)
    manifest = Manifest(session=session.identity.session, anchors=[(0, 10**18)], derived=derived)
    session.write_manifest(manifest)
    return session


def test_live_and_later_sampled_exports_are_the_same(tmp_path: Path) -> None:
    rules = rules_of({"STAGETRACE_SAMPLE": "rate=0.2,error"})
    path = tmp_path / "session"
    session = sampled_session(path, 1)
    with HttpReceiver() as live, GrpcReceiver() as later:
        for derived in range(1, 13):  # commit by commit; the exporting process ends in between
            manifest = session.read_manifest()
            manifest.derived, manifest.complete = derived, derived == 12
            session.write_manifest(manifest)
            follower = follower_of(session, live, rules=rules)
            follower.follow(lambda derived=derived, follower=follower: follower.state.commit >= derived)
            follower.close()
        finish(follower_of(session, later, rules=rules))
        one, two = (
            sorted(item.span.SerializeToString(deterministic=True) for item in receiver.received())
            for receiver in (live, later)
        )
        assert one == two and len(set(one)) == len(one)
        received = later.received()
    steps = {item.attributes["stagetrace.step"]: item for item in received if item.span.name == "step decode"}
    assert set(range(65, 95)) <= set(steps), "every step of the one that failed"
    assert 30 < len(steps) < 80
    assert sum(item.attributes["stagetrace.sampling.weight"] == 0 for item in steps.values()) > 10
    (failed,) = [item for item in received if item.attributes.get("stagetrace.sampling.reason") == "error"]
    assert failed.attributes["stagetrace.sampling.weight"] == 1.0
    for state in session.read_exports().values():
        assert state.left_out["steps_sampled_out"] == state.left_out["segments_sampled_out"] == 120 - len(steps)


def test_a_real_engines_session_live_and_later_is_the_same(recording: Session, tmp_path: Path) -> None:
    shutil.copytree(recording.path, tmp_path / "session")
    session = Session.open(tmp_path / "session")
    shutil.rmtree(session.path / "exports", ignore_errors=True)
    whole = session.read_manifest()
    with HttpReceiver() as live, GrpcReceiver() as later:
        for derived in range(1, whole.derived + 1):  # commit by commit; the exporting process ends in between
            whole.complete = derived == whole.derived
            session.write_manifest(replace(whole, derived=derived))
            follower = follower_of(session, live, timeout_s=5, enrich=with_light(session))
            follower.follow(lambda derived=derived, follower=follower: follower.state.commit >= derived)
            follower.close()
        finish(follower_of(session, live, timeout_s=5, enrich=with_light(session)))
        finish(follower_of(session, later, timeout_s=5, enrich=with_light(session)))
        one, two = (
            sorted((item.span.SerializeToString(deterministic=True), sorted(item.resource.items())) for item in items)
            for items in (live.received(), later.received())
        )
    assert one == two and len({span for span, _ in one}) == len(one) > 800
    assert any("stagetrace.operations" in item.attributes for item in later.received()), "with the speed of light"


# The commands


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with commands_in(tmp_path) as commands:
        yield commands


def expected_ids(session: Session) -> dict[str, set[bytes]]:
    key = session.identity.key
    rows = {name: session.read_table(name).to_pylist() for name in TABLES}
    return {
        "requests": {request_span_id(key, row["handle"]) for row in rows["requests"]},
        "states": {
            state_span_id(key, row["handle"], row["stage"], row["begin_ns"], row["step"] or 0) for row in rows["states"]
        },
        "steps": {step_span_id(key, row["instance"], row["step"]) for row in rows["steps"]},
        "segments": {segment_span_id(key, row["process"], row["sequence"]) for row in rows["segments"] if row["step"]},
    }


def test_run_is_not_held_up_by_a_backend_that_hangs_and_export_sends_the_rest(
    commands: Commands, receiver: Receiver
) -> None:
    commands.environment |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": receiver.protocol,
        "NO_PROXY": "127.0.0.1",
    }
    receiver.stuck.set()
    path = commands.directory / "session"
    stagetrace = [sys.executable, "-m", "stagetrace.cli.main"]
    recording = [sys.executable, str(RECORDING), "--requests", "5"]
    process = commands.start(*stagetrace, "run", "--no-report", "--session", path, "--", *recording)
    assert said(process) == "recorded 5 requests"
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    session = Session.open(path)
    wait_for(lambda: session.read_manifest().complete)
    assert not receiver.received()
    wait_for(lambda: not commands.alive())  # on a busy machine its collector may end after it
    exporting = commands.start(*stagetrace, "export", path)
    wait_for(lambda: receiver.headers or receiver.stuck.is_set())
    receiver.stuck.clear()
    out, err = exporting.communicate(timeout=60)
    assert exporting.returncode == 0, err
    received = {item.span.span_id for item in receiver.received()}
    assert {name: len(ids - received) for name, ids in expected_ids(session).items()} == dict.fromkeys(
        ("requests", "states", "steps", "segments"), 0
    )
    assert b"0 commits wait" in out
    before = len(receiver.received())
    again = commands.start(*stagetrace, "export", path, "--again")
    assert again.communicate(timeout=60) and again.returncode == 0
    assert {item.span.span_id for item in receiver.received()[before:]} == received


def test_run_exports_spans_and_what_was_lost_as_metrics(commands: Commands, receiver: Receiver) -> None:
    commands.environment |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": receiver.protocol,
        "NO_PROXY": "127.0.0.1",
    }
    path = commands.directory / "session"
    stagetrace = [sys.executable, "-m", "stagetrace.cli.main"]
    until = commands.directory / "until"
    recording = [sys.executable, str(RECORDING), "--requests", "5", "--until", str(until)]
    process = commands.start(*stagetrace, "run", "--session", path, "--", *recording)
    assert said(process) == "recorded 5 requests"
    wait_for(lambda: len([item for item in receiver.received() if item.span.name == "request"]) == 5)
    until.touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    session = Session.open(path)
    finish(follower_of(session, receiver))  # where the machine was too slow for the end
    received = Counter(item.span.span_id for item in receiver.received())
    assert {name: len(ids - received.keys()) for name, ids in expected_ids(session).items()} == dict.fromkeys(
        ("requests", "states", "steps", "segments"), 0
    )
    assert f"Export to {receiver.endpoint}".encode() in out
    counts = receiver.counts()
    read = sum(loss.read for loss in session.read_manifest().losses if loss.ring == "control")
    assert 0 < counts["stagetrace.slots", "control", "read"] <= read
    assert counts["stagetrace.slots", "detail", "overwritten"] == 0
    assert 0 < counts["stagetrace.spans", "sent"] <= sum(received.values())
    assert counts["stagetrace.records.damaged", "corrupt"] == 0
    with HttpReceiver() as later:  # the same session to another backend, afterwards
        command = [sys.executable, "-m", "stagetrace.cli.main", "export", path]
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": later.endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": later.protocol}
        exporting = commands.start(*command, env={**commands.environment, **variables})
        _, err = exporting.communicate(timeout=60)
        assert exporting.returncode == 0, err
        one, two = (
            {
                (item.span.SerializeToString(deterministic=True), str(sorted(item.resource.items())))
                for item in of.received()
            }
            for of in (receiver, later)
        )
    assert one == two and len(two) == len(received), "live and later: to the byte"


@pytest.mark.parametrize("kind", [GrpcReceiver, HttpReceiver])
@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.matrix)])
def test_a_backend_that_is_down_for_a_while_under_load(commands: Commands, kind: type[Receiver], seconds: int) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        commands.environment |= {
            "OTEL_EXPORTER_OTLP_ENDPOINT": kind(port).endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": kind.protocol,
            "NO_PROXY": "127.0.0.1",
        }
        path = commands.directory / "session"
        until = commands.directory / "until"
        recording = [sys.executable, str(RECORDING), "--steady", "--pause", "0.05", "--until", str(until)]
        process = commands.start(
            sys.executable, "-m", "stagetrace.cli.main", "run", "--session", path, "--", *recording
        )
        wait_for((path / "collector.log").exists)
        wait_for(lambda: "spans do not reach" in (path / "collector.log").read_text(), 60)
        time.sleep(seconds)
    with kind(port) as receiver:
        wait_for(receiver.received, 60)
        until.touch()
        count = int(said(process).split()[1])
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        session = Session.open(path)
        finish(follower_of(session, receiver))  # where the machine was too slow for the end
        received = {item.span.span_id for item in receiver.received()}
    assert session.read_table("requests").num_rows == count
    assert {name: len(ids - received) for name, ids in expected_ids(session).items()} == dict.fromkeys(
        ("requests", "states", "steps", "segments"), 0
    )
    log = session.log.read_text()
    assert log.count("spans do not reach") == 1 and log.count("spans arrive at") == 1


def test_export_without_a_destination_says_what_to_set(commands: Commands) -> None:
    refused = commands.start(sys.executable, "-m", "stagetrace.cli.main", "export", commands.directory)
    _, err = refused.communicate(timeout=30)
    assert refused.returncode == 2
    assert b"OTEL_EXPORTER_OTLP_ENDPOINT" in err
