"""Tests that what follows from sums alone is so: exact where it is said to be, within its bounds where not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagetrace.analysis.batch import Batch, Bound
from stagetrace.instrument.stages import STEP_COMPOSITION

REQUESTS = st.lists(
    st.tuples(st.integers(1, 60), st.integers(0, 200)).map(lambda each: (each[0], sum(each))), min_size=1, max_size=6
)


def contexts(requests: list[tuple[int, int]]) -> list[int]:
    """How many tokens each token of the step has before it, itself included."""
    return [kv - q + j for q, kv in requests for j in range(1, q + 1)]


@given(REQUESTS)
def test_causal_positions_are_exact(requests: list[tuple[int, int]]):
    assert Batch.of_requests(requests).prefill.positions() == sum(contexts(requests))


@given(REQUESTS, st.integers(1, 150))
def test_windows_are_within_their_bounds(requests: list[tuple[int, int]], window: int):
    sums = Batch.of_requests(requests).prefill
    seen = sum(min(each, window) for each in contexts(requests))
    read = sum(min(kv, window + q - 1) for q, kv in requests)
    chunked = sum((each - 1) % window + 1 for each in contexts(requests))
    for function, truth in (
        (sums.windowed_positions, seen),
        (sums.windowed_context, read),
        (sums.chunked_positions, chunked),
    ):
        least, expected, most = (float(function(window, bound)) for bound in (Bound.LEAST, Bound.EXPECTED, Bound.MOST))
        assert least <= truth * (1 + 1e-9) and truth <= most * (1 + 1e-9)
        assert least * (1 - 1e-9) <= expected <= most * (1 + 1e-9)
        alike = len(set(requests)) == 1
        if len(requests) == 1:
            assert least == expected == most == truth
        elif alike and function != sums.chunked_positions:
            assert expected == pytest.approx(truth)
    if max(kv for _, kv in requests) <= window and sum(kv for _, kv in requests) - len(requests) < window:
        assert sums.windowed_positions(window, Bound.LEAST) == seen == sums.windowed_positions(window, Bound.MOST)


def test_a_phase_without_requests_is_nothing():
    sums = Batch.of_requests(decode=[(1, 5)]).prefill
    assert sums.positions() == 0
    for bound in Bound:
        assert sums.windowed_positions(8, bound) == sums.windowed_context(8, bound) == 0
        assert sums.chunked_positions(8, bound) == 0
    assert sums.chosen_context(8) == 0


def test_steps_are_computed_together():
    names = [each.name for each in STEP_COMPOSITION]
    frame = pd.DataFrame(np.zeros((2, len(names)), dtype=np.int64), columns=names)
    first, second = [(4, 10), (3, 3)], [(1, 100)]
    for row, requests in enumerate((first, second)):
        sums = Batch.of_requests(decode=requests).decode
        for name in ("requests", "tokens", "context", "q_q", "q_kv"):
            frame.loc[row, f"decode_{name}"] = int(getattr(sums, name))
    batch = Batch.of_steps(frame)
    assert batch.decode.positions().tolist() == [sum(contexts(first)), sum(contexts(second))]
    assert batch.tokens.tolist() == [7, 1] and batch.requests.tolist() == [2, 1]
    with pytest.raises(KeyError):
        Batch.of_steps(frame.drop(columns="decode_q_q"))


def test_logits_are_of_sampled_tokens():
    assert Batch.of_requests([(100, 100), (50, 80)], [(1, 9), (4, 20)]).logits == 2 + 5
