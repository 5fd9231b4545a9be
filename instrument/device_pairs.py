"""Pairs of events around what is launched on a device: taken from a pool, read when they are there, never waited for.

What an event is comes from outside (`Source`), so that nothing here knows of a device. `begin` and `end` are called on
the thread that launches, `poll` also on one that fetches results; at most one of them is in `poll` at a time, and the
others go on without it. Whatever is not there yet is looked at again by the next poll.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .device_clock import DeviceClock
from .device_marks import Pair
from .recorder import now
from .records import HEAD, TAILS, RecordType, header_word
from .stages import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_PAIRS = 192  # under way: of 64 steps with forward, sample and draft
REFERENCE_NS = 100_000_000  # a reference is replaced after so long: clocks drift, and times since it are float32
MOST_STREAMS = 16
STAGES = ("device_forward", "device_sample", "device_draft")
FORWARD, SAMPLE, DRAFT = range(len(STAGES))
_HEADERS = tuple(header_word(RecordType.SEGMENT, BY_NAME[name].id) for name in STAGES)
_pack_head, _pack_tail = HEAD.pack, TAILS[3].pack
_REFERENCE = -1  # in place of a stage


class Event(Protocol):
    """A moment on a stream, as torch.cuda.Event has it."""

    def record(self) -> None:
        """Launches it on the current stream."""

    def query(self) -> bool:
        """Whether the stream has reached it."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this one to another, both reached: a float32, of a resolution of half a microsecond."""


class Source(Protocol):
    """Where events come from, and what they are recorded on."""

    def event(self) -> Event:
        """A new one, with timing."""

    def stream(self) -> int:
        """What names the current stream."""

    def capturing(self) -> bool:
        """Whether the current stream is being captured into a graph."""

    def record_aside(self, event: Any) -> None:
        """Launches an event on a stream on which there is nothing else, so that it is reached at once."""


@dataclass(slots=True)
class _Pair:
    """Two events, and what lies between them; of a reference only the first is used."""

    first: Event
    last: Event
    stage: int = _REFERENCE
    stream: int = 0
    launched: int = 0  # host ns before each was launched
    ended: int = 0
    instance: int = 0
    step: int = 0
    rank: int = 0
    number: int = 0  # of the pair among all
    around: int = 0  # the number of the one that is open around it on its stream; 0: none


@dataclass(slots=True)
class _Timeline:
    """One stream's: what was written on it last, so that spans follow or nest whatever the clocks' error. Host ns."""

    number: int
    heads: tuple[bytes, ...]  # by stage
    reached: int = 0  # end of the last outermost span
    around: int = 0  # the pair, still to come, around the spans that were written since; 0: there are none
    inner_begin: int = 0  # from the first to the last of these
    inner_end: int = 0


class DevicePairs:
    """The pairs of one process. Nothing here waits, locks, or grows beyond its pool."""

    def __init__(
        self,
        source: Source,
        put: Callable[[bytes, int, int, bytes], None],
        clock: Callable[[], int] = now,
        most: int = MOST_PAIRS,
        forwarded: Callable[[int, int, Pair], bool] | None = None,
    ):
        """`put` writes a segment (recorder.py), `clock` gives the host's monotonic ns.

        `forwarded` is told of each forward pass, by instance and step, and writes it itself where it gives True.
        """
        self._source = source
        self._put = put
        self._now = clock
        self._forwarded = forwarded
        self._free: deque[_Pair] = deque()
        self._made = 0  # pairs; at most `most`
        self._most = most
        self._open: list[_Pair | None] = [None] * len(STAGES)
        self._pending: deque[_Pair] = deque()  # in the order in which their last event was launched
        self._turn = deque([None])  # whoever takes what is in it may poll: a pop is atomic
        self._forgotten = False  # what is pending is to be thrown away, by whoever polls next
        self._unused = True
        self._numbered = 0  # pairs so far
        self._referred = 0  # when the newest reference was launched; 0: there is none
        self._referring = False  # that one was not reached yet
        self._reference: _Pair | None = None  # the newest that was reached
        self._base = 0  # its time on the device's timer, since the first reference
        self._clock = DeviceClock()
        self._timelines: dict[int, _Timeline] = {}  # by stream
        self.skipped = 0  # pairs for which there was no room, or a stream too many

    @property
    def contradictions(self) -> int:
        """Observations of the device's clock that the drift which is assumed does not explain."""
        return self._clock.contradictions

    def step_begins(self) -> None:
        """On the thread that launches, before a step's work: looks at what is there, and keeps the reference fresh."""
        for stage in range(len(STAGES)):  # of a step that an exception broke off
            self._abandon(stage)
        if self._pending or self._forgotten:
            self.poll()
        launched = self._now()
        if not self._referred or (launched - self._referred > REFERENCE_NS and not self._referring):
            self._refer(launched)

    def begin(self, stage: int) -> None:
        """What comes now on the current stream belongs to this stage, until `end`. One stage can be inside another."""
        self._abandon(stage)
        if not self._referred or self._source.capturing():
            return
        stream = self._source.stream()
        outer = [pair for pair in self._open if pair is not None and pair.stream == stream]
        fits = len(outer) < 2 and (stream in self._timelines or self._add_timeline(stream))
        pair = self._take() if fits else None
        if pair is None:
            self.skipped += 1
            return
        self._numbered += 1
        pair.stage, pair.stream, pair.number = stage, stream, self._numbered
        pair.around = outer[0].number if outer else 0
        pair.launched = self._now()
        pair.first.record()
        self._open[stage] = pair

    def end(self, stage: int, instance: int, step: int, rank: int) -> None:
        """It is over, if it began."""
        pair = self._open[stage]
        if pair is None:
            return
        if self._source.capturing():
            self._abandon(stage)
            return
        pair.instance, pair.step, pair.rank = instance, step, rank
        pair.ended = self._now()
        pair.last.record()
        self._open[stage] = None
        self._pending.append(pair)

    def poll(self) -> None:
        """Writes what the device has reached, as far as nothing that was launched earlier is still to come."""
        try:
            self._turn.pop()
        except IndexError:  # another thread is at it
            return
        try:
            if self._forgotten:
                self._throw_away()
            pending, reached = self._pending, []
            while pending:
                pair = pending[0]
                if not (pair.first if pair.stage == _REFERENCE else pair.last).query():
                    break
                seen = self._now()
                if self._forgotten:
                    break
                pending.popleft()
                if pair.stage == _REFERENCE:
                    self._refers(pair, seen)
                else:
                    reached.append(self._observed(pair, seen))
            for pair, first, last in reached:  # now that all of them have told what they do of the clocks
                self._write(pair, first, last)
                self._free.append(pair)
        finally:
            self._turn.append(None)

    def forget(self) -> None:
        """Nothing is recorded any more: what is open or under way is thrown away, without a record."""
        if self._unused or self._forgotten:
            return
        for stage in range(len(STAGES)):
            self._abandon(stage)
        self._forgotten = True
        self.poll()

    def _abandon(self, stage: int) -> None:
        pair, self._open[stage] = self._open[stage], None
        if pair is not None:
            self._free.append(pair)

    def _take(self) -> _Pair | None:
        self._unused = False
        try:
            return self._free.pop()
        except IndexError:
            pass
        if self._made >= self._most:
            return None
        self._made += 1
        return _Pair(self._source.event(), self._source.event())

    def _refer(self, launched: int) -> None:
        """Launches a new reference. However far the host is ahead of the device, it is reached at once."""
        pair = None if self._source.capturing() else self._take()
        if pair is None:
            return
        pair.stage, pair.launched = _REFERENCE, launched
        self._source.record_aside(pair.first)
        self._referred, self._referring = launched, True
        self._pending.append(pair)

    def _refers(self, pair: _Pair, seen: int) -> None:
        """A reference was reached: what comes behind it is told by the time since it."""
        before, self._reference = self._reference, pair
        self._referring = False
        if before is not None:
            self._base += _ns(before.first, pair.first)
            self._free.append(before)
        self._clock.observe(self._base, pair.launched, seen)

    def _observed(self, pair: _Pair, seen: int) -> tuple[_Pair, int, int]:
        """A pair was reached: when, on the device's timer, which tells something of the clocks."""
        reference = self._reference
        if reference is None:  # it was thrown away meanwhile
            return pair, 0, -1
        first = self._base + _ns(reference.first, pair.first)
        last = max(self._base + _ns(reference.first, pair.last), first)
        self._clock.observe(first, pair.launched, seen)
        self._clock.observe(last, pair.ended, seen)
        return pair, first, last

    def _write(self, pair: _Pair, first: int, last: int) -> None:
        if last < first:
            return
        clock = self._clock
        begin, end = clock.host_ns(first), clock.host_ns(last)
        error = max(clock.error_ns(first), clock.error_ns(last))
        begin, end, moved = self._placed(pair, begin, end)
        tail = _pack_tail(pair.instance, pair.step, pair.rank, max(begin - pair.launched, 0), error + moved)
        line = self._timelines[pair.stream]
        record = (line.heads[pair.stage], begin, end, tail)
        forwarded = self._forwarded if pair.stage == FORWARD else None
        if forwarded is None or not forwarded(
            pair.instance, pair.step, Pair(line.number, begin, end, error + moved, record)
        ):
            self._put(*record)

    def _placed(self, pair: _Pair, begin: int, end: int) -> tuple[int, int, int]:
        """Where a span goes on its timeline, and by how much that moved it.

        What is known of the clocks changes from span to span, what the stream did in which order does not.
        """
        line = self._timelines[pair.stream]
        outer = pair.around or pair.number
        if line.around != outer:  # what was to come around the spans before was given up
            line.reached = max(line.reached, line.inner_end)
            line.around, line.inner_begin, line.inner_end = outer, 0, 0
        if pair.around:
            first = max(begin, line.reached, line.inner_end)
            last = max(end, first)
            line.inner_begin, line.inner_end = line.inner_begin or first, last
        else:
            first = max(begin, line.reached)
            first = min(first, line.inner_begin or first)
            line.reached = last = max(end, first, line.inner_end)
            line.around = line.inner_begin = line.inner_end = 0
        return first, last, max(abs(first - begin), abs(last - end))

    def _add_timeline(self, stream: int) -> bool:
        """Gives a stream a timeline, numbered from 1; False where there are too many."""
        number = len(self._timelines) + 1
        if number > MOST_STREAMS:
            return False
        self._timelines[stream] = _Timeline(number, tuple(_pack_head(header, number) for header in _HEADERS))
        return True

    def _throw_away(self) -> None:
        pending = self._pending
        while pending:
            self._free.append(pending.popleft())
        if self._reference is not None:
            self._free.append(self._reference)
        self._reference = None
        self._referred = self._base = 0
        self._referring = False
        contradictions, self._clock = self._clock.contradictions, DeviceClock()
        self._clock.contradictions = contradictions
        self._unused, self._forgotten = True, False


def _ns(first: Event, last: Event) -> int:
    return round(first.elapsed_time(last) * 1_000_000)
