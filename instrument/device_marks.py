"""Reads what marks have noted on a device: a row of words for each step, into spans, and counts what is missing. Pure.

A mark has three words in its step's row: the time of the device's own timer, the step's number, and how often it was
passed in that step. Since every mark carries its step's number, one that a later step has overwritten, or that this
step never passed, cannot be taken for another's. Of a mark that was passed more than once the last time is there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

WORDS = 3
PLACES = ("attention", "mlp", "moe", "collective")
"""Around what of a layer marks can be put: the stages device_attention and so on (stages.py)."""
MARKS = "STAGETRACE_MARKS"  # some of PLACES, with commas between
MARK_LAYERS = "STAGETRACE_MARK_LAYERS"  # in how many layers
DEFAULT_LAYERS = 4


class Marked(NamedTuple):
    """Where two marks are put: around this stage of this layer, the n-th time that it comes (collectives do)."""

    stage: str
    layer: int
    number: int = 0


class Choice(NamedTuple):
    """What is to have marks: chosen when the engine starts."""

    places: tuple[str, ...] = ()
    layers: int = DEFAULT_LAYERS


def choice(environment: Mapping[str, str]) -> Choice:
    """What the environment chooses; what it names wrongly is left out (`stagetrace run` has checked it before)."""
    named = {name.strip() for name in environment.get(MARKS, "").split(",")}
    try:
        layers = max(int(environment.get(MARK_LAYERS, DEFAULT_LAYERS)), 1)
    except ValueError:
        layers = DEFAULT_LAYERS
    return Choice(tuple(place for place in PLACES if place in named), layers)


def spread(layers: Collection[int], most: int) -> list[int]:
    """So many of the layers, spread evenly, the first and the last among them (of one: the first). Pure."""
    ordered = sorted(set(layers))
    if len(ordered) <= most:
        return ordered
    last = len(ordered) - 1
    return [ordered[round(at * last / max(most - 1, 1))] for at in range(most)]


class MarkSpan(NamedTuple):
    """What lies between two marks, on the device's timer, in ns."""

    marked: Marked
    begin: int
    end: int


class Pair(NamedTuple):
    """The event pair of the pass that spans are of: its timeline, and host ns."""

    timeline: int
    begin: int
    end: int
    error: int  # of the clocks
    record: tuple[bytes, int, int, bytes]  # to be written behind those of the spans, since they are inside it


FORWARD = Marked("forward", -1)  # around the whole pass: tells where in the event pair the others are
EMPTY = Marked("empty", -1)  # two marks with nothing between: what of a span is the marks' own
MOST_EMPTY_NS = 3000  # an empty span that is longer waited for the host


def trimmed(begin: int, end: int, empty: int) -> tuple[int, int]:
    """A span without what an empty one takes: half of it behind the first mark, half before the last. Pure."""
    half = min(empty, end - begin) // 2
    return begin + half, end - half


def placed(spans: Sequence[MarkSpan], pair: Pair, empty: int) -> list[tuple[Marked, int, int, int]]:
    """Spans on the host's clock, each with the error of its times; the first is FORWARD and only places the others.

    Its marks come right behind the pair's first event, and before its last: the middles are taken for the same moment.
    What the one is longer than the other is an error of either time, and no span leaves the pair. `empty`: ns that an
    empty span takes, 0 where that is not known. Pure.
    """
    _, first, last = spans[0]
    offset = (pair.begin + pair.end - first - last) // 2
    error = pair.error + -(-abs((pair.end - pair.begin) - (last - first)) // 2)
    found = []
    for span in spans[1:]:
        if span.marked != EMPTY:
            begin, end = trimmed(span.begin, span.end, empty)
            at = min(max(begin + offset, pair.begin), pair.end)
            found.append((span.marked, at, min(max(end + offset, at), pair.end), error))
    return found


@dataclass
class MarkCounts:
    """What marks did not tell, since the start. What is told is exact whatever these say."""

    rows: int = 0  # steps that were read
    absent: int = 0  # spans whose marks the step did not pass, and others had: a graph without them, a layer left out
    overwritten: int = 0  # spans of which a mark belongs to a later step already
    halves: int = 0  # spans of which one mark alone was passed
    repeated: int = 0  # spans that were passed more than once: the last time is told
    backwards: int = 0  # spans that end before they begin: their marks were passed in another order


@dataclass
class MarkReader:
    """Knows what marks there are: mark 2i begins, and mark 2i + 1 ends, the i-th of `marked`."""

    marked: Sequence[Marked]
    counts: MarkCounts = field(default_factory=MarkCounts)
    _passed: set[Marked] = field(default_factory=set)  # by any step so far

    @property
    def words(self) -> int:
        """Of a row."""
        return 2 * WORDS * len(self.marked)

    def read(self, step: int, row: Sequence[int]) -> list[MarkSpan]:
        """The spans of a step, in the order of `marked`. Raises ValueError when the row has another length."""
        if len(row) != self.words:
            raise ValueError(f"a row of {len(row)} words; {len(self.marked)} pairs of marks have {self.words}")
        counts = self.counts
        counts.rows += 1
        found = []
        for at, marked in zip(range(0, len(row), 2 * WORDS), self.marked, strict=True):
            begin, begin_step, begin_times, end, end_step, end_times = row[at : at + 2 * WORDS]
            if begin_step == end_step == step:
                self._passed.add(marked)
                if begin_times > 1 or end_times > 1:
                    counts.repeated += 1
                if end < begin:
                    counts.backwards += 1
                else:
                    found.append(MarkSpan(marked, begin, end))
            elif begin_step > step or end_step > step:
                counts.overwritten += 1
            elif step in (begin_step, end_step):
                counts.halves += 1
            elif marked in self._passed:
                counts.absent += 1
        return found
