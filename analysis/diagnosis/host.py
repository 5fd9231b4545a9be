"""Causes on the host's side of a step: scheduling, preparing, sampling, garbage collection, grammars. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .causes import Phase
from .facts import Facts, Values
from .finding import Evidence, above, few_steps, of_requests, of_steps, seen
from .thresholds import limit

if TYPE_CHECKING:
    from collections.abc import Callable

    from .finding import Answer


def _of_steps(facts: Facts, lost: Values, share: str, usual: str | None, stages: tuple[str, ...]) -> Answer:
    """Stages that hold up the steps they are in."""
    if few := few_steps(facts, limit("steps")):
        return few
    by_stage = [
        Evidence(f"{stage}, of a step's time", _part(facts.stage(stage), facts.period), "share")
        for stage in stages
        if facts.has(stage)
    ]
    return seen(
        of_steps(facts, lost),
        share,
        above(usual) if usual else None,
        evidence=(
            Evidence("of a step, median", float(np.median(lost)), "ns"),
            Evidence("a step's time, median", float(np.median(facts.period)), "ns"),
            *by_stage,
        ),
        examples=facts.step_examples(lost * (facts.starting + facts.decoding)),
    )


def _part(times: Values, whole: Values) -> float:
    total = float(whole.sum())
    return float(times.sum()) / total if total > 0 else 0.0


def _not_hidden(facts: Facts, work: Values, *waits: str) -> Values:
    """Of a thread's own work in each step what others waited for.

    Where steps overlap, the work is done while the step before runs: as far as the thread then still waits for that,
    the work held up nobody.
    """
    overlaps = facts.own < 0.99 * (facts.step("end_ns") - facts.step("begin_ns"))
    return np.where(overlaps, np.clip(work - facts.uncut(*waits), 0, None), work)


def host_schedule(facts: Facts) -> Answer:
    """The scheduler's own work."""
    stages = ("schedule", "update", "emit", "dp_sync", "between")
    lost = _not_hidden(facts, facts.stage(*stages), "execute")
    return _of_steps(facts, lost, "schedule_share", "schedule_usual", stages)


def host_prepare(facts: Facts) -> Answer:
    """Building the inputs of the forward pass."""
    lost = _not_hidden(facts, facts.stage("prepare"), "bookkeep")
    return _of_steps(facts, lost, "prepare_share", "prepare_usual", ("prepare",))


def host_sampling(facts: Facts) -> Answer:
    """Choosing tokens from the logits."""
    lost = _not_hidden(facts, facts.stage("sample"), "bookkeep")
    return _of_steps(facts, lost, "sampling_share", "sampling_usual", ("sample",))


def gc_pauses(facts: Facts) -> Answer:
    """Collections in the processes that make steps."""
    return _of_steps(facts, facts.stage("gc_pause"), "gc_share", None, ("gc_pause",))


def grammar(facts: Facts) -> Answer:
    """Grammars that are compiled while their request waits, and bitmasks that are filled while a step waits."""
    (compiling,) = facts.request("grammar_ns")
    compiling = np.nan_to_num(compiling)
    filling = facts.stage("grammar")
    if not compiling.any() and not filling.any():
        return None  # no structured output
    ttft, tpot = of_steps(facts, filling)
    parts = [of_requests(facts, Phase.TTFT, compiling)]
    if len(facts.steps):
        parts += [ttft, tpot]
    return seen(
        tuple(parts),
        "grammar_share",
        evidence=(
            Evidence("requests that waited for their grammar", float((compiling > 0).sum()), "requests"),
            Evidence("the longest wait", float(compiling.max()) if len(compiling) else 0.0, "ns"),
            Evidence("steps with a bitmask to fill", float((filling > 0).sum()), "steps"),
            Evidence("filling one, on average", float(filling[filling > 0].mean()) if filling.any() else 0.0, "ns"),
        ),
        examples=(*facts.request_examples(compiling), *facts.step_examples(filling)),
    )


CHECKS: dict[str, Callable[[Facts], Answer]] = {
    "host_schedule": host_schedule,
    "host_prepare": host_prepare,
    "host_sampling": host_sampling,
    "gc_pauses": gc_pauses,
    "grammar": grammar,
}
