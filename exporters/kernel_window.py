"""Opens a kernel window on a running server, waits for its ranks, and puts the level back.

The ranks do the profiling (adapters/kernel_window.py); both meet in a folder (instrument/kernel_request.py).
"""

from __future__ import annotations

import fcntl
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stagetrace.instrument.kernel_request import KERNEL_DIRECTORY, KernelRequest, withdraw
from stagetrace.instrument.stages import Level

from .control import current_level, set_level
from .discover import Discovery

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .session import Session

_POLL_S = 0.1
_OTHERS_S = 3.0  # after one rank has begun: how long others have to begin as well
_CLOSING_S = 300.0  # after a window's own seconds: to stop the profiler and to write what it saw


class WindowFailed(Exception):
    """No rank has profiled anything; the message says why and what to do."""


class WindowInterrupted(WindowFailed):
    """Whoever waited for the window does so no longer; the message says what becomes of it."""


@dataclass(frozen=True)
class RankWindow:
    """What one rank said of a window: `ended` says why it ended ("all steps", "time", "memory", ..., "failed: ...")."""

    pid: int
    rank: int
    ended: str
    steps: int
    held_ns: int  # for how long the engine waited for the profiler to start and to write

    @property
    def profiled(self) -> bool:
        """Whether there is a trace of it."""
        return self.steps > 0 and not self.ended.startswith("failed")


def open_window(
    session: Session,
    steps: int,
    seconds: float,
    megabytes: int,
    wait_s: float,
    say: Callable[[str], None],
) -> tuple[int, list[RankWindow]]:
    """Profiles `steps` steps of every rank; returns the window's number, and what each rank said. Waits for it.

    `seconds` and `megabytes` bound a window; `wait_s` is how long to wait for a first step. Raises WindowFailed,
    SessionError, OSError; ValueError for bounds that make no sense. A KeyboardInterrupt becomes WindowInterrupted: the
    level is put back, at which ranks that profile end their window by themselves.
    """
    KernelRequest(1, steps, seconds, megabytes)  # refused before anything is written
    with _only_one(session.path / KERNEL_DIRECTORY) as folder:
        number = 1 + max((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=0)
        request = KernelRequest(number, steps, seconds, megabytes)
        before = current_level(session)
        if not _alive(session):
            raise WindowFailed(f"no process of {session.path} is running: a window needs a server that is recorded")
        try:
            request.write(session.path)
            set_level(session, Level.KERNEL)
            said = _wait(session, request, wait_s, say)
        except KeyboardInterrupt:
            place = request.folder(session.path)
            ranks = len([*place.glob("*.begun")])
            became = (
                f"the {ranks} ranks in it end it after the step that they are in, and what they saw is then in {place}"
                f" and in `stagetrace report {session.path}`"
                if ranks
                else "no rank had begun, and none will"
            )
            raise WindowInterrupted(
                f"interrupted: window {number} is closed and the server records at level {before.name.lower()} again;"
                f" {became}"
            ) from None
        finally:
            withdraw(session.path)
            set_level(session, before)
        return number, said


@contextmanager
def _only_one(folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WindowFailed(f"another window is open on {folder.parent}: wait for it to end") from error
        yield folder


def _wait(session: Session, request: KernelRequest, wait_s: float, say: Callable[[str], None]) -> list[RankWindow]:
    folder = request.folder(session.path)
    began = time.monotonic()
    first = 0.0
    say(f"kernel window {request.number}: waiting for a step")
    while True:
        time.sleep(_POLL_S)
        now = time.monotonic()
        alive = _alive(session)
        said = read_results(folder)
        begun = {int(path.stem) for path in folder.glob("*.begun")}
        if (begun or said) and not first:
            first = now
            say(f"kernel window {request.number}: profiling {request.steps} steps")
        if not first and now - began > wait_s:
            raise WindowFailed(
                f"no rank ran a step in {wait_s:g} s: send the server requests while the window is open (--wait S to"
                " wait longer). A server that was started by an older stagetrace knows no windows"
            )
        missing = begun - {each.pid for each in said}
        if not alive and (missing or not first):
            raise WindowFailed(f"the server ended in the window; what it had recorded before is in {session.path}")
        dead = missing - alive
        if first and not missing - dead and now - first > (_OTHERS_S if len(alive) > 1 else 0):
            break
        if first and now - first > request.seconds + _CLOSING_S:
            say(f"{len(missing)} ranks have not ended their window (pid {', '.join(map(str, sorted(missing)))})")
            break
    for pid in sorted(dead):
        say(f"the rank with pid {pid} ended in the window: nothing of it was profiled")
    if not any(each.profiled for each in said):
        reasons = "; ".join(sorted({each.ended for each in said})) or "its ranks ended"
        if "profiler in use" in reasons:
            reasons = "the engine's own profiler is running: stop it first (POST /stop_profile), it was left alone"
        raise WindowFailed(f"nothing was profiled: {reasons}")
    return said


def read_results(folder: Path) -> list[RankWindow]:
    """What the ranks of a window have said so far, by pid. A file that cannot be read is left out."""
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".trace.json"):
            continue
        try:
            data = json.loads(path.read_text("utf-8"))
            found.append(
                RankWindow(
                    int(path.stem),
                    int(data["rank"]),
                    str(data["ended"]),
                    len(data.get("steps", ())),
                    int(data.get("held_ns", 0)),
                )
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _alive(session: Session) -> set[int]:
    pids = set()
    for reader in Discovery(session.identity.session).look():
        try:
            if reader.alive():
                pids.add(reader.pid)
        finally:
            reader.close()
    return pids
