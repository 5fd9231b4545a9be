"""Level layer on a real vLLM that runs eagerly: attention, MLP and MoE by layer, tokens by expert, collectives."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from engines.layered import (
    AT_LAYER,
    EXPERTS,
    HIDDEN,
    LAYERS,
    QUESTIONS,
    TOP_K,
    TYPE_BYTES,
    Recorded,
    assert_nested,
    assert_whole,
    by_step,
    profiled,
    recorded,
    scheduled,
)
from engines.lit import assert_lit
from engines.ranks import assert_vllms_ranks
from engines.recording import ask, record
from engines.server import environment, serve
from quickstart.servers import MODEL_SCRIPT

from stagetrace.analysis.report import summarise
from stagetrace.exporters.session import names_of
from stagetrace.instrument.hooks import ERRORS_UNTIL_OUT
from stagetrace.instrument.stages import BY_ID, BY_NAME, AttentionKind, Collective, Level

if TYPE_CHECKING:
    import pandas as pd
    from engines.conftest import Calibrated

MENDS = Path(__file__).with_name("mends")
COUNTING = Path(__file__).with_name("counting.py")
# Every hook of the layer level fails, before the engine's function and after it, and so does counting.
RAISES = """
from dataclasses import replace
from stagetrace.adapters import experts
from stagetrace.instrument import hooks
from stagetrace.instrument.stages import Level
install = hooks.wrap
def raises(*given):
    raise RuntimeError("made to fail")
def wrap(original, around, hook):
    if hook.point.level == Level.LAYER:
        around = replace(around, before=lambda: raises(), after=lambda: raises())
    return install(original, around, hook)
hooks.wrap = wrap
experts.HostCounts.count = raises
"""


# Counting


def test_counts_are_those_of_a_plain_count(engine_python: Path) -> None:
    """Few choices and many, of both kinds of integers, with padding, and with choices that are none."""
    done = subprocess.run(
        [engine_python, COUNTING], env=environment(), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for case in json.loads(done.stdout.splitlines()[-1]):
        host, *device = case["counted"]
        assert host == [7, 1, 3, 5, case["tokens"], case["plain"]]
        assert [words[3] for words in device] == ([4, 5] if sum(case["plain"]) else [])
        for words in device:
            assert words[:3] == [7, 1, 3] and words[5] == case["plain"]
            assert case["tokens"] - case["holes"] <= words[4] <= case["tokens"]


# Mixture of Experts, eager


@pytest.fixture(scope="module")
def moe(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return recorded(model, tmp_path_factory.mktemp("layers-moe"), "--enforce-eager", "--max-num-batched-tokens", "256")


def test_accounting(moe: Recorded) -> None:
    assert_whole(moe)
    assert_nested(moe)


@pytest.mark.parametrize(
    "stage", ["attention", "moe_route", "expert_dispatch", "expert_compute", "expert_combine", "embed", "logits"]
)
def test_each_stage_once_a_layer_and_step(moe: Recorded, stage: str) -> None:
    rows, tokens = moe.segments(stage), scheduled(moe)
    with_layer = BY_NAME[stage].attributes[0].name == "layer"
    counts = by_step(rows)
    assert len(counts) == len(tokens) and (counts == (LAYERS if with_layer else 1)).all()
    if with_layer:
        assert (rows.groupby(["instance", "step"])["a0"].agg(tuple) == tuple(range(LAYERS))).all()
    if stage != "logits":
        place = [attribute.name for attribute in BY_NAME[stage].attributes].index("tokens")
        per_row = tokens.loc[list(zip(rows["instance"], rows["step"], strict=True))]
        assert (rows[f"a{place}"].to_numpy() == per_row.to_numpy()).all()


def test_kinds_and_bytes(moe: Recorded) -> None:
    assert set(moe.segments("attention")["a1"]) == {AttentionKind.FULL}
    for stage in ("expert_dispatch", "expert_combine"):
        rows = moe.segments(stage)
        assert (rows["a2"] == rows["a1"] * HIDDEN * TYPE_BYTES).all()
    assert not len(moe.segments("mlp")) and not len(moe.segments("collective"))


def test_tokens_by_expert_are_the_steps_tokens(moe: Recorded) -> None:
    """Every token goes to so many experts in every layer, no more, no less, and warm-up is not counted."""
    experts, tokens = moe.frames["experts"], scheduled(moe)
    assert len(experts) == LAYERS * len(tokens)
    counts = np.stack([np.asarray(row) for row in experts["counts"]])
    assert counts.shape == (len(experts), EXPERTS)
    per_row = tokens.loc[list(zip(experts["instance"], experts["step"], strict=True))].to_numpy()
    assert (experts["tokens"].to_numpy() == per_row).all()
    assert (counts.sum(axis=1) == TOP_K * per_row).all()
    assert (counts.max(axis=1) <= per_row).all(), "an expert has a token at most once"


def test_report(moe: Recorded) -> None:
    layers = summarise(moe.recording.session).layers
    attention = next(row for row in layers.stages if row.stage == "attention")
    assert (attention.kind, attention.layers, attention.count) == ("full", LAYERS, LAYERS * len(moe.frames["steps"]))
    assert sorted(load.layer for load in layers.experts) == [*range(LAYERS)]
    routed = sum(load.tokens for load in layers.experts)
    assert routed == LAYERS * TOP_K * scheduled(moe).sum()
    assert layers.not_visible == [] and {"mlp", "collective"} <= {*layers.not_in_model}


def test_no_stage_is_faster_than_what_was_measured(moe: Recorded, calibrated: Calibrated) -> None:
    light = summarise(moe.recording.session, calibration=calibrated.path).light
    assert_lit(light)
    timed = {name for name, done in light.stages.items() if done.time_ns}
    assert timed == {"embed", "forward", "attention", "moe_route", "expert_compute", "logits"}


@pytest.mark.matrix
def test_output_is_the_same_without_stagetrace(moe: Recorded, model: Path) -> None:
    with serve(model, "--enforce-eager", "--max-num-batched-tokens", "256") as server:
        results = ask(server, *QUESTIONS)
    assert [result.text for result in results] == [result.text for result in moe.results[: len(QUESTIONS)]]


# Dense, eager


@pytest.mark.matrix
def test_dense(model: Path, tmp_path_factory: pytest.TempPathFactory, engine_python: Path) -> None:
    directory = tmp_path_factory.mktemp("layers-dense")
    dense = directory / "model"
    subprocess.run([engine_python, MODEL_SCRIPT, dense, "--dense"], env=environment(), check=True, capture_output=True)
    one = recorded(dense, directory, "--enforce-eager")
    assert_whole(one)
    assert_nested(one)
    rows = one.segments("mlp")
    assert (rows.groupby(["instance", "step"])["a0"].agg(tuple) == tuple(range(LAYERS))).all()
    assert (by_step(one.segments("attention")) == LAYERS).all() and (by_step(one.segments("embed")) == 1).all()
    assert not len(one.segments("moe_route")) and not len(one.frames["experts"])
    assert not summarise(one.recording.session).layers.experts


# Tensor parallel


@pytest.fixture(scope="module")
def parallel(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    arguments = ("--enforce-eager", "--tensor-parallel-size", "2")
    directory = tmp_path_factory.mktemp("layers-tp")
    return recorded(model, directory, *arguments, requests=6, VLLM_CPU_OMP_THREADS_BIND="0|1")


def test_every_ranks_part_of_every_step(parallel: Recorded) -> None:
    """Each arrives, with the step's id that travelled on the SchedulerOutput."""
    assert_whole(parallel)
    workers = [process for process in parallel.recording.manifest.processes if process.role == "worker"]
    assert sorted(process.info["rank"] for process in workers) == [0, 1]
    assert_vllms_ranks(parallel.frames["steps"], parallel.frames["segments"])


def test_collectives_of_every_step(parallel: Recorded) -> None:
    """An all_reduce after the embedding and two in every layer, and an all_gather of the logits, on each rank."""
    assert_whole(parallel)
    rows = parallel.segments("collective")
    counted = rows.groupby(["process", "instance", "step", "a0"]).size().unstack("a0")
    assert len(counted) == 2 * len(parallel.frames["steps"])
    assert (counted[Collective.ALL_REDUCE] == 1 + 2 * LAYERS).all()
    assert (counted[Collective.ALL_GATHER] == 1).all()
    assert {*counted.columns} == {Collective.ALL_REDUCE, Collective.ALL_GATHER}
    names = names_of(parallel.recording.manifest.processes)
    assert {names[group] for group in rows["a1"]} == {"tp:0 (ranks 0-1)"}
    assert {names[algorithm] for algorithm in rows["a3"]} == {"shared memory"}
    reduced = rows[rows["a0"] == Collective.ALL_REDUCE]
    tokens = scheduled(parallel).loc[list(zip(reduced["instance"], reduced["step"], strict=True))].to_numpy()
    assert (reduced["a2"].to_numpy() == tokens * HIDDEN * TYPE_BYTES).all()


def test_numbers_are_the_same_on_both_ranks(parallel: Recorded) -> None:
    rows = parallel.segments("collective")
    of_ranks = [
        {(row.step, row.a4): (row.a0, row.a2) for row in part.itertuples()} for _, part in rows.groupby("process")
    ]
    assert len(of_ranks) == 2 and of_ranks[0] == of_ranks[1]
    assert len(of_ranks[0]) == len(rows) / 2, "a number is used once"
    for _, part in rows.groupby("process"):
        assert (part.sort_values("begin_ns")["a4"].diff().iloc[1:] > 0).all()


def test_ranks_wait_for_each_other(parallel: Recorded) -> None:
    """Both ranks are in an all_reduce of shared memory when it ends: of two waits for the last, one is none."""
    found = {row.op: row for row in summarise(parallel.recording.session).layers.collectives}
    assert {*found} == {"all_reduce", "all_gather"}
    for row in found.values():
        assert row.ranks == 2 and row.compared == row.count
        assert row.waiting_ns is not None and row.moving_ns is not None
        assert 0 < row.waiting_ns < row.total_ns and row.moving_ns > 0


def test_what_ranks_exchange_is_a_part_of_the_gap(parallel: Recorded, calibrated: Calibrated) -> None:
    summary = summarise(parallel.recording.session, calibration=calibrated.path)
    assert_lit(summary.light)
    collectives = summary.layers.collectives
    waited, moved = (sum(getattr(row, f"{name}_ns") for row in collectives) / 2 for name in ("waiting", "moving"))
    gaps = [done.gap for done in summary.light.phases.values() if done.gap]
    # Both are means over the ranks; the gap has what of them is in a step's own time.
    assert 0 < sum(gap.imbalance_ns or 0 for gap in gaps) <= waited * 1.0001
    assert 0 < sum(gap.communication_ns or 0 for gap in gaps) <= moved * 1.0001
    assert summary.light.stages["collective"].bus_bytes > 0


def test_one_of_ranks_with_the_same_tokens_counts_experts(parallel: Recorded) -> None:
    experts = parallel.frames["experts"]
    assert set(experts["rank"]) == {0} and len(experts) == LAYERS * len(parallel.frames["steps"])


# Expert parallel, with what vLLM's build for the CPU lacks for it mended


@pytest.fixture(scope="module")
def spread(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    arguments = ("--enforce-eager", "--data-parallel-size", "2", "--enable-expert-parallel")
    directory = tmp_path_factory.mktemp("layers-ep")
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "PYTHONPATH": str(MENDS)}
    return recorded(model, directory, *arguments, requests=6, **env)


def assert_dispatched(spread: Recorded) -> None:
    """Each rank counts the experts of its own tokens, dispatches these, and gets back what all ranks' have become."""
    experts, tokens = spread.frames["experts"], scheduled(spread)

    def own(rows: pd.DataFrame) -> np.ndarray:
        return tokens.loc[list(zip(rows["instance"], rows["step"], strict=True))].to_numpy()

    assert experts["instance"].nunique() == 2 and len(experts) == LAYERS * len(tokens)
    assert (experts["tokens"].to_numpy() == own(experts)).all()
    assert [sum(counts) for counts in experts["counts"]] == (TOP_K * own(experts)).tolist()
    rows = {
        stage: spread.segments(stage).sort_values(["instance", "step", "begin_ns"])
        for stage in ("moe_route", "expert_dispatch", "expert_compute", "expert_combine", "collective")
    }
    for stage in ("moe_route", "expert_dispatch", "expert_combine"):
        assert (rows[stage]["a1"].to_numpy() == own(rows[stage])).all(), stage
    size, computed = HIDDEN * TYPE_BYTES, rows["expert_compute"]["a1"].to_numpy()
    assert (computed >= own(rows["expert_compute"])).all()
    sent = {op: rows["collective"][rows["collective"]["a0"] == op]["a2"] for op in Collective}
    assert (rows["expert_dispatch"]["a2"] == size * rows["expert_dispatch"]["a1"]).all()
    assert (sent[Collective.DISPATCH].to_numpy() == rows["expert_dispatch"]["a2"].to_numpy()).all()
    assert (sent[Collective.COMBINE].to_numpy() == size * computed).all()


@pytest.mark.matrix
def test_experts_of_other_ranks(moe: Recorded, spread: Recorded) -> None:
    """Every token is dispatched and combined in every layer, and counted once.

    The answers begin as on one rank: what the ranks add up is rounded once more, so they need not go on like that.
    """
    assert_whole(spread)
    steps = spread.frames["steps"]
    for stage in ("expert_dispatch", "expert_compute", "expert_combine", "moe_route"):
        assert (by_step(spread.segments(stage)) == LAYERS).all(), stage
        assert len(by_step(spread.segments(stage))) == len(steps)
    collectives = spread.segments("collective")
    names = names_of(spread.recording.manifest.processes)
    per_step = collectives.groupby(["instance", "step", "a0"]).size().unstack("a0")
    for op, stage in ((Collective.DISPATCH, "expert_dispatch"), (Collective.COMBINE, "expert_combine")):
        rows = collectives[collectives["a0"] == op]
        assert (per_step[op] == LAYERS).all()
        assert {names[group] for group in rows["a1"]} == {"ep:0 (ranks 0-1)"}
        assert set(rows["parent_stage"]) == {BY_NAME[stage].id}
    assert Collective.ALL_GATHER not in set(collectives["a0"]), "what a dispatch is made of is not counted again"
    assert_dispatched(spread)
    infos = [process.info for process in spread.recording.manifest.processes if "ep_rank" in process.info]
    assert sorted((info["ep_rank"], info["local_experts"]) for info in infos) == [(0, "0-3"), (1, "4-7")]
    found = {row.op for row in summarise(spread.recording.session).layers.collectives}
    assert {"dispatch", "combine"} <= found
    alike = [
        ours.text[:3] == theirs.text[:3]
        for ours, theirs in zip(spread.results, moe.results[: len(QUESTIONS)], strict=False)
    ]
    assert sum(alike) >= len(QUESTIONS) - 1, "the mends compute something else"


# Against what is not ours


@pytest.mark.matrix
def test_agrees_with_ranges_of_torch_profiler(model: Path, engine_python: Path, tmp_path: Path) -> None:
    """Ranges opened around the same functions, whose calls take more than 1 ms: as often, and within 5 % as long.

    And what vLLM's routers returned is what was counted, layer by layer.
    """
    ratios = profiled(engine_python, model, tmp_path, {"enforce_eager": True}, ("attention", "expert_compute", "rank"))
    assert all(abs(ratio - 1) < 0.05 for ratio in ratios.values()), ratios


# Hooks that fail


def test_layer_hooks_that_raise_on_every_call_leave_the_server_serving(
    moe: Recorded, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("layers-raising")
    (directory / "site").mkdir()
    (directory / "site" / "sitecustomize.py").write_text(RAISES)
    arguments = ("--enforce-eager", "--max-num-batched-tokens", "256")
    with record(model, directory, *arguments, env={"PYTHONPATH": str(directory / "site")}, run=AT_LAYER) as recording:
        results = ask(recording.server, *QUESTIONS)
    assert [result.text for result in results] == [result.text for result in moe.results[: len(QUESTIONS)]]
    (worker,) = [process for process in recording.manifest.processes if "rank" in process.info]
    out = {hook["name"].rpartition(".")[2] for hook in worker.hooks if hook["status"] == "out"}
    called = {"_forward_impl", "_select_experts", "_prepare", "_fused_experts", "_finalize", "set_capture_fn"}
    assert {"forward", *called} <= out
    assert all(ERRORS_UNTIL_OUT <= count <= 2 * ERRORS_UNTIL_OUT for count in worker.errors.values())
    frames = recording.frames()
    assert set(frames["steps"]["status"]) == {"complete"}, "the level below goes on"
    assert not len(frames["experts"])
    levels = frames["segments"]["stage"].map(lambda stage: BY_ID[stage].level)
    assert (levels < Level.LAYER).all()
