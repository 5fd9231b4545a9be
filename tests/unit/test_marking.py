"""Tests of marks around an engine's layers. No GPU: a device of the test's own passes the marks, and replays graphs."""

from __future__ import annotations

import sys
from collections import deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from unit.devices import ASIDE, FakeDevice
from unit.rings import opened, read_all

from stagetrace.adapters import marking
from stagetrace.adapters.device_time import DeviceTime
from stagetrace.adapters.marking import COLLECTIVES_OF_A_LAYER, Place, marked_of
from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.instrument.device_marks import (
    EMPTY,
    FORWARD,
    MARK_LAYERS,
    MARKS,
    Marked,
    MarkReader,
    MarkSpan,
    Pair,
    choice,
    placed,
    spread,
    trimmed,
)
from stagetrace.instrument.device_pairs import FORWARD as FORWARD_PAIR
from stagetrace.instrument.device_pairs import DevicePairs
from stagetrace.instrument.hooks import ERRORS_UNTIL_OUT
from stagetrace.instrument.stages import BY_ID, Level

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from stagetrace.exporters.drain import RingReader
    from stagetrace.instrument.recorder import Recorder

US = 1000
INSTANCE, RANK = 9, 3
LAYERS = 3


class Marks:
    """As adapters/marks.py, on the test's device: a captured mark is passed whenever the graph is replayed."""

    broken = False

    def __init__(self, marked: Sequence[Marked], device: FakeDevice, event: Any):
        self.reader, self.left_out = MarkReader(marked), 0
        self._device, self._event = device, event
        self._counter = 0
        self._row = [0] * self.reader.words
        self._copies: deque[tuple[int, list[int], Any]] = deque()

    def begin_step(self, step: int) -> None:
        self._device.launch(US)
        self._counter = step

    def mark(self, index: int) -> None:
        if self.broken:
            raise RuntimeError("the test's")
        if self._device.capturing_now:
            GRAPH.append(lambda: self.mark(index))
            return
        time = self._device.timer(self._device.launch(US))
        times = self._row[3 * index + 2] + 1 if self._row[3 * index + 1] == self._counter else 1
        self._row[3 * index : 3 * index + 3] = [time, self._counter, times]

    def end_step(self, step: int) -> bool:
        event = self._event()
        event.record()
        self._copies.append((step, [*self._row], event))
        return True

    def read(self) -> list[tuple[int, list[MarkSpan]]]:
        found = []
        while self._copies and self._copies[0][2].query():
            step, row, _ = self._copies.popleft()
            found.append((step, self.reader.read(step, row)))
        return found


GRAPH: list[Any] = []


class Part:
    """A layer's part, which launches work; captured, that is in the graph."""

    def __init__(self, device: FakeDevice, width: int, inner: Any = None):
        self._device, self._width, self._inner = device, width, inner or (lambda: None)
        self.calls = 0

    def forward(self, x: int) -> int:
        """Gives back what comes in and one."""
        self.calls += 1
        if self._device.capturing_now:
            GRAPH.append(lambda: self._device.launch(self._width))
        else:
            self._device.launch(self._width)
        self._inner()
        return x + 1


class Engine:
    """Layers of attention, experts and two operations of a group, run by Python or replayed."""

    def __init__(self, device: FakeDevice, recorder: Recorder):
        self.device, self.recorder = device, recorder
        self.rank = SimpleNamespace(rank=RANK, instance=INSTANCE, step=0)
        self.timer = DeviceTime(self.rank)
        self.group = Part(device, 30 * US)
        self.attention = [Part(device, (10 + n) * US) for n in range(LAYERS)]
        self.moe = [Part(device, 50 * US) for _ in range(LAYERS)]
        self.begin, self.end = self.timer.begins(FORWARD_PAIR), self.timer.ends(FORWARD_PAIR)

    def put(self) -> dict[str, Any]:
        self.timer.open("cuda", self.recorder)
        forwarded = self.timer.marks.paired
        self.timer.pairs = DevicePairs(self.device, self.recorder.put, self.device.clock, forwarded=forwarded)
        attentions = [Place("attention", n, part, "forward") for n, part in enumerate(self.attention)]
        places = [*attentions, *(Place("moe", n, part, "forward") for n, part in enumerate(self.moe))]
        places.append(Place("collective", -1, self.group, "forward"))
        found = self.timer.marks.put(self.recorder, places, attentions, self.device, self.timer.event)
        return found.get("marks", {})  # type: ignore[return-value]

    def model(self) -> None:
        self.group.forward(0)  # of the embedding: in no layer
        for attention, moe in zip(self.attention, self.moe, strict=True):
            assert attention.forward(1) == 2
            self.group.forward(0)
            assert moe.forward(x=1) == 2
            self.group.forward(0)

    def capture(self) -> None:
        GRAPH.clear()
        self.device.capturing_now = True
        self.model()
        self.device.capturing_now = False

    def step(self, number: int, run: Any = None) -> None:
        self.timer.step_begins()
        self.rank.step = number
        self.timer.step_begins()
        self.begin()
        (run or self.model)()
        self.end()
        self.rank.step = 0
        self.device.now += 10_000 * US
        self.timer.fetched()

    def replay(self) -> None:
        for passed in GRAPH:
            passed()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    found = FakeDevice(drift_ppm=20)
    cuda = SimpleNamespace(
        Event=lambda enable_timing: found.event(),
        current_device=lambda: 0,
        Stream=lambda: ASIDE,
        is_current_stream_capturing=found.capturing,
        is_initialized=lambda: True,
    )
    torch = SimpleNamespace(
        cuda=cuda,
        backends=SimpleNamespace(cuda=SimpleNamespace(is_built=lambda: True)),
        compiler=SimpleNamespace(is_compiling=lambda: False),
        _C=SimpleNamespace(_cuda_getCurrentRawStream=lambda _: found.stream()),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(marking, "Marks", Marks)
    monkeypatch.setattr(Marks, "broken", False)
    GRAPH.clear()
    return found


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[tuple[Recorder, RingReader]]:
    with opened(tmp_path, role="worker") as (recorder, reader):
        recorder.level[0] = Level.LAYER
        yield recorder, reader


@pytest.fixture
def engine(device: FakeDevice, ring: tuple[Recorder, RingReader], monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setenv(MARKS, "moe,attention,collective")
    monkeypatch.setenv(MARK_LAYERS, "2")
    return Engine(device, ring[0])


def rows(ring: tuple[Recorder, RingReader]) -> list[dict[str, Any]]:
    """Device rows by their begins; nothing is to be amiss."""
    assembler = Assembler(ring[0].key)
    assembler.add(read_all(ring[1]))
    found = assembler.finish()["segments"].to_pylist()
    assert not +assembler.counts
    named = [row | {"stage": BY_ID[row["stage"]].name.removeprefix("device_")} for row in found]
    return sorted(named, key=lambda row: (row["begin_ns"], -row["end_ns"]))


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_what_was_run_or_replayed_is_inside_its_step(engine: Engine, ring: tuple[Recorder, RingReader], graph: bool):
    assert engine.put()["per_step"] == 2 * (2 + 2 * 2 + COLLECTIVES_OF_A_LAYER)
    if graph:
        engine.capture()
    for number in range(1, 5):
        engine.step(number, engine.replay if graph else None)
    found = rows(ring)
    assert {row["step"] for row in found if row["stage"] == "attention"} == {1, 2, 3, 4}
    of_step = [row for row in found if row["step"] == 2]
    assert [(row["stage"], row["a0"]) for row in of_step] == [
        ("forward", RANK),
        ("attention", 0), ("collective", 0), ("moe", 0), ("collective", 0),
        ("attention", 2), ("moe", 2),
    ], of_step  # fmt: skip
    whole, *inner = of_step
    assert all(row["parent"] == whole["sequence"] and row["thread"] == whole["thread"] for row in inner)
    assert all(row["a1"] == RANK and row["instance"] == INSTANCE for row in inner)
    for row, width in zip(inner, (10, 30, 50, 30, 12, 50), strict=True):
        lasted = row["end_ns"] - row["begin_ns"]
        assert width * US == lasted, "its work; an empty span of the device's is as long as a mark"
        assert row["a2"] >= whole["a2"], "no better than the pair's"
    assert engine.attention[0].calls == (1 if graph else 4)


def test_below_the_level_graphs_get_marks_and_nothing_is_read(engine: Engine, ring: tuple[Recorder, RingReader]):
    engine.put()
    ring[0].level[0] = Level.STEP
    engine.capture()
    engine.step(1, engine.replay)
    engine.step(2)
    ring[0].level[0] = Level.LAYER
    for number in (3, 4):
        engine.step(number, engine.replay)
    found = rows(ring)
    assert {row["step"] for row in found if row["stage"] == "moe"} == {3, 4}
    assert {row["step"] for row in found if row["stage"] == "forward"} == {1, 2, 3, 4}


def test_nothing_chosen_touches_nothing(device: FakeDevice, ring: tuple[Recorder, RingReader]):
    engine = Engine(device, ring[0])
    assert engine.put() == {}
    assert all("forward" not in vars(part) for part in (*engine.attention, *engine.moe, engine.group))


def test_without_event_pairs_it_says_so(engine: Engine):
    engine.timer.open("cpu", engine.recorder)
    place = Place("moe", 0, engine.moe[0], "forward")
    said = engine.timer.marks.put(engine.recorder, [place], [], engine.device, engine.timer.event)
    assert said["marks"]["by"] == "nothing" and "event pairs" in said["marks"]["why"]  # type: ignore[index]
    assert "forward" not in vars(engine.moe[0])


def test_an_error_at_the_start_leaves_the_engine_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    def no_triton(*_: Any) -> None:
        raise ImportError("no triton")

    monkeypatch.setattr(marking, "Marks", no_triton)
    said = engine.put()
    assert said["by"] == "nothing" and said["why"] == "ImportError: no triton"
    engine.step(1)
    assert engine.moe[0].calls == 1


def test_errors_take_marks_out_and_the_pairs_go_on(engine: Engine, ring: tuple[Recorder, RingReader]):
    engine.put()
    engine.step(1)
    Marks.broken = True
    for number in range(2, 2 + ERRORS_UNTIL_OUT):
        engine.step(number)
    assert engine.timer.marks._marks is None and engine.timer.pairs is not None
    assert engine.timer.marks._said()["errors"] == ERRORS_UNTIL_OUT
    assert {row["step"] for row in rows(ring) if row["stage"] == "forward"} == {*range(1, 2 + ERRORS_UNTIL_OUT)}


def test_an_exception_of_the_engine_is_its_own(engine: Engine):
    def fails() -> None:
        raise KeyError("the engine's")

    engine.moe[0]._inner = fails
    engine.put()
    engine.rank.step = 1
    engine.begin()
    with pytest.raises(KeyError, match="the engine's"):
        engine.model()
    engine.end()
    engine.moe[0]._inner = lambda: None
    engine.step(2)
    assert not engine.timer.marks._open


def test_a_place_within_itself_is_marked_once(engine: Engine, ring: tuple[Recorder, RingReader]):
    engine.moe[0]._inner = lambda: engine.moe[0].calls > 4 or engine.moe[0].forward(1)
    engine.put()
    engine.step(1)
    engine.step(2)
    assert engine.timer.marks._said()["repeated"] == 0
    (row,) = [row for row in rows(ring) if row["stage"] == "moe" and row["a0"] == 0 and row["step"] == 1]
    assert row["end_ns"] - row["begin_ns"] >= 5 * 50 * US


def test_a_pair_that_is_never_told_holds_nothing_up(engine: Engine, ring: tuple[Recorder, RingReader]):
    engine.put()
    end, engine.end = engine.end, engine.timer.marks.end
    engine.step(1)
    engine.end = end
    for number in (2, 3):
        engine.step(number)
    assert {row["step"] for row in rows(ring) if row["stage"] == "moe"} == {2, 3}
    assert engine.timer.marks._said()["unplaced"] == 1


def test_switched_off_forgets_what_is_under_way(engine: Engine, ring: tuple[Recorder, RingReader]):
    engine.put()
    fetched = engine.timer.fetched
    engine.timer.fetched = engine.timer.pairs.poll  # type: ignore[method-assign, union-attr]
    engine.step(1)
    engine.timer.fetched = fetched  # type: ignore[method-assign]
    ring[0].level[0] = Level.OFF
    engine.timer.forget()
    ring[0].level[0] = Level.LAYER
    for number in (2, 3):
        engine.step(number)
    found = rows(ring)
    assert {row["step"] for row in found if row["stage"] == "moe"} == {2, 3}
    assert {row["step"] for row in found if row["stage"] == "forward"} == {1, 2, 3}, "that was there already"
    assert engine.timer.marks._said()["unplaced"] == 0


def test_what_is_chosen():
    assert choice({}) == ((), 4)
    assert choice({MARKS: " moe, nonsense,attention", MARK_LAYERS: "7"}) == (("attention", "moe"), 7)
    assert choice({MARKS: "mlp", MARK_LAYERS: "0"}).layers == 1
    assert choice({MARKS: "mlp", MARK_LAYERS: "many"}).layers == 4


def test_layers_are_spread_evenly():
    assert spread(range(32), 4) == [0, 10, 21, 31]
    assert spread([5, 3, 3], 4) == [3, 5]
    assert spread(range(8), 1) == [0] and spread([], 3) == []


def test_the_last_layers_collectives_have_no_marks():
    places = [Place("attention", layer, None, "") for layer in (0, 1)] + [Place("collective", -1, None, "")]
    found = marked_of(("attention", "mlp", "collective"), [0, 1], places)
    stages = [Marked("attention", 0), Marked("attention", 1), Marked("collective", 0, 0), Marked("collective", 0, 1)]
    assert found == [FORWARD, EMPTY, *stages]


RECORD = (b"", 0, 0, b"")


def test_spans_stay_in_their_pair():
    spans = [
        MarkSpan(FORWARD, 1000, 1100),
        MarkSpan(Marked("moe", 0), 1001, 1050),
        MarkSpan(Marked("moe", 1), 1060, 1100),
    ]
    assert placed(spans, Pair(1, 50, 158, 7, RECORD), 0) == [
        (Marked("moe", 0), 55, 104, 11),
        (Marked("moe", 1), 114, 154, 11),
    ]
    assert [row[1:3] for row in placed(spans, Pair(1, 50, 140, 7, RECORD), 0)] == [(50, 95), (105, 140)], "clipped"


def test_an_empty_span_is_taken_off_but_no_more_than_there_is():
    assert trimmed(100, 200, 10) == (105, 195) and trimmed(100, 104, 10) == (102, 102)
    spans = [MarkSpan(FORWARD, 1000, 1100), MarkSpan(EMPTY, 1001, 1011), MarkSpan(Marked("moe", 0), 1011, 1060)]
    assert placed(spans, Pair(1, 50, 150, 7, RECORD), 10) == [(Marked("moe", 0), 66, 105, 7)]


def test_an_empty_span_that_waited_for_the_host_is_no_measure(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    engine.put()
    widen, launch = [9], engine.device.launch
    monkeypatch.setattr(engine.device, "launch", lambda width, stream=None: launch(width * widen[0], stream))
    engine.step(1)
    assert engine.timer.marks._said()["empty_ns"] is None
    widen[0] = 1
    engine.step(2)
    assert engine.timer.marks._said()["empty_ns"] == US


def test_a_row_without_an_empty_span_is_written_all_the_same(engine: Engine, ring: tuple[Recorder, RingReader]):
    engine.put()
    mark = engine.timer.marks._mark
    engine.timer.marks._mark = lambda number: number in (2, 3) or mark(number)  # type: ignore[assignment, method-assign]
    engine.step(1)
    assert {row["stage"] for row in rows(ring)} == {"forward", "attention", "moe", "collective"}
    assert engine.timer.marks._said()["empty_ns"] is None and engine.timer.marks._errors == 0


def test_an_error_in_deciding_is_contained(engine: Engine):
    """The engine's call goes on unmarked, and the error is counted."""
    engine.put()

    def fails() -> int:
        raise RuntimeError("the test's")

    function = engine.timer.marks._around(lambda x: x + 1, fails)
    engine.rank.step = 1
    assert function(1) == 2 and engine.timer.marks._errors == 1
