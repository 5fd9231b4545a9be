"""From records to the session's tables: steps, requests, segments, membership. No clock, no disk, no ring.

`Assembler.add` takes the slots of a batch; `take` gives the rows that are final at an explicit time. What is kept in
between is what is open: live requests, steps in flight, the last step's members; each of it is bounded, whatever the
slots hold. Records and rows are columns; only steps, and changes of the batch, are taken one by one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stagetrace.instrument.records import Change, Text
from stagetrace.instrument.stages import STEP_RESULT, Level

from ..drain import SLOT, Batch
from ..session import TABLES
from .decode import Records, Rows, decode
from .experts import ExpertCounts
from .instances import Instance
from .long_records import Parts
from .membership import Batch as EngineBatch
from .membership import Found
from .processes import Processes, parse, small_integer
from .request_rows import LOST, OPEN, STATUSES, request_tables
from .requests import OF_REQUESTS, Lives, OpenRequests, Request, any_of
from .segments import Held, Settled, Timelines
from .steps import COMPLETE, INCOMPLETE, PARTIAL, RANKS_MISSING, Step, steps_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..control import Switch
    from ..drain import Slots
    from .decode import Snapshot

Column = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

RANKS_PATIENCE_NS = 5_000_000_000  # a step whose ranks have not all reported by then is `ranks_missing`
SWITCH_PATIENCE_NS = 5_000_000_000  # what a switch to a lower level left open is closed as partial then
REQUEST_PATIENCE_NS = 60_000_000_000  # a request that ended on one side is closed without the other's word then
STEP_PATIENCE_NS = 1_000_000_000  # a request waits so long for the end of its last step
_FOREVER = 1 << 62  # ns
_MOST_INSTANCES = 256
_MOST_CUT_SHORT = 10_000
_MOST_RANKS = 1 << 20
_BYTES = np.dtype((np.void, SLOT.itemsize))


@dataclass
class Source:
    """One process's records: parts of long ones, its timelines, and what was added since they were last looked at."""

    timelines: Timelines
    control_parts: Parts = field(default_factory=Parts)
    detail_parts: Parts = field(default_factory=Parts)
    added: list[Batch] = field(default_factory=list)
    last_ns: int = 0
    gap_end: int = 0  # number of the first control record after all that was lost


class Assembler:
    """Explicit state of the assembly of one session. `key` is the session's, for ids.

    What `take` and `finish` return follows from the batches added, `switches`, and the times of all takes: the
    batches of one process are taken together, and processes in the order of their keys.
    """

    def __init__(self, key: bytes):
        self.key = key
        self.switches: list[Switch] = []  # of the level, so far; set by the owner before records are added
        self._sources: dict[int, Source] = {}
        self._requests = OpenRequests()
        self._instances: dict[int, Instance] = {}
        self._processes = Processes()
        self._held = Held()
        self._found = Found()
        self._experts = ExpertCounts()
        self._counts: Counter[str] = Counter()
        self._over: Column = np.empty(0, np.int64)  # requests that were over at the last take
        self._cut_short: dict[int, None] = {}  # requests that have their row since a switch cut them, the newest last

    @property
    def requests(self) -> Mapping[int, Request]:
        """The requests that are not over, by handle."""
        self._flush()
        return self._requests.by_handle

    @property
    def instances(self) -> Mapping[int, Instance]:
        """The engine instances, by number."""
        self._flush()
        return self._instances

    @property
    def info(self) -> Mapping[int, dict[str, Any]]:
        """What each process said it is."""
        self._flush()
        return self._processes.info

    @property
    def hooks(self) -> Mapping[int, dict[str, dict[str, str]]]:
        """Of each process, hook point -> what became of it."""
        self._flush()
        return self._processes.hooks

    @property
    def hook_names(self) -> Mapping[int, dict[int, str]]:
        """Of each process, index -> hook point."""
        self._flush()
        return self._processes.hook_names

    @property
    def counts(self) -> Counter[str]:
        """What was not as it should be, by reason."""
        self._flush()
        return self._counts

    def sizes(self) -> dict[str, int]:
        """How much of what is kept: none of it grows with the length of a session."""
        self._flush()
        instances, sources = self._instances.values(), self._sources.values()
        return {
            "requests": len(self._requests),
            "instances": len(instances),
            "steps": sum(len(one.open) + len(one.waiting) + len(one.closed) for one in instances),
            "members": sum(len(one.batch.members) for one in instances),
            "tokens": sum(len(one.batch.apart) + len(one.batch.left) for one in instances),
            "changes": sum(len(one.batch.changes) for one in instances),
            "covered": sum(len(one.covered) for one in instances),
            "segments": len(self._held) + sum(source.timelines.pending.shape[1] for source in sources),
            "parts": sum(len(source.control_parts) + len(source.detail_parts) for source in sources),
        }

    # In

    def add(self, batch: Batch) -> None:
        """Takes in what one poll of one ring brought."""
        source = self._sources.get(batch.process)
        if source is None:
            source = self._sources[batch.process] = Source(Timelines(batch.process))
        source.added.append(batch)

    def _flush(self) -> None:
        """Decodes what was added: by process, in one piece from gap to gap."""
        ended = []
        for process in sorted(process for process, source in self._sources.items() if source.added):
            source = self._sources[process]
            added, source.added = source.added, []
            firsts = [at for at, batch in enumerate(added) if batch.gap and at]
            for first, last in zip([0, *firsts], [*firsts, len(added)], strict=True):
                self._add_piece(process, source, added[first:last])
            if any(batch.ended for batch in added):
                ended.append(process)
        for process in ended:  # last: what other processes wrote of its steps is known by now
            self._process_ended(process, self._sources[process])

    def _add_piece(self, process: int, source: Source, batches: list[Batch]) -> None:
        if batches[0].gap:
            source.gap_end = max(source.gap_end, batches[0].gap_end)
            for instance in self._instances.values():
                if instance.process == process:
                    instance.batch.forget(instance.newest)
        control, detail = _joined([one.control for one in batches]), _joined([one.detail for one in batches])
        records = decode(control, detail, source.control_parts, source.detail_parts)
        self._counts["corrupt"] += records.corrupt
        self._counts["incomplete"] += records.incomplete
        self._control(process, source, records)
        self._detail(process, source, records)
        for instance in self._instances.values():
            self._count("changes_given_up", instance.batch.give_up(instance.newest))

    def _control(self, process: int, source: Source, records: Records) -> None:
        for record in records.texts:
            if record.kind in OF_REQUESTS:
                self._requests.name(record.handle, record.kind, record.text)
            elif record.kind == Text.NAME:
                self._processes.named(process, record.handle, record.text)
            else:
                self._told(process, record.handle, record.kind, record.text)
        self._changes(records)
        self._requests.add(*(self._not_cut_short(rows) for rows in (records.states, records.events)))
        for rows in (records.states, records.events):
            if len(rows):
                source.last_ns = max(source.last_ns, int(rows.words[1].max()))

    def _not_cut_short(self, rows: Rows) -> Rows:
        """The records but those of requests that went on, and were seen again, after a switch had cut them."""
        if not self._cut_short or not len(rows):
            return rows
        kept = ~np.isin(rows.words[2], np.array([*self._cut_short], np.int64))
        return rows if kept.all() else Rows(rows.number[kept], rows.stage[kept], rows.words[:, kept])

    def _told(self, process: int, handle: int, kind: int, text: str) -> None:
        data = parse(text)
        if data is None:
            self._counts["corrupt"] += 1
        elif kind == Text.PROCESS:
            self._processes.told(process, data)
            self._runs(process, data)
        elif kind == Text.HOOK:
            self._processes.hooked(process, handle, data)

    def _runs(self, process: int, data: dict[str, Any]) -> None:
        """A process may say which engine instance's scheduler it runs, and how many ranks that has."""
        number = small_integer(data.get("instance"))
        instance = self._instance(number) if number else None
        if instance is not None:
            instance.process = process
            instance.ranks = min(small_integer(data.get("world_size"), 1) or 1, _MOST_RANKS)

    def introduce(self, process: int, info: dict[str, Any], hooks: list[dict[str, str]]) -> None:
        """Makes a process known whose own words about itself are no longer among the records."""
        self._processes.introduce(process, info, hooks)
        self._runs(process, info)

    def _changes(self, records: Records) -> None:
        """Changes of batches, and snapshots of them, in the order of their records."""
        members = records.members
        request, q, kv, number, step, last, cached = members.words[:7]
        rows = zip(
            members.number.tolist(), number.tolist(), step.tolist(), members.stage.tolist(),
            request.tolist(), q.tolist(), kv.tolist(), last.tolist(), cached.tolist(), strict=True,
        )  # fmt: skip
        snapshots = iter(records.snapshots)
        snapshot = next(snapshots, None)
        for record, of, at, *words in rows:
            while snapshot is not None and snapshot.number < record:
                self._snapshot(snapshot)
                snapshot = next(snapshots, None)
            instance = self._instances.get(of) or self._instance(of)
            if instance is not None and words[0] == Change.DROPPED:
                instance.batch.drop(at, words[1])
            elif instance is not None:
                instance.batch.changes.append((at, record, *words))
        while snapshot is not None:
            self._snapshot(snapshot)
            snapshot = next(snapshots, None)

    def _snapshot(self, snapshot: Snapshot) -> None:
        instance = self._instance(snapshot.instance)
        if instance is not None:
            instance.batch.add_snapshot(snapshot.step, snapshot.sequence, snapshot.requests)

    def _detail(self, process: int, source: Source, records: Records) -> None:
        begins, ends = records.step_begins, records.step_ends
        settled = source.timelines.settle(records.segments, begins, ends)
        self._keep(settled)
        self._experts.add(process, records.experts)
        for rows, end in ((records.segments, 2), (ends, 1)):
            if len(rows):
                source.last_ns = max(source.last_ns, int(rows.words[end].max()))
        begun = begins.words.T.tolist()
        results = [*zip(*(row.tolist() for row in ends.words[5 : 5 + len(STEP_RESULT)]), strict=True)]
        ended = [*zip(*(ends.words[i].tolist() for i in (0, 1, 3, 4)), results, settled.groups, strict=True)]
        for at in np.argsort(np.concatenate([begins.number, ends.number]), kind="stable").tolist():
            if at < len(begun):
                thread, begin, scheduled, number, step, *composition = begun[at]
                instance = self._instances.get(number) or self._instance(number)
                if instance is not None:
                    instance.process = process
                    instance.begin(Step(number, step, process, thread, begin, scheduled, composition))
            else:
                thread, end, number, step, result, group = ended[at - len(begun)]
                cover = settled.covers.get(thread)
                self._step_ended(number, step, end, result, cover.up_to(group) if cover else [])
        for thread, cover in settled.covers.items():
            rest = cover.rest()
            if rest and (instance := self._instances.get(source.timelines.schedulers[thread])) is not None:
                instance.cover(rest)

    def _keep(self, settled: Settled) -> None:
        self._counts["accounting_conflict"] += settled.conflicts
        self._held.add(settled.block)

    def _step_ended(
        self, number: int, step_number: int, end: int, result: tuple[int, ...], covered: list[tuple[int, int]]
    ) -> None:
        instance = self._instances.get(number) or self._instance(number)
        step = instance.end(step_number, end, covered) if instance is not None else None
        if step is None or instance is None:
            self._counts["steps_without_begin"] += 1
            return
        # Who received tokens in steps between, or while nothing was recorded, is not known.
        if step_number != instance.newest + 1 or self._cut(instance.last_end, step.begin, Level.STEP):
            instance.batch.break_intervals()
        instance.newest = max(instance.newest, step_number)
        instance.last_end = end
        source = self._sources.get(instance.process)
        strays = instance.batch.advance(step, source.gap_end if source else -1)
        self._count("chunks_without_step", strays)
        step.accepted, received, step.padded, step.graph = result
        if received and step.output_tokens >= 0:
            step.output_tokens = received

    def _instance(self, number: int) -> Instance | None:
        """An engine instance, known or new. None where there are too many already that said who they are."""
        instance = self._instances.get(number)
        if instance is not None:
            return instance
        if len(self._instances) >= _MOST_INSTANCES:
            idle = next((one for one in self._instances.values() if one.is_idle), None)
            if idle is None:
                self._count("instances_given_up", 1)
                return None
            idle.batch.forget(idle.newest)
            self._count("changes_given_up", len(idle.batch.changes))
            del self._instances[idle.number]
        batch = EngineBatch(number, self._requests.by_handle, self._found)
        instance = self._instances[number] = Instance(number, batch)
        return instance

    def _count(self, what: str, count: int) -> None:
        if count:
            self._counts[what] += count

    # Out

    def take(self, now_ns: int) -> dict[str, pa.Table]:
        """The rows that are final at `now_ns` (monotonic): tables in the schemas of the session."""
        self._flush()
        self._held.merge()
        steps: list[Step] = []
        for instance in self._instances.values():
            reported = self._held.ranks(instance.number) if instance.waiting or instance.closed else {}
            for step in [*instance.waiting.values()]:
                if reported.get(step.number, 0) >= instance.ranks:
                    instance.close(step, COMPLETE)
                elif now_ns - step.end > RANKS_PATIENCE_NS:
                    instance.close(step, RANKS_MISSING)
            for switch in self._passed(now_ns, Level.STEP):
                for step in [step for step in instance.open.values() if step.begin <= switch.end_ns]:
                    instance.cut(step)
            steps += self._closed_steps(instance, reported)
        return self._tables(steps, *self._take_requests(now_ns))

    def _passed(self, now_ns: int, level: Level) -> list[Switch]:
        """The switches to below a level that were so long ago that what they cut has no end to come."""
        return [
            switch
            for switch in self.switches
            if now_ns - switch.end_ns >= SWITCH_PATIENCE_NS and switch.crosses(level) and switch.after < level
        ]

    def _closed_steps(self, instance: Instance, reported: dict[int, int]) -> list[Step]:
        """The steps that wait for no more, with what is still to be said of them; their segments are let go."""
        closed, instance.closed = instance.closed, []
        for step in closed:
            step.ranks, step.reported = instance.ranks, reported.get(step.number, 0)
            if self._cut(step.begin, step.end, Level.STEP):
                step.status = PARTIAL
        phases = {step.number: step.phase for step in closed}
        cuts = {step.number: self._cut_above(step) for step in closed} if self.switches else {}
        self._held.release(instance.number, phases, cuts, [*instance.open, *instance.waiting], instance.newest)
        return closed

    def _take_requests(self, now_ns: int) -> tuple[pa.Table, pa.Table]:
        lives = self._requests.lives()
        self._count("names_given_up", self._requests.give_up_names(lives))
        crowded = self._requests.too_many(lives)
        if not len(lives):
            self._over = lives.handle
            return TABLES["requests"].empty_table(), TABLES["states"].empty_table()
        over, ending, last_ns, handle, family = lives.over, lives.ending, lives.last_ns, lives.handle, lives.family
        cut = np.zeros(len(lives), np.bool_)
        for switch in self._passed(now_ns, Level.REQUEST):
            cut |= ~over & (last_ns <= switch.end_ns)
        dead, newest = self._engines(lives)
        waits = (newest < lives.last_step) & (now_ns - last_ns <= STEP_PATIENCE_NS)
        is_over = np.where(dead, over | ~ending, over & ~waits) & ~cut
        # The children of one parent are closed together, so that its span is made of them all.
        is_over &= ~any_of(family, ~is_over)
        # A request that is over is closed at the next take: records of it may be on their way through another ring.
        late = ~any_of(family, ~ending | (now_ns - last_ns <= REQUEST_PATIENCE_NS))
        self._count("requests_given_up", int(np.count_nonzero(crowded)))
        closing = cut | late | crowded | is_over & np.isin(handle, self._over)
        self._cut_short |= dict.fromkeys(handle[cut].tolist())
        for oldest in [*self._cut_short][: len(self._cut_short) - _MOST_CUT_SHORT]:
            del self._cut_short[oldest]
        self._over = handle[is_over]
        return self._close_requests(lives, closing, cut | crowded, OPEN)

    def _engines(self, lives: Lives) -> tuple[Flags, Column]:
        """Of each request's engine, whether it is dead, and the highest step whose end came; the largest for none."""
        dead, newest = np.zeros(len(lives), np.bool_), np.full(len(lives), np.iinfo(np.int64).max)
        number = lives.instance
        for one in np.unique(number).tolist():
            if (instance := self._instances.get(one)) is not None:
                mine = number == one
                dead[mine], newest[mine] = instance.ended, instance.newest
        return dead, newest

    def _close_requests(self, lives: Lives, closing: Flags, cut: Flags, open_status: int) -> tuple[pa.Table, pa.Table]:
        """Rows of the requests that are `closing`; `open_status` is that of those that did not end."""
        dead = self._engines(lives)[0]
        requests = self._requests.remove(lives, closing)
        lives, cut, dead = lives.of(closing), cut[closing], dead[closing]
        last_token = self._leave_batches(lives)
        # A straggler of a request that was closed, or one whose states were dropped.
        stateful = lives.stateful if len(lives) else closing[:0]
        self._counts["requests_without_state"] += len(lives) - int(np.count_nonzero(stateful))
        if not stateful.any():
            return TABLES["requests"].empty_table(), TABLES["states"].empty_table()
        requests = [request for request, has in zip(requests, stateful.tolist(), strict=True) if has]
        lives, cut, dead, last_token = lives.of(stateful), cut[stateful], dead[stateful], last_token[stateful]
        # One that did not end may have done so while nothing was recorded: every switch since its begin cuts it.
        begin = lives.begin_ns
        cut = cut | ~lives.over & self._switched(begin, np.full(len(begin), _FOREVER))
        return request_tables(
            lives,
            requests,
            self.key,
            open_status=np.where(cut, OPEN, np.where(dead, LOST, open_status)),
            last_token=last_token,
            cut=cut,
            switched=self._switched,
        )

    def _leave_batches(self, lives: Lives) -> Column:
        """Takes requests that are over out of the batches; when each got its last token, in ns, or 0."""
        last_token = []
        for handle, number in zip(lives.handle.tolist(), lives.instance.tolist(), strict=True):
            last = 0
            for instance in self._instances.values():
                last = max(last, instance.batch.last_token(handle))
                if instance.number == number:
                    instance.batch.close(handle, instance.newest)
                else:
                    instance.batch.left.pop(handle, None)
            last_token.append(last)
        return np.array(last_token, np.int64)

    def _switched(self, begin: Column, end: Column) -> Flags:
        """Whether recording of requests was switched on or off in [begin, end], in ns."""
        found = np.zeros(len(begin), np.bool_)
        for switch in self.switches:
            if switch.crosses(Level.REQUEST):
                found |= (switch.begin_ns <= end) & (begin <= switch.end_ns)
        return found

    def _cut(self, begin: int, end: int, level: Level) -> bool:
        """Whether recording at `level` was switched on or off in [begin, end], in ns."""
        return bool(self.switches) and any(
            switch.crosses(level) and switch.begin_ns <= end and begin <= switch.end_ns for switch in self.switches
        )

    def _cut_above(self, step: Step) -> int:
        """From which level on a switch cut what was recorded of a step; KERNEL where none did."""
        return next(
            (level for level in (Level.STEP, Level.LAYER) if self._cut(step.begin, step.end, level)), Level.KERNEL
        )

    def finish(self, open_status: str = "open") -> dict[str, pa.Table]:
        """The rest, when nothing more will come. What is open gets `open_status`: open, or lost when all are dead."""
        self._flush()
        for process in sorted(self._sources):
            self._settle_rest(self._sources[process])
        self._held.merge()
        steps: list[Step] = []
        for instance in self._instances.values():
            reported = self._held.ranks(instance.number)
            for step in [*instance.waiting.values()]:
                whole = reported.get(step.number, 0) >= instance.ranks
                instance.close(step, COMPLETE if whole else RANKS_MISSING)
            self._close_open_steps(instance)
            steps += self._closed_steps(instance, reported)
            instance.batch.forget(instance.newest)
        self._held.release_all()
        lives = self._requests.lives()
        everyone = np.ones(len(lives), np.bool_)
        if len(lives):
            requests = self._close_requests(lives, everyone, ~everyone, STATUSES.index(open_status))
        else:
            requests = TABLES["requests"].empty_table(), TABLES["states"].empty_table()
        self._requests.by_handle.clear()
        return self._tables(steps, *requests)

    def _process_ended(self, process: int, source: Source) -> None:
        self._settle_rest(source)
        for instance in self._instances.values():
            if instance.process == process:
                instance.ended = True
                self._close_open_steps(instance)

    def _settle_rest(self, source: Source) -> None:
        self._counts["incomplete"] += source.control_parts.give_up(1 << 63) + source.detail_parts.give_up(1 << 63)
        self._keep(source.timelines.rest())

    def _close_open_steps(self, instance: Instance) -> None:
        for step in [*instance.open.values()]:
            step.end = max(self._sources[step.process].last_ns, step.scheduled)
            instance.close(step, INCOMPLETE)

    def _tables(self, steps: list[Step], requests: pa.Table, states: pa.Table) -> dict[str, pa.Table]:
        self._held.merge()
        tables = {
            "requests": requests,
            "states": pa.concat_tables([self._found.chunks_table(), states]),
            "members": self._found.members_table(),
            "steps": steps_table(steps),
            "segments": self._held.table(),
            "intervals": self._found.intervals_table(),
            "experts": self._experts.table(),
        }
        self._found.clear()
        return {name: tables[name] for name in TABLES}


def _joined(pieces: list[Slots]) -> Slots:
    pieces = [piece for piece in pieces if len(piece)]
    if len(pieces) < 2:
        return pieces[0] if pieces else np.empty(0, SLOT)
    return np.concatenate([piece.view(_BYTES) for piece in pieces]).view(SLOT)  # faster than field by field
