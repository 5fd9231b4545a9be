"""From records to the session's tables: steps, requests, segments, membership. No clock, no disk, no ring.

`Assembler.add` takes the records of a batch and explicit time; `take` gives the rows that are final. The state it holds
is that of what is open: live requests, steps in flight, the last step's members.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from stagetrace.instrument.records import Change, RecordType, Text
from stagetrace.instrument.stages import BY_ID, BY_NAME, STEP_COMPOSITION, Kind, Level, phase

from .decode import Parts, decode, text_of
from .requests import Request, state_row
from .session import TABLES
from .timelines import Segment, nest, overlap

if TYPE_CHECKING:
    from .control import Switch
    from .drain import Batch

RANKS_PATIENCE_NS = 5_000_000_000  # a step whose ranks have not all reported by then is `ranks_missing`
SWITCH_PATIENCE_NS = 5_000_000_000  # what a switch to a lower level left open is closed as partial then
REQUEST_PATIENCE_NS = 60_000_000_000  # a request that ended on one side is closed without the other's word then
STEP_PATIENCE_NS = 1_000_000_000  # a request waits so long for the end of its last step
_FOREVER = 1 << 62  # ns
_MOST_PENDING = 20_000  # segments of a timeline held back for a parent
_MOST_IN_FLIGHT = 64  # a step that so many later ones have overtaken has no end to come

_RANK_STEP = BY_NAME["rank_step"].id
_CHUNK = BY_NAME["prefill_chunk"].id
# A segment that can have no segment around it closes what was recorded on its timeline before it. Occasions can come
# inside anything.
_OUTERMOST = {
    stage.id
    for stage in BY_ID.values()
    if stage.kind in (Kind.SEGMENT, Kind.ENVELOPE) and not {*stage.inside} - {"step"}
}

Rows = dict[str, list[dict[str, Any]]]


@dataclass
class Step:
    """A step that is not closed yet."""

    process: int
    thread: int
    begin: int
    scheduled: int
    composition: tuple[int, ...]
    end: int = 0
    unattributed: int = 0
    members: int | None = None
    output_tokens: int | None = None

    @property
    def phase(self) -> str:
        """prefill, decode or mixed."""
        named = dict(zip((attribute.name for attribute in STEP_COMPOSITION), self.composition, strict=True))
        return phase(named["prefill_tokens"], named["decode_tokens"]).value


@dataclass
class Instance:
    """One engine instance: its open steps and who is in the batch."""

    process: int = 0
    ended: bool = False  # its process is dead
    ranks: int = 1
    steps: dict[int, Step] = field(default_factory=dict)
    reported: dict[int, set[int]] = field(default_factory=dict)  # step -> ranks
    held: dict[int, list[tuple[int, Segment]]] = field(default_factory=dict)  # step -> segments of it, by process
    changes: deque[tuple[int, int, int, tuple[int, ...]]] = field(default_factory=deque)  # step, sequence, kind, words
    members: dict[int, int] = field(default_factory=dict)  # request -> first step of its run
    known: bool = False  # whether `members` is what the engine has
    last_token: dict[int, int] = field(default_factory=dict)
    last_end: int = 0  # of the last step that ended
    closed: int = 0  # highest step whose end came
    covered: deque[tuple[int, int]] = field(default_factory=deque)  # outermost segments of the scheduler's timeline


@dataclass
class Source:
    """One process's records: parts of long ones, and its timelines."""

    control_parts: Parts = field(default_factory=Parts)
    detail_parts: Parts = field(default_factory=Parts)
    pending: dict[int, list[Segment]] = field(default_factory=dict)  # thread -> segments without a parent yet
    schedulers: dict[int, int] = field(default_factory=dict)  # thread -> engine instance whose scheduler runs on it
    last_ns: int = 0
    gap_end: int = 0  # number of the first control record after all that was lost


class Assembler:
    """Explicit state of the assembly of one session. `key` is the session's, for ids."""

    def __init__(self, key: bytes):
        self.key = key
        self.requests: dict[int, Request] = {}
        self.instances: dict[int, Instance] = {}
        self.sources: dict[int, Source] = {}
        self.info: dict[int, dict[str, Any]] = {}  # process -> what it said it is
        self.hooks: dict[int, dict[str, dict[str, str]]] = {}  # process -> hook point -> what became of it
        self.hook_names: dict[int, dict[int, str]] = {}  # process -> index -> hook point
        self.counts: Counter[str] = Counter()
        self.switches: list[Switch] = []  # of the level, so far; set by the owner before records are added
        self._over: set[int] = set()  # requests that were over at the last take
        self._rows: Rows = {name: [] for name in TABLES}

    # In

    def add(self, batch: Batch) -> None:
        """Takes in what one poll of one ring brought."""
        source = self.sources.setdefault(batch.process, Source())
        records = decode(batch.control, batch.detail, source.control_parts, source.detail_parts)
        self.counts["corrupt"] += records.corrupt
        self.counts["incomplete"] += records.incomplete
        if batch.gap:
            source.gap_end = max(source.gap_end, batch.gap_end)
            for number, instance in self.instances.items():
                if instance.process == batch.process:
                    self._members_unknown(number, instance)
        for sequence, type_, stage, words in records.controls:
            self._control(batch.process, source, sequence, type_, stage, words)
        self._detail(batch.process, source, records.segments, records.steps)
        if batch.ended:
            self._process_ended(batch.process, source)

    def introduce(self, process: int, info: dict[str, Any], hooks: list[dict[str, str]]) -> None:
        """Makes a process known whose own words about itself are no longer among the records."""
        if info:
            self._is(process, info)
        for hook in hooks:
            self.hooks.setdefault(process, {})[hook["name"]] = hook
            if "index" in hook:
                self.hook_names.setdefault(process, {})[int(hook["index"])] = hook["name"]

    def _control(
        self, process: int, source: Source, sequence: int, type_: int, stage: int, words: tuple[int, ...]
    ) -> None:
        if type_ == RecordType.TEXT:
            self._text(process, *text_of(words))
        elif type_ == RecordType.MEMBER:
            self._instance(words[3]).changes.append((words[4], sequence, type_, (stage, *words)))
        elif type_ == RecordType.SNAPSHOT:
            self._instance(words[0]).changes.append((words[1], sequence, type_, words))
        elif type_ in (RecordType.STATE, RecordType.EVENT):
            request = self._request(words[2])
            (request.enter if type_ == RecordType.STATE else request.happen)(stage, words)
            source.last_ns = max(source.last_ns, words[1])

    def _text(self, process: int, handle: int, kind: int, text: str) -> None:
        if kind in (Text.REQUEST_ID, Text.EXTERNAL_ID, Text.TRACE_CONTEXT):
            self._request(handle).texts[kind] = text
            return
        try:
            data = json.loads(text)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            self.counts["corrupt"] += 1
            return
        if kind == Text.PROCESS:
            self._is(process, data)
        elif kind == Text.HOOK:
            hook = {name: str(data.get(name, "")) for name in ("name", "status", "why", "gives")}
            hook["index"] = str(int(data.get("index", handle)))
            self.introduce(process, {}, [hook])

    def _is(self, process: int, data: dict[str, Any]) -> None:
        """What a process says of itself; a second role of it comes beside the first."""
        info = self.info.setdefault(process, {})
        roles = [role for role in (info.get("role"), data.get("role")) if role]
        info.update(data, role="+".join(dict.fromkeys(roles)))
        if "instance" in data:
            instance = self._instance(int(data["instance"]))
            instance.process = process
            instance.ranks = int(data.get("world_size", 1))

    def _detail(
        self,
        process: int,
        source: Source,
        segments: list[tuple[int, ...]],
        steps: list[tuple[int, int, tuple[int, ...]]],
    ) -> None:
        """Segments and steps in the order of their records, which is that of their ends."""
        ordered = sorted([(row[0], None, row) for row in segments] + [(row[0], row[1], row[2]) for row in steps])
        for _, type_, row in ordered:
            if type_ is None:
                sequence, stage, thread, begin, end, instance, step, *attributes = row
                segment = Segment(sequence, stage, thread, begin, end, instance, step, tuple(attributes))
                source.last_ns = max(source.last_ns, end)
                pending = source.pending.setdefault(thread, [])
                pending.append(segment)
                if stage == _RANK_STEP and step:
                    self._instance(instance).reported.setdefault(step, set()).add(attributes[0])
                outermost = stage in _OUTERMOST and thread not in source.schedulers
                if outermost or len(pending) > _MOST_PENDING:
                    self._settle(process, source, thread)
            elif type_ == RecordType.STEP_BEGIN:
                thread, begin, scheduled, instance, step, *composition = row
                source.schedulers[thread] = instance
                self._instance(instance).process = process
                self._instance(instance).steps[step] = Step(process, thread, begin, scheduled, tuple(composition))
            else:
                thread, end, _, instance, step, *_ = row
                source.last_ns = max(source.last_ns, end)
                self._settle(process, source, thread)
                self._step_ended(instance, step, end)

    def _settle(self, process: int, source: Source, thread: int) -> None:
        """Nests what is pending on a timeline; segments of a step wait for it, the others are final."""
        segments = source.pending.pop(thread, [])
        self.counts["accounting_conflict"] += nest(segments)
        covered = self._instance(source.schedulers[thread]).covered if thread in source.schedulers else None
        for segment in segments:
            parent = segment.parent
            if parent is not None and not segment.step:  # a gc_pause, say: it belongs to the step that it fell in
                segment.instance, segment.step = parent.instance, parent.step
            if covered is not None and parent is None:
                covered.append((segment.begin, segment.end))
            if segment.step:
                self._instance(segment.instance).held.setdefault(segment.step, []).append((process, segment))
            else:
                self._rows["segments"].append(_segment_row(process, segment, None))

    # Steps and who is in them

    def _step_ended(self, number: int, step_number: int, end: int) -> None:
        instance = self._instance(number)
        step = instance.steps.get(step_number)
        if step is None:
            self.counts["steps_without_begin"] += 1
            return
        step.end = end
        for overtaken in [n for n, s in instance.steps.items() if not s.end and n < step_number - _MOST_IN_FLIGHT]:
            instance.steps[overtaken].end = instance.steps[overtaken].scheduled
            self._close_step(number, instance, overtaken, "partial")  # recording was switched, or its end was lost
        oldest = min([step.begin, *(other.begin for other in instance.steps.values() if not other.end)])
        while instance.covered and instance.covered[0][1] <= oldest:
            instance.covered.popleft()
        step.unattributed = end - step.begin - overlap(list(instance.covered), step.begin, end)
        if step_number != instance.closed + 1:  # who received tokens in the steps between is not recorded
            instance.last_token.clear()
        instance.closed = max(instance.closed, step_number)
        if self._cut(instance.last_end, step.begin, Level.STEP):  # tokens came that were not recorded
            instance.last_token.clear()
        instance.last_end = end
        self._advance_members(number, instance, step_number, step)

    def _advance_members(self, number: int, instance: Instance, step_number: int, step: Step) -> None:
        """Applies the membership changes up to a step, then gives its members their tokens."""
        chunks: dict[int, tuple[int, ...]] = {}
        while instance.changes and instance.changes[0][0] <= step_number:
            at, sequence, kind, words = instance.changes.popleft()
            if kind == RecordType.SNAPSHOT:
                source = self.sources.get(instance.process)
                if instance.known or source is None or sequence > source.gap_end:  # sequence: slot number + 1
                    self._snapshot(number, instance, at, {*words[3 : 3 + words[2]]})
                continue
            change, request, *rest = words
            if change == Change.LEAVE:
                self._leave(number, instance, request, at - 1)
            else:
                if instance.known:
                    instance.members.setdefault(request, at)
                if change == Change.CHUNK:
                    q, kv, _, _, last, cached, *_ = rest
                    if at != step_number:  # the end of its step was lost, and so are the chunk's times
                        self.counts["chunks_without_step"] += 1
                        continue
                    chunks[request] = tuple(rest)
                    values = (q, kv, last, cached)
                    self._rows["states"].append(state_row(request, _CHUNK, step.begin, step.end, number, at, values))
        if not instance.known:
            instance.last_token.clear()
            return
        unfinished = {request for request, rest in chunks.items() if not rest[4]}
        intervals: Counter[int] = Counter()
        tokens = 0
        for request in instance.members:
            if request in unfinished:
                continue
            tokens += 1
            before = instance.last_token.get(request)
            if before is not None:
                intervals[step.end - before] += 1
            instance.last_token[request] = step.end
            if (state := self.requests.get(request)) is not None:
                state.last_token_ns = step.end
        step.members, step.output_tokens = len(instance.members), tokens
        for interval, count in intervals.items():
            self._rows["intervals"].append(
                {
                    "instance": number,
                    "step": step_number,
                    "phase": step.phase,
                    "interval_ns": interval,
                    "tokens": count,
                }
            )

    def _snapshot(self, number: int, instance: Instance, step: int, members: set[int]) -> None:
        for request in [*instance.members]:
            if request not in members:
                self._leave(number, instance, request, step - 1)
        for request in members:
            instance.members.setdefault(request, step)
        instance.known = True

    def _members_unknown(self, number: int, instance: Instance) -> None:
        """A change was lost: until the next snapshot after it nobody's part in a step is known."""
        for request in [*instance.members]:
            self._leave(number, instance, request, instance.closed)
        instance.known = False

    def _leave(self, number: int, instance: Instance, request: int, last: int) -> None:
        first = instance.members.pop(request, None)
        if first is None:
            return
        self._rows["members"].append(
            {"handle": request, "instance": number, "first_step": first, "last_step": max(first, last)}
        )
        if request not in self.requests:
            instance.last_token.pop(request, None)

    # Out

    def take(self, now_ns: int) -> dict[str, pa.Table]:
        """The rows that are final at `now_ns` (monotonic): tables in the schemas of the session."""
        for number, instance in self.instances.items():
            for step_number in [n for n, step in instance.steps.items() if step.end]:
                step = instance.steps[step_number]
                reported = len(instance.reported.get(step_number, ()))
                if reported >= instance.ranks:
                    self._close_step(number, instance, step_number, "complete")
                elif now_ns - step.end > RANKS_PATIENCE_NS:
                    self._close_step(number, instance, step_number, "ranks_missing")
            self._forget_strays(instance)
        # A request that is over is closed at the next take: records of it may be on their way through another ring.
        self._close_what_was_cut(now_ns)
        over = {request.handle for request in self.requests.values() if self._is_over(request, now_ns)}
        for request in [*self.requests.values()]:
            late = request.ending and now_ns - request.last_ns > REQUEST_PATIENCE_NS
            if late or (request.handle in over and request.handle in self._over):
                self._close_request(request, "open")
        self._over = over
        return self._tables()

    def finish(self, open_status: str = "open") -> dict[str, pa.Table]:
        """The rest, when nothing more will come. What is open gets `open_status`: open, or lost when all are dead."""
        for process, source in self.sources.items():
            self._settle_rest(process, source)
        for number, instance in self.instances.items():
            for step_number, step in [*instance.steps.items()]:
                reported = len(instance.reported.get(step_number, ()))
                whole = "complete" if reported >= instance.ranks else "ranks_missing"
                if step.end:
                    self._close_step(number, instance, step_number, whole)
            self._close_open_steps(number, instance)
            for member in [*instance.members]:
                self._leave(number, instance, member, instance.closed)
            for step_number in [*instance.held]:
                self._release(instance, step_number, None)
        for request in [*self.requests.values()]:
            self._close_request(request, open_status)
        return self._tables()

    def _close_what_was_cut(self, now_ns: int) -> None:
        """Closes what was open when the level went below what it needs: its end was not recorded and will not be."""
        for switch in self.switches:
            if now_ns - switch.end_ns < SWITCH_PATIENCE_NS:
                continue
            if switch.crosses(Level.STEP) and switch.after < Level.STEP:
                for number, instance in self.instances.items():
                    for step_number, step in [*instance.steps.items()]:
                        if not step.end and step.begin <= switch.end_ns:
                            step.end = step.scheduled
                            self._close_step(number, instance, step_number, "partial")
            if switch.crosses(Level.REQUEST) and switch.after < Level.REQUEST:
                for request in [*self.requests.values()]:
                    if request.last_ns <= switch.end_ns and not request.over:
                        self._close_request(request, "open", cut=True)

    def _cut(self, begin: int, end: int, level: Level) -> bool:
        """Whether recording at `level` was switched on or off in [begin, end], in ns."""
        return any(
            switch.crosses(level) and switch.begin_ns <= end and begin <= switch.end_ns for switch in self.switches
        )

    def _process_ended(self, process: int, source: Source) -> None:
        self._settle_rest(process, source)
        for number, instance in self.instances.items():
            if instance.process == process:
                instance.ended = True
                self._close_open_steps(number, instance)

    def _settle_rest(self, process: int, source: Source) -> None:
        self.counts["incomplete"] += source.control_parts.give_up(1 << 63) + source.detail_parts.give_up(1 << 63)
        for thread in [*source.pending]:
            self._settle(process, source, thread)

    def _close_open_steps(self, number: int, instance: Instance) -> None:
        for step_number, step in [*instance.steps.items()]:
            if not step.end:
                step.end = max(self.sources[step.process].last_ns, step.scheduled)
                self._close_step(number, instance, step_number, "incomplete")

    def _is_over(self, request: Request, now_ns: int) -> bool:
        """Whether nothing more will come of a request: it ended, or its engine did."""
        instance = self.instances.get(request.instance)
        if instance is not None and instance.ended:
            return request.over or not request.ending
        waits = instance is not None and instance.closed < request.last_step
        return request.over and not (waits and now_ns - request.last_ns <= STEP_PATIENCE_NS)

    def _close_step(self, number: int, instance: Instance, step_number: int, status: str) -> None:
        step = instance.steps.pop(step_number)
        if self._cut(step.begin, step.end, Level.STEP):
            status = "partial"
        named = dict(zip((attribute.name for attribute in STEP_COMPOSITION), step.composition, strict=True))
        self._rows["steps"].append(
            {
                "instance": number,
                "step": step_number,
                "process": step.process,
                "thread": step.thread,
                "phase": step.phase,
                "status": status,
                "begin_ns": step.begin,
                "scheduled_ns": step.scheduled,
                "end_ns": step.end,
                "unattributed_ns": step.unattributed,
                "ranks_expected": instance.ranks,
                "ranks_reported": len(instance.reported.pop(step_number, ())),
                "members": step.members,
                **named,
                "output_tokens": step.output_tokens,
            }
        )
        self._release(instance, step_number, step.phase)

    def _release(self, instance: Instance, step_number: int, phase_: str | None) -> None:
        for process, segment in instance.held.pop(step_number, ()):
            self._rows["segments"].append(_segment_row(process, segment, phase_))

    def _forget_strays(self, instance: Instance) -> None:
        """Lets go of what ranks reported of steps that are closed, or whose begin was lost."""
        for step_number in [n for n in instance.held if n not in instance.steps and n <= instance.closed]:
            self._release(instance, step_number, None)
        for step_number in [n for n in instance.reported if n not in instance.steps and n <= instance.closed]:
            del instance.reported[step_number]

    def _close_request(self, request: Request, open_status: str, cut: bool = False) -> None:
        self.requests.pop(request.handle, None)
        if (instance := self.instances.get(request.instance)) is not None:
            instance.last_token.pop(request.handle, None)
            self._leave(request.instance, instance, request.handle, instance.closed)
            if instance.ended:
                open_status = "lost"
        if not request.states:  # a straggler of a request that was closed, or one whose states were dropped
            self.counts["requests_without_state"] += bool(request.events)
            return
        begin = min(time_ns for time_ns, *_ in request.states)
        # One that did not end may have done so while nothing was recorded: every switch since its begin cuts it.
        cut = cut or (not request.over and self._cut(begin, _FOREVER, Level.REQUEST))
        row, states = request.rows(self.key, "open" if cut else open_status)
        row["partial"] |= cut or self._cut(begin, row["end_ns"], Level.REQUEST)
        self._rows["requests"].append(row)
        self._rows["states"].extend(states)

    def _tables(self) -> dict[str, pa.Table]:
        rows, self._rows = self._rows, {name: [] for name in TABLES}
        return {name: pa.Table.from_pylist(rows[name], schema=schema) for name, schema in TABLES.items()}

    def _request(self, handle: int) -> Request:
        request = self.requests.get(handle)
        if request is None:
            request = self.requests[handle] = Request(handle)
        return request

    def _instance(self, number: int) -> Instance:
        return self.instances.setdefault(number, Instance())


def _segment_row(process: int, segment: Segment, phase_: str | None) -> dict[str, Any]:
    parent = segment.parent
    known = len(BY_ID[segment.stage].attributes)
    return {
        "process": process,
        "sequence": segment.sequence,
        "thread": segment.thread,
        "stage": segment.stage,
        "begin_ns": segment.begin,
        "end_ns": segment.end,
        "self_ns": segment.self_ns,
        "parent": parent.sequence if parent else None,
        "parent_stage": parent.stage if parent else None,
        "instance": segment.instance or None,
        "step": segment.step or None,
        "phase": phase_,
        **{f"a{i}": value for i, value in enumerate(segment.attributes[:known])},
    }
