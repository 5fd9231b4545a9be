"""Puts marks around layers of an engine's model, and writes what they tell inside the event pair of their step.

An engine's adapter names the places: methods of objects of the loaded model, before any graph is captured. Which of
them get marks is chosen when the engine starts (device_marks.choice). A stream that captures a graph passes the marks
into it at every level; whether they are read is the level's to say. Where nothing is chosen no object is touched.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from stagetrace.instrument.device_marks import EMPTY, FORWARD, MOST_EMPTY_NS, Marked, choice, placed, spread
from stagetrace.instrument.hooks import ERRORS_UNTIL_OUT
from stagetrace.instrument.records import HEAD, TAILS, RecordType, Text, header_word
from stagetrace.instrument.stages import BY_NAME, Level

from .marks import Marks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from stagetrace.instrument.device_marks import MarkSpan, Pair
    from stagetrace.instrument.device_pairs import Event
    from stagetrace.instrument.recorder import Recorder

    from .rank import RankStep

log = logging.getLogger(__name__)

ATTENTION, MLP, MOE, COLLECTIVE = "attention", "mlp", "moe", "collective"
COLLECTIVES_OF_A_LAYER = 2  # those behind its attention: as many as tensor parallelism has
_EMPTY, _FIRST = 1, 2  # the empty span, and the first that is put around something: one comes before the other
_LAYER_LEVEL = int(Level.LAYER)
_pack_head, _pack_tail = HEAD.pack, TAILS[3].pack


class Place(NamedTuple):
    """A method of one object, around which marks can be put."""

    stage: str  # of device_marks.PLACES
    layer: int  # of a collective: -1
    owner: Any
    method: str


class LayerMarks:
    """The marks of the rank in this process; until some are put, nothing here does anything."""

    def __init__(self, rank: RankStep):
        self._rank = rank
        self._recorder: Recorder | None = None
        self._marks: Marks | None = None
        self._index: dict[Marked, int] = {}
        self._headers: dict[str, int] = {}
        self._info: dict[str, object] = {}
        self._open: set[int] = set()  # spans that are begun: what is inside of the same place has no marks of its own
        self._layer, self._number = -1, 0  # of the last attention, and collectives since
        self._step = 0  # ours, counted from 1; a row of the ring is known by it
        self._begun: tuple[int, int, int] | None = None  # instance, step, rank of the pass that is under way
        self._launched: dict[int, tuple[int, int, int]] = {}  # the same by our number, until the row is there
        self._rows: deque[tuple[tuple[int, int, int], list[MarkSpan]]] = deque()  # there, but for their pair
        self._awaited: set[tuple[int, int]] = set()  # instance and step of passes whose row is still to be written
        self._pairs: dict[tuple[int, int], Pair] = {}  # of these, as far as they are there
        self._turn = deque([None])  # whoever takes what is in it may poll: a pop is atomic
        self._empty = MOST_EMPTY_NS + 1  # ns of the shortest empty span so far
        self._unplaced = 0
        self._told = 0  # of what was amiss
        self._errors = 0

    # At the engine's start

    def put(
        self,
        recorder: Recorder,
        places: Sequence[Place],
        layers_at: Iterable[Place],
        device: Any,
        event: Callable[[], Event] | None,
    ) -> dict[str, object]:
        """Puts marks around what is chosen of the places; what the process is to say of it, empty: nothing is chosen.

        `layers_at` are the attentions of all layers, by which a collective's layer is known; `event` makes an event of
        the device, None where it is not timed by event pairs. Raises nothing.
        """
        chosen = choice(os.environ)
        if not chosen.places:
            return {}
        self._recorder = recorder
        if event is None:
            why = "the device is not timed by event pairs: marks are read where these say when a step ran"
            return {"marks": {"by": "nothing", "why": why, "errors": 0}}
        layers = spread([place.layer for place in places if place.layer >= 0], chosen.layers)
        marked = marked_of(chosen.places, layers, places)
        found = {one.stage for one in marked} - {FORWARD.stage, EMPTY.stage}
        self._info = {
            "by": "marks",
            "stages": [stage for stage in chosen.places if stage in found],
            "layers": layers,
            "per_step": 2 * len(marked),
            "not_visible": [stage for stage in chosen.places if stage not in found],
        }
        if not found:
            return {"marks": self._said()}
        try:
            self._marks = Marks(marked, device, event)
            self._index = {one: number for number, one in enumerate(marked)}
            self._headers = {stage: header_word(RecordType.SEGMENT, BY_NAME[f"device_{stage}"].id) for stage in found}
            self._wrap(places, layers_at)
        except Exception as error:
            self._marks = None
            log.warning("stagetrace: no marks are put; the engine is not affected", exc_info=True)
            self._info = {"by": "nothing", "why": f"{type(error).__name__}: {error}"}
        return {"marks": self._said()}

    def _wrap(self, places: Sequence[Place], layers_at: Iterable[Place]) -> None:
        for stage, layer, owner, method in places:
            index = self._index.get(Marked(stage, layer))
            if stage == COLLECTIVE and COLLECTIVE in self._headers:
                setattr(owner, method, self._around(getattr(owner, method), self._next_collective))
            elif index is not None:
                setattr(owner, method, self._around(getattr(owner, method), _always(index)))
        if COLLECTIVE in self._headers:
            for _, layer, owner, method in layers_at:
                setattr(owner, method, self._entering(getattr(owner, method), layer))

    def _around(self, function: Callable[..., Any], index_of: Callable[[], int]) -> Callable[..., Any]:
        compiling = sys.modules["torch"].compiler.is_compiling
        capturing = sys.modules["torch"].cuda.is_current_stream_capturing
        rank, recorder = self._rank, self._recorder
        assert recorder is not None

        def opened() -> int:
            """The span that the call has begun, its mark launched; -1: none."""
            try:
                if not ((rank.step and recorder.level[0] >= _LAYER_LEVEL) or capturing()):
                    return -1
                index = index_of()
                if index < 0 or index in self._open:
                    return -1
            except Exception:
                self.failed()
                return -1
            self._open.add(index)
            if index == _FIRST:
                self._mark(2 * _EMPTY)
                self._mark(2 * _EMPTY + 1)
            self._mark(2 * index)
            return index

        def marked(*given: Any, **named: Any) -> Any:
            if compiling():  # nothing of ours is to be in the graph
                return function(*given, **named)
            index = opened()
            try:
                return function(*given, **named)
            finally:
                if index >= 0:
                    self._open.discard(index)
                    self._mark(2 * index + 1)

        return marked

    def _entering(self, function: Callable[..., Any], layer: int) -> Callable[..., Any]:
        def entered(*given: Any, **named: Any) -> Any:
            self._layer, self._number = layer, 0
            return function(*given, **named)

        return entered

    def _next_collective(self) -> int:
        """The span of the collective that begins; -1: it has none, or is part of another."""
        if any(self._index.get(Marked(COLLECTIVE, self._layer, n)) in self._open for n in range(self._number)):
            return -1
        number, self._number = self._number, self._number + 1
        return self._index.get(Marked(COLLECTIVE, self._layer, number), -1)

    # In a step

    def begin(self) -> None:
        """Right after the event that begins the forward pass's pair."""
        marks, recorder, rank = self._marks, self._recorder, self._rank
        if marks is None or recorder is None:
            return
        self._begun = None
        self.poll()
        try:
            if recorder.level[0] < _LAYER_LEVEL:
                return
            self._open.clear()
            self._step += 1
            marks.begin_step(self._step)
            marks.mark(0)
            self._begun = (rank.instance, rank.step, rank.rank)
        except Exception:
            self.failed()

    def end(self) -> None:
        """Right before the event that ends it."""
        marks, begun = self._marks, self._begun
        if marks is None or begun is None:
            return
        self._begun = None
        try:
            marks.mark(1)
            if marks.end_step(self._step):
                self._awaited.add(begun[:2])
                self._launched[self._step] = begun
        except Exception:
            self.failed()

    def paired(self, instance: int, step: int, pair: Pair) -> bool:
        """The event pair of a step's forward pass was reached; True: it is kept until the step's row is there.

        On any thread. What is inside a segment is recorded before it.
        """
        key = (instance, step)
        if self._marks is None or key not in self._awaited:
            return False
        self._pairs[key] = pair
        return True

    def poll(self) -> None:
        """Writes the steps whose row and pair are there; on any thread, one at a time."""
        if not (self._launched or self._rows):
            return
        try:
            self._turn.pop()
        except IndexError:  # another thread is at it
            return
        try:
            self._read()
        except Exception:
            self.failed()
        finally:
            self._turn.append(None)

    def forget(self) -> None:
        """Nothing is recorded any more: of what is under way the pairs alone are written."""
        if self._awaited:
            self._awaited.clear()
            self._launched.clear()
            self._rows.clear()
            self._put_pairs()

    def _put_pairs(self) -> None:
        while self._pairs and self._recorder is not None:
            _, pair = self._pairs.popitem()
            self._recorder.put(*pair.record)

    def _mark(self, number: int) -> None:
        marks = self._marks
        if marks is not None:
            try:
                marks.mark(number)
            except Exception:
                self.failed()

    def _read(self) -> None:
        marks, recorder = self._marks, self._recorder
        if marks is None or recorder is None:
            return
        for number, spans in marks.read():
            launched = self._launched.pop(number, None)
            if launched is not None:  # else it was forgotten
                self._rows.append((launched, spans))
        rows, pairs, told = self._rows, self._pairs, False
        while rows:
            (instance, step, rank), spans = rows[0]
            pair = pairs.pop((instance, step), None)
            if pair is None and not any((instance, later) in pairs for (_, later, _), _ in rows):
                break  # it may still come: pairs are reached in their order
            rows.popleft()
            self._awaited.discard((instance, step))
            if pair is None or not spans or spans[0].marked != FORWARD:
                self._unplaced += 1
            else:
                was, self._empty = (
                    self._empty,
                    min([self._empty, *(end - begin for marked, begin, end in spans if marked == EMPTY)]),
                )
                told = told or was > MOST_EMPTY_NS >= self._empty
                empty = self._empty if self._empty <= MOST_EMPTY_NS else 0
                for (stage, layer, _), begin, end, error in placed(spans, pair, empty):
                    head = _pack_head(self._headers[stage], pair.timeline)
                    recorder.put(head, begin, end, _pack_tail(instance, step, layer, rank, error))
            if pair is not None:
                recorder.put(*pair.record)
        amiss = self._unplaced + sum(vars(marks.reader.counts).values()) - marks.reader.counts.rows + marks.left_out
        if told or amiss > 2 * self._told:  # so that it is told a few times in all
            self._told = amiss
            self._tell()

    # What is said of it

    def failed(self) -> None:
        """Contains the exception that is being handled: logs the first, does without marks after a few.

        Graphs keep those that they were captured with, which nobody reads then.
        """
        self._errors += 1
        if self._errors == 1:
            log.warning("stagetrace: error in marking the device's time; the engine is not affected", exc_info=True)
        if self._errors >= ERRORS_UNTIL_OUT and self._marks is not None:
            self._marks = None
            self._put_pairs()
            self._info = {"by": "nothing", "why": f"taken out after {self._errors} errors"}
            self._tell()

    def _tell(self) -> None:
        if self._recorder is not None:
            self._recorder.text(0, Text.PROCESS, json.dumps({"role": "worker", "marks": self._said()}))

    def _said(self) -> dict[str, object]:
        marks = self._marks
        if marks is None:
            return {**self._info, "errors": self._errors}
        counts = {name: count for name, count in vars(marks.reader.counts).items() if name != "rows"}
        lost = {"left_out": marks.left_out, **counts, "unplaced": self._unplaced}
        empty = self._empty if self._empty <= MOST_EMPTY_NS else None
        return {**self._info, "empty_ns": empty, **lost, "errors": self._errors}


def _always(index: int) -> Callable[[], int]:
    return lambda: index


def marked_of(chosen: Sequence[str], layers: Sequence[int], places: Sequence[Place]) -> list[Marked]:
    """What gets marks, the forward pass and the empty span first: of the layers what they have of the chosen. Pure.

    Of the last layer's collectives nothing says when they end: what follows could be another pass's. It has none.
    """
    there = {(place.stage, place.layer) for place in places}
    found = [FORWARD, EMPTY]
    for layer in layers:
        found += [Marked(stage, layer) for stage in chosen if (stage, layer) in there]
    if COLLECTIVE in chosen and (COLLECTIVE, -1) in there:
        last = max((place.layer for place in places), default=-1)
        numbers = range(COLLECTIVES_OF_A_LAYER)
        found += [Marked(COLLECTIVE, layer, number) for layer in layers if layer != last for number in numbers]
    return found
