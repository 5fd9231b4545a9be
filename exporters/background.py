"""The collector as a process beside the command: started, told to stop, waited for."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .session import Session

STOP = b"stop"
_FLUSH_S = 30.0  # how long the collector may take to write what it holds


class Background:
    """A collector in a process of its own, out of reach of the terminal's signals.

    Its standard input is a pipe from here. It stops when told so; when the pipe breaks because this process was
    killed, it goes on as long as there are engines to collect from.
    """

    def __init__(self, session: Session, level: str, command: list[str]):
        self.session = session
        # -P: modules of the user's directory are none of the collector's.
        arguments = [sys.executable, "-P", "-m", "stagetrace.cli.main", "collect", str(session.path), "--beside"]
        with open(session.log, "ab") as log:
            self.process = subprocess.Popen(
                [*arguments, "--level", level, "--", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> str | None:
        """Has it write what it holds and waits for its end. Returns what went wrong, if something did."""
        early = self.process.poll()
        if early is not None:
            return (
                f"the collector ended before the command did (exit status {early}); its log: {self.session.log}."
                f" To save what it left in the rings: stagetrace collect {self.session.path} (Ctrl-C ends it)"
            )
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(STOP)
            self.process.stdin.close()
            status = self.process.wait(_FLUSH_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"the collector took more than {_FLUSH_S:.0f} s to flush and was ended; its log: {self.session.log}"
        except BrokenPipeError:
            status = self.process.wait()
        return f"the collector failed (exit status {status}); its log: {self.session.log}" if status else None


def stop_when_told(alive: Callable[[], bool], patience_s: float = 2.0) -> Callable[[], bool]:
    """For the collector's side: whether to stop. Told so, it waits `patience_s` at most for the engines to be gone."""
    told_at: list[float] = []
    orphaned: list[float] = []

    def should_stop() -> bool:
        if not told_at and not orphaned:
            ready, _, _ = select.select([0], [], [], 0)
            if ready:
                (told_at if os.read(0, len(STOP)) else orphaned).append(time.monotonic())
        if told_at:
            return not alive() or time.monotonic() - told_at[0] > patience_s
        return bool(orphaned) and not alive()

    return should_stop


def stop_at_signal() -> Callable[[], bool]:
    """Whether SIGTERM or SIGINT came."""
    came: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signo, _: came.append(signo))
    return lambda: bool(came)
