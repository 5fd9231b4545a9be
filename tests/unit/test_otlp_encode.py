"""The bytes of spans: the same as those of the OpenTelemetry SDK's exporter, whose messages are the judge."""

from __future__ import annotations

from typing import Any

from backends.tables import KEY, serving
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk import trace as sdk
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util import BoundedList
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link as SdkLink
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceState

from stagetrace.exporters.otlp_encode import Encoder, resource_bytes, varint
from stagetrace.exporters.spans import SCOPE_NAME, SCOPE_VERSION, Clock, Context, Event, Link, Source, Span, spans_of

SCOPE = InstrumentationScope(SCOPE_NAME, SCOPE_VERSION)
RESOURCES: dict[int | None, dict[str, Any]] = {
    None: {"service.name": "vllm", "stagetrace.session": "s"},
    1: {"service.name": "vllm", "process.pid": 4001},
    2: {"process.pid": 2**31, "empty": ""},
}


def of_the_sdk(span: Span) -> sdk.ReadableSpan:
    """The same span as an object of the SDK's."""

    def context(of: Context, remote: bool = False) -> SpanContext:
        state = TraceState.from_header([span.trace_state]) if span.trace_state else None
        return SpanContext(int.from_bytes(of.trace_id), int.from_bytes(of.span_id), remote, trace_state=state)

    links: BoundedList[SdkLink] = BoundedList(None)
    links.extend([SdkLink(context(link.context), {"stagetrace.step": link.step}) for link in span.links])
    links.dropped = span.dropped_links
    return sdk.ReadableSpan(
        span.name,
        context(span.context),
        None if span.parent is None else context(span.parent, span.remote),
        Resource(RESOURCES[span.process]),
        span.attributes,
        [sdk.Event(event.name, {}, event.time_ns) for event in span.events],
        links,
        SpanKind.SERVER if span.server else SpanKind.INTERNAL,
        status=Status(StatusCode.UNSET) if span.error is None else Status(StatusCode.ERROR, span.error),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=SCOPE,
    )


def encoded(spans: list[Span]) -> bytes:
    return Encoder().request(spans, lambda process: resource_bytes(RESOURCES[process]))


def contexts() -> st.SearchStrategy[Context]:
    some = st.binary(min_size=8, max_size=8).filter(any)
    return st.builds(lambda left, right: Context(left + right, right), some, some)


def step_link(step: int) -> Link:
    return Link(Context(step.to_bytes(16), step.to_bytes(8)), step)


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)
INT = st.integers(-(2**63), 2**63 - 1)
VALUES = TEXT | INT | st.booleans() | st.floats(allow_nan=False) | st.lists(TEXT, max_size=3).map(tuple)
NAME = TEXT.filter(bool)  # every span of ours has a name and times: protobuf leaves out what is empty or zero
TIME = st.integers(1, 2**64 - 1)
SPANS = st.builds(
    Span,
    name=NAME,
    context=contexts(),
    parent=st.none() | contexts(),
    process=st.sampled_from(list(RESOURCES)),
    attributes=st.dictionaries(NAME, VALUES, max_size=6),
    start_time=TIME,
    end_time=TIME,
    server=st.booleans(),
    remote=st.booleans(),
    error=st.none() | NAME,
    trace_state=st.sampled_from(["", "rojo=00f067aa0ba902b7", "a=1,b=2"]),
    events=st.lists(st.builds(Event, NAME, TIME), max_size=3).map(tuple),
    links=st.lists(st.integers(1, 2**62).map(step_link), max_size=3).map(tuple),
    dropped_links=st.integers(0, 2**32 - 1),
)


@given(st.lists(SPANS, max_size=5))
def test_any_spans_are_encoded_as_the_sdk_does(spans: list[Span]) -> None:
    assert encoded(spans) == encode_spans([of_the_sdk(span) for span in spans]).SerializeToString()


def test_spans_of_a_session_are_encoded_as_the_sdk_does() -> None:
    session = serving()
    spans = spans_of(session.tables, Source(KEY, Clock(session.manifest.anchors))).spans
    assert len(spans) > 40 and any(span.links for span in spans) and any(span.events for span in spans)
    assert encoded(spans) == encode_spans([of_the_sdk(span) for span in spans]).SerializeToString()


def test_a_link_seen_before_is_encoded_the_same() -> None:
    link = Link(Context(b"t" * 16, b"s" * 8), 5)
    span = Span("request", Context(b"a" * 16, b"b" * 8), None, None, {}, 1, 2, links=(link,))
    encoder = Encoder()
    first, second = encoder.span(span), encoder.span(span._replace(links=(link, link)))
    assert second.count(b"s" * 8) == 2 and first.count(b"s" * 8) == 1
    request = ExportTraceServiceRequest.FromString(encoded([span]))
    assert request.resource_spans[0].scope_spans[0].spans[0].links[0].span_id == b"s" * 8


def test_text_that_is_no_unicode_is_sent_with_replacements() -> None:
    span = Span("a", Context(b"a" * 16, b"b" * 8), None, None, {"k": "bad \ud800"}, 1, 2)
    request = ExportTraceServiceRequest.FromString(encoded([span]))
    assert request.resource_spans[0].scope_spans[0].spans[0].attributes[0].value.string_value == "bad ?"


@given(INT)
def test_varint(value: int) -> None:
    found, at = 0, 0
    for byte in varint(value):
        found |= (byte & 0x7F) << at
        at += 7
    assert found - (1 << 64 if found >> 63 else 0) == value
    assert len(varint(value)) <= 10
