"""Tests of the collector on real rings: what it commits survives its own death, and each record is there once."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from backends.receiver import HttpReceiver
from unit.commands import PATIENCE_S, STAGETRACE, Commands, commands_in, said, wait_for
from unit.recording import STEPS

from stagetrace.exporters import collector as collector_module
from stagetrace.exporters.collector import Collector
from stagetrace.exporters.discover import process_key
from stagetrace.exporters.drain import RingReader
from stagetrace.exporters.otel_settings import Destination
from stagetrace.exporters.otlp import OtlpSink
from stagetrace.exporters.retention import Keep
from stagetrace.exporters.session import TABLES, Session
from stagetrace.instrument.identity import claim_identity
from stagetrace.instrument.ids import request_span_id, segment_span_id, state_span_id, step_span_id

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

# A collector that SIGKILLs itself on entering a function once the session has so many parts; it commits often.
KILLED = """
import os, signal, sys
from pathlib import Path
from stagetrace.exporters import collector
from stagetrace.exporters.export_process import ExportProcess
from stagetrace.exporters.session import Session
from stagetrace.instrument.identity import claim_identity
path, function, parts = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
session = Session(path, claim_identity(path))
owner = Session if hasattr(Session, function) else collector.Collector
original = getattr(owner, function)
def killed(*arguments, **more):
    if len(session.raw_parts()) >= parts:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **more)
setattr(owner, function, killed)
collector.COMMIT_S = 0.2
made = collector.Collector(session, ["the", "command"])
if "OTEL_EXPORTER_OTLP_ENDPOINT" in os.environ:
    made.export = ExportProcess(session)
made.run(lambda: False)
"""


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with commands_in(tmp_path) as commands:
        yield commands


@pytest.fixture
def session(tmp_path: Path) -> Session:
    path = tmp_path / "session"
    return Session(path, claim_identity(path))


def killed_collector(commands: Commands, session: Session, function: str, parts: int) -> None:
    """Runs a collector until it was killed at `function`."""
    process = commands.start(sys.executable, "-c", KILLED, session.path, function, str(parts))
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGKILL, err.decode()


def stop_when_rings_are_gone(commands: Commands, session: Session) -> None:
    """Has a collector take what is in the rings of dead processes."""
    collector = commands.collect(session.path)
    wait_for(lambda: not commands.ring_files() or collector.poll() is not None)
    assert collector.poll() is None, session.path.with_suffix(".log").read_text()
    stop(collector)


def stop(collector: subprocess.Popen[bytes]) -> None:
    collector.terminate()
    assert collector.wait(PATIENCE_S) == 0


def raw_numbers(session: Session) -> dict[tuple[int, int], list[int]]:
    """The slot numbers in the session, in its order, by process and ring."""
    numbers = defaultdict(list)
    for part in session.raw_parts():
        for _, table in session.read_raw(part):
            for row in table.to_pylist():
                numbers[row["process"], row["ring"]].append(struct.unpack_from("<Q", row["slot"])[0])
    return dict(numbers)


def written_numbers(ring: Path) -> dict[tuple[int, int], list[int]]:
    """The slot numbers that a process wrote into its ring, which it has not filled once."""
    key = process_key(ring.name)
    reader = RingReader(ring, key)
    return {(key, area): [*range(1, int(slots.slots["first"].max()) + 1)] for area, slots in enumerate(reader.areas)}


def rows(session: Session) -> dict[str, list[str]]:
    """Every table's rows, in an order that does not depend on that of the file."""
    return {name: sorted(map(repr, session.read_table(name).to_pylist())) for name in TABLES}


def uninterrupted(session: Session, rings: list[Path], directory: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Another session with the same identity, made by one collector from the same rings."""
    again = directory / "uninterrupted"
    again.mkdir()
    shutil.copy(session.path / "session.json", again)
    for ring in rings:
        copy = again / "rings" / session.identity.session / ring.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ring, copy)
    monkeypatch.setenv("STAGETRACE_RING_DIR", str(again / "rings"))
    copied = Session(again, session.identity)
    Collector(copied).finish()
    assert not [*(again / "rings").iterdir()]
    return copied


def keep(commands: Commands) -> list[Path]:
    """Second names of the rings that are there: the collector removes the first when the process is dead."""
    kept = []
    for ring in sorted(commands.ring_files()):
        name = commands.directory / "kept" / ring.name
        name.parent.mkdir(exist_ok=True)
        os.link(ring, name)
        kept.append(name)
    return kept


# Its own death


@pytest.mark.parametrize("function", ["write_raw", "write_table", "write_manifest"])
def test_a_killed_collector_loses_and_repeats_nothing(
    commands: Commands, session: Session, function: str, monkeypatch: pytest.MonkeyPatch
):
    until = commands.directory / "until"
    writer = commands.recording("--steady", "--pause", "0.02", "--open", "1", "--until", until, session=session.path)
    killed_collector(commands, session, function, 2)
    before = raw_numbers(session)
    assert all(before.values())
    killed_collector(commands, session, function, 3)  # the second killed one had to resume first
    kept = keep(commands)
    until.touch()
    count = int(said(writer).split()[1])
    stop_when_rings_are_gone(commands, session)
    (ring,) = kept
    found = raw_numbers(session)
    assert found == written_numbers(ring)
    assert all(found[ring][: len(numbers)] == numbers for ring, numbers in before.items())
    manifest = session.read_manifest()
    assert manifest.complete and manifest.command == ["the", "command"]
    assert {losses.ring: (losses.read, losses.lost) for losses in manifest.losses} == {
        name: (len(found[process_key(ring.name), area]), 0) for area, name in enumerate(("control", "detail"))
    }
    whole = uninterrupted(session, kept, commands.directory, monkeypatch)
    assert rows(session) == rows(whole)
    assert whole.read_table("requests").num_rows == count
    assert whole.read_table("steps").num_rows == count * STEPS


def test_a_collector_that_is_killed_at_any_time(commands: Commands, session: Session, monkeypatch: pytest.MonkeyPatch):
    until = commands.directory / "until"
    writer = commands.recording("--steady", "--pause", "0.02", "--until", until, session=session.path)
    for _ in range(2):
        parts = len(session.raw_parts())
        collector = commands.collect(session.path)
        wait_for(lambda parts=parts: len(session.raw_parts()) > parts)
        collector.kill()
        collector.wait()
    kept = keep(commands)
    until.touch()
    count = int(said(writer).split()[1])
    stop_when_rings_are_gone(commands, session)
    assert raw_numbers(session) == written_numbers(kept[0])
    whole = uninterrupted(session, kept, commands.directory, monkeypatch)
    assert rows(session) == rows(whole)
    assert whole.read_table("requests")["status"].to_pylist() == ["finished"] * count


def test_a_process_that_died_before_the_collector_stays_dead(commands: Commands, session: Session):
    # Its ring is gone when the next collector comes, and another engine lives on.
    dead = commands.recording("--requests", "2", "--open", "1", "--die", session=session.path)
    assert dead.wait(PATIENCE_S) == -signal.SIGKILL
    killed_collector(commands, session, "poll", 1)
    assert not commands.ring_files()
    until = commands.directory / "until"
    living = commands.recording("--requests", "1", "--open", "1", "--until", until, session=session.path)
    assert said(living) == "recorded 2 requests"
    collector = commands.collect(session.path)
    wait_for(lambda: len(session.read_manifest().processes) == 2)
    stop(collector)
    requests = session.read_table("requests").to_pylist()
    instance = {process.pid: process.info["instance"] for process in session.read_manifest().processes}
    statuses = {
        who.pid: sorted(row["status"] for row in requests if row["instance"] == instance[who.pid])
        for who in (dead, living)
    }
    assert statuses == {dead.pid: ["finished", "finished", "lost"], living.pid: ["finished", "open"]}
    until.touch()
    assert living.wait(PATIENCE_S) == 0
    stop_when_rings_are_gone(commands, session)


def test_parts_of_a_session_that_was_idle_are_not_written_over(commands: Commands, session: Session):
    # Commits without records leave no part; the number of the next part must not be one that is taken.
    until = commands.directory / "until"
    writer = commands.recording("--steady", "--pause", "0.5", "--until", until, session=session.path)
    killed_collector(commands, session, "poll", 2)
    before = raw_numbers(session)
    for parts in (3, 4):
        killed_collector(commands, session, "poll", parts)
    found = raw_numbers(session)
    assert all(found[ring][: len(numbers)] == numbers for ring, numbers in before.items())
    (ring,) = keep(commands)
    until.touch()
    said(writer)
    stop_when_rings_are_gone(commands, session)
    assert raw_numbers(session) == written_numbers(ring)


@pytest.mark.parametrize("parts", [1, 3])
def test_spans_that_a_killed_collector_did_not_export_are_exported(commands: Commands, session: Session, parts: int):
    until = commands.directory / "until"
    with HttpReceiver() as receiver:
        commands.environment |= {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": receiver.protocol,
            "NO_PROXY": "127.0.0.1",
        }
        more = ("--steady", "--long", "--pause", "0.05", "--until", until)
        writer = commands.recording("--open", "1", *more, session=session.path)
        killed_collector(commands, session, "_tend", parts)
        until.touch()
        writer.wait(PATIENCE_S)
        stop_when_rings_are_gone(commands, session)
        # What did not fit between the last record and the collector's end waits in the session.
        rest = commands.start(STAGETRACE, "export", session.path)
        assert rest.wait(PATIENCE_S) == 0
        received = {span.span.span_id for span in receiver.received()}
    key = session.identity.key
    tables = {name: session.read_table(name).to_pylist() for name in TABLES}
    assert tables["requests"] and len(tables["steps"]) == len(tables["requests"]) * STEPS
    ids = {
        "requests": {request_span_id(key, row["handle"]) for row in tables["requests"]},
        "states": {
            state_span_id(key, row["handle"], row["stage"], row["begin_ns"], row["step"] or 0)
            for row in tables["states"]
        },
        "steps": {step_span_id(key, row["instance"], row["step"]) for row in tables["steps"]},
        "segments": {segment_span_id(key, row["process"], row["sequence"]) for row in tables["segments"]},
    }
    assert {name: len(wanted - received) for name, wanted in ids.items()} == dict.fromkeys(ids, 0)


def test_a_collector_that_died_before_its_first_record_leaves_the_command(commands: Commands, session: Session):
    killed_collector(commands, session, "poll", 0)
    assert not (session.path / "manifest.json").exists()
    killed_collector(commands, session, "_remove_dead_rings", 0)
    assert session.read_manifest().command == ["the", "command"]
    before = session.read_manifest().updated_ns
    collector = commands.collect(session.path)
    wait_for(lambda: session.read_manifest().updated_ns > before)
    stop(collector)
    assert session.read_manifest().command == ["the", "command"]


# Who comes and goes


def test_collect_before_the_engines_and_one_that_joins_later(commands: Commands, tmp_path: Path):
    path = tmp_path / "made" / "by-collect"
    path.parent.mkdir()
    collector = commands.collect(path)
    wait_for((path / "manifest.json").exists)
    session = Session.open(path)
    assert session.read_manifest().processes == []
    first = commands.recording("--requests", "2", session=path)
    assert first.wait(PATIENCE_S) == 0
    wait_for(lambda: not commands.ring_files())
    second = commands.recording("--requests", "3", "--role", "other", session=path)
    assert second.wait(PATIENCE_S) == 0
    wait_for(lambda: not commands.ring_files())
    stop(collector)
    manifest = session.read_manifest()
    assert [(process.pid, process.ended) for process in manifest.processes] == [(first.pid, True), (second.pid, True)]
    assert [process.role for process in manifest.processes] == ["engine_core", "other"]
    assert session.read_table("requests")["status"].to_pylist() == ["finished"] * 5
    assert sum(losses.lost for losses in manifest.losses) == 0


def test_collect_after_the_engine_and_told_to_stop_before_it_ends(commands: Commands, session: Session):
    until = commands.directory / "until"
    writer = commands.recording("--requests", "1", "--open", "1", "--until", until, session=session.path)
    assert said(writer) == "recorded 2 requests"
    kept = keep(commands)
    collector = commands.collect(session.path)
    wait_for(lambda: session.read_table("requests").num_rows)  # a ring with next to no traffic is read as well
    stop(collector)
    manifest = session.read_manifest()
    assert manifest.complete
    assert [process.ended for process in manifest.processes] == [False]
    assert session.read_table("requests")["status"].to_pylist() == ["finished", "open"]
    assert len(commands.ring_files()) == 1  # its process still writes
    until.touch()
    assert writer.wait(PATIENCE_S) == 0
    stop_when_rings_are_gone(commands, session)
    assert session.read_manifest().complete
    assert raw_numbers(session) == written_numbers(kept[0])
    assert session.read_table("requests")["status"].to_pylist() == ["finished", "lost"]


def test_a_ring_without_traffic(commands: Commands, session: Session):
    writer = commands.recording(session=session.path)
    assert writer.wait(PATIENCE_S) == 0
    stop_when_rings_are_gone(commands, session)
    (process,) = session.read_manifest().processes
    assert (process.pid, process.ended, process.info["engine"]) == (writer.pid, True, "none")
    assert {name: len(table) for name, table in rows(session).items()} == dict.fromkeys(TABLES, 0)


def test_collect_again_on_a_session_that_ended_changes_nothing(commands: Commands, session: Session):
    writer = commands.recording("--requests", "3", session=session.path)
    assert writer.wait(PATIENCE_S) == 0
    stop_when_rings_are_gone(commands, session)
    before, numbers = rows(session), raw_numbers(session)
    collector = commands.collect(session.path)
    wait_for(lambda: not session.read_manifest().complete)
    collector.send_signal(signal.SIGINT)  # Ctrl-C in its terminal, as good as SIGTERM
    assert collector.wait(PATIENCE_S) == 0
    assert (rows(session), raw_numbers(session)) == (before, numbers)
    assert session.read_manifest().complete


def test_a_second_collector_is_refused(commands: Commands, session: Session):
    first = commands.collect(session.path)
    wait_for((session.path / "manifest.json").exists)
    second = commands.collect(session.path)
    assert second.wait(PATIENCE_S) == 2
    assert "another collector" in session.path.with_suffix(".log").read_text()
    stop(first)


# What it cannot use


def refused(commands: Commands, path: Path) -> str:
    """What `collect` says of a directory that it cannot use."""
    collector = commands.collect(path)
    assert collector.wait(PATIENCE_S) == 2
    message = path.with_suffix(".log").read_text()
    assert str(path) in message
    assert "Traceback" not in message
    return message


def test_a_file_in_place_of_the_directory(commands: Commands, tmp_path: Path):
    path = tmp_path / "session"
    path.write_text("a file\n")
    assert "cannot use" in refused(commands, path)


def test_a_directory_with_an_unreadable_identity(commands: Commands, tmp_path: Path):
    path = tmp_path / "session"
    path.mkdir()
    (path / "session.json").write_text("{")
    assert "remove the directory or name another" in refused(commands, path)


@pytest.mark.parametrize("text", ["{", '{"version": 99}'], ids=["not JSON", "another version"])
def test_a_session_with_a_manifest_that_it_cannot_read(commands: Commands, session: Session, text: str):
    writer = commands.recording("--requests", "1", session=session.path)
    assert writer.wait(PATIENCE_S) == 0
    stop_when_rings_are_gone(commands, session)
    (session.path / "manifest.json").write_text(text)
    numbers = raw_numbers(session)
    refused(commands, session.path)
    assert (session.path / "manifest.json").read_text() == text
    assert raw_numbers(session) == numbers


# Taken up again, rebuilt, bounded


def recorded(commands: Commands, session: Session, parts: int) -> tuple[int, list[Path]]:
    """A session that several collectors made, with at least so many parts; its requests, and the ring."""
    until = commands.directory / "until"
    writer = commands.recording("--steady", "--pause", "0.02", "--open", "1", "--until", until, session=session.path)
    killed_collector(commands, session, "_tend", parts)
    kept = keep(commands)
    until.touch()
    count = int(said(writer).split()[1])
    stop_when_rings_are_gone(commands, session)
    return count, kept


def table_files(session: Session) -> dict[str, bytes]:
    return {
        str(path.relative_to(session.path)): path.read_bytes() for path in (session.path / "tables").rglob("*.parquet")
    }


def test_tables_rebuilt_from_the_raw_records_are_the_same_to_the_byte(commands: Commands, session: Session):
    recorded(commands, session, 4)
    before, recorded_until = table_files(session), session.read_manifest().updated_ns
    assert len(before) > 10
    shutil.rmtree(session.path / "tables" / "steps")
    (session.path / "tables" / "requests" / "part-00000001.parquet").unlink(missing_ok=True)
    again = commands.start(STAGETRACE, "rebuild", session.path)
    out, err = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, err
    assert b"records in" in out
    assert table_files(session) == before
    assert session.read_manifest().complete
    assert session.read_manifest().updated_ns == recorded_until


def test_rebuild_of_a_damaged_session_keeps_the_rest_and_names_what_is_lost(commands: Commands, session: Session):
    count, _ = recorded(commands, session, 4)
    (session.raw_parts()[1].path).write_bytes(b"damaged")
    again = commands.start(STAGETRACE, "rebuild", session.path)
    _, err = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 1
    assert b"part-00000002.parquet is damaged" in err and b"Traceback" not in err
    assert 0 < session.read_table("requests").num_rows <= count


@pytest.mark.parametrize("content", ["{", '{"version": 2}', None], ids=["cut off", "no fields", "gone"])
def test_rebuild_makes_a_manifest_again_that_is_damaged_or_gone(
    commands: Commands, session: Session, content: str | None
):
    recorded(commands, session, 4)
    before, tables = session.read_manifest(), table_files(session)
    path = session.path / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    again = commands.start(STAGETRACE, "rebuild", session.path)
    _, err = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, err
    assert b"made manifest.json from the raw records" in err
    assert path.with_suffix(".json.damaged").exists() == (content is not None)
    after = session.read_manifest()
    assert table_files(session) == tables
    assert after.complete and after.derived == before.derived and after.counts.pop("manifest_restored")
    assert after.counts == before.counts
    assert after.losses == before.losses
    for process in before.processes:
        process.host = ""
    assert after.processes == before.processes
    assert abs(after.started_ns - before.started_ns) < 60e9
    assert after.started_ns < after.updated_ns <= before.updated_ns
    assert commands.start(STAGETRACE, "report", session.path).wait(PATIENCE_S) == 0


def test_rebuild_is_refused_while_a_collector_has_the_session(commands: Commands, session: Session):
    collector = commands.collect(session.path)
    wait_for((session.path / "manifest.json").exists)
    again = commands.start(STAGETRACE, "rebuild", session.path)
    _, err = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 2
    assert b"another collector has it" in err
    stop(collector)


def test_a_part_that_was_damaged_is_set_aside_and_what_the_ring_still_has_is_read_again(
    commands: Commands, session: Session
):
    # As after a power cut: the newest part is there and has not its content.
    until = commands.directory / "until"
    writer = commands.recording("--steady", "--pause", "0.02", "--until", until, session=session.path)
    killed_collector(commands, session, "_tend", 3)
    newest = session.raw_parts()[-1]
    newest.path.write_bytes(newest.path.read_bytes()[:-9])
    until.touch()
    count = int(said(writer).split()[1])
    stop_when_rings_are_gone(commands, session)
    manifest = session.read_manifest()
    assert manifest.counts["parts_damaged"] == 1
    assert newest.path.with_suffix(".damaged").exists()
    assert session.read_table("requests")["status"].to_pylist() == ["finished"] * count
    assert sum(losses.lost for losses in manifest.losses) == 0


def test_taking_up_a_long_session_replays_its_end_alone(
    commands: Commands, session: Session, monkeypatch: pytest.MonkeyPatch
):
    count, _ = recorded(commands, session, 6)
    before = rows(session)
    hooks = [process.hooks for process in session.read_manifest().processes]
    monkeypatch.setenv("STAGETRACE_RING_DIR", str(commands.rings))
    monkeypatch.setattr(collector_module, "REPLAY_SLOTS", 10)
    collector = Collector(session)
    assert collector.finish()
    assert session.read_table("requests").num_rows <= count + 1
    after = rows(session)
    assert set(after["steps"]) >= {row for row in before["steps"] if "incomplete" not in row}
    assert [process.hooks for process in session.read_manifest().processes] == hooks


def test_a_session_stays_within_its_bounds(commands: Commands, session: Session, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STAGETRACE_RING_DIR", str(commands.rings))
    monkeypatch.setattr(collector_module, "TEND_S", 0.0)
    early = commands.recording("--requests", "3", session=session.path)
    assert early.wait(PATIENCE_S) == 0
    collector = Collector(session, keep=Keep(size=400_000))
    collector.poll()
    collector.commit()
    assert [process.pid for process in session.read_manifest().processes] == [early.pid]
    until = commands.directory / "until"
    writer = commands.recording("--steady", "--pause", "0.002", "--until", until, session=session.path)
    wait_for(commands.ring_files)
    for _ in range(30):
        time.sleep(0.05)
        collector.poll()
        collector.commit()
        collector._tend()
        assert sum(size for _, size in session.sizes()) < 600_000
    until.touch()
    said(writer)
    writer.wait(PATIENCE_S)
    assert collector.finish()
    manifest = session.read_manifest()
    assert manifest.rotated > 0 and manifest.counts["slots_rotated"] > 0
    assert [process.pid for process in manifest.processes] == [writer.pid], "of the other nothing is kept"
    first = session.read_commits(session.raw_parts()[0])[0]
    assert first.number == manifest.rotated + 1
    assert manifest.rotated_ns < first.wall_ns
    kept = sum(commit.slots for part in session.raw_parts() for commit in session.read_commits(part))
    assert kept + manifest.counts["slots_rotated"] == sum(losses.read for losses in manifest.losses)
    assert session.read_table("steps").num_rows
    again = commands.start(STAGETRACE, "report", session.path)
    out, _ = again.communicate(timeout=PATIENCE_S)
    assert b"was removed to keep the session small" in out


def test_an_error_of_the_assembly_costs_its_tables_and_nothing_else(
    commands: Commands, session: Session, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STAGETRACE_RING_DIR", str(commands.rings))
    writer = commands.recording("--requests", "3", session=session.path)
    assert writer.wait(PATIENCE_S) == 0
    (ring,) = keep(commands)

    def fails(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    with monkeypatch.context() as broken:
        broken.setattr("stagetrace.exporters.assembly.assemble.Assembler.take", fails)
        assert Collector(session).finish()
    assert session.read_manifest().counts["assembly_errors"] == 1
    assert raw_numbers(session) == written_numbers(ring)
    again = commands.start(STAGETRACE, "rebuild", session.path)
    assert again.wait(PATIENCE_S) == 0
    assert session.read_table("requests")["status"].to_pylist() == ["finished"] * 3


# Clocks


def test_wall_clock_steps_are_noted_and_make_no_negative_time(
    commands: Commands, session: Session, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STAGETRACE_RING_DIR", str(commands.rings))
    until = commands.directory / "until"
    writer = commands.recording("--steady", "--pause", "0.005", "--until", until, session=session.path)
    wait_for(commands.ring_files)
    collector = Collector(session)
    true_time = time.time_ns
    steps_ns = [0, 0, 3_600_000_000_000, 3_600_000_000_000, -7_200_000_000_000, -7_200_000_000_000, 0]
    for step_ns in steps_ns:
        monkeypatch.setattr(time, "time_ns", lambda step_ns=step_ns: true_time() + step_ns)
        time.sleep(0.1)
        collector.poll()
        collector.commit()
    until.touch()
    said(writer)
    writer.wait(PATIENCE_S)
    assert collector.finish()
    manifest = session.read_manifest()
    offsets = [wall - monotonic for monotonic, wall in manifest.anchors]
    jumps = [round((after - before) / 1e9) for before, after in pairwise(offsets)]
    assert jumps == [3600, -10_800, 7200]
    made = OtlpSink.to(Destination("http://127.0.0.1:1", "grpc", ""), session.identity.key)
    spans = made.spans({name: session.read_table(name) for name in TABLES}, manifest).spans
    made.shutdown()
    assert len(spans) > 50
    assert all(span.start_time <= span.end_time for span in spans)
    by_id = {span.context.span_id: span for span in spans}
    for span in spans:
        if span.parent is not None and span.attributes["stagetrace.stage"] != "prefill_chunk":
            parent = by_id[span.parent.span_id]
            assert parent.start_time <= span.start_time and span.end_time <= parent.end_time
