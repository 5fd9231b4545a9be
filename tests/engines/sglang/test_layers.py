"""Level layer on a real SGLang: attention, MLP and MoE by layer, tokens by expert, collectives; on one rank and two."""

from __future__ import annotations

import gzip
import json
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import numpy as np
import pytest
from engines.layered import (
    AT_LAYER,
    EXPERTS,
    HIDDEN,
    LAYERS,
    TOP_K,
    TYPE_BYTES,
    assert_nested,
    assert_whole,
)
from engines.ranks import assert_sglangs_ranks
from engines.recording import Recording, record
from engines.server import Server, environment, serve
from engines.sglang.generate import Answer, generate, generate_together
from quickstart.servers import MODEL_SCRIPT, SGLANG

from stagetrace.analysis.layers import with_waiting
from stagetrace.analysis.report import summarise
from stagetrace.exporters.session import names_of
from stagetrace.instrument.ids import handle
from stagetrace.instrument.stages import BY_NAME, AttentionKind, Collective

if TYPE_CHECKING:
    import pandas as pd

    from stagetrace.analysis.load import Frames

HERE = Path(__file__).parent
ARGUMENTS = ("--skip-server-warmup", "--chunked-prefill-size", "2048")
TWO_CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


def tokens_of(seed: int, count: int) -> list[int]:
    """A prompt that begins like no other."""
    return [7 + (seed * 31 + at * (seed + 3)) % 900 for at in range(count)]


QUESTIONS = [(f"question-{n}", tokens_of(n, 40 + 200 * n), 24) for n in range(4)]
PROFILED = [(f"profiled-{n}", tokens_of(50 + n, 2000), 1) for n in range(3)]
LOAD = [(f"load-{n}", f"request number {n} " * (5 + 10 * n), 20) for n in range(6)]


@dataclass
class Recorded:
    """What the tests look at."""

    recording: Recording
    frames: Frames
    answers: list[Answer]  # to QUESTIONS
    profile: Path  # SGLang's trace of PROFILED

    def segments(self, stage: str) -> pd.DataFrame:
        """The segments of a stage."""
        segments = self.frames["segments"]
        return segments[segments["stage"] == BY_NAME[stage].id]

    def scheduled(self) -> pd.Series[int]:
        """Tokens by step."""
        steps = self.frames["steps"].set_index(["instance", "step"])
        return steps["prefill_tokens"] + steps["decode_tokens"]

    def queued_ns(self, rid: str) -> int:
        requests = self.frames["requests"].set_index("handle")
        return int(requests.loc[handle(self.recording.session.identity.key, rid), "queued_ns"])

    def steps_between(self, begin_ns: int, end_ns: int) -> pd.DataFrame:
        steps = self.frames["steps"].sort_values("begin_ns")
        return steps[(steps["begin_ns"] >= begin_ns) & (steps["begin_ns"] < end_ns)]


def asked(server: Server) -> list[Answer]:
    """The questions, one after the other."""
    return [generate(server, *question) for question in QUESTIONS]


def recorded(model: Path, directory: Path, *arguments: str, profiled: bool = False, **env: str) -> Recorded:
    """A server at level layer, asked the questions one by one and then under load, and profiled at last."""
    profile = directory / "profile"
    with record(
        model, directory, *ARGUMENTS, *arguments, engine=SGLANG, run=AT_LAYER, env={**TWO_CORES, **env}
    ) as recording:
        server = recording.server
        answers = asked(server)
        generate_together(server, LOAD)
        if profiled:
            given = {"output_dir": str(profile), "activities": ["CPU"], "with_stack": False, "record_shapes": False}
            httpx.post(f"{server.root_url}/start_profile", json=given, timeout=60).raise_for_status()
            for request in PROFILED:
                generate(server, *request)
            time.sleep(0.5)  # a step that was launched for a request that had just ended
            httpx.post(f"{server.root_url}/stop_profile", timeout=60).raise_for_status()
    return Recorded(recording, recording.frames(), answers, profile)


def by_step(rows: pd.DataFrame) -> pd.Series[int]:
    return rows.groupby(["process", "instance", "step"]).size()


def of_steps(one: Recorded, rows: pd.DataFrame) -> np.ndarray[Any, Any]:
    """The tokens of each row's step."""
    return one.scheduled().loc[list(zip(rows["instance"], rows["step"], strict=True))].to_numpy()


def assert_counted(one: Recorded) -> None:
    """Every token goes to so many experts in every layer, no more, no less; one rank counts."""
    experts = one.frames["experts"]
    assert len(experts) == LAYERS * len(one.frames["steps"]) and set(experts["rank"]) == {0}
    counts = np.stack([np.asarray(row) for row in experts["counts"]])
    tokens = of_steps(one, experts)
    assert counts.shape == (len(experts), EXPERTS)
    assert (experts["tokens"].to_numpy() == tokens).all()
    assert (counts.sum(axis=1) == TOP_K * tokens).all()
    assert (counts.max(axis=1) <= tokens).all(), "an expert has a token at most once"


# Mixture of Experts on one rank


@pytest.fixture(scope="module")
def moe(model: Path, engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    assert engine_python
    directory = tmp_path_factory.mktemp("sglang-layers")
    return recorded(model, directory, profiled=True, PYTHONPATH=str(HERE / "ranges"))


def test_accounting(moe: Recorded) -> None:
    assert_whole(moe)
    assert_nested(moe)
    assert_counted(moe)


@pytest.mark.parametrize(
    "stage", ["attention", "moe_route", "expert_dispatch", "expert_compute", "expert_combine", "embed", "logits"]
)
def test_each_stage_once_a_layer_and_step(moe: Recorded, stage: str) -> None:
    rows, steps = moe.segments(stage), moe.frames["steps"]
    with_layer = BY_NAME[stage].attributes[0].name == "layer"
    counts = by_step(rows)
    assert len(counts) == len(steps) and (counts == (LAYERS if with_layer else 1)).all()
    if with_layer:
        assert (rows.groupby(["instance", "step"])["a0"].agg(tuple) == tuple(range(LAYERS))).all()
    if stage != "logits":
        place = [attribute.name for attribute in BY_NAME[stage].attributes].index("tokens")
        assert (rows[f"a{place}"].to_numpy() == of_steps(moe, rows)).all()
    else:
        requests = steps.set_index(["instance", "step"])["members"]
        of_row = requests.loc[list(zip(rows["instance"], rows["step"], strict=True))].to_numpy()
        assert (rows["a0"].to_numpy() == of_row).all(), "one position of each request"


def test_kinds_and_bytes(moe: Recorded) -> None:
    assert set(moe.segments("attention")["a1"]) == {AttentionKind.FULL}
    for stage in ("expert_dispatch", "expert_combine"):
        rows = moe.segments(stage)
        assert (rows["a2"] == rows["a1"] * HIDDEN * TYPE_BYTES).all()
    assert not len(moe.segments("mlp")) and not len(moe.segments("collective"))


def test_report(moe: Recorded) -> None:
    layers = summarise(moe.recording.session).layers
    attention = next(row for row in layers.stages if row.stage == "attention")
    assert (attention.kind, attention.layers, attention.count) == ("full", LAYERS, LAYERS * len(moe.frames["steps"]))
    assert sorted(load.layer for load in layers.experts) == [*range(LAYERS)]
    assert layers.not_visible == [] and {"mlp", "collective"} <= {*layers.not_in_model}


def test_experts_are_those_that_transformers_chooses(moe: Recorded, model: Path, engine_python: Path) -> None:
    """Of the questions, step by step and layer by layer; the sums are exact, a tie may fall either way."""
    sequences = [[*prompt, *answer.tokens] for (_, prompt, _), answer in zip(QUESTIONS, moe.answers, strict=True)]
    done = subprocess.run(
        [engine_python, HERE / "routing.py", model],
        input=json.dumps(sequences),
        env=environment(engine=SGLANG),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    chosen = json.loads(done.stdout.splitlines()[-1])
    counts = moe.frames["experts"].set_index(["instance", "step", "layer"])["counts"]
    begins = [moe.queued_ns(rid) for rid, _, _ in QUESTIONS]
    ends = [*begins[1:], min(moe.queued_ns(rid) for rid, _, _ in LOAD)]
    same = total = 0
    for sequence, of_layers, begin, end in zip(sequences, chosen, begins, ends, strict=True):
        at = 0
        for step in moe.steps_between(begin, end).itertuples():
            tokens = step.prefill_tokens + step.decode_tokens
            assert step.cached_tokens == 0
            # A last step may have been launched before the end was known; its token was the last one.
            assert at + tokens <= len(sequence)
            for layer, of_positions in enumerate(of_layers):
                theirs = Counter(expert for position in of_positions[at : at + tokens] for expert in position)
                ours = counts.loc[step.instance, step.step, layer]
                assert sum(ours) == theirs.total() == TOP_K * tokens
                same += sum(min(count, theirs[expert]) for expert, count in enumerate(ours))
                total += sum(ours)
            at += tokens
        assert at >= len(sequence) - 1
    print(f"{same} of {total} assignments are the same")
    assert same >= 0.99 * total


def test_agrees_with_ranges_of_sglangs_profiler(moe: Recorded) -> None:
    """Ranges opened around the same functions, whose calls take more than 1 ms: as often, and within 5 % as long."""
    (path,) = moe.profile.rglob("*.trace.json.gz")
    with gzip.open(path, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    steps = moe.steps_between(moe.queued_ns(PROFILED[0][0]), 1 << 62)
    keys = {*zip(steps["instance"], steps["step"], strict=True)}
    found = {}
    for stage in ("attention", "expert_compute", "forward"):
        theirs = [event["dur"] for event in events if event["name"] == f"range {stage}"]
        rows = moe.segments(stage)
        mine = rows[[key in keys for key in zip(rows["instance"], rows["step"], strict=True)]]
        assert len(mine) == len(theirs) >= len(PROFILED)
        assert sum(theirs) / len(theirs) > 1000, f"a {stage} is too short to be compared"
        found[stage] = float((mine["end_ns"] - mine["begin_ns"]).sum() / 1e3 / sum(theirs))
    print(found)
    assert all(abs(ratio - 1) < 0.05 for ratio in found.values()), found


@pytest.mark.matrix
def test_output_is_the_same_without_stagetrace(moe: Recorded, model: Path) -> None:
    with serve(model, *ARGUMENTS, engine=SGLANG) as server:
        answers = asked(server)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in moe.answers]


# Dense


@pytest.mark.matrix
def test_dense(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("sglang-layers-dense")
    dense = directory / "model"
    command = [engine_python, MODEL_SCRIPT, dense, "--dense"]
    subprocess.run(command, env=environment(engine=SGLANG), check=True, capture_output=True)
    one = recorded(dense, directory)
    assert_whole(one)
    assert_nested(one)
    rows = one.segments("mlp")
    assert (rows.groupby(["instance", "step"])["a0"].agg(tuple) == tuple(range(LAYERS))).all()
    assert (by_step(one.segments("attention")) == LAYERS).all() and (by_step(one.segments("embed")) == 1).all()
    assert not len(one.segments("moe_route")) and not len(one.frames["experts"])


# Two ranks that share the experts; every token's are those of the first


@pytest.fixture(scope="module")
def parallel(model: Path, engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    directory = tmp_path_factory.mktemp("sglang-layers-ep")
    biased = directory / "model"
    command = [engine_python, HERE / "biased.py", model, biased]
    subprocess.run(command, env=environment(engine=SGLANG), check=True, capture_output=True)
    return recorded(biased, directory, "--tp", "2", "--ep", "2", PYTHONPATH=str(HERE / "mends"))


def process_of(one: Recorded, rank: int) -> int:
    rows = one.segments("forward")
    (process,) = set(rows.loc[rows["a0"] == rank, "process"])
    return int(process)


def test_both_ranks(parallel: Recorded) -> None:
    assert_whole(parallel)
    assert_nested(parallel)
    assert_counted(parallel)
    steps = parallel.frames["steps"]
    assert_sglangs_ranks(steps, parallel.frames["segments"])
    for stage in ("attention", "moe_route", "expert_dispatch", "expert_compute", "expert_combine"):
        counts = by_step(parallel.segments(stage))
        assert len(counts) == 2 * len(steps) and (counts == LAYERS).all(), stage
    info = {int(p.info["rank"]): p.info for p in parallel.recording.manifest.processes if "rank" in p.info}
    assert [info[rank]["local_experts"] for rank in (0, 1)] == ["0-3", "4-7"]


def test_collectives_of_every_step(parallel: Recorded) -> None:
    """An all_reduce after the embedding and two in every layer, and an all_gather of the logits, on each rank."""
    rows = parallel.segments("collective")
    counted = rows.groupby(["process", "instance", "step", "a0"]).size().unstack("a0")
    assert len(counted) == 2 * len(parallel.frames["steps"])
    assert {*counted.columns} == {Collective.ALL_REDUCE, Collective.ALL_GATHER}
    assert (counted[Collective.ALL_REDUCE] == 1 + 2 * LAYERS).all()
    assert (counted[Collective.ALL_GATHER] == 1).all()
    names = names_of(parallel.recording.manifest.processes)
    assert {names[group] for group in rows["a1"]} == {"tp:0 (ranks 0-1)"}
    assert {names[algorithm] for algorithm in rows["a3"]} == {"gloo"}
    reduced = rows[rows["a0"] == Collective.ALL_REDUCE]
    assert (reduced["a2"].to_numpy() == of_steps(parallel, reduced) * HIDDEN * TYPE_BYTES).all()


def test_numbers_are_the_same_on_both_ranks(parallel: Recorded) -> None:
    rows = parallel.segments("collective")
    of_ranks = [
        {(row.step, row.a4): (row.a0, row.a2) for row in part.itertuples()} for _, part in rows.groupby("process")
    ]
    assert len(of_ranks) == 2 and of_ranks[0] == of_ranks[1]
    assert len(of_ranks[0]) == len(rows) / 2, "a number is used once"
    for _, part in rows.groupby("process"):
        assert (part.sort_values("begin_ns")["a4"].diff().iloc[1:] > 0).all()


def test_an_overloaded_rank_has_the_other_wait(parallel: Recorded) -> None:
    """All tokens' experts are on the first rank: it computes, and the second one waits in the all_reduce after that."""
    counts = np.stack([np.asarray(row) for row in parallel.frames["experts"]["counts"]])
    assert counts[:, : EXPERTS // 2].sum() == counts.sum()
    layers = summarise(parallel.recording.session).layers
    assert [load.rank_imbalance_per_step for load in layers.experts] == [2.0] * LAYERS
    first, second = (process_of(parallel, rank) for rank in (0, 1))
    computing = parallel.segments("expert_compute")
    spent = (computing["end_ns"] - computing["begin_ns"]).groupby(computing["process"]).sum()
    assert spent[first] > 2 * spent[second]
    rows = parallel.segments("collective")
    rows = rows.assign(duration=rows["end_ns"] - rows["begin_ns"])
    rows = with_waiting(rows, names_of(parallel.recording.manifest.processes))
    reduced = rows[rows["a0"] == Collective.ALL_REDUCE].sort_values("begin_ns")
    place = reduced.groupby(["process", "instance", "step"]).cumcount()  # 0: of the embedding, then two a layer
    waited = reduced[(place > 0) & (place % 2 == 0)].groupby("process")["waiting"].sum()
    assert waited[second] > 2 * waited[first]
