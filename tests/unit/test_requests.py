"""Tests of one request's assembly: its row and states, whatever the order of the records, and the trace context."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagetrace.exporters.assembly.decode import Records, Rows
from stagetrace.exporters.assembly.request_rows import STATUSES, request_tables
from stagetrace.exporters.assembly.requests import Lives, OpenRequests
from stagetrace.exporters.assembly.trace_context import parse_trace_context
from stagetrace.exporters.session import REQUESTS_SCHEMA, STATES_SCHEMA
from stagetrace.instrument.ids import request_trace_id
from stagetrace.instrument.records import Event, Text
from stagetrace.instrument.stages import BY_ID, BY_NAME, Finish, QueueCause

KEY = bytes(range(16))
HANDLE, INSTANCE = 77, 5
NONE = Records().states
SUMS = [name for name in REQUESTS_SCHEMA.names if name.removesuffix("_ns") in
        {stage.name.removeprefix("request_") for stage in BY_ID.values()}]  # fmt: skip


@dataclass
class Life:
    """A request's records in the order of time; `at` moves on with each."""

    records: list[tuple[str, int, tuple[int, ...]]] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)

    def enter(self, stage: str, at: int, *words: int, step: int = 0) -> Life:
        """The request enters a state."""
        engine = 0 if stage.startswith("request_") else INSTANCE
        attributes = (*words, *(0,) * (8 - len(words)))
        self.records.append(("enter", BY_NAME[stage].id, (1, at, HANDLE, engine, step, *attributes)))
        return self

    def happen(self, event: Event, at: int, *words: int, step: int = 0) -> Life:
        """An event of the request."""
        engine = INSTANCE if event == Event.FINISHED else 0
        attributes = (*words, *(0,) * (8 - len(words)))
        self.records.append(("happen", event, (2, at, HANDLE, engine, step, *attributes)))
        return self

    def arrives(self, at: int, prompt: int = 40, most: int = 16, by_http: int = 1) -> Life:
        """Its way to the scheduler: tokenized in 10 ns, sent in 20, scheduled after 30. HTTP took 7 ns before that."""
        self.enter("request_tokenize", at, prompt, most, by_http)
        self.enter("request_dispatch", at + 10, prompt, 7 * by_http)
        return self.enter("queue", at + 30, prompt)

    def lives(self, order: list[int] | None = None) -> tuple[OpenRequests, Lives]:
        """The open requests after the records came in that order, one by one."""
        found = OpenRequests()
        for index in order or range(len(self.records)):
            what, kind, words = self.records[index]
            rows = Rows(np.array([index + 1]), np.array([kind]), np.array([words]).T)
            found.add(*((rows, NONE) if what == "enter" else (NONE, rows)))
        for kind, text in self.texts.items():
            found.name(HANDLE, kind, text)
        return found, found.lives()

    def over(self, order: list[int] | None = None) -> bool:
        """Whether nothing more will come of it."""
        return bool(self.lives(order)[1].over[0])

    def rows(
        self, open_status: str = "open", order: list[int] | None = None
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The request's row and its states' rows."""
        (row,), states = closed(*self.lives(order), open_status)
        return row, states


def closed(
    requests: OpenRequests, lives: Lives, open_status: str = "open"
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of all requests and of their states."""
    tables = request_tables(
        lives,
        requests.remove(lives, np.ones(len(lives), np.bool_)),
        KEY,
        open_status=np.full(len(lives), STATUSES.index(open_status)),
        last_token=np.zeros(len(lives), np.int64),
        cut=np.zeros(len(lives), np.bool_),
        switched=lambda begin, _: np.zeros(len(begin), np.bool_),
    )
    assert not len(requests)
    rows, states = (table.to_pylist() for table in tables)
    return rows, states


def full() -> Life:
    """A request by HTTP, of two steps of prefill and some of decode."""
    life = Life().arrives(1_000)
    life.enter("prefill", 1_060, 16, 0, step=3)
    life.enter("decode", 1_200, 1, step=4)
    life.happen(Event.FIRST_OUTPUT, 1_210).happen(Event.FIRST_SENT, 1_230)
    life.happen(Event.FINISHED, 1_500, Finish.LENGTH, 8, 40, 0, step=11)
    life.happen(Event.LAST_OUTPUT, 1_520, Finish.LENGTH, 8, 40, 16)
    return life.happen(Event.LAST_SENT, 1_550)


def preempted() -> Life:
    life = Life().arrives(1_000, by_http=0)
    life.enter("prefill", 1_060, 0, 0, step=3).enter("decode", 1_200, 1, step=4)
    life.enter("preempted", 1_300, 5, step=8).enter("prefill", 1_400, 32, 1, step=12).enter("decode", 1_450, 6, step=13)
    life.enter("preempted", 1_500, 7, step=14).enter("prefill", 1_580, 0, 1, step=15).enter("decode", 1_600, 8, step=16)
    life.happen(Event.FIRST_OUTPUT, 1_210).happen(Event.FINISHED, 1_700, Finish.STOP, 10, 40, 2, step=20)
    return life.happen(Event.LAST_OUTPUT, 1_710, Finish.STOP, 10, 40, 0)


def aborted_in_queue() -> Life:
    life = Life().arrives(1_000).happen(Event.ABORTED, 1_080)
    return life.happen(Event.FINISHED, 1_090, Finish.ABORT, 0, 40, 0)


def aborted_in_decode() -> Life:
    life = Life().arrives(1_000).enter("prefill", 1_060, 0, 0, step=3).enter("decode", 1_200, 1, step=3)
    life.happen(Event.FIRST_OUTPUT, 1_210).happen(Event.FIRST_SENT, 1_220).happen(Event.ABORTED, 1_400)
    return life.happen(Event.FINISHED, 1_430, Finish.ABORT, 5, 40, 0, step=9)


def stopped_by_a_string() -> Life:
    life = Life().arrives(1_000).enter("prefill", 1_060, 0, 0, step=3).enter("decode", 1_200, 1, step=3)
    life.happen(Event.FIRST_OUTPUT, 1_210).happen(Event.FIRST_SENT, 1_220)
    life.happen(Event.LAST_OUTPUT, 1_400, Finish.STOP, 5, 40, 0).happen(Event.LAST_SENT, 1_410)
    return life.happen(Event.FINISHED, 1_430, Finish.ABORT, 6, 40, 0, step=9)


def offline() -> Life:
    life = Life().arrives(1_000, by_http=0).enter("prefill", 1_060, 0, 0, step=3).enter("decode", 1_200, 1, step=3)
    life.happen(Event.FIRST_OUTPUT, 1_210).happen(Event.FINISHED, 1_300, Finish.STOP, 3, 40, 0, step=5)
    return life.happen(Event.LAST_OUTPUT, 1_310, Finish.STOP, 3, 40, 0)


def of_one_token() -> Life:
    """The step that completes the prefill gives the first token and the last."""
    life = Life().arrives(1_000, most=1).enter("prefill", 1_060, 0, 0, step=3).enter("decode", 1_200, 1, step=3)
    life.happen(Event.FINISHED, 1_200, Finish.LENGTH, 1, 40, 0, step=3)
    life.happen(Event.FIRST_OUTPUT, 1_210).happen(Event.LAST_OUTPUT, 1_210, Finish.LENGTH, 1, 40, 0)
    return life.happen(Event.FIRST_SENT, 1_230).happen(Event.LAST_SENT, 1_230)


def of_an_engine_alone() -> Life:
    """Its front end is not instrumented."""
    life = Life().enter("queue", 1_030, 40).enter("prefill", 1_060, 8, 0, step=3).enter("decode", 1_200, 1, step=3)
    return life.happen(Event.FINISHED, 1_300, Finish.LENGTH, 3, 40, 0, step=5)


def unfinished() -> Life:
    return Life().arrives(1_000).enter("prefill", 1_060, 0, 0, step=3).enter("decode", 1_200, 1, step=3)


def seen_from_the_middle() -> Life:
    """Recording was switched on while it was running."""
    life = Life().enter("preempted", 1_300, 5, step=8).enter("prefill", 1_400, 0, 1, step=9)
    life.enter("decode", 1_450, 6, step=9)
    return life.happen(Event.FINISHED, 1_500, Finish.STOP, 7, 40, 1, step=10)


LIVES = [full, preempted, aborted_in_queue, aborted_in_decode, stopped_by_a_string, offline, of_one_token,
         of_an_engine_alone, unfinished, seen_from_the_middle]  # fmt: skip
# What a row says beside what all have; times from 1000 on.
EXPECTED: dict[str, dict[str, Any]] = {
    "full": {
        "status": "finished", "finish": "length", "partial": False, "prompt_tokens": 40, "output_tokens": 8,
        "cached_tokens": 16, "max_tokens": 16, "preemptions": 0, "received_ns": 993, "arrival_ns": 1_000,
        "dispatched_ns": 1_010,
        "queued_ns": 1_030, "scheduled_ns": 1_060, "first_token_ns": 1_200, "first_output_ns": 1_210,
        "first_sent_ns": 1_230, "last_token_ns": 1_500, "last_output_ns": 1_520, "last_sent_ns": 1_550,
        "end_ns": 1_550, "tokenize_ns": 10, "dispatch_ns": 20, "queue_ns": 30, "prefill_ns": 140, "decode_ns": 300,
        "preempted_ns": None, "output_ns": 50,
    },
    "preempted": {
        "status": "finished", "finish": "stop", "partial": False, "output_tokens": 10, "cached_tokens": 0,
        "preemptions": 2, "scheduled_ns": 1_060, "first_token_ns": 1_200, "last_token_ns": 1_700, "end_ns": 1_710,
        "received_ns": None, "last_sent_ns": None, "queue_ns": 30, "prefill_ns": 140 + 50 + 20,
        "decode_ns": 100 + 50 + 100, "preempted_ns": 100 + 80, "output_ns": 10,
    },
    "aborted_in_queue": {
        "status": "aborted", "finish": "abort", "scheduled_ns": None, "first_token_ns": None, "last_token_ns": None,
        "end_ns": 1_090, "queue_ns": 60, "prefill_ns": None, "decode_ns": None, "output_ns": 0, "output_tokens": 0,
        "cached_tokens": None,
    },
    "aborted_in_decode": {
        "status": "aborted", "finish": "abort", "output_tokens": 5, "last_token_ns": None, "end_ns": 1_430,
        "decode_ns": 230, "output_ns": 0, "last_output_ns": None, "first_sent_ns": 1_220,
    },
    "stopped_by_a_string": {
        "status": "finished", "finish": "stop", "output_tokens": 5, "last_output_ns": 1_400, "last_sent_ns": 1_410,
        "end_ns": 1_410, "last_token_ns": 1_400, "decode_ns": 200, "output_ns": 10,
    },
    "offline": {
        "status": "finished", "finish": "stop", "last_output_ns": 1_310, "last_sent_ns": None, "end_ns": 1_310,
        "decode_ns": 100, "output_ns": 10,
    },
    "of_one_token": {
        "status": "finished", "finish": "length", "max_tokens": 1, "output_tokens": 1, "first_token_ns": 1_200,
        "last_token_ns": 1_200, "prefill_ns": 140, "decode_ns": 0, "output_ns": 30, "end_ns": 1_230,
    },
    "of_an_engine_alone": {
        "status": "finished", "finish": "length", "partial": False, "arrival_ns": None, "max_tokens": None,
        "prompt_tokens": 40, "output_tokens": 3, "cached_tokens": 8, "queued_ns": 1_030, "tokenize_ns": None,
        "dispatch_ns": None, "decode_ns": 100, "output_ns": 0, "end_ns": 1_300,
    },
    "unfinished": {
        "status": "open", "finish": "unknown", "last_token_ns": None, "end_ns": 1_200, "decode_ns": 0,
        "output_ns": None, "output_tokens": None,
    },
    "seen_from_the_middle": {
        "status": "finished", "finish": "stop", "partial": True, "preemptions": 1, "prompt_tokens": None,
        "output_tokens": 7, "queue_ns": None, "preempted_ns": 100,
    },
}  # fmt: skip


@pytest.mark.parametrize("life", LIVES)
def test_a_life_gives_its_row(life):
    row, _ = life().rows()
    expected = EXPECTED[life.__name__]
    assert {name: row[name] for name in expected} == expected
    assert row["handle"] == HANDLE
    assert row["instance"] == INSTANCE


def test_a_row_has_the_columns_of_its_table():
    row, states = full().rows()
    assert [*row] == REQUESTS_SCHEMA.names
    assert all([*state] == STATES_SCHEMA.names for state in states)
    assert {"tokenize_ns", "queue_ns", "output_ns"} <= {*SUMS}


@pytest.mark.parametrize("life", LIVES)
@given(data=st.data())
@settings(max_examples=40)
def test_the_order_of_records_makes_no_difference(life, data: st.DataObject):
    """The two processes' rings are read one after the other, and whose comes first is chance."""
    made = life()
    order = data.draw(st.permutations(range(len(made.records))))
    assert made.rows(order=order) == made.rows()
    assert made.over(order) == made.over()


@pytest.mark.parametrize("life", LIVES)
def test_the_states_partition_the_request(life):
    row, states = life().rows()
    begin = states[0]["begin_ns"]
    assert sum(row[name] or 0 for name in SUMS) == row["end_ns"] - begin
    assert states[-1]["end_ns"] == row["end_ns"]
    for before, after in itertools.pairwise(states):
        assert before["end_ns"] == after["begin_ns"]
    assert all(state["end_ns"] >= state["begin_ns"] for state in states)


@given(st.lists(st.sampled_from(LIVES), max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_requests_that_end_together_get_the_rows_that_each_gets_alone(lives, random):
    """Their records are interleaved, as they are in a ring."""
    records = [(handle, record) for handle, life in enumerate(lives, 1) for record in life().records]
    random.shuffle(records)
    together = OpenRequests()
    for index, (handle, (what, kind, words)) in enumerate(records, 1):
        named = (*words[:2], handle, *words[3:])
        rows = Rows(np.array([index]), np.array([kind]), np.array([named]).T)
        together.add(*((rows, NONE) if what == "enter" else (NONE, rows)))
    found = together.lives()
    assert found.handle.tolist() == [*dict.fromkeys(handle for handle, _ in records)]
    if not lives:
        return
    all_rows, all_states = closed(together, found)
    for handle, life in enumerate(lives, 1):
        row, states = life().rows()
        (mine,) = (one for one in all_rows if one["handle"] == handle)
        assert mine == row | {"handle": handle, "trace_id": request_trace_id(KEY, handle).hex()}
        assert [one for one in all_states if one["handle"] == handle] == [one | {"handle": handle} for one in states]


STATES = [stage.name for stage in BY_ID.values() if stage.kind == "state" and "request" in stage.inside]


@given(
    st.lists(st.tuples(st.sampled_from(STATES), st.integers(0, 50)), min_size=1, max_size=10),
    st.lists(st.tuples(st.sampled_from(Event), st.integers(0, 60), st.sampled_from(Finish)), max_size=6),
    st.randoms(use_true_random=False),
)
def test_any_records_give_states_that_partition_the_request(states, events, random):
    """Records were lost, or came at the same instant: what is left is still a partition and needs no order."""
    life = Life()
    for stage, at in states:
        life.enter(stage, at, 1, 2, 3)
    for event, at, finish in events:
        life.happen(event, at, finish, 7)
    row, found = life.rows()
    order = [*range(len(life.records))]
    random.shuffle(order)
    assert life.rows(order=order) == (row, found)
    assert sum(row[name] or 0 for name in SUMS) == row["end_ns"] - found[0]["begin_ns"]
    assert all(state["end_ns"] >= state["begin_ns"] for state in found)
    assert row["status"] in ("finished", "aborted", "error", "open")


def test_states_have_the_attributes_of_their_stage():
    _, states = full().rows()
    first = next(state for state in states if state["stage"] == BY_NAME["request_tokenize"].id)
    given = {name: value for name, value in first.items() if re.fullmatch(r"a\d", name) and value is not None}
    assert given == {"a0": 40, "a1": 16, "a2": 1, "a3": 0}
    prefill = next(state for state in states if state["stage"] == BY_NAME["prefill"].id)
    assert (prefill["step"], prefill["a0"], prefill["a1"]) == (3, 16, 0)
    assert (prefill["a2"], prefill["a3"]) == (0, None)
    output = states[-1]
    assert (output["stage"], output["a0"]) == (BY_NAME["output"].id, 8)


@pytest.mark.parametrize(("life", "over"), [(life, life is not unfinished) for life in LIVES])
def test_a_request_is_over_with_its_last_record(life, over: bool):
    made = life()
    _, lives = made.lives()
    assert lives.over.tolist() == lives.ending.tolist() == [over]
    if life is full:
        assert not made.over([*range(len(made.records) - 1)]), "its last byte is still to be sent"


def test_an_open_request_of_a_dead_engine_is_lost():
    row, states = unfinished().rows("lost")
    assert (row["status"], row["finish"], row["end_ns"]) == ("lost", "unknown", 1_200)
    assert states[-1]["stage"] == BY_NAME["decode"].id


def test_a_finish_that_the_front_end_does_not_know_is_the_engines():
    life = Life().arrives(1_000).happen(Event.FINISHED, 1_500, Finish.ERROR, 8, 40, 0)
    row, _ = life.happen(Event.LAST_OUTPUT, 1_520, 99, 8, 40, 16).rows()
    assert (row["status"], row["finish"]) == ("error", "error")


def test_a_prompt_whose_length_the_front_end_does_not_know_is_the_engines():
    going_on = Life().enter("request_tokenize", 1_000, 0).enter("queue", 1_030, 40)
    assert going_on.rows()[0]["prompt_tokens"] == 40
    assert Life().enter("request_tokenize", 1_000, 7).enter("queue", 1_030, 40).rows()[0]["prompt_tokens"] == 7
    assert Life().enter("request_tokenize", 1_000, 0).rows()[0]["prompt_tokens"] == 0


def test_a_request_that_was_aborted_when_it_had_finished_is_finished():
    row, _ = full().happen(Event.ABORTED, 1_560).rows()
    assert (row["status"], row["finish"]) == ("finished", "length")


def test_ids():
    life = full()
    row, _ = life.rows()
    assert row["trace_id"] == request_trace_id(KEY, HANDLE).hex()
    assert (row["parent_span_id"], row["trace_flags"], row["request_id"], row["external_id"]) == (None, 1, None, None)
    life.texts = {
        Text.REQUEST_ID: "chatcmpl-1-0",
        Text.EXTERNAL_ID: "mine",
        Text.TRACE_CONTEXT: f"00-{'ab' * 16}-{'cd' * 8}-00\nvendor=1",
    }
    row, _ = life.rows()
    assert (row["request_id"], row["external_id"]) == ("chatcmpl-1-0", "mine")
    assert (row["trace_id"], row["parent_span_id"]) == ("ab" * 16, "cd" * 8)
    assert (row["trace_flags"], row["trace_state"]) == (0, "vendor=1")


# W3C Trace Context

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = {
    "sampled": (f"00-{TRACE}-{SPAN}-01", 1),
    "not sampled": (f"00-{TRACE}-{SPAN}-00", 0),
    "flags that are not defined yet": (f"00-{TRACE}-{SPAN}-ff", 255),
    "blanks around it": (f" 00-{TRACE}-{SPAN}-01\t", 1),
    "a later version": (f"01-{TRACE}-{SPAN}-01", 1),
    "a later version with more": (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", 1),
}
INVALID = {
    "empty": "",
    "version ff": f"ff-{TRACE}-{SPAN}-01",
    "version 00 with more": f"00-{TRACE}-{SPAN}-01-more",
    "version 00 with a dash": f"00-{TRACE}-{SPAN}-01-",
    "a later version with more and no dash": f"cc-{TRACE}-{SPAN}-01.more",
    "trace id of zeros": f"00-{'0' * 32}-{SPAN}-01",
    "span id of zeros": f"00-{TRACE}-{'0' * 16}-01",
    "upper case": f"00-{TRACE.upper()}-{SPAN}-01",
    "upper case flags": f"00-{TRACE}-{SPAN}-0A",
    "upper case version": f"0A-{TRACE}-{SPAN}-01",
    "short trace id": f"00-{TRACE[1:]}-{SPAN}-01",
    "long trace id": f"00-{TRACE}0-{SPAN}-01",
    "short span id": f"00-{TRACE}-{SPAN[1:]}-01",
    "no flags": f"00-{TRACE}-{SPAN}",
    "short version": f"0-{TRACE}-{SPAN}-01",
    "digits of another script": f"00-{TRACE[1:]}٣-{SPAN}-01",
    "not hexadecimal": f"00-{TRACE[1:]}g-{SPAN}-01",
    "two of them": f"00-{TRACE}-{SPAN}-01,00-{TRACE}-{SPAN}-01",
}


@pytest.mark.parametrize("what", VALID)
def test_a_valid_traceparent(what: str):
    text, flags = VALID[what]
    found = parse_trace_context(text)
    assert found is not None
    assert (found.trace_id, found.parent_span_id, found.flags, found.state) == (TRACE, SPAN, flags, None)


@pytest.mark.parametrize("what", INVALID)
def test_an_invalid_traceparent_is_ignored_with_its_state(what: str):
    assert parse_trace_context(INVALID[what] + "\nvendor=1") is None


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ("vendor=1,other=2", True),
        ("x" * 512, True),
        ("x" * 513, False),
        ("", False),
        ("bad\x07bell", False),
        ("two\nlines", False),
        ("vendor=ü", False),
    ],
)
def test_a_tracestate_is_kept_when_it_is_printable_and_short(state: str, kept: bool):
    found = parse_trace_context(f"00-{TRACE}-{SPAN}-01\n{state}")
    assert found is not None
    assert found.state == (state if kept else None)


@given(
    st.one_of(
        st.text(max_size=120),
        st.text("0123456789abcdefABCDEF-\n ", max_size=80),
        st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.{0,9})?(\n.{0,9})?", fullmatch=True),
    )
)
def test_any_text_gives_a_valid_context_or_none(text: str):
    found = parse_trace_context(text)
    if found is not None:
        assert re.fullmatch("[0-9a-f]{32}", found.trace_id)
        assert int(found.trace_id, 16)
        assert re.fullmatch("[0-9a-f]{16}", found.parent_span_id)
        assert int(found.parent_span_id, 16)
        assert 0 <= found.flags <= 255
        assert found.state is None or found.state.isprintable()
        assert f"{found.trace_id}-{found.parent_span_id}" in text


# Speculation, structured output, several answers


def test_the_wait_for_a_grammar_is_a_part_of_the_queue():
    life = (
        Life().arrives(1_000).enter("queue", 1_040, 40, QueueCause.GRAMMAR).enter("queue", 1_050, 40, QueueCause.TURN)
    )
    life.enter("prefill", 1_060, 16, 0, 4, step=3).enter("decode", 1_200, 1, step=4)
    life.happen(Event.DRAFTED, 1_500, 12, 5).happen(Event.FINISHED, 1_500, Finish.STOP, 8, 40, 0, step=11)
    life.happen(Event.LAST_OUTPUT, 1_520, Finish.STOP, 8, 40, 16).happen(Event.LAST_SENT, 1_550, 3_000, 0, 1)
    row, states = life.rows()
    assert (row["response_bytes"], row["unsent_bytes"]) == (3_000, 0)
    assert (row["queued_ns"], row["queue_ns"], row["grammar_ns"]) == (1_030, 30, 10)
    assert (row["draft_tokens"], row["accepted_tokens"], row["external_tokens"]) == (12, 5, 4)
    causes = [state["a1"] for state in states if state["stage"] == BY_NAME["queue"].id]
    assert causes == [QueueCause.UNKNOWN, QueueCause.GRAMMAR, QueueCause.TURN]
    plain, _ = full().rows()
    assert (plain["grammar_ns"], plain["draft_tokens"], plain["parent"], plain["lora"]) == (None,) * 4


def test_what_held_a_request_back_is_told_by_cause():
    """Two parts of the queue, around a transfer of KV; what is left over in each was its turn."""
    life = Life().arrives(1_000).enter("queue", 1_030, 40, QueueCause.TURN)
    life.happen(Event.WAITED, 1_130, QueueCause.BATCH_FULL, 60).happen(Event.WAITED, 1_130, QueueCause.KV_SPACE, 30)
    life.enter("kv_transfer", 1_130, 32).enter("queue", 1_150, 40, QueueCause.TURN)
    life.happen(Event.WAITED, 1_170, QueueCause.KV_SPACE, 5).enter("prefill", 1_170, 32, 0, 32, step=3)
    life.enter("decode", 1_200, 1, step=4).happen(Event.FINISHED, 1_500, Finish.STOP, 8, 40, 0, step=11)
    life.happen(Event.LAST_OUTPUT, 1_520, Finish.STOP, 8, 40, 16).happen(Event.LAST_SENT, 1_550)
    row, states = life.rows()
    assert (row["queue_ns"], row["kv_transfer_ns"]) == (120, 20)
    assert (row["batch_full_ns"], row["kv_space_ns"], row["token_budget_ns"]) == (60, 35, None)
    causes = [(state["a1"], state["end_ns"]) for state in states if state["stage"] == BY_NAME["queue"].id]
    assert causes == [(QueueCause.UNKNOWN, 1_030), (QueueCause.BATCH_FULL, 1_130), (QueueCause.TURN, 1_170)]
    order = [*range(len(life.records))]
    assert life.rows(order=order[::-1]) == (row, states)


@pytest.mark.parametrize(("cause", "ns"), [(99, 5), (QueueCause.GRAMMAR, 5), (QueueCause.KV_SPACE, -3)])
def test_what_cannot_have_held_a_request_back_is_not_told(cause: int, ns: int):
    life = full().happen(Event.WAITED, 1_060, cause, ns)
    assert life.rows() == full().rows()


def test_a_preemption_counts_once_where_kv_is_fetched_after_it():
    life = Life().arrives(1_000, by_http=0).enter("prefill", 1_060, 0, 0, step=3).enter("decode", 1_200, 1, step=4)
    life.enter("preempted", 1_300, 5, step=8).enter("kv_transfer", 1_310, 32).enter("preempted", 1_340, 5)
    life.enter("prefill", 1_400, 32, 1, step=12).enter("decode", 1_450, 6, step=13)
    life.happen(Event.FINISHED, 1_700, Finish.STOP, 10, 40, 1, step=20)
    row, _ = life.happen(Event.LAST_OUTPUT, 1_710, Finish.STOP, 10, 40, 0).rows()
    assert (row["preemptions"], row["preempted_ns"], row["kv_transfer_ns"]) == (1, 70, 30)


def test_a_request_that_the_front_end_refused():
    life = Life().enter("request_tokenize", 1_000, 0, 0, 1)
    assert not life.over()
    life.happen(Event.LAST_SENT, 1_040).happen(Event.REFUSED, 1_040, 400)
    assert life.over()
    row, states = life.rows()
    assert (row["status"], row["finish"], row["refused"], row["partial"]) == ("error", "error", 400, False)
    assert (row["prompt_tokens"], row["queued_ns"], row["last_sent_ns"], row["end_ns"]) == (None, None, 1_040, 1_040)
    assert [state["stage"] for state in states] == [BY_NAME["request_tokenize"].id]
    assert full().rows()[0]["refused"] is None


PARENT = 700


def children(*ends: tuple[Event, ...]) -> OpenRequests:
    """Answers of one request, finished by the engine, with these events of the front end's."""
    found = OpenRequests()
    for index, events in enumerate(ends):
        life = Life(records=[]).arrives(1_000).happen(Event.CHILD, 1_010, PARENT, index, len(ends))
        life.enter("prefill", 1_060, 16, 0, step=3).enter("decode", 1_200, 1, step=4)
        life.happen(Event.FINISHED, 1_500, Finish.LENGTH, 8, 40, 0, step=11)
        for event in events:
            life.happen(event, 1_600, Finish.LENGTH, 8, 40, 16)
        for number, (what, kind, (first, at, _, *words)) in enumerate(life.records):
            mine = (first, at, HANDLE + index, *words)
            rows = Rows(np.array([number + 1]), np.array([kind]), np.array([mine]).T)
            found.add(*((rows, NONE) if what == "enter" else (NONE, rows)))
        found.name(HANDLE + index, Text.EXTERNAL_ID, "cmpl-1")
    return found


def test_children_share_their_parents_trace_and_are_told_apart():
    requests = children(*((Event.LAST_OUTPUT, Event.LAST_SENT),) * 3)
    lives = requests.lives()
    assert lives.family.tolist() == [0, 0, 0]
    assert lives.over.all()
    rows, _ = closed(requests, lives)
    assert [(row["parent"], row["child"], row["children"]) for row in rows] == [(PARENT, n, 3) for n in range(3)]
    assert {row["trace_id"] for row in rows} == {request_trace_id(KEY, PARENT).hex()}
    assert {row["external_id"] for row in rows} == {"cmpl-1"}


def test_a_client_that_went_away_gave_up_all_answers():
    """One answer was complete already: its last byte will never be sent."""
    finished, aborted = (Event.LAST_OUTPUT,), (Event.ABORTED,)
    assert children(finished, finished).lives().over.tolist() == [False, False]
    assert children(finished, aborted).lives().over.tolist() == [True, True]
