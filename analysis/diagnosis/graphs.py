"""Causes in graphs, compiling and speculation: what a step ran beside what it had to. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stagetrace.instrument.stages import BY_NAME, GraphMode

from .causes import Phase
from .facts import Covered, Facts, line
from .finding import Evidence, Part, few_steps, of_steps, seen
from .thresholds import limit

if TYPE_CHECKING:
    from collections.abc import Callable

    from .finding import Answer

_GRAPHS = (GraphMode.PIECEWISE.name.lower(), GraphMode.FULL.name.lower())
_BUILDS = {BY_NAME[name].id: name for name in ("compile", "graph_capture")}


def graph_padding(facts: Facts) -> Answer:
    """The forward pass ran on more tokens than were scheduled."""
    padded = facts.step("padded_tokens")
    known = facts.steps["graph_mode"].isin(_GRAPHS).to_numpy(dtype=bool) & ~np.isnan(padded) & (facts.tokens > 0)
    if known.sum() < limit("steps"):
        return None  # no graphs, or the engine does not say
    more = np.where(known, np.clip(padded - facts.tokens, 0, None), 0.0)
    share = more / np.maximum(np.nan_to_num(padded), 1.0)
    lost = np.minimum(facts.stage("forward") + facts.stage("execute"), facts.period) * share
    waste = float(more[known].sum() / padded[known].sum())
    # What a token more costs, by the steps: padding that is free is none of our business.
    _, each = line(np.nan_to_num(padded)[known], facts.own[known])
    lost = np.minimum(lost, more * each)
    return seen(
        (of_steps(facts, lost)[1],),
        "graph_miss_share",
        also=waste >= limit("padding"),
        evidence=(
            Evidence("steps that replayed a graph", float(known.sum()), "steps"),
            Evidence("of the tokens that were run are padding", waste, "share"),
            Evidence("what a token more costs, by a line through the steps", each, "ns"),
        ),
        examples=facts.step_examples(lost),
    )


def graph_miss(facts: Facts) -> Answer:
    """Steps of decode without a graph, beside others with one."""
    mode = facts.steps["graph_mode"]
    with_graph = facts.decode_only & mode.isin(_GRAPHS).to_numpy(dtype=bool)
    without = facts.decode_only & (mode == GraphMode.NONE.name.lower()).fillna(False).to_numpy(dtype=bool)
    if with_graph.sum() < limit("steps"):
        return None  # the engine runs without graphs, or does not say
    fixed, each = line(facts.tokens[with_graph], facts.own[with_graph])
    lost = np.where(without, np.clip(facts.own - fixed - each * facts.tokens, 0, None), 0.0)
    return seen(
        (of_steps(facts, lost)[1],),
        "graph_miss_share",
        evidence=(
            Evidence("steps of decode with a graph", float(with_graph.sum()), "steps"),
            Evidence("steps of decode without", float(without.sum()), "steps"),
            Evidence(
                "tokens in these, median", float(np.median(facts.tokens[without])) if without.any() else 0.0, "tokens"
            ),
            Evidence("tokens in a step with a graph, at most", float(facts.tokens[with_graph].max()), "tokens"),
        ),
        examples=facts.step_examples(lost),
    )


def compile_in_window(facts: Facts) -> Answer:
    """Compiling or capturing after the start-up."""
    if few := few_steps(facts):
        return few
    rows = facts.now_and_then(*_BUILDS.values())
    # Ranks compile at the same time: what any of them did, once.
    ordered = rows.sort_values("begin_ns")
    begin, end = (ordered[name].to_numpy(dtype=np.float64) for name in ("begin_ns", "end_ns"))
    before = np.maximum.accumulate(np.concatenate([[0.0], end[:-1]])) if len(end) else end
    length = np.clip(end - np.maximum(begin, before), 0, None)
    nobody = np.zeros(len(facts.steps), dtype=np.int64)
    covered = Covered(nobody[:1].repeat(len(begin)), end - length, length, length)
    lost = np.minimum(covered.within(nobody, facts.done - facts.period, facts.done), facts.period)
    return seen(
        of_steps(facts, lost),
        "compile_share",
        certain=True,
        evidence=(
            *(
                Evidence(f"{name} while serving", float((rows["stage"] == stage).sum()), "times")
                for stage, name in _BUILDS.items()
            ),
            Evidence("their time", float((rows["end_ns"] - rows["begin_ns"]).sum()), "ns"),
            Evidence("steps that waited", float((lost > 0).sum()), "steps"),
        ),
        examples=facts.step_examples(lost),
    )


def speculation_does_not_pay(facts: Facts) -> Answer:
    """Drafting costs more than accepted tokens save."""
    drafts, accepted = facts.step("draft_tokens"), facts.step("accepted_tokens")
    drafting = facts.stage("draft")
    # A proposer that finds nothing to propose has taken its time as well.
    speculative = facts.decode_only & ((drafts > 0) | (drafting > 0))
    if speculative.sum() < limit("steps"):
        return None
    size, received = (facts.step(name)[speculative] for name in ("decode_requests", "output_tokens"))
    tokens = np.where(np.isnan(received), size + accepted[speculative], received)
    gain = float(tokens.sum() / max(size.sum(), 1.0))  # tokens for each that a step without drafts gives
    plain = facts.decode_only & (drafts == 0)
    own = facts.own
    if plain.sum() >= limit("steps"):
        fixed, each = line(facts.step("decode_requests")[plain], (own - drafting)[plain])
        without = np.minimum(fixed + each * facts.step("decode_requests"), own)
        compared = "steps of decode in the same session that verified nothing, without their drafting"
    else:
        without = own - drafting
        compared = "the same steps without drafting, as if verifying were free"
    would = np.where(speculative, without * gain, 0.0)  # for as many tokens
    lost = np.where(speculative, own, 0.0) - would
    worth = float(lost.sum() / max(own[speculative].sum(), 1.0))
    part = np.where(speculative, np.clip(own - without * gain, 0, None), 0.0)
    return seen(
        (Part(Phase.TPOT, facts.decoding * part, facts.interval_time),),
        "draft_share",
        also=worth > 0,
        evidence=(
            Evidence("draft tokens that were accepted", float(accepted.sum() / max(drafts.sum(), 1.0)), "share"),
            Evidence("steps of decode that had any to verify", float((drafts > 0)[speculative].mean()), "share"),
            Evidence("tokens for a request in a step", gain, "tokens"),
            Evidence(
                "drafting, of a step's time",
                float(drafting[speculative].sum() / max(own[speculative].sum(), 1.0)),
                "share",
            ),
            Evidence("time that would be saved without", worth, "share"),
        ),
        examples=facts.step_examples(part),
        note=f"Compared with {compared}.",
    )


CHECKS: dict[str, Callable[[Facts], Answer]] = {
    "graph_padding": graph_padding,
    "graph_miss": graph_miss,
    "compile_in_window": compile_in_window,
    "speculation_does_not_pay": speculation_does_not_pay,
}
