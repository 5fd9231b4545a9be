"""Finds the rings of a session, old and new, and sorts out files that are none."""

from __future__ import annotations

import logging
from hashlib import blake2b
from typing import TYPE_CHECKING

from stagetrace.instrument.ring import SESSION_LINK, ring_directories

from .drain import NotARing, RingReader

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)


def process_key(ring: str) -> int:
    """What names a process in the tables: 63 bits of a hash of its ring's file name."""
    return int.from_bytes(blake2b(ring.encode(), digest_size=8).digest(), "little") >> 1


class Discovery:
    """The rings of one session, as they appear."""

    def __init__(self, session: str):
        self._session = session
        self._known: set[Path] = set()

    def look(self) -> list[RingReader]:
        """Readers of the rings that appeared since the last look. A file that is no ring is logged once and left."""
        found = []
        for path in self.paths():
            if path in self._known:
                continue
            self._known.add(path)
            try:
                found.append(RingReader(path, process_key(path.name)))
            except (NotARing, OSError) as error:
                log.warning("%s", error)
        return found

    def paths(self) -> list[Path]:
        """The rings that are in place, by name. A directory that another user keeps private is named once."""
        found = []
        for directory in ring_directories(self._session):
            try:
                found += sorted(directory.glob("*.ring"))
            except PermissionError as error:
                if directory not in self._known:
                    self._known.add(directory)
                    log.error("%s: set STAGETRACE_GROUP to a group of engine and collector for both", error)
        return found

    def remove(self, path: Path) -> None:
        """Unlinks a ring whose process is dead and whose last records are in the session."""
        path.unlink(missing_ok=True)
        self._known.discard(path)

    def tidy(self) -> None:
        """Removes the directories that have no ring any longer."""
        for directory in ring_directories(self._session):
            remove_directory(directory)


def remove_directory(directory: Path) -> None:
    """Removes a directory of rings, unless there are rings in it: of processes that still run, or start just now."""
    try:
        left = {path.name for path in directory.iterdir()}
        if left <= {SESSION_LINK}:
            for name in left:
                (directory / name).unlink(missing_ok=True)
            directory.rmdir()
    except OSError:
        return
