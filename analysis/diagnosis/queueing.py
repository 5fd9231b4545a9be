"""Who waits in the queue and for what: capacity, the batch's cap, the token budget, the KV cache. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stagetrace.instrument.stages import QueueCause

from .causes import Phase
from .facts import Covered, Facts, Flags, Values, line
from .finding import Evidence, Missing, of_requests, seen
from .thresholds import limit

if TYPE_CHECKING:
    from .finding import Answer, Part

KV, BATCH, BUDGET = "KV_SPACE", "BATCH_FULL", "TOKEN_BUDGET"  # as QueueCause has them
_TOLD = {name: number for name in (KV, BATCH, BUDGET) if (number := QueueCause.__members__.get(name)) is not None}
_LITTLE_KV = 0.5  # of the cache; with less in use it is not what is waited for


def full_batch(facts: Facts) -> Flags:
    """Steps after which as many requests were running as may."""
    cap = facts.setting("max_num_seqs")
    return facts.step("running") >= cap if cap else np.zeros(len(facts.steps), dtype=bool)


def full_budget(facts: Facts) -> Flags:
    """Steps that have prefill and as many tokens as they may."""
    budget = facts.setting("max_num_batched_tokens")
    if budget:
        return (facts.tokens >= budget) & (facts.step("prefill_tokens") > 0)
    chunk = facts.setting("chunked_prefill_size")
    page = max(facts.setting("block_size"), 1)  # chunks end with a page
    return facts.step("prefill_tokens") > chunk - page if chunk else np.zeros(len(facts.steps), dtype=bool)


def why_waiting(facts: Facts) -> dict[str, Flags]:
    """Steps that left requests in the queue, by what kept these there; as the step's own record says."""
    waiting = facts.step("waiting") > 0
    threw_out = facts.step("preempted") > 0
    batch = waiting & full_batch(facts) & ~threw_out
    budget = waiting & full_budget(facts) & ~batch & ~threw_out
    full = facts.step("kv_usage") >= _LITTLE_KV * 1e6
    return {BATCH: batch, BUDGET: budget, KV: waiting & ~batch & ~budget & (full | threw_out)}


def queued_by(facts: Facts, cause: str) -> Values:
    """Of each request its time in the queue for a cause, ns: as the engine said, else by the steps meanwhile."""
    told = facts.states["a1"].isin([*_TOLD.values()]).any()
    if told:
        rows = facts.states[facts.states["a1"] == _TOLD[cause]]
        times = (rows["end_ns"] - rows["begin_ns"]).groupby(rows["handle"]).sum()
        return facts.requests["handle"].map(times).fillna(0).to_numpy(dtype=np.float64)
    begins, lengths = facts.since_schedule
    chosen = why_waiting(facts)[cause]
    covered = Covered(facts.step_instance[chosen], begins[chosen], lengths[chosen], lengths[chosen])
    since, until = facts.request("queued_ns", "scheduled_ns")
    (grammar,) = facts.request("grammar_ns")
    since = since + np.nan_to_num(grammar)
    return np.nan_to_num(covered.within(facts.request_instance, since, until))


def _queued(facts: Facts, cause: str) -> tuple[Evidence, ...]:
    flags = why_waiting(facts)[cause]
    waiting = facts.step("waiting")
    return (
        Evidence("steps that left requests in the queue for it", float(flags.sum()), "steps"),
        Evidence("waiting then, on average", float(waiting[flags].mean()) if flags.any() else 0.0, "requests"),
        Evidence(
            "running then, on average", float(facts.step("running")[flags].mean()) if flags.any() else 0.0, "requests"
        ),
    )


def larger_batch_gain(facts: Facts) -> float:
    """What twice the requests in a batch would add to tokens per second, 0 to 1, by the steps of decode.

    By a line through their durations. It ignores that attention's part grows with context, and steps with prefill.
    """
    size = facts.step("decode_requests")
    fixed, each = line(size[facts.decode_only], facts.own[facts.decode_only])
    full = float(np.percentile(size[facts.decode_only], 90)) if facts.decode_only.any() else 0.0
    now, then = fixed + each * full, fixed + each * 2 * full
    return 2 * now / then - 1 if then > 0 else 0.0


def batch_cap(facts: Facts) -> Answer:
    """The batch is as large as it may be."""
    if not len(facts.steps):
        return Missing("no steps were recorded")
    cap = facts.setting("max_num_seqs")
    if not cap:
        return Missing("the engine did not say how many requests may run at once")
    queue = queued_by(facts, BATCH)
    gain = larger_batch_gain(facts)
    return seen(
        (of_requests(facts, Phase.TTFT, queue),),
        "queue_share",
        also=gain >= limit("larger_batch_gain"),
        evidence=(
            Evidence("requests that may run at once", cap, "requests"),
            *_queued(facts, BATCH),
            Evidence("tokens per second that twice the batch would add, by how long steps take", gain, "share"),
            Evidence("KV cache in use then, at most", _kv(facts, why_waiting(facts)[BATCH]), "share"),
        ),
        examples=facts.request_examples(queue),
    )


def _kv(facts: Facts, flags: Flags) -> float:
    usage = facts.step("kv_usage")[flags]
    return float(usage.max()) / 1e6 if len(usage) else 0.0


def arrival_above_capacity(facts: Facts) -> Answer:
    """Requests arrive faster than they are served."""
    if len(facts.steps) < limit("steps"):
        return Missing("too few steps were recorded")
    arrivals, ends = facts.request("arrival_ns", "last_token_ns")
    known = ~(np.isnan(arrivals) | np.isnan(ends))
    arrivals, ends = np.sort(arrivals[known]), np.sort(ends[known])
    if len(arrivals) < limit("requests"):
        return Missing("too few requests were recorded")
    # Open requests at each arrival: in the first half of the arrivals, and in the second.
    there = np.arange(1, len(arrivals) + 1) - np.searchsorted(ends, arrivals)
    half = len(there) // 2
    early, late = float(there[half // 2 : half].mean()), float(there[half + half // 2 :].mean())
    first, last = arrivals[half // 2], arrivals[-1]
    busy = float(
        np.clip(
            np.minimum(facts.step("end_ns"), last) - np.maximum(facts.step("end_ns") - facts.period, first), 0, None
        ).sum()
    )
    instances = max(len(np.unique(facts.step_instance)), 1)
    busy /= max(last - first, 1.0) * instances
    capped = (
        bool(full_batch(facts)[facts.step("waiting") > 0].mean() > 0.5) if (facts.step("waiting") > 0).any() else False
    )
    gain = larger_batch_gain(facts)
    kv = float(np.nansum(queued_by(facts, KV)))
    queue, dispatch = facts.request("queue_ns", "dispatch_ns")
    queued = np.nan_to_num(queue) + np.nan_to_num(dispatch)
    # What requests take longer than those that came first, in proportion to their tokens.
    (tokens,) = facts.request("output_tokens")
    per_token = facts.decode / np.maximum(tokens - 1, 1)
    begin = per_token[~np.isnan(per_token)][: max(len(per_token) // 8, 1)]
    slower = (
        np.maximum(per_token - float(np.median(begin)), 0) * np.maximum(tokens - 1, 0) if len(begin) else per_token * 0
    )
    lost = queued + np.nan_to_num(slower)
    return seen(
        (of_requests(facts, Phase.E2E, lost),),
        "queue_share",
        also=late >= limit("backlog_growth") * early
        and late - early >= limit("backlog")
        and busy >= limit("busy")
        and not (capped and gain >= limit("larger_batch_gain"))
        and kv < 0.5 * float(queued.sum() or 1.0),
        evidence=(
            Evidence("requests in the engine, second quarter of the arrivals", early, "requests"),
            Evidence("requests in the engine, last quarter of the arrivals", late, "requests"),
            Evidence("the scheduler's time in steps meanwhile", min(busy, 1.0), "share"),
            Evidence("arrivals", len(arrivals) * 1e9 / max(arrivals[-1] - arrivals[0], 1.0), "requests/s"),
            Evidence("finished", len(ends) * 1e9 / max(ends[-1] - arrivals[0], 1.0), "requests/s"),
        ),
        examples=facts.request_examples(lost),
    )


def token_budget(facts: Facts) -> Answer:
    """Prompts are cut, or wait, because a step has as many tokens as it may."""
    if len(facts.steps) < limit("steps"):
        return Missing("too few steps were recorded")
    budget = facts.setting("max_num_batched_tokens", "chunked_prefill_size")
    if not budget:
        return Missing("the engine did not say how many tokens a step may have")
    full = full_budget(facts)
    begins, lengths = facts.since_schedule
    covered = Covered(facts.step_instance[full], begins[full], lengths[full], lengths[full])
    since, until = facts.request("scheduled_ns", "first_token_ns")
    chunked = np.nan_to_num(covered.within(facts.request_instance, since, until))
    queued = queued_by(facts, BUDGET)
    lost = chunked + queued
    fixed, each = facts.cost
    part = fixed / (fixed + each * budget) if fixed + each * budget > 0 else 0.0

    def saved(found: Part) -> float:
        return float(np.nansum(found.part)) * part

    return seen(
        (of_requests(facts, Phase.TTFT, lost),),
        "budget_share",
        saved,
        also=part >= limit("fixed_share"),
        evidence=(
            Evidence("tokens that a step may have", budget, "tokens"),
            Evidence("steps that had as many", float(full.sum()), "steps"),
            Evidence("time in prefill during these", float(chunked.sum()), "ns"),
            Evidence("time in the queue for them", float(queued.sum()), "ns"),
            Evidence("what a step costs whatever is in it", fixed, "ns"),
            Evidence("of a full step's time that is", part, "share"),
        ),
        examples=facts.request_examples(lost),
    )


def kv_exhausted(facts: Facts) -> Answer:
    """Requests wait for KV blocks, or are thrown out for others."""
    if not len(facts.steps):
        return Missing("no steps were recorded")
    queued = queued_by(facts, KV)
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
