"""vLLM's offline LLM class: its engine in the same process, where all share a thread, and in one of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from engines.recording import STAGETRACE
from engines.server import environment

from stagetrace.analysis.load import load
from stagetrace.exporters.session import Session
from stagetrace.instrument.stages import BY_NAME

SCRIPT = Path(__file__).with_name("offline.py")


TRACE_ID, PARENT_ID = "7bf92f3577b34da6a3ce929d0e0e4736", "30f067aa0ba902b7"


def run(engine_python: Path, model: Path, directory: Path, **variables: str) -> tuple[Session, list[dict[str, int]]]:
    """The script under `stagetrace run`: the session, and how many tokens each prompt and answer had."""
    env = environment({"STAGETRACE_RING_DIR": str(directory / "rings"), **variables})
    command = [*STAGETRACE, "run", "--no-report", "--session", str(directory / "session"), "--"]
    done = subprocess.run(
        [*command, str(engine_python), str(SCRIPT), str(model)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    generated = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    return Session.open(directory / "session"), generated


@pytest.mark.matrix
def test_offline_with_an_engine_of_its_own(model: Path, engine_python: Path, tmp_path: Path) -> None:
    """And with a job around it that says by a variable what trace it is part of."""
    session, generated = run(engine_python, model, tmp_path, TRACEPARENT=f"00-{TRACE_ID}-{PARENT_ID}-01")
    manifest = session.read_manifest()
    assert manifest.counts["accounting_conflict"] == 0
    assert not any(process.errors for process in manifest.processes)
    assert {process.role for process in manifest.processes} == {"front_end", "engine_core", "worker"}
    frames = load(session)
    requests, steps = frames["requests"].sort_values("arrival_ns"), frames["steps"]
    counts = requests[["prompt_tokens", "output_tokens"]].astype(int).to_numpy().tolist()
    assert counts == [[one["prompt"], one["output"]] for one in generated]
    assert set(requests["status"]) == {"finished"}
    assert set(requests["trace_id"]) == {TRACE_ID}
    assert set(requests["parent_span_id"]) == {PARENT_ID}
    assert requests["last_sent_ns"].isna().all()
    assert set(steps["status"]) == {"complete"}


def test_offline_in_one_process(model: Path, engine_python: Path, tmp_path: Path) -> None:
    session, generated = run(engine_python, model, tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    manifest = session.read_manifest()
    assert manifest.counts["accounting_conflict"] == 0
    (process,) = manifest.processes
    assert set(process.role.split("+")) == {"front_end", "engine_core", "worker"}
    frames = load(session)
    requests, steps, segments = frames["requests"], frames["steps"], frames["segments"]
    counts = requests.sort_values("arrival_ns")[["prompt_tokens", "output_tokens"]].astype(int).to_numpy().tolist()
    assert counts == [[one["prompt"], one["output"]] for one in generated]
    assert set(requests["status"]) == {"finished"}
    assert requests["last_sent_ns"].isna().all()  # no socket
    assert set(steps["status"]) == {"complete"}
    # One timeline: a rank's step nests in the scheduler's execute, and self times add up to the step, exactly.
    rank_steps = segments[segments["stage"] == BY_NAME["rank_step"].id]
    assert set(rank_steps["parent_stage"]) == {BY_NAME["execute"].id}
    assert segments["thread"].nunique() == 1
    for step in steps.itertuples():
        inside = segments[segments["step"] == step.step]
        assert inside["self_ns"].sum() + step.unattributed_ns == step.end_ns - step.begin_ns
    assert steps["unattributed_ns"].sum() < 0.05 * (steps["end_ns"] - steps["begin_ns"]).sum()
