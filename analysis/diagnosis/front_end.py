"""Causes in the front end and behind it: tokenizing, a saturated API server, slow clients. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .causes import Phase
from .facts import Covered, Facts, Values
from .finding import Evidence, Missing, Part, above, of_requests, seen
from .thresholds import limit

if TYPE_CHECKING:
    from collections.abc import Callable

    from .finding import Answer


@dataclass(frozen=True)
class Late:
    """How long the front end kept what it could have handed on, by request, ns; 0 where that is not known."""

    way: Values  # to the engine, while no step ran
    back: Values  # its first token, from the engine's having it until the front end had it
    first: Values  # the same until it was handed to the socket
    last: Values  # its last token, until the front end had it
    handed: Values  # its last byte, from then on

    @property
    def typical(self) -> float:
        """With a first token, median."""
        return float(np.median(self.first)) if len(self.first) else 0.0


def late(facts: Facts) -> Late:
    """Of each request, from its times."""
    names = ("first_token_ns", "first_output_ns", "first_sent_ns", "last_token_ns", "last_output_ns", "last_sent_ns")
    token, output, sent, last_token, last_output, last_sent = facts.request(*names)
    dispatched, queued = facts.request("dispatched_ns", "queued_ns")
    way = np.nan_to_num(queued - dispatched)
    if len(facts.steps):
        begins, lengths = facts.done - facts.period, facts.period
        covered = Covered(facts.step_instance, begins, lengths, lengths)
        # The engine takes requests in between steps: while one runs, it is the engine that is waited for.
        way = way - np.nan_to_num(covered.within(facts.request_instance, dispatched, queued))
    # Without streaming the first byte follows the last token, and the front end may have been told of no token before:
    # how late it was with the first one is not to be known.
    streamed = sent < last_output
    back, on = (np.where(streamed, np.nan_to_num(each), 0.0) for each in (output - token, sent - output))
    last, handed = np.nan_to_num(last_output - last_token), np.nan_to_num(last_sent - last_output)
    return Late(*(np.clip(each, 0, None) for each in (way, back, back + on, last, handed)))


def tokenize(facts: Facts) -> Answer:
    """Long in the front end before they are sent, while what comes back is handed on at once."""
    if not facts.enough_requests:
        return Missing("too few requests were recorded")
    times, prompt = (np.nan_to_num(each) for each in facts.request("tokenize_ns", "prompt_tokens"))
    per_token = times[prompt > 0] / prompt[prompt > 0]
    kept = late(facts)
    return seen(
        (of_requests(facts, Phase.TTFT, times),),
        "tokenize_share",
        above("tokenize_usual"),
        # A busy front end is as late with a token as with a request.
        also=kept.typical < limit("late_as_well") * float(np.median(times)),
        evidence=(
            Evidence("of a request, median", float(np.median(times)), "ns"),
            Evidence("for a token of the prompt, median", float(np.median(per_token)) if len(per_token) else 0.0, "ns"),
            Evidence("how late the front end hands a first token on, median", kept.typical, "ns"),
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
    kept = late(facts)
    arrival, output, sent, last = facts.request("arrival_ns", "first_output_ns", "first_sent_ns", "last_output_ns")
    share, batch = _detokenizing(facts)
    # A thread that does little else is behind; one that has time left is late by what it takes for each batch.
    most_of_it = max(share, batch / max(kept.typical, 1.0)) >= limit("detokenize_busy")
    (tokenizing,) = facts.request("tokenize_ns")
    tokenizing = np.nan_to_num(tokenizing)
    # The first byte and the last are late by themselves, what comes between is not: the stream goes on meanwhile.
    client = np.nan_to_num(np.fmax(np.where(sent < last, sent, output), output) - arrival)
    # The engine may have the last token before the first one was handed on: that time counts once.
    (last_token,) = facts.request("last_token_ns")
    both = np.where(kept.first > 0, np.clip(np.nan_to_num(sent - last_token), 0, kept.last), 0.0)
    first, end = kept.way + kept.first, kept.last - both + np.minimum(kept.handed, kept.first)
    is_late = (Part(Phase.TTFT, first, client), of_requests(facts, Phase.E2E, end))
    found = seen(
        is_late,
        "late_share",
        also=most_of_it == detokenizing,
        evidence=(
            Evidence("how late the front end hands a first token on, median", kept.typical, "ns"),
            Evidence("how late it had the last token, median", float(np.median(kept.last)), "ns"),
            Evidence("on the way to the engine while no step ran, median", float(np.median(kept.way)), "ns"),
            Evidence("tokenizing, which waits for the front end as well, median", float(np.median(tokenizing)), "ns"),
            Evidence("detokenizing, of the time of the thread that does most of it", share, "share"),
            Evidence("detokenizing what a step gave, median there", batch, "ns"),
        ),
        examples=facts.request_examples(first + end),
    )
    if not found.stands_out or kept.typical < limit("late_as_well") * float(np.median(tokenizing)):
        return found
    # Where everything is late, requests are as well before they are sent.
    before = np.clip(tokenizing - limit("tokenize_usual") * client, 0, None)
    more = seen((Part(Phase.TTFT, first + before, client), is_late[1]), None)
    return replace(found, measured_ns=more.measured_ns, recoverable_ns=more.recoverable_ns)


def _detokenizing(facts: Facts) -> tuple[float, float]:
    """Of the thread that detokenizes most: how much of its time that is, and how long it takes of a batch, median, ns.

    SGLang's detokenizer is a process of its own, and its front end handles what comes from there.
    """
    rows = facts.now_and_then("detokenize")
    arrival, last = facts.request("arrival_ns", "last_output_ns")
    if not len(rows):
        return 0.0, 0.0
    threads = rows.groupby(["process", "thread"])["self_ns"]
    busiest = threads.sum().idxmax()
    took = threads.get_group(busiest).to_numpy(dtype=np.float64)
    observed = max(float(np.nanmax(last) - np.nanmin(arrival)), 1.0)
    return min(float(took.sum()) / observed, 1.0), float(np.median(took))


def slow_client(facts: Facts) -> Answer:
    """The last byte could be handed over long after the last token, or the socket's buffer had much to send then."""
    (last_sent,) = facts.request("last_sent_ns")
    if (~np.isnan(last_sent)).sum() < limit("requests"):
        return Missing("too few requests came by HTTP: only of these it is known when their last byte was handed over")
    kept = late(facts)
    # A front end that is busy is late with everything; a slow client alone with what it does not take.
    busy = np.maximum(kept.first, kept.last)
    own = np.where(kept.handed > 2 * busy, kept.handed, 0.0)
    unsent, after = _after_the_end(facts)
    whole = np.nan_to_num(facts.e2e)
    waited, much = own > 1e7, after > 0
    return seen(
        (Part(Phase.E2E, np.minimum(own, whole) + after, whole + after),),
        "client_share",
        evidence=(
            Evidence("requests whose last byte waited for the client", float(waited.sum()), "requests"),
            Evidence("how long, median of these", _median(own[waited]), "ns"),
            Evidence("requests with much in the socket's buffer after the last byte", float(much.sum()), "requests"),
            Evidence("how much, median of these", _median(unsent[much]), "bytes"),
            Evidence("how long the client takes for it, estimated, median of these", _median(after[much]), "ns"),
            Evidence("how late the front end itself was, median", float(np.median(busy)), "ns"),
        ),
        examples=facts.request_examples(own + after),
    )


def _after_the_end(facts: Facts) -> tuple[Values, Values]:
    """What was in the socket's buffer after a streamed answer's last byte, and how long the client takes for it, ns.

    Estimated from the rate at which it took what came before; 0 where little was left, or that is not known.
    """
    sent, last, last_output = facts.request("first_sent_ns", "last_sent_ns", "last_output_ns")
    size, unsent = facts.request("response_bytes", "unsent_bytes")
    taken, during = size - unsent, last - sent
    much = (unsent >= limit("unsent")) & (sent < last_output) & (taken > 0) & (during > 0)
    rate = np.where(much, taken, 1.0) / np.where(much, during, 1.0)
    return np.where(much, unsent, 0.0), np.where(much, unsent, 0.0) / rate


def _median(values: Values) -> float:
    return float(np.median(values)) if len(values) else 0.0


CHECKS: dict[str, Callable[[Facts], Answer]] = {
    "tokenize": tokenize,
    "front_end": front_end,
    "detokenize": detokenize,
    "slow_client": slow_client,
}
