"""What one device does at most, by its data sheet or measured, and the least time that work takes under it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .batch import Numbers
    from .hardware import Device
    from .operations import Work
    from .sharding import Collective

# Arithmetic that a device lacks is done in a wider one, in this order: weights are widened when they are read.
_WIDER = {"fp4": "fp8", "fp6": "fp8", "fp8": "bf16", "int4": "int8", "int8": "bf16", "bf16": "fp16", "fp16": "bf16"}


@dataclass(frozen=True)
class Ceilings:
    """What one device does at most; what is not known is absent or None."""

    source: str
    peaks: dict[str, float]  # operations per second, by arithmetic
    bandwidth: float | None  # of memory, bytes per second
    link: float | None  # bytes per second and direction
    bandwidths: tuple[tuple[float, float], ...] = ()  # measured: (bytes of the working set, bytes per second)

    @classmethod
    def of(cls, device: Device) -> Ceilings:
        """Those of a device's data sheet."""
        return cls(str(device.source), device.peaks, device.bandwidth, device.link_bandwidth)

    def peak(self, arithmetic: str) -> float | None:
        """Of an arithmetic, or of the next wider one that the device has: fp8 weights on a device without fp8."""
        tried: list[str] = []
        while arithmetic not in self.peaks and arithmetic in _WIDER and arithmetic not in tried:
            tried.append(arithmetic)
            arithmetic = _WIDER[arithmetic]
        return self.peaks.get(arithmetic)

    def bandwidth_at(self, working_set: Numbers) -> Numbers | float | None:
        """Of memory, for a working set in bytes: caches hold small ones. Between sizes that were measured it is
        interpolated over the logarithm of the size.
        """
        if not self.bandwidths:
            return self.bandwidth
        sizes, rates = np.array(self.bandwidths).T
        found: Numbers = np.interp(np.log(np.maximum(working_set, 1.0)), np.log(sizes), rates)
        return found


@dataclass(frozen=True, eq=False)
class LeastTimes:
    """The least time of work under each roof, in seconds; None where a ceiling is not known that is needed."""

    compute: Numbers | None
    memory: Numbers | None
    link: Numbers | None
    whole: Numbers | None  # of work whose parts may all overlap: the longest

    @classmethod
    def mean(cls, several: Sequence[LeastTimes]) -> LeastTimes:
        """Of ranks that work at the same time, each on a part of its own."""

        def mean(values: list[Numbers | None]) -> Numbers | None:
            known = [value for value in values if value is not None]
            return sum(known, np.asarray(0.0)) / len(values) if len(known) == len(values) else None

        return cls(
            *(mean([getattr(each, name) for each in several]) for name in ("compute", "memory", "link", "whole"))
        )


def least_times(works: Iterable[Work], collectives: Iterable[Collective], ceilings: Ceilings) -> LeastTimes:
    """The roofline (Williams et al., Roofline, 2009) with the link as a third roof.

    Activations are taken to stay in caches, so that this is a lower bound.
    """
    compute: Numbers | None = np.asarray(0.0)
    moved = np.asarray(0.0)
    for work in works:
        peak = ceilings.peak(work.arithmetic)
        if peak is None and np.any(work.operations):
            compute = None
        elif compute is not None:
            compute = compute + work.operations / (peak or 1.0)
        moved = moved + work.bytes
    bandwidth = ceilings.bandwidth_at(moved)
    memory = moved / bandwidth if bandwidth is not None else None if np.any(moved) else moved
    sent = sum((each.bus_bytes for each in collectives), np.asarray(0.0))
    link = sent / ceilings.link if ceilings.link is not None else None if np.any(sent) else sent
    whole: Numbers | None = None
    if compute is not None and memory is not None and link is not None:
        whole = np.maximum(np.maximum(compute, memory), link)
    return LeastTimes(compute, memory, link, whole)
