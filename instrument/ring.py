"""A process's ring file: made, mapped and locked here; the file outlives the process, so its last records do too.

One file holds the header page, the control ring and the detail ring (records.py has the format). The process holds
an exclusive lock on the file for life: who can take the lock knows that the process is dead, across pid namespaces too.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import socket
import time
from pathlib import Path

from . import records
from .sharing import share, trusted
from .stages import Level

# What 20 seconds of a fast engine need at step level: 300 steps a second of 11 slots each; 50 requests a second of 16.
SECONDS = 20.0
CONTROL_SLOTS = 16 * 1024
DETAIL_SLOTS = 64 * 1024
_LAYER_FACTOR = 8  # layer level writes far more; its ring is bounded rather than as long in seconds
_SMALLEST = 1024
_LARGEST = 1 << 20  # 128 MiB
SESSION_LINK = "session"  # in the directory of its rings: who cleans up after dead processes finds the session by it
_NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG)  # EFBIG: the limit of `ulimit -f`


class NoRoom(OSError):
    """There is no room for a ring of the smallest size."""


def ring_directory(session: str) -> Path:
    """Where the rings of a session lie: STAGETRACE_RING_DIR, else a directory of the user's in /dev/shm."""
    root = os.environ.get("STAGETRACE_RING_DIR")
    return Path(root or f"/dev/shm/stagetrace-{os.getuid()}") / session


def ring_directories(session: str) -> list[Path]:
    """Where the rings of a session can be: `ring_directory`, and those of other users where none was named.

    Whether this user may read those is another matter: root may, and members of their group (sharing.py).
    """
    own = ring_directory(session)
    if os.environ.get("STAGETRACE_RING_DIR"):
        return [own]
    return [own, *(path for path in sorted(Path("/dev/shm").glob(f"stagetrace-*/{session}")) if path != own)]


def make_ring_directory(session: str, of: Path) -> Path:
    """The directory of a session's rings, made if need be, private to the user (or group), with a link to the session.

    Raises OSError when it cannot be made, and PermissionError when somebody else owns it or may write into it.
    """
    directory = ring_directory(session)
    for part in (directory.parent, directory):
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
        share(part)
    # A root that the user named may be shared; whoever owns the default one could put another directory in place.
    for part in (directory,) if os.environ.get("STAGETRACE_RING_DIR") else (directory.parent, directory):
        if not trusted(part):
            raise PermissionError(
                f"{part} belongs to another user or is open to all: set STAGETRACE_RING_DIR, or STAGETRACE_GROUP to a"
                " group of both users"
            )
    try:
        (directory / SESSION_LINK).symlink_to(of.resolve())
    except FileExistsError:
        pass
    return directory


def chosen_slots(maximum: int) -> tuple[int, int]:
    """Slots of the control and the detail ring, powers of two, of a process with hooks up to level `maximum`.

    STAGETRACE_RING_SECONDS says for how long the collector may stand still before records are lost, at an engine's
    highest usual rate; `stagetrace doctor` and `top` show what that is at the rate observed.
    """
    try:
        seconds = float(os.environ.get("STAGETRACE_RING_SECONDS") or SECONDS)
    except ValueError:
        seconds = SECONDS
    scale = seconds / SECONDS if 0 < seconds < float("inf") else 1.0
    detail = DETAIL_SLOTS * (_LAYER_FACTOR if maximum >= Level.LAYER else 1)
    return _power_of_two(CONTROL_SLOTS * scale), _power_of_two(detail * scale)


def _power_of_two(slots: float) -> int:
    """The next power of two within bounds."""
    return 1 << (math.ceil(min(max(slots, _SMALLEST), _LARGEST)) - 1).bit_length()


class Ring:
    """The writer's side of a ring file, for the process that made it."""

    def __init__(self, path: Path, lock: int, memory: mmap.mmap, control_slots: int, detail_slots: int):
        self.path = path
        self.lock = lock  # a descriptor: while it is open somewhere, the process lives
        self.memory = memory
        self.control_slots = control_slots
        self.detail_slots = detail_slots

    @classmethod
    def create(cls, session: str, of: Path, role: str, level: int, maximum: int) -> Ring:
        """A ring for this process, in place, locked, with all its memory reserved and touched.

        `session` is the session's id, `of` its directory. Where there is little room the ring is smaller. Raises NoRoom
        when not even the smallest fits, other OSErrors as they come.
        """
        directory = make_ring_directory(session, of)
        control, detail = chosen_slots(maximum)
        while True:
            try:
                return cls._create(directory, session, role, level, maximum, control, detail)
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                if control == detail == _SMALLEST:
                    raise NoRoom(error.errno, f"no room for a ring in {directory}: enlarge /dev/shm") from error
                control, detail = max(control // 4, _SMALLEST), max(detail // 4, _SMALLEST)

    @classmethod
    def _create(
        cls, directory: Path, session: str, role: str, level: int, maximum: int, control: int, detail: int
    ) -> Ring:
        size = records.HEADER_SIZE + (control + detail) * records.SLOT_SIZE
        started = time.monotonic_ns()
        final = directory / f"{role}-{os.getpid()}-{started}.ring"
        partial = final.with_suffix(".partial")
        mapped = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        lock = -1
        try:
            # The lock has an opening of its own: a map keeps a duplicate of what it was made from, and in a forked
            # child a frame of a thread that was recording, and is not there any more, may keep the map.
            lock = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Reserved, not only sized: a full file system fails here, and never as a SIGBUS when a page is touched.
            os.posix_fallocate(mapped, 0, size)
            memory = mmap.mmap(mapped, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            records.HEADER.pack_into(
                memory,
                0,
                records.MAGIC,
                records.VERSION,
                records.SLOT_SIZE,
                control,
                detail,
                os.getpid(),
                started,
                time.time_ns(),
                maximum,
                role.encode()[:32],
                session.encode()[:32],
                socket.gethostname().encode()[:64],
            )
            memory[records.LEVEL_OFFSET] = level
            share(partial)
            partial.rename(final)
        except BaseException:
            if lock >= 0:
                os.close(lock)
            partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(mapped)
        return cls(final, lock, memory, control, detail)
