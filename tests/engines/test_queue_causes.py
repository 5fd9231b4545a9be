"""Why requests wait in the queue: vLLM's own Scheduler, made to hold one back for each reason that it has."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pandas as pd
from engines.recording import STAGETRACE
from engines.server import environment

from stagetrace.analysis.load import load
from stagetrace.exporters.session import Session
from stagetrace.instrument.stages import BY_NAME, QUEUE_CAUSES, QueueCause

SCRIPT = Path(__file__).with_name("queue_causes.py")


def test_the_queue_is_told_by_cause(model: Path, engine_python: Path, tmp_path: Path) -> None:
    env = environment({"STAGETRACE_RING_DIR": str(tmp_path / "rings")})
    command = [*STAGETRACE, "run", "--no-report", "--session", str(tmp_path / "session"), "--"]
    done = subprocess.run(
        [*command, str(engine_python), str(SCRIPT), str(model)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    session = Session.open(tmp_path / "session")
    assert not any(process.errors for process in session.read_manifest().processes)
    frames = load(session)
    requests, states, steps = (frames[name] for name in ("requests", "states", "steps"))
    # Without a front end a request has no name: the second of each scheduler is the one that waited.
    rows = requests.sort_values("queued_ns").iloc[1::2]
    assert len(rows) == len(expected) == len(requests) / 2
    columns = [f"{cause.name.lower()}_ns" for cause in QUEUE_CAUSES]
    assert requests.drop(rows.index)[columns].isna().all().all()
    for row, name in zip(rows.to_dict("records"), expected.values(), strict=True):
        cause = QueueCause[name]
        queue = states[(states["handle"] == row["handle"]) & (states["stage"] == BY_NAME["queue"].id)]
        assert queue["a1"].tolist() == [cause]
        found = {column: row[column] for column in columns if pd.notna(row[column])}
        if cause is QueueCause.TURN:
            assert found == {}
            continue
        assert [*found] == [f"{name.lower()}_ns"]
        # From the first time that it could have been chosen until it was, to the nanosecond.
        mine = steps[(steps["instance"] == row["instance"]) & (steps["begin_ns"] >= row["queued_ns"])]
        if cause is QueueCause.PAUSED:
            assert 0 < found["paused_ns"] < row["queue_ns"]
        else:
            assert found[f"{name.lower()}_ns"] == row["scheduled_ns"] - mine["begin_ns"].min()
