"""Tests that the assembly's state is bounded whatever the slots hold, and its rows the same however they were added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.test_assemble import PAPERS, Paper, Rigs, ranks_of

from stagetrace.exporters.assembly import assemble as assembly
from stagetrace.exporters.assembly import instances, long_records, membership, requests, segments
from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.exporters.collector import batch_marks, batches_of, raw_table
from stagetrace.exporters.drain import SLOT, Batch, Slots
from stagetrace.exporters.session import TABLES, Commit
from stagetrace.instrument.records import Change, RecordType, Text, header_word
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa

KEY = bytes(16)

# However it was added


def recorded(directory: Any, paper: Paper) -> list[tuple[list[Batch], int]]:
    """What polls brought of what is on paper, and the time of the take after each few of them."""
    takes: list[tuple[list[Batch], int]] = []
    with Rigs(directory, ranks_of(paper)) as rig:
        batches: list[Batch] = []
        for number, (ring, method, arguments) in enumerate(paper.events):
            getattr(rig.recorders[ring], method)(*arguments)
            if number % 7 == 6:
                batches += [reader.poll() for reader in rig.readers.values()]
            if number % 40 == 39:
                takes.append((batches, paper.now))
                batches = []
        for _ in range(4):
            batches += [reader.poll() for reader in rig.readers.values()]
        takes.append((batches, paper.now))
    return takes


def tables_of(takes: list[tuple[list[Batch], int]]) -> list[dict[str, pa.Table]]:
    assembler = Assembler(KEY)
    found = []
    for batches, now in takes:
        for batch in batches:
            assembler.add(batch)
        found.append(assembler.take(now))
    return [*found, assembler.finish()]


def split(batch: Batch, at: float) -> list[Batch]:
    """The same slots in two batches, as two polls bring them."""
    control, detail = int(len(batch.control) * at), int(len(batch.detail) * at)
    return [
        Batch(batch.process, batch.control[:control], batch.detail[:detail], batch.gap, batch.gap_end),
        Batch(batch.process, batch.control[control:], batch.detail[detail:], gap_end=batch.gap_end, ended=batch.ended),
    ]


@given(PAPERS, st.floats(0, 1), st.sets(st.integers(0, 60)))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_same_slots_between_two_takes_give_the_same_tables(
    tmp_path_factory: pytest.TempPathFactory, paper: Paper, at: float, gaps: set[int]
):
    """A session is rebuilt from raw parts: byte for byte, in the same order, also where batches were taken apart."""
    takes = recorded(tmp_path_factory.mktemp("paper"), paper)
    whole = tables_of(takes)
    assert [{name: table.to_pylist() for name, table in tables.items()} for tables in whole] == [
        {name: table.to_pylist() for name, table in tables.items()} for tables in tables_of(takes)
    ]
    stored = [
        ([*batches_of(Commit(1, now, now, batches=batch_marks(batches)), raw_table(batches))], now)
        for batches, now in takes
    ]
    halves = [([half for batch in batches for half in split(batch, at)], now) for batches, now in takes]
    for other in (tables_of(stored), tables_of(halves)):
        for one, two in zip(whole, other, strict=True):
            assert all(one[name].equals(two[name]) for name in TABLES)
    for number, batch in enumerate(batch for batches, _ in takes for batch in batches):
        batch.gap = number in gaps
    halves = [([half for batch in batches for half in split(batch, at)], now) for batches, now in takes]
    for one, two in zip(tables_of(takes), tables_of(halves), strict=True):
        assert all(one[name].equals(two[name]) for name in TABLES)


# Whatever it is

COUNT = 3_000
ROUNDS = 4


def slots(fill: Callable[[Slots, Any], None], first: int) -> Slots:
    made = np.zeros(COUNT, SLOT)
    made["first"] = made["last"] = np.arange(first, first + COUNT)
    fill(made, np.arange(first, first + COUNT))
    return made


def segment(stage: str, **columns: Callable[[Any], Any]) -> Callable[[Slots, Any], None]:
    names = ("thread", "begin", "end", "instance", "step")

    def fill(made: Slots, number: Any) -> None:
        made["header"] = header_word(RecordType.SEGMENT, BY_NAME[stage].id)
        for name, column in columns.items():
            made["words"][:, names.index(name)] = column(number)

    return fill


def step_begins(instance: Callable[[Any], Any]) -> Callable[[Slots, Any], None]:
    def fill(made: Slots, number: Any) -> None:
        part = (number - number[0]) % 2
        headers = [header_word(RecordType.STEP_BEGIN, 0, which, 2) for which in (0, 1)]
        made["header"] = np.where(part == 0, *headers)
        made["words"][:, 0] = number - part
        made["words"][part == 0, 4] = instance(number[part == 0])
        made["words"][part == 0, 5] = number[part == 0]

    return fill


def control(type_: RecordType, what: int, parts: int, **columns: Any) -> Callable[[Slots, Any], None]:
    def fill(made: Slots, number: Any) -> None:
        made["header"] = header_word(type_, what, 0, parts)
        for name, column in columns.items():
            made["words"][:, int(name.removeprefix("w"))] = column(number) if callable(column) else column

    return fill


def same(number: Any) -> Any:
    return number


DETAIL = {
    "segments of many threads": segment("forward", thread=same, end=lambda n: n + 9),
    "segments inside one another": segment("forward", begin=lambda n: COUNT * ROUNDS - n, end=lambda n: COUNT * 9 + n),
    "segments that cross": segment("forward", begin=same, end=lambda n: n + 100),
    "segments of steps that never end": segment("rank_step", begin=same, end=same, instance=same, step=same),
    "steps that never end": step_begins(lambda n: 7 + 0 * n),
    "steps of many instances": step_begins(same),
}
CONTROL = {
    "changes of a step that never ends": control(RecordType.MEMBER, Change.JOIN, 1, w0=same, w3=7, w4=2**62),
    "changes of many instances": control(RecordType.MEMBER, Change.JOIN, 1, w0=same, w3=same, w4=1),
    "requests that never end": control(RecordType.STATE, BY_NAME["queue"].id, 1, w1=same, w2=same),
    "a request of many states": control(RecordType.STATE, BY_NAME["decode"].id, 1, w1=same, w2=7),
    "names of no request": control(RecordType.TEXT, 0, 1, w0=same, w1=same, w2=Text.REQUEST_ID, w3=8),
    "processes": control(RecordType.TEXT, 0, 1, w0=same, w2=Text.PROCESS, w3=2, w4=0x7D7B),
    "first parts": control(RecordType.TEXT, 0, 9, w0=same),
}


@pytest.mark.parametrize("what", [*DETAIL, *CONTROL])
def test_state_is_bounded(what: str, monkeypatch: pytest.MonkeyPatch):
    """With bounds a hundredth of what they are, so that few slots will do."""
    bounds = {
        segments: {"_MOST_PENDING": 200, "_MOST_PENDING_IN_ALL": 400, "_MOST_HELD": 400, "_MOST_SCHEDULERS": 20},
        instances: {"_MOST_OPEN": 50, "_MOST_WAITING": 50, "_MOST_COVERED": 200},
        membership: {"_MOST_CHANGES": 200, "_MOST_MEMBERS": 200},
        requests: {"_MOST_REQUESTS": 300, "_MOST_RECORDS": 500},
        long_records: {"_MOST_OPEN": 40},
        assembly: {"_MOST_INSTANCES": 20},
    }
    for module, limits in bounds.items():
        for name, limit in limits.items():
            monkeypatch.setattr(module, name, limit)
    assembler = Assembler(KEY)
    rows = 0
    for number in range(ROUNDS):
        made = slots((DETAIL | CONTROL)[what], 1 + number * COUNT)
        none = made[:0]
        assembler.add(Batch(1, none, made) if what in DETAIL else Batch(1, made, none))
        rows += sum(table.num_rows for table in assembler.take(number * 10**9).values())
        assert max(assembler.sizes().values()) <= 500, assembler.sizes()
    assert assembler.counts["corrupt"] == 0
    rows += sum(table.num_rows for table in assembler.finish().values())
    given_up = sum(count for name, count in assembler.counts.items() if name.endswith("given_up"))
    assert rows + given_up + assembler.counts["incomplete"] > 0 or what == "processes"
    if what.startswith("segments"):
        assert rows == COUNT * ROUNDS


@given(
    st.integers(0, 2**32),
    st.lists(st.sampled_from([0, 1, 2, 7, 2**31, 2**62, 2**63 - 1, -1, -(2**63)]), min_size=1),
)
@settings(max_examples=60, deadline=None)
def test_words_of_any_size_never_stop_the_assembly(seed: int, words: list[int]):
    """Records of the right types whose times, steps, instances and requests are as large as words can be."""
    random = np.random.default_rng(seed)
    assembler = Assembler(KEY)
    for ring, types in ((0, (2, 3, 6, 7, 8)), (1, (1, 1, 4, 4, 5))):
        made = np.zeros(120, SLOT)
        made["first"] = made["last"] = np.arange(1, 121)
        kind = random.choice(types, 120)
        long = np.isin(kind, (4, 7, 8))
        part = np.where(kind == 4, np.arange(120) % 2, 0)
        stage = np.select([kind == 1, kind == 2], [random.choice((2, 31, 51, 128), 120), random.integers(10, 19, 120)])
        stage = np.where(np.isin(kind, (3, 6)), random.integers(1, 4, 120), stage)
        made["header"] = kind | part << 8 | np.where(kind == 4, 2, 1) << 16 | stage << 32
        made["words"] = random.choice(np.array(words, np.int64), (120, 13))
        made["words"][:, 2] = np.maximum(made["words"][:, 1:3].max(axis=1), 0)
        made["words"][long, 0] = (made["first"] - part.astype(np.uint64))[long]
        assembler.add(Batch(1, made, made[:0]) if ring == 0 else Batch(1, made[:0], made))
    for now in (0, 10**10, 2**62):
        assert [*assembler.take(now)] == [*TABLES]
    tables = assembler.finish("lost")
    assert {name: table.schema for name, table in tables.items()} == TABLES
