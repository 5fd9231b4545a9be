"""Ceilings from a calibration: the most that was measured of each component. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ceilings import Ceilings
from ..sharding import BUS_FACTORS

if TYPE_CHECKING:
    from .results import Calibration, Row


def ceilings_of(calibration: Calibration) -> Ceilings:
    """Peaks by arithmetic, the memory's bandwidth by working set, and the link's.

    A peak is the best of all products of that arithmetic, whatever their shape. A bandwidth holds for working sets of
    that size and larger ones: where a larger one was faster, its rate is taken, so that no ceiling is below what was
    seen. Reads, writes and copies count alike. The link's is the bus bandwidth of nccl-tests, of the best operation.
    """
    peaks: dict[str, float] = {}
    for row in calibration.rows:
        if row.operations and row.arithmetic:
            peaks[row.arithmetic] = max(peaks.get(row.arithmetic, 0.0), row.operations_per_s)
    links = [
        row.bytes_per_s * BUS_FACTORS[row.op](row.ranks)
        for row in calibration.rows
        if row.component == "collective" and row.op in BUS_FACTORS
    ]
    bandwidths = _bandwidths([row for row in calibration.rows if row.component == "memory"])
    return Ceilings(
        calibration.source,
        peaks,
        bandwidths[-1][1] if bandwidths else None,
        max(links, default=None),
        bandwidths,
    )


def _bandwidths(rows: list[Row]) -> tuple[tuple[float, float], ...]:
    """(bytes of the working set, bytes per second) with sizes that grow and rates that fall."""
    best: dict[int, float] = {}
    for row in rows:  # each touches its bytes over and over
        best[row.bytes] = max(best.get(row.bytes, 0.0), row.bytes_per_s)
    envelope: list[tuple[float, float]] = []
    highest = 0.0
    for size in sorted(best, reverse=True):
        highest = max(highest, best[size])
        envelope.append((float(size), highest))
    return tuple(reversed(envelope))
