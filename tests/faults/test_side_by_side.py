"""Two sessions side by side: rings and sessions do not mix, and one that dies does not touch the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from unit.commands import PATIENCE_S, Commands, commands_in, said, wait_for
from unit.recording import STEPS

from stagetrace.exporters.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROLES = ("engine_core", "worker")
REQUESTS = 20


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with commands_in(tmp_path) as commands:
        yield commands


def test_two_sessions_do_not_mix(commands: Commands) -> None:
    paths = [commands.directory / name for name in ("one", "other")]
    collectors = [commands.collect(path) for path in paths]
    until = commands.directory / "until"
    writers = [
        commands.recording("--requests", str(REQUESTS), "--role", role, "--until", until, session=path)
        for path in paths
        for role in ROLES
    ]
    assert [said(writer) for writer in writers] == [f"recorded {REQUESTS} requests"] * 4
    sessions = [Session.open(path) for path in paths]
    for session in sessions:
        wait_for(lambda session=session: len(session.read_manifest().processes) == len(ROLES))
    assert len(commands.ring_files()) == 4
    assert sessions[0].identity != sessions[1].identity

    collectors[0].kill()  # with its engines alive: the other goes on, and its rings are not taken for the other's
    collectors[0].wait()
    until.touch()
    assert [writer.wait(PATIENCE_S) for writer in writers] == [0] * 4
    wait_for(lambda: len(commands.ring_files()) == 2)
    collectors[1].terminate()
    assert collectors[1].wait(PATIENCE_S) == 0
    assert {path.parent.name for path in commands.ring_files()} == {sessions[0].identity.session}
    again = commands.collect(paths[0])
    wait_for(lambda: not commands.ring_files())
    again.terminate()
    assert again.wait(PATIENCE_S) == 0

    pids = [{writer.pid for writer in writers[:2]}, {writer.pid for writer in writers[2:]}]
    for session, own in zip(sessions, pids, strict=True):
        manifest = session.read_manifest()
        assert manifest.complete
        assert {process.pid for process in manifest.processes} == own
        assert sorted(process.role for process in manifest.processes) == [*ROLES]
        assert sum(losses.lost for losses in manifest.losses) == 0
        requests = session.read_table("requests", ["request_id", "status"])
        assert set(requests["status"].to_pylist()) == {"finished"}
        names = requests["request_id"].to_pylist()
        assert len(set(names)) == len(names) == 2 * REQUESTS
        assert {int(name.split("-")[1]) for name in names} == own
        assert session.read_table("steps", ["step"]).num_rows == 2 * REQUESTS * STEPS
