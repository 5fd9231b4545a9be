"""Tests of the assembly, through real rings: steps, who was in them, time in no segment, and any way of polling."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.rings import MARGIN, SLOTS, die, forge, opened, read_all

from stagetrace.exporters.assembly.assemble import RANKS_PATIENCE_NS, REQUEST_PATIENCE_NS, STEP_PATIENCE_NS, Assembler
from stagetrace.exporters.session import TABLES
from stagetrace.instrument.records import Change, Event, RecordType, header_word
from stagetrace.instrument.stages import BY_ID, BY_NAME, STEP_COMPOSITION, Finish

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import pyarrow as pa

    from stagetrace.exporters.drain import RingReader
    from stagetrace.instrument.recorder import Recorder

INSTANCE = 2**62 + 5
KEY = bytes(16)
Rows = dict[str, list[dict[str, Any]]]


def segment(stage: str) -> int:
    return header_word(RecordType.SEGMENT, BY_NAME[stage].id)


def state(stage: str) -> int:
    return header_word(RecordType.STATE, BY_NAME[stage].id)


def composition(**values: int) -> tuple[int, ...]:
    names = [attribute.name for attribute in STEP_COMPOSITION]
    assert {*values} <= {*names}
    return tuple(values.get(name, 0) for name in names)


# A small engine on paper: its schedule is drawn, what must come out of it is counted by brute force


@dataclass
class Plan:
    """What requests do from the step in which they are first scheduled on."""

    start: int
    chunks: int  # steps of prefill; the last of them gives the first token
    takes_part: list[bool]  # the steps after those; it is finished with the last in which it does


@dataclass
class Times:
    """Durations in one step, ns."""

    pause: int  # before schedule: between, or nothing recorded
    named: bool
    schedule: int
    handing: int  # after schedule, recorded nowhere
    execute: int
    forward: int  # inside execute, where worker and scheduler share the thread
    waiting: int  # after execute, recorded nowhere
    update: int


@dataclass
class Paper:
    """What an engine that follows the plans writes, and what is true of it."""

    events: list[tuple[str, str, tuple[Any, ...]]] = field(default_factory=list)  # ring, method, arguments
    now: int = 1_000
    takers: dict[int, dict[int, tuple[int, int] | None]] = field(default_factory=dict)  # step -> request -> chunk, of
    begin: dict[int, int] = field(default_factory=dict)
    end: dict[int, int] = field(default_factory=dict)
    covered: set[int] = field(default_factory=set)  # instants of the scheduler's timeline in segments

    def write(self, method: str, *arguments: Any, ring: str = "engine") -> None:
        self.events.append((ring, method, arguments))

    def cover(self, begin: int, end: int) -> None:
        self.covered |= {*range(begin, end)}


def on_paper(plans: list[Plan], times: list[Times], every: int, overlapped: bool, ranks: int) -> Paper:
    """Steps numbered from 1 for the plans' steps in which anybody takes part."""
    paper = Paper()
    by_time: dict[int, dict[int, tuple[int, int] | None]] = {}
    for number, plan in enumerate(plans):
        for chunk in range(plan.chunks):
            by_time.setdefault(plan.start + chunk, {})[number + 1] = (chunk, plan.chunks)
        for offset, takes_part in enumerate(plan.takes_part):
            if takes_part:
                by_time.setdefault(plan.start + plan.chunks + offset, {})[number + 1] = None
    for step, at in enumerate(sorted(by_time), 1):
        paper.takers[step] = by_time[at]
    first = {
        request: min(s for s, who in paper.takers.items() if request in who) for request in range(1, len(plans) + 1)
    }
    last = {
        request: max(s for s, who in paper.takers.items() if request in who) for request in range(1, len(plans) + 1)
    }
    for request in first:
        paper.write("state", state("request_tokenize"), paper.now, request, 0, 0, 40, 9, 0, ring="front")
        paper.write("state", state("queue"), paper.now + 1, request, INSTANCE, 0, 40)
        paper.now += 2

    def schedule(step: int) -> None:
        now, took = paper.now, times[(step - 1) % len(times)]
        begin = now + took.pause
        scheduled = begin + took.schedule
        before, who = paper.takers.get(step - 1, {}), paper.takers[step]
        chunks = {request: chunk for request, chunk in who.items() if chunk is not None}
        for request, (chunk, of) in chunks.items():
            if chunk == 0:
                paper.write("state", state("prefill"), begin, request, INSTANCE, step, 0, 0)
            words = (request, 10, 10 * (chunk + 1), INSTANCE, step, int(chunk + 1 == of), 0)
            paper.write("member", header_word(RecordType.MEMBER, Change.CHUNK), *words)
        for request in before.keys() - who.keys():
            paper.write("member", header_word(RecordType.MEMBER, Change.LEAVE), request, 0, 0, INSTANCE, step)
        for request in who.keys() - before.keys():
            paper.write("member", header_word(RecordType.MEMBER, Change.JOIN), request, 0, 0, INSTANCE, step)
        if (step - 1) % every == 0:
            paper.write("snapshot", INSTANCE, step, tuple(who))
        words = composition(
            prefill_requests=len(chunks),
            decode_requests=len(who) - len(chunks),
            prefill_tokens=10 * len(chunks),
            decode_tokens=len(who) - len(chunks),
        )
        paper.write("step_begin", begin, scheduled, INSTANCE, step, words)
        if took.named and took.pause:
            paper.write("segment", segment("between"), now, begin, 0, 0)
            paper.cover(now, begin)
        paper.write("segment", segment("schedule"), begin, scheduled, INSTANCE, step)
        paper.cover(begin, scheduled)
        paper.begin[step], paper.now = begin, scheduled

    def update(step: int) -> None:
        took = times[(step - 1) % len(times)]
        execute = paper.now + took.handing
        done = execute + took.execute
        inside = min(took.forward, took.execute)
        if ranks:
            for rank in range(ranks):
                ids = (INSTANCE, step, rank, 1)
                paper.write("segment", segment("forward"), execute, execute + inside, *ids, ring=f"worker {rank}")
                paper.write("segment", segment("rank_step"), execute, done, *ids, ring=f"worker {rank}")
        else:
            paper.write("segment", segment("forward"), execute, execute + inside, INSTANCE, step, 0, 1)
            paper.write("segment", segment("rank_step"), execute, done, INSTANCE, step, 0, 1)
        end = done + took.waiting + took.update
        for request, chunk in paper.takers[step].items():
            if chunk is not None and chunk[0] + 1 == chunk[1]:
                paper.write("state", state("decode"), end, request, INSTANCE, step, 1)
            if last[request] == step:
                finished = header_word(RecordType.EVENT, Event.FINISHED)
                paper.write("state", finished, end, request, INSTANCE, step, Finish.LENGTH, 7, 40, 0)
        paper.write("segment", segment("execute"), execute, done, INSTANCE, step)
        paper.write("segment", segment("update"), done + took.waiting, end, INSTANCE, step)
        paper.cover(execute, done)
        paper.cover(done + took.waiting, end)
        paper.write("step_end", end, INSTANCE, step)
        for request in [request for request in paper.takers[step] if last[request] == step]:
            output = header_word(RecordType.EVENT, Event.LAST_OUTPUT)
            paper.write("state", output, end + 1, request, 0, 0, Finish.LENGTH, 7, 40, 0, ring="front")
        paper.end[step], paper.now = end, end

    steps = [*paper.takers]
    if overlapped:
        for step in steps:  # the next step is scheduled before this one's results are taken in
            if step == 1:
                schedule(step)
            if step + 1 in paper.takers:
                schedule(step + 1)
            update(step)
    else:
        for step in steps:
            schedule(step)
            update(step)
    return paper


DURATION = st.integers(1, 15)
PLANS = st.lists(
    st.builds(
        Plan,
        st.integers(0, 8),
        st.integers(1, 3),
        st.lists(st.booleans(), max_size=9).map(lambda found: [*found, True]) | st.just([]),
    ),
    min_size=1,
    max_size=5,
)
TIMES = st.lists(
    st.builds(Times, st.integers(0, 9), st.booleans(), DURATION, st.integers(0, 4), DURATION, DURATION,
              st.integers(0, 3), DURATION),
    min_size=1,
    max_size=4,
)  # fmt: skip
PAPERS = st.builds(on_paper, PLANS, TIMES, st.sampled_from([1, 3, 128]), st.booleans(), st.sampled_from([0, 1, 2]))


@dataclass
class Rig:
    """Rings of a front end, an engine core and workers, and one assembler behind them."""

    recorders: dict[str, Recorder]
    readers: dict[str, RingReader]
    assembler: Assembler = field(default_factory=lambda: Assembler(KEY))
    rows: Rows = field(default_factory=lambda: {name: [] for name in TABLES})

    def poll(self, take_at: int | None = None) -> None:
        """What a collector does in one round, which may end in a commit."""
        for reader in self.readers.values():
            self.assembler.add(reader.poll())
        if take_at is not None:
            for reader in self.readers.values():
                reader.committed()
            self.keep(self.assembler.take(take_at))

    def keep(self, tables: dict[str, pa.Table]) -> None:
        for name, table in tables.items():
            assert table.schema == TABLES[name]
            self.rows[name] += table.to_pylist()

    def finish(self, status: str = "open") -> Rows:
        """Everything that was taken, and the rest."""
        for _ in range(5):
            self.poll()
        self.keep(self.assembler.finish(status))
        return self.rows


def sorted_rows(rows: Rows) -> Rows:
    """In an order that does not depend on when they were taken."""
    return {name: sorted(found, key=lambda row: str([*row.items()])) for name, found in rows.items()}


class Rigs:
    """A rig's context: `with Rigs(directory, ranks) as rig`."""

    def __init__(self, directory: Path, ranks: int = 0):

        self.stack = ExitStack()
        roles = {"engine": {"instance": INSTANCE, "world_size": max(ranks, 1)}, "front": {}}
        roles |= {f"worker {rank}": {"rank": rank} for rank in range(ranks)}
        recorders, readers = {}, {}
        for role, info in roles.items():
            pair = opened(directory / role, role=role.replace(" ", "_"), **info)
            recorders[role], readers[role] = self.stack.enter_context(pair)
        self.rig = Rig(recorders, readers)

    def __enter__(self) -> Rig:
        return self.rig

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def ranks_of(paper: Paper) -> int:
    return len({ring for ring, *_ in paper.events if ring.startswith("worker")})


def play(directory: Path, paper: Paper, polls: dict[int, bool] | None = None) -> Rows:
    """The tables of what is on paper, polled after those events (and taken, where it says True), then at the end."""
    with Rigs(directory, ranks_of(paper)) as rig:
        for number, (ring, method, arguments) in enumerate(paper.events):
            assert getattr(rig.recorders[ring], method)(*arguments) is not False
            if polls and number in polls:
                rig.poll(paper.now if polls[number] else None)
        rows = rig.finish()
        assert rig.assembler.counts["accounting_conflict"] == 0
        assert rig.assembler.counts["corrupt"] == 0
        for reader in rig.readers.values():
            assert sum(area.losses.lost for area in reader.areas) == 0
    return rows


def runs(steps: Iterable[int]) -> list[tuple[int, int]]:
    """Consecutive numbers, as (first, last)."""
    found: list[list[int]] = []
    for step in sorted(steps):
        if found and found[-1][1] == step - 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    return [(first, last) for first, last in found]


@given(PAPERS)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_steps_members_and_intervals_are_what_the_schedule_says(tmp_path_factory: pytest.TempPathFactory, paper: Paper):
    rows = play(tmp_path_factory.mktemp("paper"), paper)
    steps = {row["step"]: row for row in rows["steps"]}
    assert [*steps] == [*paper.takers] or sorted(steps) == sorted(paper.takers)
    gets_token = {
        step: {request for request, chunk in who.items() if chunk is None or chunk[0] + 1 == chunk[1]}
        for step, who in paper.takers.items()
    }
    for step, row in steps.items():
        assert (row["instance"], row["status"]) == (INSTANCE, "complete")
        assert (row["begin_ns"], row["end_ns"]) == (paper.begin[step], paper.end[step])
        assert row["members"] == len(paper.takers[step])
        assert row["output_tokens"] == len(gets_token[step])
        assert row["ranks_reported"] == row["ranks_expected"] == max(ranks_of(paper), 1)
        assert row["unattributed_ns"] == len({*range(paper.begin[step], paper.end[step])} - paper.covered)
        chunks = {request for request, chunk in paper.takers[step].items() if chunk is not None}
        kinds = {bool(chunks): "prefill", bool(paper.takers[step].keys() - chunks): "decode"}
        assert row["phase"] == ("mixed" if len(chunks) not in (0, row["members"]) else kinds[True])

    requests = {request for who in paper.takers.values() for request in who}
    found = sorted((row["handle"], row["first_step"], row["last_step"]) for row in rows["members"])
    assert found == sorted(
        (request, *run)
        for request in requests
        for run in runs(step for step, who in paper.takers.items() if request in who)
    )

    intervals: Counter[tuple[int, int]] = Counter()
    for request in requests:
        tokens = [step for step, who in gets_token.items() if request in who]
        for before, after in itertools.pairwise(tokens):
            intervals[after, paper.end[after] - paper.end[before]] += 1
    assert {(row["step"], row["interval_ns"]): row["tokens"] for row in rows["intervals"]} == dict(intervals)
    assert all(row["phase"] == steps[row["step"]]["phase"] for row in rows["intervals"])

    chunk = BY_NAME["prefill_chunk"].id
    assert sorted(
        (row["handle"], row["step"], row["a1"], row["a2"]) for row in rows["states"] if row["stage"] == chunk
    ) == sorted(
        (request, step, 10 * (chunk[0] + 1), int(chunk[0] + 1 == chunk[1]))
        for step, who in paper.takers.items()
        for request, chunk in who.items()
        if chunk is not None
    )
    assert sorted(row["handle"] for row in rows["requests"]) == sorted(requests)
    for row in rows["requests"]:
        mine = [step for step, who in paper.takers.items() if row["handle"] in who]
        assert (row["status"], row["last_token_ns"]) == ("finished", paper.end[mine[-1]])
        assert row["scheduled_ns"] == paper.begin[mine[0]]
    check_segments(rows, paper)


def check_segments(rows: Rows, paper: Paper) -> None:
    """Every segment once, in its step, inside what holds it; and each timeline's self times add up."""
    written = [arguments for _, method, arguments in paper.events if method == "segment"]
    assert len(rows["segments"]) == len(written)
    by_key = {(row["process"], row["sequence"]): row for row in rows["segments"]}
    assert len(by_key) == len(written)
    own_thread = ranks_of(paper) == 0
    outermost = 0
    for row in rows["segments"]:
        if row["stage"] == BY_NAME["forward"].id:
            assert row["parent_stage"] == BY_NAME["rank_step"].id
        elif row["stage"] == BY_NAME["rank_step"].id:
            assert row["parent_stage"] == (BY_NAME["execute"].id if own_thread else None)
        else:
            assert row["parent"] is None
        if row["parent"] is None:
            outermost += row["end_ns"] - row["begin_ns"]
        else:
            assert by_key[row["process"], row["parent"]]["stage"] == row["parent_stage"]
        assert (row["step"] is None) == (row["stage"] == BY_NAME["between"].id)
        assert (row["phase"] is None) == (row["step"] is None)
    assert sum(row["self_ns"] for row in rows["segments"]) == outermost


@given(PAPERS, st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_way_of_polling_makes_no_difference(
    tmp_path_factory: pytest.TempPathFactory, paper: Paper, data: st.DataObject
):
    polls = data.draw(st.dictionaries(st.integers(0, len(paper.events) - 1), st.booleans(), max_size=25))
    directory = tmp_path_factory.mktemp("polls")
    at_once = play(directory / "at once", paper)
    by_and_by = play(directory / "by and by", paper, polls)
    keys = {"process"}  # a hash of the ring's name, in which a time is

    def comparable(rows: Rows) -> Rows:
        return sorted_rows(
            {name: [{k: v for k, v in row.items() if k not in keys} for row in found] for name, found in rows.items()}
        )

    one, other = comparable(at_once), comparable(by_and_by)
    for name in TABLES:
        assert other[name] == one[name], name


def test_polling_after_every_record_makes_no_difference(tmp_path: Path):
    plans = [Plan(0, 2, [True] * 4), Plan(1, 1, [True, False, True]), Plan(6, 3, [])]
    paper = on_paper(plans, [Times(2, True, 3, 1, 5, 2, 1, 2)], 4, True, 1)
    at_once = play(tmp_path / "at once", paper)
    always = play(tmp_path / "always", paper, dict.fromkeys(range(len(paper.events)), True))
    for name in ("requests", "members", "steps", "intervals", "states"):
        one, other = (
            sorted([{k: v for k, v in row.items() if k != "process"} for row in rows[name]], key=str)
            for rows in (at_once, always)
        )
        assert one == other, name


# Single cases, each through rings


@dataclass
class Steps:
    """Writes steps one after the other, 100 ns each."""

    rig: Rig
    step: int = 0
    now: int = 1_000

    def run(self, *, begin: bool = True, end: bool = True, ranks: tuple[int, ...] | None = (0,), **words: int) -> int:
        """One step; its number."""
        recorder = self.rig.recorders["engine"]
        self.step += 1
        at = self.now
        ids = (INSTANCE, self.step)
        if begin:
            recorder.step_begin(at, at + 10, *ids, composition(decode_tokens=1, **words))
            recorder.segment(segment("schedule"), at, at + 10, *ids)
        for rank in ranks or ():
            recorder.segment(segment("rank_step"), at + 20, at + 80, *ids, rank, 1)
        if end:
            recorder.segment(segment("execute"), at + 10, at + 85, *ids)
            recorder.segment(segment("update"), at + 90, at + 100, *ids)
            recorder.step_end(at + 100, *ids)
        self.now += 100
        return self.step

    def snapshot(self, *requests: int) -> bool:
        """Who is in the next step."""
        return self.rig.recorders["engine"].snapshot(INSTANCE, self.step + 1, requests)

    def change(self, change: Change, request: int) -> bool:
        """A change at the next step."""
        recorder = self.rig.recorders["engine"]
        return recorder.member(header_word(RecordType.MEMBER, change), request, 0, 0, INSTANCE, self.step + 1)


@pytest.fixture
def rig(tmp_path: Path):
    with Rigs(tmp_path) as made:
        yield made


def members(rows: Rows) -> dict[int, int | None]:
    return {row["step"]: row["members"] for row in rows["steps"]}


def test_two_steps_by_hand(rig: Rig):
    """The numbers of a prefill and a decode step, without the model above."""
    steps = Steps(rig)
    steps.snapshot(1, 2)
    steps.run()
    steps.run()
    rows = rig.finish()
    one, two = rows["steps"]
    assert (one["begin_ns"], one["scheduled_ns"], one["end_ns"]) == (1_000, 1_010, 1_100)
    assert (one["unattributed_ns"], two["unattributed_ns"]) == (5, 5)
    assert (one["members"], one["output_tokens"], two["output_tokens"]) == (2, 2, 2)
    assert [(row["step"], row["interval_ns"], row["tokens"]) for row in rows["intervals"]] == [(2, 100, 2)]
    execute = next(row for row in rows["segments"] if row["stage"] == BY_NAME["execute"].id)
    assert execute["self_ns"] == 75 - 60


def test_membership_is_unknown_before_the_first_snapshot(rig: Rig):
    steps = Steps(rig)
    steps.change(Change.JOIN, 1)
    steps.run()
    steps.snapshot(1, 2)
    steps.run()
    rows = rig.finish()
    assert members(rows) == {1: None, 2: 2}
    assert [row["output_tokens"] for row in rows["steps"]] == [None, 2]
    assert {(row["handle"], row["first_step"]) for row in rows["members"]} == {(1, 2), (2, 2)}


def fill(recorder: Recorder) -> None:
    """Leaves no room in the control ring."""
    while recorder.state(state("queue"), 1, 999):
        pass


@given(st.sets(st.integers(0, 40), max_size=12), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_after_a_dropped_change_members_are_unknown_until_a_snapshot_that_is_later(
    tmp_path_factory: pytest.TempPathFactory, polls: set[int], more: int
):
    """However it is polled: what is said of a step is true, and after the next snapshot it is said."""
    with Rigs(tmp_path_factory.mktemp("drop")) as rig:
        steps = Steps(rig)
        moment = iter(range(100))

        def may_poll() -> None:
            if next(moment) in polls:
                rig.poll()

        truth: dict[int, set[int]] = {}

        def run(*who: int) -> None:
            may_poll()
            truth[steps.run()] = {*who}
            may_poll()

        assert steps.snapshot(1, 2)
        run(1, 2)
        run(1, 2)
        fill(rig.recorders["engine"])
        may_poll()
        assert not steps.change(Change.LEAVE, 1)
        assert not steps.snapshot(2)
        run(2)
        assert not steps.snapshot(2)
        run(2)
        for _ in range(2):
            rig.poll()
        for reader in rig.readers.values():
            reader.committed()
        for _ in range(more):
            run(2)  # the engine was late with its snapshot
        may_poll()
        assert steps.snapshot(2)
        may_poll()
        healed = steps.step + 1
        run(2)
        assert steps.change(Change.JOIN, 3)
        run(2, 3)
        rows = rig.finish()
        dropped = rig.readers["engine"].areas[0].losses.dropped
    assert dropped >= 4
    for step, count in members(rows).items():
        assert count in (None, len(truth[step])), "a wrong count of members"
        assert count is not None or step < healed
        assert count is None or not 2 < step < healed
    for row in rows["members"]:
        for step in range(row["first_step"], row["last_step"] + 1):
            assert row["handle"] in truth[step]
            assert step < 3 or step >= healed


def test_membership_that_is_known_when_a_change_is_dropped_ends_there(rig: Rig):
    steps = Steps(rig)
    steps.snapshot(1, 2)
    steps.run()
    steps.run()
    rig.poll()
    rig.poll()
    fill(rig.recorders["engine"])
    rig.poll()
    steps.run()
    rows = rig.finish()
    assert members(rows) == {1: 2, 2: 2, 3: None}
    assert [(row["first_step"], row["last_step"]) for row in rows["members"]] == [(1, 2)] * 2


def test_a_snapshot_from_before_a_drop_heals_nothing(rig: Rig):
    """A collector that comes late learns of the drop before it has read who the process is."""
    steps = Steps(rig)
    steps.snapshot(1, 2)
    fill(rig.recorders["engine"])
    steps.change(Change.LEAVE, 1)
    steps.run()
    for _ in range(3):
        rig.poll(0)
    steps.snapshot(2)
    steps.run()
    assert members(rig.finish()) == {1: None, 2: 1}


@pytest.mark.parametrize("damage", [{"first": 0, "last": 0}, {"last": 0}, {"first": 9, "last": 9}])
def test_a_change_whose_slot_is_lost_makes_members_unknown(rig: Rig, damage: dict[str, int]):
    steps = Steps(rig)
    steps.snapshot(1, 2)
    steps.run()
    steps.change(Change.LEAVE, 1)
    steps.run()
    steps.snapshot(2)
    steps.run()
    index = int(read_index(rig, Change.LEAVE))
    forge(rig.readers["engine"].path, "control", index, **damage)
    found = members(rig.finish())
    assert found[2] is None
    assert found[3] == 1


def read_index(rig: Rig, change: Change) -> int:
    """The slot that holds a change."""
    area = rig.readers["engine"].areas[0]
    (found,) = (area.slots["header"] == header_word(RecordType.MEMBER, change)).nonzero()[0]
    return int(found)


def test_a_lost_step_makes_no_interval(rig: Rig):
    """Who received a token in it is not known, so the next one has no interval."""
    steps = Steps(rig)
    steps.snapshot(1)
    steps.run()
    steps.run()
    steps.run(end=False)
    steps.run()
    steps.run()
    rows = rig.finish()
    assert [(row["step"], row["interval_ns"]) for row in rows["intervals"]] == [(2, 100), (5, 100)]
    assert members(rows)[4] == 1


def test_a_step_without_an_end_is_partial_once_it_is_overtaken(rig: Rig):
    """Recording was switched off in it, say. What is held for it does not grow with the steps that follow."""
    steps = Steps(rig)
    steps.snapshot(1)
    steps.run(end=False)
    for number in range(200):
        steps.run()
        if number % 50 == 49:
            rig.poll()
    for _ in range(3):
        rig.poll(steps.now)
    sizes = rig.assembler.sizes()
    assert sizes["covered"] < 10
    assert sizes["steps"] == 0
    first, *others = sorted(rig.rows["steps"], key=lambda row: row["step"])
    assert (first["status"], first["begin_ns"], first["end_ns"]) == ("partial", 1_000, 1_010)
    assert {row["status"] for row in others} == {"complete"}
    assert {row["unattributed_ns"] for row in others} == {5}


def test_a_step_whose_begin_was_lost_is_counted(rig: Rig):
    steps = Steps(rig)
    steps.snapshot(1)
    steps.run(begin=False)
    steps.run()
    rows = rig.finish()
    assert [*members(rows)] == [2]
    assert rig.assembler.counts["steps_without_begin"] == 1
    lost = [row for row in rows["segments"] if row["step"] == 1]
    assert {row["phase"] for row in lost} == {None}
    assert len(lost) == 3


def test_a_chunk_of_a_lost_step_is_counted(rig: Rig):
    steps = Steps(rig)
    steps.snapshot(1)
    steps.run()
    assert steps.change(Change.CHUNK, 2)
    steps.run(end=False)
    steps.run()
    rows = rig.finish()
    assert rig.assembler.counts["chunks_without_step"] == 1
    assert members(rows)[3] == 2
    assert not rows["states"]


# Ranks


def reported(rows: Rows) -> dict[int, tuple[str, int, int]]:
    return {row["step"]: (row["status"], row["ranks_expected"], row["ranks_reported"]) for row in rows["steps"]}


@pytest.mark.parametrize("first", ["worker 0", "engine"])
def test_ranks_may_report_before_or_after_the_scheduler(tmp_path: Path, first: str):
    with Rigs(tmp_path, 2) as rig:
        steps = Steps(rig)
        at = steps.now

        def engine() -> None:
            steps.run(ranks=None)

        def workers() -> None:
            for rank in range(2):
                rig.recorders[f"worker {rank}"].segment(segment("forward"), at + 30, at + 70, INSTANCE, 1, rank, 1)
                rig.recorders[f"worker {rank}"].segment(segment("rank_step"), at + 20, at + 80, INSTANCE, 1, rank, 1)

        for write in (engine, workers) if first == "engine" else (workers, engine):
            write()
            for _ in range(3):
                rig.poll(at + 200)
        assert reported(rig.rows) == {1: ("complete", 2, 2)}
        inside = [row for row in rig.rows["segments"] if row["stage"] == BY_NAME["forward"].id]
        assert [row["phase"] for row in inside] == ["decode"] * 2
        assert {row["parent_stage"] for row in inside} == {BY_NAME["rank_step"].id}
        rig.finish()
        assert len(rig.rows["segments"]) == 7


def test_a_rank_that_does_not_report_in_time_is_missing(tmp_path: Path):
    with Rigs(tmp_path, 2) as rig:
        steps = Steps(rig)
        at = steps.now
        steps.run(ranks=None)
        rig.recorders["worker 1"].segment(segment("rank_step"), at + 20, at + 80, INSTANCE, 1, 1, 1)
        for _ in range(3):
            rig.poll(at + 100 + RANKS_PATIENCE_NS)
        assert reported(rig.rows) == {}
        rig.poll(at + 101 + RANKS_PATIENCE_NS)
        assert reported(rig.rows) == {1: ("ranks_missing", 2, 1)}
        rig.recorders["worker 0"].segment(segment("rank_step"), at + 20, at + 80, INSTANCE, 1, 0, 1)
        for _ in range(3):
            rig.poll(at + 200 + RANKS_PATIENCE_NS)
        assert rig.assembler.sizes()["segments"] == 0
        rows = rig.finish()
        assert reported(rows) == {1: ("ranks_missing", 2, 1)}
        assert len([row for row in rows["segments"] if row["stage"] == BY_NAME["rank_step"].id]) == 2


def test_a_rank_missing_at_the_end_is_missing(tmp_path: Path):
    with Rigs(tmp_path, 2) as rig:
        Steps(rig).run(ranks=None)
        assert reported(rig.finish()) == {1: ("ranks_missing", 2, 0)}


# Segments


def test_a_crossing_segment_is_cut_and_counted(rig: Rig):
    recorder = rig.recorders["engine"]
    recorder.segment(segment("forward"), 50, 120, INSTANCE, 1, 0, 1)
    recorder.segment(segment("rank_step"), 0, 100, INSTANCE, 1, 0, 1)
    rows = rig.finish()
    assert rig.assembler.counts["accounting_conflict"] == 1
    forward, rank_step = sorted(rows["segments"], key=lambda row: row["sequence"])
    assert (forward["end_ns"], forward["parent"]) == (100, rank_step["sequence"])
    assert (rank_step["self_ns"], forward["self_ns"]) == (50, 50)


@pytest.mark.parametrize("occasion", ["gc_pause", "compile", "kv_load", "idle"])
def test_what_happens_now_and_then_takes_its_place_inside(rig: Rig, occasion: str):
    """It does not close the timeline: what was recorded before it still gets its parent."""
    recorder = rig.recorders["engine"]
    recorder.segment(segment("prepare"), 5, 20, INSTANCE, 1, 0)
    recorder.segment(segment(occasion), 30, 40, 0, 0, 1)
    recorder.segment(segment("forward"), 20, 60, INSTANCE, 1, 0, 1)
    recorder.segment(segment("rank_step"), 0, 100, INSTANCE, 1, 0, 1)
    rows = rig.finish()
    found = {row["stage"]: row for row in rows["segments"]}
    stages = {name: found[BY_NAME[name].id] for name in ("prepare", occasion, "forward", "rank_step")}
    assert stages["prepare"]["parent_stage"] == BY_NAME["rank_step"].id
    assert stages[occasion]["parent_stage"] == BY_NAME["forward"].id
    assert (stages["forward"]["self_ns"], stages["rank_step"]["self_ns"]) == (30, 45)


def test_marks_are_inside_the_forward_pass_that_is_recorded_after_them(rig: Rig):
    """A device_forward closes its stream's timeline: what is in it has to be recorded before it, as these do."""
    recorder = rig.recorders["engine"]
    for step, at in ((1, 1_000), (2, 2_000)):
        recorder.segment(segment("device_collective"), at + 22, at + 28, INSTANCE, step, 3, 0, 5)
        recorder.segment(segment("device_mlp"), at + 20, at + 30, INSTANCE, step, 3, 0, 5)
        recorder.segment(segment("device_attention"), at, at + 15, INSTANCE, step, 3, 0, 5)
        recorder.segment(segment("device_forward"), at, at + 100, INSTANCE, step, 0, 7, 5)
        recorder.segment(segment("device_sample"), at + 110, at + 120, INSTANCE, step, 0, 7, 5)
        if step == 1:
            rig.poll(take_at=1)
    rows = rig.finish()["segments"]
    found = {(row["step"], BY_ID[row["stage"]].name): row for row in rows}
    for step in (1, 2):
        parents = {
            name: BY_ID[row["parent_stage"]].name for (of, name), row in found.items() if of == step and row["parent"]
        }
        forward = "device_forward"
        assert parents == {"device_attention": forward, "device_mlp": forward, "device_collective": "device_mlp"}
        own = {name: row["self_ns"] for (of, name), row in found.items() if of == step}
        assert own == {
            **{"device_attention": 15, "device_collective": 6, "device_mlp": 4},
            **{forward: 75, "device_sample": 10},
        }
    assert rig.assembler.counts["accounting_conflict"] == 0


def test_threads_of_one_process_are_timelines_of_their_own(rig: Rig):

    recorder = rig.recorders["engine"]
    recorder.segment(segment("detokenize"), 0, 100, 0, 0, 1)
    other = threading.Thread(target=recorder.segment, args=(segment("tokenize"), 50, 150, 0, 0))
    other.start()
    other.join()
    rows = rig.finish()
    assert {row["parent"] for row in rows["segments"]} == {None}
    assert rig.assembler.counts["accounting_conflict"] == 0


def test_attributes_that_a_stage_does_not_have_are_null(rig: Rig):
    rig.recorders["engine"].segment(segment("tokenize"), 0, 100, 0, 0, 5)
    rig.recorders["engine"].segment(segment("detokenize"), 100, 200, 0, 0, 5)
    tokenize, detokenize = sorted(rig.finish()["segments"], key=lambda row: row["begin_ns"])
    assert (tokenize["a0"], detokenize["a0"], detokenize["a1"]) == (None, 5, None)


# Ends


def live(rig: Rig, *requests: int) -> None:
    """Requests that are in decode."""
    for request in requests:
        for at, stage in enumerate(("queue", "prefill", "decode")):
            rig.recorders["engine"].state(state(stage), 1_000 + at, request, INSTANCE, 1)


def test_what_is_open_when_the_session_ends_is_open(rig: Rig):
    steps = Steps(rig)
    live(rig, 1)
    steps.run(end=False)
    rows = rig.finish("open")
    assert [row["status"] for row in rows["requests"]] == ["open"]
    assert [(row["status"], row["end_ns"]) for row in rows["steps"]] == [("incomplete", 1_080)]


def test_what_is_open_when_its_engine_dies_is_lost(rig: Rig):
    steps = Steps(rig)
    steps.run()
    live(rig, 1)
    steps.run(end=False)
    late = rig.recorders["front"]
    late.state(state("request_tokenize"), 990, 1, 0, 0, 40, 9, 0)
    die(rig.recorders["engine"])
    engine = rig.readers["engine"]
    batch = engine.poll()
    assert batch.ended
    rig.assembler.add(batch)
    rig.keep(rig.assembler.take(2_000))
    assert not rig.rows["requests"], "what the front end wrote last is not read yet"
    del rig.readers["engine"]
    rig.poll()
    rig.poll()
    rig.poll(2_000)
    (row,) = rig.rows["requests"]
    assert (row["status"], row["arrival_ns"], row["prompt_tokens"]) == ("lost", 990, 40)
    rows = rig.finish("open")
    assert len(rows["requests"]) == 1
    assert {row["step"]: row["status"] for row in rows["steps"]} == {1: "complete", 2: "incomplete"}


def test_a_request_without_the_other_sides_word_is_closed_in_time(rig: Rig):
    """A client that never took its last byte, or a front end that is not recorded."""
    front = rig.recorders["front"]
    front.state(state("request_tokenize"), 1_000, 7, 0, 0, 40, 9, 1)
    front.state(header_word(RecordType.EVENT, Event.LAST_OUTPUT), 2_000, 7, 0, 0, Finish.STOP, 5, 40, 0)
    for _ in range(3):
        rig.poll(2_000 + REQUEST_PATIENCE_NS)
    assert not rig.rows["requests"]
    rig.poll(2_001 + REQUEST_PATIENCE_NS)
    assert [row["status"] for row in rig.rows["requests"]] == ["finished"]


@pytest.mark.parametrize("ended", [True, False])
def test_a_request_waits_for_the_end_of_its_last_step(rig: Rig, ended: bool):
    """Its last token is that step's; but it waits no longer than a second, for the step may not be recorded."""
    engine, front = rig.recorders["engine"], rig.recorders["front"]
    front.state(state("request_tokenize"), 900, 1, 0, 0, 40, 9, 0)
    live(rig, 1)
    engine.state(header_word(RecordType.EVENT, Event.FINISHED), 1_100, 1, INSTANCE, 1, Finish.LENGTH, 5, 40, 0)
    front.state(header_word(RecordType.EVENT, Event.LAST_OUTPUT), 1_110, 1, 0, 0, Finish.LENGTH, 5, 40, 0)
    for _ in range(5):
        rig.poll(1_110 + STEP_PATIENCE_NS)
    assert not rig.rows["requests"]
    if ended:
        Steps(rig).run()
    for _ in range(5):
        rig.poll(1_110 + STEP_PATIENCE_NS + (not ended))
    assert [row["status"] for row in rig.rows["requests"]] == ["finished"]


def test_a_straggler_makes_no_second_row(rig: Rig):
    engine, front = rig.recorders["engine"], rig.recorders["front"]
    front.state(state("request_tokenize"), 900, 1, 0, 0, 40, 9, 0)
    live(rig, 1)
    engine.state(header_word(RecordType.EVENT, Event.FINISHED), 1_100, 1, INSTANCE, 0, Finish.ABORT, 5, 40, 0)
    front.state(header_word(RecordType.EVENT, Event.ABORTED), 1_050, 1)
    for _ in range(4):
        rig.poll(1_200)
    assert len(rig.rows["requests"]) == 1
    front.state(header_word(RecordType.EVENT, Event.LAST_OUTPUT), 1_300, 1, 0, 0, Finish.ABORT, 5, 40, 0)
    rows = rig.finish()
    assert len(rows["requests"]) == 1
    assert rig.assembler.counts["requests_without_state"] == 1


def test_nothing_is_kept_of_what_is_over(rig: Rig):
    steps = Steps(rig)
    for number in range(1, 120):
        if number > 1:
            steps.change(Change.LEAVE, number - 1)
        rig.recorders["front"].state(state("request_tokenize"), steps.now, number, 0, 0, 40, 9, 0)
        rig.recorders["engine"].state(state("queue"), steps.now, number, INSTANCE, 0, 40)
        steps.snapshot(number)
        steps.run()
        finished = header_word(RecordType.EVENT, Event.FINISHED)
        rig.recorders["engine"].state(finished, steps.now, number, INSTANCE, steps.step, Finish.STOP, 1, 40, 0)
        output = header_word(RecordType.EVENT, Event.LAST_OUTPUT)
        rig.recorders["front"].state(output, steps.now, number, 0, 0, Finish.STOP, 1, 40, 0)
        rig.poll(steps.now)
    for _ in range(4):
        rig.poll(steps.now)
    sizes = rig.assembler.sizes()
    assert len(rig.rows["requests"]) == len(rig.rows["steps"]) == len(rig.rows["members"]) == 119
    assert not rig.assembler.requests
    assert sizes["tokens"] + sizes["members"] + sizes["changes"] <= 2
    assert sizes["covered"] < 10
    assert {name for name, size in sizes.items() if size} <= {"tokens", "members", "changes", "covered", "instances"}


def test_what_processes_say_of_themselves(tmp_path: Path):
    with opened(tmp_path, control=SLOTS, role="engine_core", instance=INSTANCE, world_size=4) as (recorder, reader):
        assembler = Assembler(KEY)
        recorder.text(0, 4, "no JSON")
        recorder.text(0, 4, "[1]")
        assembler.add(read_all(reader))
        assert assembler.info[reader.key]["role"] == "engine_core"
        assert assembler.instances[INSTANCE].ranks == 4
        assert assembler.counts["corrupt"] == 2
        recorder.text(0, 4, '{"role": "worker", "rank": 0}')
        assembler.add(read_all(reader))
        assert assembler.info[reader.key]["role"] == "engine_core+worker"
        assert len(reader.areas[0].slots) > MARGIN
