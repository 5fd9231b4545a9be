"""The processes around SGLang's schedulers: tokenizer workers, data-parallel controller, detokenizer, Engine."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
from backends.receiver import GrpcReceiver, Received
from engines.recording import STAGETRACE, Recording, ask, record
from engines.server import environment
from quickstart.load import Request, Result, run_load
from quickstart.servers import SGLANG

from stagetrace.analysis.breakdown import hook_troubles
from stagetrace.analysis.load import load
from stagetrace.exporters.session import Session
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from stagetrace.analysis.load import Frames

pytestmark = pytest.mark.matrix

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
SHORT = Request(({"role": "user", "content": "one question"},), max_tokens=20)
SETTINGS = {
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    # SGLang ends a tokenizer worker that has not answered after a while, and starts another: not on a busy machine.
    "SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "200",
}
QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart" / "quickstart.py"
IMPORTED, OFFLINE = (Path(__file__).with_name(name) for name in ("imported.py", "offline.py"))


@dataclass
class Recorded:
    """What the tests of this file look at."""

    recording: Recording
    frames: Frames
    results: list[Result]
    spans: list[Received]  # SGLang's own

    @property
    def requests(self) -> pd.DataFrame:
        return self.frames["requests"].set_index("request_id")

    def roots(self) -> dict[str, Received]:
        """SGLang's span of each request."""
        return {str(span.attributes["rid"]): span for span in self.spans if "rid" in span.attributes}


def test_quickstart(engine_python: Path, tmp_path: Path) -> None:
    assert engine_python
    command = [sys.executable, str(QUICKSTART), "--engine", "sglang", "--requests", "14"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 requests" in done.stdout
    assert "sglang 0.5.23" in done.stdout
    (path,) = (tmp_path / "stagetrace-sessions").iterdir()
    session = Session.open(path)
    assert set(load(session)["requests"]["status"]) == {"finished"}
    assert session.read_manifest().counts["accounting_conflict"] == 0


@pytest.fixture(scope="module")
def recorded(model: Path, engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Two tokenizer workers before two data-parallel schedulers, with SGLang's own tracing on."""
    assert engine_python
    arguments = ("--tokenizer-worker-num", "2", "--dp", "2", "--skip-server-warmup", "--enable-trace")
    with GrpcReceiver() as receiver:
        endpoint = ("--otlp-traces-endpoint", f"127.0.0.1:{receiver.port}")
        directory = tmp_path_factory.mktemp("processes")
        with record(model, directory, *arguments, *endpoint, engine=SGLANG, env=SETTINGS) as recording:
            server = recording.server
            load_of = {"requests": 14, "seed": 4, "concurrency": (4,)}
            results = asyncio.run(run_load(server.base_url, server.model, **load_of))  # type: ignore[arg-type]
            results += ask(server, SHORT, headers=TRACEPARENT)
            time.sleep(2)  # SGLang sends its spans twice a second
        spans = receiver.received()
    return Recorded(recording, recording.frames(), results, spans)


def test_every_process_is_hooked(recorded: Recorded) -> None:
    processes = recorded.recording.manifest.processes
    roles = Counter(process.role for process in processes)
    assert roles["front_end"] == 2, "SGLang's tokenizer workers load no plugins: http_app.py is their way in"
    assert roles["detokenizer"] == roles["dp_controller"] == 1
    assert sum(count for role, count in roles.items() if role.startswith("engine_core")) == 2
    assert hook_troubles(processes) == []
    assert not any(process.errors for process in processes)


def test_detokenizer_and_controller_load_no_model(recorded: Recorded) -> None:
    for process in recorded.recording.manifest.processes:
        if process.role == "detokenizer":
            model = [hook for hook in process.hooks if "model_runner:" in hook["name"]]
            assert {hook["status"] for hook in model} == {"waiting"}


def test_requests_are_whole(recorded: Recorded) -> None:
    assert [result.error for result in recorded.results] == [None] * len(recorded.results)
    requests = recorded.requests
    assert len(requests) == len(recorded.results)
    for result in recorded.results:
        row = requests.loc[result.id]
        assert (row["status"], row["finish"], row["partial"]) == ("finished", "length", False)
        assert (row["prompt_tokens"], row["output_tokens"]) == (result.prompt_tokens, result.output_tokens)
    moments = [
        *("arrival_ns", "dispatched_ns", "queued_ns", "scheduled_ns", "first_token_ns", "first_output_ns"),
        *("first_sent_ns", "last_sent_ns"),
    ]
    assert requests[moments].notna().all().all()
    assert (requests[moments].astype("int64").diff(axis=1).iloc[:, 1:] >= 0).all().all()


def test_the_controller_hands_requests_to_both_ranks(recorded: Recorded) -> None:
    assert recorded.requests["instance"].nunique() == 2
    roles = {process.key: process.role for process in recorded.recording.manifest.processes}
    segments = recorded.frames["segments"]
    dispatches = segments[segments["stage"] == BY_NAME["dispatch"].id]["process"].map(roles).value_counts()
    assert dispatches["dp_controller"] >= len(recorded.results)
    assert dispatches["front_end"] >= len(recorded.results)


def test_without_a_caller_requests_are_in_sglangs_own_traces(recorded: Recorded) -> None:
    roots, requests = recorded.roots(), recorded.requests
    for result in recorded.results[:-1]:
        row, root = requests.loc[result.id], roots[result.id].span
        assert (row["trace_id"], row["parent_span_id"]) == (root.trace_id.hex(), root.span_id.hex())


def test_the_callers_trace_is_shared_with_sglangs_own(recorded: Recorded) -> None:
    rid = recorded.results[-1].id
    row, root = recorded.requests.loc[rid], recorded.roots()[rid].span
    assert (row["trace_id"], row["parent_span_id"]) == (TRACE_ID, PARENT_ID)
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)


@pytest.mark.parametrize(
    "module",
    ["sglang.srt.entrypoints.http_server", "sglang.srt.managers.detokenizer_manager"],
    ids=["server", "detokenizer"],
)
def test_the_hooks_import_nothing_else_into_the_processes(module: str, engine_python: Path, tmp_path: Path) -> None:
    """Neither the model's modules nor anything that stagetrace's collector needs."""

    def modules(**variables: str) -> set[str]:
        command = [str(engine_python), str(IMPORTED), module]
        done = subprocess.run(command, env=environment(variables, SGLANG), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return set(json.loads(done.stdout.splitlines()[-1]))

    plain, armed = modules(), modules(STAGETRACE_SESSION=str(tmp_path / "session"))
    assert not {name for name in plain if name.startswith("stagetrace")} - PLUGIN
    more = armed - plain
    assert {"stagetrace.adapters.sglang.hooks", "stagetrace.instrument.recorder"} <= more
    ours = {name for name in more if name.startswith("stagetrace.")}
    assert {".".join(name.split(".")[:2]) for name in ours} == {"stagetrace.adapters", "stagetrace.instrument"}
    assert {name.partition(".")[0] for name in more - ours} <= sys.stdlib_module_names


# What loading the entry point alone imports.
PLUGIN = {
    *("stagetrace", "stagetrace.adapters", "stagetrace.adapters.sglang", "stagetrace.adapters.sglang.plugin"),
}


def test_embedded_engine(model: Path, engine_python: Path, tmp_path: Path) -> None:
    env = environment({"STAGETRACE_RING_DIR": str(tmp_path / "rings")}, SGLANG)
    command = [*STAGETRACE, "run", "--no-report", "--session", str(tmp_path / "session"), "--"]
    done = subprocess.run(
        [*command, str(engine_python), str(OFFLINE), str(model), TRACEPARENT["traceparent"]],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    generated: list[dict[str, Any]] = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("[{"))
    )
    session = Session.open(tmp_path / "session")
    requests = load(session)["requests"].set_index("request_id")
    assert len(requests) == len(generated)
    for answer in generated:
        row = requests.loc[answer["id"]]
        assert (row["status"], row["partial"]) == ("finished", False)
        assert (row["prompt_tokens"], row["output_tokens"]) == (answer["prompt_tokens"], answer["completion_tokens"])
        assert row["dispatched_ns"] <= row["queued_ns"] <= row["first_token_ns"] <= row["last_output_ns"]
        assert pd.isna(row["last_sent_ns"])  # no socket
    assert (requests.loc[generated[-1]["id"], "trace_id"]) == TRACE_ID
    assert {process.role for process in session.read_manifest().processes} >= {"front_end", "detokenizer"}
