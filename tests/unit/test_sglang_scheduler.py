"""Tests of SGLang's scheduler hooks without SGLang: what they are told, as the loop tells it, against the tables."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from unit.rings import opened, read_all

from stagetrace.adapters.sglang import extract, worker
from stagetrace.adapters.sglang import scheduler as hooks
from stagetrace.adapters.sglang.scheduler import Tracker
from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.instrument import records
from stagetrace.instrument.stages import BY_NAME, IdleReason, Level, QueueCause

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stagetrace.exporters.drain import RingReader
    from stagetrace.instrument.recorder import Recorder

INSTANCE = 77


@dataclass(eq=False)
class Req:
    """What the hooks read of SGLang's Req."""

    rid: str
    prompt: int
    origin_input_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    finished_len: int | None = None
    finished_reason: Any = None
    is_retracted: bool = False
    retraction_count: int = 0
    time_stats: Any = None

    def __post_init__(self) -> None:
        self.origin_input_ids = [0] * self.prompt
        clock = time.perf_counter()
        self.time_stats = SimpleNamespace(
            wait_queue_entry_time=clock,
            scheduler_recv_time=clock,
            last_forward_entry_time=0.0,
            last_prefill_finished_time=0.0,
            completion_time=0.0,
        )

    def finished(self) -> bool:
        return self.finished_reason is not None


class FINISH_LENGTH:  # noqa: N801
    pass


class Lengths(list[int]):
    """A column of lengths on the host."""

    def sum(self) -> int:
        return sum(self)


@dataclass
class Batch:
    """What the hooks read of SGLang's ScheduleBatch."""

    reqs: list[Req]
    extend: list[tuple[int, int]] = field(default_factory=list)  # prefix and tokens of each; none: decode
    chunked_req: Req | None = None
    forward_iter: int = 0
    batch_is_full: bool = False

    @property
    def forward_mode(self) -> Any:
        return SimpleNamespace(is_extend=lambda: bool(self.extend))

    @property
    def extend_lens(self) -> list[int]:
        return [q for _, q in self.extend]

    @property
    def prefix_lens(self) -> list[int]:
        return [prefix for prefix, _ in self.extend]

    @property
    def extend_num_tokens(self) -> int:
        return sum(self.extend_lens)

    @property
    def seq_lens_cpu(self) -> Lengths:
        return Lengths(each.prompt + len(each.output_ids) for each in self.reqs)


class Engine:
    """SGLang's loop, as far as the hooks see it: what they wrap is called in the loop's order."""

    def __init__(self, recorder: Recorder):
        self.tracker = hooks._Here.tracker = Tracker(recorder, INSTANCE)
        self.recorder = recorder
        worker.RANK.instance, worker.RANK.rank = INSTANCE, 0
        hook: Any = SimpleNamespace(recorder=recorder)
        self.hook = {
            handler.__name__: handler(hook)
            for handler in (hooks.schedule, hooks.run_batch, hooks.process_result, hooks.completed, hooks.abort_output)
        }
        self.hook |= {"forward": worker.forward(hook), "sample": worker.sample(hook)}
        self.waiting_queue: list[Req] = []
        self.running_batch, self.last_batch, self.chunked_req = Batch([]), None, None
        self.grammar_manager = SimpleNamespace(grammar_queue=[])
        self.is_hybrid_swa = self.is_hybrid_ssm = False
        self.max_total_num_tokens, self.forward_ct = 1000, 0
        self.token_to_kv_pool_allocator = SimpleNamespace(available_size=lambda: 500)
        self.tree_cache = SimpleNamespace(evictable_size=lambda: 250)
        self.req_to_token_pool = SimpleNamespace(available_size=lambda: 4)
        self.max_running_requests, self.max_prefill_tokens, self.chunked_prefill_size = 4, 64, None

    def add(self, request: Req) -> Req:
        self.tracker.queued(request, request.time_stats.wait_queue_entry_time)
        return request

    def choose(self, batch: Batch | None, begin: int) -> None:
        """Schedules, at `begin`."""
        given = {"self": self, "result": SimpleNamespace(batch_to_run=batch, running_batch=self.running_batch)}
        self.after("schedule", **given, begin=begin, end=time.monotonic_ns())

    def launch(self, batch: Batch, outcome: Any = None) -> Batch:
        """Schedules and runs a batch, which gives `outcome`; the copy with which its result will come."""
        begin = time.monotonic_ns()
        self.choose(batch, begin)
        run, forward = self.hook["run_batch"], self.hook["forward"]
        _call(run.before, {"self": self, "batch": batch, "begin": time.monotonic_ns()})
        self.forward_ct += 1
        batch.forward_iter = self.forward_ct
        begin = time.monotonic_ns()
        target = SimpleNamespace(is_draft_worker=False)
        _call(forward.before, {"self": target, "forward_batch": None, "begin": begin})
        _call(forward.after, {"self": target, "begin": begin, "end": time.monotonic_ns()})
        self.after("sample", begin=time.monotonic_ns(), end=time.monotonic_ns())
        self.after("run_batch", result=outcome, end=time.monotonic_ns())
        return Batch(batch.reqs[:], batch.extend, batch.chunked_req, batch.forward_iter)

    def result(self, batch: Batch, *finished: Req, tokens: int = 1, until: int | None = None) -> None:
        """Takes in a result: so many tokens for everybody but a chunk's request; these end, the rest is cut off."""
        begin = time.monotonic_ns()
        noted = _call(self.hook["process_result"].before, {"batch": batch})
        for request in batch.reqs:
            if not request.finished() and request is not batch.chunked_req:
                request.output_ids.extend([0] * tokens)
                if batch.extend:
                    request.time_stats.last_prefill_finished_time = time.perf_counter()
        for request in finished:
            request.finished_reason, request.finished_len = FINISH_LENGTH(), until
            request.time_stats.completion_time = time.perf_counter()
            self.after("completed")
        given = {"batch": batch, "noted": noted, "begin": begin, "end": time.monotonic_ns()}
        _call(self.hook["process_result"].after, given)

    def after(self, name: str, /, **given: Any) -> None:
        _call(self.hook[name].after, given)


def _call(function: Any, given: dict[str, Any]) -> Any:
    """Calls a handler's function with what it asks for, as its wrapper does."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return function(*(given[name] for name in names))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[tuple[Engine, RingReader]]:
    with opened(tmp_path, instance=INSTANCE, world_size=1) as (recorder, reader):
        yield Engine(recorder), reader
    hooks._Here.tracker = None
    worker.RANK.instance = worker.RANK.step = 0


def waiting(**more: Any) -> Any:
    """A scheduler with one request in its queue, and places for four."""
    found = SimpleNamespace(
        waiting_queue=[Req("waits", 50)], req_to_token_pool=SimpleNamespace(available_size=lambda: 2),
        max_running_requests=4, max_prefill_tokens=64, chunked_prefill_size=32, chunked_req=None,
    )  # fmt: skip
    for name, value in more.items():
        setattr(found, name, value)
    return found


def prefill(tokens: int, requests: int = 1) -> Batch:
    return Batch([Req(f"p{number}", 1) for number in range(requests)], [(0, tokens), *[(0, 0)] * (requests - 1)])


RUNNING, FULL = Batch([Req("r1", 1), Req("r2", 1)]), Batch([Req("r1", 1)], batch_is_full=True)
NO_PLACE = SimpleNamespace(available_size=lambda: 0)


@pytest.mark.parametrize(
    ("engine", "batch", "running", "preempted", "expected"),
    [
        (waiting(waiting_queue=[]), RUNNING, FULL, 0, QueueCause.TURN),
        (waiting(_engine_paused=True), RUNNING, FULL, 0, QueueCause.PAUSED),
        (waiting(), RUNNING, RUNNING, 1, QueueCause.KV_SPACE),
        (waiting(max_running_requests=2), RUNNING, RUNNING, 0, QueueCause.BATCH_FULL),
        (waiting(), prefill(8, 2), RUNNING, 0, QueueCause.BATCH_FULL),
        (waiting(req_to_token_pool=NO_PLACE), RUNNING, FULL, 0, QueueCause.BATCH_FULL),
        (waiting(chunked_req=object()), prefill(8), RUNNING, 0, QueueCause.TOKEN_BUDGET),
        (waiting(), prefill(32), RUNNING, 0, QueueCause.TOKEN_BUDGET),
        (waiting(chunked_prefill_size=None), prefill(64), RUNNING, 0, QueueCause.TOKEN_BUDGET),
        (waiting(chunked_prefill_size=None), prefill(20), RUNNING, 0, QueueCause.TOKEN_BUDGET),  # 50 do not fit into 44
        (waiting(chunked_prefill_size=None), prefill(20), FULL, 0, QueueCause.KV_SPACE),
        (waiting(), RUNNING, FULL, 0, QueueCause.KV_SPACE),
        (waiting(), None, RUNNING, 0, QueueCause.TURN),
    ],
)
def test_what_holds_requests_back(engine: Any, batch: Any, running: Any, preempted: int, expected: QueueCause) -> None:
    assert extract.held_back(engine, batch, running, preempted) == expected


def tables(engine: Engine, reader: RingReader, **amiss: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of the tables; `amiss` is what was not as it should be, by the assembler's count."""
    assembler = Assembler(engine.recorder.key)
    assembler.add(read_all(reader))
    found = {name: table.to_pylist() for name, table in assembler.finish().items()}
    assert dict(+assembler.counts) == amiss
    return found


def test_time_by_cause_and_for_a_grammar(engine: tuple[Engine, RingReader]) -> None:
    """Two wait for room; one of them had to wait for its grammar first."""
    loop, reader = engine
    first, compiled = loop.add(Req("first", 6)), Req("compiled", 5)
    loop.tracker.queued(compiled, compiled.time_stats.scheduler_recv_time, int(QueueCause.GRAMMAR))
    loop.running_batch, loop.waiting_queue = Batch([Req("r", 1)], batch_is_full=True), [first]
    held = time.monotonic_ns()
    loop.choose(None, held)
    loop.add(compiled)  # its grammar is there
    loop.running_batch, loop.waiting_queue = Batch([]), []
    loop.result(loop.launch(Batch([first, compiled], [(0, 6), (0, 5)])), first, compiled)
    assert not loop.tracker.waits.since and not loop.tracker.compiling
    found = tables(loop, reader)
    (step,), rows = found["steps"], {row["handle"]: row for row in found["requests"]}
    one, other = (rows[loop.recorder.handle(rid)] for rid in ("first", "compiled"))
    assert one["kv_space_ns"] == step["begin_ns"] - held < one["queue_ns"]
    assert one["grammar_ns"] is None
    assert 0 < other["kv_space_ns"] < one["kv_space_ns"]
    assert 0 < other["grammar_ns"] <= other["queue_ns"] - other["kv_space_ns"]


def test_overlap(engine: tuple[Engine, RingReader]) -> None:
    """Two requests, the second prefilled while the first decodes; each result comes after the next launch."""
    loop, reader = engine
    first = loop.add(Req("first", 6))
    one = loop.launch(Batch([first], [(2, 4)]))
    second = loop.add(Req("second", 5))
    two = loop.launch(Batch([second], [(0, 3)], chunked_req=second))
    loop.result(one)
    three = loop.launch(Batch([second], [(3, 2)]))
    loop.result(two)
    four = loop.launch(Batch([first, second]))
    loop.result(three)
    five = loop.launch(Batch([first, second]))
    loop.result(four, first)  # `first` is in the fifth batch and gets nothing from it
    loop.result(five, second)
    found = tables(loop, reader)
    requests = {row["handle"]: row for row in found["requests"]}
    rows = [requests[loop.recorder.handle(rid)] for rid in ("first", "second")]
    assert [row["status"] for row in rows] == ["finished"] * 2
    for row, request in zip(rows, (first, second), strict=True):
        stats = request.time_stats
        assert abs(row["first_token_ns"] - stats.last_prefill_finished_time * 1e9) < 1000
        assert abs(row["last_token_ns"] - stats.completion_time * 1e9) < 1000
    assert [(row["prompt_tokens"], row["output_tokens"], row["cached_tokens"]) for row in rows] == [
        (6, 2, 2),
        (5, 3, 0),
    ]
    steps = sorted(found["steps"], key=lambda row: row["step"])
    assert [row["phase"] for row in steps] == ["prefill"] * 3 + ["decode"] * 2
    assert [row["prefill_tokens"] for row in steps] == [4, 3, 2, 0, 0]
    assert [row["prefill_context"] for row in steps] == [6, 3, 5, 0, 0]
    assert [row["cached_tokens"] for row in steps] == [2, 0, 0, 0, 0]
    assert [row["decode_requests"] for row in steps] == [0, 0, 0, 2, 2]
    assert steps[4]["decode_context"] == steps[3]["decode_context"] + 2
    assert [row["members"] for row in steps] == [1, 1, 1, 2, 2]
    assert [row["output_tokens"] for row in steps][:4] == [1, 0, 1, 2]
    assert {row["kv_usage"] for row in steps} == {250_000}
    chunks = [row for row in found["states"] if row["stage"] == BY_NAME["prefill_chunk"].id]
    assert [(row["step"], row["a0"], row["a1"], row["a2"], row["a3"]) for row in chunks] == [
        (1, 4, 6, 1, 2),
        (2, 3, 3, 0, 0),
        (3, 2, 5, 1, 0),
    ]
    names = {BY_NAME[name].id: name for name in ("rank_step", "prepare", "forward", "sample", "return", "execute")}
    parents = {
        (names[row["stage"]], names.get(row["parent_stage"])) for row in found["segments"] if row["stage"] in names
    }
    assert parents == {
        ("execute", None),
        ("rank_step", "execute"),
        *((name, "rank_step") for name in ("prepare", "forward", "sample", "return")),
    }


def test_speculation(engine: tuple[Engine, RingReader], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three drafts a step for each of two requests: what is verified, accepted and received, by step and by request."""
    loop, reader = engine
    loop.tracker.per_decode = 4
    monkeypatch.setattr(worker.RANK, "per_decode", 4)
    both = [loop.add(Req("first", 6)), loop.add(Req("second", 5))]
    loop.result(loop.launch(Batch(both, [(0, 6), (0, 5)])))
    outcome = SimpleNamespace(accept_lens=object(), num_correct_drafts=4)  # two of each
    loop.result(loop.launch(Batch(both), outcome), tokens=3)
    for request in both:
        request.spec_verify_ct, request.spec_num_correct_drafts = 2, 5  # type: ignore[attr-defined]
    outcome = SimpleNamespace(accept_lens=object(), num_correct_drafts=6)
    loop.result(loop.launch(Batch(both), outcome), *both, tokens=4, until=6)
    found = tables(loop, reader)
    _, one, two = sorted(found["steps"], key=lambda row: row["step"])
    assert (one["decode_requests"], one["decode_tokens"], one["draft_tokens"]) == (2, 8, 6)
    assert (one["decode_context"], one["decode_q_q"]) == (6 + 1 + 3 + 5 + 1 + 3, 2 * 16)
    assert one["decode_q_kv"] == 4 * one["decode_context"]
    assert two["decode_context"] == one["decode_context"] + 6
    assert [(row["accepted_tokens"], row["output_tokens"]) for row in (one, two)] == [(4, 6), (6, 4)]
    drafts = [(row["draft_tokens"], row["accepted_tokens"], row["output_tokens"]) for row in found["requests"]]
    assert drafts == [(6, 5, 6)] * 2
    tokens = {row["a1"] for row in found["segments"] if row["stage"] == BY_NAME["rank_step"].id and row["step"] > 1}
    assert tokens == {8}


def test_a_request_that_is_retracted_comes_back(engine: tuple[Engine, RingReader]) -> None:
    loop, reader = engine
    one, other = loop.add(Req("one", 4)), loop.add(Req("other", 4))
    loop.result(loop.launch(Batch([one, other], [(0, 4), (0, 4)])))
    loop.tracker.preempt(other)
    other.retraction_count = 1
    loop.tracker.queued(other, time.perf_counter())  # SGLang puts it into the queue again
    loop.result(loop.launch(Batch([one])))
    loop.result(loop.launch(Batch([other], [(0, 5)])))
    loop.result(loop.launch(Batch([one, other])), one, other)
    found = tables(loop, reader)
    rows = {row["handle"]: row for row in found["requests"]}
    assert rows[loop.recorder.handle("other")]["preemptions"] == 1
    states = [row for row in found["states"] if row["handle"] == loop.recorder.handle("other")]
    order = [row["stage"] for row in sorted(states, key=lambda row: row["begin_ns"])]
    wanted = ("queue", "prefill", "decode", "preempted", "prefill", "decode", "output")
    chunk = BY_NAME["prefill_chunk"].id
    assert [stage for stage in order if stage != chunk] == [BY_NAME[name].id for name in wanted]
    assert [row["preempted"] for row in sorted(found["steps"], key=lambda row: row["step"])] == [0, 1, 0, 0]


def test_an_empty_batch_and_a_health_check_are_no_steps(engine: tuple[Engine, RingReader]) -> None:
    loop, reader = engine
    health = loop.add(Req("HEALTH_CHECK_1", 1))
    loop.result(loop.launch(Batch([health], [(0, 1)])), health)
    loop.result(loop.launch(Batch([])))
    real = loop.add(Req("real", 3))
    loop.result(loop.launch(Batch([real], [(0, 3)])), real)
    found = tables(loop, reader)
    assert [row["step"] for row in found["steps"]] == [3]
    assert [row["handle"] for row in found["requests"]] == [loop.recorder.handle("real")]
    assert not loop.tracker.live
    idle = [row["a0"] for row in found["segments"] if row["stage"] == BY_NAME["idle"].id]
    assert IdleReason.WAITING_FOR_RANK in idle


def test_a_request_that_is_aborted_while_it_waits(engine: tuple[Engine, RingReader]) -> None:
    loop, reader = engine
    request = loop.add(Req("late", 3))
    loop.after("abort_output", req=request)
    (row,) = tables(loop, reader)["requests"]
    assert (row["status"], row["finish"], row["output_tokens"]) == ("aborted", "abort", 0)


def test_nothing_is_kept_when_nothing_lives(engine: tuple[Engine, RingReader]) -> None:
    loop, _ = engine
    for number in range(50):
        request = loop.add(Req(str(number), 3))
        loop.result(loop.launch(Batch([request], [(0, 3)])), request)
    tracker = loop.tracker
    assert not (tracker.live or tracker.waiting or tracker.prefilling or tracker.in_flight or tracker.batch)


def test_a_switch_of_the_level_takes_up_what_the_engine_has(engine: tuple[Engine, RingReader]) -> None:
    loop, reader = engine
    assert loop.recorder.ring is not None
    memory = loop.recorder.ring.memory
    running, waiting = Req("running", 4), Req("waiting", 3)
    running.output_ids = [0, 0]
    loop.running_batch, loop.waiting_queue = Batch([running]), [waiting]
    memory[records.EPOCH_OFFSET] += 1
    memory[records.LEVEL_OFFSET] = Level.STEP
    loop.result(loop.launch(Batch([running])))
    loop.waiting_queue = []
    loop.result(loop.launch(Batch([waiting], [(0, 3)])), waiting)
    loop.result(loop.launch(Batch([running])), running)
    # The end of the one that was in decode is all that is recorded of it.
    steps = sorted(tables(loop, reader, requests_without_state=1)["steps"], key=lambda row: row["step"])
    assert [row["phase"] for row in steps] == ["decode", "prefill", "decode"]
    assert [row["members"] for row in steps] == [1, 1, 1]


@pytest.mark.parametrize(
    ("times", "since"),
    [
        ({"wait_queue_entry_time": 7.0}, 7.0),
        ({"wait_queue_entry_time": 0.0}, 0.0),
        ({"wait_queue_entry_time": 0.0, "prefill_bootstrap_queue_entry_time": 5.0}, 5.0),
        ({"wait_queue_entry_time": 9.0, "decode_prealloc_queue_entry_time": 6.0}, 6.0),
    ],
)
def test_a_request_is_queued_where_it_is_taken_in_first(times: dict[str, float], since: float) -> None:
    assert hooks.extract.queued_at(SimpleNamespace(**times)) == since


def test_tokens_and_drafts_of_a_decode_step() -> None:
    extract = hooks.extract
    plain = SimpleNamespace(speculative_algorithm=None, speculative_num_draft_tokens=8)
    drafts = SimpleNamespace(speculative_algorithm="EAGLE", speculative_num_draft_tokens=8)
    assert (extract.per_decode(plain), extract.per_decode(drafts), extract.per_decode(SimpleNamespace())) == (1, 8, 1)
    request = SimpleNamespace(spec_verify_ct=3, spec_num_correct_drafts=4)
    assert extract.drafted(request, 8) == (21, 4)
    assert extract.drafted(request, 1) is None and extract.drafted(SimpleNamespace(spec_verify_ct=0), 8) is None
