"""What is in the batches of steps, as the sums that step records carry, and what follows from sums alone.

q is a request's tokens in a step, kv its context after it (instrument/stages.py, STEP_COMPOSITION). All quantities are
arrays with one element a step, or scalars for one step: whoever computes with them does so for a session at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

Numbers = npt.NDArray[np.float64]


class Bound(StrEnum):
    """Which value to take of what sums do not determine: windows, and how many experts the tokens chose."""

    LEAST = "least"
    EXPECTED = "expected"
    MOST = "most"


@dataclass(frozen=True, eq=False)
class Sums:
    """One phase of a step: how many requests, and sums over them."""

    requests: Numbers
    tokens: Numbers  # sum of q
    context: Numbers  # sum of kv
    q_q: Numbers  # sum of q squared
    q_kv: Numbers  # sum of q times kv

    def positions(self) -> Numbers:
        """Pairs of a token and one that it sees, itself included, under causal attention. Exact.

        The j-th of q tokens sees kv - q + j: their sum over j = 1..q is q kv - q (q - 1) / 2.
        """
        return self.q_kv - (self.q_q - self.tokens) / 2

    def windowed_positions(self, window: int, bound: Bound) -> Numbers:
        """Pairs of a token and one that it sees when it sees the last `window` tokens, itself included.

        Exact for one request, and where no context exceeds the window. Else: at most the smaller of all positions and
        window x tokens, as each token sees no more than its context and the window. At least positions x min(1,
        window / C), where C bounds every context (the others have one token at least): min(c, window) is concave in c,
        and so above its chord from 0 to C. Expected: all requests alike, within these bounds.
        """
        if bound is Bound.EXPECTED:
            return self._within(_seen(*self._means(), window) * self.requests, self._bounds(window))
        least, most = self._bounds(window)
        return least if bound is Bound.LEAST else most

    def _bounds(self, window: int) -> tuple[Numbers, Numbers]:
        positions = self.positions()
        share = np.minimum(1.0, window / np.maximum(self._longest(), 1.0))
        least = np.maximum(positions * share, np.minimum(self.tokens, positions))
        return self._one(_seen, window, least), self._one(_seen, window, np.minimum(positions, window * self.tokens))

    def windowed_context(self, window: int, bound: Bound) -> Numbers:
        """Tokens whose keys and values are read when a token sees the last `window`: min(kv, window + q - 1) a request.

        Bounds as in windowed_positions: at most min(sum of kv, requests x (window - 1) + sum of q), at least the chord.
        """
        share = np.minimum(1.0, window / np.maximum(self._longest(), 1.0))
        least = self._one(_reach, window, np.maximum(self.context * share, np.minimum(self.tokens, self.context)))
        most = self._one(_reach, window, np.minimum(self.context, self.requests * (window - 1) + self.tokens))
        if bound is Bound.EXPECTED:
            return self._within(_reach(*self._means(), window) * self.requests, (least, most))
        return least if bound is Bound.LEAST else most

    def chunked_positions(self, chunk: int, bound: Bound) -> Numbers:
        """Pairs of a token and one that it sees when it sees its own chunk of `chunk` tokens, up to itself.

        Exact for one request. At least one a token, at most as with a window of `chunk`.
        """
        most = self._one(_seen_in_chunk, chunk, np.minimum(self.positions(), chunk * self.tokens))
        least = self._one(_seen_in_chunk, chunk, self.tokens)
        if bound is Bound.EXPECTED:
            return self._within(_seen_in_chunk(*self._means(), chunk) * self.requests, (least, most))
        return least if bound is Bound.LEAST else most

    def chosen_context(self, top: int) -> Numbers:
        """Tokens that are read when every token chooses `top` of its context: at most, if no two choose the same."""
        return np.minimum(self.context, top * self.tokens)

    def _means(self) -> tuple[Numbers, Numbers]:
        requests = np.maximum(self.requests, 1.0)
        return self.tokens / requests, self.context / requests

    def _longest(self) -> Numbers:
        """No context of a request is longer: the others have one token at least."""
        return self.context - np.maximum(self.requests - 1.0, 0.0)

    def _one(self, exact: Callable[[Numbers, Numbers, int], Numbers], window: int, otherwise: Numbers) -> Numbers:
        return np.where(self.requests == 1, exact(self.tokens, self.context, window), otherwise)

    @staticmethod
    def _within(value: Numbers, bounds: tuple[Numbers, Numbers]) -> Numbers:
        return np.clip(value, *bounds)


def _seen(q: Numbers, kv: Numbers, window: int) -> Numbers:
    """Sum over j = 1..q of min(kv - q + j, window): `m` tokens see less than the window."""
    before = kv - q
    m = np.clip(window - before, 0.0, q)
    return m * before + m * (m + 1) / 2 + (q - m) * window


def _reach(q: Numbers, kv: Numbers, window: int) -> Numbers:
    return np.minimum(kv, window + q - 1)


def _seen_in_chunk(q: Numbers, kv: Numbers, chunk: int) -> Numbers:
    def up_to(n: Numbers) -> Numbers:
        whole: Numbers = np.floor(n / chunk)
        rest = n - whole * chunk
        return whole * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2

    return up_to(kv) - up_to(kv - q)


@dataclass(frozen=True, eq=False)
class Batch:
    """What is in the batch of a step, or of many."""

    prefill: Sums
    decode: Sums
    distinct_experts: Numbers | None = (
        None  # that the tokens chose, on average over the layers; None, NaN: not recorded
    )

    @property
    def tokens(self) -> Numbers:
        """Tokens of the step."""
        return self.prefill.tokens + self.decode.tokens

    @property
    def requests(self) -> Numbers:
        """Requests of the step."""
        return self.prefill.requests + self.decode.requests

    @property
    def logits(self) -> Numbers:
        """Rows that the output projection is computed for: the last token of each prefill chunk, every decode token.

        So do vLLM (logits_indices of the model runner) and SGLang (LogitsProcessor) unless logprobs of the prompt are
        asked for; a chunk that does not complete its prompt gets a row that is thrown away.
        """
        return self.prefill.requests + self.decode.tokens

    @classmethod
    def of_steps(cls, steps: Mapping[str, Any], distinct_experts: Any = None) -> Batch:
        """Of the columns of a session's table of steps. Raises KeyError for a column that is missing."""
        phases = {
            phase: Sums(
                *(_numbers(steps[f"{phase}_{name}"]) for name in ("requests", "tokens", "context", "q_q", "q_kv"))
            )
            for phase in ("prefill", "decode")
        }
        return cls(**phases, distinct_experts=None if distinct_experts is None else _numbers(distinct_experts))

    @classmethod
    def of_requests(
        cls,
        prefill: Iterable[tuple[int, int]] = (),
        decode: Iterable[tuple[int, int]] = (),
        distinct_experts: float | None = None,
    ) -> Batch:
        """Of one step, by the (q, kv) of its requests."""
        counted = None if distinct_experts is None else _numbers(distinct_experts)
        return cls(_sums(prefill), _sums(decode), counted)


def _sums(requests: Iterable[tuple[int, int]]) -> Sums:
    pairs = list(requests)
    q, kv = [q for q, _ in pairs], [kv for _, kv in pairs]
    products = sum(a * b for a, b in pairs)
    return Sums(*(_numbers(each) for each in (len(pairs), sum(q), sum(kv), sum(n * n for n in q), products)))


def _numbers(values: Any) -> Numbers:
    return np.asarray(values, dtype=np.float64)
