"""Perfetto's protobuf trace, for ui.perfetto.dev: the encoder of a timeline's items (timeline.py). Pure.

A trace is packets one after the other, so it is written as a stream. Field numbers are those of
protos/perfetto/trace/trace_packet.proto and what it includes; the tests read what is written with the schema of the
`perfetto` package. Names are interned: said once, with a number, in the first packet that needs them. Timestamps are
the host's monotonic clock; clock snapshots tie it to wall time.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any

from .otlp_encode import varint
from .timeline import Group, Track, What

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .timeline import Drawn, Item

_FIXED64 = Struct("<Q")
_DOUBLE = Struct("<d")
_SEQUENCE = b"\x50\x01"  # trusted_packet_sequence_id: there is one
_CLEARED, _NEEDED = b"\x68\x01", b"\x68\x02"  # sequence_flags: interned names begin here, are used here
_REALTIME, _BOOTTIME = 1, 6  # builtin clocks; the second is that of timestamps where nothing else is said
_TYPES = {What.BEGIN: b"\x48\x01", What.END: b"\x48\x02", What.INSTANT: b"\x48\x03", What.VALUE: b"\x48\x04"}
_EXPLICIT = 3  # child_ordering: by sibling_order_rank


def _field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def _int(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def _text(number: int, text: str) -> bytes:
    return _field(number, text.encode("utf-8", "replace"))


def _packet(*parts: bytes) -> bytes:
    content = b"".join((*parts, _SEQUENCE))
    return b"\x0a" + varint(len(content)) + content


class PerfettoEncoder:
    """Encodes one trace: `begin` comes first, and tells nothing of the items that follow."""

    def __init__(self) -> None:
        self._names: dict[str, bytes] = {}  # of events -> how a packet refers to it
        self._args: dict[str, bytes] = {}
        self._fresh: list[bytes] = []  # names to be said in the next packet
        self._pids: set[int] = set()

    def begin(self, anchors: Iterable[tuple[int, int]]) -> bytes:
        """The head of a trace; `anchors` are pairs of monotonic and wall nanoseconds."""
        snapshots = []
        for monotonic_ns, wall_ns in anchors:
            clocks = (
                _field(1, _int(1, clock) + _int(2, time_ns))
                for clock, time_ns in ((_BOOTTIME, monotonic_ns), (_REALTIME, wall_ns))
            )
            snapshots.append(_packet(_int(8, monotonic_ns), _field(6, b"".join(clocks))))
        return _packet(_CLEARED) + b"".join(snapshots)

    def item(self, item: Item) -> bytes:
        """One item: a packet."""
        if isinstance(item, Group):
            return self._group(item)
        if isinstance(item, Track):
            counter = b"" if item.unit is None else _field(8, _text(6, item.unit))
            return _packet(
                _field(
                    60,
                    _int(1, item.id) + _text(2, item.name) + _int(5, item.group) + counter + _int(12, item.id),
                )
            )
        return self._event(item)

    def end(self) -> bytes:
        """What follows the last item."""
        return b""

    def _group(self, group: Group) -> bytes:
        process = b""
        if group.pid is not None and group.pid not in self._pids:  # a pid can be used again
            self._pids.add(group.pid)
            process = _field(3, _int(1, group.pid) + _text(6, group.name))
        ordered = _int(11, _EXPLICIT) + _int(12, group.rank)
        return _packet(_field(60, _int(1, group.id) + _text(2, group.name) + process + ordered))

    def _event(self, event: Drawn) -> bytes:
        parts = [_TYPES[event.what], _int(11, event.track)]
        if event.name:
            parts.append(self._names.get(event.name) or self._name(event.name))
        if event.args:
            parts += [self._arg(name, value) for name, value in event.args.items()]
        if event.flow:
            parts.append(b"\xf9\x02" + _FIXED64.pack(event.flow))
        if event.what is What.VALUE:
            parts.append(b"\xe1\x02" + _DOUBLE.pack(event.value))
        names = b""
        if self._fresh:
            names = _field(12, b"".join(self._fresh))
            self._fresh.clear()
        return _packet(b"\x40" + varint(event.time_ns), names, _NEEDED, _field(11, b"".join(parts)))

    def _name(self, name: str) -> bytes:
        number = len(self._names) + 1
        self._fresh.append(_field(2, _int(1, number) + _text(2, name)))
        self._names[name] = found = _int(10, number)
        return found

    def _arg(self, name: str, value: Any) -> bytes:
        said = self._args.get(name)
        if said is None:
            number = len(self._args) + 1
            self._fresh.append(_field(3, _int(1, number) + _text(2, name)))
            self._args[name] = said = _int(1, number)
        if isinstance(value, bool):
            return _field(4, said + _int(2, value))
        if isinstance(value, int):
            return _field(4, said + _int(4, value))
        if isinstance(value, float):
            return _field(4, said + b"\x29" + _DOUBLE.pack(value))
        return _field(4, said + _text(6, str(value)))
