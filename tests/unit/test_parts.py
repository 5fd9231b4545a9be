"""Parts on disk: whole or not there, merged without a change to what is read, removed from the oldest on."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagetrace.exporters.parts import BLOCK, END, list_parts, merge_block, read_part, write_part
from stagetrace.exporters.session import RAW_SCHEMA, BatchMark, Commit, Losses, RingMark, Session, SessionError
from stagetrace.instrument.identity import claim_identity

if TYPE_CHECKING:
    from pathlib import Path


def table_of(*values: int) -> pa.Table:
    return pa.table({"value": pa.array(values, pa.int64())})


def values_of(directory: Path, first: int = 0, last: int = END) -> list[int]:
    parts = [part for part in list_parts(directory) if part.last >= first and part.first <= last]
    return [value for part in parts for value in read_part(part, first, last)["value"].to_pylist()]


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, 3 * BLOCK), min_size=1), st.integers(1, 3 * BLOCK), st.integers(0, BLOCK))
def test_merging_changes_nothing_that_is_read(
    tmp_path_factory: pytest.TempPathFactory, numbers: set[int], first: int, length: int
) -> None:
    directory = tmp_path_factory.mktemp("parts")
    for number in sorted(numbers):
        write_part(directory, table_of(number, -number), number)
    write_part(directory, table_of(0), END)
    before = values_of(directory)
    some = values_of(directory, first, first + length)
    for block in range(3):
        merge_block(directory, block, {})
    assert values_of(directory) == before
    assert values_of(directory, first, first + length) == some
    assert [value for value in some if value > 0] == sorted(n for n in numbers if first <= n <= first + length)
    blocks = {(number - 1) // BLOCK for number in numbers}
    assert len(list(directory.iterdir())) == len(blocks) + 1


def test_what_an_interrupted_merge_left_behind_does_not_count(tmp_path: Path) -> None:
    for number in range(1, BLOCK + 1):
        write_part(tmp_path, table_of(number), number)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    merge_block(tmp_path, 0, {})
    (tmp_path / "part-00000007.parquet").write_bytes(left["part-00000007.parquet"])
    (tmp_path / "part-00000009.partial").write_bytes(b"half")
    assert values_of(tmp_path) == [*range(1, BLOCK + 1)]
    assert merge_block(tmp_path, 0, {}) is False
    assert not (tmp_path / "part-00000007.parquet").exists()


def test_a_part_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(table: pa.Table, path: Path, **_: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fails)
    with pytest.raises(OSError, match="No space"):
        write_part(tmp_path / "new", table_of(1), 1)
    assert list((tmp_path / "new").iterdir()) == []


# In a session


@pytest.fixture
def session(tmp_path: Path) -> Session:
    path = tmp_path / "session"
    return Session(path, claim_identity(path))


def commit_of(number: int, slots: int) -> Commit:
    mark = RingMark([slots, 0], [Losses(7, "control", 1024, read=slots), Losses(7, "detail", 1024)])
    return Commit(number, number * 10, number * 1000, 0, [BatchMark(7, slots, 0)], {"a-1-1.ring": mark})


def write_commits(session: Session, numbers: range) -> None:
    for number in numbers:
        slots = number % 3  # some have none
        raw = pa.Table.from_pylist(
            [{"process": 7, "ring": 0, "slot": bytes([number % 256, at]) * 64} for at in range(slots)],
            schema=RAW_SCHEMA,
        )
        session.write_raw(raw, commit_of(number, slots))


def commits_of(session: Session) -> list[tuple[int, list[bytes]]]:
    found = []
    for part in session.raw_parts():
        for commit, table in session.read_raw(part):
            found.append((commit.number, table["slot"].to_pylist()))
    return found


def test_raw_commits_are_the_same_after_a_merge(session: Session) -> None:
    write_commits(session, range(1, 2 * BLOCK + 10))
    before = commits_of(session)
    session.merge(2 * BLOCK + 9)
    assert len(session.raw_parts()) == 2 + 9
    assert commits_of(session) == before
    newest = session.read_commits(session.raw_parts()[1])[-1]
    assert newest.rings["a-1-1.ring"].cursors == [newest.number % 3, 0]
    session.merge(2 * BLOCK + 9)
    assert commits_of(session) == before


def test_the_oldest_commits_are_removed_raw_and_derived(session: Session) -> None:
    write_commits(session, range(1, BLOCK + 4))
    for number in (1, BLOCK, BLOCK + 1, BLOCK + 2):
        session.write_table("members", members_of(number), number)
    session.merge(BLOCK + 3)
    sizes = session.sizes()
    assert [part.last for part, _ in sizes] == [BLOCK, BLOCK + 1, BLOCK + 2, BLOCK + 3]
    files = list(session.path.rglob("*.parquet"))
    assert sum(size for _, size in sizes) == sum(path.stat().st_size for path in files)
    session.remove_through(BLOCK + 1)
    assert [number for number, _ in commits_of(session)] == [BLOCK + 2, BLOCK + 3]
    assert session.read_table("members")["handle"].to_pylist() == [BLOCK + 2]


def members_of(handle: int) -> pa.Table:
    from stagetrace.exporters.session import MEMBERS_SCHEMA

    row = {"handle": handle, "instance": 1, "first_step": 1, "last_step": 1}
    return pa.Table.from_pylist([row], schema=MEMBERS_SCHEMA)


@pytest.mark.parametrize("keep", [0, 3, 200, -30, -1])
def test_a_damaged_part_is_named(session: Session, keep: int) -> None:
    write_commits(session, range(1, 4))
    part = session.raw_parts()[1]
    data = part.path.read_bytes()
    part.path.write_bytes(data[:keep])
    with pytest.raises(SessionError, match=r"part-00000002\.parquet is damaged"):
        list(session.read_raw(part))
    assert session.set_aside(part).name == "part-00000002.damaged"
    assert [number for number, _ in commits_of(session)] == [1, 3]


def test_new_tables_take_the_place_of_the_old_ones_only_when_they_are_whole(session: Session) -> None:
    session.write_table("members", members_of(1), 1)
    with pytest.raises(RuntimeError), session.new_tables() as fresh:
        fresh.write_table("members", members_of(2), 1)
        raise RuntimeError
    assert session.read_table("members")["handle"].to_pylist() == [1]
    with session.new_tables() as fresh:
        fresh.write_table("members", members_of(2), 1)
    assert session.read_table("members")["handle"].to_pylist() == [2]
    assert sorted(path.name for path in session.path.iterdir()) == ["session.json", "tables"]


def test_reading_the_newest_parts_alone(session: Session) -> None:
    wall = time.time_ns()
    for number in (1, 2, 3):
        session.write_table("members", members_of(number), number)
        path = session.path / "tables" / "members" / f"part-{number:08}.parquet"
        os.utime(path, ns=(wall + number, wall + number))
    assert session.read_table("members", committed_ns=wall + 2)["handle"].to_pylist() == [2, 3]
    assert session.read_table("members", committed_ns=wall + 9)["handle"].to_pylist() == [3]
    assert session.read_table("members", numbers=(2, 2))["handle"].to_pylist() == [2]
