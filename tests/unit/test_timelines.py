"""Tests of the accounting on a timeline: parents, self times, and what is cut."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagetrace.exporters.assembly import timelines
from stagetrace.exporters.assembly.timelines import overlap


@dataclass
class Tree:
    """A segment as it was called: it spends time, calls the next one, spends time again."""

    before: int
    children: list[Tree]
    after: int
    begin: int = 0
    end: int = 0
    sequence: int = 0
    parent: Tree | None = field(default=None, repr=False)


# A call may take no time of its own, so that it has the very times of the call inside it.
TREES = st.lists(
    st.recursive(
        st.builds(Tree, st.integers(1, 9), st.just([]), st.integers(0, 9)),
        lambda trees: st.builds(Tree, st.integers(0, 9), st.lists(trees, min_size=1, max_size=4), st.integers(0, 9)),
        max_leaves=25,
    ),
    max_size=5,
)


def run(trees: list[Tree]) -> list[Tree]:
    """Gives every call its times; the calls in the order in which they end, which is that of their records."""
    ended: list[Tree] = []
    clock = 0

    def call(tree: Tree, parent: Tree | None) -> None:
        nonlocal clock
        tree.parent, tree.begin = parent, clock
        clock += tree.before
        for child in tree.children:
            call(child, tree)
        clock += tree.after
        tree.end = clock
        ended.append(tree)
        tree.sequence = len(ended)

    for tree in trees:
        call(tree, None)
    return ended


@dataclass
class Segment:
    """A segment, and what was found of it."""

    begin: int
    end: int
    sequence: int = 1
    timeline: int = 0
    parent: Segment | None = field(default=None, repr=False)
    self_ns: int = 0


def nest(segments: list[Segment]) -> int:
    """Fills in what `timelines.nest` finds; returns how many were cut."""
    columns = [[getattr(one, name) for one in segments] for name in ("timeline", "begin", "end", "sequence")]
    found = timelines.nest(*(np.array(column, np.int64) for column in columns))
    in_order = [segments[row] for row in found.order.tolist()]
    for one, end, parent, self_ns in zip(in_order, found.end, found.parent, found.self_ns, strict=True):
        one.end, one.self_ns = int(end), int(self_ns)
        one.parent = in_order[parent] if parent >= 0 else None
    return found.conflicts


def nest_by_hand(segments: list[Segment]) -> int:
    """What nesting means, with a stack: the oracle."""
    conflicts = 0
    for timeline in {one.timeline for one in segments}:
        stack: list[Segment] = []
        mine = [one for one in segments if one.timeline == timeline]
        for one in sorted(mine, key=lambda one: (one.begin, -one.end, -one.sequence)):
            while stack and stack[-1].end <= one.begin:
                stack.pop()
            one.parent = stack[-1] if stack else None
            if one.parent and one.end > one.parent.end:
                conflicts += 1
                one.end = one.parent.end
            one.self_ns = one.end - one.begin
            if one.parent:
                one.parent.self_ns -= one.self_ns
            stack.append(one)
    return conflicts


def found(segments: list[Segment]) -> list[tuple[int, int, int, int, int | None]]:
    return [(one.timeline, one.sequence, one.end, one.self_ns, one.parent and one.parent.sequence) for one in segments]


ANY = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60), st.integers(0, 30)), max_size=30)
HUGE = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2**62), st.integers(0, 2**62 - 1)), max_size=12)


@given(ANY | HUGE, st.integers(1, 10**7))
def test_columns_nest_as_a_stack_does(drawn: list[tuple[int, int, int]], unit: int):
    """Whatever crosses, touches or coincides; times as large as a record can have."""
    scale = unit if all(begin + length < 2**40 for _, begin, length in drawn) else 1
    one, other = (
        [
            Segment(begin * scale, (begin + length) * scale, number, timeline)
            for number, (timeline, begin, length) in enumerate(drawn, 1)
        ]
        for _ in range(2)
    )
    assert nest(one) == nest_by_hand(other)
    assert found(one) == found(other)


@given(st.lists(TREES, max_size=4), st.randoms(use_true_random=False))
def test_calls_on_several_timelines_nest_as_a_stack_does(forests: list[list[Tree]], random):
    """Without a crossing, where no stack is used."""
    calls = [(number, call) for number, trees in enumerate(forests) for call in run(trees)]
    random.shuffle(calls)
    one, other = ([Segment(call.begin, call.end, call.sequence, number) for number, call in calls] for _ in range(2))
    assert nest(one) == nest_by_hand(other) == 0
    assert found(one) == found(other)


@pytest.mark.parametrize("depth", [1, 31, 32, 33, 3_000])
def test_any_depth(depth: int):
    one, other = ([Segment(level, 10_000 - level, depth - level) for level in range(depth)] for _ in range(2))
    assert nest(one) == nest_by_hand(other) == 0
    assert found(one) == found(other)


@given(st.lists(st.tuples(st.integers(-1, 20), st.booleans()), max_size=20))
def test_what_is_inherited(drawn: list[tuple[int, bool]]):
    """From the nearest around it that has its own, through any number of those that have not."""
    parents = [min(parent, row - 1) for row, (parent, _) in enumerate(drawn)]
    own = [has for _, has in drawn]
    got = timelines.inherited(np.array(parents, np.int64), np.array(own, np.bool_)).tolist()
    for row, source in enumerate(got):
        at = row
        while not own[at] and parents[at] >= 0:
            at = parents[at]
        assert source == at


def segments_of(calls: list[Tree]) -> list[Segment]:
    return [Segment(call.begin, call.end, call.sequence) for call in calls]


@given(TREES, st.randoms(use_true_random=False))
def test_nested_calls_get_their_callers_as_parents(trees: list[Tree], random):
    calls = run(trees)
    segments = segments_of(calls)
    random.shuffle(segments)
    assert nest(segments) == 0
    parents = {one.sequence: one.parent.sequence if one.parent else None for one in segments}
    assert parents == {call.sequence: call.parent.sequence if call.parent else None for call in calls}


@given(TREES)
def test_self_times_add_up_to_the_outermost_times(trees: list[Tree]):
    segments = segments_of(run(trees))
    nest(segments)
    assert sum(found.self_ns for found in segments) == sum(tree.end - tree.begin for tree in trees)
    assert all(found.self_ns >= 0 for found in segments)
    assert {found.sequence: found.self_ns for found in segments} == {
        call.sequence: call.end - call.begin - sum(child.end - child.begin for child in call.children)
        for call in run(trees)
    }


TIMES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), max_size=20)


@given(TIMES)
def test_any_segments_are_made_to_nest(times: list[tuple[int, int]]):
    """Whatever crosses is cut at the end of what it began in, and nothing's own time is negative."""
    segments = [Segment(begin, begin + length, number) for number, (begin, length) in enumerate(times)]
    before = {found.sequence: found.end for found in segments}
    conflicts = nest(segments)
    cut = [found for found in segments if found.end != before[found.sequence]]
    assert len(cut) == conflicts
    for found in segments:
        assert found.begin <= found.end <= before[found.sequence]
        assert found.self_ns >= 0
        if found.parent:
            assert found.parent.begin <= found.begin <= found.end <= found.parent.end
    for found in cut:
        assert found.parent is not None
        assert found.end == found.parent.end
    outermost = [(found.begin, found.end) for found in segments if found.parent is None]
    assert sum(found.self_ns for found in segments) == sum(end - begin for begin, end in outermost)
    assert overlap(outermost, 0, 100) == sum(end - begin for begin, end in outermost)


def test_a_crossing_segment_is_cut_and_counted():
    outer, crossing = Segment(0, 10, 2), Segment(6, 15, 1)
    assert nest([outer, crossing]) == 1
    assert (crossing.begin, crossing.end, crossing.parent) == (6, 10, outer)
    assert outer.self_ns == 6


def test_of_two_with_the_same_times_the_one_recorded_later_is_outside():
    inner, outer = Segment(5, 9, 1), Segment(5, 9, 2)
    assert nest([outer, inner]) == 0
    assert (inner.parent, outer.parent) == (outer, None)
    assert (inner.self_ns, outer.self_ns) == (4, 0)


def test_segments_that_touch_follow_one_another():
    segments = [Segment(0, 5, 1), Segment(5, 9, 2)]
    assert nest(segments) == 0
    assert [found.parent for found in segments] == [None, None]


@given(TIMES, st.integers(0, 90), st.integers(0, 90))
def test_overlap_counts_every_instant_once(times: list[tuple[int, int]], begin: int, end: int):
    segments = [(start, start + length) for start, length in times]
    covered = {instant for start, stop in segments for instant in range(start, stop)}
    assert overlap(segments, begin, end) == len(covered & {*range(begin, end)})


@pytest.mark.parametrize("order", [1, -1])
def test_overlap_does_not_depend_on_the_order(order: int):
    assert overlap([(0, 4), (3, 6), (8, 20)][::order], 1, 10) == 7
