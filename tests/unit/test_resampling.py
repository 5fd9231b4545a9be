"""Tests of what chance is said to have made: A/A seldom shows anything, a difference that is there is shown."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagetrace.analysis.comparison.resampling import (
    BINS,
    Blocks,
    Comparison,
    Ratio,
    Values,
    blocks_for,
    cliffs_delta,
    counted,
    holm,
    percentiles_of,
    smallest_shown,
)

ROUNDS = 40  # of each simulation; its chance is seeded
P95, P99 = 95, 99


def values_of(numbers: np.ndarray) -> Values:
    blocks = blocks_for(len(numbers))
    block = (np.arange(len(numbers)) * blocks // len(numbers)).astype(np.int32)
    return Values(numbers.astype(float), np.ones(len(numbers), np.int64), block, blocks)


def drifting(chance: np.random.Generator, count: int, memory: float) -> np.ndarray:
    """Log-normal latencies whose neighbours are alike: a machine with good and bad seconds."""
    noise = chance.normal(size=count)
    state = np.empty(count)
    state[0] = noise[0]
    for place in range(1, count):
        state[place] = memory * state[place - 1] + np.sqrt(1 - memory**2) * noise[place]
    return np.exp(0.4 * state + 0.2 * chance.normal(size=count)) * 1e7


def differences(a: np.ndarray, b: np.ndarray) -> list[float]:
    """The p-values of mean, p95 and p99."""
    first, second = values_of(a), values_of(b)
    drawn = Comparison(Blocks((first.blocks,)), Blocks((second.blocks,)))
    found = [drawn.of_ratios(first.mean(), second.mean()), *drawn.of_percentiles(first, second, (P95, P99)).values()]
    return [1.0 if each.p is None else each.p for each in found]


@pytest.mark.parametrize(("count", "memory"), [(84, 0.0), (200, 0.5)])
def test_two_samples_of_the_same_seldom_differ(count: int, memory: float):
    chance = np.random.default_rng(7)
    found = np.array([differences(*(drifting(chance, count, memory) for _ in range(2))) for _ in range(ROUNDS)])
    # At the 5 % level; a single metric may be wrong once in twenty, and so few rounds are off by some.
    assert ((found < 0.05).mean(axis=0) < 0.16).all(), (found < 0.05).mean(axis=0)
    assert (np.array([min(p for p in holm([*row]) if p is not None) for row in found]) < 0.05).mean() < 0.13


def test_a_difference_that_is_there_is_shown_and_its_interval_covers_it():
    chance = np.random.default_rng(8)
    shown, covered = 0, 0
    for _ in range(30):
        a, b = drifting(chance, 200, 0.3), drifting(chance, 200, 0.3) * 1.3
        first, second = values_of(a), values_of(b)
        drawn = Comparison(Blocks((first.blocks,)), Blocks((second.blocks,)))
        mean = drawn.of_ratios(first.mean(), second.mean())
        assert mean.p is not None and mean.change_low is not None and mean.change_high is not None
        shown += mean.p < 0.05
        covered += mean.change_low <= 0.3 <= mean.change_high
    assert shown >= 22 and covered >= 25


def test_a_load_that_grows_is_compared_with_itself():
    """A tenth more everywhere is shown, though the end of the load is ten times as slow as its begin."""
    chance = np.random.default_rng(9)
    growing = np.geomspace(1e6, 1e7, 84)
    a, b = (values_of(growing * factor * chance.lognormal(0, 0.05, 84)) for factor in (1.0, 1.1))
    drawn = Comparison(Blocks((a.blocks,)), Blocks((b.blocks,)))
    found = drawn.of_ratios(a.mean(), b.mean())
    assert drawn.paired and found.p is not None and found.p < 0.001
    assert found.change_low is not None and found.change_high is not None
    assert 0.05 < found.change_low < found.change_high < 0.2
    assert not Comparison(Blocks((20,)), Blocks((19,))).paired


def test_the_same_sessions_have_no_difference():
    values = values_of(np.random.default_rng(1).exponential(size=100))
    drawn = Comparison(Blocks((values.blocks,)), Blocks((values.blocks,)), same=True)
    for found in (
        drawn.of_ratios(values.mean(), values.mean()),
        *drawn.of_percentiles(values, values, (P95,)).values(),
    ):
        assert (found.low, found.high, found.p, found.effect, found.error) == (0, 0, 1, 0, 0)


def test_equal_sessions_recorded_twice_have_no_difference():
    values = values_of(np.random.default_rng(1).exponential(size=100))
    drawn = Comparison(Blocks((values.blocks,)), Blocks((values.blocks,)))
    for found in (
        drawn.of_ratios(values.mean(), values.mean()),
        *drawn.of_percentiles(values, values, (P95,)).values(),
    ):
        assert (found.p, found.effect, found.low, found.high) == (1, 0, 0, 0)


def test_too_few_blocks_say_nothing():
    few, many = values_of(np.array([1.0, 2.0, 3.0])), values_of(np.arange(100.0))
    drawn = Comparison(Blocks((few.blocks,)), Blocks((many.blocks,)))
    found = drawn.of_ratios(few.mean(), many.mean())
    assert (found.p, found.low, found.error) == (None, None, None) and found.effect is not None
    assert drawn.interval_of_b(many, None, 0.95) is None


def test_sessions_that_differ_among_themselves_widen_the_interval():
    """Three starts of one server that are 20 % apart: what one session calls certain, several do not."""
    chance = np.random.default_rng(3)
    starts = [chance.normal(100, 1, size=(40,)) * factor for factor in (0.8, 1.0, 1.2, 0.85, 1.05, 1.25)]
    sides = [Ratio(np.concatenate(three), np.ones(120)) for three in (starts[:3], starts[3:])]
    together = Comparison(Blocks((40, 40, 40)), Blocks((40, 40, 40))).of_ratios(*sides)
    taken_for_one = Comparison(Blocks((120,)), Blocks((120,))).of_ratios(*sides)
    assert together.p is not None and taken_for_one.p is not None
    assert together.p > 0.05 > taken_for_one.p
    assert together.error is not None and taken_for_one.error is not None and together.error > 3 * taken_for_one.error


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=200), st.lists(st.integers(0, 4), min_size=1, max_size=5))
@settings(deadline=None)
def test_counts_keep_every_value_and_percentiles_follow_them(numbers: list[int], draws: list[int]):
    values = values_of(np.array(numbers))
    edges, counts = counted([values])
    assert counts.sum() == len(numbers) and len(counts) == values.blocks
    drawn = np.resize(draws, values.blocks).astype(float)[None, :]
    repeated = np.repeat(values.values, np.resize(draws, values.blocks)[values.block])
    for percentile, (found,) in zip((50, 95), percentiles_of(drawn, counts, edges, (50, 95)), strict=True):
        if not len(repeated):
            assert np.isnan(found)
        else:
            assert found == np.percentile(repeated, percentile, method="inverted_cdf")


def test_many_values_are_counted_in_bins_that_are_close():
    chance = np.random.default_rng(2)
    a, b = (values_of(np.rint(chance.lognormal(16, 1, size=20_000))) for _ in range(2))
    edges, counts = counted([a, b])
    assert len(edges) == BINS and counts.sum() == 40_000
    (found,) = percentiles_of(np.ones((1, a.blocks)), counts[: a.blocks], edges, (P99,))
    assert found[0] == pytest.approx(np.percentile(a.values, P99), rel=0.02)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.lists(st.integers(0, 20), min_size=1, max_size=30))
def test_effect_is_that_of_all_pairs(a: list[int], b: list[int]):
    pairs = [(x, y) for x in a for y in b]
    expected = sum((y > x) - (y < x) for x, y in pairs) / len(pairs)
    assert cliffs_delta(np.array(a, float), np.array(b, float)) == pytest.approx(expected)


@given(st.lists(st.none() | st.floats(0, 1), max_size=20))
def test_holm_only_raises_keeps_the_order_and_leaves_none(p: list[float | None]):
    adjusted = holm(p)
    known = sorted(
        (value, after) for value, after in zip(p, adjusted, strict=True) if value is not None and after is not None
    )
    assert [after is None for after in adjusted] == [value is None for value in p]
    assert all(value <= after <= 1 for value, after in known)
    assert [after for _, after in known] == sorted(after for _, after in known)
    assert not known or known[0][1] == pytest.approx(min(1.0, known[0][0] * len(known)))


def test_smallest_shown_is_what_is_found_four_times_in_five():
    assert smallest_shown(None, 5) is None
    assert smallest_shown(1.0, 1) == pytest.approx(1.96 + 0.84, abs=0.01)
    chance = np.random.default_rng(4)
    error = np.sqrt(2 / 40)
    shift = smallest_shown(error, 1) or 0.0
    found = 0
    for _ in range(60):
        a, b = (values_of(np.abs(chance.normal(10, 1, size=40)) + extra) for extra in (0.0, shift))
        result = Comparison(Blocks((a.blocks,)), Blocks((b.blocks,))).of_ratios(a.mean(), b.mean())
        found += result.p is not None and result.p < 0.05
    assert 36 <= found <= 57
