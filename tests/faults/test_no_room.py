"""No room for rings: processes run on, say why nothing is recorded, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest
from faults.mounts import mounted
from unit.commands import PATIENCE_S, Commands, commands_in, wait_for

from stagetrace.exporters.session import Session
from stagetrace.instrument.records import HEADER_SIZE, SLOT_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
SMALLEST = HEADER_SIZE + 2 * 1024 * SLOT_SIZE
# What an engine does: it opens the recorder, and works on whatever comes of it. Enough for some laps of a small ring.
WORKS = """
import sys
from stagetrace.instrument.recorder import RECORDER
print(RECORDER.open(sys.argv[1], {}), flush=True)
for number in range(20_000):
    RECORDER.segment(1 | 1 << 16 | 5 << 32, number, number, 1, 1)
    RECORDER.text(number, 1, "a request")
print("worked", flush=True)
"""


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with commands_in(tmp_path) as commands:
        yield commands


def works(commands: Commands, role: str) -> tuple[str, str]:
    process = commands.start(sys.executable, "-c", WORKS, role, session=commands.directory / "session")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err.decode()
    opened, worked = out.decode().split()
    assert worked == "worked"
    return opened, err.decode()


def test_without_room_nothing_is_recorded_and_the_reason_is_said(commands: Commands) -> None:
    with mounted(commands.rings, "128k"):
        opened, said = works(commands, "engine_core")
        assert opened == "False"
        assert "stagetrace records nothing in this process (engine_core" in said
        assert "enlarge /dev/shm" in said
        assert "Traceback" not in said
        assert commands.ring_files() == []


def test_with_little_room_rings_are_small_and_the_next_process_has_none(commands: Commands) -> None:
    """Reserved before it is used: a full file system is an error at the start, and never a SIGBUS in the engine."""
    path = commands.directory / "session"
    with mounted(commands.rings, f"{SMALLEST + 32 * 1024}"):
        collector = commands.collect(path)
        wait_for((path / "manifest.json").exists)
        collector.send_signal(signal.SIGSTOP)
        assert works(commands, "engine_core")[0] == "True"
        assert works(commands, "worker")[0] == "False"
        (ring,) = commands.ring_files()
        assert ring.stat().st_size == SMALLEST
        collector.send_signal(signal.SIGCONT)
        wait_for(lambda: not commands.ring_files())
        assert works(commands, "worker")[0] == "True"  # there is room again
        wait_for(lambda: not commands.ring_files())
        collector.terminate()
        assert collector.wait(PATIENCE_S) == 0
    manifest = Session.open(path).read_manifest()
    assert [process.role for process in manifest.processes] == ["engine_core", "worker"]
    for losses in manifest.losses:
        if losses.ring == "detail":
            assert losses.read + losses.overwritten == 20_000
