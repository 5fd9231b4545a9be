"""Tests of SGLang's front end: what the hooks write, around functions that do to their state what SGLang's do."""

from __future__ import annotations

import asyncio
import copy
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.decoded import decoded_batch
from unit.rings import opened, read_all

from stagetrace.adapters.http import EXCHANGE, Exchange
from stagetrace.adapters.sglang import extract, front_end
from stagetrace.adapters.sglang.hooks import HOOK_POINTS
from stagetrace.instrument.around import wrap
from stagetrace.instrument.hooks import Hook
from stagetrace.instrument.records import Event, RecordType, Text
from stagetrace.instrument.stages import BY_ID, Finish, Level

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stagetrace.exporters.drain import RingReader
    from stagetrace.instrument.recorder import Recorder

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


# What stands in for SGLang's classes: the attributes that the hooks read, changed where SGLang changes them.


@dataclass
class Obj:
    rid: str
    stream: bool = False
    sampling_params: dict[str, Any] = field(default_factory=dict)
    external_trace_header: dict[str, str] | None = None
    lora_path: str | None = None
    priority: int | None = None

    def regenerate_rid(self) -> str:
        self.rid = f"{self.rid}-copy"
        return self.rid


@dataclass
class State:
    obj: Obj
    time_stats: Any
    dispatched: bool = False
    abort_sent: bool = False
    output_ids: list[int] = field(default_factory=list)


def stats(**times: float) -> Any:
    return SimpleNamespace(created_time=time.perf_counter(), first_token_time=0.0, finished_time=0.0, **times)


class Manager:
    async_dynamic_batch_tokenizer = None

    def __init__(self) -> None:
        self.rid_to_state: dict[str, State] = {}

    def arrive(self, obj: Obj) -> State:
        state = self.rid_to_state[obj.rid] = State(obj, stats())
        return state

    def tokenized(self, obj: Obj, tokens: int = 7, most: int = 5) -> Any:
        return SimpleNamespace(
            rid=obj.rid,
            input_ids=[0] * tokens,
            sampling_params=SimpleNamespace(max_new_tokens=most),
            time_stats=self.rid_to_state[obj.rid].time_stats,
        )

    async def _send_one_request(self, tokenized_obj: Any) -> None:
        self._dispatch_to_scheduler(tokenized_obj)
        self.rid_to_state[tokenized_obj.rid].dispatched = True

    async def _send_batch_request(self, tokenized_objs: Any) -> None:
        self._dispatch_to_scheduler(tokenized_objs)

    def _dispatch_to_scheduler(self, obj: Any) -> None:
        pass

    async def _tokenize_texts(self, texts: Any, is_cross_encoder: bool = False) -> Any:
        return texts

    async def _handle_batch_output(self, recv_obj: Any) -> None:
        for index, rid in enumerate(recv_obj.rids):
            state = self.rid_to_state.get(rid)
            if state is None:
                continue
            if state.time_stats.first_token_time == 0.0:
                state.time_stats.first_token_time = time.perf_counter()
            await asyncio.sleep(0)
            if recv_obj.finished_reasons[index] is not None:
                state.time_stats.finished_time = time.perf_counter()
                del self.rid_to_state[rid]

    def _handle_abort_req(self, recv_obj: Any) -> None:
        state = self.rid_to_state.pop(recv_obj.rid, None)
        if state is not None:
            state.time_stats.finished_time = time.perf_counter()

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        state = self.rid_to_state.get(rid)
        if state is not None:
            state.abort_sent = True

    def _release_req_states_on_failure(self, request_states: Any) -> None:
        for rid in request_states:
            self.rid_to_state.pop(rid, None)


def outputs(**reasons: Any) -> Any:
    rids = [*reasons]
    return SimpleNamespace(
        rids=rids,
        finished_reasons=[*reasons.values()],
        completion_tokens=[5] * len(rids),
        prompt_tokens=[7] * len(rids),
        cached_tokens=[2] * len(rids),
    )


@dataclass
class Hooked:
    """Classes of a test's own with the hooks on their functions, and a reader of what these write."""

    manager: Manager
    obj: type[Obj]
    reader: RingReader
    recorder: Recorder
    hooks: list[Hook]

    def records(self) -> list[tuple[str, int, tuple[Any, ...]]]:
        """States and events in order, by name: of which request, and its words from a0 on."""
        assert [hook.errors for hook in self.hooks] == [0] * len(self.hooks)
        batch = decoded_batch(read_all(self.reader))
        found = []
        for _, type_, stage, words in batch.controls:
            if type_ in (RecordType.STATE, RecordType.EVENT):
                name = BY_ID[stage].name if type_ == RecordType.STATE else Event(stage).name
                found.append((name, words[2], (words[1], *words[5:])))
        self.texts = {(handle, kind): text for handle, kind, text in batch.texts if handle}
        self.segments = [BY_ID[segment[1]].name for segment in batch.segments]
        return found

    def names(self) -> list[str]:
        return [name for name, _, _ in self.records()]


@contextmanager
def hooked(directory: Path, level: Level = Level.STEP) -> Iterator[Hooked]:
    """Hooks on copies of the classes above."""
    manager, obj = type("Manager", (Manager,), dict(vars(Manager))), type("Obj", (Obj,), dict(vars(Obj)))
    with opened(directory, role="front_end") as (recorder, reader):
        assert recorder.ring is not None
        recorder.ring.memory[512] = int(level)
        hooks = []
        for index, point in enumerate(HOOK_POINTS):
            owner, _, name = point.target.partition(":")[2].partition(".")
            of = {"TokenizerManager": manager, "GenerateReqInput": obj}.get(owner)
            if of is not None and name in vars(of) and name != "__init__":
                hooks.append(Hook(point, index, recorder))
                setattr(of, name, wrap(vars(of)[name], point.handler(hooks[-1]), hooks[-1]))
        try:
            yield Hooked(manager(), obj, reader, recorder, hooks)
        finally:
            front_end._Outputs.waiting.clear()
            front_end._Outputs.samples.clear()


def test_every_hook_on_the_tokenizer_manager_is_tried(tmp_path: Path) -> None:
    with hooked(tmp_path) as at:
        points = [point for point in HOOK_POINTS if "TokenizerManager." in point.target or "ReqInput" in point.target]
        assert len(at.hooks) == len(points) - 1  # __init__ opens the recorder


def test_a_request_from_arrival_to_its_end(tmp_path: Path) -> None:
    async def live(at: Hooked) -> State:
        EXCHANGE.set(exchange := Exchange([(b"traceparent", PARENT.encode()), (b"tracestate", b"a=b")]))
        obj = at.obj("r1", stream=True)
        state = at.manager.arrive(obj)
        await at.manager._tokenize_texts("text")
        await at.manager._send_one_request(at.manager.tokenized(obj))
        assert exchange.handles == [at.recorder.handle("r1")]
        await at.manager._handle_batch_output(outputs(r1=None))
        await at.manager._handle_batch_output(outputs(r1=None))
        await at.manager._handle_batch_output(outputs(r1={"type": "length", "length": 5}))
        return state

    with hooked(tmp_path) as at:
        state = asyncio.run(live(at))
        records, handle = at.records(), at.recorder.handle("r1")
        assert [(name, of) for name, of, _ in records] == [
            ("request_tokenize", handle),
            ("request_dispatch", handle),
            ("FIRST_OUTPUT", handle),
            ("LAST_OUTPUT", handle),
        ]
        tokenize, dispatch, first, last = (words for _, _, words in records)
        assert tokenize[1:4] == (7, 5, 1)
        assert dispatch[1] == 7
        assert last[1:5] == (Finish.LENGTH, 5, 7, 2)
        times = state.time_stats
        assert tokenize[0] == extract.time_ns(times.created_time)
        assert first[0] == extract.time_ns(times.first_token_time)
        assert last[0] == extract.time_ns(times.finished_time)
        assert tokenize[0] <= dispatch[0] <= first[0] <= last[0]
        assert at.texts == {
            (handle, Text.REQUEST_ID): "r1",
            (handle, Text.EXTERNAL_ID): "r1",
            (handle, Text.TRACE_CONTEXT): f"{PARENT}\na=b",
        }
        # Of each of three batches of outputs: until it waits, and what comes then.
        assert at.segments == ["tokenize", "dispatch", *["detokenize"] * 6]
        assert not front_end._Outputs.waiting


def test_without_http_the_last_byte_is_not_waited_for(tmp_path: Path) -> None:
    async def live(at: Hooked) -> None:
        obj = at.obj("r1", external_trace_header={"traceparent": PARENT})
        at.manager.arrive(obj)
        await at.manager._send_batch_request([at.manager.tokenized(obj)])

    with hooked(tmp_path) as at:
        asyncio.run(live(at))
        (_, handle, words), _ = at.records()
        assert words[3] == 0
        assert at.texts[handle, Text.TRACE_CONTEXT] == f"{PARENT}\n"


def test_lora_and_priority(tmp_path: Path) -> None:
    async def live(at: Hooked) -> None:
        obj = at.obj("r1", lora_path="adapter", priority=3)
        at.manager.arrive(obj)
        await at.manager._send_one_request(at.manager.tokenized(obj))

    with hooked(tmp_path) as at:
        asyncio.run(live(at))
        (_, handle, words), _ = at.records()
        assert words[4] == 3
        assert at.texts[handle, Text.LORA] == "adapter"


def test_first_output_of_a_request_that_is_not_streamed_is_the_front_ends(tmp_path: Path) -> None:
    async def live(at: Hooked) -> None:
        obj = at.obj("r1")
        at.manager.arrive(obj).time_stats.first_token_time = 1.0  # the scheduler's, of long ago
        await at.manager._send_one_request(at.manager.tokenized(obj))
        await at.manager._handle_batch_output(outputs(r1={"type": "stop", "matched": 3}))

    with hooked(tmp_path) as at:
        asyncio.run(live(at))
        named = {name: words for name, _, words in at.records()}
        assert named["FIRST_OUTPUT"][0] >= named["request_dispatch"][0]
        assert named["LAST_OUTPUT"][1] == Finish.STOP


def test_samples_name_the_request_that_they_belong_to_and_the_cache_warm_up_is_internal(tmp_path: Path) -> None:
    async def live(at: Hooked) -> None:
        EXCHANGE.set(exchange := Exchange([]))
        parent = at.obj("parent", sampling_params={"n": 2})
        at.manager.arrive(parent)
        tokenized = at.manager.tokenized(parent)
        for number in range(3):  # what SGLang sends first fills the prefix cache, with the parent's own time_stats
            one, sent = copy.copy(parent), copy.copy(tokenized)
            sent.rid = one.rid = f"{one.regenerate_rid()}{number}"
            state = at.manager.arrive(one)
            if number:
                sent.time_stats = state.time_stats
            await at.manager._send_one_request(sent)
        assert exchange.handles == [at.recorder.handle(f"parent-copy{number}") for number in (1, 2)]

    with hooked(tmp_path) as at:
        asyncio.run(live(at))
        records, parent = at.records(), at.recorder.handle("parent")
        children = [(handle, words[1:4]) for name, handle, words in records if name == "CHILD"]
        handles = [at.recorder.handle(f"parent-copy{number}") for number in (1, 2)]
        assert children == [(handles[0], (parent, 0, 2)), (handles[1], (parent, 1, 2))]
        assert not front_end._Outputs.samples
        arrived = [(handle, words[3]) for name, handle, words in records if name == "request_tokenize"]
        assert [by_http for _, by_http in arrived] == [0, 1, 1]
        assert [at.texts[handle, Text.EXTERNAL_ID] for handle, _ in arrived] == ["parent"] * 3


def test_a_client_that_went_away_ends_its_request(tmp_path: Path) -> None:
    async def live(at: Hooked) -> None:
        EXCHANGE.set(Exchange([]))
        for rid in ("r1", "r2"):
            obj = at.obj(rid)
            at.manager.arrive(obj)
            await at.manager._send_one_request(at.manager.tokenized(obj))
        for rid in ("unknown", "r1", "r1", "r2"):  # SGLang sends one abort only
            at.manager.abort_request(rid)
        await at.manager._handle_batch_output(outputs(r1={"type": "abort"}))
        at.manager._handle_abort_req(SimpleNamespace(rid="r2", finished_reason=None))

    with hooked(tmp_path) as at:
        asyncio.run(live(at))
        one, two = at.recorder.handle("r1"), at.recorder.handle("r2")
        assert [(name, handle) for name, handle, _ in at.records()[4:]] == [("ABORTED", one), ("ABORTED", two)]
        assert not front_end._Outputs.waiting


def test_an_abort_by_another_call_is_an_end_that_the_client_gets(tmp_path: Path) -> None:
    async def live(at: Hooked) -> None:
        EXCHANGE.set(Exchange([]))
        for rid in ("r1", "r2"):
            obj = at.obj(rid)
            at.manager.arrive(obj)
            await at.manager._send_one_request(at.manager.tokenized(obj))
        EXCHANGE.set(Exchange([]))
        at.manager.abort_request("r1")
        at.manager.abort_request(abort_all=True)
        for _ in range(2):  # the second finds nothing
            at.manager._handle_abort_req(SimpleNamespace(rid="r1", finished_reason={"type": "abort"}))
        await at.manager._handle_batch_output(outputs(r2={"type": "abort"}))

    with hooked(tmp_path) as at:
        asyncio.run(live(at))
        one, two = at.recorder.handle("r1"), at.recorder.handle("r2")
        found = [(name, handle, words[1]) for name, handle, words in at.records()[4:]]
        assert found == [
            ("LAST_OUTPUT", one, Finish.ABORT),
            ("FIRST_OUTPUT", two, 0),
            ("LAST_OUTPUT", two, Finish.ABORT),
        ]
        assert not front_end._Outputs.waiting


def test_a_refused_request_has_an_error_and_no_dispatch(tmp_path: Path) -> None:
    with hooked(tmp_path) as at:
        states = {f"r_{number}": at.manager.arrive(at.obj(f"r_{number}", False, {"n": 2})) for number in range(2)}
        sent = at.manager.arrive(at.obj("sent"))
        sent.dispatched = True
        at.manager._release_req_states_on_failure({**states, "sent": sent})
        found = [(name, handle, words[1]) for name, handle, words in at.records()]
        one = at.recorder.handle("r_0")
        assert found == [
            ("request_tokenize", one, 0),
            ("LAST_OUTPUT", one, Finish.ERROR),
            ("FINISHED", one, Finish.ERROR),
        ]


def test_health_checks_are_no_requests(tmp_path: Path) -> None:
    rid = f"{extract.HEALTH_CHECK}_1"

    async def live(at: Hooked) -> None:
        obj = at.obj(rid)
        state = at.manager.arrive(obj)
        await at.manager._send_one_request(at.manager.tokenized(obj))
        await at.manager._handle_batch_output(outputs(**{rid: {"type": "length"}}))
        at.manager.rid_to_state[rid] = state
        at.manager.abort_request(rid)
        at.manager._handle_abort_req(SimpleNamespace(rid=rid, finished_reason=None))
        state.dispatched = False
        at.manager.rid_to_state[rid] = state
        at.manager._release_req_states_on_failure({rid: state})

    with hooked(tmp_path) as at:
        asyncio.run(live(at))
        assert at.names() == []


def test_what_waits_is_forgotten_while_nothing_is_recorded(tmp_path: Path) -> None:
    async def live(at: Hooked) -> None:
        obj = at.obj("r1")
        at.manager.arrive(obj)
        await at.manager._send_one_request(at.manager.tokenized(obj))
        assert front_end._Outputs.waiting
        assert at.recorder.ring is not None
        at.recorder.ring.memory[512] = int(Level.OFF)
        await at.manager._handle_batch_output(outputs(r1=None))

    with hooked(tmp_path) as at:
        asyncio.run(live(at))
        assert not front_end._Outputs.waiting


def test_request_level_writes_no_segments(tmp_path: Path) -> None:
    async def live(at: Hooked) -> None:
        obj = at.obj("r1")
        at.manager.arrive(obj)
        await at.manager._tokenize_texts("text")
        await at.manager._send_one_request(at.manager.tokenized(obj))

    with hooked(tmp_path, Level.REQUEST) as at:
        asyncio.run(live(at))
        assert at.names() == ["request_tokenize", "request_dispatch"]
        assert at.segments == []


# Extractors


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ({"type": "stop", "matched": "x"}, Finish.STOP),
        ({"type": "length", "length": 3}, Finish.LENGTH),
        ({"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}, Finish.ABORT),
        ({"type": "abort", "message": "too long", "status_code": 400}, Finish.ERROR),
        ({"type": "abort", "status_code": 503}, Finish.ERROR),
        ({"type": "something new"}, Finish.UNKNOWN),
        ({}, Finish.UNKNOWN),
    ],
)
def test_finish(reason: dict[str, Any], finish: Finish) -> None:
    assert extract.finish_of_reason(reason) == finish


def test_embeddings_have_no_output_tokens() -> None:
    output = SimpleNamespace(finished_reasons=[{"type": "length"}], prompt_tokens=[4], cached_tokens=[])
    assert extract.finished(output, 0) == (Finish.LENGTH, 0, 4, 0)


def test_a_prompt_of_embeddings() -> None:
    assert extract.prompt_tokens(SimpleNamespace(input_ids=None, input_embeds=[[0.0], [0.0]])) == 2
    assert extract.prompt_tokens(SimpleNamespace(input_ids=None)) == 0
    going_on = SimpleNamespace(input_ids=[1, 2], session_params=SimpleNamespace(id="session"))
    assert extract.prompt_tokens(going_on) == 0, "the front end has not what came before"
    assert extract.max_tokens(SimpleNamespace(sampling_params=SimpleNamespace(max_new_tokens=None))) == 0


class Native:
    """A trace context of SGLang's own tracing; `Null` is what it has without: every attribute is a function."""

    def __init__(self, trace_id: int, span_id: int):
        context = SimpleNamespace(trace_id=trace_id, span_id=span_id, trace_flags=1)
        self.tracing_enable = True
        self.root_span = SimpleNamespace(get_span_context=lambda: context)


class Null:
    tracing_enable = False

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: object, **__: object) -> Any:
        return self


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1))
def test_without_a_caller_the_trace_is_sglangs_own(trace_id: int, span_id: int) -> None:
    found = extract.native_trace_context(SimpleNamespace(trace_ctx=Native(trace_id, span_id)))
    assert found == f"00-{trace_id:032x}-{span_id:016x}-01\n"


def test_without_sglangs_own_tracing_there_is_no_trace_of_it() -> None:
    assert extract.native_trace_context(SimpleNamespace(trace_ctx=Null())) == ""
    assert extract.native_trace_context(SimpleNamespace()) == ""


def test_the_callers_trace_comes_before_sglangs_own(tmp_path: Path) -> None:
    async def live(at: Hooked) -> None:
        for rid, headers in (("called", {"traceparent": PARENT, "tracestate": "a=b"}), ("own", None)):
            obj = at.obj(rid, external_trace_header=headers)
            at.manager.arrive(obj).time_stats.trace_ctx = Native(1, 2)
            await at.manager._send_one_request(at.manager.tokenized(obj))

    with hooked(tmp_path) as at:
        asyncio.run(live(at))
        at.records()
        called, own = (at.texts[at.recorder.handle(rid), Text.TRACE_CONTEXT] for rid in ("called", "own"))
        assert (called, own) == (f"{PARENT}\na=b", f"00-{1:032x}-{2:016x}-01\n")
