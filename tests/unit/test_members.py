"""Tests of what is recorded of a batch's membership: the records alone give who was in every step."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from unit.decoded import decoded_batch
from unit.rings import opened, read_all

from stagetrace.adapters.members import SNAPSHOT_EVERY, Members
from stagetrace.instrument.records import Change, RecordType

INSTANCE = 7
REQUESTS = st.frozensets(st.integers(1, 40), max_size=30)


def told(directory: Path, batches: list[frozenset[int]], **sizes: int) -> tuple[dict[int, set[int]], int]:
    """Step -> who is in it, as the records say from the first snapshot on; and how many slots they took."""
    with opened(directory, **sizes) as (recorder, reader):
        read_all(reader)
        members = Members(recorder, INSTANCE)
        found: dict[int, set[int]] = {}
        now: set[int] = set()
        slots = 0
        for step, batch in enumerate(batches, 1):
            if batch != members.handles or members.due(step):
                members.record(step, batch)
            records = decoded_batch(read_all(reader))
            slots += len(records.controls)
            for _, type_, change, words in records.controls:
                if type_ == RecordType.SNAPSHOT:
                    assert words[:2] == (INSTANCE, step)
                    now = {int(str(word)) for word in words[3:]}
                else:
                    assert words[3:5] == (INSTANCE, step)
                    request = int(str(words[0]))
                    assert (request in now) == (change == Change.LEAVE)
                    now ^= {request}
            found[step] = set(now)
    return found, slots


@given(st.lists(REQUESTS, max_size=12))
def test_the_records_give_every_steps_members(batches: list[frozenset[int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        found, _ = told(Path(directory), batches)
    assert found == {step: set(batch) for step, batch in enumerate(batches, 1)}


def test_a_batch_that_is_another_is_told_whole(tmp_path: Path) -> None:
    """As when requests in prefill have a step of their own between those of many in decode."""
    decode, prefill = frozenset(range(1, 257)), frozenset({1000})
    found, records = told(tmp_path, [decode, prefill, decode, decode - {5}])
    assert found == {1: set(decode), 2: set(prefill), 3: set(decode), 4: set(decode - {5})}
    assert records == 4  # three snapshots, one change


def test_everybody_is_told_at_times(tmp_path: Path) -> None:
    _, records = told(tmp_path, [frozenset({1, 2})] * (2 * SNAPSHOT_EVERY + 1))
    assert records == 3


def test_what_was_dropped_is_made_up_for(tmp_path: Path) -> None:
    with opened(tmp_path) as (recorder, reader):
        read_all(reader)
        members = Members(recorder, INSTANCE)
        members.record(1, {1})
        assert not members.due(2)
        step = 1
        while not recorder.dropped[0]:
            step += 1
            members.record(step, {1, step})
        read_all(reader)
        assert members.due(step + 1)
        members.record(step + 1, {1, 2})
        (record,) = decoded_batch(read_all(reader)).controls
        assert record[1] == RecordType.SNAPSHOT
        assert set(record[3][3:]) == {1, 2}
