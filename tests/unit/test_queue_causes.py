"""Tests of what holds requests back in vLLM's queue: the cause after a step, and each request's time by cause."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from unit.rings import opened, read_all

from stagetrace.adapters.vllm import extract, scheduler
from stagetrace.adapters.vllm.scheduler import Tracker
from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.instrument.stages import BY_ID, QUEUE_CAUSES, QueueCause

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Queue(deque[Any]):
    """As vLLM's."""

    def peek_request(self) -> Any:
        return self[0]


def engine(waiting: int = 1, running: int = 2, deferred: int = 0, **more: Any) -> Any:
    """A scheduler with a step of 64 tokens at most, and 4 requests."""
    queue = Queue(SimpleNamespace(has_encoder_inputs=False, num_tokens=100) for _ in range(waiting))
    found = SimpleNamespace(
        _pause_state=0, waiting=queue, running=[None] * running, deferred_waiting={*range(deferred)},
        num_waiting_for_streaming_input=0, max_num_running_reqs=4, max_num_scheduled_tokens=64,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, enable_chunked_prefill=True),
        vllm_config=SimpleNamespace(speculative_config=None),
        get_request_counts=lambda: (running, waiting),
    )  # fmt: skip
    for name, value in more.items():
        setattr(found, name, value)
    return found


def step(tokens: int = 2, requests: int = 2) -> Any:
    return SimpleNamespace(total_num_scheduled_tokens=tokens, num_scheduled_tokens=dict.fromkeys(range(requests)))


UNCHUNKED = SimpleNamespace(max_num_batched_tokens=64, enable_chunked_prefill=False)
DRAFTING = SimpleNamespace(speculative_config=SimpleNamespace(max_num_new_slots_for_drafting=10))


@pytest.mark.parametrize(
    ("state", "output", "preempted", "expected"),
    [
        (engine(waiting=0), step(), 0, QueueCause.TURN),
        (engine(_pause_state=1), step(), 0, QueueCause.PAUSED),
        (engine(), step(), 1, QueueCause.KV_SPACE),
        (engine(waiting=3, deferred=3), step(), 0, extract.OWN),
        (engine(waiting=4, deferred=3), step(), 0, QueueCause.KV_SPACE),
        (engine(), step(64), 0, QueueCause.TOKEN_BUDGET),
        (engine(running=4), step(64), 0, QueueCause.TOKEN_BUDGET),  # vLLM looks at it first
        (engine(running=4), step(4, 4), 0, QueueCause.BATCH_FULL),
        (engine(running=3, num_waiting_for_streaming_input=1), step(), 0, QueueCause.BATCH_FULL),
        (engine(max_num_active_reqs=2), step(), 0, QueueCause.BATCH_FULL),
        (engine(), step(), 0, QueueCause.KV_SPACE),
        (engine(scheduler_config=UNCHUNKED), step(), 0, QueueCause.TOKEN_BUDGET),
        (engine(vllm_config=DRAFTING), step(34), 0, QueueCause.TOKEN_BUDGET),
        (engine(vllm_config=DRAFTING), step(33), 0, QueueCause.KV_SPACE),
        (engine(waiting=0, get_request_counts=lambda: (2, 1)), step(), 0, QueueCause.TURN),  # in another queue
    ],
)
def test_what_holds_requests_back(state: Any, output: Any, preempted: int, expected: int) -> None:
    assert extract.held_back(state, output, preempted) == expected


def test_an_encoders_budget_cannot_be_told_from_the_cache() -> None:
    state = engine()
    state.waiting[0].has_encoder_inputs = True
    assert extract.held_back(state, step(), 0) == QueueCause.TURN


def test_before_0_31_those_that_were_skipped_had_a_queue_of_their_own() -> None:
    state = engine(waiting=2, skipped_waiting=[None, None])
    del state.deferred_waiting
    assert extract.held_back(state, step(), 0) == extract.OWN


# A request's time


class At:
    """A tracker whose clock stands where it is put, and what it has recorded."""

    def __init__(self, recorder: Any, reader: Any, clock: list[int]):
        self.tracker = Tracker(recorder)
        self.reader, self.clock = reader, clock

    def rows(self) -> tuple[list[dict[str, Any]], dict[int, list[str]]]:
        """The rows of the requests, and each one's states."""
        assembler = Assembler(b"key")
        assembler.add(read_all(self.reader))
        tables = assembler.finish()
        states: dict[int, list[str]] = {}
        for row in sorted(tables["states"].to_pylist(), key=lambda row: int(row["begin_ns"])):
            states.setdefault(row["handle"], []).append(BY_ID[row["stage"]].name)
        return tables["requests"].to_pylist(), states


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[At]:
    clock = [1_000]
    monkeypatch.setattr(scheduler, "now", lambda: clock[0])
    with opened(tmp_path) as (recorder, reader):
        yield At(recorder, reader, clock)


def request(name: str = "r", **more: Any) -> Any:
    found = SimpleNamespace(
        request_id=name, use_structured_output=False, num_prompt_tokens=40, num_output_tokens=0, num_preemptions=0,
        lora_request=None, status=SimpleNamespace(name="FINISHED_ABORTED"),
    )  # fmt: skip
    for key, value in more.items():
        setattr(found, key, value)
    return found


def told(row: dict[str, Any]) -> dict[str, int]:
    names = [f"{cause.name.lower()}_ns" for cause in QUEUE_CAUSES]
    return {name: row[name] for name in names if row[name] is not None}


def test_time_by_cause(at: At) -> None:
    """It came while the batch was full since before; then the cache was; then nothing held it back that is known."""
    one = request()
    at.tracker.waits.holds_back(QueueCause.BATCH_FULL, 500)
    at.tracker.queued(one)
    at.tracker.waits.holds_back(QueueCause.BATCH_FULL, 1_300)  # goes on
    at.tracker.waits.holds_back(QueueCause.KV_SPACE, 1_400)
    at.tracker.waits.holds_back(QueueCause.TURN, 1_450)
    at.clock[0] = 1_500
    at.tracker.free(one)
    (row,), _ = at.rows()
    assert told(row) == {"batch_full_ns": 400, "kv_space_ns": 50}
    assert (row["status"], row["queue_ns"]) == ("aborted", 500)


@pytest.mark.parametrize(
    ("more", "connected", "expected"),
    [
        ({"lora_request": object()}, True, {"lora_limit_ns": 200}),
        ({}, True, {"remote_kv_ns": 200}),
        ({}, False, {}),
    ],
)
def test_what_holds_back_one_alone(at: At, more: dict[str, Any], connected: bool, expected: dict[str, int]) -> None:
    one = request(**more)
    at.tracker.connected = connected
    at.tracker.queued(one)
    at.tracker.waits.holds_back(extract.OWN, 1_100)
    at.clock[0] = 1_300
    at.tracker.free(one)
    (row,), _ = at.rows()
    assert told(row) == expected


def test_a_transfer_of_kv_divides_the_queue(at: At) -> None:
    one, other = request("one"), request("other")
    for each in (one, other):
        at.tracker.queued(each)
    at.tracker.waits.holds_back(QueueCause.BATCH_FULL, 1_100)
    at.clock[0] = 1_200
    at.tracker.transfer_begins(one, 32)
    at.clock[0] = 1_300
    at.tracker.transferred(other)  # of which nothing is fetched
    at.tracker.transferred(one)
    at.clock[0] = 1_360
    at.tracker.free(one)
    rows, states = at.rows()
    row = next(row for row in rows if row["kv_transfer_ns"])
    assert (row["queue_ns"], row["kv_transfer_ns"], told(row)) == (260, 100, {"batch_full_ns": 160})
    assert states[row["handle"]] == ["queue", "kv_transfer", "queue", "output"]
    assert not (at.tracker.transferring or one.request_id in at.tracker.waits.since)


def test_a_request_that_was_preempted_is_so_again_when_its_kv_is_there(at: At) -> None:
    one = request(num_preemptions=1)
    at.tracker.queued(one)
    at.clock[0] = 1_100
    at.tracker.preempt(one)
    at.clock[0] = 1_200
    at.tracker.transfer_begins(one, 32)
    at.clock[0] = 1_250
    at.tracker.transferred(one)
    at.clock[0] = 1_300
    at.tracker.free(one)
    (row,), _ = at.rows()
    assert (row["preemptions"], row["preempted_ns"], row["kv_transfer_ns"]) == (1, 150, 50)


def test_a_grammar_is_waited_for_before_anything_else(at: At) -> None:
    one = request(use_structured_output=True)
    at.tracker.waits.holds_back(QueueCause.BATCH_FULL, 900)
    at.tracker.queued(one)
    one._stagetrace_compiled = 1_150
    scheduler._COMPILED.append(one.request_id)
    at.tracker.consider(engine(running=4), step(4, 4), 1_200)
    at.clock[0] = 1_500
    at.tracker.compiled(one, at.tracker.handles[one.request_id])
    at.tracker.free(one)
    (row,), _ = at.rows()
    assert (row["grammar_ns"], row["queue_ns"], told(row)) == (150, 500, {"batch_full_ns": 300})
