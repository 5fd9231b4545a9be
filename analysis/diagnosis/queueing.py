"""Who waits in the queue and for what: capacity, the batch's cap, the token budget, the KV cache. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..queueing import Wait, causes_of_steps, split_queue, waits
from .causes import Phase
from .facts import Covered, Facts, Flags, Values, line
from .finding import Evidence, Missing, Part, few_steps, of_requests, seen
from .thresholds import limit

if TYPE_CHECKING:
    from .finding import Answer

# Where the engine says itself why requests waited: columns of the requests.
TOLD = {Wait.KV_SPACE: "kv_space_ns", Wait.BATCH_FULL: "batch_full_ns", Wait.TOKEN_BUDGET: "token_budget_ns"}


def full_batch(facts: Facts) -> Flags:
    """Steps after which as many requests were running as may."""
    cap = facts.setting("max_num_seqs")
    return facts.step("running") >= cap if cap else np.zeros(len(facts.steps), dtype=bool)


def full_budget(facts: Facts) -> Flags:
    """Steps that have prefill and as many tokens as they may."""
    prefill = facts.step("prefill_tokens") > 0
    budget = facts.setting("max_num_batched_tokens")
    if budget:
        return (facts.tokens >= budget) & prefill
    chunk = facts.setting("chunked_prefill_size")  # in a mixed step, decode's tokens are of it as well
    page = max(facts.setting("block_size"), 1)  # chunks end with a page
    return (facts.tokens > chunk - page) & prefill if chunk else np.zeros(len(facts.steps), dtype=bool)


def fixed_part(facts: Facts) -> float:
    """What a step costs whatever is in it, of one with as many tokens as it may have; 0 where that is not known."""
    budget = facts.setting("max_num_batched_tokens", "chunked_prefill_size")
    fixed, each = facts.cost
    return fixed / (fixed + each * budget) if budget and fixed > 0 else 0.0


def for_chunks(facts: Facts) -> Values:
    """Of each step the time that is there because the budget is small, ns: a larger one would save it.

    It is the fixed part of full steps, where that is large. Where requests in decode get their token in such a step as
    well (mixed batches), it is theirs: they need as many steps with any budget.
    """
    part = fixed_part(facts)
    if part < limit("fixed_share"):
        return np.zeros(len(facts.steps))
    return np.where(_prefill_alone(facts), part * facts.own, 0.0)


def _prefill_alone(facts: Facts) -> Flags:
    """Full steps in which requests in decode have to wait."""
    return np.asarray(full_budget(facts) & (facts.step("decode_requests") == 0), dtype=np.bool_)


def _typical_prompt(facts: Facts) -> float | None:
    (prompt,) = facts.request("prompt_tokens")
    return None if np.isnan(prompt).all() else float(np.nanmedian(prompt))


def why_waiting(facts: Facts, cause: Wait) -> Flags:
    """Steps that left requests in the queue for a cause, as far as the step's own record says."""
    causes = causes_of_steps(facts.steps, facts.manifest.processes, _typical_prompt(facts))
    return np.asarray((facts.step("waiting") > 0) & (causes == cause), dtype=np.bool_)


def queued_by(facts: Facts, cause: Wait) -> Values:
    """Of each request its time in the queue for a cause, ns: as the engine said, else by the steps meanwhile."""
    rows = facts.requests
    if any(name in rows and rows[name].notna().any() for name in TOLD.values()):
        return np.nan_to_num(facts.request(TOLD[cause])[0])
    queued, grammar, scheduled = facts.request("queued_ns", "grammar_ns", "scheduled_ns")
    found = np.zeros(len(rows))
    known = np.flatnonzero(~np.isnan(scheduled - queued))
    if not len(known) or not len(facts.steps):
        return found
    begin = (queued + np.nan_to_num(grammar))[known].astype(np.int64)
    end = np.maximum(scheduled[known].astype(np.int64), begin)
    pieces = waits(facts.steps, facts.manifest.processes, _typical_prompt(facts))
    parts = split_queue(pieces, rows["instance"].iloc[known], begin, end, np.zeros(len(known), dtype=bool))
    found[known] = parts[cause]
    return found


def _queued(facts: Facts, cause: Wait) -> tuple[Evidence, ...]:
    flags = why_waiting(facts, cause)
    waiting = facts.step("waiting")
    return (
        Evidence("steps that left requests in the queue for it", float(flags.sum()), "steps"),
        Evidence("waiting then, on average", float(waiting[flags].mean()) if flags.any() else 0.0, "requests"),
        Evidence(
            "running then, on average", float(facts.step("running")[flags].mean()) if flags.any() else 0.0, "requests"
        ),
    )


def decode_line(facts: Facts) -> tuple[float, float] | None:
    """How long a step of decode takes: ns whatever is in it, and ns for each request; None where that is not known.

    By a line through their durations. It ignores that attention's part grows with context, and steps with prefill. It
    takes batches of several sizes: those few that a load leaves when it ends are no measure of the others.
    """
    size, took = facts.step("decode_requests")[facts.decode_only], facts.own[facts.decode_only]
    return line(size, took) if _smaller_batches(facts) >= limit("smaller_batches") else None


def _smaller_batches(facts: Facts) -> float:
    """The share of decode steps whose batch is a good deal smaller than the usual full one; 0 without any."""
    size = facts.step("decode_requests")[facts.decode_only]
    return float((size < 0.75 * _full(facts)).mean()) if len(size) else 0.0


def _full(facts: Facts) -> float:
    """The usual full batch of decode: larger ones are rare."""
    return float(np.percentile(facts.step("decode_requests")[facts.decode_only], 90))


def larger_batch_gain(facts: Facts) -> float | None:
    """What twice the requests in a batch would add to tokens per second, 0 to 1, by decode_line; None: not known."""
    found = decode_line(facts)
    if found is None:
        return None
    fixed, each = found
    full = _full(facts)
    now, then = fixed + each * full, fixed + each * 2 * full
    return 2 * now / then - 1 if then > 0 else 0.0


def left_of(facts: Facts, queue: Values, flags: Flags) -> float:
    """What of a time in the queue would be saved if all that waited ran: less what their steps would get longer, ns.

    By decode_line, all of it where that is not known; prefill is the same work either way. The line is not continued
    beyond twice the usual full batch: what it says of larger ones is no longer a bound.
    """
    found = decode_line(facts)
    if not flags.any() or found is None:
        return float(queue.sum())
    fixed, each = found
    now = float(facts.step("running")[flags].mean())
    then = min(now + float(facts.step("waiting")[flags].mean()), 2 * _full(facts))
    longer = each * max(then - now, 0.0) / (fixed + each * now) if fixed + each * now > 0 else 0.0
    return float(queue.sum()) - longer * float(np.nansum(facts.decode))


def batch_cap(facts: Facts) -> Answer:
    """The batch is as large as it may be."""
    if few := few_steps(facts):
        return few
    cap = facts.setting("max_num_seqs")
    if not cap:
        return Missing("the engine did not say how many requests may run at once")
    queue = queued_by(facts, Wait.BATCH_FULL)
    gain = larger_batch_gain(facts)
    return seen(
        (of_requests(facts, Phase.TTFT, queue),),
        "queue_share",
        lambda _: left_of(facts, queue, why_waiting(facts, Wait.BATCH_FULL)),
        also=gain is None or gain >= limit("larger_batch_gain"),
        evidence=(
            Evidence("requests that may run at once", cap, "requests"),
            *_queued(facts, Wait.BATCH_FULL),
            _gain_told(facts, gain),
            Evidence("KV cache in use then, at most", _kv(facts, why_waiting(facts, Wait.BATCH_FULL)), "share"),
        ),
        examples=facts.request_examples(queue),
    )


def _gain_told(facts: Facts, gain: float | None) -> Evidence:
    if gain is None:
        what = "steps of decode with a smaller batch, too few to tell what a larger one would cost"
        return Evidence(what, _smaller_batches(facts), "share")
    return Evidence("tokens per second that twice the batch would add, by how long steps take", gain, "share")


def _kv(facts: Facts, flags: Flags) -> float:
    usage = facts.step("kv_usage")[flags]
    return float(usage.max()) / 1e6 if len(usage) else 0.0


def arrival_above_capacity(facts: Facts) -> Answer:
    """Requests arrive faster than they are served: they become ever more, or wait for a batch that is large enough."""
    if few := few_steps(facts, limit("steps")):
        return few
    arrivals, ends = facts.request("arrival_ns", "last_token_ns")
    known = ~(np.isnan(arrivals) | np.isnan(ends))
    if known.sum() < limit("requests"):
        return Missing("too few requests were recorded")
    # Requests in the engine when each arrived, itself included: arrivals are in order.
    there = np.full(len(arrivals), np.nan)
    there[known] = np.arange(1, known.sum() + 1) - np.searchsorted(np.sort(ends[known]), arrivals[known])
    among, quarter = there[known], max(int(known.sum()) // 4, 1)
    first, early, later, late = (
        float(among[start : start + quarter].mean()) for start in range(0, 4 * quarter, quarter)
    )
    # A load that was raised in between levels off again; one that is too much goes on growing while it lasts.
    at_the_end = float(among[-max(len(among) // 16, 1) :].mean())
    grows = (
        min(later / early, late / later) >= limit("backlog_growth")
        and late - early >= limit("backlog")
        and at_the_end >= limit("backlog_left") * late
    )
    since, until = float(arrivals[known][quarter]), float(arrivals[known][-1])
    within = np.clip(np.minimum(facts.done, until) - np.maximum(facts.done - facts.period, since), 0, None)
    busy = float(within.sum()) / max((until - since) * max(len(np.unique(facts.step_instance)), 1), 1.0)
    waiting = facts.step("waiting") > 0
    capped = bool(waiting.any() and full_batch(facts)[waiting].mean() > 0.5)
    gain = larger_batch_gain(facts)
    pays = gain is None or gain >= limit("larger_batch_gain")
    queued = queued_by(facts, Wait.BATCH_FULL)
    at_capacity = capped and not pays and of_requests(facts, Phase.TTFT, queued).share.low >= limit("queue_share")
    for_blocks = float(queued_by(facts, Wait.KV_SPACE).sum()) > 0.5 * float(np.nansum(facts.request("queue_ns")[0]))
    # By Little's law a request is in the engine for as long as there are others, over what is finished in that time.
    lost = np.nan_to_num(facts.e2e * np.clip(1 - first / there, 0, None))
    if at_capacity:
        lost = np.maximum(lost, queued)
    return seen(
        (of_requests(facts, Phase.THROUGHPUT, lost),),
        "queue_share",
        also=(grows or at_capacity)
        and busy >= limit("busy")
        and not (capped and pays)
        and not (for_blocks and waiting.any()),
        evidence=(
            Evidence("requests in the engine, second quarter of the arrivals", early, "requests"),
            Evidence("requests in the engine, third quarter of the arrivals", later, "requests"),
            Evidence("requests in the engine, last quarter of the arrivals", late, "requests"),
            Evidence("requests in the engine, last sixteenth of the arrivals", at_the_end, "requests"),
            Evidence("time in the queue for a place in the full batch", float(queued.sum()), "ns"),
            Evidence("the scheduler's time in steps meanwhile", min(busy, 1.0), "share"),
            Evidence("arrivals", known.sum() * 1e9 / max(until - float(arrivals[known][0]), 1.0), "requests/s"),
            Evidence(
                "finished", known.sum() * 1e9 / max(float(ends[known].max() - arrivals[known][0]), 1.0), "requests/s"
            ),
        ),
        examples=facts.request_examples(lost),
    )


def token_budget(facts: Facts) -> Answer:
    """Prompts are cut, or wait, because a step has as many tokens as it may."""
    if few := few_steps(facts, limit("steps")):
        return few
    budget = facts.setting("max_num_batched_tokens", "chunked_prefill_size")
    if not budget:
        return Missing("the engine did not say how many tokens a step may have")
    full = full_budget(facts)
    begins, lengths = facts.since_schedule
    covered = Covered(facts.step_instance[full], begins[full], lengths[full], lengths[full])
    since, until = facts.request("scheduled_ns", "first_token_ns")
    chunked = np.nan_to_num(covered.within(facts.request_instance, since, until))
    queued = queued_by(facts, Wait.TOKEN_BUDGET)
    lost = chunked + queued
    # Where steps have prefill or decode, requests in decode wait for every chunk of others.
    held_up = facts.held_up(np.where(_prefill_alone(facts), facts.own, 0.0))
    part = fixed_part(facts)
    return seen(
        (of_requests(facts, Phase.TTFT, lost), Part(Phase.TPOT, held_up, facts.interval_time)),
        "budget_share",
        lambda found: float(np.nansum(found.part)) * part,
        also=part >= limit("fixed_share"),
        evidence=(
            Evidence("tokens that a step may have", budget, "tokens"),
            Evidence("steps that had as many", float(full.sum()), "steps"),
            Evidence("time in prefill during these", float(chunked.sum()), "ns"),
            Evidence("time in the queue for them", float(queued.sum()), "ns"),
            Evidence("time in decode waiting for them", float(held_up.sum()), "ns"),
            Evidence("what a step costs whatever is in it", facts.cost[0], "ns"),
            Evidence("of a full step's time that is", part, "share"),
        ),
        examples=(*facts.request_examples(lost), *facts.step_examples(held_up)),
    )


def kv_exhausted(facts: Facts) -> Answer:
    """Requests wait for KV blocks, or are thrown out for others."""
    if few := few_steps(facts):
        return few
    queued = queued_by(facts, Wait.KV_SPACE)
    (preempted,) = facts.request("preempted_ns")
    (prefill,) = facts.request("prefill_ns")
    (times,) = facts.request("preemptions")
    first, scheduled = facts.request("first_token_ns", "scheduled_ns")
    # The context of a request that was thrown out is computed again: prefill beyond its first.
    again = np.where(
        times > 0, np.maximum(np.nan_to_num(prefill) - np.maximum(np.nan_to_num(first - scheduled), 0), 0), 0
    )
    preempted = np.nan_to_num(preempted)
    decode = of_requests(facts, Phase.TPOT, np.minimum(preempted + again, np.nan_to_num(facts.decode)))
    usage = facts.step("kv_usage")
    return seen(
        (of_requests(facts, Phase.TTFT, queued), decode),
        "kv_share",
        lambda part: (
            left_of(facts, queued, why_waiting(facts, Wait.KV_SPACE)) if part.phase is Phase.TTFT else part.part.sum()
        ),
        evidence=(
            Evidence("preemptions", float(np.nansum(times)), "times"),
            Evidence("requests that were preempted", float((times > 0).sum()), "requests"),
            Evidence("time in the queue for KV blocks", float(queued.sum()), "ns"),
            Evidence("time thrown out", float(preempted.sum()), "ns"),
            Evidence("time computing lost context again", float(again.sum()), "ns"),
            Evidence("KV cache in use, 95th percentile of steps", float(np.percentile(usage, 95)) / 1e6, "share"),
        ),
        examples=facts.request_examples(queued + preempted + again),
    )


CHECKS = {check.__name__: check for check in (arrival_above_capacity, batch_cap, token_budget, kv_exhausted)}
