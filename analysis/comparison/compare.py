"""Compares two sides: every metric's difference with what chance could have made of it, the loads, and conditions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from ..breakdown import weighted_percentiles
from .conditions import Of, Verdict
from .metrics import METRICS, Better, Group, Metric
from .resampling import LEVEL, Blocks, Comparison, Difference, Ratio, holm, smallest_shown
from .workload import LoadDifference, engines_differ, load_alike, load_differences

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .conditions import Condition
    from .resampling import Values
    from .sample import Side

LEAST = 0.01  # a change of a smaller share is called none, however certain it is


class ComparisonError(Exception):
    """Sessions that cannot be compared as asked; the message says what to do."""


class Found(StrEnum):
    """What is said of a metric."""

    HIGHER = "higher"
    LOWER = "lower"
    NONE = "no difference that these data can show"
    FEW = "too few data"
    ONLY_A = "only in A"
    ONLY_B = "only in B"


@dataclass(frozen=True)
class Compared:
    """One metric on both sides, in its unit; `change` and its ends are shares of A's value."""

    metric: Metric
    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    change: float | None
    change_low: float | None
    change_high: float | None
    effect: float | None
    p: float | None
    p_adjusted: float | None
    smallest: float | None
    found: Found

    @property
    def better(self) -> bool | None:
        """Whether a difference that was found is for the better; None for none, or where there is no better."""
        if self.found not in (Found.HIGHER, Found.LOWER) or self.metric.better is Better.NEITHER:
            return None
        return (self.found is Found.HIGHER) == (self.metric.better is Better.HIGHER)


@dataclass(frozen=True)
class Judged:
    """What became of a condition."""

    condition: Condition
    verdict: Verdict
    value: float | None  # what was observed: of the change, the difference, or B
    low: float | None
    high: float | None
    why: str  # where there is no interval


@dataclass(frozen=True, eq=False)
class Result:
    """A comparison."""

    a: Side
    b: Side
    same: bool  # the same sessions on both sides
    loads: list[LoadDifference]
    alike: list[str]  # what of the load is the same
    engines_differ: bool
    metrics: list[Compared]
    tested: int  # metrics with a p, which Holm's correction is over
    judged: list[Judged]

    @property
    def findings(self) -> list[Compared]:
        """Metrics with a difference."""
        return [each for each in self.metrics if each.found in (Found.HIGHER, Found.LOWER)]


def compare(a: Side, b: Side, conditions: Sequence[Condition] = (), least: float = LEAST) -> Result:
    """Compares B with A. `least`: the share by which a metric changes at least where a difference is said to be found.

    Raises ComparisonError where nothing can be compared, or a condition's metric has no value on a side.
    """
    same = _check(a, b)
    drawn = Comparison(Blocks(a.blocks), Blocks(b.blocks), same)
    rows, engines, loads = _rows(a, b, drawn), engines_differ(a, b), load_differences(a, b)
    if engines:  # each divides a step in its own way: less of a stage is not better
        rows = [
            (replace(metric, better=Better.NEITHER) if metric.group is Group.STAGES else metric, row, first, second)
            for metric, row, first, second in rows
        ]
    adjusted = holm([row.p for _, row, _, _ in rows])
    tested = sum(p is not None for p in adjusted)
    metrics = [
        _compared(metric, row, first, second, p, tested, least)
        for (metric, row, first, second), p in zip(rows, adjusted, strict=True)
    ]
    level = 1 - (1 - LEVEL) / max(len(conditions), 1)  # Bonferroni: of all of them 95 %
    judged = [_judge(each, a, b, drawn, level) for each in conditions]
    return Result(a, b, same, loads, load_alike(a, b, loads), engines, metrics, tested, judged)


def _check(a: Side, b: Side) -> bool:
    """Whether the sides are the same. Raises ComparisonError."""
    for side in (a, b):
        for each in side.samples:
            if not each.measured and not each.steps:
                raise ComparisonError(
                    f"{each.path} has no request that ended and no complete step, so there is nothing to compare."
                    " `stagetrace report` says why."
                )
    ids = [{each.identity for each in side.samples} for side in (a, b)]
    if any(len(own) < len(side.samples) for own, side in zip(ids, (a, b), strict=True)):
        raise ComparisonError("a session was named twice on one side: name each once")
    if ids[0] != ids[1] and ids[0] & ids[1]:
        raise ComparisonError("a session is on both sides, beside others: leave it out on one of them")
    return ids[0] == ids[1]


_Row = tuple[Metric, Difference, float | None, float | None]


def _rows(a: Side, b: Side, drawn: Comparison) -> list[_Row]:
    """Metrics with a value on a side at least."""
    nothing = Difference(None, None, None, None, None, None, None)
    rows: list[_Row] = []
    known: dict[str, dict[int, Difference]] = {}
    for metric in METRICS:
        first, second = _source(a, metric), _source(b, metric)
        values = [_value(source, metric) for source in (first, second)]
        if values[0] is None and values[1] is None:
            continue
        row = nothing
        if None not in values and first is not None and second is not None:
            row = _difference(metric, first, second, drawn, known)
        rows.append((metric, row, values[0], values[1]))
    return rows


def _source(side: Side, metric: Metric) -> Values | Ratio | None:
    """What a metric is taken from: values for a percentile, else a ratio, the mean of values among them."""
    values = side.values(metric.of)
    if metric.percentile is not None:
        return values
    return side.ratio(metric.of) if values is None else values.mean()


def _value(source: Values | Ratio | None, metric: Metric) -> float | None:
    if source is None:
        return None
    if isinstance(source, Ratio):
        return source.value()
    return weighted_percentiles(source.values.astype(np.int64), source.weights, [metric.percentile or 0])[0]


def _difference(
    metric: Metric,
    a: Values | Ratio,
    b: Values | Ratio,
    drawn: Comparison,
    known: dict[str, dict[int, Difference]],
    level: float = LEVEL,
) -> Difference:
    if isinstance(a, Ratio) or isinstance(b, Ratio) or metric.percentile is None:
        assert isinstance(a, Ratio) and isinstance(b, Ratio)
        return drawn.of_ratios(a, b, level)
    if metric.of not in known:
        wanted = [each.percentile for each in METRICS if each.of == metric.of and each.percentile is not None]
        known[metric.of] = drawn.of_percentiles(a, b, wanted, level)
    return known[metric.of][metric.percentile]


def _compared(
    metric: Metric, row: Difference, a: float | None, b: float | None, p: float | None, tested: int, least: float
) -> Compared:
    difference = None if a is None or b is None else b - a
    change = difference / a if difference is not None and a else None
    return Compared(
        metric=metric,
        a=a,
        b=b,
        difference=difference,
        low=row.low,
        high=row.high,
        change=change,
        change_low=row.change_low if change is not None else None,
        change_high=row.change_high if change is not None else None,
        effect=row.effect,
        p=row.p,
        p_adjusted=p,
        smallest=smallest_shown(row.error, tested),
        found=_found(row, a, b, difference, change, p, least),
    )


def _found(
    row: Difference,
    a: float | None,
    b: float | None,
    difference: float | None,
    change: float | None,
    p: float | None,
    least: float,
) -> Found:
    if b is None:
        return Found.ONLY_A
    if a is None or difference is None:
        return Found.ONLY_B
    if p is None or row.low is None or row.high is None:
        return Found.FEW
    certain = p < 1 - LEVEL and (row.low > 0 or row.high < 0)
    if not certain or (change is not None and abs(change) < least):
        return Found.NONE
    return Found.HIGHER if difference > 0 else Found.LOWER


def _judge(condition: Condition, a: Side, b: Side, drawn: Comparison, level: float) -> Judged:
    """What becomes of a condition, with its interval at `level`. Raises ComparisonError where its metric is missing."""
    metric = condition.metric
    first, second = _source(a, metric), _source(b, metric)
    values = [_value(source, metric) for source in (first, second)]
    wanted = {"B": values[1]} if condition.of is Of.VALUE else {"A": values[0], "B": values[1]}
    missing = [name for name, value in wanted.items() if value is None]
    if missing or second is None:
        raise ComparisonError(f"{condition.text!r}: {metric.name} has no value in {' and in '.join(missing)}")
    if condition.of is Of.VALUE:
        return _verdict(condition, values[1], drawn.interval_of_b(second, metric.percentile, level))
    assert first is not None and values[0] is not None and values[1] is not None
    found = _difference(metric, first, second, drawn, {}, level)
    difference = values[1] - values[0]
    if condition.of is Of.DIFFERENCE:
        return _verdict(condition, difference, _ends(found.low, found.high))
    if not values[0]:
        if drawn.same or not difference:
            return _verdict(condition, 0.0, (0.0, 0.0))
        return Judged(
            condition, Verdict.UNDECIDED, None, None, None, f"{metric.name} is 0 in A: there is no change in %"
        )
    return _verdict(condition, difference / values[0], _ends(found.change_low, found.change_high))


def _ends(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)


def _verdict(condition: Condition, value: float | None, interval: tuple[float, float] | None) -> Judged:
    if interval is None:
        return Judged(condition, Verdict.UNDECIDED, value, None, None, "too few data for an interval")
    return Judged(condition, condition.judge(*interval), value, *interval, "")
