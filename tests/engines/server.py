"""Starts a real vLLM or SGLang server for a test, waits until it is ready, and ends it and everything that it left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from quickstart.servers import (
    HOST,
    MODEL_NAME,
    START_TIMEOUT_S,
    VLLM,
    Engine,
    StartError,
    free_port,
    tail,
    wait_until_healthy,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# What the developer's shell may hold and a server under test must not inherit by accident.
NOT_INHERITED = ("VLLM_", "SGLANG_", "STAGETRACE_", "OTEL_", "PYTHON", "VIRTUAL_ENV")
END_TIMEOUT_S = 60.0
SHARED_MEMORY = "/dev/shm/"
# What the engines themselves leave, without stagetrace too: the memory of vLLM's all_reduce on the CPU, which 0.32.0
# under tensor parallel never unlinks; of SGLang, which ends its processes by SIGKILL, its load and its ranks' queue.
ENGINES_OWN = re.compile(r"/dev/shm/(vllm_dist_.*-cpushm_\d+|sglang_loads_\w+\.shm|sgl_shm_mq_\w+)")

LIVE: list[Server] = []


@dataclass
class Server:
    """A running server. `process` is the leader of its process group: the wrapper if there is one, else the server."""

    base_url: str  # with /v1, as OpenAI's client wants it
    process: subprocess.Popen[bytes]
    log: Path
    ready_s: float = 0.0  # from the start until /health answered
    model: str = MODEL_NAME  # its name in requests

    @property
    def root_url(self) -> str:
        """The address without /v1, for /health and /metrics."""
        return self.base_url.removesuffix("/v1")

    def processes(self) -> list[psutil.Process]:
        """The process, its descendants and what else is in its session; none once its end was noticed."""
        if self.process.returncode is not None:
            return []  # its id may by now be somebody else's
        found = []
        descendants = {
            self.process.pid,
            *(one.pid for one in psutil.Process(self.process.pid).children(recursive=True)),
        }
        for one in psutil.process_iter():
            try:
                if one.pid in descendants or os.getsid(one.pid) == self.process.pid:
                    found.append(one)
            except ProcessLookupError:
                continue
        return found


@contextmanager
def serve(
    model: Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    wrapper: Sequence[str] = (),
    may_leave_behind: bool = False,
    timeout_s: float = START_TIMEOUT_S,
    engine: Engine = VLLM,
) -> Iterator[Server]:
    """A server of `model` with more `arguments` and variables, behind a command prefix such as `stagetrace run --`.

    Its output goes to a file beside the model, whose end is shown when the start or the body fails. At the end the
    process is sent SIGTERM (a wrapper passes it on), then what is left SIGKILL. A process or a file in /dev/shm that
    outlives it is an AssertionError, unless the body kills hard and says `may_leave_behind`; it is removed either way.
    Stagetrace's rings are meant to outlive the engine: let a stagetrace command collect them in the body, or put them
    elsewhere with STAGETRACE_RING_DIR.
    """
    handle, name = tempfile.mkstemp(dir=model.parent, prefix="server-", suffix=".log")
    port = free_port()
    with os.fdopen(handle, "wb") as output:
        process = subprocess.Popen(
            [*wrapper, *engine.command(model, port, *arguments)],
            env=environment(env, engine),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://{HOST}:{port}/v1", process, Path(name))
    LIVE.append(server)
    watched = Watch(server)
    try:
        server.ready_s = wait_until_healthy(port, process.poll, timeout_s, lambda _: watched.look())
        watched.look()
        yield server
        watched.look()
    except BaseException as error:
        show(server)
        watched.look()
        watched.end()
        if isinstance(error, StartError):
            error.add_note(f"its log is {server.log}:\n{tail(server.log)}")
        raise
    finally:
        LIVE.remove(server)
    left = watched.end()
    if left and not may_leave_behind:
        show(server)
        raise AssertionError(f"the server left behind: {', '.join(left)} (log: {server.log})")


def semaphores() -> set[str]:
    """The semaphores of Python's multiprocessing in /dev/shm."""
    return {str(path) for path in Path(SHARED_MEMORY).glob("sem.mp-*")}


class Watch:
    """What belongs to a server: its processes and what they hold in /dev/shm, collected while they live."""

    def __init__(self, server: Server):
        self.server = server
        self.processes: set[psutil.Process] = set()
        self.files: set[str] = set()
        self.semaphores = semaphores()  # those that were there before

    def look(self) -> None:
        """Adds what can be seen now; a process that is ending shows nothing."""
        self.processes.update(self.server.processes())
        for process in self.processes:
            self.files.update(shared_memory(process.pid))

    def end(self, patience_s: float = 10.0) -> list[str]:
        """Ends the processes and removes what they left in /dev/shm; names what did not end or go by itself.

        What is left has `patience_s` after the end of the server's own process: its children notice that end, and
        Python's resource tracker unlinks what they shared, a moment later.
        """
        process = self.server.process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                pass  # it is then among those that outlived SIGTERM
        deadline = time.monotonic() + patience_s
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.1)
        left = self.left()
        alive = self._alive()
        for one in alive:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(alive, timeout=10)
        process.wait(10)
        # Python's resource tracker unlinks semaphores, unless it was killed with the rest.
        for file in self.files | unused(semaphores() - self.semaphores):
            Path(file).unlink(missing_ok=True)
        return left

    def left(self) -> list[str]:
        """What is there at this moment of all that was seen, in words; not what the engine leaves by itself."""
        processes = [f"process {one.pid} ({_command(one)})" for one in self._alive()]
        ours = (file for file in self.files if not ENGINES_OWN.fullmatch(file))
        return processes + sorted(file for file in ours if Path(file).exists())

    def _alive(self) -> list[psutil.Process]:
        return [one for one in self.processes if _alive(one)]


def environment(extra: Mapping[str, str] | None = None, engine: Engine = VLLM) -> dict[str, str]:
    """The test's environment without engine and tracing settings, then what the engine needs, then `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
    return {**kept, **engine.variables, **(extra or {})}


def shared_memory(pid: int) -> set[str]:
    """The files in /dev/shm that a process has mapped; none when it is gone or belongs to somebody else."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    paths = {line[line.index(SHARED_MEMORY) :] for line in lines if SHARED_MEMORY in line}
    return {path for path in paths if not path.endswith(" (deleted)")}


def unused(files: set[str]) -> set[str]:
    """Those that no process has mapped. By inode: a new semaphore is mapped under another name than it then has."""
    if not files:
        return set()
    mapped = set()
    for pid in psutil.pids():
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            continue
        mapped.update(int(line.split()[4]) for line in lines if SHARED_MEMORY in line)
    return {file for file in files if Path(file).exists() and Path(file).stat().st_ino not in mapped}


def show(server: Server) -> None:
    """Prints the end of the log, for pytest to show with the failure."""
    print(f"\n--- the end of {server.log} ---\n{tail(server.log, 80)}\n---", file=sys.stderr)


def _alive(process: psutil.Process) -> bool:
    try:
        # A zombie has ended: where the first process of a container reaps nothing, orphans stay as zombies.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:80]
    except psutil.Error:
        return "ended"
