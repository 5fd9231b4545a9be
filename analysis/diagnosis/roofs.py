"""Causes that are told by the speed of light: phases at the memory's roof, or far from any. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .facts import Facts, Flags
from .finding import Evidence, Missing, of_steps, seen
from .thresholds import limit

if TYPE_CHECKING:
    from collections.abc import Callable

    from .finding import Answer, Seen


def _known(facts: Facts, chosen: Flags) -> Missing | None:
    if facts.least_ns is None:
        return Missing(facts.no_light or "the speed of light is not known")
    if chosen.sum() < limit("steps"):
        return Missing("too few steps of the kind")
    return None


def _far(facts: Facts, chosen: Flags, phase: int) -> Seen:
    """Time that steps of a kind took beyond `far_below` of the speed of light."""
    assert facts.least_ns is not None
    least, own = facts.least_ns, facts.own
    long_enough = chosen & (least >= limit("long_enough"))
    reach = least / limit("far_below")  # what would not be far
    lost = np.where(long_enough, np.clip(own - reach, 0, None), 0.0)
    light = float(least[chosen].sum() / max(own[chosen].sum(), 1.0))
    return seen(
        (of_steps(facts, lost)[phase],),
        "far_share",
        also=bool(long_enough.sum() >= limit("steps")),
        evidence=(
            Evidence("steps of the kind", float(chosen.sum()), "steps"),
            Evidence("a step's time, median", float(np.median(own[chosen])), "ns"),
            Evidence("at the speed of light, median", float(np.median(least[chosen])), "ns"),
            Evidence("of the speed of light, all of them", light, "share"),
        ),
        examples=facts.step_examples(lost),
    )


def prefill_inefficient(facts: Facts) -> Answer:
    """Steps with prefill are far from any roof."""
    chosen = ~facts.decode_only
    return _known(facts, chosen) or _far(facts, chosen, 0)


def decode_far_below_roof(facts: Facts) -> Answer:
    """Steps of decode are far from any roof."""
    chosen = facts.decode_only
    return _known(facts, chosen) or _far(facts, chosen, 1)


def decode_at_roof(facts: Facts) -> Answer:
    """Steps of decode take little longer than moving their bytes."""
    chosen = facts.decode_only
    if missing := _known(facts, chosen):
        return missing
    if facts.memory_ns is None:
        return Missing("the memory's bandwidth is not known")
    own, memory = facts.own, facts.memory_ns
    used = float(memory[chosen].sum() / max(own[chosen].sum(), 1.0))
    bound = np.where(chosen, np.minimum(memory, own), 0.0)
    return seen(
        (of_steps(facts, bound)[1],),
        "at_roof",
        lambda _: 0.0,
        also=used >= limit("at_roof"),
        evidence=(
            Evidence("of the memory's bandwidth in steps of decode (MBU)", min(used, 1.0), "share"),
            Evidence("a step's time, median", float(np.median(own[chosen])), "ns"),
            Evidence("moving its bytes, median", float(np.median(memory[chosen])), "ns"),
        ),
        examples=facts.step_examples(bound),
        note="Nothing can be recovered but by moving fewer bytes for a token.",
    )


CHECKS: dict[str, Callable[[Facts], Answer]] = {
    "prefill_inefficient": prefill_inefficient,
    "decode_at_roof": decode_at_roof,
    "decode_far_below_roof": decode_far_below_roof,
}
