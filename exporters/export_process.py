"""The export as a process beside the collector: a backend that hangs, or a client library that fails, is its alone."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from .background import STOP

if TYPE_CHECKING:
    from .session import Session

log = logging.getLogger(__name__)

FLUSH_S = 1.2  # after the end of the session: what the backend has not taken by then waits in the session
POINTLESS = 2  # exit status of an export that would fail again
_PAUSES_S = (1.0, 60.0)  # before a dead one is started again: the first pause, doubled up to the second


class ExportProcess:
    """Sends the session of a collector to where the OTEL_* variables say, and is started again when it dies."""

    def __init__(self, session: Session, *options: str):
        self._session = session
        self._options = options
        self._pause_s = _PAUSES_S[0]
        self._start_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self.tend()

    def tend(self) -> None:
        """Starts the process, unless it runs, or died just now, or would fail again."""
        process = self._process
        if process is not None:
            status = process.poll()
            if status is None or status == POINTLESS:
                return
            if not self._start_at:
                log.error("the export ended (exit status %d); it is started again in %.0f s", status, self._pause_s)
                self._start_at = time.monotonic() + self._pause_s
                self._pause_s = min(self._pause_s * 2, _PAUSES_S[1])
            if time.monotonic() < self._start_at:
                return
        self._start_at = 0.0
        # -P: modules of the user's directory are none of ours. What it logs goes where the collector's log goes.
        arguments = [
            sys.executable,
            "-P",
            "-m",
            "stagetrace.cli.main",
            "follow",
            str(self._session.path),
            *self._options,
        ]
        self._process = subprocess.Popen(arguments, stdin=subprocess.PIPE)

    def tell(self) -> None:
        """Tells it that the session has ended."""
        if self._process is None or self._process.stdin is None or self._process.stdin.closed:
            return
        try:
            self._process.stdin.write(STOP)
            self._process.stdin.close()
        except OSError:
            pass  # it is gone

    def stop(self) -> None:
        """Lets it send what the session has; what takes longer than FLUSH_S waits there. It never stands in the way."""
        self.tell()
        process = self._process
        if process is None:
            return
        try:
            process.wait(FLUSH_S)
        except subprocess.TimeoutExpired:
            log.warning("not all spans were sent by the end; `stagetrace export %s` sends the rest", self._session.path)
            process.kill()
            process.wait()


class ExportProcesses:
    """Several of them: that of a trace backend, and that of the scrape endpoint."""

    def __init__(self, *processes: ExportProcess):
        self._processes = processes

    def tend(self) -> None:
        """As ExportProcess.tend."""
        for process in self._processes:
            process.tend()

    def stop(self) -> None:
        """As ExportProcess.stop, at the same time."""
        for process in self._processes:
            process.tell()
        for process in self._processes:
            process.stop()
