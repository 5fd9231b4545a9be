"""Where the latencies of requests went: the parts of TTFT, TPOT, inter-token and end-to-end latency.

At a percentile it is the requests around it that are broken down, not the percentile of each part: parts add up to the
mean latency of these requests, to the nanosecond. What each part means is in definitions.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from stagetrace.instrument.stages import BY_NAME, QUEUE_CAUSES, QueueCause

from .activity import COLUMNS as ACTIVITY
from .activity import Doing, Steps, activity, split
from .queueing import COLUMNS as QUEUEING
from .queueing import Wait, split_queue, waits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stagetrace.exporters.session import Process

    from .activity import Pieces, Times

PARTS = (
    *("tokenize", "dispatch", "queue_next_step", "queue_grammar", "queue_kv_space", "queue_batch_full"),
    *(
        "queue_token_budget",
        "queue_lora_limit",
        "queue_remote_kv",
        "queue_paused",
        "queue_other",
        "prefill_own",
        "prefill_others",
        "prefill_between",
        "prefill_unknown",
    ),
    *("decode_own", "interference", "decode_between", "decode_unknown", "preempted", "recompute", "kv_transfer"),
    *("delivery", "not_recorded"),
)
LATENCIES = ("ttft", "tpot", "itl", "e2e")
_CAUSES = [f"{cause.name.lower()}_ns" for cause in QUEUE_CAUSES]
AROUND = {50: 2.5, 95: 2.5, 99: 1.0}  # percentile -> how many percent of all on each side of it are around it
_FEWEST = 2  # on each side, as far as there are any
EXAMPLES = 3  # requests that are named

# The columns that this needs, by table.
COLUMNS: dict[str, list[str]] = {
    "requests": [
        *("handle", "request_id", "status", "partial", "instance", "prompt_tokens", "output_tokens", "arrival_ns"),
        *("first_token_ns", "first_output_ns", "last_token_ns", "last_output_ns", "grammar_ns"),
        *_CAUSES,
    ],
    "states": ["handle", "stage", "begin_ns", "end_ns", "instance", "step", "a0", "a1"],
    "steps": list(dict.fromkeys(["status", *ACTIVITY, *QUEUEING])),
    "intervals": ["instance", "step", "phase", "interval_ns", "tokens"],
}

_PLACE = {name: place for place, name in enumerate(PARTS)}
_PLAIN = {"request_tokenize": "tokenize", "request_dispatch": "dispatch"} | {
    name: name for name in ("preempted", "kv_transfer")
}
_QUEUE, _PREFILL, _DECODE, _CHUNK = (BY_NAME[name].id for name in ("queue", "prefill", "decode", "prefill_chunk"))
_QUEUE_PARTS = [place for name, place in _PLACE.items() if name.startswith("queue_")]
_QUEUED = [_PLACE[f"queue_{wait.name.lower()}"] for wait in Wait]


@dataclass(frozen=True)
class Group:
    """The requests (of itl: the intervals) around a percentile, or all of them, and where their time went."""

    of: str  # mean, p50, p95, p99
    count: int
    least_ns: float
    most_ns: float
    mean_ns: float  # what the parts add up to
    parts: dict[str, float]  # ns, those that are not zero
    examples: list[str]  # ids of requests in it, the slowest first; none for itl


@dataclass(frozen=True)
class LatencyParts:
    """One latency's groups."""

    latency: str
    groups: list[Group]


@dataclass(frozen=True, eq=False)
class Engines:
    """What the engine instances of a session did, and why they left requests waiting."""

    steps: Mapping[int, Steps]
    waits: Mapping[int, Pieces]
    telling: frozenset[int]  # instances that recorded what requests waited for

    @classmethod
    def of(cls, steps: pd.DataFrame, processes: Sequence[Process], requests: pd.DataFrame) -> Engines:
        """From the steps, the limits that the processes recorded, and what the requests waited for."""
        said = requests.loc[requests[_CAUSES].notna().any(axis=1), "instance"].dropna()
        found = waits(steps, processes, typical_prompt(requests))
        return cls(activity(steps), found, frozenset(int(each) for each in said.unique()))

    def doing(self, instance: pd.Series, begin: Times, end: Times) -> Times:
        """What the engine did in each stretch of time, kinds (Doing) x stretches."""
        pieces = {each: steps.pieces for each, steps in self.steps.items()}
        return split(pieces, instance, begin, end, len(Doing), Doing.UNKNOWN)

    def parts_of(self, request: pd.DataFrame, states: pd.DataFrame) -> dict[str, int]:
        """The PARTS of some states of one request, a frame of one row, in ns, without zeros."""
        before, after = _states_split(request, states, self)
        if (states["stage"] == _QUEUE).all():
            _as_recorded(request, before, self.telling)
        both = (before + after)[:, 0]
        return {name: int(amount) for name, amount in zip(PARTS, both, strict=True) if amount}


def typical_prompt(requests: pd.DataFrame) -> float | None:
    """The median prompt, in tokens."""
    known = requests["prompt_tokens"].dropna()
    return float(known.median()) if len(known) else None


def latency_parts(
    requests: pd.DataFrame,
    states: pd.DataFrame,
    steps: pd.DataFrame,
    intervals: pd.DataFrame,
    processes: Sequence[Process],
) -> list[LatencyParts]:
    """Where every latency went, at the mean and around p50, p95 and p99. Lost, open and partial requests are left out.

    The frames have COLUMNS.
    """
    engines = Engines.of(steps, processes, requests)
    measured = _measured(requests)
    parts = request_parts(measured, states, engines)
    names = measured["request_id"].fillna("").to_numpy()
    found = [
        LatencyParts(latency, _groups(values, of, names, None))
        for latency, (values, of) in parts.items()
        if len(values) and not np.isnan(values).all()
    ]
    whole = steps.loc[steps["status"] == "complete", ["instance", "step", "end_ns"]]
    rows = intervals.merge(whole, on=["instance", "step"])
    if len(rows):
        end, length = rows["end_ns"].to_numpy(np.int64), rows["interval_ns"].to_numpy(np.int64)
        split_up = _of_decode(engines.doing(rows["instance"], end - length, end))
        groups = _groups(length.astype(float), split_up, None, rows["tokens"].to_numpy(np.int64))
        found.append(LatencyParts("itl", groups))
    return sorted(found, key=lambda each: LATENCIES.index(each.latency))


def request_parts(
    requests: pd.DataFrame, states: pd.DataFrame, engines: Engines
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For ttft, tpot and e2e: each request's latency in ns, NaN where it is not known, and its PARTS x requests.

    The handles of `requests` are unique. TPOT's parts are those between first and last token over the number of
    intervals.
    """
    before, after = _states_split(requests, states, engines)
    _as_recorded(requests, before, engines.telling)
    arrival, first, shown, last, over = (
        requests[f"{name}_ns"].to_numpy(dtype=float, na_value=np.nan)
        for name in ("arrival", "first_token", "first_output", "last_token", "last_output")
    )
    several = requests["output_tokens"].fillna(0).to_numpy(np.int64) - 1
    delivery = _PLACE["delivery"]
    ttft = before.astype(float)
    ttft[delivery] = shown - first
    e2e = before + after.astype(float)
    e2e[delivery] = over - last
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot, between = after / several, (last - first) / several
    between[several < 1] = np.nan
    found = {"ttft": (shown - arrival, ttft), "tpot": (between, tpot), "e2e": (over - arrival, e2e)}
    for values, parts in found.values():
        parts[_PLACE["not_recorded"]] = values - parts.sum(axis=0)
    return found


def _as_recorded(requests: pd.DataFrame, parts: Times, telling: frozenset[int]) -> None:
    """Puts what engines recorded of the queue's causes in place of what steps tell, where an instance recorded any.

    What is left of the queue then was the request's turn: queue_next_step.
    """
    chosen = np.flatnonzero(requests["instance"].isin(telling).to_numpy(bool))
    left = parts[_QUEUE_PARTS][:, chosen].sum(axis=0)
    for place in _QUEUE_PARTS:
        parts[place, chosen] = 0
    for name in ("grammar_ns", *_CAUSES):
        amounts = np.minimum(requests[name].iloc[chosen].fillna(0).to_numpy(np.int64), left)
        parts[_PLACE[f"queue_{name.removesuffix('_ns')}"], chosen] = amounts
        left = left - amounts
    parts[_PLACE["queue_next_step"], chosen] = left


def parts_frame(
    requests: pd.DataFrame, states: pd.DataFrame, steps: pd.DataFrame, processes: Sequence[Process]
) -> pd.DataFrame:
    """A row for each request and latency (ttft, tpot, e2e): handle, request_id, latency, value_ns, and its PARTS in ns.

    The frames have COLUMNS; requests that are lost, open or partial are left out.
    """
    measured = _measured(requests)
    found = request_parts(measured, states, Engines.of(steps, processes, requests))
    frames = []
    for latency, (values, parts) in found.items():
        own = measured[["handle", "request_id"]].assign(latency=latency, value_ns=values)
        frames.append(pd.concat([own, pd.DataFrame(parts.T, columns=[*PARTS], index=own.index)], axis=1))
    return pd.concat(frames, ignore_index=True).dropna(subset=["value_ns"])


def _measured(requests: pd.DataFrame) -> pd.DataFrame:
    """Those that latencies are taken over, and whose states can be told from those of others."""
    measured = requests[~requests["status"].isin(["lost", "open"]) & ~requests["partial"]]
    return measured[~measured["handle"].duplicated(keep=False)].reset_index(drop=True)


def _states_split(requests: pd.DataFrame, states: pd.DataFrame, engines: Engines) -> tuple[Times, Times]:
    """The states of each request before and after its first token, split into PARTS: parts x requests, twice."""
    place = pd.Index(requests["handle"]).get_indexer(pd.Index(states["handle"]))
    rows, place = states[place >= 0], place[place >= 0]
    first, last = (
        requests[f"{name}_token_ns"].fillna(until).to_numpy(np.int64)[place]
        for name, until in (("first", np.iinfo(np.int64).max), ("last", np.iinfo(np.int64).max))
    )
    begin, end = rows["begin_ns"].to_numpy(np.int64), rows["end_ns"].to_numpy(np.int64)
    end = np.minimum(end, last)  # what comes then is delivery
    sides = []
    for low, high in ((begin, np.minimum(end, first)), (np.maximum(begin, first), end)):
        chosen = high > low
        sides.append(_side(rows[chosen], place[chosen], low[chosen], high[chosen], len(requests), engines))
    return sides[0], sides[1]


def _side(rows: pd.DataFrame, place: Times, begin: Times, end: Times, count: int, engines: Engines) -> Times:
    """Stretches of states summed by part and request."""
    found = np.zeros((len(PARTS), count), np.int64)
    stage = rows["stage"].to_numpy()

    def add(part: int, chosen: np.ndarray, amounts: Times) -> None:
        np.add.at(found[part], place[chosen], amounts)

    for state, name in _PLAIN.items():
        chosen = np.flatnonzero(stage == BY_NAME[state].id)
        add(_PLACE[name], chosen, (end - begin)[chosen])
    chosen = np.flatnonzero(stage == _QUEUE)
    grammar = (rows["a1"].iloc[chosen] == QueueCause.GRAMMAR).fillna(False).to_numpy(bool)
    queued = split_queue(engines.waits, rows["instance"].iloc[chosen], begin[chosen], end[chosen], grammar)
    for part, amounts in zip(_QUEUED, queued, strict=True):
        add(part, chosen, amounts)
    chosen = np.flatnonzero(stage == _DECODE)
    decode = _of_decode(engines.doing(rows["instance"].iloc[chosen], begin[chosen], end[chosen]))
    for part in range(len(PARTS)):
        if decode[part].any():
            add(part, chosen, decode[part])
    again = (rows["a1"] == 1).fillna(False).to_numpy(bool)
    chosen = np.flatnonzero((stage == _PREFILL) & again)
    add(_PLACE["recompute"], chosen, (end - begin)[chosen])
    chosen = np.flatnonzero((stage == _PREFILL) & ~again)
    doing = engines.doing(rows["instance"].iloc[chosen], begin[chosen], end[chosen])
    in_steps = doing[[Doing.PREFILL, Doing.DECODE, Doing.MIXED, Doing.INTERFERENCE]].sum(axis=0)
    until = np.full(count, np.iinfo(np.int64).min)
    np.maximum.at(until, place[chosen], end[chosen])
    chunks = np.flatnonzero((stage == _CHUNK) & (end <= until[place]))
    add(_PLACE["prefill_own"], chunks, _own_share(rows.iloc[chunks], engines))
    add(_PLACE["prefill_others"], chosen, in_steps)
    found[_PLACE["prefill_own"]] = np.minimum(found[_PLACE["prefill_own"]], found[_PLACE["prefill_others"]])
    found[_PLACE["prefill_others"]] -= found[_PLACE["prefill_own"]]
    add(_PLACE["prefill_between"], chosen, doing[Doing.BETWEEN])
    add(_PLACE["prefill_unknown"], chosen, doing[Doing.UNKNOWN])
    return found


def _own_share(chunks: pd.DataFrame, engines: Engines) -> Times:
    """Of the step of each prefill chunk, what prefill took of it, by the chunk's share of the prefill tokens, in ns."""
    found = np.zeros(len(chunks), np.int64)
    of = chunks["instance"].fillna(0).to_numpy(np.int64)
    numbers = chunks["step"].fillna(-1).to_numpy(np.int64)
    tokens = chunks["a0"].fillna(0).to_numpy(float)
    for instance, steps in engines.steps.items():
        chosen = np.flatnonzero(of == instance)
        place = steps.find(numbers[chosen])
        known, place = chosen[place >= 0], place[place >= 0]
        share = tokens[known] / np.maximum(steps.prefill_tokens[place], 1)
        found[known] = np.rint(steps.beyond_decode[place] * np.minimum(share, 1.0)).astype(np.int64)
    return found


def _of_decode(doing: Times) -> Times:
    """What the engine did while a request was in decode, as PARTS x stretches."""
    found = np.zeros((len(PARTS), doing.shape[1]), np.int64)
    found[_PLACE["decode_own"]] = doing[Doing.DECODE] + doing[Doing.MIXED]
    found[_PLACE["interference"]] = doing[Doing.INTERFERENCE] + doing[Doing.PREFILL]
    found[_PLACE["decode_between"]] = doing[Doing.BETWEEN]
    found[_PLACE["decode_unknown"]] = doing[Doing.UNKNOWN]
    return found


def _groups(values: np.ndarray, parts: np.ndarray, names: np.ndarray | None, weights: np.ndarray | None) -> list[Group]:
    """All values, and those around each percentile, each counted `weights` times."""
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    repeats = np.ones(len(order), np.int64) if weights is None else weights[order]
    ends = np.cumsum(repeats)
    total = int(ends[-1])
    groups = [_group("mean", order, repeats, values, parts, names)]
    for percentile, around in AROUND.items():
        middle = (total - 1) * percentile / 100
        half = max(total * around / 100, _FEWEST)
        low, high = max(0, int(np.ceil(middle - half))), min(total, int(np.floor(middle + half)) + 1)
        within = np.minimum(ends, high) - np.maximum(ends - repeats, low)
        chosen = within > 0
        groups.append(_group(f"p{percentile}", order[chosen], within[chosen], values, parts, names))
    return groups


def _group(
    of: str, chosen: Times, repeats: Times, values: np.ndarray, parts: np.ndarray, names: np.ndarray | None
) -> Group:
    count = int(repeats.sum())
    mine = (parts[:, chosen] @ repeats) / count
    return Group(
        of=of,
        count=count,
        least_ns=float(values[chosen[0]]),
        most_ns=float(values[chosen[-1]]),
        mean_ns=float(values[chosen] @ repeats) / count,
        parts={name: float(amount) for name, amount in zip(PARTS, mine, strict=True) if abs(amount) >= 0.5},
        examples=[] if names is None else [str(name) for name in names[chosen[::-1][:EXAMPLES]] if name],
    )
