"""A recorded server against what its client saw, what vLLM's own metrics say, and what arrives by OTLP."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from backends.receiver import GrpcReceiver, HttpReceiver, Received, values
from engines.lit import MOST, assert_lit
from engines.recording import STAGETRACE, Recording, abort_after, ask, complete, metrics, record
from engines.server import environment
from engines.streaming import Streamed, stream
from quickstart.load import Request, Result, run_load

from stagetrace.adapters.vllm.hooks import HOOK_POINTS
from stagetrace.analysis.batch import Batch
from stagetrace.analysis.breakdown import hook_troubles
from stagetrace.analysis.calibration.results import file_name, save
from stagetrace.analysis.report import print_summary, summarise
from stagetrace.analysis.speed_of_light import MEASURED
from stagetrace.instrument.hooks import in_range, release_of
from stagetrace.instrument.ids import step_trace_id
from stagetrace.instrument.stages import BY_NAME, Level

if TYPE_CHECKING:
    import pandas as pd
    from engines.conftest import Calibrated
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    from stagetrace.analysis.load import Frames

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=1"}
ABORTED_MAX_TOKENS = 3000
SHORT = Request(({"role": "user", "content": "one question"},), max_tokens=20)


@dataclass
class Recorded:
    """What the tests of this file look at."""

    recording: Recording
    frames: Frames
    results: list[Result]
    streamed: list[Streamed]
    before: dict[str, float]
    after: dict[str, float]
    spans: list[Received]
    metrics: list[ExportMetricsServiceRequest]


@pytest.fixture(scope="module")
def recorded(model, calibrated, tmp_path_factory) -> Recorded:  # type: ignore[no-untyped-def]
    """One server: a load between two looks at its metrics, then requests of special kinds, then its end."""
    directory = tmp_path_factory.mktemp("recording")
    kept = directory / "data" / "stagetrace" / "calibrations" / file_name(calibrated.found.name, 1)
    save(calibrated.found, kept)
    with GrpcReceiver() as receiver:
        env = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_INSECURE": "true",
            "XDG_DATA_HOME": str(directory / "data"),
        }
        arguments = ("--enforce-eager", "--max-num-batched-tokens", "256", "--enable-logging-iteration-details")
        with record(model, directory, *arguments, env=env) as recording:
            server = recording.server
            streamed = stream(server, [f"{number} " * 1900 for number in range(12)], max_tokens=80)
            before = metrics(server)
            results = asyncio.run(run_load(server.base_url, server.model, requests=42, seed=3))
            after = metrics(server)
            results += ask(server, SHORT, headers=TRACEPARENT)
            abort_after(server, chunks=5, max_tokens=ABORTED_MAX_TOKENS)
            complete(server, prompt=["first prompt", "second prompt"], max_tokens=7, n=2, ignore_eos=True)
            complete(server, prompt="only one token", max_tokens=1)
            time.sleep(0.5)  # the abort of a client that went away is noticed by and by
        spans, sent = receiver.received(), list(receiver.metrics)
    return Recorded(recording, recording.frames(), results, streamed, before, after, spans, sent)


def by_external_id(recorded: Recorded) -> pd.DataFrame:
    return recorded.frames["requests"].set_index("external_id")


def test_requests_and_tokens_are_the_clients(recorded: Recorded) -> None:
    requests = by_external_id(recorded)
    for result in recorded.results:
        row = requests.loc[result.id]
        assert row["status"] == "finished"
        assert row["prompt_tokens"] == result.prompt_tokens
        assert row["output_tokens"] == result.output_tokens
        assert row["finish"] == "length"
        assert not row["partial"]
    # two prompts with two answers each, one request with a single token, and the aborted one
    assert len(requests) == len(recorded.streamed) + len(recorded.results) + 4 + 1 + 1
    assert requests["status"].value_counts().to_dict() == {"finished": len(requests) - 1, "aborted": 1}


def test_times_are_within_what_the_client_saw(recorded: Recorded) -> None:
    requests = by_external_id(recorded)
    for result in recorded.results:
        row = requests.loc[result.id]
        assert result.first_token_s is not None
        first = (row["first_sent_ns"] - row["arrival_ns"]) / 1e9
        last = (row["last_sent_ns"] - row["arrival_ns"]) / 1e9
        assert 0 < first <= result.first_token_s
        assert first <= last <= result.duration_s


def test_agrees_with_a_clients_own_times(recorded: Recorded) -> None:
    """Long streams, one after the other: from the request's head to the first byte, and to the last.

    What is ours lies within what the client saw, stream by stream. The middle one of the differences is at most 2 % or
    100 us, and the way of a byte to another process and back. A client that is late to read has no part in it.
    """
    rows = by_external_id(recorded).loc[[f"{one.id}-0" for one in recorded.streamed]]
    assert rows["output_tokens"].tolist() == [one.tokens for one in recorded.streamed]
    received, sent = rows["received_ns"].to_numpy(np.int64), rows["first_sent_ns"].to_numpy(np.int64)
    assert (received >= [one.sent_ns for one in recorded.streamed]).all()
    assert (received <= rows["arrival_ns"]).all()
    assert (sent <= [one.chunks_ns[0] for one in recorded.streamed]).all()
    way = statistics.median(one.way_ns for one in recorded.streamed)
    in_time = np.array([one.first_alone for one in recorded.streamed])
    assert in_time.sum() >= len(in_time) / 2, "the client had no processor"
    last = rows["last_sent_ns"].to_numpy(np.int64)
    gaps = (rows["last_output_ns"] - rows["first_output_ns"]) / (rows["output_tokens"] - 1)
    for name, ours, theirs, which in (
        ("to first token", sent - received, [one.to_first_token for one in recorded.streamed], in_time),
        ("end to end", last - received, [one.end_to_end for one in recorded.streamed], np.ones_like(in_time)),
        ("between tokens", gaps.to_numpy(float), [one.between_tokens for one in recorded.streamed], in_time),
    ):
        apart, whole = np.median((np.array(theirs) - ours)[which]), np.median(np.array(theirs)[which])
        print(f"{name}: {whole / 1e6:.3f} ms, of it not ours {apart / 1e6:.3f}; a byte's way {way / 1e6:.3f} ms")
        assert abs(apart) <= max(0.02 * whole, 100_000) + way, name


def test_order_of_a_requests_moments(recorded: Recorded) -> None:
    moments = [
        *("arrival_ns", "dispatched_ns", "queued_ns", "scheduled_ns", "first_token_ns", "first_output_ns"),
        *("first_sent_ns", "last_sent_ns", "end_ns"),
    ]
    finished = recorded.frames["requests"].query("status == 'finished'")
    assert finished[moments].notna().all().all()
    assert (finished[moments].astype("int64").diff(axis=1).iloc[:, 1:] >= 0).all().all()
    assert (finished["last_token_ns"] >= finished["first_token_ns"]).all()
    assert (finished["last_output_ns"] >= finished["last_token_ns"]).all()
    sums = ["tokenize_ns", "dispatch_ns", "queue_ns", "prefill_ns", "decode_ns", "output_ns"]
    assert (finished[sums].sum(axis=1) == finished["end_ns"] - finished["arrival_ns"]).all()


def test_accounting(recorded: Recorded) -> None:
    manifest = recorded.recording.manifest
    assert manifest.complete
    assert manifest.counts["accounting_conflict"] == 0
    assert sum(losses.lost for losses in manifest.losses) == 0
    assert not any(process.errors for process in manifest.processes)
    steps = recorded.frames["steps"]
    assert set(steps["status"]) == {"complete"}
    assert steps["unattributed_ns"].sum() < 0.05 * (steps["end_ns"] - steps["begin_ns"]).sum()
    assert (steps["unattributed_ns"] >= 0).all()
    segments = recorded.frames["segments"]
    rank_steps = segments[segments["stage"] == BY_NAME["rank_step"].id]
    assert len(rank_steps) == len(steps)
    assert rank_steps["self_ns"].sum() < 0.05 * (rank_steps["end_ns"] - rank_steps["begin_ns"]).sum()


def test_every_hook_is_installed_where_it_is_called(recorded: Recorded) -> None:
    """All but those on the HTTP parser and the model runner that were not chosen, on what was not used here."""
    processes = recorded.recording.manifest.processes
    assert {process.role for process in processes} == {"front_end", "engine_core", "worker"}
    assert hook_troubles(processes) == []
    installed = {hook["name"] for process in processes for hook in process.hooks if hook["status"] == "installed"}
    here = release_of(next(process.info["engine_version"] for process in processes))
    recording = {point.target for point in HOOK_POINTS if point.level <= Level.STEP and in_range(point, here)}
    unused = recording - installed
    not_here = ("h11_impl", ".gpu.", "LLMEngine.", "vllm.compilation.", ".kv_transfer.")
    assert all(any(word in target for word in not_here) for target in unused), unused


def test_steps_tell_prefill_and_decode_apart(recorded: Recorded) -> None:
    steps, states = recorded.frames["steps"], recorded.frames["states"]
    requests = recorded.frames["requests"]
    assert set(steps["phase"]) == {"prefill", "decode", "mixed"}
    chunks = states[states["stage"] == BY_NAME["prefill_chunk"].id]
    # Every prompt token was either found in the cache or computed in a chunk: by request, exactly.
    computed = chunks.groupby("handle")["a0"].sum()
    expected = (requests["prompt_tokens"] - requests["cached_tokens"]).set_axis(requests["handle"])
    assert (computed.sort_index() == expected.sort_index().astype("int64")).all()
    assert chunks.groupby("handle")["a2"].sum().eq(1).all(), "one last chunk a request"
    assert chunks.groupby("handle").size().max() > 1, "no prompt was long enough to be chunked"
    # The chunks' tokens are the steps' prefill tokens, step by step.
    by_step = chunks.groupby("step")["a0"].sum().to_dict()
    prefill = steps.set_index("step")["prefill_tokens"]
    assert prefill[prefill > 0].to_dict() == by_step
    # Without speculation: one token a request in decode.
    assert (steps["decode_tokens"] == steps["decode_requests"]).all()
    assert (steps["decode_q_q"] == steps["decode_tokens"]).all()
    assert (steps["decode_q_kv"] == steps["decode_context"]).all()
    assert (steps["members"] == steps["prefill_requests"] + steps["decode_requests"]).all()
    assert (steps["step"].sort_values().diff().dropna() == 1).all()


def test_steps_are_vllms_iterations(recorded: Recorded) -> None:
    """vLLM's log has a line for each, with what was in it."""
    line = r"Iteration\(\d+\): (\d+) context requests, (\d+) context tokens, (\d+) generation requests, (\d+) gen"
    told = [tuple(map(int, words)) for words in re.findall(line, recorded.recording.server.log.read_text("utf-8"))]
    columns = ["prefill_requests", "prefill_tokens", "decode_requests", "decode_tokens"]
    steps = recorded.frames["steps"].sort_values("step")[columns]
    assert told == [*steps.itertuples(index=False, name=None)]


def test_decode_context_follows_from_the_requests(recorded: Recorded) -> None:
    """A request in decode has in its k-th decode step a context of its prompt and k tokens; summed over requests."""
    requests = recorded.frames["requests"].query("status == 'finished'")
    steps = recorded.frames["steps"]
    aborted = recorded.frames["members"][~recorded.frames["members"]["handle"].isin(requests["handle"])]
    apart = set()
    for _, row in aborted.iterrows():
        apart |= set(range(row["first_step"], row["last_step"] + 1))
    alone = steps[~steps["step"].isin(apart)]
    decoded = requests["output_tokens"] - 1
    total = (decoded * requests["prompt_tokens"] + decoded * (decoded + 1) // 2).sum()
    assert alone["decode_context"].sum() == total


def test_tokens_of_the_steps_are_the_requests(recorded: Recorded) -> None:
    requests, steps, intervals = recorded.frames["requests"], recorded.frames["steps"], recorded.frames["intervals"]
    finished = requests.query("status == 'finished'")
    aborted = requests.query("status == 'aborted'").iloc[0]
    given = steps["output_tokens"].sum() - finished["output_tokens"].sum()
    assert given == aborted["output_tokens"], "of a step during which the abort came it got no token"
    gaps = finished["output_tokens"].sum() - len(finished)
    assert 0 <= intervals["tokens"].sum() - gaps <= given


# Each quantity: vLLM's histogram, ours from the requests' moments, and who is in it. All of these histograms are
# observed for requests that the front end saw finished; an aborted request is in none but TTFT's, which is observed at
# the first token. Prefill and decode of vLLM include preemption, of which there is none here.
COMPARED = {
    "vllm:time_to_first_token_seconds": ("first_output_ns", "arrival_ns"),
    "vllm:request_queue_time_seconds": ("scheduled_ns", "queued_ns"),
    "vllm:request_prefill_time_seconds": ("first_token_ns", "scheduled_ns"),
    "vllm:request_decode_time_seconds": ("last_token_ns", "first_token_ns"),
    "vllm:request_inference_time_seconds": ("last_token_ns", "scheduled_ns"),
    "vllm:e2e_request_latency_seconds": ("last_output_ns", "arrival_ns"),
}


@pytest.mark.parametrize("name", COMPARED)
def test_agrees_with_vllms_own_metrics(recorded: Recorded, name: str) -> None:
    """Over the load, which lies between two looks at the metrics: counts exact, times to 2 % or 100 µs a request."""
    load = by_external_id(recorded).loc[[result.id for result in recorded.results[:-1]]]
    later, earlier = COMPARED[name]
    ours = (load[later] - load[earlier]).sum() / 1e9
    count = recorded.after[f"{name}_count"] - recorded.before.get(f"{name}_count", 0)
    theirs = recorded.after[f"{name}_sum"] - recorded.before.get(f"{name}_sum", 0)
    assert count == len(load) == load[later].notna().sum()
    assert abs(ours - theirs) <= max(0.02 * theirs, 100e-6 * len(load)), (ours, theirs)


def test_counts_of_vllms_own_metrics(recorded: Recorded) -> None:
    load = by_external_id(recorded).loc[[result.id for result in recorded.results[:-1]]]
    for name, column in (("prompt_tokens", "prompt_tokens"), ("generation_tokens", "output_tokens")):
        counter = f"vllm:{name}_total"
        assert recorded.after[counter] - recorded.before.get(counter, 0) == load[column].sum()
    tokens = "vllm:inter_token_latency_seconds"
    gaps = load["output_tokens"].sum() - len(load)
    assert recorded.after[f"{tokens}_count"] - recorded.before.get(f"{tokens}_count", 0) == gaps


def test_the_size_of_the_kv_cache_is_what_vllm_logs(recorded: Recorded) -> None:
    (told,) = re.findall(r"KV cache size: ([\d,]+) tokens", recorded.recording.server.log.read_text("utf-8"))
    (core,) = (each for each in recorded.recording.session.read_manifest().processes if each.role == "engine_core")
    assert core.info["kv_cache_tokens"] == int(told.replace(",", "")) > 0


def test_traceparent_is_continued(recorded: Recorded) -> None:
    row = by_external_id(recorded).loc[recorded.results[-1].id]
    assert (row["trace_id"], row["parent_span_id"], row["trace_flags"]) == (TRACE_ID, PARENT_ID, 1)
    assert row["trace_state"] == "vendor=1"
    others = recorded.frames["requests"].query("trace_id != @TRACE_ID")
    assert others[others["parent"].isna()]["trace_id"].is_unique
    assert others.groupby("parent")["trace_id"].agg(["size", "nunique"]).to_numpy().tolist() == [[2, 1], [2, 1]]
    assert others["parent_span_id"].isna().all()


def test_aborted_request(recorded: Recorded) -> None:
    row = recorded.frames["requests"].query("status == 'aborted'").iloc[0]
    assert row["finish"] == "abort"
    assert row["max_tokens"] == ABORTED_MAX_TOKENS
    assert 5 <= row["output_tokens"] < ABORTED_MAX_TOKENS
    assert row.isna()["last_sent_ns"]
    assert row["decode_ns"] > 0
    (span,) = [span for span in requests_of(recorded) if span.attributes.get("stagetrace.status") == "aborted"]
    assert span.span.status.code == 0


def requests_of(recorded: Recorded) -> list[Received]:
    return [span for span in recorded.spans if span.span.name == "request"]


def test_otlp_has_every_request_and_step(recorded: Recorded) -> None:
    names = Counter(span.span.name for span in recorded.spans)
    assert names["request"] == len(recorded.frames["requests"])
    for phase, count in recorded.frames["steps"]["phase"].value_counts().items():
        assert names[f"step {phase}"] == count
        assert names[f"forward {phase}"] == count
    (export,) = recorded.recording.session.read_exports().values()
    assert (export.sent, export.refused, export.end) == (len(recorded.spans), 0, True)


def test_otlp_parents_and_times(recorded: Recorded) -> None:
    spans = {span.id: span for span in recorded.spans}
    assert len(spans) == len(recorded.spans)
    for received in recorded.spans:
        span = received.span
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        if not span.parent_span_id:
            assert span.name.startswith(("step ", "request", "parent_request", "startup"))
            continue
        parent = spans.get((span.trace_id, span.parent_span_id))
        if parent is None:
            assert span.name == "request"
            assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
        else:
            assert parent.span.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= parent.span.end_time_unix_nano
    now = time.time_ns()
    assert all(0 < now - received.span.end_time_unix_nano < 3600 * 10**9 for received in recorded.spans)


def test_otlp_attributes_and_links(recorded: Recorded) -> None:
    key = recorded.recording.session.identity.key
    result = recorded.results[-1]
    (span,) = [span for span in requests_of(recorded) if span.span.trace_id.hex() == TRACE_ID]
    row = by_external_id(recorded).loc[result.id]
    attributes = span.attributes
    assert attributes["gen_ai.request.id"] == result.id
    assert attributes["gen_ai.usage.input_tokens"] == result.prompt_tokens
    assert attributes["gen_ai.usage.output_tokens"] == result.output_tokens
    expected = (row["first_output_ns"] - row["arrival_ns"]) / 1e9
    assert attributes["gen_ai.latency.time_to_first_token"] == pytest.approx(expected)
    stepped = [item.attributes for item in recorded.spans if item.span.name.startswith("step ")]
    assert stepped and all(item["stagetrace.operations"] > 0 < item["stagetrace.moved_bytes"] for item in stepped)
    assert all(0 < item["stagetrace.light_share"] < MOST for item in stepped)
    assert all(0 <= item["stagetrace.gap_host_ns"] <= item["stagetrace.gap_ns"] for item in stepped)
    # Alone in the engine: its steps are those with a link, one a token.
    assert len(span.span.links) == result.output_tokens
    runs = recorded.frames["members"].query("handle == @row.handle")
    steps = [step for run in runs.itertuples() for step in range(run.first_step, run.last_step + 1)]
    assert [link.trace_id for link in span.span.links] == [
        step_trace_id(key, int(row["instance"]), step) for step in steps
    ]
    states = {
        child.span.name
        for child in recorded.spans
        if child.span.trace_id == span.span.trace_id and child.span.parent_span_id == span.span.span_id
    }
    assert states == {"request_tokenize", "request_dispatch", "queue", "prefill", "decode", "output"}


def test_exported_later_by_another_protocol_it_is_the_same_to_the_byte(recorded: Recorded) -> None:
    data = recorded.recording.path.parent / "data"  # the calibration that the live export knew
    with HttpReceiver() as receiver:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": receiver.protocol,
            "XDG_DATA_HOME": str(data),
            "NO_PROXY": "127.0.0.1",
        }
        command = [*STAGETRACE, "export", str(recorded.recording.path)]
        done = subprocess.run(command, env=environment(variables), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        live, later = (
            sorted((each.span.SerializeToString(deterministic=True), sorted(each.resource.items())) for each in spans)
            for spans in (recorded.spans, receiver.received())
        )
    assert live == later


def test_report(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    summary = summarise(recorded.recording.session)
    print_summary(summary, Console())
    text = capsys.readouterr().out
    for word in ("ttft", "tpot", "itl", "queue", "prefill", "decode", "mixed", "unattributed", "Losses: none"):
        assert word in text
    assert "tiny" in text
    assert "\x1b" not in text


def test_nothing_of_a_prompt_or_an_answer_is_recorded(recorded: Recorded) -> None:
    """The texts that were sent and received, long enough to be no accident, are in no file of the session."""
    files = [path for path in recorded.recording.path.rglob("*") if path.is_file()]
    assert len(files) > 5
    raw = recorded.recording.session
    data = b"".join(path.read_bytes() for path in files if path.suffix != ".parquet")
    data += b"".join(
        slot
        for part in raw.raw_parts()
        for _, table in raw.read_raw(part)
        for slot in table["slot"].combine_chunks().to_pylist()
    )
    assert recorded.results[0].id.encode() in data.replace(b"\0", b"") or len(data) > 100_000
    for text in ["one question", "go away", "first prompt", "only one token"]:
        assert text.encode() not in data
    for result in recorded.results:
        assert len(result.text) < 12 or result.text[:12].encode() not in data


def test_output_is_the_same_with_and_without(model, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    """Greedy, one at a time, on a plain server and a recorded one; if they differ, on a second plain one as well."""
    from engines.server import serve

    arguments = ("--enforce-eager", "--no-enable-prefix-caching")
    questions = [
        replace(SHORT, messages=({"role": "user", "content": text},), max_tokens=40)
        for text in ("a", "where does the time go " * 20, "list the stages of a step", "0123456789" * 30)
    ]

    def plain() -> list[str]:
        with serve(model, *arguments) as server:
            return [result.text for result in ask(server, *questions)]

    without = plain()
    with record(model, tmp_path_factory.mktemp("same"), *arguments) as recording:
        recorded = [result.text for result in ask(recording.server, *questions)]
    if recorded != without:
        assert plain() == without, "plain vLLM disagrees with itself: nothing can be said"
    assert recorded == without
    assert len(recording.frames()["requests"]) == len(questions)


def test_work_is_that_of_the_requests(recorded: Recorded) -> None:
    """Pairs of a token and one that it sees, once from the sums of steps, once from the lengths of requests alone.

    A request computes all its tokens but those that were cached and the last that it generated. Of the aborted one a
    token may have been computed that it did not get.
    """
    requests, steps = recorded.frames["requests"], recorded.frames["steps"]
    batch = Batch.of_steps({str(name): column for name, column in steps.items()})
    computed = requests["prompt_tokens"] + requests["output_tokens"] - 1
    cached = requests["cached_tokens"].fillna(0)
    surplus = int(batch.tokens.sum()) - int((computed - cached).sum())
    pairs = int((computed * (computed + 1) // 2 - cached * (cached + 1) // 2).sum())
    found = int((batch.prefill.positions() + batch.decode.positions()).sum())
    assert 0 <= surplus <= 2 and pairs <= found <= pairs + surplus * (int(computed.max()) + 2)
    session = recorded.recording.session
    light = summarise(session).light
    heads, width, layers = (
        model_config(recorded)[name] for name in ("num_attention_heads", "head_dim", "num_hidden_layers")
    )
    assert light.stages["attention"].operations == 4 * heads * width * layers * found
    assert light.config == str(session.model_config)
    assert json.loads(session.model_config.read_text("utf-8")) == model_config(recorded)


def test_nothing_is_faster_than_what_was_measured(recorded: Recorded, calibrated: Calibrated) -> None:
    workers = [each.info for each in recorded.frames.manifest.processes if "worker" in each.role]
    assert [(info["device_name"], info["device_threads"]) for info in workers] == [(calibrated.found.name, 1)]
    light = summarise(recorded.recording.session, calibration=calibrated.path).light
    assert light.ceilings[MEASURED].source == calibrated.found.source
    assert_lit(light)
    assert len(light.phases) == 3
    # One rank on a processor: all that is not the host's is in its kernels, and what launching took is not known.
    for done in light.phases.values():
        assert done.gap is not None and done.gap.launch_ns is None
        assert (done.gap.communication_ns, done.gap.imbalance_ns) == (0, 0)
    (note,) = (note for note in light.notes if "in the gap" in note)
    assert "launch is in the kernels' part" in note
    assert light.requests is not None and light.requests.least_tpot_ns and light.requests.tpot_ns
    assert light.requests.least_tpot_ns < light.requests.tpot_ns


def test_the_speed_of_light_arrives_as_metrics(recorded: Recorded, calibrated: Calibrated) -> None:
    """The last that arrived has most of the session; what it says of kinds of steps is what the report says."""
    light = summarise(recorded.recording.session, calibration=calibrated.path).light
    last: dict[str, dict[tuple[str, ...], float]] = {}
    for request in recorded.metrics:
        for one in request.resource_metrics[0].scope_metrics[0].metrics:
            kind = str(one.WhichOneof("data"))
            points = getattr(one, kind).data_points
            if one.name.startswith("stagetrace.step.") and kind != "histogram":
                last[one.name] = {tuple(sorted(values(point.attributes).values())): point.as_double for point in points}
            elif one.name.startswith("stagetrace.request.") and kind == "histogram":
                last[one.name] = dict.fromkeys([()], points[0].sum / points[0].count)
    for name, done in light.phases.items():
        roofs = done.roofs[MEASURED]
        assert roofs.whole_ns is not None and done.time_ns is not None
        assert 0 < last["stagetrace.step.time"][name,] <= done.time_ns / 1e9 * (1 + 1e-9)
        assert 0 < last["stagetrace.step.least_time"]["all", name] <= roofs.whole_ns / 1e9 * (1 + 1e-9)
        assert 0 < last["stagetrace.step.light_share"][name,] < MOST
        assert tuple(sorted((name, "kernel"))) in last["stagetrace.step.gap"]
    assert {"stagetrace.step.mfu", "stagetrace.step.mbu", "stagetrace.step.operations"} <= set(last)
    assert light.requests is not None and light.requests.tpot_ns is not None
    assert 0 < last["stagetrace.request.least_time_per_output_token"][()] < light.requests.tpot_ns / 1e9
    assert last["stagetrace.request.least_time_to_first_token"][()] > 0


def model_config(recorded: Recorded) -> dict[str, int]:
    """The config.json beside the weights that the server read."""
    (path,) = {each.info["model_path"] for each in recorded.frames.manifest.processes if "model_path" in each.info}
    config: dict[str, int] = json.loads((Path(path) / "config.json").read_text("utf-8"))
    return config
