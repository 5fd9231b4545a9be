"""Rows of requests that are over: their times, counts and states, from their records in whatever order. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stagetrace.instrument.ids import request_trace_id
from stagetrace.instrument.records import Event, Text
from stagetrace.instrument.stages import BY_ID, BY_NAME, MAX_ATTRIBUTES, QUEUE_CAUSES, Finish, Kind, QueueCause

from ..session import REQUESTS_SCHEMA, STATES_SCHEMA
from .columns import choices, column, table_of
from .requests import ATTRIBUTES, FIELDS, FIRST_ATTRIBUTE, HANDLE, NS, STEP, WHAT
from .trace_context import parse_trace_context

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .requests import Lives, Request

Block = npt.NDArray[np.int64]
Column = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_TOKENIZE = BY_NAME["request_tokenize"].id
_DISPATCH = BY_NAME["request_dispatch"].id
_QUEUE = BY_NAME["queue"].id
_PREFILL = BY_NAME["prefill"].id
_DECODE = BY_NAME["decode"].id
_PREEMPTED = BY_NAME["preempted"].id
_KV_TRANSFER = BY_NAME["kv_transfer"].id
_OUTPUT = BY_NAME["output"].id
_SUMS = {
    "tokenize_ns": _TOKENIZE,
    "dispatch_ns": _DISPATCH,
    "queue_ns": _QUEUE,
    "kv_transfer_ns": _KV_TRANSFER,
    "prefill_ns": _PREFILL,
    "decode_ns": _DECODE,
    "preempted_ns": _PREEMPTED,
    "output_ns": _OUTPUT,
}
_IN_ENGINE = (_QUEUE, _KV_TRANSFER, _PREFILL, _DECODE, _PREEMPTED)
_BY_CAUSE = {cause: f"{cause.name.lower()}_ns" for cause in QUEUE_CAUSES}
STATUSES = ("finished", "aborted", "error", "open", "lost")  # a status is its index here
FINISHED, ABORTED, ERROR, OPEN, LOST = range(len(STATUSES))
_FINISHES = tuple(finish.name.lower() for finish in Finish)
_KNOWN = np.zeros(1 << 16, np.int64)  # stage -> how many attributes it has
for _stage in BY_ID.values():
    if _stage.kind is Kind.STATE:
        _KNOWN[_stage.id] = len(_stage.attributes)


class _Events:
    """The earliest event of each kind of each request."""

    def __init__(self, block: Block, who: Column, count: int):
        attributes = block[FIRST_ATTRIBUTE:][::-1]
        order = np.lexsort((*attributes, block[NS], block[WHAT], who))
        self._block, self._who, self._count = block[:, order], who[order], count

    def rows(self, event: Event) -> _Found:
        """Where each request's is."""
        return _first(self._block, self._who, self._count, -event)


class _Found:
    """One record of each request, or none."""

    def __init__(self, block: Block, row: Column):
        self.there = row >= 0
        self._block, self._row = block, np.where(self.there, row, 0)

    def __getitem__(self, which: int) -> Column:
        """A field of each request's record, 0 where there is none."""
        if not self._block.shape[1]:
            return np.zeros(len(self._row), np.int64)
        return np.where(self.there, self._block[which][self._row], 0)

    def column(self, which: int) -> pa.Array:
        """The same, null where there is none."""
        return column(self[which], ~self.there)


def _first(block: Block, who: Column, count: int, what: int) -> _Found:
    """The first record of a kind of each request."""
    at = np.flatnonzero(block[WHAT] == what)[::-1]
    row = np.full(count, -1)
    row[who[at]] = at
    return _Found(block, row)


class _Waited:
    """What requests waited for in the queue, as the engine said at the end of each part of it."""

    def __init__(self, block: Block, who: Column, count: int):
        cause, ns = block[FIRST_ATTRIBUTE], block[FIRST_ATTRIBUTE + 1]
        at = (block[WHAT] == -Event.WAITED) & np.isin(cause, QUEUE_CAUSES) & (ns > 0)
        self._who, self._end, self._cause, self._ns = who[at], block[NS][at], cause[at], ns[at]
        self.sums = {each: np.zeros(count, np.int64) for each in QUEUE_CAUSES}
        for each, total in self.sums.items():
            np.add.at(total, self._who[self._cause == each], self._ns[self._cause == each])

    def name_causes(self, states: Block, who: Column, until: Column) -> None:
        """Gives a part of the queue the cause that it is owed to most, where that is more than waiting for its turn."""
        if not len(self._who):
            return
        turn = np.flatnonzero((states[WHAT] == _QUEUE) & (states[FIRST_ATTRIBUTE + 1] == QueueCause.TURN))
        place = np.unique(np.concatenate([until[turn], self._end]), return_inverse=True)[1]
        key = np.concatenate([who[turn], self._who]) * len(place) + place
        of_part, of_event = key[: len(turn)], key[len(turn) :]
        order = np.lexsort((self._cause, self._ns, of_event))
        parts, firsts = np.unique(of_event[order], return_index=True)
        longest = order[np.append(firsts[1:], len(order)) - 1]
        rest = (until - states[NS])[turn]
        found = np.minimum(np.searchsorted(parts, of_part), len(parts) - 1)
        rest -= np.where(parts[found] == of_part, np.add.reduceat(self._ns[order], firsts)[found], 0)
        named = (parts[found] == of_part) & (self._ns[longest][found] > rest)
        states[FIRST_ATTRIBUTE + 1][turn[named]] = self._cause[longest][found][named]


def request_tables(
    lives: Lives,
    requests: Sequence[Request],
    key: bytes,
    *,
    open_status: Column,
    last_token: Column,
    cut: Flags,
    switched: Callable[[Column, Column], Flags],
) -> tuple[pa.Table, pa.Table]:
    """Rows of the requests table and of the states table; every request has been in a state.

    Of each request: `open_status` is the status of one that did not end (index in STATUSES), `last_token` the time in
    ns of the last token as the engine's steps have it (0: unknown), `cut` whether a switch of the level cut it;
    `switched` says so of any spans of time. `key` is the session's, for ids.
    """
    count = len(lives)
    who = np.repeat(np.arange(count), lives.lengths)
    is_state = lives.block[WHAT] > 0
    events = _Events(lives.block[:, ~is_state], who[~is_state], count)
    front, engine, aborted = (events.rows(event) for event in (Event.LAST_OUTPUT, Event.FINISHED, Event.ABORTED))
    last_sent = events.rows(Event.LAST_SENT)
    refused = events.rows(Event.REFUSED)
    finish = np.where(refused.there, Finish.ERROR, _finish(front, engine, aborted))
    completed = ~np.isin(finish, (Finish.UNKNOWN, Finish.ABORT, Finish.ERROR))

    states, who = lives.block[:, is_state], who[is_state]
    order = np.lexsort((*states[FIRST_ATTRIBUTE:][::-1], states[STEP], states[WHAT], states[NS], who))
    states, who = states[:, order], who[order]
    firsts = np.flatnonzero(np.diff(who, prepend=-1))
    lasts = np.append(firsts[1:], len(who)) - 1
    begin = states[NS][firsts]
    end = lives.last_ns
    for found in (front, aborted, last_sent):
        end = np.where(found[NS] != 0, found[NS], end)
    end = np.maximum(np.maximum(end, begin), states[NS][lasts])
    engine_end = engine[NS]
    # A stop string: the engine went on until the front end told it.
    stopped = engine.there & front.there & completed & (engine[FIRST_ATTRIBUTE] == Finish.ABORT)
    engine_end = np.where(stopped, np.minimum(engine_end, front[NS]), engine_end)

    outputs = engine.there & np.isin(states[WHAT][lasts], _IN_ENGINE)
    over = np.maximum(engine_end, states[NS][lasts])
    end = np.where(outputs, np.maximum(end, over), end)
    partial = ~np.isin(states[WHAT][firsts], (_TOKENIZE, _QUEUE)) | cut | switched(lives.begin_ns, end)
    added = np.zeros((FIELDS, int(outputs.sum())), np.int64)
    added[WHAT], added[NS], added[HANDLE] = _OUTPUT, over[outputs], lives.handle[outputs]
    added[FIRST_ATTRIBUTE] = engine[FIRST_ATTRIBUTE + 1][outputs]
    states = np.insert(states, lasts[outputs] + 1, added, axis=1)
    who = np.insert(who, lasts[outputs] + 1, np.flatnonzero(outputs))
    until = np.append(states[NS][1:], 0)
    until[np.append(np.flatnonzero(np.diff(who)), len(who) - 1)] = end

    waited = _Waited(lives.block, np.repeat(np.arange(count), lives.lengths), count)
    waited.name_causes(states, who, until)

    instance = lives.instance
    first = {stage: _first(states, who, count, stage) for stage in _SUMS.values()}
    # A front end may not know it: the engine has what came before in a session.
    told = first[_TOKENIZE].there & ((first[_TOKENIZE][FIRST_ATTRIBUTE] > 0) | ~first[_QUEUE].there)
    prompt = np.where(told, first[_TOKENIZE][FIRST_ATTRIBUTE], first[_QUEUE][FIRST_ATTRIBUTE])
    most = first[_TOKENIZE][FIRST_ATTRIBUTE + 1]
    by_http = first[_TOKENIZE][FIRST_ATTRIBUTE + 2] != 0
    output = np.where(front.there, front[FIRST_ATTRIBUTE + 1], engine[FIRST_ATTRIBUTE + 1])
    last_token = np.where(completed, engine_end, last_token)
    child, drafted = events.rows(Event.CHILD), events.rows(Event.DRAFTED)
    grammar = (states[WHAT] == _QUEUE) & (states[FIRST_ATTRIBUTE + 1] == QueueCause.GRAMMAR)
    compiling = np.zeros(count, np.int64)
    np.add.at(compiling, who[grammar], (until - states[NS])[grammar])
    sums = {"grammar_ns": column(compiling, ~np.isin(np.arange(count), who[grammar]))}
    sums |= {_BY_CAUSE[cause]: column(waited.sums[cause], waited.sums[cause] == 0) for cause in QUEUE_CAUSES}
    for name, stage in _SUMS.items():
        total = np.zeros(count, np.int64)
        at = states[WHAT] == stage
        np.add.at(total, who[at], (until - states[NS])[at])
        sums[name] = column(total, ~first[stage].there)
    status = np.full(count, FINISHED)
    for number, which in ((Finish.ABORT, ABORTED), (Finish.ERROR, ERROR)):
        status[finish == number] = which
    requests_table = table_of(
        REQUESTS_SCHEMA,
        handle=lives.handle,
        status=choices(np.where(finish == Finish.UNKNOWN, open_status, status), STATUSES),
        finish=choices(finish, _FINISHES),
        partial=partial,
        instance=column(instance, instance == 0),
        parent=child.column(FIRST_ATTRIBUTE),
        child=child.column(FIRST_ATTRIBUTE + 1),
        children=child.column(FIRST_ATTRIBUTE + 2),
        priority=first[_TOKENIZE].column(FIRST_ATTRIBUTE + 3),
        refused=refused.column(FIRST_ATTRIBUTE),
        prompt_tokens=column(prompt, ~(first[_TOKENIZE].there | first[_QUEUE].there) | refused.there),
        output_tokens=column(output, ~(front.there | engine.there)),
        cached_tokens=first[_PREFILL].column(FIRST_ATTRIBUTE),
        external_tokens=first[_PREFILL].column(FIRST_ATTRIBUTE + 2),
        draft_tokens=drafted.column(FIRST_ATTRIBUTE),
        accepted_tokens=drafted.column(FIRST_ATTRIBUTE + 1),
        max_tokens=column(most, most == 0),
        preemptions=np.bincount(who[_preempted(states)], minlength=count),
        received_ns=column(first[_TOKENIZE][NS] - first[_DISPATCH][FIRST_ATTRIBUTE + 1], ~by_http),
        arrival_ns=first[_TOKENIZE].column(NS),
        dispatched_ns=first[_DISPATCH].column(NS),
        queued_ns=first[_QUEUE].column(NS),
        scheduled_ns=first[_PREFILL].column(NS),
        first_token_ns=first[_DECODE].column(NS),
        first_output_ns=events.rows(Event.FIRST_OUTPUT).column(NS),
        first_sent_ns=events.rows(Event.FIRST_SENT).column(NS),
        last_token_ns=column(last_token, np.where(completed, ~engine.there, last_token == 0)),
        last_output_ns=front.column(NS),
        last_sent_ns=last_sent.column(NS),
        response_bytes=column(last_sent[FIRST_ATTRIBUTE], last_sent[FIRST_ATTRIBUTE] == 0),
        unsent_bytes=column(last_sent[FIRST_ATTRIBUTE + 1], last_sent[FIRST_ATTRIBUTE + 2] == 0),
        end_ns=end,
        **sums,
        **_named(np.where(child.there, child[FIRST_ATTRIBUTE], lives.handle), requests, key),
    )
    return requests_table, _states_table(states, until, instance[who])


def _preempted(states: Block) -> Flags:
    """Which states begin with a preemption; what was preempted and then fetched its KV is so still."""
    found: Flags = states[WHAT] == _PREEMPTED
    found[1:] &= (states[WHAT][:-1] != _KV_TRANSFER) | (states[HANDLE][1:] != states[HANDLE][:-1])
    return found


def _finish(front: _Found, engine: _Found, aborted: _Found) -> Column:
    """Why each ended: the front end knows of stop strings, which the engine sees as an abort."""
    finish = np.where(aborted.there, Finish.ABORT, Finish.UNKNOWN).astype(np.int64)
    for found in (engine, front):
        number = found[FIRST_ATTRIBUTE]
        finish = np.where((number > 0) & (number <= max(Finish)), number, finish)
    return finish


def _named(handles: Column, requests: Sequence[Request], key: bytes) -> dict[str, list[object]]:
    """The columns that are strings of the callers', and ids. `handles`: of each the request or its parent."""
    found: dict[str, list[object]] = {
        name: []
        for name in ("request_id", "external_id", "lora", "trace_id", "parent_span_id", "trace_flags", "trace_state")
    }
    for handle, request in zip(handles.tolist(), requests, strict=True):
        text = request.texts.get(Text.TRACE_CONTEXT)
        context = parse_trace_context(text) if text else None
        found["request_id"].append(request.texts.get(Text.REQUEST_ID))
        found["external_id"].append(request.texts.get(Text.EXTERNAL_ID))
        found["lora"].append(request.texts.get(Text.LORA))
        found["trace_id"].append(context.trace_id if context else request_trace_id(key, handle).hex())
        found["parent_span_id"].append(context.parent_span_id if context else None)
        found["trace_flags"].append(context.flags if context else 1)
        found["trace_state"].append(context.state if context else None)
    return found


def _states_table(states: Block, until: Column, instance: Column) -> pa.Table:
    known = _KNOWN[states[WHAT]]
    return table_of(
        STATES_SCHEMA,
        handle=states[HANDLE],
        stage=states[WHAT],
        begin_ns=states[NS],
        end_ns=until,
        instance=column(instance, instance == 0),
        step=column(states[STEP], states[STEP] == 0),
        **{f"a{i}": column(states[FIRST_ATTRIBUTE + i], known <= i) for i in range(ATTRIBUTES)},
        **{f"a{i}": pa.nulls(len(until), pa.int64()) for i in range(ATTRIBUTES, MAX_ATTRIBUTES)},
    )
