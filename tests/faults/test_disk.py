"""The session's disk is full, or read-only: the engine goes on, what can be kept is kept, the rest is counted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from faults.mounts import mounted
from unit.commands import Commands, commands_in, said, wait_for
from unit.rings import FORWARD, variables

from stagetrace.exporters import collector as module
from stagetrace.exporters.collector import Collector
from stagetrace.exporters.session import Losses, Session
from stagetrace.instrument.identity import claim_identity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WRITES = f"""
import sys
from stagetrace.instrument.recorder import RECORDER
assert RECORDER.open("engine_core", {{}})
number = 0
for line in sys.stdin:
    for _ in range(int(line)):
        number += 1
        RECORDER.segment({FORWARD}, number, number + 1, 0, 0)
    RECORDER.text(number, 1, f"request {{number}}")
    print(number, flush=True)
"""


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with commands_in(tmp_path) as commands:
        yield commands


def writer(directory: Path, session: Path) -> subprocess.Popen[str]:
    """A process that writes as many segments, and one text, as each line of its standard input says."""
    return subprocess.Popen(
        [sys.executable, "-c", WRITES],
        env={**os.environ, **variables(directory), "STAGETRACE_SESSION": str(session)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def write(process: subprocess.Popen[str], count: int) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{count}\n")
    process.stdin.flush()
    process.stdout.readline()


def polled(collector: Collector) -> None:
    for _ in range(3):  # a slot is taken when an earlier poll saw it
        collector.poll()


def losses_of(session: Session, ring: str) -> Losses:
    (found,) = [loss for loss in session.read_manifest().losses if loss.ring == ring]
    return found


def test_what_is_held_while_the_disk_is_full_is_written_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STAGETRACE_RING_DIR", str(tmp_path / "rings"))
    with mounted(tmp_path / "small", "256k") as disk:
        path = disk / "session"
        session = Session(path, claim_identity(path))
        process = writer(tmp_path, path)
        collector = Collector(session)
        write(process, 1_000)
        polled(collector)
        assert collector.commit()
        ballast = disk / "ballast"
        try:
            with open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            pass
        for _ in range(3):
            write(process, 1_000)
            polled(collector)
            assert not collector.commit()
        assert len([record for record in caplog.records if "cannot write" in record.getMessage()]) == 1
        assert not list(path.rglob("*.partial")), "what was half written is removed"
        ballast.unlink()
        assert collector.commit()
        assert "can be written again" in caplog.text
        process.communicate()
        assert collector.finish()
        assert session.read_table("segments").num_rows == 4_000
        assert losses_of(session, "detail").lost == 0
        assert session.read_manifest().complete


def test_beyond_what_memory_holds_the_newest_detail_is_given_up_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HOLD_SLOTS", 5_000)
    monkeypatch.setenv("STAGETRACE_RING_DIR", str(tmp_path / "rings"))
    path = tmp_path / "session"
    session = Session(path, claim_identity(path))
    process = writer(tmp_path, path)
    collector = Collector(session)
    with monkeypatch.context() as broken:
        broken.setattr(Session, "write_raw", _full)
        for _ in range(12):
            write(process, 1_000)
            polled(collector)
            assert not collector.commit()
        held = sum(len(batch.detail) for batch in collector._batches)
        assert held == 5_000
    assert collector.commit()
    process.communicate()
    assert collector.finish()
    detail, control = losses_of(session, "detail"), losses_of(session, "control")
    assert (detail.read, detail.given_up, detail.lost) == (5_000, 7_000, 7_000)
    assert control.lost == 0, "what gives the rest its meaning is kept"
    segments = session.read_table("segments", ["begin_ns"])["begin_ns"].to_pylist()
    assert segments == [*range(1, 5_001)], "the newest went"


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_disk_that_stays_full_leaves_the_rest_in_the_rings_for_a_later_collector(commands: Commands) -> None:
    with mounted(commands.directory / "small", "256k") as disk:
        path = disk / "session"
        session = Session(path, claim_identity(path))
        until = commands.directory / "until"
        writer = commands.recording("--steady", "--pause", "0.01", "--until", until, session=path)
        collector = commands.collect(path, log=commands.directory / "log")
        wait_for(lambda: session.read_manifest().processes)
        with open(disk / "ballast", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        wait_for(lambda: "cannot write" in (commands.directory / "log").read_text())
        time.sleep(0.5)
        until.touch()
        count = int(said(writer).split()[1])
        assert writer.wait(20) == 0, "the engine does not notice"
        collector.terminate()
        assert collector.wait(20) == 1
        assert "stay in the rings" in (commands.directory / "log").read_text()
        assert len(commands.ring_files()) == 1
        (disk / "ballast").unlink()
        (disk / "ballast").touch()
        late = commands.collect(path, log=commands.directory / "log")
        wait_for(lambda: not commands.ring_files())
        late.terminate()
        assert late.wait(20) == 0
        assert session.read_table("requests")["status"].to_pylist() == ["finished"] * count
        assert sum(loss.lost for loss in session.read_manifest().losses) == 0


def test_a_disk_that_becomes_read_only(commands: Commands) -> None:
    # Large enough for what a slow machine holds back meanwhile: a disk that fills up is another test's.
    with mounted(commands.directory / "large", "256m") as disk:
        path = disk / "session"
        session = Session(path, claim_identity(path))
        until = commands.directory / "until"
        writer = commands.recording("--steady", "--pause", "0.01", "--until", until, session=path)
        collector = commands.collect(path, log=commands.directory / "log")
        wait_for(lambda: session.read_table("requests").num_rows)
        read_only = ["mount", "-o", "remount,ro", disk]
        wait_for(lambda: subprocess.run(read_only, check=False).returncode == 0)  # not while a file is being written
        wait_for(lambda: "cannot write" in (commands.directory / "log").read_text())
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        wait_for(lambda: "can be written again" in (commands.directory / "log").read_text())
        until.touch()
        count = int(said(writer).split()[1])
        wait_for(lambda: not commands.ring_files())
        collector.terminate()
        assert collector.wait(20) == 0
        assert session.read_table("requests")["status"].to_pylist() == ["finished"] * count


def test_a_session_on_a_disk_that_is_read_only_from_the_start_is_refused(commands: Commands) -> None:
    with mounted(commands.directory / "small", "4m") as disk:
        read_only = ["mount", "-o", "remount,ro", disk]
        wait_for(lambda: subprocess.run(read_only, check=False).returncode == 0)  # not while a file is being written
        collector = commands.collect(disk / "session", log=commands.directory / "log")
        assert collector.wait(20) == 2
        said_ = (commands.directory / "log").read_text()
        assert "cannot use" in said_ and "Read-only" in said_ and "Traceback" not in said_
