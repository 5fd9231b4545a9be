"""Switches what a running server records: one word in every ring's header, seen by the engine at its next hook.

No process is signalled and nothing in the engine listens. What was switched when is noted in the session, so that the
assembly knows which steps and requests the switch cut.
"""

from __future__ import annotations

import json
import logging
import mmap
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from stagetrace.instrument import records
from stagetrace.instrument.levels import LEVEL_FILE, session_level
from stagetrace.instrument.stages import Level

from .discover import Discovery
from .session import Session, replace

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

SWITCHES = "switches.jsonl"


@dataclass(frozen=True)
class Switch:
    """One change of the level of a session, at some time in [begin_ns, end_ns] of the monotonic clock."""

    begin_ns: int
    end_ns: int
    before: Level
    after: Level

    def crosses(self, level: Level) -> bool:
        """Whether recording of what begins at `level` was switched on or off."""
        return (self.before >= level) != (self.after >= level)


@dataclass(frozen=True)
class Switched:
    """One process whose level was switched. `beyond` is what it cannot record: it was started without those hooks."""

    role: str
    pid: int
    before: Level
    after: Level
    maximum: Level

    @property
    def beyond(self) -> bool:
        """Whether it was started without the hooks of the new level."""
        return self.after > self.maximum


def current_level(session: Session) -> Level:
    """What the session records at: its living processes say so, whose environment is not ours; else its directory."""
    levels = [Level.OFF]
    for reader in Discovery(session.identity.session).look():
        try:
            if reader.alive():
                levels.append(reader.level)
        finally:
            reader.close()
    return max(levels) if len(levels) > 1 else session_level(session.path)


def set_level(session: Session, level: Level) -> list[Switched]:
    """Switches every living process of a session, and those that start later, to `level`; says which were switched."""
    before = current_level(session)
    begin = time.monotonic_ns()
    # First for processes that start now: they read the file once more when their ring is in place.
    replace(session.path / LEVEL_FILE, f"{level.name.lower()}\n".encode())
    switched = []
    for reader in Discovery(session.identity.session).look():
        try:
            if reader.alive():
                before_it = reader.level
                _write_level(reader.path, level)
                switched.append(Switched(reader.role, reader.pid, before_it, level, reader.maximum))
        except (OSError, ValueError) as error:  # its process has just ended, and the collector has removed the ring
            log.info("%s was not switched: %s", reader.path, error)
        finally:
            reader.close()
    switch = Switch(begin, time.monotonic_ns(), before, level)
    line = {
        "begin_ns": switch.begin_ns,
        "end_ns": switch.end_ns,
        "before": before.name.lower(),
        "after": level.name.lower(),
    }
    with open(session.path / SWITCHES, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return switched


def _write_level(ring: Path, level: Level) -> None:
    with open(ring, "r+b") as file, mmap.mmap(file.fileno(), records.HEADER_SIZE) as header:
        epoch = memoryview(header)[records.EPOCH_OFFSET :][:4].cast("I")
        epoch[0] = (epoch[0] + 1) & 0xFFFFFFFF
        epoch.release()
        header[records.LEVEL_OFFSET] = level


def read_switches(session: Session) -> list[Switch]:
    """The switches of a session so far, oldest first. A line that is not whole is left out (and logged)."""
    path = session.path / SWITCHES
    try:
        text = path.read_text("utf-8", "replace")
    except FileNotFoundError:
        return []
    lines = text.splitlines()
    found = [switch for line in lines if (switch := _parse(line)) is not None]
    if len(found) < len(lines):
        _complain(path, len(lines) - len(found))
    return found


def _parse(line: str) -> Switch | None:
    try:
        data = json.loads(line)
        before, after = (Level[str(data[name]).upper()] for name in ("before", "after"))
        switch = Switch(int(data["begin_ns"]), int(data["end_ns"]), before, after)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return switch if 0 <= switch.begin_ns <= switch.end_ns < 1 << 63 else None


@cache  # the collector reads the file at every commit
def _complain(path: Path, count: int) -> None:
    log.warning("%s has %d lines that are no switch: what they cut is not marked as partial", path, count)
