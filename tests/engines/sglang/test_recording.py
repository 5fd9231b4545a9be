"""A recorded SGLang server against its responses, its own metrics, and a server that is not recorded."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest
from engines.lit import assert_lit
from engines.raising import RAISES
from engines.recording import Recording, abort_after, complete, metrics, record
from engines.server import serve
from engines.sglang.generate import Answer, generate, generate_together
from quickstart.load import Result, run_load
from quickstart.servers import SGLANG

from stagetrace.adapters.sglang.hooks import HOOK_POINTS
from stagetrace.analysis.batch import Batch
from stagetrace.analysis.breakdown import hook_troubles
from stagetrace.analysis.report import summarise
from stagetrace.instrument.hooks import ERRORS_UNTIL_OUT, in_range, release_of
from stagetrace.instrument.ids import handle
from stagetrace.instrument.stages import BY_NAME, Level

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pandas as pd
    from engines.conftest import Calibrated
    from engines.server import Server

    from stagetrace.analysis.load import Frames

# The rows that record in these runs; what speculation needs SGLang imports with it alone.
ROWS = [
    point
    for point in HOOK_POINTS
    if point.level <= Level.STEP and in_range(point, release_of("0.5.23")) and ".speculative." not in point.module
]
CHUNK = 256
# One at a time, before anything else: the same work on every server.
QUESTIONS = ("a", "where does the time go " * 90, "list the stages of a step", "0123456789" * 30)
WORDS = ["queue", "schedule", "prefill", "decode", "attention", "expert", "dispatch", "combine", "sample", "rank"]


# Counting fails too; it is called by what stands in for a router's own function.
NO_COUNTS = """
from stagetrace.adapters import experts
experts.HostCounts.count = raises
"""


def conversation(server: Server) -> list[Answer]:
    """A session of SGLang's: its second request continues the first."""
    opened = httpx.post(f"{server.root_url}/open_session", json={"capacity_of_str_len": 1000}, timeout=60)
    opened.raise_for_status()
    params = {"id": opened.json()}
    first = generate(server, "session-0", "the first turn", 8, session_params=params)
    return [first, generate(server, "session-1", " and the second", 8, session_params={**params, "rid": first.id})]


def ask(server: Server) -> list[Answer]:
    return [generate(server, f"question-{number}", text, 40) for number, text in enumerate(QUESTIONS)]


@dataclass
class Recorded:
    """What the tests of this file look at."""

    recording: Recording
    frames: Frames
    questions: list[Answer]
    answers: list[Answer]  # of a load between two looks at the metrics, under ids of their own, and of a session
    results: list[Result]  # of a load by the OpenAI interface
    before: dict[str, float]
    after: dict[str, float]

    def handle(self, rid: str) -> int:
        return handle(self.recording.session.identity.key, rid)

    def requests(self) -> pd.DataFrame:
        return self.frames["requests"].set_index("handle")


@pytest.fixture(scope="module")
def recorded(model: Path, engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """One server with the overlapping scheduler: questions, a load of each kind, and requests of special kinds."""
    assert engine_python
    arguments = ("--chunked-prefill-size", str(CHUNK), "--enable-metrics", "--skip-server-warmup")
    with record(model, tmp_path_factory.mktemp("recording"), *arguments, engine=SGLANG) as recording:
        server = recording.server
        questions = ask(server)
        before = metrics(server)
        shared = " ".join(WORDS * 12)
        load = [(f"load-{n}", f"{shared} {WORDS[n % 10]} {n}" * (1 + n % 4), 10 + 5 * n) for n in range(12)]
        answers = generate_together(server, load)
        after = metrics(server)
        results = asyncio.run(run_load(server.base_url, server.model, requests=21, seed=3))
        abort_after(server, chunks=5, max_tokens=3000)
        complete(server, prompt=["first prompt", "second prompt"], max_tokens=7, n=2, ignore_eos=True)
        generate(server, "one-token", "only one token", 1)
        generate(server, "digits", "a number of six digits", 12, regex="[0-9]{6}", ignore_eos=False)
        answers += conversation(server)
        given = {"model_path": str(model)}
        httpx.post(f"{server.root_url}/update_weights_from_disk", json=given, timeout=120).raise_for_status()
        time.sleep(0.5)  # the abort of a client that went away is noticed by and by
    return Recorded(recording, recording.frames(), questions, answers, results, before, after)


@pytest.mark.matrix  # needs a calibration with SGLang's torch
def test_nothing_is_faster_than_what_was_measured(recorded: Recorded, calibrated: Calibrated) -> None:
    light = summarise(recorded.recording.session, calibration=calibrated.path).light
    assert_lit(light)
    assert light.requests is not None and light.requests.least_tpot_ns and light.requests.tpot_ns
    assert light.requests.least_tpot_ns < light.requests.tpot_ns


def test_counts_are_those_of_the_responses(recorded: Recorded) -> None:
    requests = recorded.requests()
    for answer in (*recorded.questions, *recorded.answers):
        row = requests.loc[recorded.handle(answer.id)]
        assert (row["status"], row["finish"], row["preemptions"]) == ("finished", "length", 0)
        assert row["prompt_tokens"] == answer.meta["prompt_tokens"]
        assert row["output_tokens"] == answer.meta["completion_tokens"]
        assert row["cached_tokens"] == answer.meta["cached_tokens"]
    for result in recorded.results:
        row = requests.loc[recorded.handle(result.id)]
        assert (row["prompt_tokens"], row["output_tokens"]) == (result.prompt_tokens, result.output_tokens)
    assert sum(answer.meta["cached_tokens"] for answer in recorded.answers) > 0, (
        "no prefix was found in the radix cache"
    )
    # Two prompts with two answers each, one with a single token, one with a grammar, and the aborted one.
    expected = len(recorded.questions) + len(recorded.answers) + len(recorded.results)
    finished = requests.query("status == 'finished'")
    assert len(finished) >= expected + 4 + 1 + 1
    assert requests["status"].value_counts().get("aborted", 0) == 1


def test_times_are_those_of_the_responses(recorded: Recorded) -> None:
    """Queue and prefill, request by request, as SGLang's own statistics have them: to 2 % or 100 µs."""
    requests = recorded.requests()
    for answer in recorded.answers:
        row, meta = requests.loc[recorded.handle(answer.id)], answer.meta
        queued = (row["scheduled_ns"] - row["queued_ns"]) / 1e9
        assert abs(queued - meta["queue_time"]) <= max(0.02 * meta["queue_time"], 100e-6)
        theirs = meta["prefill_finished_time"] - meta["forward_entry_time"]
        ours = (row["first_token_ns"] - row["scheduled_ns"]) / 1e9
        assert abs(ours - theirs) <= max(0.02 * theirs, 100e-6)


def test_counts_are_those_of_sglangs_own_metrics(recorded: Recorded) -> None:
    ids = [answer.id for answer in recorded.answers if answer.id.startswith("load-")]
    load = recorded.requests().loc[[recorded.handle(rid) for rid in ids]]

    def counted(name: str) -> float:
        return recorded.after[name] - recorded.before.get(name, 0)

    assert counted("sglang:num_requests_total") == len(load)
    assert counted("sglang:prompt_tokens_total") == load["prompt_tokens"].sum()
    assert counted("sglang:generation_tokens_total") == load["output_tokens"].sum()
    assert counted("sglang:cached_tokens_total") == load["cached_tokens"].sum()


def test_accounting(recorded: Recorded) -> None:
    manifest = recorded.recording.manifest
    assert manifest.complete
    assert manifest.counts["accounting_conflict"] == 0
    assert sum(losses.lost for losses in manifest.losses) == 0
    assert not any(process.errors for process in manifest.processes)
    steps, segments = recorded.frames["steps"], recorded.frames["segments"]
    assert set(steps["status"]) == {"complete"}
    assert (steps["unattributed_ns"] >= 0).all()
    assert steps["unattributed_ns"].sum() < 0.05 * (steps["end_ns"] - steps["begin_ns"]).sum()
    for name, parents in {
        "schedule": {0},
        "update": {0},
        "execute": {0},
        "rank_step": {BY_NAME["execute"].id},
        "prepare": {BY_NAME["rank_step"].id},
        "forward": {BY_NAME["rank_step"].id},
        "sample": {BY_NAME["rank_step"].id},
        "return": {BY_NAME["rank_step"].id},
        "grammar": {BY_NAME["sample"].id},
        "emit": {BY_NAME["update"].id},
    }.items():
        rows = segments[(segments["stage"] == BY_NAME[name].id) & segments["step"].notna()]
        assert set(rows["parent_stage"].fillna(0)) == parents, name
        assert set(rows["step"]) <= set(steps["step"]), name
    for name in ("schedule", "update", "prepare", "forward"):
        assert (segments["stage"] == BY_NAME[name].id).sum() == len(steps), name
    # For n = 2 SGLang first computes the prompt alone, without a token.
    assert 0 <= len(steps) - (segments["stage"] == BY_NAME["sample"].id).sum() <= 2


def test_steps_overlap(recorded: Recorded) -> None:
    """The result of a step is taken in after the next one was launched."""
    segments = recorded.frames["segments"]
    updates = segments[segments["stage"] == BY_NAME["update"].id].set_index("step")["begin_ns"]
    launches = segments[segments["stage"] == BY_NAME["execute"].id].groupby("step")["begin_ns"].min()
    following = launches.shift(-1).dropna()
    assert (updates.loc[following.index] > following).mean() > 0.5


def test_every_hook_is_installed_where_it_is_called(recorded: Recorded) -> None:
    processes = recorded.recording.manifest.processes
    assert {"front_end", "engine_core+worker"} <= {process.role for process in processes}
    assert hook_troubles(processes) == []
    (core,) = [process for process in processes if process.role == "engine_core+worker"]
    installed = {hook["name"] for hook in core.hooks if hook["status"] == "installed"}
    assert {point.target for point in ROWS if point.process in ("scheduler", "rank")} <= installed


def test_the_front_end_does_not_import_the_model(recorded: Recorded) -> None:
    """Its hooks on the model runner still wait for an import that never comes."""
    (front,) = [process for process in recorded.recording.manifest.processes if process.role == "front_end"]
    waiting = {hook["name"] for hook in front.hooks if hook["status"] == "waiting"}
    model = {point.target for point in ROWS if point.module.startswith("sglang.srt.model_executor.")}
    assert len(model) > 1 and model <= waiting


def test_steps_tell_prefill_and_decode_apart(recorded: Recorded) -> None:
    steps, states = recorded.frames["steps"], recorded.frames["states"]
    requests = recorded.frames["requests"]
    assert set(steps["phase"]) == {"prefill", "decode"}
    chunks = states[states["stage"] == BY_NAME["prefill_chunk"].id]
    # Every prompt token was either found in the cache or computed in a chunk: by request, exactly.
    computed = chunks.groupby("handle")["a0"].sum()
    expected = (requests["prompt_tokens"] - requests["cached_tokens"]).set_axis(requests["handle"])
    assert (computed.sort_index() == expected.sort_index().astype("int64")).all()
    assert chunks.groupby("handle")["a2"].sum().eq(1).all(), "one last chunk a request"
    assert chunks.groupby("handle").size().max() > 1, "no prompt was long enough to be chunked"
    by_step = chunks.groupby("step")["a0"].sum()
    assert by_step.max() <= CHUNK
    prefill = steps.set_index("step")["prefill_tokens"]
    assert prefill[prefill > 0].to_dict() == by_step.to_dict()
    assert (steps["decode_q_q"] == steps["decode_tokens"]).all()
    assert (steps["decode_q_kv"] == steps["decode_context"]).all()
    assert (steps["members"] == steps["prefill_requests"] + steps["decode_requests"]).all()
    assert (steps["step"].sort_values().diff().dropna() >= 1).all()


def test_work_is_that_of_the_requests(recorded: Recorded) -> None:
    """Pairs of a token and one that it sees, once from the sums of steps, once from the lengths of requests alone.

    A request computes all its tokens but those that were cached and the last that it generated. With overlap one that
    is aborted, or that a grammar ends, has a step more than the tokens that it got.
    """
    requests, steps = recorded.frames["requests"], recorded.frames["steps"]
    batch = Batch.of_steps({str(name): column for name, column in steps.items()})
    computed = requests["prompt_tokens"] + (requests["output_tokens"] - 1).clip(lower=0)
    cached = requests["cached_tokens"].fillna(0)
    surplus = int(batch.tokens.sum()) - int((computed - cached).sum())
    pairs = int((computed * (computed + 1) // 2 - cached * (cached + 1) // 2).sum())
    found = int((batch.prefill.positions() + batch.decode.positions()).sum())
    assert 0 <= surplus <= 4 and pairs <= found <= pairs + surplus * (int(computed.max()) + 2)


def test_a_session_goes_on(recorded: Recorded) -> None:
    """The second request's prompt is the first one's with its answer, and what was added; most of it is cached."""
    first, second = (recorded.requests().loc[recorded.handle(f"session-{n}")] for n in (0, 1))
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["output_tokens"]
    assert second["cached_tokens"] >= first["prompt_tokens"]


def test_weights_are_replaced(recorded: Recorded) -> None:
    """By the same, once, after everything else."""
    segments = recorded.frames["segments"]
    (row,) = segments[segments["stage"] == BY_NAME["weight_update"].id].itertuples()
    assert row.end_ns > row.begin_ns >= segments.loc[segments["stage"] == BY_NAME["update"].id, "end_ns"].max()


STARTUP = {
    "front_end": {"startup", "imports", "start_workers"},
    "engine_core+worker": {
        *("startup", "imports", "init_device", "model_load", "build_model", "load_weights", "allocate_kv_cache"),
    },
    "detokenizer": {"startup", "imports"},
}


def test_start_up_of_each_process(recorded: Recorded) -> None:
    processes = recorded.recording.manifest.processes
    assert {process.role for process in processes} == STARTUP.keys()
    segments = recorded.frames["segments"]
    for process in processes:
        mine = segments[(segments["process"] == process.key) & segments["step"].isna()]
        rows = {name: mine[mine["stage"] == BY_NAME[name].id] for name in STARTUP[process.role]}
        assert {name: len(each) for name, each in rows.items()} == dict.fromkeys(rows, 1), process.role
        root = rows.pop("startup").iloc[0]
        assert root["begin_ns"] <= process.started_ns <= root["end_ns"]
        assert root["begin_ns"] == rows["imports"]["begin_ns"].iloc[0], "both from the start of the process"
        inside = [each.iloc[0] for each in rows.values()]
        assert all(root["begin_ns"] <= row["begin_ns"] <= row["end_ns"] <= root["end_ns"] for row in inside)
        assert {int(row["parent_stage"]) for row in inside} <= {int(root["stage"]), BY_NAME["model_load"].id}


def test_aborted_request(recorded: Recorded) -> None:
    row = recorded.frames["requests"].query("status == 'aborted'").iloc[0]
    assert row["finish"] == "abort"
    assert 5 <= row["output_tokens"] < 3000
    assert row["decode_ns"] > 0


def test_idle_time_is_told_apart(recorded: Recorded) -> None:
    segments = recorded.frames["segments"]
    idle = segments[segments["stage"] == BY_NAME["idle"].id]
    assert len(idle) >= len(recorded.questions)  # after each of the requests that came alone
    assert (idle["a0"] == 1).all()


@pytest.fixture(scope="module")
def plain(model: Path, engine_python: Path) -> Iterator[list[Answer]]:
    """The answers of a server without stagetrace."""
    assert engine_python
    with serve(model, "--chunked-prefill-size", str(CHUNK), "--skip-server-warmup", engine=SGLANG) as server:
        answers = ask(server)
    yield answers


def test_output_is_the_same_with_and_without(recorded: Recorded, plain: list[Answer]) -> None:
    assert [answer.text for answer in recorded.questions] == [answer.text for answer in plain]
    assert len({answer.text for answer in plain}) == len(plain), "the model answers everything alike"


def test_hooks_that_raise_on_every_call(
    model: Path, plain: list[Answer], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The server goes on, with the same output; each hook takes itself out and is said to have done so."""
    directory = tmp_path_factory.mktemp("raising")
    (directory / "sitecustomize.py").write_text(RAISES + NO_COUNTS)
    env = {"PYTHONPATH": str(directory)}
    arguments = ("--chunked-prefill-size", str(CHUNK), "--skip-server-warmup")
    with record(model, directory, *arguments, engine=SGLANG, env=env, run=("--level", "layer")) as recording:
        answers = ask(recording.server)
    assert [answer.text for answer in answers] == [answer.text for answer in plain]
    (core,) = [process for process in recording.manifest.processes if process.role == "engine_core+worker"]
    out: dict[str, Any] = {hook["name"]: hook for hook in core.hooks if hook["status"] == "out"}
    called = (
        *("run_batch", "process_batch_result", "get_next_batch_to_run", "ModelRunner.forward", "ModelRunner.sample"),
        *("RadixAttention.forward", "TopK.forward", "select_experts", "FusedMoE.run_moe_core"),
        *("VocabParallelEmbedding.forward", "LogitsProcessor.forward"),
    )
    assert all(any(name.endswith(each) for name in out) for each in called), out
    errors = [count for name, count in core.errors.items() if name in out]
    # One more where what comes after the engine's function raised in the same call as what comes before it.
    assert set(errors) <= {ERRORS_UNTIL_OUT, ERRORS_UNTIL_OUT + 1}
