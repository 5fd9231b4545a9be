"""Whether two sides had the same load: lengths, arrivals, concurrency, model, engine, settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .sample import Side

MOST = 0.05  # by which means may differ, as a share of the larger, and still be called the same
MOST_TAIL = 0.10  # the same of medians and 95th percentiles
MOST_RATE = 0.10  # the same of arrivals and concurrency


@dataclass(frozen=True)
class LoadDifference:
    """One thing about the load that is not the same on both sides, and what that does to the comparison."""

    what: str
    a: str
    b: str
    means: str


_MEANS = {
    "engine": "stages have the same names and definitions in both, but each engine divides its work differently",
    "engine_version": "another release: what differs may be its",
    "model": "latencies of different models are compared: a difference need not be the server's",
    "level": "a higher level costs the engine more; stages that only one level records are shown for one side",
    "marks": "the self time of device_forward is without the stages and layers that have marks, and marks take time",
    "host": "another machine: what differs may be its",
    "arrivals per s": "a cause where the client decides when to send, else a result: it waited for answers",
    "concurrency": "other requests in flight at a time: a cause where the client keeps so many, else what slower or"
    " faster requests made of it",
}
_RATES = (("arrivals per s", "arrivals_per_s"), ("concurrency", "concurrency"))


_NOT_RECORDED = "not recorded"
_OTHERWISE = "the servers were set up differently"
_OF_ONE_ENGINE = "only one of the engines has such a setting, or tells it"


def engines_differ(a: Side, b: Side) -> bool:
    """Whether the sides are of different engines."""
    return _said(a, "engine") != _said(b, "engine")


def _said(side: Side, name: str) -> str:
    return " / ".join(sorted({each.load.settings.get(name, _NOT_RECORDED) for each in side.samples}))


def load_alike(a: Side, b: Side, different: Sequence[LoadDifference]) -> list[str]:
    """What of the load itself is known on both sides and is not among the differences."""
    known = [name for name in ("model", "level", "host") if _NOT_RECORDED not in (_said(a, name), _said(b, name))]
    known += [
        _of_a_request(name)
        for name in ("prompt_tokens", "output_tokens")
        if all(any(len(getattr(each.load, name)) for each in side.samples) for side in (a, b))
    ]
    known += [
        what
        for what, name in _RATES
        if all(getattr(each.load, name) is not None for side in (a, b) for each in side.samples)
    ]
    return [what for what in known if what not in {each.what for each in different}]


def _of_a_request(name: str) -> str:
    return name.replace("_", " ") + " of a request"


def load_differences(a: Side, b: Side) -> list[LoadDifference]:
    """What is different about the loads, the most important first."""
    found = [*_settings(a, b)]
    for name in ("prompt_tokens", "output_tokens"):
        found += _lengths(name, a, b)
    found += _rates(a, b)
    return found


def _settings(a: Side, b: Side) -> list[LoadDifference]:
    names = dict.fromkeys(name for side in (a, b) for each in side.samples for name in each.load.settings)
    first = [name for name in ("engine", "model", "level") if name in names]
    order = [*first, *(name for name in names if name not in first)]
    engines = engines_differ(a, b)
    if engines and "engine_version" in order:
        order.remove("engine_version")  # of another engine
    found = []
    for name in order:
        one, other = _said(a, name), _said(b, name)
        if one != other:
            otherwise = _OF_ONE_ENGINE if engines and _NOT_RECORDED in (one, other) else _OTHERWISE
            found.append(LoadDifference(name, one, other, _MEANS.get(name, otherwise)))
    return found


def _lengths(name: str, a: Side, b: Side) -> list[LoadDifference]:
    first, second = (np.concatenate([getattr(each.load, name) for each in side.samples]) for side in (a, b))
    if not len(first) or not len(second):
        return []
    statistics = [(float(values.mean()), *np.percentile(values, (50, 95)).tolist()) for values in (first, second)]
    limits = (MOST, MOST_TAIL, MOST_TAIL)
    apart = any(_apart(one, other, most) for one, other, most in zip(*statistics, limits, strict=True))
    if not apart or not distinct(first, second):
        return []
    one, other = (f"mean {mean:.1f}, p50 {p50:g}, p95 {p95:g}" for mean, p50, p95 in statistics)
    return [
        LoadDifference(
            _of_a_request(name),
            one,
            other,
            "requests are of other lengths: latencies and rates are not of the same work",
        )
    ]


def _rates(a: Side, b: Side) -> list[LoadDifference]:
    found = []
    for what, name in _RATES:
        values = [
            [value for each in side.samples if (value := getattr(each.load, name)) is not None] for side in (a, b)
        ]
        if all(values):
            one, other = (float(np.mean(each)) for each in values)
            if _apart(one, other, MOST_RATE):
                found.append(LoadDifference(what, f"{one:.3g}", f"{other:.3g}", _MEANS[what]))
    return found


def _apart(one: float, other: float, most: float) -> bool:
    return abs(one - other) > most * max(abs(one), abs(other))


def distinct(a: np.ndarray, b: np.ndarray, level: float = 0.01) -> bool:
    """Whether chance alone would seldom make two samples of one distribution as different.

    The two-sample Kolmogorov-Smirnov test, by Massey's asymptotic bound (1951): D > sqrt(-ln(level / 2) (n + m) / 2nm).
    """
    ordered = np.sort(np.concatenate([a, b]))
    apart = np.abs(
        np.searchsorted(np.sort(a), ordered, side="right") / len(a)
        - np.searchsorted(np.sort(b), ordered, side="right") / len(b)
    )
    return bool(apart.max() > np.sqrt(-np.log(level / 2) * (len(a) + len(b)) / (2 * len(a) * len(b))))
