"""The collector as a process beside the command: started, started again when it dies, told to stop, waited for."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .session import Session

log = logging.getLogger(__name__)

STOP = b"stop\n"
FLUSH_S = 2.0  # after the command's end: how long the collector may delay the end of `run`
ENGINES_S = 0.5  # of it, for engine processes that end after the command
REPORT_S = 30.0  # how long a report waits for a collector that still writes
_PAUSES_S = (1.0, 60.0)  # before a dead collector is started again: the first pause, doubled up to the second


class Background:
    """A collector in a process of its own, out of reach of the terminal's signals.

    Its standard input is a pipe from here. It stops when told so; when the pipe breaks because this process was
    killed, it goes on as long as the command lives or there are engines to collect from.
    """

    def __init__(self, session: Session, arguments: list[str], command: list[str], say: Callable[[str], None]):
        self._session = session
        self._arguments = [*arguments, "--", *command]
        self._say = say
        self._pid = 0
        self._pause_s = _PAUSES_S[0]
        self._start_at = 0.0  # when a dead one is started again; 0: it runs
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def _start(self) -> None:
        # -P: modules of the user's directory are none of the collector's.
        start = [sys.executable, "-P", "-m", "stagetrace.cli.main", "collect", str(self._session.path), "--beside"]
        try:
            with open(self._session.log, "ab") as log_file:
                self._process = subprocess.Popen(
                    [*start, *self._arguments],
                    stdin=subprocess.PIPE,
                    stdout=log_file,
                    stderr=log_file,
                    start_new_session=True,
                )
        except OSError as error:
            self._process = None
            self._later(f"cannot be started ({error})")
            return
        self._start_at = 0.0
        if self._pid:
            self.started(self._pid)

    def started(self, pid: int) -> None:
        """Tells the collector which process the command is."""
        self._pid = pid
        self._tell(b"pid %d\n" % pid)

    def _tell(self, words: bytes) -> None:
        if self._process is None or self._process.stdin is None:
            return
        try:
            self._process.stdin.write(words)
            self._process.stdin.flush()
        except OSError:
            pass  # it is dead: tend() sees it

    def tend(self) -> None:
        """Starts the collector again when it is dead; what it left in the rings waits there. Says so each time."""
        if self._process is not None and not self._start_at:
            if (status := self._process.poll()) is None:
                return
            self._later(f"was ended by signal {-status}" if status < 0 else f"ended (exit status {status})")
        if time.monotonic() >= self._start_at:
            self._start()

    def _later(self, what: str) -> None:
        self._start_at = time.monotonic() + self._pause_s
        self._say(
            f"the collector {what}; the command goes on, and it is started again in {self._pause_s:.0f} s."
            f" Its log: {self._session.log}"
        )
        self._pause_s = min(self._pause_s * 2, _PAUSES_S[1])

    def stop(self, wait_longer: bool) -> str | None:
        """Has it write what it holds; returns what the user should know, if there is something.

        Waits FLUSH_S at most, or `wait_longer` for a report; a collector that needs more goes on by itself.
        """
        began = time.monotonic()
        if self._process is None or self._process.poll() is not None:  # what is in the rings is still to be saved
            self._start()
        process = self._process
        if process is None or process.stdin is None:
            return f"no collector could be started. {self._how_to_save()}"
        self._tell(STOP)
        try:
            process.stdin.close()
        except OSError:
            pass
        try:
            status = process.wait((REPORT_S if wait_longer else FLUSH_S) - (time.monotonic() - began))
        except subprocess.TimeoutExpired:
            return f"the collector still writes and goes on by itself; its log: {self._session.log}"
        return f"the collector failed (exit status {status}). {self._how_to_save()}" if status else None

    def _how_to_save(self) -> str:
        return (
            f"Its log: {self._session.log}. To save what it left in the rings: stagetrace collect {self._session.path}"
            " (Ctrl-C ends it)"
        )


class Orders:
    """For the process beside: what the one that started it says on standard input."""

    def __init__(self) -> None:
        self.told_at: float | None = None  # when it was told to stop
        self.orphaned = False  # the one that started it is gone, without a word
        self._command = ""  # the command's process, with its time of start
        self._said = b""

    def look(self) -> None:
        """Takes in what was said since the last look."""
        while not self.orphaned and self.told_at is None and select.select([0], [], [], 0)[0]:
            words = os.read(0, 4096)
            if not words:
                self.orphaned = True
            self._said += words
            *lines, self._said = self._said.split(b"\n")
            for line in lines:
                if line == STOP.strip():
                    self.told_at = time.monotonic()
                elif line.startswith(b"pid "):
                    self._command = _who(int(line[4:]))

    def overdue(self, patience_s: float) -> bool:
        """Whether it was told to stop more than so many seconds ago."""
        return self.told_at is not None and time.monotonic() - self.told_at > patience_s

    def command_lives(self) -> bool:
        """Whether the command, whose parent may be gone, still runs."""
        return bool(self._command) and _who(int(self._command.split()[0])) == self._command


def _who(pid: int) -> str:
    """A process, told from a later one with its id; empty when there is none, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{pid} {fields[19]}"


def stop_when_told(alive: Callable[[], bool]) -> Callable[[], bool]:
    """For the collector's side: whether to stop. Told so, it waits a moment for the engines to be gone."""
    orders = Orders()

    def should_stop() -> bool:
        orders.look()
        if orders.told_at is not None:
            return not alive() or orders.overdue(ENGINES_S)
        return orders.orphaned and not alive() and not orders.command_lives()

    return should_stop


def stop_at_signal(interrupted: bool = False) -> Callable[[], bool]:
    """Whether SIGTERM or SIGINT came. Where it may be `interrupted`, a second one raises KeyboardInterrupt."""
    came: list[int] = []

    def note(number: int, _: object) -> None:
        if came and interrupted:
            raise KeyboardInterrupt
        came.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return lambda: bool(came)
