"""Requests of every kind on one real server: speculation, structured output, several answers, priority, preemption.

The KV cache is so small that requests are preempted. What vLLM itself counts over the same time is the judge.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from backends.receiver import GrpcReceiver, Received
from engines import iterations
from engines.recording import Recording, complete, metrics, record

from stagetrace.exporters.spans import LATENCIES
from stagetrace.instrument.ids import request_span_id
from stagetrace.instrument.stages import BY_NAME, QueueCause

if TYPE_CHECKING:
    import pandas as pd

    from stagetrace.exporters.session import Process

TRACE_ID, PARENT_ID = "5bf92f3577b34da6a3ce929d0e0e4736", "10f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
BLOCKS = 9  # of 128 tokens
SPECULATION = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}'
REGEX = "(abcabc){20}"
SCHEMA = {"type": "object", "properties": {"stage": {"enum": ["prefill", "decode"]}}, "required": ["stage"]}


@dataclass
class Recorded:
    """What the tests of this file look at."""

    recording: Recording
    before: dict[str, float]
    after: dict[str, float]
    answers: dict[str, dict[str, Any]]
    crowd: list[dict[str, Any]]
    spans: list[Received]
    iterations: list[dict[str, Any]]  # vLLM's IterationStats

    @property
    def requests(self) -> pd.DataFrame:
        return self.recording.frames()["requests"].set_index("external_id")

    def counted(self, name: str) -> float:
        """By how much one of vLLM's own counters grew."""
        return self.after[name] - self.before.get(name, 0.0)


@pytest.fixture(scope="module")
def recorded(model, tmp_path_factory) -> Recorded:  # type: ignore[no-untyped-def]
    directory = tmp_path_factory.mktemp("kinds")
    arguments = ("--enforce-eager", "--max-model-len", "1024", "--num-gpu-blocks-override", str(BLOCKS))
    arguments += ("--speculative-config", SPECULATION, "--per-request-spec-decode-metrics", "summary")
    arguments += ("--scheduling-policy", "priority", "--cudagraph-metrics")
    plugin = iterations.installed(directory / "iterations")
    answers: dict[str, dict[str, Any]] = {}
    crowd: list[dict[str, Any]] = []
    with GrpcReceiver() as receiver:
        env = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_INSECURE": "true",
            **plugin,
        }
        with record(model, directory, *arguments, env=env, run=("--no-report",)) as recording:
            server = recording.server
            before = metrics(server)
            answers["regex"] = complete(server, prompt="say", max_tokens=90, structured_outputs={"regex": REGEX})
            answers["json"] = complete(server, prompt="say", max_tokens=60, structured_outputs={"json": SCHEMA})
            answers["n"] = complete(
                server, TRACEPARENT, prompt="three answers", max_tokens=9, n=3, temperature=1.0, seed=4, ignore_eos=True
            )
            answers["first"] = complete(server, prompt="word " * 300, max_tokens=4, ignore_eos=True, priority=7)
            answers["again"] = complete(server, prompt="word " * 300, max_tokens=4, ignore_eos=True)

            def one(number: int) -> None:
                body = {"prompt": f"{number} " * 150, "max_tokens": 150, "ignore_eos": True, "priority": number % 3}
                crowd.append(complete(server, **body))

            threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            after = metrics(server)
        spans = receiver.received()
    return Recorded(recording, before, after, answers, crowd, spans, iterations.told(plugin))


def test_accounting(recorded: Recorded) -> None:
    manifest = recorded.recording.manifest
    assert manifest.counts["accounting_conflict"] == 0
    assert not any(process.errors for process in manifest.processes)
    assert sum(losses.lost for losses in manifest.losses) == 0
    steps = recorded.recording.frames()["steps"]
    assert set(steps["status"]) == {"complete"}
    assert steps["unattributed_ns"].sum() < 0.05 * (steps["end_ns"] - steps["begin_ns"]).sum()


def test_every_request_is_as_its_client_saw_it(recorded: Recorded) -> None:
    requests = recorded.requests
    assert set(requests["status"]) == {"finished"}
    assert not requests["partial"].any()
    for answer in (*recorded.answers.values(), *recorded.crowd):
        rows = requests.loc[[f"{answer['id']}-0"]]
        assert set(rows["prompt_tokens"]) == {answer["usage"]["prompt_tokens"]}
        assert rows["output_tokens"].sum() == answer["usage"]["completion_tokens"]
        cached = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens")
        assert cached is None or rows["cached_tokens"].max() == cached


def test_counts_are_vllms_own(recorded: Recorded) -> None:
    requests, steps = recorded.requests, recorded.recording.frames()["steps"]
    assert recorded.counted("vllm:request_success_total") == len(requests)
    assert recorded.counted("vllm:prompt_tokens_total") == requests["prompt_tokens"].sum()
    assert recorded.counted("vllm:generation_tokens_total") == requests["output_tokens"].sum()
    assert recorded.counted("vllm:num_preemptions_total") == requests["preemptions"].sum() > 0
    assert steps["preempted"].sum() == requests["preemptions"].sum()
    assert recorded.counted("vllm:prefix_cache_hits_total") >= requests["cached_tokens"].sum() > 0
    assert steps["output_tokens"].sum() == requests["output_tokens"].sum()


def test_steps_are_vllms_iterations(recorded: Recorded) -> None:
    """One IterationStats for each step that gave tokens, with the same tokens in it."""
    frames = recorded.recording.frames()
    requests, steps, states = frames["requests"].set_index("handle"), frames["steps"], frames["states"]
    first = states[states["stage"] == BY_NAME["decode"].id].sort_values("begin_ns").drop_duplicates("handle")
    first = first.assign(prompt_tokens=requests["prompt_tokens"].loc[first["handle"]].to_numpy())
    begun = first.groupby("step")["prompt_tokens"].agg(["sum", "size"])
    giving = steps[steps["output_tokens"] > 0].sort_values("step").set_index("step")
    ours = giving[["output_tokens"]].join(begun).fillna(0).astype("int64")
    theirs = [each for each in recorded.iterations if each["generation_tokens"]]
    names = ("generation_tokens", "prompt_tokens", "first_tokens")
    assert [*ours.itertuples(index=False, name=None)] == [tuple(each[name] for name in names) for each in theirs]
    # vLLM tells of a preemption with the next token of the request that was preempted.
    assert sum(each["preempted"] for each in recorded.iterations) == steps["preempted"].sum() > 0


def test_requests_are_vllms_own(recorded: Recorded) -> None:
    """What vLLM counts and times of each request: counts exactly, times within 2 % or 100 us."""
    theirs = sorted(
        (each for iteration in recorded.iterations for each in iteration["finished"]),
        key=lambda each: (each["request_id"], each["num_generation_tokens"], each["decode_time"]),
    )
    rows = recorded.requests.reset_index()
    rows["decoding"] = rows["last_token_ns"] - rows["first_token_ns"]
    rows = rows.sort_values(["external_id", "output_tokens", "decoding"])
    assert len(rows) == len(theirs)
    for row, each in zip(rows.to_dict("records"), theirs, strict=True):
        counts = ("prompt_tokens", "output_tokens", "cached_tokens", "preemptions")
        names = ("num_prompt_tokens", "num_generation_tokens", "num_cached_tokens", "num_preemptions")
        assert row["external_id"] == each["request_id"]
        assert [row[name] for name in counts] == [each[name] for name in names]
        for name, begin, end in (
            ("queued_time", "queued_ns", "scheduled_ns"),
            ("prefill_time", "scheduled_ns", "first_token_ns"),
            ("decode_time", "first_token_ns", "last_token_ns"),
            ("inference_time", "scheduled_ns", "last_token_ns"),
        ):
            assert (row[end] - row[begin]) / 1e9 == pytest.approx(each[name], rel=0.02, abs=1e-4), name


def test_speculation_is_counted_as_vllm_does(recorded: Recorded) -> None:
    requests, steps = recorded.requests, recorded.recording.frames()["steps"]
    drafted = recorded.counted("vllm:spec_decode_num_draft_tokens_total")
    accepted = recorded.counted("vllm:spec_decode_num_accepted_tokens_total")
    assert 0 < accepted < drafted
    assert steps["draft_tokens"].sum() == requests["draft_tokens"].sum() == drafted
    assert steps["accepted_tokens"].sum() == requests["accepted_tokens"].sum() == accepted
    assert (steps["accepted_tokens"] <= steps["draft_tokens"]).all()
    # In decode every request has its last token and the drafts to verify. (A request that is resumed has drafts too.)
    alone = steps[steps["prefill_requests"] == 0]
    assert (alone["decode_tokens"] == alone["decode_requests"] + alone["draft_tokens"]).all()
    # vLLM says on the CPU as well that it uses no graph, and pads nothing.
    assert set(steps["graph_mode"]) == {"none"}
    assert (steps["padded_tokens"] == steps["prefill_tokens"] + steps["decode_tokens"]).all()
    plain = steps[steps["draft_tokens"] == 0]
    assert (plain["output_tokens"] <= plain["members"]).all()


def test_structured_output_waits_for_its_grammar(recorded: Recorded) -> None:
    frames = recorded.recording.frames()
    requests, states, segments = recorded.requests, frames["states"], frames["segments"]
    structured = [f"{recorded.answers[name]['id']}-0" for name in ("regex", "json")]
    text = recorded.answers["regex"]["choices"][0]["text"]
    assert re.match("(abc)+", text) is not None
    compiled = segments[segments["stage"] == BY_NAME["grammar_compile"].id]
    assert len(compiled) == len(structured)
    for row in requests.loc[structured].itertuples():
        queue = states[(states["handle"] == row.handle) & (states["stage"] == BY_NAME["queue"].id)]
        causes = queue.sort_values("begin_ns")["a1"].tolist()
        assert causes in ([QueueCause.GRAMMAR, QueueCause.TURN], [QueueCause.TURN])
        if len(causes) == 2:
            assert row.grammar_ns <= row.queue_ns
            assert (queue["end_ns"].min() == compiled["end_ns"]).any()
    assert requests.loc[structured, "grammar_ns"].notna().any(), "no grammar took longer than the way to the queue"
    assert requests.drop(structured)["grammar_ns"].isna().all()
    bitmasks = segments[segments["stage"] == BY_NAME["grammar"].id]
    assert len(bitmasks) >= recorded.answers["json"]["usage"]["completion_tokens"] // 4
    assert set(bitmasks["parent_stage"].dropna()) <= {BY_NAME["execute"].id}


def test_drafts_are_proposed_and_verified(recorded: Recorded) -> None:
    frames = recorded.recording.frames()
    steps, segments = frames["steps"], frames["segments"]
    drafting = steps[steps["draft_tokens"] > 0]
    for name, parents in (("verify", {"sample"}), ("draft", {"return", "sample"})):
        rows = segments[segments["stage"] == BY_NAME[name].id]
        assert {BY_NAME[parent].id for parent in parents} >= set(rows["parent_stage"]), name
        assert set(drafting["step"]) <= set(rows["step"]), name


def test_several_answers_have_one_parent(recorded: Recorded) -> None:
    answer = recorded.answers["n"]
    rows = recorded.requests.loc[[f"{answer['id']}-0"]].sort_values("child")
    assert rows["child"].tolist() == [0, 1, 2]
    assert set(rows["children"]) == {3}
    assert rows["parent"].nunique() == 1
    assert set(rows["trace_id"]) == {TRACE_ID}
    trace = [span for span in recorded.spans if span.span.trace_id.hex() == TRACE_ID]
    (parent,) = [span for span in trace if span.span.name == "parent_request"]
    assert parent.span.parent_span_id.hex() == PARENT_ID
    assert parent.span.span_id == request_span_id(recorded.recording.session.identity.key, int(rows["parent"].iloc[0]))
    children = [span for span in trace if span.span.name == "request"]
    assert {child.span.parent_span_id for child in children} == {parent.span.span_id}
    assert sorted(child.attributes["stagetrace.child"] for child in children) == [0, 1, 2]
    assert parent.attributes["gen_ai.request.choice.count"] == 3
    assert parent.attributes["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"]
    assert parent.attributes["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    for child in children:
        assert set(LATENCIES) <= set(child.attributes)
        assert parent.span.start_time_unix_nano <= child.span.start_time_unix_nano
        assert child.span.end_time_unix_nano <= parent.span.end_time_unix_nano
    alone = recorded.requests.drop(f"{answer['id']}-0")
    assert alone[["parent", "child", "children"]].isna().all().all()


def test_priority_cache_and_preemption(recorded: Recorded) -> None:
    requests = recorded.requests
    first, again = (requests.loc[f"{recorded.answers[name]['id']}-0"] for name in ("first", "again"))
    assert (first["priority"], again["priority"]) == (7, 0)
    assert first["cached_tokens"] == 0
    assert again["cached_tokens"] >= 128
    assert set(requests["external_tokens"]) == {0}
    preempted = requests[requests["preemptions"] > 0]
    assert preempted["preempted_ns"].gt(0).all()
    assert requests["lora"].isna().all()


STARTUP = {
    "front_end": {"startup", "imports"},
    "engine_core": {"startup", "imports", "start_workers", "set_up_kv_cache"},
    "worker": {
        *("startup", "imports", "init_device", "model_load", "build_model", "load_weights"),
        *("profile_memory", "allocate_kv_cache", "warm_up"),
    },
}


def test_start_up_is_a_trace_of_each_process(recorded: Recorded) -> None:
    frames = recorded.recording.frames()
    segments = frames["segments"]
    for process in frames.manifest.processes:
        mine = segments[(segments["process"] == process.key) & segments["step"].isna()]
        rows = {name: mine[mine["stage"] == BY_NAME[name].id] for name in STARTUP[process.role]}
        assert {name: len(each) for name, each in rows.items()} == dict.fromkeys(rows, 1), process.role
        root = rows.pop("startup").iloc[0]
        assert root["begin_ns"] <= process.started_ns <= root["end_ns"]
        assert root["begin_ns"] == rows["imports"]["begin_ns"].iloc[0], "both from the start of the process"
        inside = [each.iloc[0] for each in rows.values()]
        assert all(root["begin_ns"] <= row["begin_ns"] <= row["end_ns"] <= root["end_ns"] for row in inside)
        assert {int(row["parent_stage"]) for row in inside} <= {int(root["stage"]), BY_NAME["model_load"].id}
        roots = [span for span in recorded.spans if span.span.name == "startup" and _is_of(span, process)]
        assert len(roots) == 1
        trace = [span.span for span in recorded.spans if span.span.trace_id == roots[0].span.trace_id]
        assert STARTUP[process.role] <= {span.name for span in trace}
        assert [span.name for span in trace if not span.parent_span_id] == ["startup"]


def _is_of(span: Received, process: Process) -> bool:
    return bool(span.resource["process.pid"] == process.pid)


def test_spans_of_a_worker_say_its_ranks(recorded: Recorded) -> None:
    ranks = {f"stagetrace.{name}": 0 for name in ("rank", "tp_rank", "pp_rank", "dp_rank", "ep_rank")}
    forwards = [span for span in recorded.spans if span.span.name.startswith("forward ")]
    assert forwards
    for span in forwards:
        assert ranks.items() <= span.resource.items()
