"""Chrome's JSON trace, for speedscope and chrome://tracing: the encoder of a timeline's items (timeline.py). Pure.

The format is Google's "Trace Event Format": begin and end events (B, E), counters (C), instants (i) and flows (s, f).
It is written as a stream, one event a line. Its times are microseconds; three decimals keep the nanoseconds. Arguments
of a slice are at its end event, whose arguments viewers add to those of its begin: speedscope makes the begin's a part
of the name, and would take each call for a function of its own.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .timeline import Group, Track, What

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .timeline import Drawn, Item

_PHASES = {What.BEGIN: "B", What.END: "E", What.INSTANT: "i", What.VALUE: "C"}


class ChromeEncoder:
    """Encodes one trace: `begin` comes first, and `end` last."""

    def __init__(self) -> None:
        self._tracks: dict[int, Track] = {}
        self._open: dict[int, list[tuple[str, dict[str, Any]]]] = {}  # by track, what has begun: name and arguments
        self._flows: set[int] = set()  # that have begun

    def begin(self, anchors: Iterable[tuple[int, int]]) -> bytes:
        """The head of a trace; `anchors` are pairs of monotonic and wall nanoseconds, which it only notes."""
        noted = [{"monotonic_ns": str(monotonic), "wall_ns": str(wall)} for monotonic, wall in anchors]
        head = json.dumps({"displayTimeUnit": "ns", "otherData": {"clocks": noted}})[:-1]
        return f'{head}, "traceEvents": [\n{{"ph": "M", "name": "stagetrace", "pid": 0, "args": {{}}}}'.encode()

    def item(self, item: Item) -> bytes:
        """One item: a line, or a few."""
        if isinstance(item, Group):
            return _line("M", item.id, None, None, name="process_name", args={"name": item.name}) + _line(
                "M", item.id, None, None, name="process_sort_index", args={"sort_index": item.rank}
            )
        if isinstance(item, Track):
            self._tracks[item.id] = item
            if item.unit is not None:
                return b""
            return _line("M", item.group, item.id, None, name="thread_name", args={"name": item.name})
        return self._event(item)

    def end(self) -> bytes:
        """What follows the last item."""
        return b"\n]}\n"

    def _event(self, event: Drawn) -> bytes:
        track = self._tracks[event.track]
        phase = _PHASES[event.what]
        if event.what is What.VALUE:
            value = {track.unit or "value": event.value}
            return _line(phase, track.group, None, event.time_ns, name=track.name, args=value)
        begun = self._open.setdefault(track.id, [])
        more: dict[str, Any] = {"args": event.args} if event.args else {}
        if event.what is What.END:
            name, more = begun.pop()
            return _line(phase, track.group, track.id, event.time_ns, name=name, **more)
        if event.what is What.BEGIN:
            begun.append((event.name, more))
            return _line(phase, track.group, track.id, event.time_ns, name=event.name)
        more["s"] = "t"
        found = _line(phase, track.group, track.id, event.time_ns, name=event.name, **more)
        if event.flow:
            ends = event.flow in self._flows
            (self._flows.remove if ends else self._flows.add)(event.flow)
            how = {"bp": "e"} if ends else {}
            found += _line(
                "f" if ends else "s",
                track.group,
                track.id,
                event.time_ns,
                name="step",
                cat="flow",
                id=event.flow,
                **how,
            )
        return found


def _line(phase: str, pid: int, tid: int | None, time_ns: int | None, **more: Any) -> bytes:
    """One event; the time in µs is written by hand, since a float of it has not all digits."""
    head = f'{{"ph": "{phase}", "pid": {pid}'
    if tid is not None:
        head += f', "tid": {tid}'
    if time_ns is not None:
        head += f', "ts": {time_ns // 1000}.{time_ns % 1000:03d}'
    return f",\n{head}, {json.dumps(more)[1:]}".encode()
