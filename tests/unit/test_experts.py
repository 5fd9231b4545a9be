"""Tests of counts of tokens by expert: as they are recorded, so they are in the table, whatever their number."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.decoded import NONE
from unit.rings import die, opened, read_all

from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.exporters.assembly.decode import decode
from stagetrace.exporters.assembly.long_records import Parts
from stagetrace.exporters.drain import Batch
from stagetrace.exporters.parts import list_parts, read_part, write_part
from stagetrace.exporters.session import EXPERTS_SCHEMA
from stagetrace.instrument.recorder import Recorder
from stagetrace.instrument.records import EXPERTS_HEAD, SLOT_SIZE, Text

if TYPE_CHECKING:
    from pathlib import Path

    from stagetrace.exporters.drain import Slots

KEY = bytes(16)
INSTANCE = 5


def packed(counts: list[int], width: int) -> bytes:
    return np.array(counts, f"<u{width}").tobytes()


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    """Three layers of a step, with few experts, many, and counts of every width."""
    with opened(tmp_path) as (recorder, reader):
        read_all(reader)
        assert recorder.experts(INSTANCE, 1, 2, 0, 9, packed([4, 5, 0], 1), 1)
        assert recorder.experts(INSTANCE, 1, 2, 1, 9, packed([1] * 256, 2), 2)
        assert recorder.experts(INSTANCE, 1, 2, 2, 70_000, packed([70_000, 1], 4), 4)
        return read_all(reader).detail.copy()


def test_from_the_ring_to_the_table_and_the_disk(slots: Slots, tmp_path: Path):
    assert len(slots) == 1 + 6 + 1, "256 experts of two bytes take six slots"
    assembler = Assembler(KEY)
    assembler.add(Batch(7, NONE, slots))
    table = assembler.take(1)["experts"]
    assert table.schema == EXPERTS_SCHEMA
    rows = sorted(table.to_pylist(), key=lambda row: row["layer"])
    assert [row["counts"] for row in rows] == [[4, 5, 0], [1] * 256, [70_000, 1]]
    shared = {"process": 7, "instance": INSTANCE, "step": 1, "rank": 2}
    assert all(shared.items() <= row.items() for row in rows)
    assert [row["tokens"] for row in rows] == [9, 9, 70_000]
    assert assembler.take(2)["experts"].num_rows == 0
    write_part(tmp_path / "experts", table, 1)
    (part,) = list_parts(tmp_path / "experts")
    assert read_part(part, 1, 1).cast(EXPERTS_SCHEMA).equals(table)
    assert pq.read_schema(part.path).names == EXPERTS_SCHEMA.names


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_any_order_and_any_batches(slots_of_many: Slots, data: st.DataObject):
    order = data.draw(st.permutations(range(len(slots_of_many))))
    cut = data.draw(st.integers(0, len(order)))
    parts = (Parts(), Parts())
    found = [decode(NONE, slots_of_many[[*half]], *parts) for half in (order[:cut], order[cut:]) if half]
    assert not sum(one.corrupt + one.incomplete for one in found)
    rows = {tuple(head): counts for one in found for block in one.experts for head, counts in zipped(block)}
    assert rows == {(INSTANCE, 1, 0, 3, 9): [*range(200)], (INSTANCE, 1, 0, 4, 9): [*range(200, 0, -1)]}


def zipped(block) -> list[tuple[list[int], list[int]]]:  # type: ignore[no-untyped-def]
    return [*zip(block.heads.tolist(), block.counts.tolist(), strict=True)]


@pytest.fixture(scope="module")
def slots_of_many(tmp_path_factory: pytest.TempPathFactory) -> Slots:
    with opened(tmp_path_factory.mktemp("many")) as (recorder, reader):
        read_all(reader)
        recorder.experts(INSTANCE, 1, 0, 3, 9, packed([*range(200)], 2), 2)
        recorder.experts(INSTANCE, 1, 0, 4, 9, packed([*range(200, 0, -1)], 2), 2)
        return read_all(reader).detail.copy()


@pytest.mark.parametrize(
    ("word", "value"),
    [(0, -1), (2, 1 << 31), (3, -1), (4, -1), (5, 0), (5, -3), (5, 1000), (5, 1 << 62), (6, 3), (6, 0), (6, -1)],
)
def test_what_cannot_be_is_corrupt(slots: Slots, word: int, value: int):
    slots["words"][0, 1 + word] = value
    found = decode(NONE, slots, Parts(), Parts())
    assert found.corrupt == 1
    assert sum(len(one.heads) for one in found.experts) == 2


def test_a_lost_part_is_incomplete(slots: Slots):
    assembler = Assembler(KEY)
    assembler.add(Batch(7, NONE, np.delete(slots, 3)))
    assert assembler.finish("lost")["experts"].num_rows == 2
    assert assembler.counts["incomplete"] == 1


def test_more_experts_than_a_record_has_room_for(tmp_path: Path):
    most = (255 * 96 - EXPERTS_HEAD.size) // 4
    with opened(tmp_path) as (recorder, reader):
        read_all(reader)
        assert not recorder.experts(INSTANCE, 1, 0, 0, 1, bytes(4 * (most + 1)), 4)
        assert recorder.experts(INSTANCE, 1, 0, 0, 1, bytes(4 * most), 4)
        assert len(read_all(reader).detail) == 255


def test_a_closed_recorder_takes_them():
    assert Recorder().experts(INSTANCE, 1, 0, 0, 1, bytes(SLOT_SIZE * 9), 4)


def test_names(tmp_path: Path):
    with opened(tmp_path) as (recorder, reader):
        for name in ("tp:0", "custom_all_reduce"):
            assert recorder.text(recorder.handle(name), Text.NAME, name)
        recorder.text(0, Text.PROCESS, json.dumps({"role": "worker", "names": "none"}))
        assembler = Assembler(KEY)
        assembler.add(read_all(reader))
        names = assembler.info[reader.key]["names"]
        assert names == {str(recorder.handle(name)): name for name in ("tp:0", "custom_all_reduce")}
        again = Assembler(KEY)
        again.introduce(reader.key, json.loads(json.dumps(assembler.info[reader.key])), [])
        assert again.info[reader.key]["names"] == names
        die(recorder)
