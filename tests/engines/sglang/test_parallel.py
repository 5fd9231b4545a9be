"""Several ranks of SGLang: each has a scheduler, the first of a replica writes its steps, all write their parts."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from engines.ranks import assert_sglangs_ranks, by_rank, numbers
from engines.recording import Recording, record
from engines.server import environment
from quickstart.load import Result, run_load
from quickstart.servers import HOST, SGLANG, free_port

from stagetrace.instrument.ids import handle
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    import pandas as pd

MENDS = Path(__file__).with_name("mends")
TWO_CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
ON_THE_RANKS = ("rank_step", "prepare", "forward", "return")


def run(
    model: Path, directory: Path, *arguments: str, requests: int = 10, **env: str
) -> tuple[Recording, list[Result]]:
    """A load on a server with these arguments, recorded; none of the requests failed."""
    every = (*arguments, "--skip-server-warmup")
    with record(model, directory, *every, engine=SGLANG, env={**TWO_CORES, **env}) as recording:
        server = recording.server
        results = asyncio.run(run_load(server.base_url, server.model, requests=requests, seed=5, concurrency=(4,)))
    assert [result.error for result in results] == [None] * requests
    return recording, results


def whole(recording: Recording, results: list[Result], ranks: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Steps and segments of a recording without losses, in which every request and every rank's part is there."""
    frames, manifest = recording.frames(), recording.manifest
    steps, segments = frames["steps"], frames["segments"]
    assert manifest.counts["accounting_conflict"] == 0
    assert sum(losses.lost for losses in manifest.losses) == 0
    assert not any(process.errors for process in manifest.processes)
    assert set(steps["status"]) == {"complete"}
    assert set(steps["ranks_expected"]) == set(steps["ranks_reported"]) == {ranks}
    assert steps["unattributed_ns"].sum() < 0.05 * (steps["end_ns"] - steps["begin_ns"]).sum()
    requests = frames["requests"].set_index("handle")
    key = recording.session.identity.key
    for result in results:
        row = requests.loc[handle(key, result.id)]
        assert (row["status"], row["prompt_tokens"], row["output_tokens"]) == (
            "finished",
            result.prompt_tokens,
            result.output_tokens,
        )
    return steps, segments


@pytest.mark.matrix  # test_layers.py has two ranks at level layer
def test_tensor_parallel(model: Path, engine_python: Path, tmp_path: Path) -> None:
    assert engine_python
    assert_sglangs_ranks(*whole(*run(model, tmp_path, "--tp", "2"), ranks=2))


@pytest.mark.matrix
def test_pipeline_parallel(model: Path, engine_python: Path, tmp_path: Path) -> None:
    assert engine_python
    steps, segments = whole(*run(model, tmp_path, "--pp-size", "2"), ranks=2)
    for name in ON_THE_RANKS:
        assert by_rank(segments, name) == {0: numbers(steps), 1: numbers(steps)}, name
    assert by_rank(segments, "sample") == {1: numbers(steps)}, "the last stage samples"
    idle = segments[segments["stage"] == BY_NAME["idle"].id]
    assert 3 in set(idle["a0"]), "the first stage waits for the last"


@pytest.mark.matrix
def test_data_parallel(model: Path, engine_python: Path, tmp_path: Path) -> None:
    assert engine_python
    steps, segments = whole(*run(model, tmp_path, "--dp", "2"), ranks=1)
    assert len(set(steps["instance"])) == 2
    ranks = by_rank(segments, "forward")
    assert set(ranks) == {0, 1}
    assert ranks[0] | ranks[1] == numbers(steps)
    assert not ranks[0] & ranks[1]


@pytest.mark.matrix
def test_expert_parallel(model: Path, engine_python: Path, tmp_path: Path) -> None:
    assert engine_python
    found = run(model, tmp_path, "--tp", "2", "--ep", "2", PYTHONPATH=str(MENDS))
    steps, segments = whole(*found, ranks=2)
    assert by_rank(segments, "forward") == {0: numbers(steps), 1: numbers(steps)}
    info = found[0].manifest.processes
    assert {process.info.get("expert_parallel_size") for process in info if "worker" in process.role} == {2}


@pytest.mark.matrix
def test_two_nodes(model: Path, engine_python: Path, tmp_path: Path) -> None:
    """Two servers of one rank each, as on two machines: one engine instance, whose steps have both ranks' parts."""
    assert engine_python
    arguments = ("--tp", "2", "--nnodes", "2", "--dist-init-addr", f"{HOST}:{free_port()}", "--skip-server-warmup")
    shared = {"STAGETRACE_SESSION": str(tmp_path / "session"), "STAGETRACE_RING_DIR": str(tmp_path / "rings")}
    command = SGLANG.command(model, free_port(), *arguments, "--node-rank", "1")
    with (tmp_path / "second.log").open("wb") as log:
        second = subprocess.Popen(
            command, env=environment({**shared, **TWO_CORES}, SGLANG), stdout=log, stderr=log, start_new_session=True
        )
    try:
        with record(model, tmp_path, *arguments, "--node-rank", "0", env=TWO_CORES, engine=SGLANG) as recording:
            server = recording.server
            results = asyncio.run(run_load(server.base_url, server.model, requests=10, seed=5, concurrency=(4,)))
            os.killpg(second.pid, signal.SIGKILL)  # so that its ring is collected with the rest
    finally:
        if second.poll() is None:
            os.killpg(second.pid, signal.SIGKILL)
        second.wait(30)
    steps, segments = whole(recording, results, ranks=2)
    assert len(set(steps["instance"])) == 1
    assert by_rank(segments, "forward") == {0: numbers(steps), 1: numbers(steps)}


@pytest.mark.matrix
def test_attention_data_parallel(model: Path, engine_python: Path, tmp_path: Path) -> None:
    """Two schedulers that agree before every step; one without work keeps the other company."""
    assert engine_python
    arguments = ("--tp", "2", "--dp", "2", "--enable-dp-attention")
    steps, segments = whole(*run(model, tmp_path, *arguments, PYTHONPATH=str(MENDS)), ranks=1)
    assert len(set(steps["instance"])) == 2
    synced = segments[segments["stage"] == BY_NAME["dp_sync"].id]
    assert set(synced["parent_stage"]) == {BY_NAME["schedule"].id}
    assert len(synced) == len(steps)
