"""Shares of time with their confidence intervals: a bootstrap over blocks of consecutive requests or steps. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

MOST_BLOCKS = 100
RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 10  # the same session gives the same interval


@dataclass(frozen=True)
class Share:
    """A part of some time, 0 to 1, and the confidence interval of it."""

    value: float
    low: float
    high: float

    @classmethod
    def none(cls) -> Share:
        """Of nothing."""
        return cls(0.0, 0.0, 0.0)


def share_of(part: npt.ArrayLike, whole: npt.ArrayLike) -> Share:
    """The sum of `part` over that of `whole`, in the order in which things happened.

    A moving machine makes neighbours alike, so that blocks of neighbours are drawn with replacement, not single rows
    (Künsch 1989, The jackknife and the bootstrap for general stationary observations, without overlap of blocks); the
    interval lies between percentiles of the drawn ratios. What exceeds the whole, by rounding or overlap, is cut.
    """
    parts, wholes = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    if not len(parts) or wholes.sum() <= 0:
        return Share.none()
    blocks = min(len(parts), MOST_BLOCKS)
    starts = np.linspace(0, len(parts), blocks, endpoint=False).astype(np.int64)
    parts, wholes = np.add.reduceat(parts, starts), np.add.reduceat(wholes, starts)
    drawn = np.random.default_rng(SEED).multinomial(blocks, np.full(blocks, 1 / blocks), size=RESAMPLES)
    totals = drawn @ wholes
    ratios = np.divide(drawn @ parts, totals, out=np.zeros(RESAMPLES), where=totals > 0)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    value = parts.sum() / wholes.sum()
    return Share(*(float(min(max(each, 0.0), 1.0)) for each in (value, min(low, value), max(high, value))))
