"""Which requests and steps are exported, where not all are: pure, and the same whenever a session is exported.

*Rules* keep what matters: a request that is slow, failed, was preempted, or is among the first after its engine's
start, with every step that it took part in. Of the rest a share is kept, by the ids of their traces. A request whose
caller has chosen is kept, or not, as the caller says. Percentiles are of the requests in the commits before.

Counts can be restored: `stagetrace.sampling.weight` of the requests' spans, added up, is on average the number of all
requests that their callers did not exclude, and that of the steps' spans the number of all steps. A request that a rule
keeps counts once, one of the share 1/rate times. Steps of the share count 1/rate times, those that come for a kept
request's sake zero times: whether they do is only known when the request is over, and the others are sent by then.
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stagetrace.instrument import ids

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .spans import Row

    Step = tuple[int, int]  # engine instance, step

MOST_STEPS = 200_000  # of kept requests, remembered for rows that come later
LEAST_REQUESTS = 100  # before a percentile says anything
FIRST = 10  # requests after an engine's start, where no number is given
_GROWTH = math.log(1.02)  # of the buckets that percentiles are read from
_MEASURES = {
    "e2e": ("arrival_ns", "last_output_ns"),
    "ttft": ("arrival_ns", "first_output_ns"),
    "tpot": ("first_token_ns", "last_token_ns"),
    "queue": ("queued_ns", "scheduled_ns"),
}
_SLOW = re.compile(r"(\w+)>(?:p(\d+(?:\.\d+)?)|(\d+(?:\.\d+)?)(ms|s))")
_TAIL = f"e2e>p99,ttft>p99,error,preempted,first={FIRST}"
_SAMPLERS = {"always_on": 1.0, "always_off": 0.0, "traceidratio": None}
GRAMMAR = (
    "a share (0.05: with the usual rules), or a comma-separated list of rate=SHARE and of rules:"
    f" {'|'.join(_MEASURES)}>LIMIT (2s, 500ms) or >PERCENTILE (p99), error, preempted, first=N"
)


@dataclass(frozen=True)
class Slow:
    """A rule: a measure above a limit, or above a percentile of those before."""

    measure: str
    percent: float | None = None
    limit_ns: float = 0.0


@dataclass(frozen=True)
class Rules:
    """What is kept."""

    rate: float = 1.0  # of what no rule keeps
    slow: tuple[Slow, ...] = ()
    error: bool = False
    preempted: bool = False
    first: int = 0  # requests of each engine instance
    by_caller: bool = True  # the caller's choice goes before all

    @property
    def all(self) -> bool:
        """Whether nothing is left out but what the caller excludes."""
        return self.rate >= 1 and self.by_caller


def rules_of(environ: Mapping[str, str]) -> Rules:
    """The rules that STAGETRACE_SAMPLE (GRAMMAR), OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG ask for.

    The last two mean what OpenTelemetry's specification says; STAGETRACE_SAMPLE's share goes before theirs. Raises
    ValueError for what none of them can mean.
    """
    name = environ.get("OTEL_TRACES_SAMPLER", "").strip().lower() or "parentbased_always_on"
    base = name.removeprefix("parentbased_")
    if base not in _SAMPLERS:
        raise ValueError(f"OTEL_TRACES_SAMPLER: {name} is none of {', '.join(_SAMPLERS)}, nor one with parentbased_")
    share = _SAMPLERS[base]
    rate = _share("OTEL_TRACES_SAMPLER_ARG", environ.get("OTEL_TRACES_SAMPLER_ARG") or "1") if share is None else share
    by_caller = name.startswith("parentbased_")
    text = environ.get("STAGETRACE_SAMPLE", "").strip()
    if not text:
        return Rules(rate, by_caller=by_caller)
    if re.fullmatch(r"[\d.]+(e-?\d+)?", text):
        text = f"rate={text},{_TAIL}"
    given: dict[str, Any] = {"rate": rate, "by_caller": by_caller}
    slow = []
    for rule in (each.strip() for each in text.split(",")):
        found = _SLOW.fullmatch(rule)
        word, _, value = rule.partition("=")
        if found and found[1] in _MEASURES and float(found[2] or 0) < 100:
            limit = 0.0 if found[2] else float(found[3]) * (1e6 if found[4] == "ms" else 1e9)
            slow.append(Slow(found[1], float(found[2]) if found[2] else None, limit))
        elif word == "rate":
            given["rate"] = _share("STAGETRACE_SAMPLE", value)
        elif rule in ("error", "preempted"):
            given[rule] = True
        elif word == "first" and (value.isdecimal() or rule == "first"):
            given["first"] = int(value or FIRST)
        else:
            raise ValueError(f"STAGETRACE_SAMPLE: {rule or text!r} is not {GRAMMAR}")
    return Rules(slow=tuple(slow), **given)


def _share(variable: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"{variable}: {text} is no share between 0 and 1")
    return share


@dataclass(frozen=True)
class Picked:
    """What of one commit is exported."""

    rows: dict[str, Sequence[Row]]
    left_out: Counter[str]
    wanted: set[Step] = field(default_factory=set)  # steps of kept requests that are in commits before this one


class Sampler:
    """Decides commit by commit. `key` is the session's."""

    def __init__(self, rules: Rules, key: bytes):
        self.rules = rules
        self._key = key
        self._below = round(rules.rate * 2**64)
        self._seen: defaultdict[str, Counter[int]] = defaultdict(Counter)  # by measure: requests by bucket
        self._started: Counter[int] = Counter()  # requests by engine instance
        self._kept: OrderedDict[Step, None] = OrderedDict()
        self._newest: dict[int, int] = {}  # step, by engine instance

    def learn(self, requests: Iterable[Row]) -> None:
        """Takes in requests of commits that were decided before."""
        for row in requests:
            self._started[row["instance"]] += 1
            self._measure(row)

    def _measure(self, row: Row) -> None:
        for measure in _MEASURES:
            value = _measured(row, measure)
            if value is not None and not row["partial"]:
                self._seen[measure][_bucket(value)] += 1

    def pick(self, rows: dict[str, Sequence[Row]]) -> Picked:
        """What of a commit's rows is exported; rows of requests are whole (gather.py)."""
        left_out: Counter[str] = Counter()
        requests, wanted = self._pick_requests(rows["requests"], rows["members"])
        left_out["requests_sampled_out"] = len(rows["requests"]) - len(requests)
        handles = {row["handle"] for row in requests}
        found: dict[str, Sequence[Row]] = {"requests": requests}
        for name in ("states", "members"):
            found[name] = [row for row in rows[name] if row["handle"] in handles]
            left_out[f"{name}_sampled_out"] = len(rows[name]) - len(found[name])
        found["steps"] = [picked for row in rows["steps"] if (picked := self._step(row)) is not None]
        known = {(row["process"], row["sequence"]): row for row in rows["segments"]}
        found["segments"] = [row for row in rows["segments"] if self._segment(row, known)]
        for name in ("steps", "segments"):
            left_out[f"{name}_sampled_out"] = len(rows[name]) - len(found[name])
        here = {(row["instance"], row["step"]) for row in rows["steps"]}
        for instance, step in here:
            self._newest[instance] = max(step, self._newest.get(instance, step))
        for row in rows["requests"]:
            self._measure(row)
        earlier = {each for each in wanted - here if each[1] <= self._newest.get(each[0], each[1])}
        return Picked(found, +left_out, earlier)

    def of_steps(self, rows: Mapping[str, Sequence[Row]], steps: set[Step]) -> dict[str, Sequence[Row]]:
        """The rows of these steps alone, which an earlier commit has."""
        known = {(row["process"], row["sequence"]): row for row in rows["segments"]}
        return {
            "requests": [],
            "states": [],
            "members": [],
            "steps": [_marked(row, "request", 0.0) for row in rows["steps"] if (row["instance"], row["step"]) in steps],
            "segments": [row for row in rows["segments"] if _step_of(row, known) in steps],
        }

    # Requests

    def _pick_requests(self, requests: Sequence[Row], members: Sequence[Row]) -> tuple[list[Row], set[Step]]:
        limits = {slow: self._limit(slow) for slow in self.rules.slow}
        reasons = {row["handle"]: self._reason(row, limits) for row in requests}
        of_family: dict[int, str] = {}  # the answers to one request stay together
        for row in requests:
            reason = reasons[row["handle"]]
            if row["parent"] is not None and reason:
                of_family.setdefault(row["parent"], reason)
        kept = []
        tail = set()
        for row in requests:
            reason = reasons[row["handle"]] or of_family.get(row["parent"])
            if reason:
                share = reason == "rate"
                kept.append(_marked(row, reason, 1 / self.rules.rate if share else 1.0))
                if not share and reason != "caller":
                    tail.add(row["handle"])
        wanted = set()
        for run in members:
            if run["handle"] in tail:
                for number in range(run["first_step"], run["last_step"] + 1):
                    step = run["instance"], number
                    if step not in self._kept:
                        self._kept[step] = None
                        if not self._in_share(ids.step_trace_id(self._key, *step)):
                            wanted.add(step)
        while len(self._kept) > MOST_STEPS:
            self._kept.popitem(last=False)
        return kept, wanted

    def _reason(self, row: Row, limits: Mapping[Slow, float]) -> str | None:
        rules = self.rules
        before = self._started[row["instance"]]
        self._started[row["instance"]] += 1
        if rules.by_caller and (row["parent_span_id"] is not None or not row["trace_flags"] & 1):
            return "caller" if row["trace_flags"] & 1 else None
        if rules.error and row["status"] in ("error", "lost"):
            return "error"
        if rules.preempted and row["preemptions"]:
            return "preempted"
        if before < rules.first:
            return "first"
        for slow in rules.slow:
            value = _measured(row, slow.measure)
            if value is not None and value > limits[slow]:
                return f"slow {slow.measure}"
        return "rate" if self._in_share(bytes.fromhex(row["trace_id"])) else None

    def _limit(self, slow: Slow) -> float:
        """Nanoseconds above which a request is slow."""
        if slow.percent is None:
            return slow.limit_ns
        buckets = self._seen[slow.measure]
        count = buckets.total()
        if count < LEAST_REQUESTS:
            return math.inf
        below = 0
        for bucket in sorted(buckets):
            below += buckets[bucket]
            if below * 100 >= slow.percent * count:
                return math.exp((bucket + 1) * _GROWTH)
        return math.inf

    def _in_share(self, trace_id: bytes) -> bool:
        """As OpenTelemetry's TraceIdRatioBased: by the last eight bytes."""
        return int.from_bytes(trace_id[8:]) < self._below

    # Steps

    def _step(self, row: Row) -> Row | None:
        step = row["instance"], row["step"]
        if self._in_share(ids.step_trace_id(self._key, *step)):
            return _marked(row, "rate", 1 / self.rules.rate)
        return _marked(row, "request", 0.0) if step in self._kept else None

    def _segment(self, row: Row, known: Mapping[tuple[int, int], Row]) -> bool:
        step = _step_of(row, known)
        return step is None or step in self._kept or self._in_share(ids.step_trace_id(self._key, *step))


def _step_of(row: Row, known: Mapping[tuple[int, int], Row]) -> Step | None:
    """The step of a segment: its own, else that of the nearest around it."""
    at: Row | None = row
    for _ in range(64):
        if at is None:
            return None
        if at["step"] is not None and at["instance"] is not None:
            return at["instance"], at["step"]
        at = None if at["parent"] is None else known.get((at["process"], at["parent"]))
    return None


def _marked(row: Row, reason: str, weight: float) -> Row:
    marked = {**row, "sampling_reason": reason, "sampling_weight": weight}
    if "trace_flags" in row:
        marked["trace_flags"] |= 1
    return marked


def _measured(row: Row, measure: str) -> float | None:
    begin, end = (row[name] for name in _MEASURES[measure])
    if begin is None or end is None:
        return None
    tokens = (row["output_tokens"] or 0) - 1 if measure == "tpot" else 1
    return (end - begin) / tokens if tokens > 0 else None


def _bucket(value: float) -> int:
    return math.floor(math.log(value) / _GROWTH) if value > 0 else -1
