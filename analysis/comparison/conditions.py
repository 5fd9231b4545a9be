"""The conditions of `--fail-on`: a small grammar, and whether one holds.

    condition = metric operator value
    operator  = ">" | ">=" | "<" | "<="
    value     = sign number unit      a change from A to B:  +5% of A's value,  +10ms,  -2pp of a share,  +3
              | number unit           B's value itself:      200ms,  40% of a share,  12

A sign makes the value a change. Units of time are ns, us, ms and s; of shares % and, for changes, pp (percentage
points); rates and counts have none. A condition holds where its interval lies beyond the value, does not where it lies
on the other side, and is undecided where the value is within.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from .metrics import Metric, Unit, metric_named

if TYPE_CHECKING:
    from collections.abc import Callable

_PATTERN = re.compile(
    r"\s*(?P<metric>[A-Za-z][A-Za-z0-9_]*)\s*(?P<operator>[<>]=?)\s*"
    r"(?P<sign>[+-]?)(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(?P<unit>%|[A-Za-z\u00b5\u03bc]*)\s*",
    re.ASCII,
)
_TIMES = {"ns": 1.0, "us": 1e3, "\u00b5s": 1e3, "\u03bcs": 1e3, "ms": 1e6, "s": 1e9}
_EXAMPLES = "such as 'tpot_p95 > +5%', 'ttft_p99 > 500ms' or 'requests_per_s < -3%'"
_LONGEST = 200


class ConditionError(ValueError):
    """A condition that cannot be parsed, or names what is not known; the message says what can be written."""


class Of(StrEnum):
    """What a condition is about."""

    CHANGE = "change"  # (B - A) / A
    DIFFERENCE = "difference"  # B - A, in the metric's unit
    VALUE = "value"  # B, in the metric's unit


class Verdict(StrEnum):
    """What became of a condition."""

    HOLDS = "holds"
    DOES_NOT = "does not hold"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Condition:
    """A condition as it was written, and what it means."""

    text: str
    metric: Metric
    operator: str
    of: Of
    value: float  # a share where `of` is a change, else in the metric's unit

    def beyond(self, number: float) -> bool:
        """Whether a number fulfils it."""
        return _OPERATORS[self.operator](number, self.value)

    def judge(self, low: float, high: float) -> Verdict:
        """What an interval, ends included, says of it."""
        if self.beyond(low) and self.beyond(high):
            return Verdict.HOLDS
        return Verdict.UNDECIDED if self.beyond(low) or self.beyond(high) else Verdict.DOES_NOT


_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": lambda number, value: number > value,
    ">=": lambda number, value: number >= value,
    "<": lambda number, value: number < value,
    "<=": lambda number, value: number <= value,
}


def parse(text: str) -> Condition:
    """A condition from its text. Raises ConditionError."""
    shown = repr(text if len(text) <= _LONGEST else text[:_LONGEST] + "...")
    found = _PATTERN.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None:
        raise ConditionError(
            f"{shown} is not a condition: write METRIC, one of > >= < <=, and a number with its unit, {_EXAMPLES}"
        )
    try:
        metric = metric_named(found["metric"])
    except ValueError as error:
        raise ConditionError(f"in {shown}: {error}") from None
    number = float(found["number"]) * (-1 if found["sign"] == "-" else 1)
    try:
        of, value = _meaning(metric, bool(found["sign"]), number, found["unit"])
    except ValueError as error:
        raise ConditionError(f"in {shown}: {error}") from None
    return Condition(" ".join(text.split()), metric, found["operator"], of, value)


def _meaning(metric: Metric, signed: bool, number: float, unit: str) -> tuple[Of, float]:
    """What a condition is about, and its value. Raises ValueError for a unit that the metric does not have."""
    if unit == "%":
        if signed:
            return Of.CHANGE, number / 100
        if metric.unit is Unit.SHARE:
            return Of.VALUE, number / 100
        raise ValueError(f"a percentage of {metric.name} is a change from A to B: write +{number:g}% or -{number:g}%")
    of = Of.DIFFERENCE if signed else Of.VALUE
    if metric.unit is Unit.TIME:
        if unit not in _TIMES:
            raise ValueError(
                f"{metric.name} is a time: write ns, us, ms or s after the number, or +N% for a change, not {unit!r}"
            )
        return of, number * _TIMES[unit]
    if metric.unit is Unit.SHARE:
        if unit != "pp" or not signed:
            raise ValueError(f"{metric.name} is a share: write N%, or for a change +N% or +Npp, not {unit!r}")
        return of, number / 100
    if unit:
        kind = "a rate per second" if metric.unit is Unit.RATE else "a number"
        raise ValueError(f"{metric.name} is {kind}: write it without a unit, or +N% for a change, not {unit!r}")
    return of, number
