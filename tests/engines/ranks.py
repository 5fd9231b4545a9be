"""What holds of a recording of several ranks, at any level: every rank's part of every step is there, in its step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd


def by_rank(segments: pd.DataFrame, name: str) -> dict[int, set[tuple[int, int]]]:
    """The steps (instance and number) of which each rank has a segment."""
    stage = BY_NAME[name]
    rows = segments[segments["stage"] == stage.id]
    rank = f"a{[attribute.name for attribute in stage.attributes].index('rank')}"
    return {int(at): set(zip(rows["instance"], rows["step"], strict=True)) for at, rows in rows.groupby(rank)}


def numbers(steps: pd.DataFrame) -> set[tuple[int, int]]:
    return set(zip(steps["instance"], steps["step"], strict=True))


def assert_on_both(steps: pd.DataFrame, segments: pd.DataFrame, names: Iterable[str]) -> None:
    """Each of two ranks has these stages in every step, and was expected to."""
    assert set(steps["ranks_expected"]) == set(steps["ranks_reported"]) == {2}
    for name in names:
        assert by_rank(segments, name) == {0: numbers(steps), 1: numbers(steps)}, name


def assert_vllms_ranks(steps: pd.DataFrame, segments: pd.DataFrame) -> None:
    """Each of two workers writes every stage of a rank once a step, inside its part of the step."""
    stages = ("rank_step", "prepare", "forward", "sample", "bookkeep", "return")
    assert_on_both(steps, segments, stages)
    for name in stages:
        rows = segments[segments["stage"] == BY_NAME[name].id]
        assert len(rows) == 2 * len(steps), name
        if name != "rank_step":
            assert set(rows["parent_stage"]) == {BY_NAME["rank_step"].id}
    # The step waits for the output of one rank, the first; the other one may still be busy when the step is over.
    ranked = segments[segments["stage"] == BY_NAME["rank_step"].id].merge(steps, on="step", suffixes=("", "_step"))
    assert (ranked["begin_ns"] >= ranked["begin_ns_step"]).all()
    awaited = ranked[ranked["a0"] == 0]
    assert (awaited["end_ns"] <= awaited["end_ns_step"]).all()


def assert_sglangs_ranks(steps: pd.DataFrame, segments: pd.DataFrame) -> None:
    """Each of two schedulers writes its rank's stages, the first alone what the scheduler does."""
    assert len(set(steps["instance"])) == 1
    assert_on_both(steps, segments, ("rank_step", "prepare", "forward", "sample", "return"))
    for name in ("schedule", "update"):
        assert (segments["stage"] == BY_NAME[name].id).sum() == len(steps), "one rank writes what the scheduler does"
