"""Spans to OTLP's protobuf bytes: pure. Written out by hand, since building messages first takes three times as long.

Field numbers and order are those of opentelemetry/proto/trace/v1/trace.proto (OTLP 1.x); the bytes are those that the
OpenTelemetry SDK's exporter makes of the same spans (tests/unit/test_otlp_encode.py holds them against each other).
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct
from typing import TYPE_CHECKING, Any

from .spans import SCOPE_NAME, SCOPE_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .spans import Link, Span

_FIXED64 = Struct("<Q")
_DOUBLE = Struct("<d")

# SpanFlags: bit 8 says that bit 9 is known, and bit 9 that the parent (of a link: the span linked to) is remote.
_LOCAL = b"\x85\x01" + (0x100).to_bytes(4, "little")
_REMOTE = b"\x85\x01" + (0x300).to_bytes(4, "little")
_LINK_LOCAL = b"\x35" + (0x100).to_bytes(4, "little")
_INTERNAL, _SERVER = b"\x30\x01", b"\x30\x02"
_STATUS_UNSET = b"\x7a\x00"
_MOST_LINKS = 65_536  # whose bytes are kept


def varint(value: int) -> bytes:
    """An integer as protobuf has int64 and lengths: seven bits a byte, a negative one as its two's complement."""
    if 0 <= value < 0x80:
        return _ONE_BYTE[value]
    if value < 0:
        value += 1 << 64
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    if value < 0x200000:
        return bytes((value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14))
    if value < 0x10000000:
        return bytes((value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14 & 0x7F | 0x80, value >> 21))
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


_ONE_BYTE = [bytes((value,)) for value in range(0x80)]


def _field(tag: bytes, content: bytes) -> bytes:
    return tag + varint(len(content)) + content


@lru_cache(4096)
def _text(text: str) -> bytes:
    return text.encode("utf-8", "replace")


# Attributes: KeyValue { 1: key, 2: AnyValue { 1: string, 2: bool, 3: int, 4: double, 5: array } }


def _any(value: Any) -> bytes:
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, str):
        return _field(b"\x0a", _text(value))
    if isinstance(value, int):
        return b"\x18" + varint(value)
    if isinstance(value, float):
        return b"\x21" + _DOUBLE.pack(value)
    return _field(b"\x2a", b"".join(_field(b"\x0a", _any(item)) for item in value))


def _key_value(tag: bytes, key: str, value: bytes) -> bytes:
    return _field(tag, _field(b"\x0a", _text(key)) + _field(b"\x12", value))


@lru_cache(1024)
def _before_int(tag: bytes, key: str) -> list[bytes]:
    """What stands before an integer of so many bytes, by that number."""
    return [_key_value(tag, key, b"\x18" + bytes(size))[:-size] if size else b"" for size in range(11)]


@lru_cache(8192)
def _text_value(tag: bytes, key: str, value: str) -> bytes:
    return _key_value(tag, key, _field(b"\x0a", _text(value)))


def _attributes(tag: bytes, attributes: Mapping[str, Any]) -> list[bytes]:
    parts = []
    for key, value in attributes.items():
        kind = type(value)
        if kind is int:
            number = _ONE_BYTE[value] if 0 <= value < 0x80 else varint(value)
            parts.append(_before_int(tag, key)[len(number)] + number)
        elif kind is str:
            parts.append(_text_value(tag, key, value))
        else:
            parts.append(_key_value(tag, key, _any(value)))
    return parts


def resource_bytes(attributes: Mapping[str, Any]) -> bytes:
    """A Resource with these attributes."""
    return b"".join(_attributes(b"\x0a", attributes))


class Encoder:
    """Encodes spans; it remembers the bytes of steps that many requests link to. Used by one thread."""

    def __init__(self) -> None:
        self._links: dict[bytes, bytes] = {}  # by the step's trace

    def request(self, spans: Sequence[Span], resource: Callable[[int | None], bytes]) -> bytes:
        """An ExportTraceServiceRequest with these spans; `resource` gives a process's resource (`resource_bytes`)."""
        groups: dict[int | None, list[bytes]] = {}
        for span in spans:
            encoded = self.span(span)
            group = groups.get(span.process)
            if group is None:
                group = groups[span.process] = [_SCOPE]
            group += (b"\x12", varint(len(encoded)), encoded)
        return b"".join(
            _field(b"\x0a", _field(b"\x0a", resource(process)) + _field(b"\x12", b"".join(parts)))
            for process, parts in groups.items()
        )

    def span(self, span: Span) -> bytes:
        """One Span message."""
        name, context, parent, _, attributes, start, end, server, remote, error, state, events, links, dropped = span
        parts = [b"\x0a\x10", context.trace_id, b"\x12\x08", context.span_id]
        if state:
            parts.append(_field(b"\x1a", _text(state)))
        if parent is not None:
            parts += (b"\x22\x08", parent.span_id)
        parts += (
            _name(name),
            _SERVER if server else _INTERNAL,
            b"\x39" + _FIXED64.pack(start),
            b"\x41" + _FIXED64.pack(end),
        )
        parts += _attributes(b"\x4a", attributes)
        for event in events:
            moment = b"\x09" + _FIXED64.pack(event.time_ns) + _field(b"\x12", _text(event.name))
            parts.append(_field(b"\x5a", moment))
        if links:
            known = self._links
            for link in links:
                parts.append(known.get(link.context.trace_id) or self._link(link))
        if dropped:
            parts.append(b"\x70" + varint(dropped))
        parts.append(_STATUS_UNSET if error is None else _field(b"\x7a", _field(b"\x12", _text(error)) + b"\x18\x02"))
        parts.append(_REMOTE if remote and parent is not None else _LOCAL)
        return b"".join(parts)

    def _link(self, link: Link) -> bytes:
        if len(self._links) >= _MOST_LINKS:
            self._links.clear()
        step = _key_value(b"\x22", "stagetrace.step", b"\x18" + varint(link.step))
        trace_id, span_id = link.context
        found = _field(b"\x6a", b"\x0a\x10" + trace_id + b"\x12\x08" + span_id + step + _LINK_LOCAL)
        self._links[trace_id] = found
        return found


@lru_cache(1024)
def _name(name: str) -> bytes:
    return _field(b"\x2a", _text(name))


_SCOPE = _field(
    b"\x0a", _field(b"\x0a", _text(SCOPE_NAME)) + (_field(b"\x12", _text(SCOPE_VERSION)) if SCOPE_VERSION else b"")
)
