"""The OTLP sink against a real receiver, by gRPC and by HTTP: what arrives (when and how often: test_follow.py)."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from backends.receiver import HttpReceiver, Receiver
from backends.tables import KEY, MS, PARENT_ID, TRACE_ID, TRACE_STATE, Builder, serving
from opentelemetry import trace
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan
from opentelemetry.proto.trace.v1.trace_pb2 import SpanFlags
from opentelemetry.proto.trace.v1.trace_pb2 import Status as WireStatus

from stagetrace.exporters import span_sink
from stagetrace.exporters.otel_settings import destination
from stagetrace.exporters.otlp import OtlpSink
from stagetrace.exporters.otlp_send import GrpcSender, HttpSender
from stagetrace.exporters.session import Manifest
from stagetrace.instrument import ids

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from backends.receiver import Received

REMOTE = bytes.fromhex(TRACE_ID), bytes.fromhex(PARENT_ID)


@dataclass
class Sent:
    """What became of some tables."""

    sent: int = 0  # spans that the backend confirmed
    failed: int = 0  # and those that it did not
    left_out: dict[str, int] = field(default_factory=dict)


def made_sink(environ: Mapping[str, str] = os.environ, **more: Any) -> OtlpSink:
    wanted = destination(environ)
    assert wanted is not None
    return OtlpSink.to(wanted, KEY, **more)


def export(sink: OtlpSink, tables: dict[str, Any], manifest: Manifest) -> Sent:
    """Makes the spans of the tables and sends each request once."""
    made = sink.spans(tables, manifest)
    sent = sum(len(batch) for batch in span_sink.batches(made.spans) if sink.send(batch))
    return Sent(sent, len(made.spans) - sent, dict(made.left_out))


@pytest.fixture
def sink(receiver: Receiver) -> Iterator[OtlpSink]:
    made = made_sink()
    yield made
    made.shutdown()


def many_steps(count: int) -> Builder:
    build = Builder()
    for step in range(count):
        build.step(7, step, step * MS, (step + 1) * MS, decode_tokens=1)
    return build


ANCHORED = Manifest(session="s", host="h", anchors=[(0, 10**18)])


# What arrives


def test_session_arrives_whole_and_every_parent_is_there(receiver: Receiver, sink: OtlpSink) -> None:
    session = serving()
    result = export(sink, session.tables, session.manifest)
    received = receiver.received()
    assert result.failed == 0
    assert result.sent == len(received) > 0
    assert result.left_out == session.left_out
    by_id = {item.id: item for item in received}
    assert len(by_id) == len(received), "an id twice"
    for item in received:
        if not item.span.parent_span_id:
            continue
        parent_id = item.span.trace_id, item.span.parent_span_id
        if parent_id == REMOTE:
            assert item.span.name == "request"
            continue
        parent = by_id[parent_id].span
        if item.attributes["stagetrace.stage"] == "prefill_chunk":
            continue  # as long as its step, which begins before the request is scheduled
        assert parent.start_time_unix_nano <= item.span.start_time_unix_nano
        assert item.span.end_time_unix_nano <= parent.end_time_unix_nano
    # Four steps, one load, and a trace per sampled request; the segments of a step are in its trace.
    roots = Counter(item.span.name.split()[0] for item in received if not item.span.parent_span_id)
    assert roots == {"step": 4, "model_load": 1, "request": 1}


def test_step_trace(receiver: Receiver, sink: OtlpSink) -> None:
    session = serving()
    export(sink, session.tables, session.manifest)
    of_step = [
        item for item in receiver.received() if item.span.trace_id == ids.step_trace_id(KEY, session.instance, 1)
    ]
    names = {item.span.name: item for item in of_step}
    assert {name: parent_name(item, of_step) for name, item in names.items()} == {
        "step prefill": None,
        "schedule": "step prefill",
        "execute": "step prefill",
        "grammar": "execute",
        "update": "step prefill",
        "rank_step prefill": "step prefill",
        "forward prefill": "rank_step prefill",
        "attention prefill": "forward prefill",
        "gc_pause": "forward prefill",
    }
    root = names["step prefill"]
    assert root.span.span_id == ids.step_span_id(KEY, session.instance, 1)
    assert root.span.kind == WireSpan.SPAN_KIND_INTERNAL
    assert root.span.status.code == WireStatus.STATUS_CODE_UNSET
    assert root.span.start_time_unix_nano == session.wall + 10 * MS
    assert root.span.end_time_unix_nano == session.wall + 30 * MS
    expected = {
        "stagetrace.step": 1,
        "stagetrace.engine_instance": "1234567890abcdef",
        "stagetrace.phase": "prefill",
        "stagetrace.status": "complete",
        "stagetrace.unattributed_ns": 12_345,
        "stagetrace.ranks_expected": 1,
        "stagetrace.ranks_reported": 1,
        "stagetrace.prefill_tokens": 400,
        "stagetrace.decode_tokens": 0,
        "stagetrace.cached_tokens": 100,
        "stagetrace.waiting": 1,
        "stagetrace.members": 1,
    }
    assert root.attributes | expected == root.attributes
    attention = names["attention prefill"].attributes
    assert attention["stagetrace.layer"] == 0
    assert attention["stagetrace.kind"] == "full"
    assert attention["stagetrace.tokens"] == 400
    pause = names["gc_pause"]
    assert pause.span.end_time_unix_nano - pause.span.start_time_unix_nano == 77
    assert pause.attributes["stagetrace.step"] == 1
    assert root.scope == "stagetrace"
    assert (root.resource["process.pid"], root.resource["stagetrace.role"]) == (4001, "engine")
    assert names["forward prefill"].resource["process.pid"] == 4002


def test_request_trace_continues_the_callers(receiver: Receiver, sink: OtlpSink) -> None:
    session = serving()
    export(sink, session.tables, session.manifest)
    of_request = [item for item in receiver.received() if item.span.trace_id.hex() == TRACE_ID]
    root = next(item for item in of_request if item.span.name == "request")
    assert root.span.span_id == ids.request_span_id(KEY, session.traced)
    assert root.span.parent_span_id.hex() == PARENT_ID
    assert root.span.trace_state == TRACE_STATE
    assert root.span.flags & SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK, "its parent is in another process"
    assert root.span.kind == WireSpan.SPAN_KIND_SERVER
    assert root.span.status.code == WireStatus.STATUS_CODE_UNSET
    assert root.span.start_time_unix_nano == session.wall
    assert root.span.end_time_unix_nano == session.wall + 92 * MS
    expected = {
        "gen_ai.request.id": "cmpl-a",
        "gen_ai.request.model": "Qwen/Qwen3-0.6B",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 900,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 100,
        "gen_ai.latency.time_in_queue": 0.008,
        "gen_ai.latency.time_to_first_token": 0.051,
        "gen_ai.latency.e2e": 0.091,
        "gen_ai.latency.time_in_model_prefill": 0.038,
        "gen_ai.latency.time_in_model_decode": 0.040,
        "gen_ai.latency.time_in_model_inference": 0.078,
        "stagetrace.request_id": "cmpl-a-0",
        "stagetrace.status": "finished",
        "stagetrace.partial": False,
        "stagetrace.queue_ns": 8 * MS,
    }
    assert root.attributes | expected == root.attributes
    assert {event.name: event.time_unix_nano - session.wall for event in root.span.events} == {
        "stagetrace.first_output": 51 * MS,
        "stagetrace.first_sent": 52 * MS,
        "stagetrace.last_output": 91 * MS,
        "stagetrace.last_sent": 92 * MS,
    }
    assert [(link.trace_id, link.span_id) for link in root.span.links] == [
        (ids.step_trace_id(KEY, session.instance, step), ids.step_span_id(KEY, session.instance, step))
        for step in (1, 2, 3, 4)
    ]
    assert root.span.dropped_links_count == 0
    states = [(item.span.name, parent_name(item, of_request)) for item in of_request if item is not root]
    assert states == [
        ("request_tokenize", "request"),
        ("request_dispatch", "request"),
        ("queue", "request"),
        ("prefill", "request"),
        ("prefill_chunk", "prefill"),
        ("prefill_chunk", "prefill"),
        ("decode", "request"),
        ("output", "request"),
    ]
    # The wall clock was set back inside the request: its states still meet to the nanosecond.
    own = [item.span for item in of_request if parent_name(item, of_request) == "request"]
    assert own[0].start_time_unix_nano == session.wall
    for before, after in pairwise(own):
        assert before.end_time_unix_nano == after.start_time_unix_nano
    assert own[-1].end_time_unix_nano == session.wall + 92 * MS


def test_times_follow_the_newest_anchor_before_the_trace(receiver: Receiver, sink: OtlpSink) -> None:
    session = serving()
    export(sink, session.tables, session.manifest)
    begins = {
        item.attributes["stagetrace.step"]: item.span.start_time_unix_nano - session.wall
        for item in receiver.received()
        if item.span.name.startswith("step ")
    }
    assert begins == {1: 10 * MS, 2: 30 * MS, 3: (50 - 1000) * MS, 4: (70 - 1000) * MS}


def test_aborted_request_is_no_error_and_unsampled_one_is_not_sent(receiver: Receiver, sink: OtlpSink) -> None:
    session = serving()
    export(sink, session.tables, session.manifest)
    requests = {item.id: item for item in receiver.received() if item.span.name == "request"}
    derived = ids.request_trace_id(KEY, session.aborted), ids.request_span_id(KEY, session.aborted)
    assert set(requests) == {derived, (REMOTE[0], ids.request_span_id(KEY, session.traced))}
    aborted = requests[derived]
    assert not aborted.span.parent_span_id
    assert aborted.span.status.code == WireStatus.STATUS_CODE_UNSET
    assert aborted.attributes["stagetrace.status"] == "aborted"
    assert aborted.attributes["gen_ai.response.finish_reasons"] == ["abort"]
    assert "gen_ai.latency.e2e" not in aborted.attributes
    assert "gen_ai.request.max_tokens" not in aborted.attributes, "0 is no bound"


def test_error_status_arrives_with_its_reason(receiver: Receiver, sink: OtlpSink) -> None:
    build = Builder()
    for status in ("error", "lost", "open", "finished"):
        build.request(status, status=status, arrival_ns=5, end_ns=9)
    assert export(sink, build.tables(), ANCHORED).sent == 4
    statuses = {item.attributes["stagetrace.request_id"]: item.span.status for item in receiver.received()}
    assert {name: status.code for name, status in statuses.items()} == {
        "error": WireStatus.STATUS_CODE_ERROR,
        "lost": WireStatus.STATUS_CODE_ERROR,
        "open": WireStatus.STATUS_CODE_UNSET,
        "finished": WireStatus.STATUS_CODE_UNSET,
    }
    assert "error" in statuses["error"].message
    assert "died" in statuses["lost"].message


def test_same_tables_give_the_same_spans(receiver: Receiver, sink: OtlpSink) -> None:
    session = serving()
    export(sink, session.tables, session.manifest)
    first = receiver.received()
    receiver.requests.clear()
    export(sink, session.tables, session.manifest)
    assert [item.span for item in receiver.received()] == [item.span for item in first]


def test_links_beyond_the_sdks_limit_arrive_and_dropped_ones_are_told(receiver: Receiver) -> None:
    build = Builder()
    handle = build.request("long", arrival_ns=0, end_ns=1)
    build.add("members", handle=handle, instance=7, first_step=10, last_step=309)
    build.add("members", handle=handle, instance=7, first_step=400, last_step=699)
    sink = made_sink(link_limit=500)
    assert export(sink, build.tables(), ANCHORED).sent == 1
    sink.shutdown()
    span = receiver.received()[0].span
    steps = [*range(10, 310), *range(400, 600)]
    assert [link.span_id for link in span.links] == [ids.step_span_id(KEY, 7, step) for step in steps]
    assert [link.attributes[0].value.int_value for link in span.links] == steps
    assert span.dropped_links_count == 100


def test_states_and_links_that_came_before_the_request_are_in_its_trace(receiver: Receiver, sink: OtlpSink) -> None:
    early = Builder()
    handle = ids.handle(KEY, "r")
    early.state("prefill_chunk", handle, 5, 20, step=1)
    early.add("members", handle=handle, instance=7, first_step=1, last_step=2)
    assert export(sink, early.tables(), ANCHORED) == Sent()
    over = Builder()
    over.request("r", arrival_ns=0, end_ns=30)
    over.state("prefill", handle, 4, 21)
    over.add("members", handle=handle, instance=7, first_step=4, last_step=4)
    assert export(sink, over.tables(), ANCHORED).sent == 3
    received = receiver.received()
    names = {item.span.name: item for item in received}
    assert parent_name(names["prefill_chunk"], received) == "prefill"
    expected = [ids.step_span_id(KEY, 7, step) for step in (1, 2, 4)]
    assert [link.span_id for link in names["request"].span.links] == expected
    late = Builder()
    late.add("members", handle=handle, instance=7, first_step=6, last_step=6)
    assert export(sink, late.tables(), ANCHORED) == Sent(left_out={"members_after_their_request": 1})


def test_large_requests_are_cut_below_grpcs_message_limit(receiver: Receiver, sink: OtlpSink) -> None:
    build = Builder()
    for number in range(90):
        handle = build.request(f"r{number}", arrival_ns=number, end_ns=number + 1)
        build.add("members", handle=handle, instance=7, first_step=1, last_step=5000)
    result = export(sink, build.tables(), ANCHORED)
    assert (result.sent, result.failed) == (90, 0)
    sizes = [request.ByteSize() for request in receiver.requests]
    assert sum(sizes) > 4 * 1024 * 1024 > max(sizes), "one message would not have done"
    assert all(item.span.dropped_links_count == 5000 - 1024 for item in receiver.received())


def test_resource_says_which_process_and_the_environment_goes_first(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = serving()
    for environment in ({}, {"OTEL_SERVICE_NAME": "chat", "OTEL_RESOURCE_ATTRIBUTES": "host.name=mine,team=a%20b"}):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        sink = made_sink()
        export(sink, session.tables, session.manifest)
        sink.shutdown()
        resources = defaultdict(set)
        for item in receiver.received():
            for name, value in item.resource.items():
                resources[name].add(value)
        receiver.requests.clear()
        assert resources["service.name"] == {environment.get("OTEL_SERVICE_NAME", "vllm")}
        assert resources["host.name"] == ({"mine"} if environment else {"node-7"})
        assert resources["team"] == ({"a b"} if environment else set())
        assert resources["process.pid"] == {4001, 4002}
        assert len(resources["service.instance.id"]) == 3, "scheduler, worker, and the engine as a whole"
        assert resources["stagetrace.session"] == {session.manifest.session}
        assert resources["stagetrace.model"] == {"Qwen/Qwen3-0.6B"}
        assert resources["stagetrace.engine_version"] == {"0.32.0"}


def test_headers_and_path_are_those_of_the_environment(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-scope-orgid=tenant-1")
    sink = made_sink()
    assert export(sink, many_steps(1).tables(), ANCHORED).sent == 1
    sink.shutdown()
    assert receiver.headers[0]["x-scope-orgid"] == "tenant-1"
    if isinstance(receiver, HttpReceiver):
        assert receiver.paths == ["/v1/traces"]
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", receiver.endpoint + "/whole/path")
        sink = made_sink()
        assert export(sink, many_steps(1).tables(), ANCHORED).sent == 1
        sink.shutdown()
        assert receiver.paths[1:] == ["/whole/path"]


def test_no_global_provider_is_set(receiver: Receiver, sink: OtlpSink) -> None:
    before = trace._TRACER_PROVIDER
    session = serving()
    assert export(sink, session.tables, session.manifest).sent == len(receiver.received())
    assert trace._TRACER_PROVIDER is before is None


# What happens when nothing arrives


def test_backend_that_does_not_answer_holds_a_request_no_longer_than_told(receiver: Receiver) -> None:
    sink = made_sink(timeout_s=0.5)
    receiver.stuck.set()
    begin = time.monotonic()
    result = export(sink, many_steps(3).tables(), ANCHORED)
    taken = time.monotonic() - begin
    sink.shutdown()
    assert (result.sent, result.failed) == (0, 3)
    assert 0.4 < taken < 2.5


def test_refused_batch_fails_and_the_others_arrive(receiver: Receiver, sink: OtlpSink) -> None:
    receiver.refuse = 1
    result = export(sink, many_steps(1200).tables(), ANCHORED)
    assert (result.sent, result.failed) == (1200 - span_sink.BATCH_SPANS, span_sink.BATCH_SPANS)
    assert len(receiver.received()) == result.sent


def test_tables_without_a_clock_anchor_become_no_spans(receiver: Receiver, sink: OtlpSink) -> None:
    session = serving()
    session.manifest.anchors = []
    with pytest.raises(ValueError, match="no clock anchor"):
        sink.spans(session.tables, session.manifest)
    assert not receiver.headers


def test_after_shutdown_everything_fails_quietly(
    receiver: Receiver, sink: OtlpSink, caplog: pytest.LogCaptureFixture
) -> None:
    sink.shutdown()
    sink.shutdown()
    assert export(sink, many_steps(3).tables(), ANCHORED).failed == 3
    assert not receiver.headers
    assert not caplog.records


def test_empty_tables_send_nothing(receiver: Receiver, sink: OtlpSink) -> None:
    assert export(sink, Builder().tables(), ANCHORED) == Sent()
    assert export(sink, {}, ANCHORED) == Sent()
    assert not receiver.headers


# What the environment asks for

HERE = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": HERE, "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": HERE, "OTEL_TRACES_EXPORTER": "console"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": HERE, "OTEL_SDK_DISABLED": "TRUE"},
        {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": HERE},
    ],
)
def test_environment_that_asks_for_no_traces(environ: dict[str, str]) -> None:
    assert destination(environ) is None


@pytest.mark.parametrize(
    ("environ", "kind"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": HERE}, GrpcSender),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": HERE, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, HttpSender),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": HERE,
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
            },
            GrpcSender,
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": HERE, "OTEL_TRACES_EXPORTER": "console, otlp", "OTEL_SDK_DISABLED": "no"},
            GrpcSender,
        ),
    ],
)
def test_environment_that_asks_for_traces(environ: dict[str, str], kind: type) -> None:
    sink = made_sink(environ)
    assert isinstance(sink._sender, kind)
    sink.shutdown()


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"), ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")]
)
def test_mistake_in_a_variable_is_told(name: str, value: str) -> None:
    with pytest.raises(span_sink.BadSettings, match=value):
        made_sink({"OTEL_EXPORTER_OTLP_ENDPOINT": HERE, name: value})


def test_credentials_are_not_in_the_name_of_a_destination() -> None:
    wanted = destination({"OTEL_EXPORTER_OTLP_ENDPOINT": "https://me:secret@host:4317/path"})
    assert wanted is not None
    assert wanted.target == "https://host:4317/path by grpc"
    assert "secret" not in wanted.name


def parent_name(item: Received, among: list[Received]) -> str | None:
    return next((other.span.name for other in among if other.span.span_id == item.span.parent_span_id), None)
