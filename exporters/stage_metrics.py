"""Where the time goes, as metrics: what a commit's tables say of requests, steps, stages, collectives and experts.

Cumulative from the first commit that was taken in. Histograms carry exemplars: of each bucket the newest request or
step, by its trace, so that a point of a chart leads to an example. Every label has few values: statuses, phases,
stages and operations come from closed tables; groups of ranks and layers beyond MOST_VALUES are `other`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    Sum,
)

from stagetrace.instrument import ids
from stagetrace.instrument.stages import BY_ID, BY_NAME, STAGES, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pyarrow as pa

    from .spans import Clock, Row

MOST_VALUES = 256  # of a label that no table of ours closes

# Seconds. The first are those of OpenTelemetry's GenAI conventions with finer ones below 10 ms added.
FIRST_TOKEN_S = (
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
)
PER_TOKEN_S = (
    0.0005,
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
)
REQUEST_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
STEP_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

# name: bounds, means
_HISTOGRAMS: dict[str, tuple[tuple[float, ...], str]] = {
    "gen_ai.server.request.duration": (REQUEST_S, "arrival until the front end had the last token"),
    "gen_ai.server.time_to_first_token": (FIRST_TOKEN_S, "arrival until the front end had the first token"),
    "gen_ai.server.time_per_output_token": (PER_TOKEN_S, "per output token after the first, of a request"),
    "stagetrace.request.state": (REQUEST_S, "time that a request was in a state"),
    "stagetrace.step.duration": (STEP_S, "of complete steps, by kind"),
}
# name: unit, means
_SUMS: dict[str, tuple[str, str]] = {
    "stagetrace.requests": ("{request}", "requests that are over, by how they ended"),
    "stagetrace.request.tokens": ("{token}", "tokens of requests that are over"),
    "stagetrace.preemptions": ("{preemption}", "preemptions of requests that are over"),
    "stagetrace.steps": ("{step}", "steps, by kind and status"),
    "stagetrace.step.tokens": ("{token}", "tokens scheduled in steps, by what for"),
    "stagetrace.step.unattributed": ("s", "time of steps that no stage on the scheduler's timeline covers"),
    "stagetrace.stage.self_time": ("s", "time in a stage less that of stages inside it, over all processes"),
    "stagetrace.stage.calls": ("{call}", "how often a stage was run, over all processes"),
    "stagetrace.collective.time": ("s", "time of ranks in operations of a group, waiting for late ranks included"),
    "stagetrace.collective.bytes": ("By", "what the ranks gave to these operations"),
    "stagetrace.collective.calls": ("{call}", "how many of these operations there were, counted on each rank"),
    "stagetrace.expert.tokens": ("{token}", "tokens that experts of a layer received"),
    "stagetrace.expert.peak_tokens": (
        "{token}",
        "tokens that they would have received had each as many as the busiest: over the former it is the imbalance",
    ),
}
# name: unit, column of steps, scale, means
_GAUGES: dict[str, tuple[str, str, float, str]] = {
    "stagetrace.kv_cache.usage": ("1", "kv_usage", 1e-6, "share of the KV cache's blocks in use, at the last step"),
    "stagetrace.requests.waiting": ("{request}", "waiting", 1, "requests in the waiting queue, at the last step"),
    "stagetrace.requests.running": ("{request}", "running", 1, "requests in the running batch, at the last step"),
}
_COLLECTIVE = BY_NAME["collective"]
_WORDS = {attribute.name: f"a{at}" for at, attribute in enumerate(_COLLECTIVE.attributes)}
_STATES = {
    column: stage.name
    for stage in STAGES
    if stage.kind is Kind.STATE and (column := stage.name.removeprefix("request_") + "_ns") != "prefill_chunk_ns"
}
_COUNTED = ("finished", "aborted", "error")  # whose latencies count

_Labels = tuple[tuple[str, str], ...]


@dataclass
class _Distribution:
    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0
    least: float = float("inf")
    most: float = float("-inf")
    exemplars: dict[int, Exemplar] = field(default_factory=dict)  # by bucket

    def add(self, value: float, exemplar: Exemplar | None) -> None:
        if not self.counts:
            self.counts = [0] * (len(self.bounds) + 1)
        bucket = int(np.searchsorted(self.bounds, value))
        self.counts[bucket] += 1
        self.total += value
        self.least, self.most = min(self.least, value), max(self.most, value)
        if exemplar is not None:
            self.exemplars[bucket] = exemplar


class StageMetrics:
    """Takes in the tables of one commit after the other. `key` is the session's. Used by one thread."""

    def __init__(self, key: bytes, started_ns: int):
        self._key = key
        self._started_ns = started_ns
        self._sums: defaultdict[str, defaultdict[_Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._histograms: dict[str, dict[_Labels, _Distribution]] = {name: {} for name in _HISTOGRAMS}
        self._gauges: dict[str, dict[_Labels, float]] = {name: {} for name in _GAUGES}
        self._values: defaultdict[str, set[str]] = defaultdict(set)

    def add(self, tables: Mapping[str, pa.Table], names: Mapping[int, str], clock: Clock) -> None:
        """Takes in a commit; `names` are what handles in its segments stand for."""
        self._add_requests(tables["requests"].to_pylist(), clock)
        self._add_steps(tables["steps"], clock)
        self._add_segments(tables["segments"], names)
        self._add_experts(tables["experts"])

    def metrics(self, now_ns: int) -> list[Metric]:
        """What there is at `now_ns` (wall clock)."""
        found = []
        for name, (unit, means) in _SUMS.items():
            points = [self._point(labels, value, now_ns) for labels, value in sorted(self._sums[name].items())]
            if points:
                found.append(Metric(name, means, unit, Sum(points, AggregationTemporality.CUMULATIVE, True)))
        for name, (unit, _, _, means) in _GAUGES.items():
            points = [self._point(labels, value, now_ns) for labels, value in sorted(self._gauges[name].items())]
            if points:
                found.append(Metric(name, means, unit, Gauge(points)))
        for name, (_, means) in _HISTOGRAMS.items():
            bars = [
                HistogramDataPoint(
                    dict(labels),
                    self._started_ns,
                    now_ns,
                    sum(each.counts),
                    each.total,
                    list(each.counts),
                    list(each.bounds),
                    each.least,
                    each.most,
                    [each.exemplars[bucket] for bucket in sorted(each.exemplars)],
                )
                for labels, each in sorted(self._histograms[name].items())
            ]
            if bars:
                found.append(Metric(name, means, "s", Histogram(bars, AggregationTemporality.CUMULATIVE)))
        return found

    def _point(self, labels: _Labels, value: float, now_ns: int) -> NumberDataPoint:
        return NumberDataPoint(dict(labels), self._started_ns, now_ns, value)

    def _count(self, name: str, value: float | None, **labels: str) -> None:
        if value:
            self._sums[name][_labels(labels)] += value

    def _observe(self, name: str, value_ns: float, exemplar: Exemplar | None, **labels: str) -> None:
        of = self._histograms[name]
        key = _labels(labels)
        if key not in of:
            of[key] = _Distribution(_HISTOGRAMS[name][0])
        of[key].add(value_ns / 1e9, exemplar)

    def _bounded(self, label: str, value: str) -> str:
        known = self._values[label]
        if value not in known:
            if len(known) >= MOST_VALUES:
                return "other"
            known.add(value)
        return value

    # Tables

    def _add_requests(self, requests: Iterable[Row], clock: Clock) -> None:
        for row in requests:
            self._count("stagetrace.requests", 1, status=row["status"], finish=row["finish"])
            self._count("stagetrace.preemptions", row["preemptions"])
            for kind in ("prompt", "cached", "output"):
                self._count("stagetrace.request.tokens", row[f"{kind}_tokens"], kind=kind)
            if row["status"] not in _COUNTED or row["partial"]:
                continue
            trace_id, span_id = bytes.fromhex(row["trace_id"]), ids.request_span_id(self._key, row["handle"])
            sent = bool(row["trace_flags"] & 1)
            at_ns = row["end_ns"] + clock.offset(row["end_ns"])

            def observe(
                name: str, value_ns: float, trace: tuple[bytes, bytes] | None, at_ns: int = at_ns, **labels: str
            ) -> None:
                self._observe(name, value_ns, trace and _exemplar(value_ns, at_ns, *trace), **labels)

            trace = (trace_id, span_id) if sent else None
            if row["arrival_ns"] is not None and row["last_output_ns"] is not None:
                observe("gen_ai.server.request.duration", row["last_output_ns"] - row["arrival_ns"], trace)
            if row["arrival_ns"] is not None and row["first_output_ns"] is not None:
                observe("gen_ai.server.time_to_first_token", row["first_output_ns"] - row["arrival_ns"], trace)
            after = (row["output_tokens"] or 0) - 1
            if row["first_token_ns"] is not None and row["last_token_ns"] is not None and after > 0:
                spent = (row["last_token_ns"] - row["first_token_ns"]) / after
                observe("gen_ai.server.time_per_output_token", spent, trace)
            for column, state in _STATES.items():
                if row.get(column) is not None:
                    observe("stagetrace.request.state", row[column], trace, state=state)

    def _add_steps(self, steps: pa.Table, clock: Clock) -> None:
        columns = ("instance", "step", "process", "phase", "status", "begin_ns", "end_ns", "unattributed_ns")
        more = ("prefill_tokens", "decode_tokens", *(column for _, column, _, _ in _GAUGES.values()))
        newest: dict[int, Row] = {}
        for row in steps.select([*columns, *more]).to_pylist():
            phase = row["phase"]
            self._count("stagetrace.steps", 1, phase=phase, status=row["status"])
            for kind in ("prefill", "decode"):
                self._count("stagetrace.step.tokens", row[f"{kind}_tokens"], kind=kind)
            if row["status"] != "complete":
                continue
            self._count("stagetrace.step.unattributed", row["unattributed_ns"] / 1e9, phase=phase)
            step = row["instance"], row["step"]
            trace = ids.step_trace_id(self._key, *step), ids.step_span_id(self._key, *step)
            took = row["end_ns"] - row["begin_ns"]
            at_ns = row["end_ns"] + clock.offset(row["end_ns"])
            self._observe("stagetrace.step.duration", took, _exemplar(took, at_ns, *trace), phase=phase)
            if row["process"] not in newest or newest[row["process"]]["end_ns"] <= row["end_ns"]:
                newest[row["process"]] = row
        for process, row in newest.items():
            for name, (_, column, scale, _) in _GAUGES.items():
                labels = _labels({"process": self._bounded("process", f"{process:016x}")})
                self._gauges[name][labels] = row[column] * scale

    def _add_segments(self, segments: pa.Table, names: Mapping[int, str]) -> None:
        timed = segments.select(["stage", "phase", "self_ns"]).group_by(["stage", "phase"])
        for row in timed.aggregate([("self_ns", "sum"), ("self_ns", "count")]).to_pylist():
            stage = BY_ID.get(row["stage"])
            if stage is None:
                continue
            labels = {"stage": stage.name, "phase": row["phase"] or "none", "timeline": str(stage.timeline)}
            if stage.kind is not Kind.ENVELOPE:  # those hold the others
                self._count("stagetrace.stage.self_time", row["self_ns_sum"] / 1e9, **labels)
            self._count("stagetrace.stage.calls", row["self_ns_count"], **labels)
        collectives = segments.filter(np.asarray(segments["stage"]) == _COLLECTIVE.id)
        for row in collectives.select([*_WORDS.values(), "begin_ns", "end_ns"]).to_pylist():
            op = _COLLECTIVE.attributes[0].text(row[_WORDS["op"]] or 0) or "unknown"
            group = row[_WORDS["group"]]
            labels = {"op": op, "group": self._bounded("group", names.get(group, "unknown"))}
            self._count("stagetrace.collective.time", (row["end_ns"] - row["begin_ns"]) / 1e9, **labels)
            self._count("stagetrace.collective.bytes", row[_WORDS["bytes"]], **labels)
            self._count("stagetrace.collective.calls", 1, **labels)

    def _add_experts(self, experts: pa.Table) -> None:
        # Rows of one layer and step are of different tokens: they add up before the busiest is looked for.
        together: dict[tuple[int, int, int], Any] = {}
        for row in experts.select(["instance", "step", "layer", "counts"]).to_pylist():
            which = row["instance"], row["step"], row["layer"]
            counts = np.asarray(row["counts"], np.int64)
            before = together.get(which)
            together[which] = counts if before is None or len(before) != len(counts) else before + counts
        for (_, _, layer), counts in together.items():
            if len(counts):
                label = self._bounded("layer", str(layer))
                self._count("stagetrace.expert.tokens", int(counts.sum()), layer=label)
                self._count("stagetrace.expert.peak_tokens", int(counts.max()) * len(counts), layer=label)


def _labels(labels: Mapping[str, str]) -> _Labels:
    return tuple((f"stagetrace.{name}", value) for name, value in labels.items())


def _exemplar(value_ns: float, at_ns: int, trace_id: bytes, span_id: bytes) -> Exemplar:
    return Exemplar({}, value_ns / 1e9, at_ns, int.from_bytes(span_id), int.from_bytes(trace_id))
