"""Causes in prefill: the prefix cache, and what prefill does to requests in decode. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .causes import Phase
from .facts import Facts, Values
from .finding import Evidence, Missing, Part, few_steps, of_steps, seen
from .queueing import for_chunks
from .thresholds import limit

if TYPE_CHECKING:
    from .finding import Answer


def prefill_delays_decode(facts: Facts) -> Answer:
    """Requests in decode waited for prefill of others.

    What a step with prefill took longer than one of decode alone with as many requests is the prefill's. A token is
    held up where that is several steps of decode; what is less is the ordinary price of a mixed batch. Few and long
    stalls make any interval wide, but each of them is known: so the share counts where not one or two prompts made it.
    """
    if few := few_steps(facts):
        return few
    if facts.decode_only.sum() < limit("steps"):
        return Missing("too few steps of decode alone to compare with")
    excess = _of_prefill(facts)
    place, interval, tokens = facts.waits.place, facts.waits.time, facts.waits.tokens
    prefill = facts.waited(excess)
    usual = np.maximum(facts.usual_decode[place], 1.0)
    held_up = prefill >= limit("stall") * usual
    # What prompts cost more because they are cut into so many steps is the budget's.
    lost = np.where(held_up, prefill - facts.waited(for_chunks(facts)), 0.0) * tokens
    per_step: Values = np.zeros(len(facts.steps))
    np.add.at(per_step, place, lost)
    stalled = interval[held_up]
    prompts = _prompts_of_half(facts, excess, place[held_up], stalled, tokens[held_up])
    return seen(
        (Part(Phase.TPOT, per_step, facts.interval_time),),
        "stall_share",
        also=prompts >= limit("stalling_prompts"),
        certain=True,
        evidence=(
            Evidence("prompts that make up half of it", float(prompts), "prompts"),
            Evidence("tokens that were held up", float(tokens[held_up].sum()), "tokens"),
            Evidence("of all tokens in decode", float(tokens[held_up].sum() / max(tokens.sum(), 1.0)), "share"),
            Evidence("time between tokens then, median", float(np.median(stalled)) if len(stalled) else 0.0, "ns"),
            Evidence("a step of decode alone, median", float(np.median(facts.own[facts.decode_only])), "ns"),
            Evidence("tokens of prefill in a step that has some, 95th percentile", _p95(facts), "tokens"),
        ),
        examples=facts.step_examples(per_step),
    )


def _of_prefill(facts: Facts) -> Values:
    """What of each step's time is its prefill's: what it took longer than one of decode alone with as many requests."""
    decode = np.where(facts.step("decode_requests") > 0, facts.usual_decode, 0.0)
    return np.where(~facts.decode_only, np.clip(facts.own - decode, 0, None), 0.0)


def _prompts_of_half(facts: Facts, took: Values, place: npt.NDArray[np.int32], interval: Values, tokens: Values) -> int:
    """How few prompts make up half of what tokens waited for prefill: one, or many. 0 without any.

    `took` is the prefill's time of each step; the `tokens` came with the steps `place`, after such an `interval`. A
    step's time is divided among those that were in prefill then, by the lengths of their prompts.
    """
    until = facts.step("end_ns")[place]
    scheduled, first, prompt = facts.request("scheduled_ns", "first_token_ns", "prompt_tokens")
    known = ~np.isnan(scheduled + first + prompt)
    theirs: Values = np.zeros(len(prompt))
    for instance in np.unique(facts.step_instance):
        steps, mine = facts.step_instance == instance, known & (facts.request_instance == instance)
        ends = facts.done[steps]
        here = steps[place]
        waited = _meanwhile(ends, (until - interval)[here], until[here], tokens[here])
        in_prefill = _meanwhile(ends, scheduled[mine], first[mine], prompt[mine])
        per_token = np.cumsum(np.concatenate([[0.0], waited * took[steps] / np.maximum(in_prefill, 1.0)]))
        begin, end = _places(ends, scheduled[mine], first[mine])
        theirs[mine] = prompt[mine] * (per_token[end] - per_token[begin])
    most = np.cumsum(np.sort(theirs)[::-1])
    return int(np.searchsorted(most, most[-1] / 2)) + 1 if len(most) and most[-1] > 0 else 0


def _computed_again(facts: Facts, again: Values, computed: Values) -> Values:
    """The prefill's time of each step that went into tokens `again`, of those that its requests have `computed`.

    A step's time is divided by tokens among the requests that were in prefill then.
    """
    lost, took = np.zeros(len(facts.steps)), _of_prefill(facts)
    scheduled, first = facts.request("scheduled_ns", "first_token_ns")
    known = ~np.isnan(scheduled + first)
    for instance in np.unique(facts.step_instance):
        steps, mine = facts.step_instance == instance, known & (facts.request_instance == instance)
        ends, since, until = facts.done[steps], scheduled[mine], first[mine]
        part, whole = (_meanwhile(ends, since, until, tokens[mine]) for tokens in (again, computed))
        lost[steps] = took[steps] * np.clip(part / np.maximum(whole, 1.0), 0, 1)
    return lost


def _places(ends: Values, since: Values, until: Values) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of each span of time the first step that it is in, and the one after the last, by the steps' ends."""
    return np.searchsorted(ends, since, "right"), np.minimum(np.searchsorted(ends, until, "left") + 1, len(ends))


def _meanwhile(ends: Values, since: Values, until: Values, weights: Values) -> Values:
    """Of each step, by their ends, the weights of all spans of time that it is in."""
    begin, end = _places(ends, since, until)
    change: Values = np.zeros(len(ends) + 1)
    np.add.at(change, begin, weights)
    np.subtract.at(change, end, weights)
    return np.cumsum(change)[:-1]


def _p95(facts: Facts) -> float:
    tokens = facts.step("prefill_tokens")[~facts.decode_only]
    return float(np.percentile(tokens, 95)) if len(tokens) else 0.0


def prefix_cache_thrashed(facts: Facts) -> Answer:
    """Prompts find less in the cache while the KV cache is full."""
    if facts.info.get("prefix_caching") is False:
        return None
    prompt, cached, scheduled = facts.request("prompt_tokens", "cached_tokens", "scheduled_ns")
    known = ~(np.isnan(prompt) | np.isnan(cached) | np.isnan(scheduled)) & (prompt > 0)
    if few := few_steps(facts):
        return few
    if known.sum() < limit("requests"):
        return Missing("too few requests whose cached tokens are known")
    order = np.argsort(facts.step("begin_ns"), kind="stable")
    at = np.searchsorted(facts.step("begin_ns")[order], np.nan_to_num(scheduled), side="left")
    usage = facts.step("kv_usage")[order][np.clip(at, 0, len(order) - 1)] / 1e6
    full, room = known & (usage >= 0.9), known & (usage < 0.7)
    if min(full.sum(), room.sum()) < limit("requests"):
        return None  # the cache was never full, or never anything else
    in_room = float(cached[room].sum() / prompt[room].sum())
    in_full = float(cached[full].sum() / prompt[full].sum())
    lost = max(in_room - in_full, 0.0)
    again = _computed_again(facts, np.where(full, prompt * lost, 0.0), np.nan_to_num(prompt - cached))
    return seen(
        of_steps(facts, again),
        "again_share",
        also=in_room > 0.05 and lost / max(in_room, 1e-9) >= limit("cache_loss"),
        evidence=(
            Evidence("of the prompts found in the cache while it had room", in_room, "share"),
            Evidence("of the prompts found in the cache while it was full", in_full, "share"),
            Evidence("requests that came while it was full", float(full.sum()), "requests"),
        ),
        examples=facts.step_examples(again),
    )


def prefix_cache_off(facts: Facts) -> Answer:
    """The prefix cache is off, and the same prompt was computed again for certain."""
    if facts.info.get("prefix_caching") is not False:
        return None
    if few := few_steps(facts):
        return few
    (prompt,) = facts.request("prompt_tokens")
    prompt = np.nan_to_num(prompt)
    children = facts.requests["parent"].notna().to_numpy()
    others = children & facts.requests.duplicated("parent").to_numpy()
    again = _computed_again(facts, np.where(others, prompt, 0.0), prompt)
    return seen(
        of_steps(facts, again),
        "again_share",
        evidence=(
            Evidence("answers to a prompt that others answered as well", float(others.sum()), "requests"),
            Evidence("tokens of prompts that were computed again", float(prompt[others].sum()), "tokens"),
            Evidence("of the tokens of all prompts", float(prompt[others].sum() / max(prompt.sum(), 1.0)), "share"),
            Evidence("steps' time for them", float(again.sum()), "ns"),
        ),
        examples=facts.step_examples(again),
        note="Whether other requests share beginnings is not recorded, as no token is.",
    )


CHECKS = {
    "prefill_delays_decode": prefill_delays_decode,
    "prefix_cache_thrashed": prefix_cache_thrashed,
    "prefix_cache_off": prefix_cache_off,
}
