"""Causes in prefill: the prefix cache, and what prefill does to requests in decode. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .causes import Phase
from .facts import Facts, Flags, Values
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
    # What prompts cost more because they are cut into so many steps is the budget's, what they cost again the cache's.
    of_others = facts.waited(np.minimum(for_chunks(facts) + _of_the_cache(facts), excess))
    lost = np.where(held_up, prefill - of_others, 0.0) * tokens
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


@dataclass(frozen=True)
class _Lost:
    """What was found in the cache at quiet times and at busy ones, when new tokens push out what it has."""

    capacity: int  # tokens
    slow: float  # of the prompts found, 0 to 1, while the cache kept things for long
    fast: float  # the same while it kept them for a short time
    kept_slow: float  # how long what nobody used was kept then, median, ns
    kept_fast: float
    requests: int  # that came at busy times
    again: Values  # of each step the prefill's time for what would have been found at quiet times, ns

    @property
    def counts(self) -> bool:
        """Whether that is more than chance."""
        return self.slow > 0.05 and 1 - self.fast / self.slow >= limit("cache_loss")


def _lost_beginnings(facts: Facts) -> _Lost | Missing | None:
    if facts.info.get("prefix_caching") is False:
        return None
    prompt, cached = facts.request("prompt_tokens", "cached_tokens")
    if few := few_steps(facts):
        return few
    capacity = facts.setting("kv_cache_tokens")
    if not capacity:
        return Missing("the engine did not say how many tokens its KV cache holds")
    kept = _kept(facts, capacity)
    known = ~(np.isnan(prompt) | np.isnan(cached) | np.isnan(kept)) & (prompt > 0)
    if known.sum() < limit("requests"):
        return Missing("too few requests whose cached tokens are known")
    short, long = np.percentile(kept[known], [10, 90])
    if long < limit("kept") * max(short, 1.0):
        return None  # the cache was never full, or as much in use all the time
    between = float(np.sqrt(max(short, 1.0) * long))
    fast, slow = known & (kept <= between), known & (kept > between)
    if min(fast.sum(), slow.sum()) < limit("requests"):
        return None
    in_slow, in_fast = (float(cached[each].sum() / prompt[each].sum()) for each in (slow, fast))
    tokens = np.where(fast, prompt * max(in_slow - in_fast, 0.0), 0.0)
    return _Lost(
        capacity,
        in_slow,
        in_fast,
        float(np.median(kept[slow])),
        float(np.median(kept[fast])),
        int(fast.sum()),
        _computed_again(facts, tokens, np.nan_to_num(prompt - cached)),
    )


def prefix_cache_thrashed(facts: Facts) -> Answer:
    """Prompts find less in the cache while many new tokens push out what it has than while few do.

    Whether a beginning would have been found in a larger cache is not recorded, as no token is: it is told by comparing
    requests at times when the cache kept what nobody used for long with those when it kept it for a short time.
    """
    found = _lost_beginnings(facts)
    if not isinstance(found, _Lost):
        return found
    return seen(
        of_steps(facts, found.again),
        "again_share",
        also=found.counts,
        evidence=(
            Evidence("tokens that the KV cache holds", found.capacity, "tokens"),
            Evidence("of the prompts found in the cache while it kept things for long", found.slow, "share"),
            Evidence("what nobody used was kept then for, median", found.kept_slow, "ns"),
            Evidence("of the prompts found in the cache while it kept things for a short time", found.fast, "share"),
            Evidence("what nobody used was kept then for, median", found.kept_fast, "ns"),
            Evidence("requests that came then", float(found.requests), "requests"),
        ),
        examples=facts.step_examples(found.again),
    )


def _kept(facts: Facts, capacity: int) -> Values:
    """Of each request how long the KV cache had kept what nobody had used, when it was scheduled, ns.

    New tokens push out the least recently used: what is kept is what the last ones, as many as fit, were computed for.
    Until it has been full once it loses nothing, which counts as all of the session's time. NaN where it is not known.
    """
    (scheduled,) = facts.request("scheduled_ns")
    found = np.full(len(scheduled), np.nan)
    for instance in np.unique(facts.step_instance):
        steps = facts.step_instance == instance
        mine = (facts.request_instance == instance) & ~np.isnan(scheduled)
        ends = np.concatenate([facts.step("begin_ns")[steps][:1], facts.step("end_ns")[steps]])
        computed = np.concatenate([[0.0], np.cumsum(np.nan_to_num(facts.tokens[steps]))])
        now = np.interp(scheduled[mine], ends, computed)
        since = np.where(
            now < capacity, scheduled[mine] - (ends[-1] - ends[0]), np.interp(now - capacity, computed, ends)
        )
        found[mine] = scheduled[mine] - since
    return np.asarray(np.maximum(found, 0.0), dtype=np.float64)


def prefix_cache_off(facts: Facts) -> Answer:
    """The prefix cache is off, and the same prompt was computed again for certain."""
    if facts.info.get("prefix_caching") is not False:
        return None
    if few := few_steps(facts):
        return few
    (prompt,) = facts.request("prompt_tokens")
    others, again = _answered_as_well(facts), _of_other_answers(facts)
    prompt = np.nan_to_num(prompt)
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


def _answered_as_well(facts: Facts) -> Flags:
    """Requests that are another answer to a prompt that was computed for one already."""
    children = facts.requests["parent"].notna()
    return np.asarray(children & facts.requests.duplicated("parent"), dtype=np.bool_)


def _of_other_answers(facts: Facts) -> Values:
    """The prefill's time of each step for prompts that were computed for another answer already."""
    prompt = np.nan_to_num(facts.request("prompt_tokens")[0])
    return _computed_again(facts, np.where(_answered_as_well(facts), prompt, 0.0), prompt)


def _of_the_cache(facts: Facts) -> Values:
    """The prefill's time of each step that is there because the prefix cache is off, or has lost what was in it."""
    if facts.info.get("prefix_caching") is False:
        return _of_other_answers(facts)
    lost = _lost_beginnings(facts)
    return lost.again if isinstance(lost, _Lost) and lost.counts else np.zeros(len(facts.steps))


CHECKS = {
    "prefill_delays_decode": prefill_delays_decode,
    "prefix_cache_thrashed": prefix_cache_thrashed,
    "prefix_cache_off": prefix_cache_off,
}
