"""Looks for every cause in a session and ranks what stands out by the time that could be recovered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..architecture import Experts
from ..load import load
from ..speed_of_light import Served, ceilings_for, preferred, served, work_of
from . import front_end, graphs, host, parallel, prefill, queueing, roofs
from .causes import BY_ID, CAUSES, Cause, Phase
from .facts import STAGES, Facts, columns
from .finding import Missing, Seen
from .thresholds import limit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stagetrace.exporters.session import Session

    from ..architecture import Model
    from .finding import Answer

CHECKS: dict[str, Callable[[Facts], Answer]] = {
    name: check
    for family in (queueing, prefill, roofs, host, front_end, parallel, graphs)
    for name, check in family.CHECKS.items()
}
NOT_ENOUGH = "not enough data"
NOTHING = "nothing stands out"


@dataclass(frozen=True)
class Finding:
    """A cause that stands out, with what was seen of it."""

    cause: Cause
    seen: Seen
    recoverable_share: float  # of all requests' time
    attributed: float | None  # how much of the phase's time is accounted for at all


@dataclass(frozen=True)
class Attributed:
    """How much of a phase's time, over all requests, is accounted for by stages and states."""

    total_ns: float
    share: float | None  # None: there is none


@dataclass(frozen=True)
class Diagnosis:
    """What stands out in a session, what does not, and what could not be looked at."""

    path: str
    session: str
    engine: str
    version: str
    level: str
    last_s: float | None
    requests: int  # that were measured
    steps: int  # that were complete
    request_time_ns: float
    attributed: dict[Phase, Attributed]
    findings: tuple[Finding, ...]  # the most recoverable first
    quiet: dict[str, Seen]  # looked at, and below its threshold
    absent: tuple[str, ...]  # causes of which the session has nothing
    missing: dict[str, Missing]
    answer: str  # empty where there are findings, else NOTHING or NOT_ENOUGH with what to do


def diagnose(
    session: Session,
    last_s: float | None = None,
    model_config: Path | None = None,
    calibration: Path | None = None,
) -> Diagnosis:
    """Of a session, or of its last `last_s` seconds; `model_config` and `calibration` as in speed_of_light.

    Raises SessionError, ConfigError and CalibrationError.
    """
    frames = load(session, last_s, columns(session.read_manifest()), STAGES)
    facts = Facts.of(frames.manifest, session.identity.key, frames.tables)
    facts = with_light(facts, session, model_config, calibration)
    return of_facts(facts, str(session.path), last_s)


def with_light(facts: Facts, session: Session, model_config: Path | None, calibration: Path | None) -> Facts:
    """The facts with each step's least time, or with the reason why it is not known."""
    found = served(facts.manifest, session.model_config, model_config)
    ceilings, notes = ceilings_for(facts.manifest, calibration)
    if not isinstance(found, Served):
        return replace(facts, no_light=found or "no process said which model it serves")
    facts = replace(facts, has_experts=_has_experts(found.model))
    kind = preferred(ceilings)
    if kind is None or not len(facts.steps):
        return replace(facts, no_light=" ".join(notes))
    least = work_of(found, facts.steps, facts.experts).least(ceilings[kind])
    shape = (len(facts.steps),)
    whole, memory = (
        None if seconds is None else np.broadcast_to(np.asarray(seconds, dtype=np.float64) * 1e9, shape)
        for seconds in (least.whole, least.memory)
    )
    return replace(
        facts, least_ns=whole, memory_ns=memory, no_light="" if whole is not None else "a ceiling is missing"
    )


def _has_experts(model: Model) -> bool:
    return any(isinstance(layer.feed_forward, Experts) for layer in model.layers)


def of_facts(facts: Facts, path: str = "", last_s: float | None = None) -> Diagnosis:
    """What stands out. Pure."""
    answers: dict[str, Answer] = {}
    enough = len(facts.requests) >= limit("requests") and facts.request_time > 0
    if enough:
        answers = {cause.id: CHECKS[cause.id](facts) for cause in CAUSES}
    seen = {name: _if_worth(answer, facts) for name, answer in answers.items() if isinstance(answer, Seen)}
    accounted = attributed(facts)
    found = [
        Finding(BY_ID[name], each, min(each.recoverable_ns / facts.request_time, 1.0), accounted[each.phase].share)
        for name, each in seen.items()
        if each.stands_out
    ]
    found.sort(key=lambda finding: (-finding.seen.recoverable_ns, -finding.seen.measured_ns))
    return Diagnosis(
        path=path,
        session=facts.manifest.session,
        engine=facts.engine,
        version=str(facts.info.get("engine_version", "")),
        level=facts.manifest.level,
        last_s=last_s,
        requests=len(facts.requests),
        steps=len(facts.steps),
        request_time_ns=facts.request_time,
        attributed=accounted,
        findings=tuple(found),
        quiet={name: each for name, each in seen.items() if not each.stands_out},
        absent=tuple(name for name, answer in answers.items() if answer is None),
        missing={name: answer for name, answer in answers.items() if isinstance(answer, Missing)},
        answer="" if found else _answer(facts, enough),
    )


def _if_worth(seen: Seen, facts: Facts) -> Seen:
    """Of little that could be recovered nothing stands out; where nothing could be, by nature, it is worth knowing."""
    little = 0 < seen.recoverable_ns < limit("worth") * facts.request_time
    return replace(seen, stands_out=seen.stands_out and not little)


def _answer(facts: Facts, enough: bool) -> str:
    if enough:
        return f"{NOTHING}: no cause in the table reaches its threshold in {len(facts.requests)} requests."
    return (
        f"{NOT_ENOUGH}: {len(facts.requests)} requests were recorded from beginning to end, and a finding needs"
        f" {limit('requests'):.0f}. Send more requests while it records, or name a longer --last."
    )


def attributed(facts: Facts) -> dict[Phase, Attributed]:
    """How much of each phase is accounted for: of TTFT by a request's states, of TPOT by the stages of its steps."""
    tokenize, dispatch, queue, prefill = facts.request("tokenize_ns", "dispatch_ns", "queue_ns", "prefill_ns")
    first, output = facts.request("first_token_ns", "first_output_ns")
    states = sum((np.nan_to_num(each) for each in (tokenize, dispatch, queue, prefill)), np.zeros(len(facts.requests)))
    states = states + np.clip(np.nan_to_num(output - first), 0, None)
    known = ~np.isnan(facts.ttft)
    ttft = float(facts.ttft[known].sum())
    in_states = float(np.minimum(states, np.nan_to_num(facts.ttft))[known].sum())
    tpot = float(facts.interval_time.sum())
    in_steps = facts.held_up(np.clip(facts.period - facts.step("unattributed_ns"), 0, None))
    stepped = min(float(in_steps.sum()) / tpot, 1.0) if tpot > 0 else None
    # All of a request: until the first token, from there to the last, and until that was handed over.
    last, end = facts.request("last_token_ns", "end_ns")
    rest = float(np.nansum(np.clip(end - last, 0, None)))
    decode = float(np.nansum(facts.decode))
    whole = facts.request_time
    known_part = (in_states + (stepped or 0.0) * decode + rest) / whole if whole > 0 else None
    all_of_it = Attributed(whole, None if known_part is None else min(known_part, 1.0))
    return {
        Phase.TTFT: Attributed(ttft, in_states / ttft if ttft > 0 else None),
        Phase.TPOT: Attributed(tpot, stepped),
        Phase.E2E: all_of_it,
        Phase.THROUGHPUT: all_of_it,
    }
