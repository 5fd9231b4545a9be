"""The same load on a real vLLM and a real SGLang with the same model: one comparison, stage by stage."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from engines.recording import Recording, record
from quickstart.load import Result, run_load
from quickstart.servers import SGLANG, VLLM

from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from stagetrace.analysis.load import Frames

pytestmark = pytest.mark.matrix  # two servers: a minute and a half

ARGUMENTS = {"vllm": ("--enforce-eager",), "sglang": ("--skip-server-warmup",)}
REQUESTS = 42


@dataclass
class Recorded:
    """A session of each engine, vLLM's first, and what `stagetrace compare` says of the two."""

    sessions: dict[str, Recording]
    frames: dict[str, Frames]
    results: dict[str, list[Result]]
    said: str
    compared: dict[str, Any]


@pytest.fixture(scope="module")
def recorded(dense_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    sessions, results = {}, {}
    for engine in (VLLM, SGLANG):
        assert engine.python.is_file(), "run `make engines-env`"
        directory = tmp_path_factory.mktemp(engine.name)
        run = ("--no-report",)
        with record(dense_model, directory, *ARGUMENTS[engine.name], engine=engine, run=run) as recording:
            server = recording.server
            results[engine.name] = asyncio.run(run_load(server.base_url, server.model, requests=REQUESTS, seed=3))
        sessions[engine.name] = recording
    command = [sys.executable, "-m", "stagetrace.cli.main", "compare", *(str(each.path) for each in sessions.values())]
    said, as_json = (
        subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout
        for more in ([], ["--json"])
    )
    frames = {name: recording.frames() for name, recording in sessions.items()}
    return Recorded(sessions, frames, results, said, json.loads(as_json))


def test_the_load_was_the_same(recorded: Recorded) -> None:
    """Request by request: the same prompts in the same tokens, and as many tokens out."""
    one, other = (
        [(result.error, result.prompt_tokens, result.output_tokens) for result in results]
        for results in recorded.results.values()
    )
    assert one == other and len(one) == REQUESTS
    for name, frames in recorded.frames.items():
        requests = frames["requests"]
        assert set(requests["status"]) == {"finished"}, name
        lengths = sorted((row.prompt_tokens, row.output_tokens) for row in requests.itertuples())
        assert lengths == sorted((prompt, output) for _, prompt, output in one), name


def test_the_load_is_said_to_be_the_same(recorded: Recorded) -> None:
    compared = recorded.compared
    assert [side[0]["settings"]["engine"] for side in (compared["a"], compared["b"])] == ["vllm", "sglang"]
    assert [side[0]["measured"] for side in (compared["a"], compared["b"])] == [REQUESTS] * 2
    same = {"model", "level", "host", "prompt tokens of a request", "output tokens of a request"}
    assert same <= set(compared["load_same"])
    different = {each["what"]: each for each in compared["load_differences"]}
    assert (different["engine"]["a"], different["engine"]["b"]) == ("vllm", "sglang")
    assert not same & set(different)
    # What only one engine has is no difference in how the servers were set up.
    for name in ("max_num_batched_tokens", "overlap_schedule"):
        assert "not recorded" in (different[name]["a"], different[name]["b"])
        assert "only one of the engines" in different[name]["means"]
    assert all(each[side] != "0" for each in different.values() for side in ("a", "b"))


def test_one_table_by_stage_for_both(recorded: Recorded) -> None:
    """A stage that an engine has not is absent, never 0; what both have is compared."""
    head, stages = recorded.said.split("Stages, self time")[0], recorded.said.split("Stages, self time")[1]
    assert "vllm 0.32.0" in head and "sglang 0.5.23" in head
    rows = {each["metric"]: each for each in recorded.compared["metrics"]}
    for metric, row in rows.items():
        if not metric.startswith("stage_"):
            continue
        stage = BY_NAME[metric.removeprefix("stage_")].id
        there = [bool((frames["segments"]["stage"] == stage).any()) for frames in recorded.frames.values()]
        assert [row["a"] is not None, row["b"] is not None] == there, metric
        assert metric in stages
        assert row["better"] is None
        if not all(there):
            assert row["found"] == ("only_a" if there[0] else "only_b")
            assert row["difference"] is row["change"] is row["p"] is None
    both = {name for name, row in rows.items() if name.startswith("stage_") and None not in (row["a"], row["b"])}
    assert {f"stage_{name}" for name in ("schedule", "execute", "update", "prepare", "forward", "sample")} <= both
    assert rows["stage_bookkeep"]["found"] == "only_a" and rows["stage_emit"]["found"] == "only_b"
    assert "no stage is called better or worse" in stages
    for name in ("ttft_p50", "ttft_client_p50", "e2e_mean", "tpot_mean", "output_tokens_per_s", "step_decode_mean"):
        assert rows[name]["a"] > 0 and rows[name]["b"] > 0


def test_the_example_has_them_beside_each_other(recorded: Recorded, tmp_path: Path) -> None:
    from quickstart import compare

    paths = [str(each.path) for each in recorded.sessions.values()]
    done = subprocess.run([sys.executable, compare.__file__, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "vllm 0.32.0" in done.stdout and "sglang 0.5.23" in done.stdout
