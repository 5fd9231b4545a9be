"""One request as it is assembled: records of both processes, in any order, become a row and its states. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from stagetrace.instrument.ids import request_trace_id
from stagetrace.instrument.records import Event, Text
from stagetrace.instrument.stages import BY_ID, BY_NAME, Finish

_TOKENIZE = BY_NAME["request_tokenize"].id
_DISPATCH = BY_NAME["request_dispatch"].id
_QUEUE = BY_NAME["queue"].id
_PREFILL = BY_NAME["prefill"].id
_DECODE = BY_NAME["decode"].id
_PREEMPTED = BY_NAME["preempted"].id
_OUTPUT = BY_NAME["output"].id
_SUMS = {
    _TOKENIZE: "tokenize_ns",
    _DISPATCH: "dispatch_ns",
    _QUEUE: "queue_ns",
    _PREFILL: "prefill_ns",
    _DECODE: "decode_ns",
    _PREEMPTED: "preempted_ns",
    _OUTPUT: "output_ns",
}
_STATUS = {Finish.ABORT: "aborted", Finish.ERROR: "error"}

# W3C Trace Context, section 3.2.2: version, trace id, parent id, flags; all-zero ids are invalid.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_PRINTABLE = re.compile(r"[\x20-\x7e]*")
_MAX_TRACE_STATE = 512


@dataclass
class TraceContext:
    """The caller's trace, from its traceparent."""

    trace_id: str
    parent_span_id: str
    flags: int
    state: str | None


def parse_trace_context(text: str) -> TraceContext | None:
    """The caller's trace context: a traceparent, a newline, a tracestate. None where the traceparent is invalid."""
    parent, _, state = text.partition("\n")
    match = _TRACEPARENT.fullmatch(parent.strip())
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    good = state if 0 < len(state) <= _MAX_TRACE_STATE and _PRINTABLE.fullmatch(state) else None
    return TraceContext(match[2], match[3], int(match[4], 16), good)


@dataclass
class Request:
    """What is known of a request so far."""

    handle: int
    instance: int = 0
    states: list[tuple[int, int, int, tuple[int, ...]]] = field(default_factory=list)  # ns, stage, step, attributes
    events: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)  # event -> ns, attributes
    texts: dict[int, str] = field(default_factory=dict)
    last_ns: int = 0  # time of its last record
    last_token_ns: int = 0  # end of the last step that gave it a token
    last_step: int = 0  # the engine's step when it ended the request

    def enter(self, stage: int, words: tuple[int, ...]) -> None:
        """A state record."""
        _, time_ns, _, instance, step, *attributes = words
        self.states.append((time_ns, stage, step, tuple(attributes)))
        self.instance = instance or self.instance
        self.last_ns = max(self.last_ns, time_ns)

    def happen(self, event: int, words: tuple[int, ...]) -> None:
        """An event record; the earliest of a kind counts."""
        _, time_ns, _, instance, step, *attributes = words
        found = (time_ns, tuple(attributes))
        self.events[event] = min(self.events.get(event, found), found)
        if event == Event.FINISHED:
            self.last_step = max(self.last_step, step)
        self.instance = instance or self.instance
        self.last_ns = max(self.last_ns, time_ns)

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        if Event.FINISHED not in self.events:
            return False
        arrivals = [values for _, stage, _, values in self.states if stage == _TOKENIZE]
        if not arrivals or Event.ABORTED in self.events:
            return True
        by_http = arrivals[0][2]
        return (Event.LAST_SENT if by_http else Event.LAST_OUTPUT) in self.events

    @property
    def ending(self) -> bool:
        """Whether it ended on one side; what is missing is the other's word, or a slow client's last byte."""
        return not self.events.keys().isdisjoint((Event.FINISHED, Event.LAST_OUTPUT, Event.ABORTED))

    def rows(self, key: bytes, open_status: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The request's row and its states' rows (session.REQUESTS_SCHEMA, STATES_SCHEMA).

        `open_status` is the status of a request that did not end: open or lost.
        """
        states = sorted(self.states)
        times = {event: self.events[event][0] for event in self.events}
        front, engine = self.events.get(Event.LAST_OUTPUT), self.events.get(Event.FINISHED)
        finish = self._finish()
        begin = states[0][0] if states else self.last_ns
        end = times.get(Event.LAST_SENT) or times.get(Event.ABORTED) or times.get(Event.LAST_OUTPUT) or self.last_ns
        end = max(end, begin, states[-1][0] if states else 0)
        first = {stage: time_ns for time_ns, stage, _, _ in reversed(states)}
        attributes = {stage: values for _, stage, _, values in reversed(states)}
        completed = finish not in (Finish.UNKNOWN, Finish.ABORT, Finish.ERROR)
        engine_end = engine[0] if engine else None
        if engine and front and completed and engine[1][0] == Finish.ABORT:
            engine_end = min(engine[0], front[0])  # a stop string: the engine went on until the front end told it
        if engine_end is not None and states and states[-1][1] in (_QUEUE, _PREFILL, _DECODE, _PREEMPTED):
            over = max(engine_end, states[-1][0])
            end = max(end, over)
            states.append((over, _OUTPUT, 0, (engine[1][1],) if engine else ()))
        sums: dict[str, int | None] = dict.fromkeys(_SUMS.values())
        rows = []
        for (time_ns, stage, step, values), until in zip(states, [*(at for at, *_ in states[1:]), end], strict=True):
            if stage in _SUMS:
                sums[_SUMS[stage]] = (sums[_SUMS[stage]] or 0) + until - time_ns
            rows.append(state_row(self.handle, stage, time_ns, until, self.instance, step, values))
        context = parse_trace_context(self.texts.get(Text.TRACE_CONTEXT, ""))
        prompt = next((values[0] for values in (attributes.get(_TOKENIZE), attributes.get(_QUEUE)) if values), None)
        row: dict[str, Any] = {
            "handle": self.handle,
            "request_id": self.texts.get(Text.REQUEST_ID),
            "external_id": self.texts.get(Text.EXTERNAL_ID),
            "trace_id": context.trace_id if context else request_trace_id(key, self.handle).hex(),
            "parent_span_id": context.parent_span_id if context else None,
            "trace_flags": context.flags if context else 1,
            "trace_state": context.state if context else None,
            "instance": self.instance or None,
            "status": _STATUS.get(finish, "finished") if finish else open_status,
            "finish": finish.name.lower(),
            "partial": not states or states[0][1] not in (_TOKENIZE, _QUEUE),
            "prompt_tokens": prompt,
            "output_tokens": front[1][1] if front else engine[1][1] if engine else None,
            "cached_tokens": attributes[_PREFILL][0] if attributes.get(_PREFILL) else None,
            "max_tokens": (attributes[_TOKENIZE][1] or None) if attributes.get(_TOKENIZE) else None,
            "preemptions": sum(stage == _PREEMPTED for _, stage, _, _ in states),
            "arrival_ns": first.get(_TOKENIZE),
            "dispatched_ns": first.get(_DISPATCH),
            "queued_ns": first.get(_QUEUE),
            "scheduled_ns": first.get(_PREFILL),
            "first_token_ns": first.get(_DECODE),
            "first_output_ns": times.get(Event.FIRST_OUTPUT),
            "first_sent_ns": times.get(Event.FIRST_SENT),
            "last_token_ns": engine_end if completed else self.last_token_ns or None,
            "last_output_ns": times.get(Event.LAST_OUTPUT),
            "last_sent_ns": times.get(Event.LAST_SENT),
            "end_ns": end,
            **sums,
        }
        return row, rows

    def _finish(self) -> Finish:
        """Why it ended: the front end knows of stop strings, which the engine sees as an abort."""
        for event in (Event.LAST_OUTPUT, Event.FINISHED):
            if event in self.events:
                number = self.events[event][1][0]
                if number and number in set(Finish):
                    return Finish(number)
        return Finish.ABORT if Event.ABORTED in self.events else Finish.UNKNOWN


def state_row(
    handle: int, stage: int, begin: int, end: int, instance: int, step: int, values: tuple[int, ...]
) -> dict[str, Any]:
    """One row of the states table; `values` are the attributes, those that the stage does not have are null."""
    known = len(BY_ID[stage].attributes)
    return {
        "handle": handle,
        "stage": stage,
        "begin_ns": begin,
        "end_ns": end,
        "instance": instance or None,
        "step": step or None,
        **{f"a{i}": value for i, value in enumerate(values[:known])},
    }
