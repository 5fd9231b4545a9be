"""One request's story: what it was in and for how long, the steps it took part in and with whom, and how that compares.

Times are nanoseconds since the request's arrival unless they are durations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagetrace.instrument.stages import BY_ID, BY_NAME, Phase, QueueCause

from .activity import COLUMNS as ACTIVITY
from .breakdown import time_per_output_token
from .latency_parts import COLUMNS as PARTS_COLUMNS
from .latency_parts import PARTS, Engines, request_parts
from .show import plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stagetrace.exporters.session import Process

# The columns that a story needs, by table.
COLUMNS: dict[str, list[str] | None] = {
    "requests": None,
    "states": [*PARTS_COLUMNS["states"], "a2", "a3"],
    "members": None,
    "steps": list(
        dict.fromkeys([*PARTS_COLUMNS["steps"], *ACTIVITY, "prefill_requests", "decode_requests", "members"])
    ),
}
MOST_NAMED = 10  # of requests that an ambiguous id could mean

_CHUNK, _PREEMPTED = BY_NAME["prefill_chunk"].id, BY_NAME["preempted"].id
_LATENCIES = (
    ("ttft", "arrival_ns", "first_output_ns"),
    ("ttft_client", "received_ns", "first_sent_ns"),
    ("e2e", "arrival_ns", "last_output_ns"),
    ("e2e_client", "received_ns", "last_sent_ns"),
)
_IDS = ("request_id", "external_id", "trace_id")


class NoSuchRequest(LookupError):
    """An id that names no request, or several; the message says what to do."""


@dataclass(frozen=True)
class Company:
    """The steps that a request took part in during a state, and who else was in them."""

    steps: int
    by_phase: dict[str, int]
    others: float | None  # other requests in the steps, mean
    others_prefill_tokens: int  # prefill tokens of other requests in them
    steps_without: int  # steps that ended meanwhile without it
    longest_ns: int | None  # the longest interval between the ends of two of its steps


@dataclass(frozen=True)
class Chunk:
    """A part of a request's prefill that one step computed."""

    step: int | None
    begin_ns: int
    duration_ns: int
    tokens: int
    context: int
    others: int | None
    others_prefill_tokens: int | None


@dataclass(frozen=True)
class Passage:
    """One state of the request, or a gap between two."""

    state: str  # `not recorded` for a gap
    begin_ns: int
    duration_ns: int
    notes: dict[str, int | str] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)  # of queue, prefill and decode: see latency_parts
    company: Company | None = None
    chunks: list[Chunk] = field(default_factory=list)


@dataclass(frozen=True)
class Standing:
    """A latency of the request beside the session's."""

    latency: str
    value_ns: int
    rank_share: float | None  # of the measured requests with less
    p50_ns: float | None
    p95_ns: float | None
    p99_ns: float | None
    parts: dict[str, int]  # of ttft, tpot and e2e


@dataclass(frozen=True)
class Story:
    """One request."""

    request_id: str
    external_id: str
    trace_id: str
    status: str
    finish: str
    partial: bool
    facts: dict[str, int | str]  # tokens, preemptions, adapter and the like, as far as known
    measured: int  # requests that it is compared with
    standings: list[Standing]
    passages: list[Passage]


def find_request(requests: pd.DataFrame, wanted: str) -> int:
    """The place (row number) of the request whose request, external or trace id is `wanted` or begins with it.

    Raises NoSuchRequest with the candidates where it is not one.
    """
    wanted = wanted.strip()
    if not wanted:
        raise NoSuchRequest("an empty id names no request")
    if not len(requests):
        raise NoSuchRequest("the session has no request yet")
    ids = [requests[name].fillna("").astype(str) for name in _IDS]
    exact = np.zeros(len(requests), bool)
    begins = np.zeros(len(requests), bool)
    for column in ids:
        exact |= (column == wanted).to_numpy(bool)
        begins |= column.str.startswith(wanted).to_numpy(bool)
    found = np.flatnonzero(exact if exact.any() else begins)
    if len(found) == 1:
        return int(found[0])
    if not len(found):
        some = ", ".join(_name(requests, row) for row in range(min(3, len(requests))))
        raise NoSuchRequest(
            f"no request of the {len(requests)} in this session has an id that is {wanted!r} or begins with it"
            f" (request ids, the clients' ids and trace ids are looked at; there are, for example, {some})"
        )
    named = ", ".join(_name(requests, int(row)) for row in found[:MOST_NAMED])
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    raise NoSuchRequest(
        f"{wanted!r} could be {len(found)} requests: {named}{more}. Write more of the id, or a request id"
    )


def _name(requests: pd.DataFrame, row: int) -> str:
    values = requests.iloc[row]
    return next((plain(str(values[name])) for name in _IDS if not pd.isna(values[name]) and values[name]), "?")


def story(
    row: int,
    requests: pd.DataFrame,
    states: pd.DataFrame,
    members: pd.DataFrame,
    steps: pd.DataFrame,
    processes: Sequence[Process],
) -> Story:
    """The story of the request in a row of `requests`; the frames have COLUMNS."""
    request = requests.iloc[row]
    engines = Engines.of(steps, processes, requests)
    own_states = states[states["handle"] == request["handle"]].sort_values(["begin_ns", "end_ns"], kind="stable")
    its_life = _between(own_states, request)
    own_states = own_states[its_life]
    zero = _whole(request["arrival_ns"])
    if zero is None:
        zero = int(own_states["begin_ns"].min()) if len(own_states) else int(request["end_ns"])
    joined = _joined(members[members["handle"] == request["handle"]], steps)
    return Story(
        request_id=_text(request["request_id"]),
        external_id=_text(request["external_id"]),
        trace_id=_text(request["trace_id"]),
        status=_text(request["status"]),
        finish=_text(request["finish"]),
        partial=bool(request["partial"]),
        facts=_facts(request, zero),
        measured=int(_measured(requests).sum()),
        standings=_standings(row, requests, own_states, engines),
        passages=_passages(requests.iloc[[row]], own_states, joined, steps, engines, zero),
    )


def _between(states: pd.DataFrame, request: pd.Series) -> np.ndarray:
    """Which states are of this request and not of one before or after it with the same id."""
    begin, end = _whole(request["arrival_ns"]), int(request["end_ns"])
    found = (states["begin_ns"] <= end).to_numpy(bool)
    return found if begin is None else found & (states["end_ns"] >= begin).to_numpy(bool)


def _measured(requests: pd.DataFrame) -> np.ndarray:
    return (~requests["status"].isin(["lost", "open"]) & ~requests["partial"]).to_numpy(bool)


def _facts(request: pd.Series, zero: int) -> dict[str, int | str]:
    found: dict[str, int | str] = {}
    for name in (
        *("prompt_tokens", "cached_tokens", "external_tokens", "output_tokens", "max_tokens", "draft_tokens"),
        *("accepted_tokens", "preemptions", "priority", "child", "children", "response_bytes", "unsent_bytes"),
    ):
        value = _whole(request[name])
        if value is not None:
            found[name] = value
    if not pd.isna(request["lora"]):
        found["lora"] = str(request["lora"])
    for name in ("first_token", "first_output", "first_sent", "last_token", "last_output", "last_sent"):
        at = _whole(request[f"{name}_ns"])
        if at is not None:
            found[f"{name}_ns"] = at - zero
    return found


def _standings(row: int, requests: pd.DataFrame, states: pd.DataFrame, engines: Engines) -> list[Standing]:
    own = requests.iloc[[row]].reset_index(drop=True)
    parts = request_parts(own, states, engines)
    measured = requests[_measured(requests)]
    found: list[Standing] = []
    values = {
        name: (requests[end] - requests[begin], measured[end] - measured[begin]) for name, begin, end in _LATENCIES
    }
    values["tpot"] = (time_per_output_token(requests), time_per_output_token(measured))
    for name, (each, others) in values.items():
        value = each.get(requests.index[row])
        if value is None or pd.isna(value):
            continue
        known = others.dropna().to_numpy(np.int64)
        middle = [float(number) for number in np.percentile(known, (50, 95, 99))] if len(known) else [None] * 3
        split = parts[name][1][:, 0] if name in parts else np.zeros(len(PARTS))
        found.append(
            Standing(
                name,
                int(value),
                float((known < int(value)).mean()) if len(known) else None,
                *middle,
                {part: round(amount) for part, amount in zip(PARTS, split, strict=True) if abs(amount) >= 0.5},
            )
        )
    return found


def _joined(members: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """The steps that the request took part in, in order of their ends."""
    chosen = np.zeros(len(steps), bool)
    instance, number = steps["instance"].to_numpy(np.int64), steps["step"].to_numpy(np.int64)
    for run in members.to_dict("records"):
        chosen |= (instance == run["instance"]) & (number >= run["first_step"]) & (number <= run["last_step"])
    return steps[chosen].sort_values("end_ns", kind="stable")


def _passages(
    request: pd.DataFrame, states: pd.DataFrame, joined: pd.DataFrame, steps: pd.DataFrame, engines: Engines, zero: int
) -> list[Passage]:
    found: list[Passage] = []
    chunks = states[states["stage"] == _CHUNK]
    last_end = zero
    unknown = pd.array([pd.NA], dtype="Int64")
    alone = request.assign(first_token_ns=unknown, last_token_ns=unknown)  # its states are split one by one
    for state in states[states["stage"] != _CHUNK].to_dict("records"):
        begin, end = int(state["begin_ns"]), int(state["end_ns"])
        if begin > last_end:
            found.append(Passage("not recorded", last_end - zero, begin - last_end))
        name = BY_ID[int(state["stage"])].name if int(state["stage"]) in BY_ID else f"state {state['stage']}"
        in_steps = name in ("prefill", "decode")
        within = chunks[(chunks["begin_ns"] >= begin) & (chunks["end_ns"] <= end)] if name == "prefill" else chunks[:0]
        one = states[(states["begin_ns"] == begin) & (states["stage"] == state["stage"])]
        split = engines.parts_of(alone, pd.concat([one, within])) if name in ("queue", *_IN_STEPS) else {}
        found.append(
            Passage(
                state=name.removeprefix("request_"),
                begin_ns=begin - zero,
                duration_ns=end - begin,
                notes=_notes(name, state, steps),
                parts=split,
                company=_company(joined, steps, begin, end, within) if in_steps else None,
                chunks=[_chunk(each, steps, zero) for each in within.to_dict("records")],
            )
        )
        last_end = max(last_end, end)
    return found


_IN_STEPS = ("prefill", "decode")


def _notes(name: str, state: Mapping[Any, Any], steps: pd.DataFrame) -> dict[str, int | str]:
    """What the state's record, and for a preemption the step that made it, say beside times."""
    notes: dict[str, int | str] = {}
    step = _whole(state["step"])
    if step is not None:
        notes["step"] = step
    stage = BY_NAME.get(name)
    for attribute, key in zip(stage.attributes if stage else (), ("a0", "a1", "a2", "a3"), strict=False):
        value = _whole(state.get(key))
        if value is not None and (attribute.choices is None or value != QueueCause.UNKNOWN):
            notes[attribute.name] = attribute.text(value) or value
    if name == "preempted":
        at = int(state["begin_ns"])
        of = steps[(steps["instance"] == state["instance"])] if _whole(state["instance"]) is not None else steps[:0]
        # A step's record counts what was preempted while it was scheduled: the first one that ends scheduling after it.
        later = of[of["scheduled_ns"] >= at].nsmallest(1, "scheduled_ns")
        for each in later.to_dict("records"):
            notes |= {"kv_usage_ppm": int(each["kv_usage"]), "running": int(each["running"])}
            notes |= {"waiting": int(each["waiting"]), "preempted_with_it": int(each["preempted"])}
            notes["reason"] = "no room in the KV cache" if each["preempted"] else "not told by the step's record"
    return notes


def _company(joined: pd.DataFrame, steps: pd.DataFrame, begin: int, end: int, chunks: pd.DataFrame) -> Company:
    """Of the steps that ended within a state."""
    own = joined[(joined["end_ns"] > begin) & (joined["end_ns"] <= end)]
    everyone = own["prefill_requests"] + own["decode_requests"]
    instances = own["instance"].unique()
    passing = steps[(steps["end_ns"] > begin) & (steps["end_ns"] <= end) & steps["instance"].isin(instances)]
    phases = own["phase"].value_counts()
    intervals = np.diff(np.concatenate([[begin], own["end_ns"].to_numpy(np.int64)]))
    return Company(
        steps=len(own),
        by_phase={phase.value: int(phases.get(phase.value, 0)) for phase in Phase if phases.get(phase.value, 0)},
        others=float((everyone - 1).clip(lower=0).mean()) if len(own) else None,
        others_prefill_tokens=max(int(own["prefill_tokens"].sum()) - int(chunks["a0"].fillna(0).sum()), 0),
        steps_without=max(len(passing) - len(own), 0),
        longest_ns=int(intervals.max()) if len(intervals) else None,
    )


def _chunk(state: Mapping[Any, Any], steps: pd.DataFrame, zero: int) -> Chunk:
    step, tokens = _whole(state["step"]), _whole(state["a0"]) or 0
    of = steps[(steps["step"] == step) & (steps["instance"] == state["instance"])] if step is not None else steps[:0]
    known = of.to_dict("records")[:1]
    begin, end = int(state["begin_ns"]), int(state["end_ns"])
    return Chunk(
        step=step,
        begin_ns=begin - zero,
        duration_ns=end - begin,
        tokens=tokens,
        context=_whole(state["a1"]) or 0,
        others=int(known[0]["prefill_requests"] + known[0]["decode_requests"]) - 1 if known else None,
        others_prefill_tokens=max(int(known[0]["prefill_tokens"]) - tokens, 0) if known else None,
    )


def _whole(value: Any) -> int | None:
    return None if value is None or pd.isna(value) else int(value)


def _text(value: Any) -> str:
    return "" if value is None or pd.isna(value) else str(value)
