"""What dead sessions left in shared memory: saved into their session where that is still there, else removed.

A ring outlives its process so that nothing is lost. When the collector died too, and nobody started another, the
rings of such a session lie in memory until somebody looks: every new collector does, once.
"""

from __future__ import annotations

import fcntl
import logging
import time
from typing import TYPE_CHECKING

from stagetrace.instrument.identity import read_identity
from stagetrace.instrument.ring import SESSION_LINK, ring_directory

from .collector import Collector
from .discover import remove_directory
from .session import Session, SessionError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

STALE_S = 60.0  # a file that changed later may belong to a process that starts just now
GONE_S = 3600.0  # how long the rings of a session that is not there are kept: it may be out of sight for a while
_MOST = 16  # sessions that are saved at one time


def sweep(session: str) -> None:
    """Looks after the dead rings that lie beside those of `session`, which is left alone. Never raises."""
    for directory in list(_dead(ring_directory(session).parent, session))[:_MOST]:
        try:
            _settle(directory)
        except (OSError, SessionError) as error:
            log.warning("the rings of a dead session in %s could not be saved: %s", directory, error)
        except Exception:
            log.exception("the rings of a dead session in %s could not be saved", directory)


def _dead(root: Path, but: str) -> Iterator[Path]:
    """The directories of rings of which no process lives and none changed of late."""
    try:
        directories = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name != but]
    except OSError:
        return
    for directory in directories:
        try:
            files = [path for path in directory.iterdir() if path.suffix in (".ring", ".partial")]
            if all(_age_s(path) > STALE_S and not _is_held(path) for path in files) and _age_s(directory) > STALE_S:
                yield directory
        except OSError:
            continue  # another user's, or gone meanwhile


def _settle(directory: Path) -> None:
    for partial in directory.glob("*.partial"):  # its process died while it made the ring
        partial.unlink(missing_ok=True)
    rings = list(directory.glob("*.ring"))
    if not rings:
        remove_directory(directory)
        return
    link = directory / SESSION_LINK
    path = link.readlink() if link.is_symlink() else None
    identity = read_identity(path) if path is not None else None
    if path is not None and identity is not None and identity.session == directory.name:
        collector = Collector(Session(path, identity))
        if collector.finish():
            log.warning("saved what dead processes had left in %d rings into %s", len(rings), path)
    elif all(_age_s(ring) > GONE_S for ring in rings):
        for ring in rings:
            ring.unlink(missing_ok=True)
        remove_directory(directory)
        log.warning("removed %d rings of dead processes, whose session %s is gone", len(rings), path or directory.name)


def _age_s(path: Path) -> float:
    status = path.stat()
    return time.time() - max(status.st_mtime, status.st_ctime)


def _is_held(path: Path) -> bool:
    """Whether a living process holds the lock of a ring."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
