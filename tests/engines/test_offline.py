"""vLLM in one process, the offline LLM class: scheduler, worker and front end share a thread, so segments nest."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from engines.recording import STAGETRACE
from engines.server import environment

from stagetrace.analysis.load import load
from stagetrace.exporters.session import Session
from stagetrace.instrument.stages import BY_NAME

SCRIPT = Path(__file__).with_name("offline.py")


def test_offline_in_one_process(model: Path, engine_python: Path, tmp_path: Path) -> None:
    env = environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "STAGETRACE_RING_DIR": str(tmp_path / "rings")})
    command = [*STAGETRACE, "run", "--no-report", "--session", str(tmp_path / "session"), "--"]
    done = subprocess.run(
        [*command, str(engine_python), str(SCRIPT), str(model)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    generated = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    session = Session.open(tmp_path / "session")
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
