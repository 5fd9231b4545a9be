"""Rings that dead sessions left: the next collector saves them into their session, or removes them when it is gone."""

from __future__ import annotations

import shutil
import signal
import sys
from typing import TYPE_CHECKING

import pytest
from unit.commands import PATIENCE_S, Commands, commands_in, said, wait_for

from stagetrace.exporters import orphans
from stagetrace.exporters.session import Session
from stagetrace.instrument.identity import claim_identity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with commands_in(tmp_path) as commands:
        yield commands


@pytest.fixture(autouse=True)
def _rings(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGETRACE_RING_DIR", str(commands.rings))
    monkeypatch.setattr(orphans, "STALE_S", 0.0)


_AT_ONCE = "from stagetrace.exporters import orphans; orphans.STALE_S = 0; import stagetrace.cli.main as m; m.main()"


def dead(commands: Commands, name: str) -> Session:
    """A session whose engine was killed before any collector came."""
    path = commands.directory / name
    session = Session(path, claim_identity(path))
    engine = commands.recording("--requests", "3", "--open", "1", "--die", session=path)
    assert engine.wait(PATIENCE_S) == -signal.SIGKILL
    return session


def test_a_dead_session_is_saved_and_its_memory_given_back(commands: Commands) -> None:
    session = dead(commands, "dead")
    assert len(commands.ring_files()) == 1
    orphans.sweep("another")
    assert commands.ring_files() == []
    assert not (commands.rings / session.identity.session).exists()
    assert sorted(session.read_table("requests")["status"].to_pylist()) == ["finished"] * 3 + ["lost"]
    assert session.read_manifest().complete


def test_a_new_collector_does_so_when_it_starts(commands: Commands) -> None:
    session = dead(commands, "dead")
    path = commands.directory / "new"
    new = commands.start(sys.executable, "-c", _AT_ONCE, "collect", path)
    wait_for(lambda: not commands.ring_files())
    wait_for(lambda: session.read_manifest().complete)
    wait_for((path / "manifest.json").exists)
    new.terminate()
    assert new.wait(PATIENCE_S) == 0


def test_what_lives_or_is_collected_is_left_alone(commands: Commands) -> None:
    path = commands.directory / "living"
    session = Session(path, claim_identity(path))
    until = commands.directory / "until"
    engine = commands.recording("--requests", "1", "--until", until, session=path)
    assert said(engine) == "recorded 1 requests"
    orphans.sweep("another")
    assert len(commands.ring_files()) == 1
    collector = commands.collect(path)
    wait_for(lambda: session.read_manifest().processes)
    collector.send_signal(signal.SIGSTOP)
    until.touch()
    engine.wait(PATIENCE_S)
    orphans.sweep("another")
    assert len(commands.ring_files()) == 1, "another collector has it"
    collector.send_signal(signal.SIGCONT)
    wait_for(lambda: not commands.ring_files())
    collector.terminate()
    assert collector.wait(PATIENCE_S) == 0
    assert session.read_table("requests").num_rows == 1


def test_rings_of_a_session_that_is_gone_are_removed_after_a_while(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = dead(commands, "dead")
    shutil.rmtree(session.path)
    orphans.sweep("another")
    assert len(commands.ring_files()) == 1, "it may be out of sight for a while"
    monkeypatch.setattr(orphans, "GONE_S", 0.0)
    orphans.sweep("another")
    assert commands.ring_files() == []
    assert list(commands.rings.iterdir()) == []


def test_half_a_ring_of_a_process_that_died_over_it_is_removed(commands: Commands) -> None:
    directory = commands.rings / "0123"
    directory.mkdir(parents=True)
    (directory / "engine_core-1-1.partial").write_bytes(bytes(100))
    orphans.sweep("another")
    assert list(commands.rings.iterdir()) == []


def test_its_own_session_is_not_its_business(commands: Commands) -> None:
    session = dead(commands, "dead")
    orphans.sweep(session.identity.session)
    assert len(commands.ring_files()) == 1
    orphans.sweep("another")
