"""Spans from a session's tables: pure functions, which give the same spans with the same ids whenever they are asked.

A *step trace* is an engine step with its segments, a *request trace* a request with its states; span links lead from
the request to the steps that it took part in. Several answers to one request (n > 1) are requests under a span
`parent_request`. Segments that belong to no step become traces of their own only where
they are rare events that request level records too (`model_load`, `compile`, `sleep` ...). All others (`between`,
`idle`, `detokenize`, a `gc_pause` between two steps) are left out and counted: as traces of one span they are noise.

All times of a trace are moved to wall time by one offset, that of the newest clock anchor before the trace's begin.
So durations, and what is inside what, stay exact to the nanosecond when the host's wall clock was set meanwhile.

A span is a plain tuple and not the OpenTelemetry SDK's: making and encoding one of those takes five times as long.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import NAMESPACE_URL, uuid5

import pyarrow as pa
from opentelemetry.trace import TraceFlags, TraceState

from stagetrace.exporters.session import REQUESTS_SCHEMA
from stagetrace.instrument import ids
from stagetrace.instrument.stages import (
    BY_ID,
    BY_NAME,
    QUEUE_CAUSES,
    STAGES,
    STEP_COMPOSITION,
    Attribute,
    Finish,
    Kind,
    Level,
    Stage,
    Timeline,
    Unit,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

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
    *("external_tokens", "draft_tokens", "accepted_tokens", "response_bytes", "unsent_bytes"),
    *_QUEUE_SUMS,
)

_DESCRIPTIONS = {
    "error": "the engine ended the request with an error, or refused it",
    "lost": "the engine's process died while the request was open",
}

_READ = ("requests", "states", "members", "steps", "segments")

SCOPE_NAME = "stagetrace"
try:
    SCOPE_VERSION = version("stagetrace")
except PackageNotFoundError:  # run from a checkout that is not installed
    SCOPE_VERSION = ""

Row = dict[str, Any]


class Context(NamedTuple):
    """Which span: 16 bytes and 8 bytes, as OpenTelemetry has them."""

    trace_id: bytes
    span_id: bytes


class Link(NamedTuple):
    """A link to the root span of a step, or to the span of what launched this one's work in it."""

    context: Context
    step: int


class Event(NamedTuple):
    """A moment inside a span, in wall time."""

    name: str
    time_ns: int


class Span(NamedTuple):
    """A finished span. Times are wall time; attributes are text, numbers, and tuples of text."""

    name: str
    context: Context
    parent: Context | None
    process: int | None  # key of the process whose it is; None: of the engine as a whole
    attributes: dict[str, Any]
    start_time: int
    end_time: int
    server: bool = False  # it answers a call from outside; else internal
    remote: bool = False  # its parent is the caller's
    error: str | None = None  # what went wrong
    trace_state: str = ""
    events: tuple[Event, ...] = ()
    links: tuple[Link, ...] = ()
    dropped_links: int = 0


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
    processes: Collection[int] = ()  # keys of those that are known; spans of others are the engine's as a whole
    model: str | None = None
    names: Mapping[int, str] = field(default_factory=dict)  # what handles in segments stand for
    # Stages that a compiler has put into the graphs of a process: they have no spans, their time is that of forward's.
    not_visible: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def known(self, process: int) -> int | None:
        """The process whose spans these are; None when nothing is known of it."""
        return process if process in self.processes else None


@dataclass(frozen=True)
class Spans:
    """Finished spans, and how many rows became none, by reason."""

    spans: list[Span]
    left_out: Counter[str]
    wanted: frozenset[tuple[int, int]] = frozenset()  # instance and step of those in earlier commits (sampling.py)


def spans_of(tables: Mapping[str, pa.Table], source: Source, link_limit: int = LINK_LIMIT) -> Spans:
    """All spans of the tables (by name, as in session.TABLES; one that is missing counts as empty).

    Tables hold whole traces: a request with its states and members, a step with its segments.
    """
    return spans_of_rows(rows_of(tables), source, link_limit)


def rows_of(tables: Mapping[str, pa.Table]) -> dict[str, Sequence[Row]]:
    """The rows of those tables that spans are made of."""
    return {name: _rows(tables[name]) if name in tables else [] for name in _READ}


def _rows(table: pa.Table) -> list[Row]:
    """As the table's own to_pylist, by whole columns, which takes a fraction of its time."""
    names = table.column_names
    return [dict(zip(names, row, strict=True)) for row in zip(*map(_values, table.columns), strict=True)]


def _values(column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_integer(column.type):
        values: list[Any] = column.fill_null(0).to_numpy().tolist() if column.null_count else column.to_numpy().tolist()
        if column.null_count == len(values):
            return [None] * len(values)
        if column.null_count:
            valid = column.is_valid().to_numpy().tolist()
            return [value if known else None for value, known in zip(values, valid, strict=True)]
        return values
    if pa.types.is_string(column.type):  # a few words, many times over: each is made once
        encoded = column.combine_chunks().dictionary_encode()
        words = [*encoded.dictionary.to_pylist(), None]
        return [words[at] for at in encoded.indices.fill_null(len(words) - 1).to_numpy(zero_copy_only=False).tolist()]
    found: list[Any] = column.to_pylist()
    return found


def spans_of_rows(rows: Mapping[str, Sequence[Row]], source: Source, link_limit: int = LINK_LIMIT) -> Spans:
    """As `spans_of`, from the tables' rows."""
    steps = step_spans(rows["steps"], rows["segments"], source)
    requests = request_spans(rows["requests"], rows["states"], rows["members"], source, link_limit)
    return Spans(steps.spans + requests.spans, steps.left_out + requests.left_out)


# Step traces


@dataclass(frozen=True, slots=True)
class _Trace:
    """A step trace, or that of an occasion: the ids of its root, and its offset to wall time."""

    root: Context
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
    launchers = _launchers(segments)
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
        span = _segment_span(row, root, traces[where], known, source)
        if launchers and row["stage"] in _LAUNCHED_BY:
            span = span._replace(links=_launched_by(row, launchers, traces[where], source.key))
        spans.append(span)
    return Spans(spans, left_out)


# What a device does in a stage was launched by the host in another.
_LAUNCHED_BY = {BY_NAME[f"device_{name}"].id: BY_NAME[name].id for name in ("forward", "sample", "draft")}
_LAUNCHES = frozenset(_LAUNCHED_BY.values())
_Launchers = dict[tuple[int, ...], Row]  # by process, instance, step and stage; the first of several


def _launchers(segments: Sequence[Row]) -> _Launchers:
    """The host's segments that launched work on a device; empty where no device was timed."""
    if not any(row["stage"] in _LAUNCHED_BY for row in segments):
        return {}
    rows = (row for row in reversed(segments) if row["stage"] in _LAUNCHES and _in_step(row))
    return {(row["process"], row["instance"], row["step"], row["stage"]): row for row in rows}


def _launched_by(row: Row, launchers: _Launchers, trace: _Trace, key: bytes) -> tuple[Link, ...]:
    """A device's span runs when its launcher may be long over: it is no child of it, it links to it."""
    above = launchers.get((row["process"], row["instance"], row["step"], _LAUNCHED_BY[row["stage"]]))
    if above is None:
        return ()
    span = ids.segment_span_id(key, above["process"], above["sequence"])
    return (Link(Context(trace.root.trace_id, span), row["step"]),)


def _step_trace(instance: int, step: int, begin: int, source: Source) -> _Trace:
    return _Trace(_step_context(source.key, instance, step), source.clock.offset(begin))


def _step_context(key: bytes, instance: int, step: int) -> Context:
    return Context(ids.step_trace_id(key, instance, step), ids.step_span_id(key, instance, step))


def _occasion_trace(root: Row, source: Source) -> _Trace:
    process, sequence = root["process"], root["sequence"]
    # Process keys and engine instances are both random 63-bit numbers: a process stands in for an instance here.
    trace_id = ids.occasion_trace_id(source.key, process, sequence)
    context = Context(trace_id, ids.segment_span_id(source.key, process, sequence))
    return _Trace(context, source.clock.offset(root["begin_ns"]))


# Columns of steps that are attributes of their spans, by the attributes' names.
_OF_STEPS = {
    f"stagetrace.{name}": name
    for name in (
        *("phase", "status", "unattributed_ns", "ranks_expected", "ranks_reported", "members"),
        *(attribute.name for attribute in STEP_COMPOSITION),
        *("output_tokens", "accepted_tokens", "padded_tokens", "graph_mode"),
        *STEP_LIGHT,
    )
}
_OF_GAPS = {f"stagetrace.{name}": name for name in STEP_GAP}


def _step_span(row: Row, trace: _Trace, source: Source) -> Span:
    attributes = {
        "stagetrace.stage": "step",
        "stagetrace.step": row["step"],
        "stagetrace.engine_instance": hex_instance(row["instance"]),
    }
    for name, column in _OF_STEPS.items():
        value = row.get(column)
        if value is not None:
            attributes[name] = value
    attributes.update(_sampling(row))
    for name, column in _OF_GAPS.items():
        value = row.get(column)
        if value is not None:
            attributes[name] = round(value)
    attributes["thread.id"] = row["thread"]
    begin = row["begin_ns"] + trace.offset
    end = begin + max(row["end_ns"] - row["begin_ns"], 0)
    return Span(f"step {row['phase']}", trace.root, None, source.known(row["process"]), attributes, begin, end)


def _segment_span(row: Row, root: Row, trace: _Trace, known: _Segments, source: Source) -> Span:
    stage = BY_ID[row["stage"]]
    phase = root["phase"]
    attributes: dict[str, Any] = {"stagetrace.stage": stage.name}
    if phase is not None:
        attributes["stagetrace.phase"] = phase
    if root["step"] is not None:
        attributes["stagetrace.step"] = root["step"]
    if root["instance"] is not None:
        attributes["stagetrace.engine_instance"] = hex_instance(root["instance"])
    attributes["stagetrace.self_ns"] = row["self_ns"]
    attributes["thread.id"] = row["thread"]
    if row["partial"]:
        attributes["stagetrace.partial"] = True
    if stage.id == _FORWARD and (hidden := source.not_visible.get(row["process"])):
        attributes["stagetrace.not_visible_under_compile"] = hidden
    attributes.update(words_of(row, source.names))
    begin = row["begin_ns"] + trace.offset
    return Span(
        f"{stage.name} {phase}" if phase and stage.id in _SAYS_PHASE else stage.name,
        Context(trace.root.trace_id, ids.segment_span_id(source.key, row["process"], row["sequence"])),
        _segment_parent(row, root, trace, known, source.key),
        source.known(row["process"]),
        attributes,
        begin,
        begin + max(row["end_ns"] - row["begin_ns"], 0),
    )


def _says_phase(stage: Stage) -> bool:
    """Whether the phase belongs in the span's name: the work is on tokens, so prefill and decode are unlike."""
    return stage.timeline is Timeline.DEVICE or any(attribute.name == "tokens" for attribute in stage.attributes)


_FORWARD = BY_NAME["forward"].id
_SAYS_PHASE = {stage.id for stage in STAGES if _says_phase(stage)}


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


def _segment_parent(row: Row, root: Row, trace: _Trace, known: _Segments, key: bytes) -> Context | None:
    if row is root and not _in_step(root):
        return None
    above = None if row["parent"] is None else known.get((row["process"], row["parent"]))
    if above is not None and above["stage"] in BY_ID:
        root_above = _root(above, known)
        if root_above is not None and _trace_key(root_above) == _trace_key(root):
            return Context(trace.root.trace_id, ids.segment_span_id(key, above["process"], above["sequence"]))
    return trace.root


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
        if row["child"] == 0:
            spans.append(_parent_span(families[row["parent"]], source))
        links, dropped = _links(members_of.get(row["handle"], []), source.key, link_limit, made)
        request = _request_span(row, begin, offset, links, dropped, source)
        inner, unknown = _state_spans(own_states, request, offset, source)
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


def _request_contexts(row: Row, key: bytes) -> tuple[Context, Context, Context | None]:
    """Of the request's own span, of the span that stands for it in the caller's trace (its parent's, where it is one of
    several answers, else itself), and of the caller's span.
    """
    trace_id = bytes.fromhex(row["trace_id"])
    handles = (row["handle"], row["handle"] if row["parent"] is None else row["parent"])
    own, top = (Context(trace_id, ids.request_span_id(key, handle)) for handle in handles)
    if row["parent_span_id"] is None:
        return own, top, None
    return own, top, Context(trace_id, bytes.fromhex(row["parent_span_id"]))


def _trace_state(row: Row) -> str:
    """The caller's, less what of it is not valid."""
    if not row["trace_state"]:
        return ""
    return ",".join(f"{key}={value}" for key, value in TraceState.from_header([row["trace_state"]]).items())


def _request_span(
    row: Row, begin: int, offset: int, links: tuple[Link, ...], dropped_links: int, source: Source
) -> Span:
    own, top, caller = _request_contexts(row, source.key)
    is_child = row["parent"] is not None
    return Span(
        "request",
        own,
        top if is_child else caller,
        None,
        _request_attributes(row, source),
        begin + offset,
        begin + offset + max(row["end_ns"] - begin, 0),
        server=not is_child,
        remote=not is_child and caller is not None,
        error=_DESCRIPTIONS.get(row["status"]),
        trace_state=_trace_state(row),
        events=tuple(
            Event("stagetrace." + name.removesuffix("_ns"), row[name] + offset)
            for name in _EVENTS
            if row[name] is not None
        ),
        links=links,
        dropped_links=dropped_links,
    )


def _parent_span(children: Sequence[Row], source: Source) -> Span:
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
    start = begin + source.clock.offset(begin)
    return Span(
        "parent_request",
        top,
        caller,
        None,
        _known(attributes),
        start,
        start + max(max(row["end_ns"] for row in children) - begin, 0),
        server=True,
        remote=caller is not None,
        error=None if failed is None else _DESCRIPTIONS[failed],
        trace_state=_trace_state(first),
    )


def _request_attributes(row: Row, source: Source) -> dict[str, Any]:
    finish = row["finish"]
    attributes = {
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
    return _known(attributes | _sampling(row))


def _sampling(row: Row) -> dict[str, Any]:
    """Why it is here, and for how many it stands, where not all are (sampling.py)."""
    if "sampling_weight" not in row:
        return {}
    return {
        "stagetrace.sampling.reason": row["sampling_reason"],
        "stagetrace.sampling.weight": row["sampling_weight"],
    }


def _known(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _links(
    members: Sequence[Row], key: bytes, limit: int, made: dict[tuple[int, int], Link]
) -> tuple[tuple[Link, ...], int]:
    """Links to the first `limit` steps, and how many more there were; `made` has those of other requests."""
    links: list[Link] = []
    dropped = 0
    for run in members:
        instance, first, count = run["instance"], run["first_step"], run["last_step"] + 1 - run["first_step"]
        kept = min(count, limit - len(links))
        for step in range(first, first + kept):
            link = made.get((instance, step))
            if link is None:
                link = made[instance, step] = Link(_step_context(key, instance, step), step)
            links.append(link)
        dropped += count - kept
    return tuple(links), dropped


def _state_spans(states: Sequence[Row], request: Span, offset: int, source: Source) -> tuple[list[Span], int]:
    """The spans of one request's states, and how many are of a stage that this version does not know."""
    spans = []
    unknown = 0
    trace_id = request.context.trace_id
    for row in states:
        stage = BY_ID.get(row["stage"])
        if stage is None:
            unknown += 1
            continue
        holder = _holder(row, stage, states)
        attributes: dict[str, Any] = {"stagetrace.stage": stage.name}
        if row["step"] is not None:
            attributes["stagetrace.step"] = row["step"]
        if row["instance"] is not None:
            attributes["stagetrace.engine_instance"] = hex_instance(row["instance"])
        attributes.update(words_of(row, source.names))
        begin = row["begin_ns"] + offset
        spans.append(
            Span(
                stage.name,
                Context(trace_id, _state_id(row, source.key)),
                request.context if holder is None else Context(trace_id, _state_id(holder, source.key)),
                None,
                attributes,
                begin,
                begin + max(row["end_ns"] - row["begin_ns"], 0),
                trace_state=request.trace_state,
            )
        )
    return spans, unknown


def _holder(row: Row, stage: Stage, states: Sequence[Row]) -> Row | None:
    """The state around a state (the prefill around a chunk): the one that it shares most time with, or None."""
    possible = _HOLDERS.get(stage.id, ())
    best = None
    longest = -1
    for state in states if possible else ():
        shared = min(row["end_ns"], state["end_ns"]) - max(row["begin_ns"], state["begin_ns"])
        if state["stage"] in possible and shared > longest:
            best, longest = state, shared
    return best


_HOLDERS = {
    stage.id: [BY_NAME[name].id for name in stage.inside if BY_NAME[name].kind is Kind.STATE]
    for stage in STAGES
    if stage.kind is Kind.STATE
}


def _state_id(row: Row, key: bytes) -> bytes:
    return ids.state_span_id(key, row["handle"], row["stage"], row["begin_ns"], row["step"] or 0)


# Common to both


def _is_handle(attribute: Attribute) -> bool:
    return attribute.unit is Unit.HANDLE


# Of each stage: the column and the attribute of every word, and what it is where it is no plain number.
_WORDS = {
    stage.id: [
        (f"a{i}", f"stagetrace.{attribute.name}", attribute if attribute.choices or _is_handle(attribute) else None)
        for i, attribute in enumerate(stage.attributes)
    ]
    for stage in STAGES
}


def words_of(row: Row, names: Mapping[int, str]) -> Iterator[tuple[str, Any]]:
    """What the stage's own words in a row of segments or states say, as attributes."""
    for column, name, attribute in _WORDS[row["stage"]]:
        value = row[column]
        if value is None:
            continue
        if attribute is None:
            yield name, value
        elif not _is_handle(attribute):
            yield name, attribute.text(value) or value
        elif value:
            yield name, names.get(value) or hex_instance(value)


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
