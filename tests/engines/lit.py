"""What holds of the speed of light of every recorded session: nothing is faster than it, and gaps add up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stagetrace.analysis.speed_of_light import MEASURED

if TYPE_CHECKING:
    from stagetrace.analysis.speed_of_light import SpeedOfLight

MOST = 1.05  # of a measured ceiling: what calibration itself varies by


def assert_lit(light: SpeedOfLight) -> None:
    """Each kind of step and each stage is within its ceiling, and the parts of each gap are all of it."""
    assert light.phases and light.ceilings[MEASURED].peaks
    for name, done in {**light.phases, **light.stages}.items():
        share = done.share(MEASURED)
        assert (share is None) == (done.time_ns is None), name
        assert share is None or 0 <= share < MOST, name
    for name, done in light.phases.items():
        gap, least = done.gap, done.roofs[MEASURED].whole_ns
        assert gap is not None and least is not None and done.time_ns is not None
        assert gap.total_ns == done.time_ns - round(least), name
        assert sum(part or 0 for part in gap.parts.values()) + gap.untold_ns == gap.total_ns, name
        assert gap.untold_ns == 0 and gap.host_ns > 0, name
