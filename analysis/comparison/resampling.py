"""What chance makes of a difference: bootstrap intervals and permutation tests over blocks of time.

Requests that run side by side share steps, and a machine has good and bad seconds: neighbouring values are no
independent witnesses. So a session is cut into blocks of consecutive requests, and whole blocks are drawn (Carlstein,
1986; Kuensch, 1989). Several sessions of a side are drawn first, then their blocks (Davison and Hinkley, 1997, 3.8).
numpy does the drawing: the bootstraps of scipy.stats draw single values, and keep all of them.

Where each side is one session, and both have as many blocks, they are drawn in pairs: the third tenth of one load
beside the third tenth of the other. A load that grows, or has phases, is then compared with itself; where it is steady
nothing is lost.

A percentile is taken from counts by value, so that drawing costs as much with ten million values as with a thousand.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

Numbers = npt.NDArray[np.float64]
Draws = npt.NDArray[np.float64]  # draws x blocks: how often each block was drawn

BOOTSTRAPS = 2_000
PERMUTATIONS = 6_000
BINS = 1_024
LEVEL = 0.95
POWER = 0.8
FEWEST_BLOCKS = 5  # of a side: with fewer nothing is said of chance
MOST_BLOCKS = 20
_COUNTED = 10  # draws in a tail, from which their number says how likely it is
_IN_BLOCK = 2  # values at least, where there are more than _SINGLE
_SINGLE = 14  # values up to which each is a block: as many pairs can be swapped in 16,384 ways
_SEED = 20_261_126  # the same sessions give the same answer


@dataclass(frozen=True, eq=False)
class Ratio:
    """A sum over a sum, by block."""

    above: Numbers
    below: Numbers

    def value(self) -> float | None:
        """Of the whole; None where there is nothing below."""
        total = float(self.below.sum())
        return float(self.above.sum()) / total if total else None


@dataclass(frozen=True, eq=False)
class Values:
    """Single values, each counted `weights` times, and the block that each is in."""

    values: Numbers
    weights: npt.NDArray[np.int64]
    block: npt.NDArray[np.int32]
    blocks: int

    def mean(self) -> Ratio:
        """Their mean."""
        above = np.bincount(self.block, weights=self.values * self.weights, minlength=self.blocks)
        below = np.bincount(self.block, weights=self.weights, minlength=self.blocks)
        return Ratio(above.astype(np.float64), below.astype(np.float64))


@dataclass(frozen=True)
class Blocks:
    """How many blocks each session of a side has; its blocks follow one another."""

    of_session: tuple[int, ...]

    @property
    def count(self) -> int:
        """Of all sessions."""
        return sum(self.of_session)

    def draw(self, chance: np.random.Generator, draws: int) -> Draws:
        """Draws sessions, then blocks of each, with replacement: how often each block came, draws x blocks."""
        sessions = len(self.of_session)
        times = chance.multinomial(sessions, [1 / sessions] * sessions, size=draws)
        parts = [
            chance.multinomial(times[:, place] * size, [1 / size] * size).astype(np.float64)
            for place, size in enumerate(self.of_session)
            if size
        ]
        return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class Difference:
    """What is known of a difference B - A."""

    low: float | None  # the interval's ends
    high: float | None
    change_low: float | None  # the same over A's value
    change_high: float | None
    p: float | None
    effect: float | None  # Cliff's delta
    error: float | None  # the bootstrap's standard error of the difference


def blocks_for(values: int) -> int:
    """Into how many blocks so many values are cut."""
    return max(1, min(MOST_BLOCKS, max(values // _IN_BLOCK, min(values, _SINGLE))))


class Comparison:
    """Draws of two sides. `same`: A and B are the same sessions, whose difference is nothing, however it is drawn."""

    def __init__(self, a: Blocks, b: Blocks, same: bool = False):
        chance = np.random.default_rng(_SEED)
        self.a, self.b, self.same = a, b, same
        self.enough = min(a.count, b.count) >= FEWEST_BLOCKS
        self.paired = a == b and len(a.of_session) == 1  # several sessions come in no order
        self.drawn_a = a.draw(chance, BOOTSTRAPS)
        self.drawn_b = self.drawn_a if same or self.paired else b.draw(chance, BOOTSTRAPS)
        # Which blocks are taken for A's: always as many as it has; of a pair one.
        if self.paired:
            first = chance.integers(0, 2, (PERMUTATIONS, a.count)).astype(np.float64)
            self.mixed = np.concatenate([first, 1 - first], axis=1)
        else:
            order = chance.permuted(np.tile(np.arange(a.count + b.count), (PERMUTATIONS, 1)), axis=1)
            self.mixed = (order < a.count).astype(np.float64)
        self.mixed[0] = np.arange(a.count + b.count) < a.count  # as they are

    def of_ratios(self, a: Ratio, b: Ratio, level: float = LEVEL) -> Difference:
        """A difference of two ratios."""

        def values(drawn: Draws, ratio: Ratio) -> Numbers:
            return _divided(drawn @ ratio.above, drawn @ ratio.below)

        above, below = (np.concatenate([getattr(a, name), getattr(b, name)]) for name in ("above", "below"))
        mixed = _divided((1 - self.mixed) @ above, (1 - self.mixed) @ below) - _divided(
            self.mixed @ above, self.mixed @ below
        )
        blocks_a, blocks_b = (_divided(each.above, each.below) for each in (a, b))
        effect = cliffs_delta(blocks_a[~np.isnan(blocks_a)], blocks_b[~np.isnan(blocks_b)])
        return self._judged(values(self.drawn_a, a), values(self.drawn_b, b), mixed, effect, a.value(), level)

    def of_percentiles(
        self, a: Values, b: Values, percentiles: Sequence[int], level: float = LEVEL
    ) -> dict[int, Difference]:
        """Differences of percentiles of the same values."""
        edges, counts = counted([a, b])
        own_a, own_b = counts[: a.blocks], counts[a.blocks :]
        drawn_a = percentiles_of(self.drawn_a, own_a, edges, percentiles)
        drawn_b = drawn_a if self.same else percentiles_of(self.drawn_b, own_b, edges, percentiles)
        mixed_a = percentiles_of(self.mixed, counts, edges, percentiles)
        mixed_b = percentiles_of(1 - self.mixed, counts, edges, percentiles)
        total_a, total_b = own_a.sum(axis=0), own_b.sum(axis=0)
        effect = _delta_of_counts(total_a, total_b)
        whole = percentiles_of(np.ones((1, len(own_a))), own_a, edges, percentiles)
        return {
            percentile: self._judged(
                drawn_a[place], drawn_b[place], mixed_b[place] - mixed_a[place], effect, float(whole[place][0]), level
            )
            for place, percentile in enumerate(percentiles)
        }

    def interval_of_b(self, b: Values | Ratio, percentile: int | None, level: float) -> tuple[float, float] | None:
        """The interval of B's own value; None where there are too few blocks."""
        if not self.enough:
            return None
        if isinstance(b, Ratio):
            drawn = _divided(self.drawn_b @ b.above, self.drawn_b @ b.below)
        else:
            edges, counts = counted([b])
            (drawn,) = percentiles_of(self.drawn_b, counts, edges, [percentile or 0])
        drawn = drawn[~np.isnan(drawn)]
        return _interval(drawn, level) if len(drawn) else None

    def _judged(
        self, a: Numbers, b: Numbers, mixed: Numbers, effect: float | None, base: float | None, level: float
    ) -> Difference:
        if self.same:
            return Difference(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
        known = ~(np.isnan(a) | np.isnan(b))
        if not self.enough or not known.any() or base is None:
            return Difference(None, None, None, None, None, effect, None)
        drawn = (b - a)[known]
        low, high = _interval(drawn, level)
        changes = _divided(drawn, a[known])
        changes = changes[~np.isnan(changes)]
        change_low, change_high = _interval(changes, level) if len(changes) else (None, None)
        by_bootstrap = _tail(drawn)
        mixed = np.abs(mixed[~np.isnan(mixed)])
        by_permutation = float((mixed >= mixed[0] * (1 - 1e-9)).mean()) if len(mixed) else 1.0
        return Difference(
            low, high, change_low, change_high, max(by_bootstrap, by_permutation), effect, float(drawn.std())
        )


def _tail(drawn: Numbers) -> float:
    """The two-sided share of draws beyond no difference; by the normal distribution where too few are for counting."""
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    if beyond >= _COUNTED:
        return min(1.0, 2 * beyond / len(drawn))
    spread = float(drawn.std())
    far = 2 * NormalDist().cdf(-abs(float(drawn.mean())) / spread) if spread else float(not drawn.any())
    return min(far, 2 * _COUNTED / len(drawn))


def _interval(drawn: Numbers, level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _divided(above: Numbers, below: Numbers) -> Numbers:
    found = np.full(np.shape(above), np.nan)
    np.divide(above, below, out=found, where=np.asarray(below) != 0)
    return found


# Counts by value


def counted(sides: Sequence[Values]) -> tuple[Numbers, Numbers]:
    """The values that occur, and how often each does in every block: blocks x values.

    Where there are more than BINS they are put together in bins of the same ratio, a value being its bin's middle.
    """
    pooled = np.concatenate([side.values for side in sides])
    distinct = np.unique(pooled) if len(pooled) <= 4 * BINS else pooled
    if len(distinct) <= BINS:
        edges: Numbers = distinct.astype(np.float64)
        places = [np.searchsorted(edges, side.values) for side in sides]
    else:
        low, high = max(float(pooled.min()), 1e-9), max(float(pooled.max()), 2e-9)
        bounds = np.geomspace(low, high, BINS + 1)
        places = [np.clip(np.searchsorted(bounds, side.values, side="right") - 1, 0, BINS - 1) for side in sides]
        edges = np.sqrt(bounds[:-1] * bounds[1:])
    rows = []
    for side, place in zip(sides, places, strict=True):
        flat = np.bincount(side.block * len(edges) + place, weights=side.weights, minlength=side.blocks * len(edges))
        rows.append(flat.reshape(side.blocks, len(edges)))
    return edges, np.concatenate(rows)


def percentiles_of(drawn: Draws, counts: Numbers, edges: Numbers, percentiles: Sequence[int]) -> list[Numbers]:
    """Percentiles of each draw of blocks: the value at which that share of it is reached; NaN where it has none.

    By bisection over the values, so that a draw's counts need not be added up for all of them.
    """
    ends = np.ascontiguousarray(np.cumsum(counts, axis=1).T)  # values x blocks
    total = drawn @ ends[-1]
    found = []
    for percentile in percentiles:
        target = total * percentile / 100 - 1e-9
        low, high = np.zeros(len(drawn), np.int64), np.full(len(drawn), len(edges) - 1)
        while (low < high).any():
            middle = (low + high) // 2
            reached = np.einsum("ij,ij->i", drawn, ends[middle]) >= target
            low, high = np.where(reached, low, np.minimum(middle + 1, high)), np.where(reached, middle, high)
        found.append(np.where(total > 0, edges[low], np.nan))
    return found


def _delta_of_counts(a: Numbers, b: Numbers) -> float | None:
    """Cliff's delta of values that occur so often."""
    both = float(a.sum() * b.sum())
    if not both:
        return None
    below = np.cumsum(a) - a
    above = a.sum() - np.cumsum(a)
    return float((b * (below - above)).sum() / both)


def cliffs_delta(a: Numbers, b: Numbers) -> float | None:
    """P(B > A) - P(B < A) of two values drawn at random (Cliff, 1993); None where a side has none."""
    if not len(a) or not len(b):
        return None
    ordered = np.sort(a)
    less = np.searchsorted(ordered, b, side="left").sum()
    more = (len(a) - np.searchsorted(ordered, b, side="right")).sum()
    return float(less - more) / (len(a) * len(b))


# Many at once


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (1979): the chance of any false finding among all of them stays what one had."""
    known = sorted((value, place) for place, value in enumerate(p) if value is not None)
    adjusted: list[float | None] = [None] * len(p)
    worst = 0.0
    for rank, (value, place) in enumerate(known):
        worst = max(worst, min(1.0, value * (len(known) - rank)))
        adjusted[place] = worst
    return adjusted


def smallest_shown(error: float | None, metrics: int) -> float | None:
    """The smallest difference that is found with POWER, by its standard error and the number of metrics."""
    if error is None:
        return None
    normal: Any = NormalDist()
    return float((normal.inv_cdf(1 - (1 - LEVEL) / 2 / max(metrics, 1)) + normal.inv_cdf(POWER)) * error)
