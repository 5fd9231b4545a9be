"""Rows that come before their request's wait for it; what cannot wait any longer is counted."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from stagetrace.exporters.gather import Gather


def rows(requests: list[int] = [], states: list[int] = [], members: list[int] = []) -> dict[str, Any]:  # noqa: B006
    """A row per handle, and one step that has nothing to do with them."""
    made = {"requests": requests, "states": states, "members": members}
    return {name: [{"handle": handle, "of": name} for handle in handles] for name, handles in made.items()} | {
        "steps": [{"step": 1}]
    }


def handles(ready: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    for name in ("requests", "states", "members"):
        assert {row["of"] for row in ready[name]} <= {name}
    return tuple([row["handle"] for row in ready[name]] for name in ("requests", "states", "members"))


def test_early_rows_wait_for_their_request() -> None:
    gather = Gather()
    ready, left_out = gather.add(rows(states=[1, 2], members=[1]))
    assert handles(ready) == ([], [], [])
    assert ready["steps"] == [{"step": 1}], "steps wait for nothing"
    ready, _ = gather.add(rows(requests=[1], states=[1, 2]))
    assert handles(ready) == ([1], [1, 1], [1])
    ready, _ = gather.add(rows(requests=[2]))
    assert handles(ready) == ([2], [2, 2], [])
    assert not left_out


def test_rows_after_their_request_are_counted() -> None:
    gather = Gather()
    gather.add(rows(requests=[1]))
    ready, left_out = gather.add(rows(states=[1], members=[1, 1]))
    assert handles(ready) == ([], [], [])
    assert left_out == {"states_after_their_request": 1, "members_after_their_request": 2}


def test_the_oldest_are_given_up_when_there_are_too_many() -> None:
    gather = Gather(most_rows=4)
    _, left_out = gather.add(rows(states=[1, 2, 1, 3], members=[2]))
    assert left_out == {"states_given_up": 2}
    ready, _ = gather.add(rows(requests=[1, 2, 3]))
    assert handles(ready) == ([1, 2, 3], [2, 3], [2])


def test_memory_of_requests_that_are_over_is_bounded() -> None:
    gather = Gather(most_handles=2)
    gather.add(rows(requests=[1, 2, 3]))
    _, left_out = gather.add(rows(states=[1, 2, 3]))
    assert left_out == {"states_after_their_request": 2}, "the oldest is forgotten, and its state waits"


CALLS = st.lists(st.tuples(*[st.lists(st.integers(0, 5), max_size=4) for _ in range(3)]), max_size=8)


@settings(deadline=None)
@given(CALLS, st.integers(0, 6))
def test_every_row_goes_once_or_is_counted_or_waits(calls: list[tuple[list[int], ...]], most_rows: int) -> None:
    gather = Gather(most_rows=most_rows)
    gone = counted = 0
    for call in calls:
        ready, left_out = gather.add(rows(*call))
        requests, states, members = handles(ready)
        assert requests == call[0]
        assert {*states, *members} <= {*requests}
        gone += len(states) + len(members)
        counted += left_out.total()
    waiting = sum(map(len, gather._held.values()))
    assert waiting == gather._rows <= most_rows
    assert gone + counted + waiting == sum(len(states) + len(members) for _, states, members in calls)
