"""Starts stagetrace's commands and their children in tests; whatever a test started has ended when it is over."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STAGETRACE = Path(sys.executable).with_name("stagetrace")
RECORDING = Path(__file__).with_name("recording.py")
PATIENCE_S = 20.0
# `stagetrace` with a collector that commits ten times as often as it does for users, so that tests need not wait.
_HASTY = (
    "from stagetrace.exporters import collector; collector.COMMIT_S = 0.2; import stagetrace.cli.main as m; m.main()"
)
_NOT_INHERITED = ("STAGETRACE_", "OTEL_", "VLLM_", "SGLANG_", "PYTHON")


class Commands:
    """The processes of one test, in a directory of its own, with rings of its own."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.rings = directory / "rings"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)},
            "STAGETRACE_RING_DIR": str(self.rings),
            "COLUMNS": "120",
        }
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str | Path, session: Path | None = None, **more: object) -> subprocess.Popen[bytes]:
        """Starts a command; `session` arms it. Its output goes to pipes unless `more` (Popen's own) says otherwise."""
        armed = {"STAGETRACE_SESSION": str(session)} if session else {}
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        environment = {**self.environment, **armed}
        process = subprocess.Popen(  # type: ignore[call-overload]
            [str(argument) for argument in arguments], **{"cwd": self.directory, "env": environment, **options}
        )
        self._started.append(process)
        return process  # type: ignore[no-any-return]

    def recording(self, *arguments: str | Path, session: Path) -> subprocess.Popen[bytes]:
        """Starts an instrumented process that records into `session` (see recording.py)."""
        return self.start(sys.executable, RECORDING, *arguments, session=session)

    def collect(self, session: Path, *options: str, log: Path | None = None) -> subprocess.Popen[bytes]:
        """Starts `stagetrace collect`; its log goes to a file, by default beside the session."""
        with open(log or session.with_suffix(".log"), "ab") as file:
            return self.start(sys.executable, "-c", _HASTY, "collect", session, *options, stdout=file, stderr=file)

    def ring_files(self) -> list[Path]:
        """Every file under the ring directory, rings or not."""
        return [path for path in self.rings.rglob("*") if path.is_file()]

    def alive(self) -> list[psutil.Process]:
        """The processes that belong to this test: those whose command line or session variable names its directory."""
        return [one for one in psutil.process_iter() if one.pid != os.getpid() and self._owns(one)]

    def _owns(self, process: psutil.Process) -> bool:
        try:
            words = [*process.cmdline(), process.environ().get("STAGETRACE_RING_DIR", "")]
            return process.status() != psutil.STATUS_ZOMBIE and any(str(self.directory) in word for word in words)
        except psutil.Error:
            return False

    def end(self) -> list[str]:
        """Ends what still runs; names it."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()
        try:
            wait_for(lambda: not self.alive(), 10.0)
        except TimeoutError:
            pass
        left = []
        for one in self.alive():
            try:
                left.append(" ".join(one.cmdline()))
                one.kill()
            except psutil.Error:
                continue  # it ended meanwhile
        return left


@contextmanager
def commands_in(directory: Path) -> Iterator[Commands]:
    """Commands for one test. An AssertionError when it leaves a process, or a ring, that it did not remove itself."""
    commands = Commands(directory)
    try:
        yield commands
    finally:
        left = commands.end()
    assert left == []
    assert commands.ring_files() == []


def wait_for(condition: Callable[[], object], patience_s: float = PATIENCE_S, what: str = "") -> None:
    """Polls until the condition holds. Raises TimeoutError when it does not in time."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what or "the condition did not come true")
        time.sleep(0.02)


def said(process: subprocess.Popen[bytes]) -> str:
    """The next line that the process prints on its standard output."""
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()
