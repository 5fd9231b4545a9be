"""`stagetrace ctl kernel` on real servers that go on serving: which operators each stage's time goes to."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2 as httpx
import pytest
from engines.conftest import python_of
from engines.recording import STAGETRACE, Recording, ask, record
from engines.server import environment
from quickstart.load import Request
from quickstart.servers import SGLANG, VLLM, Engine
from unit.commands import wait_for

from stagetrace.analysis.kernels import summarise_kernels
from stagetrace.analysis.load import read
from stagetrace.analysis.report import summarise, to_json
from stagetrace.exporters.kernel_window import read_results
from stagetrace.instrument.kernel_request import KERNEL_DIRECTORY, read_request
from stagetrace.instrument.levels import session_level
from stagetrace.instrument.stages import BY_NAME, Level

if TYPE_CHECKING:
    from collections.abc import Iterator

SHORT = Request(({"role": "user", "content": "the same question"},), max_tokens=12)
STEPS = 10
MS = 1_000_000
# Models of this size: a long prompt, so that the stages of a step take more than 1 ms.
SETTINGS = {
    "vllm": ("--enforce-eager", "--max-model-len", "4096", "--no-enable-prefix-caching"),
    "sglang": ("--disable-radix-cache", "--chunked-prefill-size", "4096", "--context-length", "4096"),
}


# How much of a stage that is little but operators they fill; SGLang's experts are many small ones on the processor.
FILLED = {"vllm": {"expert_compute": 0.95, "attention": 0.9}, "sglang": {"expert_compute": 0.8, "attention": 0.9}}


def long(number: int) -> Request:
    words = " ".join(f"{'router' if (number * 7 + at) % 3 else 'expert'}" for at in range(450))
    return Request(({"role": "user", "content": f"{number} {words}"},), max_tokens=2)


@contextmanager
def load(recording: Recording) -> Iterator[None]:
    """Long prompts, one after the other, while the body runs."""
    done = threading.Event()

    def send() -> None:
        number = 0
        while not done.is_set():
            ask(recording.server, long(number := number + 1))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def start(recording: Recording, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*STAGETRACE, "ctl", "kernel", "--session", str(recording.path), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"STAGETRACE_RING_DIR": str(recording.path.parent / "rings"), "PATH": ""},
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize(
    "engine",
    [VLLM, pytest.param(SGLANG, marks=pytest.mark.matrix)],  # the window is the same code in both
    ids=["vllm", "sglang"],
)
def test_a_window_on_a_server_that_goes_on_serving(engine: Engine, model: Path, tmp_path: Path) -> None:
    python_of(engine)
    settings = list(SETTINGS[engine.name])
    if engine is VLLM:
        profiler = {"profiler": "torch", "torch_profiler_dir": str(tmp_path / "profiler")}
        profiler |= {"torch_profiler_with_stack": False}
        settings += ["--profiler-config", json.dumps(profiler)]
    with record(model, tmp_path, *settings, run=("--level", "layer"), engine=engine) as recording:
        (before,) = ask(recording.server, SHORT)
        with load(recording):
            first = start(recording, "--steps", str(STEPS))
            folder = recording.path / KERNEL_DIRECTORY
            wait_for(lambda: list(folder.glob("1/*.begun")) or first.poll() is not None, 60)
            status, _, err = ended(start(recording))
            assert status == 1 and "another window is open" in err
            status, out, err = ended(first)
            assert status == 0, err
            assert "ended by all steps" in out and "Time by stage, rank 0" in out
        (after,) = ask(recording.server, SHORT)
        assert after.text == before.text and after.error is None
        assert session_level(recording.path) is Level.LAYER
        assert read_request(recording.path) is None
        if engine is VLLM:
            leaves_the_engines_profiler_alone(recording)
            interrupted(recording)
        # No step comes to a server that nobody asks anything.
        status, _, err = ended(start(recording, "--wait", "1"))
        assert status == 1 and "send the server requests" in err
    status, _, err = ended(start(recording))
    assert status == 1 and "is running" in err

    (rank,) = summarise_kernels(recording.session, 1)
    assert rank.steps == STEPS and not rank.on_device
    assert rank.attributed >= 0.95
    assert 0 < rank.error_ns < MS
    assert rank.busy_ns + rank.gap_ns == pytest.approx(rank.window_ns, rel=0.02)
    agrees_with_segments(recording, engine)
    assert summarise(recording.session).kernels and '"kernel_window"' in to_json(summarise(recording.session))
    assert not sum(sum(process.errors.values()) for process in recording.manifest.processes)


def interrupted(recording: Recording) -> None:
    """Ctrl-C while the command waits for a step, and while it waits for the window's end: what was seen is kept."""
    number = 1 + max(int(path.name) for path in (recording.path / KERNEL_DIRECTORY).iterdir() if path.name.isdecimal())
    words = ("--steps", "1000", "--seconds", "600")
    window = start(recording, *words)
    wait_for(lambda: read_request(recording.path) is not None, 60)
    err = closed(recording, window)
    assert f"window {number} is closed" in err and "no rank had begun" in err

    folder = recording.path / KERNEL_DIRECTORY / str(number + 1)
    window = start(recording, *words)
    with load(recording):
        wait_for(lambda: [*folder.glob("*.begun")], 60)
        assert f"is then in {folder}" in closed(recording, window)
        wait_for(lambda: read_results(folder), 60)
    (rank,) = read_results(folder)
    assert rank.ended == "level switched" and 0 < rank.steps < 1000
    assert summarise_kernels(recording.session, number + 1)[0].steps == rank.steps


def closed(recording: Recording, window: subprocess.Popen[str]) -> str:
    """Ctrl-C: what the command says. The server records as before."""
    window.send_signal(signal.SIGINT)
    status, _, err = ended(window)
    assert status == 130 and "the server records at level layer again" in err and "Traceback" not in err, err
    assert session_level(recording.path) is Level.LAYER and read_request(recording.path) is None
    return err


def leaves_the_engines_profiler_alone(recording: Recording) -> None:
    server = recording.server.root_url
    assert httpx.post(f"{server}/start_profile", timeout=60).status_code == 200
    window = start(recording)
    wait_for(lambda: read_request(recording.path) is not None, 60)
    ask(recording.server, SHORT)
    status, _, err = ended(window)
    assert status == 1 and "the engine's own profiler is running" in err
    assert httpx.post(f"{server}/stop_profile", timeout=300).status_code == 200
    assert list((recording.path.parent / "profiler").glob("*.json*"))


def agrees_with_segments(recording: Recording, engine: Engine) -> None:
    """Operators fill the segments of stages that are little but operators, and no stage's more than that."""
    (rank,) = summarise_kernels(recording.session, 1)
    segments = read(recording.session, "segments")
    begin, end = rank.events["begin_ns"].min(), rank.events["end_ns"].max()
    segments = segments[(segments["begin_ns"] >= begin - MS) & (segments["end_ns"] <= end + MS)]
    ratios = {}
    for stage in ("forward", "attention", "expert_compute", "moe_route", "logits", "sample"):
        own = segments.loc[segments["stage"] == BY_NAME[stage].id, "self_ns"].sum()
        ratios[stage] = float(rank.events.loc[rank.events["segment"] == stage, "own_ns"].sum() / own)
    print(ratios)
    assert all(ratio <= 1.05 for ratio in ratios.values()), ratios
    assert all(ratios[stage] > share for stage, share in FILLED[engine.name].items()), ratios


def test_what_ends_a_window(engine_python: Path, tmp_path: Path) -> None:
    """Each bound, and each failure: of these nothing is raised, and the next window is as if they had not been."""
    script = Path(__file__).with_name("kernel_bounds.py")
    done = subprocess.run(
        [engine_python, script, tmp_path], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "steps": ["all steps", 3, True],
        "time": ["time", 2, True],
        "memory": ["memory", 2, True],
        "switch": ["level switched", 3, True],
        "in use": ["profiler in use", 0, False],
        "no trace": ["failed", 3, False],
        "no folder": ["nothing was said", 0, False],
        "after that": ["all steps", 2, True],
    }


@pytest.mark.matrix
def test_a_server_that_dies_in_the_window(model: Path, tmp_path: Path) -> None:
    with record(model, tmp_path, *SETTINGS["vllm"]) as recording:
        window = start(recording, "--steps", "1000", "--seconds", "600")
        wait_for((recording.path / KERNEL_DIRECTORY / "request.json").exists, 30)
    status, _, err = ended(window)
    assert status == 1 and "the server ended in the window" in err
    assert session_level(recording.path) is Level.STEP
