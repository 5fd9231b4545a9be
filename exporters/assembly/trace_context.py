"""The caller's trace, from the headers that W3C Trace Context defines. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Section 3.2.2: version, trace id, parent id, flags; all-zero ids are invalid.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_PRINTABLE = re.compile(r"[\x20-\x7e]*")
_MAX_TRACE_STATE = 512


@dataclass(frozen=True)
class TraceContext:
    """The caller's trace, from its traceparent."""

    trace_id: str
    parent_span_id: str
    flags: int
    state: str | None


def parse_trace_context(text: str) -> TraceContext | None:
    """The caller's trace context: a traceparent, a newline, a tracestate. None where the traceparent is invalid."""
    parent, _, state = text.partition("\n")
    match = _TRACEPARENT.fullmatch(parent.strip())
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    good = state if 0 < len(state) <= _MAX_TRACE_STATE and _PRINTABLE.fullmatch(state) else None
    return TraceContext(match[2], match[3], int(match[4], 16), good)
