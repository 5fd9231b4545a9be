"""Several steps in flight: vLLM's own AsyncScheduler, called as its engine does, recorded and assembled."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from engines.recording import STAGETRACE
from engines.server import environment

from stagetrace.analysis.load import load
from stagetrace.exporters.session import Session
from stagetrace.instrument.stages import BY_NAME

SCRIPT = Path(__file__).with_name("in_flight.py")


def test_steps_that_overlap(model: Path, engine_python: Path, tmp_path: Path) -> None:
    env = environment({"STAGETRACE_RING_DIR": str(tmp_path / "rings")})
    command = [*STAGETRACE, "run", "--no-report", "--session", str(tmp_path / "session"), "--"]
    done = subprocess.run(
        [*command, str(engine_python), str(SCRIPT), str(model)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"steps"')))
    session = Session.open(tmp_path / "session")
    manifest = session.read_manifest()
    assert manifest.counts["accounting_conflict"] == 0
    assert not any(process.errors for process in manifest.processes)
    frames = load(session)
    steps, segments = frames["steps"].sort_values("step"), frames["segments"]
    assert set(steps["status"]) == {"ranks_missing"}  # no model ran
    assert len(steps) == len(told["steps"]) > 100
    # Two are in flight most of the time, never three.
    begin, end = (steps[name].to_numpy() for name in ("begin_ns", "end_ns"))
    assert (begin[1:] < end[:-1]).mean() > 0.8
    assert (begin[2:] >= end[:-2]).all()
    assert (end[1:] > end[:-1]).all()
    for column, name in (("output_tokens", "tokens"), ("members", "requests")):
        assert steps[column].tolist() == [step[name] for step in told["steps"]]
    context = steps["prefill_context"] + steps["decode_context"]
    assert context.tolist() == [step["kv"] for step in told["steps"]]
    assert (steps["prefill_tokens"] + steps["decode_tokens"]).tolist() == [step["q"] for step in told["steps"]]
    requests = frames["requests"]
    assert len(requests) == len(told["requests"])
    assert sorted(requests["output_tokens"]) == sorted(told["requests"])
    assert set(requests["finish"]) == {"stop", "length", "abort"}
    assert requests["output_tokens"].sum() == steps["output_tokens"].sum()
    # On the scheduler's timeline everything follows: its stages fill no step twice.
    outer = segments[segments["parent"].isna()].sort_values("begin_ns")
    assert (outer["begin_ns"].to_numpy()[1:] >= outer["end_ns"].to_numpy()[:-1]).all()
    assert {BY_NAME[name].id for name in ("schedule", "execute", "update")} <= set(outer["stage"])
