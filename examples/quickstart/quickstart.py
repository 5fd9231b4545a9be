"""A real server, a real load, and where the time went, on a machine without a GPU and without a download.

    make quickstart                                                     makes the environments, then runs this
    make quickstart ENGINE=sglang                                       the same with SGLang
    .venv/bin/python examples/quickstart/quickstart.py                  a tiny Mixture of Experts under vLLM
    .venv/bin/python examples/quickstart/quickstart.py --engine sglang  under SGLang
    .venv/bin/python examples/quickstart/quickstart.py --untraced       the same without stagetrace, to compare

It builds a tiny model, starts `stagetrace run -- <server>`, waits until it is ready, puts a load on it and ends it;
`stagetrace run` then prints the breakdown and the session's path.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from load import REQUESTS, SEED, Result, show_load
from rich.console import Console
from rich.markup import escape
from servers import (
    CHECKOUT,
    ENGINES,
    HOST,
    MODEL_NAME,
    MODEL_SCRIPT,
    START_TIMEOUT_S,
    Engine,
    StartError,
    free_port,
    tail,
    wait_until_healthy,
)

if TYPE_CHECKING:
    from types import FrameType

FOLDER = CHECKOUT / "build" / "quickstart"
# The same limits for both, small enough that the longer prompts of the load are prefilled in chunks.
ARGUMENTS = {
    "vllm": ("--enforce-eager", "--max-num-batched-tokens", "512", "--max-num-seqs", "32"),
    "sglang": ("--chunked-prefill-size", "512", "--max-running-requests", "32"),
}
# How a server that was told to end by SIGINT ends, itself or as a shell reports it.
ENDED_BY_US = (0, -signal.SIGINT, 128 + signal.SIGINT)
END_TIMEOUT_S = 120.0

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Trace a real server under a load and show where the time went.")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="vllm", help="whose server it is (vllm)")
    parser.add_argument("--dense", action="store_true", help="a dense model instead of a Mixture of Experts")
    parser.add_argument("--requests", type=int, default=REQUESTS, help=f"requests to send ({REQUESTS})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the load ({SEED})")
    parser.add_argument("--untraced", action="store_true", help="the same server and load without stagetrace")
    arguments = parser.parse_args()
    if arguments.requests < 1:
        parser.error("--requests must be at least 1")
    # SIGINT too: a shell starts background jobs with it ignored, the server would inherit that and never end by it.
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, _interrupt)
    try:
        return run(ENGINES[arguments.engine], arguments.dense, arguments.requests, arguments.seed, arguments.untraced)
    except KeyboardInterrupt:
        say("stopped")
        return 128 + signal.SIGINT


def run(engine: Engine, dense: bool, requests: int, seed: int, untraced: bool) -> int:
    """The whole quickstart; returns its exit status."""
    if not engine.python.is_file():
        place = engine.python.parent.parent
        problem(f"there is no {place}: run `make quickstart ENGINE={engine.name}`, which makes it first")
        return 1
    model = FOLDER / ("model-dense" if dense else "model-moe")
    build = [str(engine.python), str(MODEL_SCRIPT), str(model), *(["--dense"] if dense else [])]
    built = subprocess.run(build, env=engine.environment(), check=False)
    if built.returncode:
        problem("the model could not be built (the message is above)")
        return built.returncode
    log = FOLDER / "server.log"
    log.unlink(missing_ok=True)
    port = free_port()
    server = start(engine.command(model, port, *ARGUMENTS[engine.name]), engine, log, untraced)
    results: list[Result] = []
    unready: StartError | None = None
    try:
        waited = wait_for(server, port, log)
        say(f"ready after {waited:.0f} s; sending {requests} requests")
        results = show_load(f"http://{HOST}:{port}/v1", MODEL_NAME, requests=requests, seed=seed, console=console)
        say("ending the server")
    except StartError as error:
        unready = error
    except KeyboardInterrupt:
        say("stopping the server; while it starts it may first finish starting, Ctrl-C again is harder")
        raise
    finally:
        status = end(server)
    if unready:
        if log.is_file():
            problem(f"the end of {log}:\n{tail(log)}\n")
        problem(f"{unready}; its last messages are above")
        return 1
    failed = sum(result.error is not None for result in results)
    if failed:
        problem(f"{failed} of {len(results)} requests failed; the server's log is {log}")
    if status not in ENDED_BY_US:
        problem(f"the server ended with exit status {status}; the end of its log, {log}:\n{tail(log)}")
        return status if status > 0 else 128 - status
    return 1 if failed else 0


def start(server: list[str], engine: Engine, log: Path, untraced: bool) -> subprocess.Popen[bytes]:
    """Starts the server, under `stagetrace run` unless `untraced`, with its output in the log."""
    stagetrace = Path(sys.executable).parent / "stagetrace"
    wrapper = [] if untraced else [str(stagetrace), "run", "--log", str(log), "--"]
    say(f"$ {shlex.join([*wrapper, *server])}")
    say(f"the server's log is {log}; it takes about half a minute to start")
    variables = engine.environment()
    # A process group of its own: Ctrl-C reaches this process alone, which then sends one SIGINT, as after the load.
    if not untraced:
        return subprocess.Popen([*wrapper, *server], env=variables, stdin=subprocess.DEVNULL, process_group=0)
    variables.pop("STAGETRACE_SESSION", None)
    with log.open("wb") as output:
        return subprocess.Popen(
            server,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


def wait_for(server: subprocess.Popen[bytes], port: int, log: Path) -> float:
    """Waits until the server is ready and shows what it does meanwhile; the seconds that it took."""
    spoken = 0.0

    def speak(elapsed: float) -> None:
        nonlocal spoken
        if elapsed - spoken >= 10:
            spoken = elapsed
            say(_starting(elapsed, log))

    if not console.is_terminal:
        return wait_until_healthy(port, server.poll, START_TIMEOUT_S, speak)
    with console.status("starting") as status:
        return wait_until_healthy(
            port, server.poll, START_TIMEOUT_S, lambda elapsed: status.update(escape(_starting(elapsed, log)))
        )


def end(server: subprocess.Popen[bytes]) -> int:
    """Ends the server by SIGINT, as Ctrl-C would, and harder when it does not end; its exit status."""
    for number, patience in ((signal.SIGINT, END_TIMEOUT_S), (signal.SIGTERM, 20.0)):
        if server.poll() is None:
            server.send_signal(number)
        try:
            return server.wait(patience)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            # A second Ctrl-C must not leave the server behind: it ends the wait, not the ending.
            problem(f"process {server.pid} has not ended after {number.name}; trying harder")
    server.kill()
    return server.wait()


def say(text: str) -> None:
    """One line of progress."""
    console.print(f"quickstart: {text}", markup=False)


def problem(text: str) -> None:
    """What went wrong, and what to do."""
    console.print(f"quickstart: {text}", markup=False, style="red")


def _starting(elapsed: float, log: Path) -> str:
    # The engines' own lines end in what they do. vLLM: `(EngineCore pid=1) INFO 11-23 14:57:38 [core.py:402] init ...`,
    # SGLang: `[2026-11-23 14:57:38] Load weight begin.`
    own = [line for line in tail(log, 20).splitlines() if " INFO " in line or line.startswith("[20")]
    said = [line.rpartition("] ")[2].strip() for line in own]
    doing = next((text for text in reversed(said) if len(text) > 20), "")
    return f"starting, {elapsed:.0f} s  {doing[: max(0, console.width - 35)]}".rstrip()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
