"""SGLang's other ways to schedule: without overlap, with retractions, with prefill and decode in one step."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from engines.recording import Recording, record
from engines.server import environment
from engines.sglang.generate import Answer, generate_together
from quickstart.servers import MODEL_SCRIPT, SGLANG

from stagetrace.instrument.ids import handle
from stagetrace.instrument.stages import BY_NAME, QUEUE_CAUSES

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from stagetrace.analysis.load import Frames

# Every 20th step throws requests out, whatever the room for their KV.
RETRACTS = {"SGLANG_TEST_RETRACT": "true", "SGLANG_TEST_RETRACT_INTERVAL": "20"}


@pytest.fixture(scope="module")
def dense_model(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "model-dense"
    command = [engine_python, MODEL_SCRIPT, directory, "--dense"]
    built = subprocess.run(command, env=environment(engine=SGLANG), capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


def run(model: Path, directory: Path, *arguments: str, **env: str) -> tuple[Recording, list[Answer]]:
    every = (*arguments, "--skip-server-warmup", "--chunked-prefill-size", "128")
    load = [(f"load-{n}", f"request number {n} " * (5 + 40 * (n % 3)), 20 + 10 * n) for n in range(8)]
    with record(model, directory, *every, engine=SGLANG, env=env) as recording:
        answers = generate_together(recording.server, load)
        # When the others decode already, so that there is something to mix prefill with.
        answers += generate_together(recording.server, [(f"again-{rid}", text, most) for rid, text, most in load])
    return recording, answers


def checked(recording: Recording, answers: list[Answer]) -> Frames:
    """What was recorded, without losses and conflicts, with the counts of the responses."""
    frames, manifest = recording.frames(), recording.manifest
    assert manifest.counts["accounting_conflict"] == 0
    assert sum(losses.lost for losses in manifest.losses) == 0
    assert not any(process.errors for process in manifest.processes)
    steps, requests = frames["steps"], frames["requests"].set_index("handle")
    assert set(steps["status"]) == {"complete"}
    assert steps["unattributed_ns"].sum() < 0.05 * (steps["end_ns"] - steps["begin_ns"]).sum()
    assert (steps["members"] == steps["prefill_requests"] + steps["decode_requests"]).all()
    for answer in answers:
        row, meta = requests.loc[handle(recording.session.identity.key, answer.id)], answer.meta
        assert (row["status"], row["finish"]) == ("finished", "length")
        assert row["prompt_tokens"] == meta["prompt_tokens"]
        assert row["output_tokens"] == meta["completion_tokens"]
        assert row["preemptions"] == meta["num_retractions"]
    return frames


def assert_waited(requests: pd.DataFrame, *expected: str) -> None:
    """Some had to wait for each of these; what a request is told to have waited for is no longer than its queue."""
    causes = requests[[f"{cause.name.lower()}_ns" for cause in QUEUE_CAUSES]]
    assert {name for name in causes if causes[name].notna().any()} >= {*expected}
    assert (causes.sum(axis=1) + requests["grammar_ns"].fillna(0) <= requests["queue_ns"]).all()


def test_without_overlap_and_with_retractions(dense_model: Path, tmp_path: Path) -> None:
    room = ("--max-total-tokens", "1100")  # less than they have together
    recording, answers = run(dense_model, tmp_path, "--disable-overlap-schedule", *room, **RETRACTS)
    frames = checked(recording, answers)
    steps, requests, states = frames["steps"], frames["requests"], frames["states"]
    assert_waited(requests, "kv_space_ns")
    assert requests["preemptions"].sum() == steps["preempted"].sum() > 0
    again = states[(states["stage"] == BY_NAME["prefill"].id) & (states["a1"] == 1)]
    assert len(again) == requests["preemptions"].sum(), "each comes back by a prefill"
    # One step at a time: each ends before the next one begins.
    ordered = steps.sort_values("step")
    assert (ordered["begin_ns"].iloc[1:].to_numpy() >= ordered["end_ns"].iloc[:-1].to_numpy()).all()
    tokens = requests["output_tokens"].sum()
    assert steps["output_tokens"].sum() == tokens


@pytest.mark.matrix
def test_prefill_and_decode_in_one_step(dense_model: Path, tmp_path: Path) -> None:
    recording, answers = run(dense_model, tmp_path, "--enable-mixed-chunk", "--max-running-requests", "4")
    frames = checked(recording, answers)
    steps = frames["steps"]
    assert_waited(frames["requests"], "batch_full_ns", "token_budget_ns")
    assert steps["members"].max() == 4
    full = frames["requests"].sort_values("queued_ns").dropna(subset=["batch_full_ns"])
    assert (full["batch_full_ns"] <= full["scheduled_ns"] - full["queued_ns"]).all()
    mixed = steps[steps["phase"] == "mixed"]
    assert len(mixed) > 0
    assert (mixed["decode_tokens"] == mixed["decode_requests"]).all()
    assert (mixed["decode_context"] > mixed["decode_requests"]).all()
