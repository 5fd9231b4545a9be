"""Causes in the front end and behind it: tokenizing, a saturated API server, slow clients. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .causes import Phase
from .facts import Covered, Facts, Values
from .finding import Evidence, Missing, above, of_requests, seen
from .thresholds import limit

if TYPE_CHECKING:
    from collections.abc import Callable

    from .finding import Answer


def _late(facts: Facts) -> tuple[Values, Values, Values]:
    """Of each request: its way to the engine while no step ran, and how late the first and the last token came back."""
    first, first_output, last, last_output = facts.request(
        "first_token_ns", "first_output_ns", "last_token_ns", "last_output_ns"
    )
    dispatched, queued = facts.request("dispatched_ns", "queued_ns")
    way = np.clip(np.nan_to_num(queued - dispatched), 0, None)
    if len(facts.steps):
        begins, lengths = facts.step("end_ns") - facts.period, facts.period
        covered = Covered(facts.step_instance, begins, lengths, lengths)
        # The engine takes requests in between steps: while one runs, it is the engine that is waited for.
        way = np.clip(way - covered.within(facts.request_instance, dispatched, queued), 0, None)
        way = np.nan_to_num(way)
    one_token = facts.request("output_tokens")[0] <= 1
    back = np.clip(np.nan_to_num(first_output - first), 0, None)
    # With one token, or without streaming, the first output is the last one: it is late once.
    end = np.where(one_token, 0.0, np.clip(np.nan_to_num(last_output - last), 0, None))
    return way, np.where(first_output >= last_output, 0.0, back), end


def tokenize(facts: Facts) -> Answer:
    """Long in the front end before they are sent, while what comes back is handed on at once."""
    if not facts.enough_requests:
        return Missing("too few requests were recorded")
    (times,) = facts.request("tokenize_ns")
    (prompt,) = facts.request("prompt_tokens")
    _, back, end = _late(facts)
    times = np.nan_to_num(times)
    known = times > 0
    per_token = times[known] / np.maximum(np.nan_to_num(prompt[known]), 1)
    # A busy front end is as late with a token as with a request.
    late = float(np.median(np.maximum(back, end)))
    return seen(
        (of_requests(facts, Phase.TTFT, times),),
        "tokenize_share",
        above("tokenize_usual"),
        also=late < 0.5 * float(np.median(times)),
        evidence=(
            Evidence("of a request, median", float(np.median(times)), "ns"),
            Evidence("for a token of the prompt, median", float(np.median(per_token)) if known.any() else 0.0, "ns"),
            Evidence("how late the front end hands tokens on, median", late, "ns"),
        ),
        examples=facts.request_examples(times),
    )


def front_end(facts: Facts) -> Answer:
    """Tokens are late in the front end, and its time is not detokenizing."""
    return _saturated(facts, detokenizing=False)


def detokenize(facts: Facts) -> Answer:
    """Tokens are late in the front end, and most of its time is detokenizing."""
    return _saturated(facts, detokenizing=True)


def _saturated(facts: Facts, detokenizing: bool) -> Answer:
    if not facts.enough_requests:
        return Missing("too few requests were recorded")
    way, back, end = _late(facts)
    (tokenizing,) = facts.request("tokenize_ns")
    rows = facts.of_no_step("detokenize")
    busy = float(rows["self_ns"].sum())
    arrival, last = facts.request("arrival_ns", "last_output_ns")
    threads = max(len(rows.drop_duplicates(["process", "thread"])), 1)
    observed = max(float(np.nanmax(last) - np.nanmin(arrival)), 1.0) * threads
    of_front_end = min(busy / observed, 1.0)
    is_detokenizing = of_front_end >= limit("detokenize_busy")
    ttft = of_requests(facts, Phase.TTFT, way + back)
    e2e = of_requests(facts, Phase.E2E, end)
    return seen(
        (ttft, e2e),
        "late_share",
        also=is_detokenizing == detokenizing,
        evidence=(
            Evidence("how late the front end had the first token, median", float(np.median(back)), "ns"),
            Evidence("how late it had the last token, median", float(np.median(end)), "ns"),
            Evidence("on the way to the engine while no step ran, median", float(np.median(way)), "ns"),
            Evidence("in the front end before that, median", float(np.nanmedian(tokenizing)), "ns"),
            Evidence("detokenizing, of the front end's time", of_front_end, "share"),
        ),
        examples=facts.request_examples(way + back + end),
    )


def slow_client(facts: Facts) -> Answer:
    """The last byte could be handed over long after the last token was there."""
    last_output, last_sent = facts.request("last_output_ns", "last_sent_ns")
    known = ~np.isnan(last_sent - last_output)
    if known.sum() < limit("requests"):
        return Missing("too few requests came by HTTP: only of these it is known when their last byte was handed over")
    _, back, end = _late(facts)
    waited = np.where(known, np.clip(np.nan_to_num(last_sent - last_output), 0, None), 0.0)
    # A front end that is busy is late with everything; a slow client alone with its own bytes.
    own = np.where(waited > 2 * np.maximum(back, end), waited, 0.0)
    return seen(
        (of_requests(facts, Phase.E2E, own),),
        "client_share",
        evidence=(
            Evidence("requests whose last byte waited for the client", float((own > 1e7).sum()), "requests"),
            Evidence("how long, median of these", float(np.median(own[own > 1e7])) if (own > 1e7).any() else 0.0, "ns"),
            Evidence("how late the front end itself was, median", float(np.median(np.maximum(back, end))), "ns"),
        ),
        examples=facts.request_examples(own),
    )


CHECKS: dict[str, Callable[[Facts], Answer]] = {
    "tokenize": tokenize,
    "front_end": front_end,
    "detokenize": detokenize,
    "slow_client": slow_client,
}
