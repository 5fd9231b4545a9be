"""Tests of membership and intervals: changes alone give what counting every request in every step gives."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from stagetrace.exporters.assembly.membership import Batch, Found
from stagetrace.exporters.assembly.steps import Step
from stagetrace.instrument.records import Change
from stagetrace.instrument.stages import STEP_COMPOSITION

REQUESTS = range(1, 6)


@dataclass
class ByHand:
    """The same by going through the whole batch in every step: the oracle."""

    open: set[int]
    members: dict[int, int] = field(default_factory=dict)
    known: bool = False
    since: dict[int, int] = field(default_factory=dict)  # request -> end of the step from which its interval counts
    last: dict[int, int] = field(default_factory=dict)
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    intervals: list[tuple[int, int, int]] = field(default_factory=list)  # step, interval, tokens

    def leave(self, request: int, last_step: int) -> None:
        if request in self.members:
            first = self.members.pop(request)
            self.runs.append((request, first, max(first, last_step)))
            if request not in self.open:
                self.since.pop(request, None)

    def advance(
        self, step: int, end: int, changes: list[tuple[int, int]], snapshot: set[int] | None
    ) -> tuple[int, ...]:
        unfinished = set()
        for change, request in changes:
            if change == Change.LEAVE:
                self.leave(request, step - 1)
            elif self.known:
                self.members.setdefault(request, step)
            if change == Change.CHUNK:
                unfinished.add(request)
        if snapshot is not None:
            for request in self.members.keys() - snapshot:
                self.leave(request, step - 1)
            for request in snapshot:
                self.members.setdefault(request, step)
            self.known = True
        if not self.known:
            self.since.clear()
            return -1, -1
        takers = self.members.keys() - unfinished
        found = Counter(end - self.since[request] for request in takers if request in self.since)
        self.intervals += [(step, interval, tokens) for interval, tokens in found.items()]
        self.since |= dict.fromkeys(takers, end)
        self.last |= dict.fromkeys(takers, end)
        return len(self.members), len(takers)


IN_ORDER = [change for change in Change if change != Change.DROPPED]  # those that come before their step's end
CHANGES = st.lists(st.tuples(st.sampled_from(IN_ORDER), st.sampled_from(REQUESTS)), max_size=4)
ROUNDS = st.lists(
    st.tuples(
        st.lists(
            st.one_of(
                st.tuples(st.just("lost"), st.just(0)),
                st.tuples(st.just("break"), st.just(0)),
                st.tuples(st.just("over"), st.sampled_from(REQUESTS)),
            ),
            max_size=2,
        ),
        CHANGES,
        st.none() | st.sets(st.sampled_from(REQUESTS)),
        st.integers(1, 3),
    ),
    max_size=25,
)


@given(ROUNDS, st.sets(st.sampled_from(REQUESTS)))
@settings(max_examples=400)
def test_changes_give_what_counting_everybody_gives(rounds, opened: set[int]):
    """Joins, leaves, prefills, snapshots, losses and requests that end, in any order."""
    still_open = {*opened}
    found = Found()
    batch, by_hand = Batch(9, still_open, found), ByHand(still_open)
    end = 100
    for number, (events, changes, snapshot, took) in enumerate(rounds, 1):
        for event, request in events:
            if event == "lost":
                batch.forget(number - 1)
                for member in [*by_hand.members]:
                    by_hand.leave(member, number - 1)
                by_hand.known = False
            elif event == "break":
                batch.break_intervals()
                by_hand.since.clear()
            elif request in still_open:
                assert batch.last_token(request) == by_hand.last.get(request, 0)
                still_open.remove(request)
                batch.close(request, number - 1)
                by_hand.leave(request, number - 1)
                by_hand.since.pop(request, None)
        end += took
        record = 10 * number
        batch.changes.extend((number, record, change, request, 1, 1, 0, 0) for change, request in changes)
        if snapshot is not None:
            batch.add_snapshot(number, record, [*snapshot])
        step = Step(9, number, 1, 1, end - 1, end - 1, [0] * len(STEP_COMPOSITION), end)
        batch.advance(step, healed_after=0)
        assert (step.members, step.output_tokens) == by_hand.advance(number, end, changes, snapshot)
        assert {request for request in batch.left if request not in still_open} == set()
        assert batch.apart.keys() <= batch.members.keys() == by_hand.members.keys()
    assert Counter((request, first, last) for request, _, first, last in found.runs) == Counter(by_hand.runs)
    intervals = [(step, interval, tokens) for _, step, _, interval, tokens in found.intervals]
    assert Counter(intervals) == Counter(by_hand.intervals)


def test_a_steady_batch_keeps_nobody_apart():
    """What a step costs does not follow the batch's size."""
    batch = Batch(9, {*range(1000)}, Found())
    batch.add_snapshot(1, 1, [*range(1000)])
    for number in range(1, 5):
        step = Step(9, number, 1, 1, number * 10, number * 10, [0] * len(STEP_COMPOSITION), number * 10 + 5)
        batch.advance(step, healed_after=0)
        assert (step.members, step.output_tokens) == (1000, 1000)
        assert not batch.apart
        assert not batch.left
    assert [tuple(row[1:2] + row[3:]) for row in batch.found.intervals] == [(n, 10, 1000) for n in (2, 3, 4)]
    assert batch.last_token(77) == 45


def test_who_was_dropped_gets_no_token_of_the_step():
    """An abort is recorded while steps are in flight, after the changes of later ones."""
    batch = Batch(9, {1, 2, 3}, Found())
    batch.add_snapshot(1, 1, [1, 2])
    for number, dropped, expected in ((1, (), 2), (2, (2, 3), 1), (3, (), 2), (4, (), 2)):
        for request in dropped:
            batch.drop(number, request)
        step = Step(9, number, 1, 1, number * 10, number * 10, [0] * len(STEP_COMPOSITION), number * 10 + 5)
        batch.advance(step, healed_after=0)
        assert (step.members, step.output_tokens) == (2, expected), "one that is not in the step is not taken off"
    assert [row[1:2] + row[3:] for row in batch.found.intervals] == [(2, 10, 1), (3, 10, 1), (3, 20, 1), (4, 10, 2)]
    assert not batch.dropped
