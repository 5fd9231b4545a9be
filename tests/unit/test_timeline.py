"""Timelines for viewers: what is drawn, written in Perfetto's and in Chrome's format, and read back by their schema."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from backends.tables import MS, Builder, Serving, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from perfetto.protos.perfetto.trace import perfetto_trace_pb2
from unit.test_spans import SCHEDULER, WORKER, sessions

from stagetrace.exporters.chrome import ChromeEncoder
from stagetrace.exporters.perfetto import PerfettoEncoder
from stagetrace.exporters.session import Manifest, Session, SessionError
from stagetrace.exporters.timeline import Drawn, Group, Timelines, Track, What, _Lanes
from stagetrace.exporters.trace_file import FORMATS, write_trace
from stagetrace.instrument.identity import claim_identity

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import pyarrow as pa


@dataclass
class Read:
    """A trace as a reader sees it: events of each track in the order of their times."""

    groups: dict[int, str] = field(default_factory=dict)
    tracks: dict[int, tuple[int, str]] = field(default_factory=dict)  # -> group, name
    events: dict[int, list[tuple[int, str, str, dict[str, Any]]]] = field(default_factory=lambda: defaultdict(list))
    flows: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))  # -> track, time
    counters: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))

    def slices(self) -> dict[int, list[tuple[int, int, int, str]]]:
        """Of each track begin, end, depth and name of its slices. They nest, or this fails."""
        found = {}
        for track, events in self.events.items():
            stack: list[tuple[int, str]] = []
            done = []
            for time, what, name, _ in sorted(events, key=lambda event: event[0]):  # stable, as readers sort
                if what == "B":
                    stack.append((time, name))
                elif what == "E":
                    begin, began = stack.pop()
                    done.append((begin, time, len(stack), began))
            assert not stack, "something was never ended"
            found[track] = done
        return found

    def names(self, track: str) -> list[str]:
        (number,) = [number for number, (_, name) in self.tracks.items() if name == track]
        return [name for _, what, name, _ in self.events[number] if what == "B"]


def read_perfetto(data: bytes) -> Read:
    found = Read()
    trace = perfetto_trace_pb2.Trace.FromString(data)
    assert trace.packet[0].sequence_flags == 1
    names: dict[int, str] = {}
    args: dict[int, str] = {}
    units = {}
    for packet in trace.packet:
        assert packet.trusted_packet_sequence_id == 1
        for said, known in (
            (packet.interned_data.event_names, names),
            (packet.interned_data.debug_annotation_names, args),
        ):
            for each in said:
                assert each.iid not in known
                known[each.iid] = each.name
        if packet.HasField("track_descriptor"):
            track = packet.track_descriptor
            if track.HasField("parent_uuid"):
                assert track.parent_uuid in found.groups
                found.tracks[track.uuid] = track.parent_uuid, track.name
                units[track.uuid] = track.HasField("counter")
            else:
                found.groups[track.uuid] = track.name
        elif packet.HasField("track_event"):
            event = packet.track_event
            where = event.track_uuid
            if event.type == event.TYPE_COUNTER:
                assert units[where]
                found.counters[found.tracks[where][1]].append((packet.timestamp, event.double_counter_value))
                continue
            assert not units[where]
            what = {event.TYPE_SLICE_BEGIN: "B", event.TYPE_SLICE_END: "E", event.TYPE_INSTANT: "I"}[event.type]
            said = {args[each.name_iid]: getattr(each, each.WhichOneof("value")) for each in event.debug_annotations}
            found.events[where].append((packet.timestamp, what, names.get(event.name_iid, ""), said))
            for flow in event.flow_ids:
                found.flows[flow].append((where, packet.timestamp))
    return found


def read_chrome(data: bytes) -> Read:
    found = Read()
    begun: dict[int, list[dict[str, Any]]] = defaultdict(list)  # by track: arguments, which the end may add to

    def nanoseconds(text: str) -> int:
        micros, _, rest = text.partition(".")
        return int(micros) * 1000 + int(rest.ljust(3, "0"))

    for event in json.loads(data, parse_float=str)["traceEvents"]:
        kind, pid = event["ph"], event["pid"]
        if "ts" in event:
            event["ts"] = nanoseconds(event["ts"])
        if kind == "M":
            if event["name"] == "process_name":
                found.groups[pid] = event["args"]["name"]
            elif event["name"] == "thread_name":
                assert pid in found.groups
                found.tracks[event["tid"]] = pid, event["args"]["name"]
        elif kind == "C":
            found.counters[event["name"]].append((event["ts"], float(next(iter(event["args"].values())))))
        elif kind in ("s", "f"):
            found.flows[event["id"]].append((event["tid"], event["ts"]))
        else:
            what = {"B": "B", "E": "E", "i": "I"}[kind]
            name = "" if what == "E" else event["name"]
            args = event.get("args", {})
            if what == "B":
                begun[event["tid"]].append(args)
            elif what == "E":
                begun[event["tid"]].pop().update(args)
                args = {}
            found.events[event["tid"]].append((event["ts"], what, name, args))
    return found


READERS = {"perfetto": (PerfettoEncoder, read_perfetto), "chrome": (ChromeEncoder, read_chrome)}


def written(commits: Iterable[dict[str, pa.Table]], manifest: Manifest, form: str) -> Read:
    encoder, read = READERS[form]
    made = encoder()
    timelines = Timelines()
    parts = [made.begin(manifest.anchors)]
    parts += [made.item(item) for tables in commits for item in timelines.add(tables, manifest)]
    return read(b"".join([*parts, made.end()]))


def check(read: Read) -> None:
    """Every track nests, and every flow joins two moments, each on a slice of its track."""
    slices = read.slices()
    for ends in read.flows.values():
        (_, begin), (_, end) = ends
        assert begin <= end, "a reader of Chrome's format drops an arrow that ends before it begins"
        for track, time in ends:
            assert any(begin <= time <= end for begin, end, _, _ in slices[track])


@pytest.fixture(scope="module")
def session() -> Serving:
    return serving()


@pytest.mark.parametrize("form", READERS)
def test_a_session_is_drawn_with_its_processes_requests_and_counters(session: Serving, form: str) -> None:
    read = written([session.tables], session.manifest, form)
    check(read)
    assert sorted(read.groups.values()) == ["api on node-7", "engine on node-7", "requests", "worker, rank 0 on node-7"]
    assert Counter(read.names("steps")) == {"step prefill": 2, "step mixed": 1, "step decode": 1}
    assert Counter(read.names("scheduler")) == {
        **dict.fromkeys(("schedule", "execute", "grammar", "update"), 4),
        **dict.fromkeys(("between", "emit", "idle"), 1),
    }
    assert [value for _, value in read.counters["KV cache usage"]] == [0, 0, 0, 25]
    assert [value for _, value in read.counters["batch tokens: prefill"]] == [400, 400, 30, 0]
    assert [value for _, value in read.counters["waiting requests"]] == [1, 0, 0, 0]
    lanes = [track for track, (group, _) in read.tracks.items() if read.groups[group] == "requests"]
    assert len(lanes) == 2, "no more than two requests at once"
    states: dict[str, list[str]] = {}
    for lane in lanes:
        for _, what, name, args in read.events[lane]:
            if what == "B" and name == "request":
                now = states[args["request_id"]] = []
            if what == "B":
                now.append(name)
    assert states["cmpl-a-0"] == [
        *("request", "request_tokenize", "request_dispatch", "queue"),
        *("prefill", "prefill_chunk", "prefill_chunk", "decode", "output"),
    ]
    assert states["cmpl-c-0"] == ["request", "queue"], "one that the caller does not sample is drawn as well"
    # Steps 1 and 2 (chunks), 4 (the last) of the one, 3 and 4 of the other.
    steps = {number: name for number, (_, name) in read.tracks.items() if name == "steps"}
    arrows = [ends for ends in read.flows.values() if any(track in steps for track, _ in ends)]
    assert len(arrows) == len(read.flows) == 5
    assert all(track not in steps for (track, _), _ in arrows), "from the request to the step"
    into = Counter(end for _, end in arrows)
    assert max(into.values()) == 1, "viewers stack what is at the same moment of a track"


@pytest.mark.parametrize("form", READERS)
def test_words_and_times_are_those_of_the_rows(session: Serving, form: str) -> None:
    read = written([session.tables], session.manifest, form)
    (steps,) = [number for number, (_, name) in read.tracks.items() if name == "steps"]
    time, _, _, args = next(event for event in read.events[steps] if event[1:3] == ("B", "step decode"))
    assert time == session.begin + 70 * MS
    assert (args["decode_tokens"], args["kv_usage"], args["status"]) == (2, 250_000, "complete")
    assert args["engine_instance"] == f"{session.instance:016x}"
    attention = [event for events in read.events.values() for event in events if event[2] == "attention"]
    assert [event[3]["kind"] for event in attention] == ["full"] * 4


def by_commits(tables: dict[str, pa.Table], cuts: Sequence[int]) -> list[dict[str, pa.Table]]:
    """The rows of each table in as many commits as there are cuts, in thousandths, and one more."""
    bounds = [0, *sorted(cuts), 1000]
    return [
        {
            name: table.slice(
                table.num_rows * first // 1000, table.num_rows * last // 1000 - table.num_rows * first // 1000
            )
            for name, table in tables.items()
        }
        for first, last in pairwise(bounds)
    ]


@settings(deadline=None, max_examples=40)
@given(sessions(), st.lists(st.integers(0, 1000), max_size=3), st.sampled_from(list(READERS)))
def test_any_rows_in_any_commits_nest(build: Builder, cuts: list[int], form: str) -> None:
    manifest = Manifest(session="s", host="h", anchors=[(0, 10**18)])
    check(written(by_commits(build.tables(), cuts), manifest, form))


REQUEST = st.tuples(
    st.integers(0, 500), st.integers(0, 100), st.lists(st.tuples(st.integers(0, 600), st.integers(0, 99)), max_size=4)
)


@settings(deadline=None, max_examples=40)
@given(st.lists(REQUEST, max_size=12), st.lists(st.integers(0, 1000), max_size=3))
def test_any_requests_in_any_commits_nest(requests: list[Any], cuts: list[int]) -> None:
    build = Builder()
    for step in range(10):  # overlapping, as with two in flight
        build.step(7, step, step * 50, step * 50 + 90, decode_tokens=1)
    for number, (begin, length, states) in enumerate(requests):
        handle = build.request(f"r{number}", arrival_ns=begin, end_ns=begin + length)
        build.add("members", handle=handle, instance=7, first_step=begin // 50, last_step=(begin + length) // 50)
        for at, (first, long) in enumerate(states):
            build.state(
                ("prefill", "prefill_chunk", "decode", "queue")[at], handle, first, first + long, step=at, instance=7
            )
    manifest = Manifest(session="s", host="h", anchors=[(0, 10**18)])
    for form in READERS:
        check(written(by_commits(build.tables(), cuts), manifest, form))


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 50))))
def test_lanes_hold_one_at_a_time_and_are_no_more_than_needed(spans: list[tuple[int, int]]) -> None:
    lanes = _Lanes()
    taken: dict[int, list[tuple[int, int]]] = defaultdict(list)
    intervals = sorted(((begin, begin + length) for begin, length in spans), key=lambda each: each[1])
    for begin, end in intervals:
        taken[lanes.take(begin, end)].append((begin, end))
    for held in taken.values():
        held.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(held))
    most = max(
        (sum(a <= begin < b or (a, b) == (begin, end) for a, b in intervals) for begin, end in intervals), default=0
    )
    assert len(taken) <= max(2 * most, most)


def test_rank_steps_that_overlap_go_to_lanes_of_their_own() -> None:
    build = Builder()
    for step, begin in ((1, 0), (2, 50), (3, 120)):
        build.segment("rank_step", WORKER, begin, begin + 100, of=(7, step, "decode"))
        build.segment("forward", WORKER, begin + 10, begin + 40, of=(7, step, "decode"))
    read = written([build.tables()], Manifest(anchors=[(0, 1)]), "perfetto")
    check(read)
    assert sorted(name for _, name in read.tracks.values()) == ["rank", "rank steps", "rank steps, overlapping 1"]


@pytest.mark.parametrize("form", READERS)
def test_what_marks_told_is_drawn_inside_the_forward_pass(form: str) -> None:
    builds = [Builder(), Builder()]
    for at, build in enumerate(builds):  # a step in each commit
        of, begin = (7, at + 1, "decode"), 1000 * at
        build.segment("device_collective", WORKER, begin + 30, begin + 40, of=of, layer=1)
        build.segment("device_moe", WORKER, begin + 20, begin + 50, of=of, layer=1)
        build.segment("device_attention", WORKER, begin, begin + 15, of=of, layer=1)
        build.segment("device_forward", WORKER, begin, begin + 100, of=of)
        build.segment("device_sample", WORKER, begin + 100, begin + 120, of=of)
    read = written([build.tables() for build in builds], Manifest(anchors=[(0, 10**18)]), form)
    check(read)
    (track,) = [number for number, (_, name) in read.tracks.items() if name == "device"]
    drawn = [(depth, name) for _, _, depth, name in sorted(read.slices()[track], key=lambda each: (each[0], each[2]))]
    stages = ((0, "forward"), (1, "attention"), (1, "moe"), (2, "collective"), (0, "sample"))
    assert drawn == 2 * [(depth, f"device_{name}") for depth, name in stages]


def test_threads_of_one_kind_are_numbered() -> None:
    builds = [Builder(), Builder()]
    for build in builds:  # in both commits
        for thread in (1, 2):
            build.segment("forward", WORKER, 10 * thread, 10 * thread + 5, of=(7, 1, "decode"))
            build.rows["segments"][-1]["thread"] = thread
    read = written([build.tables() for build in builds], Manifest(anchors=[(0, 1)]), "perfetto")
    assert sorted(name for _, name in read.tracks.values()) == ["rank", "rank 2"]


def test_what_cannot_be_drawn_is_counted() -> None:
    build = Builder()
    build.segment("execute", SCHEDULER, 0, 100)
    late = Builder()
    late.segment("update", SCHEDULER, 10, 20)
    handle = late.request("r", arrival_ns=0, end_ns=5)
    late.add("members", handle=handle, instance=9, first_step=1, last_step=2)
    timelines = Timelines()
    for tables in (build.tables(), late.tables()):
        items = list(timelines.add(tables, Manifest(anchors=[(0, 1)])))
    assert timelines.left_out == {"slices_cut": 1, "arrows_without_step": 2}
    assert {type(item) for item in items} == {Group, Track, Drawn}
    assert not [item for item in items if isinstance(item, Drawn) and item.what is What.INSTANT]


# The file


@pytest.fixture
def recorded(tmp_path: Path, session: Serving) -> Session:
    path = tmp_path / "session"
    made = Session(path, claim_identity(path))
    for name, table in session.tables.items():
        made.write_table(name, table, 1)
    session.manifest.derived, session.manifest.complete = 1, True
    made.write_manifest(session.manifest)
    return made


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_is_what_the_encoder_makes(recorded: Session, session: Serving, tmp_path: Path, form: str) -> None:
    encoder, _ = FORMATS[form]
    path = tmp_path / "trace"
    count, left_out = write_trace(recorded, path, encoder(), lambda *_: False)
    read = READERS[form][1](path.read_bytes())
    assert read == written([session.tables], session.manifest, form)
    assert count == sum(map(len, read.events.values())) + sum(map(len, read.counters.values()))
    assert not left_out
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["trace"]


def test_a_damaged_session_or_a_stop_leaves_what_was_there(recorded: Session, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("before")
    with pytest.raises(SessionError, match="stopped after 0 of 2"):
        write_trace(recorded, path, PerfettoEncoder(), lambda *_: True)
    part = next((recorded.path / "tables" / "steps").iterdir())
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(SessionError, match="stagetrace rebuild"):
        write_trace(recorded, path, PerfettoEncoder(), lambda *_: False)
    assert path.read_text() == "before"
