"""Spans from tables: the tree, the names, the attributes and the clock, without a backend."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from backends.tables import KEY, MS, Builder, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

from stagetrace.exporters import spans as module
from stagetrace.exporters.session import REQUESTS_SCHEMA, STATES_SCHEMA, Manifest, Process
from stagetrace.exporters.spans import Clock, Source, Span, Spans, model_of, resource_attributes, spans_of
from stagetrace.instrument.stages import BY_NAME, STAGES, STEP_COMPOSITION, Kind, Unit

INSTANCE = 77
SCHEDULER, WORKER = 11, 12


def source(anchors: list[tuple[int, int]] | None = None) -> Source:
    return Source(KEY, Clock(anchors or [(0, 0)]))


def made(build: Builder, anchors: list[tuple[int, int]] | None = None, **options: Any) -> Spans:
    return spans_of(build.tables(), source(anchors), **options)


def by_name(spans: Spans) -> dict[str, Span]:
    names = {span.name: span for span in spans.spans}
    assert len(names) == len(spans.spans), "a name twice: look spans up otherwise"
    return names


def check_tree(spans: list[Span]) -> None:
    """One root a trace, every parent there, every child inside its parent, no id twice."""
    by_id = {(span.context.trace_id, span.context.span_id): span for span in spans}
    assert len(by_id) == len(spans)
    assert len({span.context.span_id for span in spans}) == len(spans)
    roots: Counter[bytes] = Counter()
    for span in spans:
        assert any(span.context.trace_id) and any(span.context.span_id)
        if span.parent is None:
            roots[span.context.trace_id] += 1
            continue
        assert span.parent.trace_id == span.context.trace_id
        parent = by_id[span.parent.trace_id, span.parent.span_id]
        assert parent is not span
        assert parent.start_time <= span.start_time <= span.end_time <= parent.end_time
    assert roots == dict.fromkeys((span.context.trace_id for span in spans), 1)


# The tree

SEGMENTS = [stage.name for stage in STAGES if stage.kind is not Kind.STATE and stage.name not in ("step", "request")]


@st.composite
def sessions(draw: st.DrawFn) -> Builder:
    """Steps and loose segments, each a random nest on several timelines; some rows do not know their step, some rows
    are lost, and their order is any.
    """
    build = Builder()

    def fill(
        process: int, begin: int, end: int, parent: int | None, of: tuple[int, int, str] | None, depth: int
    ) -> None:
        cuts = draw(st.lists(st.integers(begin, end), max_size=6).map(sorted))
        for left, right in zip(cuts[::2], cuts[1::2], strict=False):
            # A segment in a segment may not know its step (a hook that is not told); one directly in the step does.
            knows = parent is None or draw(st.booleans())
            stage = draw(st.sampled_from(SEGMENTS))
            own = build.segment(stage, process, left, right, parent=parent, of=of if knows else None)
            if depth:
                fill(process, left, right, own, of, depth - 1)

    at = 0
    for step in range(draw(st.integers(0, 3))):
        begin = at + draw(st.integers(0, 50))
        at = begin + draw(st.integers(0, 1000))
        build.step(INSTANCE, step, begin, at, prefill_tokens=draw(st.integers(0, 1)), decode_tokens=1)
        for process in (SCHEDULER, WORKER):
            fill(process, begin, at, None, (INSTANCE, step, "decode"), 2)
    fill(WORKER, at, at + 1000, None, None, 2)
    rows = build.rows["segments"]
    kept = draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    build.rows["segments"] = draw(st.permutations([row for row, keep in zip(rows, kept, strict=True) if keep]))
    return build


ANCHORS = st.lists(st.tuples(st.integers(0, 5000), st.integers(10**18, 10**18 + 10**12)), min_size=1, max_size=4)


@settings(deadline=None)  # the first call imports and makes caches
@given(sessions(), ANCHORS)
def test_random_segments_give_valid_trees(build: Builder, anchors: list[tuple[int, int]]) -> None:
    result = made(build, anchors)
    check_tree(result.spans)
    rows = len(build.rows["steps"]) + len(build.rows["segments"])
    assert len(result.spans) + sum(result.left_out.values()) == rows, "every row is a span or counted"


@settings(deadline=None)  # the first call imports and makes caches
@given(sessions(), ANCHORS)
def test_durations_are_those_of_the_rows(build: Builder, anchors: list[tuple[int, int]]) -> None:
    rows = {row["sequence"] + row["process"] * 10**6: row for row in build.rows["segments"]}
    for number, row in rows.items():
        row["thread"] = number  # so that a span names its row
    for span in made(build, anchors).spans:
        row = rows.get(span.attributes["thread.id"])
        if row is not None:
            assert span.end_time - span.start_time == row["end_ns"] - row["begin_ns"]
            assert span.attributes["stagetrace.stage"] == module.BY_ID[row["stage"]].name


def test_realistic_session_gives_valid_trees() -> None:
    session = serving()
    result = spans_of(session.tables, source(session.manifest.anchors))
    of_segments = [span for span in result.spans if span.attributes["stagetrace.stage"] not in states_and_requests()]
    check_tree(of_segments)
    assert result.left_out == session.left_out


def states_and_requests() -> set[str]:
    return {"request"} | {stage.name for stage in STAGES if stage.kind is Kind.STATE}


def test_segment_without_its_parent_hangs_under_the_step() -> None:
    build = Builder()
    build.step(INSTANCE, 1, 0, 100, decode_tokens=1)
    of = (INSTANCE, 1, "decode")
    build.segment("forward", WORKER, 10, 20, of=of, parent=999)
    elsewhere = build.segment("between", SCHEDULER, 30, 90)
    build.segment("update", SCHEDULER, 40, 50, of=of, parent=elsewhere)
    names = by_name(made(build))
    root = names["step decode"]
    assert names["forward decode"].parent == names["update"].parent == root.context
    assert "between" not in names


def test_late_segment_joins_its_steps_trace_without_the_steps_row() -> None:
    build = Builder()
    build.step(INSTANCE, 1, 0, 100, decode_tokens=1)
    of = (INSTANCE, 1, "decode")
    build.segment("forward", WORKER, 10, 20, of=of)
    early = by_name(made(build))
    del build.rows["steps"][:]
    late = by_name(made(build))
    assert set(late) == {"forward decode"}
    assert late["forward decode"].context == early["forward decode"].context
    assert late["forward decode"].parent == early["step decode"].context


def test_rare_events_are_traces_of_their_own_and_noise_is_counted() -> None:
    build = Builder()
    noise = build.segment("between", SCHEDULER, 0, 100)
    outer = build.segment("weight_update", SCHEDULER, 10, 90, parent=noise)
    build.segment("model_load", SCHEDULER, 20, 30, parent=outer)
    build.segment("gc_pause", SCHEDULER, 40, 50, parent=outer)
    for stage in ("idle", "detokenize", "tokenize", "gc_pause", "kv_load"):
        build.segment(stage, WORKER, 200, 300)
    result = made(build)
    names = by_name(result)
    assert set(names) == {"weight_update", "model_load", "gc_pause"}
    root = names["weight_update"]
    assert root.parent is None
    assert names["model_load"].parent == names["gc_pause"].parent == root.context
    assert result.left_out == {"segments_without_step": 6}


def test_stage_of_a_newer_version_is_counted() -> None:
    build = Builder()
    build.step(INSTANCE, 1, 0, 100, decode_tokens=1)
    of = (INSTANCE, 1, "decode")
    outer = build.segment("execute", SCHEDULER, 10, 90, of=of)
    build.segment("forward", SCHEDULER, 20, 30, of=of, parent=outer)
    build.rows["segments"][0]["stage"] = 9999
    handle = build.request("r", end_ns=10)
    build.state("queue", handle, 1, 2)
    build.rows["states"][0]["stage"] = 9999
    result = made(build)
    names = by_name(result)
    assert set(names) == {"step decode", "forward decode", "request"}
    assert names["forward decode"].parent == names["step decode"].context
    assert result.left_out == {"segments_of_unknown_stage": 1, "states_of_unknown_stage": 1}


# Names and attributes


@pytest.mark.parametrize(
    ("prefill", "decode", "phase"), [(5, 0, "prefill"), (0, 3, "decode"), (5, 3, "mixed"), (0, 0, "decode")]
)
def test_names_say_the_phase(prefill: int, decode: int, phase: str) -> None:
    build = Builder()
    build.step(INSTANCE, 1, 0, 100, prefill_tokens=prefill, decode_tokens=decode)
    stages = ("rank_step", "forward", "attention", "device_forward", "device_sample", "schedule", "update", "prepare")
    for at, stage in enumerate(stages):
        build.segment(stage, WORKER, at, at + 1, of=(INSTANCE, 1, phase))
    spoken = {"step", "rank_step", "forward", "attention", "device_forward", "device_sample"}
    assert set(by_name(made(build))) == {f"{name} {phase}" for name in spoken} | {"schedule", "update", "prepare"}


def test_what_ran_on_a_device_links_to_what_launched_it() -> None:
    build = Builder()
    build.step(INSTANCE, 1, 0, 100, prefill_tokens=5)
    for step in (1, 2):
        build.segment("forward", WORKER, 10, 20, of=(INSTANCE, step, "prefill"))
        build.segment("device_forward", WORKER, 15, 90, of=(INSTANCE, step, "prefill"))
    build.segment("device_draft", WORKER, 90, 95, of=(INSTANCE, 1, "prefill"))  # its draft is in no commit of these
    spans = [span for span in made(build).spans if span.name != "step prefill"]
    host = {span.context for span in spans if span.name == "forward prefill"}
    ran = [span for span in spans if span.name == "device_forward prefill"]
    assert {span.links[0].context for span in ran} == host and [span.links[0].step for span in ran] == [1, 2]
    assert all(span.links[0].context.trace_id == span.context.trace_id for span in ran)
    assert all(not span.links for span in spans if span not in ran)


def test_what_marks_told_is_inside_the_forward_pass_on_the_device() -> None:
    build = Builder()
    build.step(INSTANCE, 1, 0, 100, decode_tokens=5)
    of = (INSTANCE, 1, "decode")
    build.segment("forward", WORKER, 10, 20, of=of)
    forward = build.segment("device_forward", WORKER, 15, 90, of=of, rank=3, launch_delay=5, clock_error=2)
    moe = build.segment("device_moe", WORKER, 20, 40, parent=forward, of=of, layer=21, rank=3, clock_error=7)
    build.segment("device_collective", WORKER, 30, 35, parent=moe, of=of, layer=-1, rank=3, clock_error=7)
    spans = by_name(made(build))
    outer, inner = spans["device_moe decode"], spans["device_collective decode"]
    assert outer.parent == spans["device_forward decode"].context and inner.parent == outer.context
    assert {outer.context.trace_id, inner.context.trace_id} == {spans["step decode"].context.trace_id}
    words = {f"stagetrace.{name}": value for name, value in (("layer", 21), ("rank", 3), ("clock_error", 7))}
    assert outer.attributes | words == outer.attributes and inner.attributes["stagetrace.layer"] == -1
    assert not outer.links and not inner.links and len(spans["device_forward decode"].links) == 1


def test_every_attribute_of_every_stage_is_there_under_its_name() -> None:
    for stage in STAGES:
        if stage.kind is Kind.STATE or stage.name in ("step", "request"):
            continue
        build = Builder()
        given_words = {attribute.name: 1000 + at for at, attribute in enumerate(stage.attributes)}
        build.segment(stage.name, WORKER, 1, 2, of=(INSTANCE, 3, "decode"), **given_words)
        (span,) = made(build).spans
        handles = {attribute.name for attribute in stage.attributes if attribute.unit is Unit.HANDLE}
        expected = {
            f"stagetrace.{name}": f"{value:016x}" if name in handles else value for name, value in given_words.items()
        }
        assert span.attributes | expected == span.attributes
        assert span.attributes["stagetrace.stage"] == stage.name
        assert (span.attributes["stagetrace.step"], span.attributes["stagetrace.phase"]) == (3, "decode")


def test_choices_and_handles_are_words() -> None:
    build = Builder()
    words = {"op": 1, "group": 77, "bytes": 5, "algorithm": 0, "sequence": 9}
    build.segment("collective", WORKER, 1, 2, of=(INSTANCE, 3, "decode"), **words)
    (span,) = spans_of(build.tables(), replace(source(), names={77: "tp:0 (ranks 0-1)"})).spans
    assert (span.attributes["stagetrace.op"], span.attributes["stagetrace.group"]) == ("all_reduce", "tp:0 (ranks 0-1)")
    assert "stagetrace.algorithm" not in span.attributes and span.attributes["stagetrace.sequence"] == 9


def test_step_carries_its_whole_composition() -> None:
    build = Builder()
    composition = {attribute.name: 100 + at for at, attribute in enumerate(STEP_COMPOSITION)}
    build.step(INSTANCE, 1, 0, 100, status="ranks_missing", ranks_expected=8, ranks_reported=7, **composition)
    (span,) = made(build).spans
    expected = {f"stagetrace.{name}": value for name, value in composition.items()} | {
        "stagetrace.status": "ranks_missing",
        "stagetrace.ranks_expected": 8,
        "stagetrace.ranks_reported": 7,
    }
    assert span.attributes | expected == span.attributes
    assert "stagetrace.members" not in span.attributes, "not known is not zero"


def test_genai_names_are_those_of_the_conventions() -> None:
    names = [name for name in vars(module) if name.startswith("GEN_AI_") and name != "GEN_AI_REQUEST_ID"]
    assert len(names) == 7
    for name in names:
        assert getattr(module, name) == getattr(gen_ai_attributes, name)


# Requests


def test_latencies_need_both_moments() -> None:
    moments = {name for pair in module.LATENCIES.values() for name in pair}
    assert moments <= set(REQUESTS_SCHEMA.names)
    for missing in moments:
        build = Builder()
        times = {name: 10 * at for at, name in enumerate(sorted(moments)) if name != missing}
        build.request("r", end_ns=1000, **times)
        (span,) = made(build).spans
        latencies = {name: span.attributes[name] for name in module.LATENCIES if name in span.attributes}
        assert latencies == {
            name: (times[end] - times[begin]) / 1e9
            for name, (begin, end) in module.LATENCIES.items()
            if missing not in (begin, end)
        }


def test_request_that_arrived_before_recording_begins_at_what_is_known() -> None:
    build = Builder()
    handle = build.request("r", partial=True, first_sent_ns=70, end_ns=90)
    build.state("decode", handle, 60, 80)
    names = by_name(made(build))
    assert (names["request"].start_time, names["request"].end_time) == (60, 90)
    assert names["request"].attributes["stagetrace.partial"] is True


def test_chunk_is_in_the_prefill_it_shares_most_time_with() -> None:
    build = Builder()
    handle = build.request("r", arrival_ns=0, end_ns=100, preemptions=1)
    other = build.request("other", arrival_ns=0, end_ns=100)
    build.state("prefill", other, 0, 100)
    build.state("prefill", handle, 10, 30)
    build.state("preempted", handle, 40, 50)
    build.state("prefill", handle, 50, 70, resumed=1)
    build.state("prefill_chunk", handle, 5, 20, step=1)  # its step began before the request was scheduled
    build.state("prefill_chunk", handle, 29, 60, step=2)
    build.state("prefill_chunk", handle, 80, 90, step=3)
    build.state("prefill_chunk", handle, 20, 60, step=4)  # as much of both: the first
    spans = made(build).spans
    begins = {span.context.span_id: (span.name, span.start_time) for span in spans}
    chunks = {
        span.attributes["stagetrace.step"]: begins[span.parent.span_id]
        for span in spans
        if span.name == "prefill_chunk"
    }
    assert chunks == {1: ("prefill", 10), 2: ("prefill", 50), 3: ("request", 0), 4: ("prefill", 10)}


def test_sampling_is_the_callers_choice() -> None:
    build = Builder()
    for flags in (0, 1, 2, 3):
        handle = build.request(f"r{flags}", trace_flags=flags, arrival_ns=0, end_ns=10)
        build.state("queue", handle, 1, 2)
    result = made(build)
    assert {span.attributes["stagetrace.request_id"] for span in result.spans if span.name == "request"} == {"r1", "r3"}
    assert len(result.spans) == 4
    assert result.left_out == {"requests_not_sampled": 2}


def test_states_without_their_request_are_counted() -> None:
    build = Builder()
    build.state("queue", 5, 1, 2)
    build.state("prefill", 5, 2, 3)
    result = made(build)
    assert not result.spans
    assert result.left_out == {"states_without_request": 2}


@pytest.mark.parametrize("limit", [0, 1, 4, 5, 6, 100])
def test_links_are_the_first_steps_and_the_rest_is_counted(limit: int) -> None:
    build = Builder()
    handle = build.request("r", arrival_ns=0, end_ns=10)
    build.add("members", handle=handle, instance=INSTANCE, first_step=3, last_step=6)
    build.add("members", handle=handle, instance=INSTANCE, first_step=9, last_step=9)
    build.add("members", handle=handle + 1, instance=INSTANCE, first_step=1, last_step=1)
    (span,) = made(build, link_limit=limit).spans
    assert [link.step for link in span.links] == [3, 4, 5, 6, 9][:limit]
    assert span.dropped_links == max(5 - limit, 0)


def test_link_leads_to_the_steps_root_span() -> None:
    build = Builder()
    build.step(INSTANCE, 3, 0, 10, decode_tokens=1)
    handle = build.request("r", arrival_ns=0, end_ns=10)
    build.add("members", handle=handle, instance=INSTANCE, first_step=3, last_step=3)
    names = by_name(made(build))
    (link,) = names["request"].links
    assert link.context == names["step decode"].context


def test_words_of_a_state_are_there_under_their_names() -> None:
    for stage in (stage for stage in STAGES if stage.kind is Kind.STATE):
        build = Builder()
        handle = build.request("r", arrival_ns=0, end_ns=10)
        given_words = {attribute.name: 1000 + at for at, attribute in enumerate(stage.attributes)}
        build.state(stage.name, handle, 1, 2, **given_words)
        attributes = by_name(made(build))[stage.name].attributes
        expected = {f"stagetrace.{name}": value for name, value in given_words.items()}
        assert attributes | expected == attributes
        assert STATES_SCHEMA.get_field_index(f"a{len(given_words)}") >= 0 or len(given_words) == 8


def test_a_forward_pass_says_what_the_compiler_has_put_into_it() -> None:
    build = Builder()
    build.step(INSTANCE, 1, 0, 100, decode_tokens=1)
    for process in (1, 2):
        build.segment("forward", process, 10, 60, of=(INSTANCE, 1, "decode"))
    hidden = ("moe_route", "expert_compute")
    known = Source(KEY, Clock([(0, 0)]), not_visible={1: hidden, 2: ()})
    spans = spans_of(build.tables(), known).spans
    found = [span.attributes.get("stagetrace.not_visible_under_compile") for span in spans]
    assert len(found) == 3 and [*filter(None, found)] == [hidden]


# The clock


def test_clock_takes_the_newest_anchor_before() -> None:
    clock = Clock([(100, 1100), (0, 500), (200, 1150)])
    assert [clock.offset(at) for at in (-5, 0, 99, 100, 199, 200, 10**9)] == [500, 500, 500, 1000, 1000, 950, 950]


def test_clock_without_anchors_is_refused() -> None:
    with pytest.raises(ValueError, match="anchor"):
        Clock([])


def test_end_before_begin_gives_no_negative_duration() -> None:
    build = Builder()
    build.step(INSTANCE, 1, 100, 90, decode_tokens=1)
    (span,) = made(build).spans
    assert (span.start_time, span.end_time) == (100, 100)


# The origin


def test_resource_attributes_say_what_is_known() -> None:
    info = {"engine": "vllm", "model": "a"}
    first = Process(1, "engine-1-1.ring", "engine", 41, "h1", 0, info=info)
    second = Process(2, "api-2-1.ring", "api", 42, "h2", 0)
    manifest = Manifest(session="s", host="h", processes=[first, second])
    assert model_of(manifest) == "a"
    whole, one, two = (resource_attributes(manifest, process) for process in (None, first, second))
    assert "process.pid" not in whole
    assert (one["process.pid"], one["host.name"], two["host.name"], whole["host.name"]) == (41, "h1", "h2", "h")
    assert whole["service.name"] == one["service.name"] == two["service.name"] == "vllm"
    assert len({item["service.instance.id"] for item in (whole, one, two)}) == 3
    assert resource_attributes(manifest, first) == one
    assert "stagetrace.engine_version" not in whole

    second.info = {"engine": "sglang", "model": "b"}
    assert model_of(manifest) is None
    assert "service.name" not in resource_attributes(manifest)
    assert resource_attributes(manifest, second)["service.name"] == "sglang"


def test_no_name_of_ours_stands_for_two_things() -> None:
    ours = {"stage", "step", "phase", "engine_instance", "self_ns"}
    for stage in STAGES:
        assert not ours & {attribute.name for attribute in stage.attributes}, stage.name
    of_steps = ours | {"status", "unattributed_ns", "ranks_expected", "ranks_reported", "members", "output_tokens"}
    assert not of_steps & {attribute.name for attribute in STEP_COMPOSITION}
    assert BY_NAME["request"].attributes == ()


def test_realistic_session_has_the_times_of_its_rows() -> None:
    session = serving()
    result = spans_of(session.tables, source([(0, 0)]))
    step = next(span for span in result.spans if span.name == "step mixed")
    assert (step.start_time, step.end_time) == (session.begin + 50 * MS, session.begin + 70 * MS)


def test_instances_repeat_step_numbers_and_are_told_apart() -> None:
    build = Builder()
    handle = build.request("r", arrival_ns=0, end_ns=10)
    for instance in (1, 2):
        build.step(instance, 5, 0, 10, decode_tokens=1)
        build.segment("forward", WORKER, 1, 2, of=(instance, 5, "decode"))
        build.add("members", handle=handle, instance=instance, first_step=5, last_step=5)
    spans = made(build).spans
    check_tree(spans)
    steps = [span.context for span in spans if span.name == "step decode"]
    assert [link.context for link in spans[-1].links] == steps
    assert [span.parent for span in spans if span.name == "forward decode"] == steps
