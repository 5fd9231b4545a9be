"""Spans from a session's tables: pure functions, which give the same spans with the same ids whenever they are asked.

A *step trace* is an engine step with its segments, a *request trace* a request with its states; span links lead from
the request to the steps that it took part in. Several answers to one request (n > 1) are requests under a span
`parent_request`. Segments that belong to no step become traces of their own only where
they are rare events that request level records too (`model_load`, `compile`, `sleep` ...). All others (`between`,
`idle`, `detokenize`, a `gc_pause` between two steps) are left out and counted: as traces of one span they are noise.

All times of a trace are moved to wall time by one offset, that of the newest clock anchor before the trace's begin.
So durations, and what is inside what, stay exact to the nanosecond when the host's wall clock was set meanwhile.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util import BoundedList
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from stagetrace.exporters.session import REQUESTS_SCHEMA
from stagetrace.instrument import ids
from stagetrace.instrument.stages import (
    BY_ID,
    BY_NAME,
    QUEUE_CAUSES,
    STAGES,
    STEP_COMPOSITION,
    Finish,
    Kind,
    Level,
    Stage,
    Timeline,
    Unit,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pyarrow as pa
    from opentelemetry.sdk.resources import Resource

    from stagetrace.exporters.session import Manifest, Process

LINK_LIMIT = 1024

# Attributes of a step's span, of one rank, where the speed of light is known (analysis/step_light.py): operations and
# bytes that it needs, and the shares of its duration that they would take at the device's ceilings.
STEP_LIGHT = ("operations", "moved_bytes", "link_bytes", "mfu", "mbu", "link_share", "light_share")
# What the step took beyond its least time, and its parts, in ns; what could not be told apart is not there.
GAP_PARTS = ("host", "launch", "communication", "imbalance", "kernel")
STEP_GAP = ("gap_ns", *(f"gap_{part}_ns" for part in GAP_PARTS))

# OpenTelemetry's GenAI conventions. Written out since their Python module is marked as subject to change and
# opentelemetry-sdk is not pinned; tests/unit/test_spans.py holds them against the installed module.
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
GEN_AI_REQUEST_CHOICE_COUNT = "gen_ai.request.choice.count"
GEN_AI_RESPONSE_FINISH_REASONS = "gen_ai.response.finish_reasons"
GEN_AI_USAGE_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_USAGE_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS = "gen_ai.usage.cache_read.input_tokens"

ERROR_TYPE = "error.type"  # the HTTP status of a request that was refused, else how it ended

# What vLLM and SGLang share beyond the conventions, and vLLM's definitions: seconds between two moments of a request.
GEN_AI_REQUEST_ID = "gen_ai.request.id"
LATENCIES: dict[str, tuple[str, str]] = {
    "gen_ai.latency.time_in_queue": ("queued_ns", "scheduled_ns"),
    "gen_ai.latency.time_to_first_token": ("arrival_ns", "first_output_ns"),
    "gen_ai.latency.e2e": ("arrival_ns", "last_output_ns"),
    "gen_ai.latency.time_in_model_prefill": ("scheduled_ns", "first_token_ns"),
    "gen_ai.latency.time_in_model_decode": ("first_token_ns", "last_token_ns"),
    "gen_ai.latency.time_in_model_inference": ("scheduled_ns", "last_token_ns"),
}

# Moments in the life of a request that no state begins or ends with.
_EVENTS = ("first_output_ns", "first_sent_ns", "last_output_ns", "last_sent_ns")

_STATE_SUMS = tuple(
    column
    for column in (stage.name.removeprefix("request_") + "_ns" for stage in STAGES if stage.kind is Kind.STATE)
    if column in REQUESTS_SCHEMA.names
)
_QUEUE_SUMS = ("grammar_ns", *(f"{cause.name.lower()}_ns" for cause in QUEUE_CAUSES))
_MOMENTS = tuple(
    name for name in REQUESTS_SCHEMA.names if name.endswith("_ns") and name not in (*_STATE_SUMS, *_QUEUE_SUMS)
)

RANKS = ("rank", "tp_rank", "pp_rank", "dp_rank", "ep_rank")  # of a worker, as its process says them
_OF_REQUESTS = (
    *("status", "partial", "preemptions", "priority", "lora", "child", "children"),
    *("external_tokens", "draft_tokens", "accepted_tokens"),
    *_QUEUE_SUMS,
)

_DESCRIPTIONS = {
    "error": "the engine ended the request with an error, or refused it",
    "lost": "the engine's process died while the request was open",
}

_READ = ("requests", "states", "members", "steps", "segments")
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSET = Status(StatusCode.UNSET)

try:
    SCOPE = InstrumentationScope("stagetrace", version("stagetrace"))
except PackageNotFoundError:  # run from a checkout that is not installed
    SCOPE = InstrumentationScope("stagetrace")

Row = dict[str, Any]
_Segments = dict[tuple[int, int], Row]  # by process and sequence


class Clock:
    """Wall time by the manifest's anchors: pairs of monotonic and wall nanoseconds."""

    def __init__(self, anchors: Sequence[tuple[int, int]]):
        """Raises ValueError when there is no anchor: the tables' times then mean nothing outside their host."""
        if not anchors:
            raise ValueError("the session's manifest has no clock anchor")
        ordered = sorted(anchors)
        self._monotonic = [monotonic for monotonic, _ in ordered]
        self._offsets = [wall - monotonic for monotonic, wall in ordered]

    def offset(self, monotonic_ns: int) -> int:
        """Nanoseconds from monotonic to wall time at that moment: the newest anchor's before it, else the first's."""
        return self._offsets[max(bisect_right(self._monotonic, monotonic_ns) - 1, 0)]


@dataclass(frozen=True)
class Source:
    """Where tables come from: what their spans need beside the rows."""

    key: bytes  # of the session's hashes
    clock: Clock
    service: Resource  # of requests, which pass through several processes, and of processes that are not known
    processes: Mapping[int, Resource]  # by the process's key in the session
    model: str | None = None
    names: Mapping[int, str] = field(default_factory=dict)  # what handles in segments stand for

    def resource(self, process: int) -> Resource:
        """The resource of one process's spans."""
        return self.processes.get(process, self.service)


@dataclass(frozen=True)
class Spans:
    """Finished spans, and how many rows became none, by reason."""

    spans: list[ReadableSpan]
    left_out: Counter[str]


def spans_of(tables: Mapping[str, pa.Table], source: Source, link_limit: int = LINK_LIMIT) -> Spans:
    """All spans of the tables (by name, as in session.TABLES; one that is missing counts as empty).

    Tables hold whole traces: a request with its states and members, a step with its segments.
    """
    return spans_of_rows(rows_of(tables), source, link_limit)


def rows_of(tables: Mapping[str, pa.Table]) -> dict[str, Sequence[Row]]:
    """The rows of those tables that spans are made of."""
    return {name: tables[name].to_pylist() if name in tables else [] for name in _READ}


def spans_of_rows(rows: Mapping[str, Sequence[Row]], source: Source, link_limit: int = LINK_LIMIT) -> Spans:
    """As `spans_of`, from the tables' rows."""
    steps = step_spans(rows["steps"], rows["segments"], source)
    requests = request_spans(rows["requests"], rows["states"], rows["members"], source, link_limit)
    return Spans(steps.spans + requests.spans, steps.left_out + requests.left_out)


# Step traces


@dataclass(frozen=True, slots=True)
class _Trace:
    """A step trace, or that of an occasion: the ids of its root, and its offset to wall time."""

    root: SpanContext
    offset: int


def step_spans(steps: Sequence[Row], segments: Sequence[Row], source: Source) -> Spans:
    """A root span per step and a child per segment of a step; a trace of its own for rare segments without a step.

    A segment whose parent is not among `segments`, or is in another trace, hangs directly under its step.
    """
    traces: dict[tuple[int, ...], _Trace] = {}
    spans = []
    for row in steps:
        trace = _step_trace(row["instance"], row["step"], row["begin_ns"], source)
        traces[row["instance"], row["step"]] = trace
        spans.append(_step_span(row, trace, source))
    left_out: Counter[str] = Counter()
    known = {(row["process"], row["sequence"]): row for row in segments}
    for row in segments:
        if row["stage"] not in BY_ID:
            left_out["segments_of_unknown_stage"] += 1
            continue
        root = _root(row, known)
        if root is None:
            left_out["segments_without_step"] += 1
            continue
        where = _trace_key(root)
        if where not in traces:
            traces[where] = (
                _step_trace(root["instance"], root["step"], root["begin_ns"], source)
                if _in_step(root)
                else _occasion_trace(root, source)
            )
        spans.append(_segment_span(row, root, traces[where], known, source))
    return Spans(spans, left_out)


def _step_trace(instance: int, step: int, begin: int, source: Source) -> _Trace:
    return _Trace(_step_context(source.key, instance, step), source.clock.offset(begin))


def _step_context(key: bytes, instance: int, step: int) -> SpanContext:
    trace_id = int.from_bytes(ids.step_trace_id(key, instance, step))
    return SpanContext(trace_id, int.from_bytes(ids.step_span_id(key, instance, step)), False, _SAMPLED)


def _occasion_trace(root: Row, source: Source) -> _Trace:
    process, sequence = root["process"], root["sequence"]
    # Process keys and engine instances are both random 63-bit numbers: a process stands in for an instance here.
    trace_id = int.from_bytes(ids.occasion_trace_id(source.key, process, sequence))
    context = SpanContext(trace_id, _segment_id(source.key, process, sequence), False, _SAMPLED)
    return _Trace(context, source.clock.offset(root["begin_ns"]))


def _step_span(row: Row, trace: _Trace, source: Source) -> ReadableSpan:
    attributes = {
        "stagetrace.stage": "step",
        "stagetrace.step": row["step"],
        "stagetrace.engine_instance": hex_instance(row["instance"]),
        **{
            f"stagetrace.{name}": row[name]
            for name in ("phase", "status", "unattributed_ns", "ranks_expected", "ranks_reported", "members")
        },
        **{f"stagetrace.{attribute.name}": row[attribute.name] for attribute in STEP_COMPOSITION},
        **{
            f"stagetrace.{name}": row[name]
            for name in ("output_tokens", "accepted_tokens", "padded_tokens", "graph_mode")
        },
        **{f"stagetrace.{name}": row[name] for name in STEP_LIGHT if row.get(name) is not None},
        **{f"stagetrace.{name}": round(row[name]) for name in STEP_GAP if row.get(name) is not None},
        "thread.id": row["thread"],
    }
    return _span(
        f"step {row['phase']}",
        trace.root,
        parent=None,
        resource=source.resource(row["process"]),
        attributes=attributes,
        begin=row["begin_ns"] + trace.offset,
        duration=row["end_ns"] - row["begin_ns"],
    )


def _segment_span(row: Row, root: Row, trace: _Trace, known: _Segments, source: Source) -> ReadableSpan:
    stage = BY_ID[row["stage"]]
    name = f"{stage.name} {root['phase']}" if root["phase"] and _says_phase(stage) else stage.name
    attributes = {
        "stagetrace.stage": stage.name,
        "stagetrace.phase": root["phase"],
        "stagetrace.step": root["step"],
        "stagetrace.engine_instance": hex_instance(root["instance"]),
        "stagetrace.self_ns": row["self_ns"],
        "thread.id": row["thread"],
        "stagetrace.partial": True if row["partial"] else None,
        **_stage_attributes(row, stage, source.names),
    }
    return _span(
        name,
        _within(trace.root, _segment_id(source.key, row["process"], row["sequence"])),
        parent=_segment_parent(row, root, trace, known, source.key),
        resource=source.resource(row["process"]),
        attributes=attributes,
        begin=row["begin_ns"] + trace.offset,
        duration=row["end_ns"] - row["begin_ns"],
    )


def _says_phase(stage: Stage) -> bool:
    """Whether the phase belongs in the span's name: the work is on tokens, so prefill and decode are unlike."""
    return stage.timeline is Timeline.DEVICE or any(attribute.name == "tokens" for attribute in stage.attributes)


def _in_step(row: Row) -> bool:
    return row["step"] is not None and row["instance"] is not None


def _root(row: Row, known: _Segments) -> Row | None:
    """The row that says which trace a segment belongs to: the nearest around it (or itself) that has a step, else the
    outermost that is a rare event; None when there is neither.
    """
    outermost = None
    seen: set[int] = set()
    at: Row | None = row
    while at is not None and at["sequence"] not in seen:
        if _in_step(at):
            return at
        if _is_rare(at):
            outermost = at
        seen.add(at["sequence"])
        at = None if at["parent"] is None else known.get((at["process"], at["parent"]))
    return outermost


def _is_rare(row: Row) -> bool:
    stage = BY_ID.get(row["stage"])
    return stage is not None and stage.kind is Kind.OCCASION and stage.level <= Level.REQUEST


def _trace_key(root: Row) -> tuple[int, ...]:
    if _in_step(root):
        return root["instance"], root["step"]
    return root["process"], root["sequence"], 0  # never the key of a step, which has two numbers


def _segment_parent(row: Row, root: Row, trace: _Trace, known: _Segments, key: bytes) -> SpanContext | None:
    if row is root and not _in_step(root):
        return None
    above = None if row["parent"] is None else known.get((row["process"], row["parent"]))
    if above is not None and above["stage"] in BY_ID:
        root_above = _root(above, known)
        if root_above is not None and _trace_key(root_above) == _trace_key(root):
            return _within(trace.root, _segment_id(key, above["process"], above["sequence"]))
    return trace.root


def _segment_id(key: bytes, process: int, sequence: int) -> int:
    return int.from_bytes(ids.segment_span_id(key, process, sequence))


# Request traces


def request_spans(
    requests: Sequence[Row],
    states: Sequence[Row],
    members: Sequence[Row],
    source: Source,
    link_limit: int = LINK_LIMIT,
) -> Spans:
    """A root span per request, its states as children, and links to the first `link_limit` steps it took part in.

    A request whose caller chose not to sample it has no spans and is counted. The span above the children of one parent
    comes with the first of them and is made of those that are here; the assembly closes them together.
    """
    states_of = _by_handle(states)
    members_of = _by_handle(members)
    families = _families(requests)
    made: dict[tuple[int, int], Link] = {}  # a step's requests share the link to it
    spans = []
    left_out: Counter[str] = Counter()
    for row in requests:
        own_states = states_of.pop(row["handle"], [])
        if not row["trace_flags"] & TraceFlags.SAMPLED:
            left_out["requests_not_sampled"] += 1
            continue
        begin = _request_begin(row, own_states)
        offset = source.clock.offset(begin)
        links = _links(members_of.get(row["handle"], []), source.key, link_limit, made)
        if row["child"] == 0:
            spans.append(_parent_span(families[row["parent"]], source))
        request = _request_span(row, begin, offset, links, source)
        inner, unknown = _state_spans(own_states, request.context, offset, source)
        spans += [request, *inner]
        left_out["states_of_unknown_stage"] += unknown
    left_out["states_without_request"] += sum(map(len, states_of.values()))
    return Spans(spans, +left_out)


def _families(requests: Sequence[Row]) -> dict[int, list[Row]]:
    """The children of each parent, in order."""
    grouped: defaultdict[int, list[Row]] = defaultdict(list)
    for row in requests:
        if row["parent"] is not None:
            grouped[row["parent"]].append(row)
    return {parent: sorted(rows, key=lambda row: row["child"] or 0) for parent, rows in grouped.items()}


def _by_handle(rows: Sequence[Row]) -> dict[int, list[Row]]:
    grouped: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row["handle"]].append(row)
    return dict(grouped)


def _request_begin(row: Row, states: Sequence[Row]) -> int:
    if row["arrival_ns"] is not None:
        return int(row["arrival_ns"])
    moments = [row[name] for name in _MOMENTS if row[name] is not None]
    return int(min(moments + [state["begin_ns"] for state in states]))


def _request_contexts(row: Row, key: bytes) -> tuple[SpanContext, SpanContext, SpanContext | None]:
    """Of the request's own span, of the span that stands for it in the caller's trace (its parent's, where it is one of
    several answers, else itself), and of the caller's span.
    """
    trace_id = int(row["trace_id"], 16)
    flags = TraceFlags(row["trace_flags"])
    state = TraceState.from_header([row["trace_state"]]) if row["trace_state"] else None
    handles = (row["handle"], row["handle"] if row["parent"] is None else row["parent"])
    own, top = (
        SpanContext(trace_id, int.from_bytes(ids.request_span_id(key, handle)), False, flags, state)
        for handle in handles
    )
    if row["parent_span_id"] is None:
        return own, top, None
    return own, top, SpanContext(trace_id, int(row["parent_span_id"], 16), True, flags, state)


def _request_span(row: Row, begin: int, offset: int, links: Sequence[Link], source: Source) -> ReadableSpan:
    own, top, caller = _request_contexts(row, source.key)
    is_child = row["parent"] is not None
    description = _DESCRIPTIONS.get(row["status"])
    return _span(
        "request",
        own,
        parent=top if is_child else caller,
        resource=source.service,
        attributes=_request_attributes(row, source),
        begin=begin + offset,
        duration=row["end_ns"] - begin,
        kind=SpanKind.INTERNAL if is_child else SpanKind.SERVER,
        status=_UNSET if description is None else Status(StatusCode.ERROR, description),
        events=[
            Event("stagetrace." + name.removesuffix("_ns"), {}, row[name] + offset)
            for name in _EVENTS
            if row[name] is not None
        ],
        links=links,
    )


def _parent_span(children: Sequence[Row], source: Source) -> ReadableSpan:
    """The span of a request for several answers, around these."""
    first = children[0]
    _, top, caller = _request_contexts(first, source.key)
    begin = min(_request_begin(row, ()) for row in children)
    failed = next((row["status"] for row in children if row["status"] in _DESCRIPTIONS), None)
    finishes = tuple(row["finish"] for row in children)
    attributes = {
        "stagetrace.stage": "parent_request",
        ERROR_TYPE: failed,
        GEN_AI_REQUEST_ID: first["external_id"],
        GEN_AI_REQUEST_MODEL: source.model,
        GEN_AI_REQUEST_CHOICE_COUNT: first["children"],
        GEN_AI_RESPONSE_FINISH_REASONS: None if Finish.UNKNOWN.name.lower() in finishes else finishes,
        GEN_AI_USAGE_INPUT_TOKENS: first["prompt_tokens"],  # the answers share it
        GEN_AI_USAGE_OUTPUT_TOKENS: sum(row["output_tokens"] or 0 for row in children),
        "stagetrace.children": first["children"],
    }
    return _span(
        "parent_request",
        top,
        parent=caller,
        resource=source.service,
        attributes=attributes,
        begin=begin + source.clock.offset(begin),
        duration=max(row["end_ns"] for row in children) - begin,
        kind=SpanKind.SERVER,
        status=_UNSET if failed is None else Status(StatusCode.ERROR, _DESCRIPTIONS[failed]),
    )


def _request_attributes(row: Row, source: Source) -> dict[str, Any]:
    finish = row["finish"]
    return {
        "stagetrace.stage": "request",
        ERROR_TYPE: str(row["refused"] or row["status"]) if row["status"] in _DESCRIPTIONS else None,
        GEN_AI_REQUEST_ID: row["external_id"] or row["request_id"],
        GEN_AI_REQUEST_MODEL: source.model,
        GEN_AI_REQUEST_MAX_TOKENS: row["max_tokens"] or None,  # 0 stands for unbounded
        GEN_AI_RESPONSE_FINISH_REASONS: None if finish == Finish.UNKNOWN.name.lower() else (finish,),
        GEN_AI_USAGE_INPUT_TOKENS: row["prompt_tokens"],
        GEN_AI_USAGE_OUTPUT_TOKENS: row["output_tokens"],
        GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: row["cached_tokens"],
        **{
            name: (row[end] - row[begin]) / 1e9
            for name, (begin, end) in LATENCIES.items()
            if row[begin] is not None and row[end] is not None
        },
        "stagetrace.request_id": row["request_id"],
        "stagetrace.engine_instance": hex_instance(row["instance"]),
        **{f"stagetrace.{name}": row[name] for name in (*_OF_REQUESTS, *_STATE_SUMS)},
    }


def _links(members: Sequence[Row], key: bytes, limit: int, made: dict[tuple[int, int], Link]) -> BoundedList[Link]:
    """Links to the first `limit` steps, and how many more there were; `made` has those of other requests."""
    links: BoundedList[Link] = BoundedList(None)
    for run in members:
        instance, first, count = run["instance"], run["first_step"], run["last_step"] + 1 - run["first_step"]
        kept = min(count, limit - len(links))
        for step in range(first, first + kept):
            if (instance, step) not in made:
                made[instance, step] = Link(_step_context(key, instance, step), {"stagetrace.step": step})
        links.extend([made[instance, step] for step in range(first, first + kept)])
        links.dropped += count - kept
    return links


def _state_spans(
    states: Sequence[Row], root: SpanContext, offset: int, source: Source
) -> tuple[list[ReadableSpan], int]:
    """The spans of one request's states, and how many are of a stage that this version does not know."""
    spans = []
    unknown = 0
    for row in states:
        stage = BY_ID.get(row["stage"])
        if stage is None:
            unknown += 1
            continue
        holder = _holder(row, stage, states)
        attributes = {
            "stagetrace.stage": stage.name,
            "stagetrace.step": row["step"],
            "stagetrace.engine_instance": hex_instance(row["instance"]),
            **_stage_attributes(row, stage, source.names),
        }
        spans.append(
            _span(
                stage.name,
                _within(root, _state_id(row, source.key)),
                parent=root if holder is None else _within(root, _state_id(holder, source.key)),
                resource=source.service,
                attributes=attributes,
                begin=row["begin_ns"] + offset,
                duration=row["end_ns"] - row["begin_ns"],
            )
        )
    return spans, unknown


def _holder(row: Row, stage: Stage, states: Sequence[Row]) -> Row | None:
    """The state around a state (the prefill around a chunk): the one that it shares most time with, or None."""
    possible = [BY_NAME[name].id for name in stage.inside if BY_NAME[name].kind is Kind.STATE]
    best = None
    longest = -1
    for state in states if possible else ():
        shared = min(row["end_ns"], state["end_ns"]) - max(row["begin_ns"], state["begin_ns"])
        if state["stage"] in possible and shared > longest:
            best, longest = state, shared
    return best


def _state_id(row: Row, key: bytes) -> int:
    return int.from_bytes(ids.state_span_id(key, row["handle"], row["stage"], row["begin_ns"], row["step"] or 0))


# Common to both


def _within(root: SpanContext, span_id: int) -> SpanContext:
    """The context of another span in the trace of `root`."""
    return SpanContext(root.trace_id, span_id, False, root.trace_flags, root.trace_state)


def _stage_attributes(row: Row, stage: Stage, names: Mapping[int, str]) -> dict[str, Any]:
    found = {}
    for i, attribute in enumerate(stage.attributes):
        value = row[f"a{i}"]
        if value is not None and attribute.unit is Unit.HANDLE:
            value = names.get(value) or (hex_instance(value) if value else None)
        elif value is not None:
            value = attribute.text(value) or value
        found[f"stagetrace.{attribute.name}"] = value
    return found


def _span(
    name: str,
    context: SpanContext,
    *,
    parent: SpanContext | None,
    resource: Resource,
    attributes: Mapping[str, Any],
    begin: int,
    duration: int,
    kind: SpanKind = SpanKind.INTERNAL,
    status: Status = _UNSET,
    events: Sequence[Event] = (),
    links: Sequence[Link] = (),
) -> ReadableSpan:
    return ReadableSpan(
        name,
        context,
        parent,
        resource,
        {key: value for key, value in attributes.items() if value is not None},
        events,
        links,
        kind,
        status=status,
        start_time=begin,
        end_time=begin + max(duration, 0),
        instrumentation_scope=SCOPE,
    )


def hex_instance(instance: int | None) -> str | None:
    """An engine instance as attributes show it: 16 hex digits, since JavaScript rounds integers of 63 bits."""
    return None if instance is None else f"{instance:016x}"


# What the manifest says of the origin


def resource_attributes(manifest: Manifest, process: Process | None = None) -> dict[str, str | int]:
    """Resource attributes of one process, or of the session's engine as a whole.

    `service.name` is the engine's name, and `service.instance.id` the same whenever it is asked for.
    """
    whole = f"stagetrace:{manifest.session}"
    attributes: dict[str, str | int | None] = {
        "service.name": _said(manifest, process, "engine"),
        "service.instance.id": str(uuid5(NAMESPACE_URL, whole if process is None else f"{whole}/{process.ring}")),
        "host.name": manifest.host if process is None else process.host,
        "stagetrace.session": manifest.session,
        "stagetrace.engine": _said(manifest, process, "engine"),
        "stagetrace.engine_version": _said(manifest, process, "version"),
        "stagetrace.model": _said(manifest, process, "model"),
    }
    if process is not None:
        attributes |= {"process.pid": process.pid, "stagetrace.role": process.role}
        ranks = {name: process.info.get(name) for name in RANKS}
        attributes |= {f"stagetrace.{name}": rank for name, rank in ranks.items() if isinstance(rank, int)}
    return {name: value for name, value in attributes.items() if value not in (None, "")}


def model_of(manifest: Manifest) -> str | None:
    """The model that the session's engine serves; None when its processes say nothing, or several."""
    return _said(manifest, None, "model")


def _said(manifest: Manifest, process: Process | None, name: str) -> str | None:
    """What a process says of itself, else what all that say it agree on: a front end may not know the model."""
    if process is not None and process.info.get(name):
        return str(process.info[name])
    said = {str(other.info[name]) for other in manifest.processes if other.info.get(name)}
    return said.pop() if len(said) == 1 else None
