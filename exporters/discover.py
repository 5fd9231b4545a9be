"""Finds the rings of a session, old and new, and sorts out files that are none."""

from __future__ import annotations

import logging
from hashlib import blake2b
from typing import TYPE_CHECKING

from stagetrace.instrument.ring import ring_directory

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
        self.directory = ring_directory(session)
        self._known: set[str] = set()

    def look(self) -> list[RingReader]:
        """Readers of the rings that appeared since the last look. A file that is no ring is logged once and left."""
        found = []
        for path in sorted(self.directory.glob("*.ring")):
            if path.name in self._known:
                continue
            self._known.add(path.name)
            try:
                found.append(RingReader(path, process_key(path.name)))
            except (NotARing, OSError) as error:
                log.warning("%s", error)
        return found

    def remove(self, path: Path) -> None:
        """Unlinks a ring whose process is dead and whose last records are in the session."""
        path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Removes the directory once it is empty."""
        try:
            self.directory.rmdir()
        except OSError:
            return  # rings of processes that still run
