"""What a cause's check gives: what was seen of it, or why nothing can be said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stagetrace.instrument.stages import Level

from .causes import Phase
from .facts import Values
from .shares import Share, share_of
from .thresholds import limit

if TYPE_CHECKING:
    from collections.abc import Callable

    from .facts import Example, Facts


@dataclass(frozen=True)
class Evidence:
    """One number that speaks for a cause. Unit: ns, share (0 to 1), times, or what is counted."""

    what: str
    value: float
    unit: str


@dataclass(frozen=True)
class Seen:
    """What was seen of a cause. Times are request time in ns."""

    phase: Phase
    share: Share  # of the phase's time
    measured_ns: float
    recoverable_ns: float  # at most; never more than was measured
    stands_out: bool
    evidence: tuple[Evidence, ...] = ()
    examples: tuple[Example, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Missing:
    """Nothing can be said of a cause: why, and the level to record at if that would help."""

    why: str
    level: Level | None = None


def few_steps(facts: Facts, least: float = 1) -> Missing | None:
    """What is said where fewer steps were recorded than a cause needs; None where there are enough."""
    if len(facts.steps) >= least:
        return None
    if facts.level is not None and facts.level < Level.STEP:
        return Missing(f"steps are not recorded at level {facts.level.name.lower()}", Level.STEP)
    return Missing("no steps were recorded" if not len(facts.steps) else "too few steps were recorded")


Answer = Seen | Missing | None  # None: the session has nothing of the kind


@dataclass(frozen=True)
class Part:
    """A part of a phase's time, by rows (requests or steps in their order), and what of it could be saved."""

    phase: Phase
    part: Values
    whole: Values
    scale: float = 1.0  # of the phase's time what the rows' whole is

    @property
    def share(self) -> Share:
        """Of the phase's time."""
        found = share_of(np.minimum(self.part, self.whole), self.whole)
        return Share(found.value * self.scale, found.low * self.scale, found.high * self.scale)


def seen(
    parts: tuple[Part, ...],
    at_least: str | None,
    recoverable: Callable[[Part], float] | None = None,
    *,
    also: bool = True,
    certain: bool = False,
    evidence: tuple[Evidence, ...] = (),
    examples: tuple[Example, ...] = (),
    note: str = "",
) -> Seen:
    """What was seen of a cause that is a part of one or several phases: it is told of the one with most of it.

    It stands out where a share's lower end reaches the threshold `at_least`, if any, and `also` holds; then it is told
    of such a phase. What is `certain` is counted and not sampled, such as a few events: there the share itself counts.
    `recoverable` says what of a part could be saved, all of it where it is left out.
    """
    sums = [float(np.nansum(part.part)) for part in parts]
    shares = [part.share for part in parts]
    reach = [at_least is None or (share.value if certain else share.low) >= limit(at_least) for share in shares]
    most = max(range(len(parts)), key=lambda one: (reach[one], sums[one]))
    measured = sum(sums)
    saved = sum(
        min(max(recoverable(part), 0.0), total) if recoverable else total
        for part, total in zip(parts, sums, strict=True)
    )
    return Seen(
        parts[most].phase,
        shares[most],
        measured,
        min(saved, measured),
        also and reach[most],
        evidence,
        examples,
        note,
    )


def of_requests(facts: Facts, phase: Phase, part: Values) -> Part:
    """Of each request a time that is a part of its phase."""
    whole = {Phase.TTFT: facts.ttft, Phase.E2E: facts.e2e, Phase.THROUGHPUT: facts.e2e, Phase.TPOT: facts.decode}[phase]
    known = ~(np.isnan(part) | np.isnan(whole))
    return Part(phase, np.where(known, np.maximum(part, 0.0), 0.0), np.where(known, whole, 0.0))


def of_steps(facts: Facts, lost: Values) -> tuple[Part, ...]:
    """A time of each step, for those that waited for their first token, and for those that waited for the next."""
    return (
        Part(Phase.TTFT, facts.starting * lost, facts.starting * facts.period, facts.stepped_ttft),
        Part(Phase.TPOT, facts.held_up(lost), facts.interval_time),
    )


def above(usual: str) -> Callable[[Part], float]:
    """What of a part is above the usual share of its whole."""
    return lambda part: float(np.nansum(part.part) - limit(usual) * np.nansum(part.whole))
