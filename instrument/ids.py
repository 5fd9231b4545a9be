"""Deterministic ids: a keyed hash, so that any process on any host computes the same ids without coordination.

The key is the session's (session.json). Sizes are OpenTelemetry's: 16 bytes for a trace, 8 for a span.
"""

from __future__ import annotations

import struct
from hashlib import blake2b
from secrets import randbits

_TWO = struct.Struct("<qq")
_FOUR = struct.Struct("<qqqq")


def new_instance() -> int:
    """A random id for one start of an engine's scheduler: 1 to 2**63 - 1, since a restart repeats step numbers."""
    return randbits(63) or 1


def handle(key: bytes, text: str) -> int:
    """The integer that stands for a string in records: 63 bits of its keyed hash.

    A hash and not a counter, so that front end and scheduler give one request the same handle, and a handle keeps its
    meaning when the record with its text was lost.
    """
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") >> 1


def _hash(key: bytes, purpose: bytes, data: bytes, size: int) -> bytes:
    digest = blake2b(data, digest_size=size, key=key, person=purpose).digest()
    return digest if any(digest) else b"\x01".rjust(size, b"\0")  # all zeros is invalid in OpenTelemetry


def step_trace_id(key: bytes, instance: int, step: int) -> bytes:
    """Trace id (16 bytes) of an engine step's trace."""
    return _hash(key, b"step trace", _TWO.pack(instance, step), 16)


def step_span_id(key: bytes, instance: int, step: int) -> bytes:
    """Span id (8 bytes) of an engine step's root span."""
    return _hash(key, b"step span", _TWO.pack(instance, step), 8)


def segment_span_id(key: bytes, process: int, sequence: int) -> bytes:
    """Span id (8 bytes) of a segment: `process` is its process's key in the session, `sequence` its record's number."""
    return _hash(key, b"segment span", _TWO.pack(process, sequence), 8)


def occasion_trace_id(key: bytes, process: int, sequence: int) -> bytes:
    """Trace id (16 bytes) of a segment that belongs to no step, a model_load say, named as in `segment_span_id`."""
    return _hash(key, b"occasion trace", _TWO.pack(process, sequence), 16)


def request_trace_id(key: bytes, request: int) -> bytes:
    """Trace id (16 bytes) of a request that came without a `traceparent`; `request` is its handle."""
    return _hash(key, b"request trace", _TWO.pack(request, 0), 16)


def request_span_id(key: bytes, request: int) -> bytes:
    """Span id (8 bytes) of a request's root span; `request` is its handle."""
    return _hash(key, b"request span", _TWO.pack(request, 0), 8)


def state_span_id(key: bytes, request: int, stage: int, begin: int, step: int) -> bytes:
    """Span id (8 bytes) of one state of a request: stage id, begin in ns on the monotonic clock, and its step."""
    return _hash(key, b"state span", _FOUR.pack(request, stage, begin, step), 8)
