"""A session as tracks and events, for viewers of timelines (perfetto.py, chrome.py): pure, commit by commit.

Each process is a group of tracks, named by its rank, with one track per timeline: there the segments nest. Steps and
rank steps may overlap, as requests do: they go to lanes, tracks that hold one at a time. A request has its states
inside, and an arrow (a flow) to each step that gave it a prefill chunk, to the first and to the last step of each run
of steps that it took part in. Whatever would cross what is around it is cut there and counted. What is held between
two commits is bounded: lanes, the newest steps, and rows of requests that are not over.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from stagetrace.instrument.stages import BY_ID, BY_NAME, STEP_COMPOSITION, Kind, Timeline

from .gather import Gather
from .session import names_of
from .spans import RANKS, hex_instance, rows_of, words_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    import pyarrow as pa

    from .session import Manifest, Process
    from .spans import Row

MOST_STEPS = 100_000  # that requests which end later can still have an arrow to
_RANK_STEP = BY_NAME["rank_step"].id
_PREFILL, _CHUNK = BY_NAME["prefill"].id, BY_NAME["prefill_chunk"].id
_STEP_ARGS = (
    *("step", "phase", "status", "members", "output_tokens", "accepted_tokens", "padded_tokens", "graph_mode"),
    *("unattributed_ns", "ranks_expected", "ranks_reported"),
    *(attribute.name for attribute in STEP_COMPOSITION),
)
_REQUEST_ARGS = (
    *("request_id", "external_id", "trace_id", "status", "finish", "prompt_tokens", "cached_tokens", "output_tokens"),
    *("preemptions", "partial", "lora"),
)
# What is drawn over time, by the counter's name: unit, and the columns of steps that are added.
_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "KV cache usage": ("%", ("kv_usage",)),
    "waiting requests": ("requests", ("waiting",)),
    "running requests": ("requests", ("running",)),
    "batch tokens: prefill": ("tokens", ("prefill_tokens",)),
    "batch tokens: decode": ("tokens", ("decode_tokens",)),
}


class Group(NamedTuple):
    """Tracks that belong together: a process, or the requests."""

    id: int
    name: str
    pid: int | None  # None: it is none
    rank: int  # where it stands among the others


class Track(NamedTuple):
    """One line of the picture."""

    id: int
    group: int
    name: str
    unit: str | None = None  # of a counter; None: it has slices


class What(Enum):
    """What an event is."""

    BEGIN = 1
    END = 2
    INSTANT = 3
    VALUE = 4


class Drawn(NamedTuple):
    """One event. Those of a track nest when they are sorted by time, and in their order where times are equal."""

    what: What
    track: int
    time_ns: int  # on the monotonic clock
    name: str = ""  # one of a few: stages, with their phase
    args: Mapping[str, Any] | None = None
    flow: int = 0  # events with the same one are joined by an arrow; 0: none
    value: float = 0


Item = Group | Track | Drawn


@dataclass(frozen=True)
class _Slice:
    begin: int
    end: int
    name: str
    args: Mapping[str, Any]


@dataclass(slots=True)
class _Step:
    """Where a step was drawn, and how many arrows lead to it."""

    track: int
    begin: int
    end: int
    arrows: int = 0


class _Lanes:
    """Tracks that hold one interval at a time: of those that are free the one that was so last."""

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []  # since when, number

    def take(self, begin: int, end: int) -> int:
        """The number of the lane for this interval; intervals may come in any order, best by their end."""
        at = bisect_right(self._free, (begin, 1 << 62))
        number = self._free.pop(at - 1)[1] if at else len(self._free)
        insort(self._free, (end, number))
        return number


class Timelines:
    """Makes groups, tracks and events of one commit's tables after the other. A track comes before its events."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self._gather = Gather()
        self._groups: dict[int | None, int] = {}  # process, None for the requests -> id
        self._tracks: dict[tuple[Any, ...], int] = {}
        self._named: Counter[tuple[int, str]] = Counter()  # timelines by process and name
        self._lanes: dict[tuple[Any, ...], _Lanes] = defaultdict(_Lanes)
        self._reached: dict[int, int] = {}  # track -> end of the last outermost slice
        self._steps: OrderedDict[tuple[int, int], _Step] = OrderedDict()
        self._flows = 0

    def add(self, tables: Mapping[str, pa.Table], manifest: Manifest) -> Iterator[Item]:
        """What a commit's tables give."""
        rows, left_out = self._gather.add(rows_of(tables))
        self.left_out += left_out
        processes = {process.key: process for process in manifest.processes}
        names = names_of(manifest.processes)
        yield from self._draw_steps(rows["steps"], processes)
        yield from self._draw_segments(rows["segments"], processes, names)
        yield from self._draw_requests(rows["requests"], rows["states"], rows["members"], names)

    # Steps and segments

    def _draw_steps(self, steps: Sequence[Row], processes: Mapping[int, Process]) -> Iterator[Item]:
        for row in steps:
            process = row["process"]
            end = max(row["end_ns"], row["begin_ns"])
            lane = self._lanes[process, "steps"].take(row["begin_ns"], end)
            name = "steps" if not lane else f"steps, overlapping {lane}"
            track = yield from self._track(process, (process, "steps", lane), name, processes)
            args = {key: row[key] for key in _STEP_ARGS if row[key] is not None}
            args["engine_instance"] = hex_instance(row["instance"])
            yield Drawn(What.BEGIN, track, row["begin_ns"], f"step {row['phase']}", args)
            yield Drawn(What.END, track, end)
            self._steps[row["instance"], row["step"]] = _Step(track, row["begin_ns"], end)
            for counter, (unit, columns) in _COUNTERS.items():
                line = yield from self._track(process, (process, counter), counter, processes, unit)
                value = sum(row[column] for column in columns)
                yield Drawn(What.VALUE, line, row["begin_ns"], value=value / 1e4 if unit == "%" else value)
        while len(self._steps) > MOST_STEPS:
            self._steps.popitem(last=False)

    def _draw_segments(
        self, segments: Sequence[Row], processes: Mapping[int, Process], names: Mapping[int, str]
    ) -> Iterator[Item]:
        timelines: defaultdict[tuple[int, int], list[Row]] = defaultdict(list)
        for row in segments:
            if row["stage"] not in BY_ID:
                self.left_out["segments_of_unknown_stage"] += 1
            elif row["stage"] == _RANK_STEP:
                end = max(row["end_ns"], row["begin_ns"])
                lane = self._lanes[row["process"], row["thread"], "rank"].take(row["begin_ns"], end)
                name = "rank steps" if not lane else f"rank steps, overlapping {lane}"
                track = yield from self._track(
                    row["process"], (row["process"], row["thread"], "rank", lane), name, processes
                )
                yield from self._slices(track, [_slice(row, names)])
            else:
                timelines[row["process"], row["thread"]].append(row)
        for (process, thread), rows in timelines.items():
            name = "" if (process, thread) in self._tracks else self._timeline_name(process, rows)
            track = yield from self._track(process, (process, thread), name, processes)
            rows.sort(key=lambda row: (row["begin_ns"], -row["end_ns"], -row["sequence"]))
            yield from self._slices(track, [_slice(row, names) for row in rows])

    def _slices(self, track: int, slices: Sequence[_Slice]) -> Iterator[Drawn]:
        """Events of slices in the order of their begins, an outer one first; cut where they would cross."""
        reached = self._reached.get(track, 0)
        open_ends: list[int] = []
        for each in slices:
            begin, end = max(each.begin, reached), max(each.end, reached, each.begin)
            while open_ends and open_ends[-1] <= begin:
                yield Drawn(What.END, track, open_ends.pop())
            if open_ends and end > open_ends[-1]:
                end = open_ends[-1]
            if (begin, end) != (each.begin, each.end):
                self.left_out["slices_cut"] += 1
            if begin >= end and begin != each.begin:
                continue
            yield Drawn(What.BEGIN, track, begin, each.name, each.args)
            open_ends.append(end)
        outermost = open_ends[0] if open_ends else reached
        while open_ends:
            yield Drawn(What.END, track, open_ends.pop())
        self._reached[track] = max(reached, outermost)

    # Requests

    def _draw_requests(
        self, requests: Sequence[Row], states: Sequence[Row], members: Sequence[Row], names: Mapping[int, str]
    ) -> Iterator[Item]:
        states_of = _by_handle(states)
        members_of = _by_handle(members)
        for row in sorted(requests, key=lambda row: int(row["end_ns"])):
            own = sorted(states_of.get(row["handle"], ()), key=lambda state: (state["begin_ns"], -state["end_ns"]))
            begin = min([row["arrival_ns"] or row["end_ns"], *(s["begin_ns"] for s in own if s["stage"] != _CHUNK)])
            end = max(row["end_ns"], begin)
            # One that has just ended does not share a lane with one that begins in the same moment.
            lane = self._lanes["requests",].take(begin - 1, end)
            track = yield from self._track(None, ("requests", lane), f"requests {lane + 1}", {})
            args = {key: row[key] for key in _REQUEST_ARGS if row[key] is not None}
            yield from self._slices(track, [_Slice(begin, end, "request", args), *self._states(own, begin, end, names)])
            yield from self._arrows(track, begin, end, row, own, members_of.get(row["handle"], ()))

    def _states(self, states: Sequence[Row], begin: int, end: int, names: Mapping[int, str]) -> list[_Slice]:
        """A request's states, and its chunks in the prefills: these last as long as their steps, so they are cut."""
        found = []
        for row in states:
            stage = BY_ID.get(row["stage"])
            if stage is None:
                self.left_out["states_of_unknown_stage"] += 1
            elif stage.id != _CHUNK:
                first, last = max(row["begin_ns"], begin), min(row["end_ns"], end)
                if first <= last:
                    found.append(_Slice(first, last, stage.name, _args(row, names)))
        prefills = [(state.begin, state.end) for state in found if state.name == "prefill"]
        for first, last in prefills:
            at = first
            for row in states:
                inside = max(row["begin_ns"], at), min(row["end_ns"], last)
                if row["stage"] == _CHUNK and inside[0] < inside[1]:
                    found.append(_Slice(*inside, "prefill_chunk", _args(row, names)))
                    at = inside[1]
        return sorted(found, key=lambda each: (each.begin, -each.end, each.name == "prefill_chunk"))

    def _arrows(
        self, track: int, begin: int, end: int, request: Row, states: Sequence[Row], members: Sequence[Row]
    ) -> Iterator[Drawn]:
        chunks = [(state["instance"], state["step"]) for state in states if state["stage"] == _CHUNK]
        ends = [(run["instance"], run[name]) for run in members for name in ("first_step", "last_step")]
        for instance, step in dict.fromkeys([*chunks, *ends]):
            where = self._steps.get((instance, step))
            if where is None:
                self.left_out["arrows_without_step"] += 1
                continue
            self._flows += 1
            args = {"request_id": request["request_id"] or "", "step": step}
            at = min(max(where.begin, begin), end)
            # One after the other: viewers stack what is at the same moment. An arrow goes from the earlier end.
            arrives = min(max(where.begin + where.arrows, at), where.end)
            where.arrows += 1
            mine = Drawn(What.INSTANT, track, at, "in step", args, self._flows)
            its = Drawn(What.INSTANT, where.track, arrives, "request in step", args, self._flows)
            yield from (mine, its) if at <= arrives else (its, mine)

    # Tracks

    def _timeline_name(self, process: int, rows: Sequence[Row]) -> str:
        """A thread's or stream's name by what is on it; of several in a process the later ones are numbered."""
        timelines = (BY_ID[row["stage"]].timeline for row in rows)
        name = next((str(each) for each in timelines if each not in (Timeline.ANY, Timeline.REQUEST)), "thread")
        self._named[process, name] += 1
        number = self._named[process, name]
        return name if number == 1 else f"{name} {number}"

    def _track(
        self,
        process: int | None,
        key: tuple[Any, ...],
        name: str,
        processes: Mapping[int, Process],
        unit: str | None = None,
    ) -> Generator[Item, None, int]:
        """The track's id; it is made, and its group, where it is new."""
        known = self._tracks.get(key)
        if known is not None:
            return known
        if process not in self._groups:
            self._groups[process] = group = len(self._groups) + 1
            yield _group(group, process, processes)
        self._tracks[key] = number = 1000 + len(self._tracks)
        yield Track(number, self._groups[process], name, unit)
        return number


def _group(number: int, key: int | None, processes: Mapping[int, Process]) -> Group:
    if key is None:
        return Group(number, "requests", None, -1)
    process = processes.get(key)
    if process is None:
        return Group(number, f"process {key:016x}", None, 1 << 20)
    # Where all are rank 0 in a dimension there is no parallelism in it.
    of_more = {name for each in processes.values() for name in RANKS if each.info.get(name)} | {"rank"}
    ranks = [
        f"{name.replace('_', ' ')} {process.info[name]}" for name in RANKS if name in process.info and name in of_more
    ]
    name = ", ".join([process.role.replace("_", " "), *ranks])
    rank = process.info.get("rank")
    return Group(number, f"{name} on {process.host}", process.pid, rank + 1 if isinstance(rank, int) else 0)


def _slice(row: Row, names: Mapping[int, str]) -> _Slice:
    stage = BY_ID[row["stage"]]
    args = _args(row, names)
    if stage.kind is not Kind.STATE:
        args["self_ns"] = row["self_ns"]
    return _Slice(row["begin_ns"], row["end_ns"], stage.name, args)


def _args(row: Row, names: Mapping[int, str]) -> dict[str, Any]:
    args = {name: row[name] for name in ("step", "phase") if row.get(name) is not None}
    for name, value in words_of(row, names):
        args[name.removeprefix("stagetrace.")] = value
    return args


def _by_handle(rows: Sequence[Row]) -> dict[int, list[Row]]:
    grouped: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row["handle"]].append(row)
    return grouped
