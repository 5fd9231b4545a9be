"""Several ranks: every rank's part of every step arrives, with the step's id that travelled on the SchedulerOutput."""

from __future__ import annotations

import asyncio

import pytest
from engines.ranks import assert_vllms_ranks
from engines.recording import record
from quickstart.load import run_load

from stagetrace.instrument.stages import BY_NAME


@pytest.mark.matrix  # test_layers.py has the same ranks at level layer
def test_tensor_parallel(model, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    directory = tmp_path_factory.mktemp("tp")
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with record(model, directory, "--enforce-eager", "--tensor-parallel-size", "2", env=env) as recording:
        server = recording.server
        results = asyncio.run(run_load(server.base_url, server.model, requests=10, seed=5, concurrency=(4,)))
    assert [result.error for result in results] == [None] * 10
    frames = recording.frames()
    assert set(frames["steps"]["status"]) == {"complete"}
    assert recording.manifest.counts["accounting_conflict"] == 0
    workers = [process for process in recording.manifest.processes if process.role == "worker"]
    assert sorted(process.info["rank"] for process in workers) == [0, 1]
    assert_vllms_ranks(frames["steps"], frames["segments"])


@pytest.mark.matrix
def test_data_parallel(dense_model, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    """Two engines, each with a scheduler and a worker. (Those of a dense model do not wait for each other.)"""
    directory = tmp_path_factory.mktemp("dp")
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    arguments = ("--enforce-eager", "--data-parallel-size", "2")
    with record(dense_model, directory, *arguments, env=env, run=("--no-report",)) as recording:
        server = recording.server
        results = asyncio.run(run_load(server.base_url, server.model, requests=14, seed=6, concurrency=(1, 4)))
    assert [result.error for result in results] == [None] * 14
    manifest = recording.manifest
    assert manifest.counts["accounting_conflict"] == 0
    assert not any(process.errors for process in manifest.processes)
    frames = recording.frames()
    requests, steps, segments = frames["requests"].set_index("external_id"), frames["steps"], frames["segments"]
    assert set(requests["status"]) == {"finished"}
    for result in results:
        assert requests.loc[result.id, "output_tokens"] == result.output_tokens
    assert set(steps["status"]) == {"complete"}
    assert steps["instance"].nunique() == requests["instance"].nunique() == 2
    assert steps["output_tokens"].sum() == requests["output_tokens"].sum()
    # Each engine's steps are numbered by itself, and its worker's part of them is its own worker's.
    ranks = {process.key: process.info for process in manifest.processes if process.role == "worker"}
    assert sorted(info["data_parallel_rank"] for info in ranks.values()) == [0, 1]
    parts = segments[segments["stage"] == BY_NAME["rank_step"].id]
    assert parts.groupby("instance")["process"].nunique().eq(1).all()
    assert parts.groupby("process")["instance"].nunique().eq(1).all()
    assert sorted(info["dp_rank"] for info in ranks.values()) == [0, 1]
