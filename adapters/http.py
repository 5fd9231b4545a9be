"""Hooks in the HTTP server, whichever engine is behind it: the caller's trace context in, first and last byte out.

The server is uvicorn, whose request cycle carries an `Exchange` through the HTTP handling: it brings the caller's
`traceparent` to the requests that come out of it (engines drop it while their own tracing is off), and their handles to
the place that sends the bytes.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from fcntl import ioctl
from secrets import randbits
from termios import TIOCOUTQ
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.around import Around
from stagetrace.instrument.hooks import HookPoint
from stagetrace.instrument.recorder import now
from stagetrace.instrument.records import Event, RecordType, Text, header_word
from stagetrace.instrument.stages import BY_NAME, Level

from . import trace_context

if TYPE_CHECKING:
    from stagetrace.instrument.hooks import Hook
    from stagetrace.instrument.recorder import Recorder

_CYCLES = (
    "uvicorn.protocols.http.httptools_impl:RequestResponseCycle",
    "uvicorn.protocols.http.h11_impl:RequestResponseCycle",
)
_MAX_CONTEXT = 1024  # bytes of traceparent and tracestate
_FIRST_SENT = header_word(RecordType.EVENT, Event.FIRST_SENT)
_LAST_SENT = header_word(RecordType.EVENT, Event.LAST_SENT)
_REFUSED = header_word(RecordType.EVENT, Event.REFUSED)
_TOKENIZE = header_word(RecordType.STATE, BY_NAME["request_tokenize"].id)


# The last part of the paths that ask a model for something, and the statuses that say that nobody was asked.
_ASKING = frozenset(
    (
        *("completions", "responses", "messages", "generate", "encode", "embeddings", "embed", "pooling", "classify"),
        *("score", "rerank", "transcriptions", "translations"),
    )
)
_NO_ERROR = 400  # what is below it
_NOT_ASKED = frozenset((401, 403, 405))


class Exchange:
    """One HTTP request and its response."""

    __slots__ = ("begin", "context", "handles", "sent", "size", "status")

    def __init__(self, headers: Any, begin: int = 0):
        self.begin = begin
        self.context = trace_context.of_headers(headers)
        self.handles: list[int] = []  # of the requests to the engine that came of it
        self.status = 0  # of the response
        self.sent = False
        self.size = 0  # of the response's body so far

    def before(self, arrival_ns: int) -> int:
        """From its head to the arrival of a request that came of it, in ns."""
        return max(arrival_ns - self.begin, 0)


EXCHANGE: ContextVar[Exchange | None] = ContextVar("stagetrace_exchange", default=None)


def run_asgi(hook: Hook) -> Around:
    """uvicorn's RequestResponseCycle.run_asgi: an HTTP request is handled in a task of its own."""

    def before(self: Any, begin: int) -> None:
        exchange = self._stagetrace = Exchange(self.scope["headers"], begin)
        EXCHANGE.set(exchange)

    return Around(before)


def send(hook: Hook) -> Around:
    """uvicorn's RequestResponseCycle.send: a part of the response was handed to the socket."""
    state = hook.recorder.state

    def after(self: Any, message: Any, begin: int) -> None:
        exchange: Exchange | None = getattr(self, "_stagetrace", None)
        if exchange is None or self.disconnected:
            return
        if message["type"] != "http.response.body":
            exchange.status = message.get("status", 0)
            return
        if not exchange.handles:
            if exchange.status >= _NO_ERROR and not message.get("more_body", False):
                refused(hook.recorder, self.scope, exchange)
            return
        body = message.get("body", b"")
        exchange.size += len(body)
        first, last = not exchange.sent and body, not message.get("more_body", False)
        if not first and not last:
            return
        time_ns = now()
        known, waiting = unsent(self.transport) if last else (0, 0)
        if first:
            exchange.sent = True
        for handle in exchange.handles:
            if first:  # nothing was ahead of it; who waits for it may have taken this thread's processor since
                state(_FIRST_SENT, begin, handle)
            if last:  # a slow client has been waited for
                state(_LAST_SENT, time_ns, handle, 0, 0, exchange.size, waiting, known)

    return Around(after=after)


def unsent(transport: Any) -> tuple[int, int]:
    """Bytes that a connection's other side has not acknowledged, of the transport's buffer and of the kernel's.

    Whether they are known comes first: (1, bytes) or (0, 0). A system call that waits for nothing, once a response.
    """
    try:
        queued = ioctl(transport.get_extra_info("socket").fileno(), TIOCOUTQ, b"\0\0\0\0")
        return 1, transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)
    except Exception:  # a transport of another kind, or one that was closed
        return 0, 0


def refused(recorder: Recorder, scope: Any, exchange: Exchange) -> None:
    """Records a request that the front end answered with an error of its own: no engine has seen it."""
    path = scope.get("path", "").rstrip("/").rpartition("/")[2]
    if path not in _ASKING or exchange.status in _NOT_ASKED or scope.get("method") != "POST":
        return
    handle, time_ns = randbits(63) or 1, now()
    if exchange.context:
        recorder.text(handle, Text.TRACE_CONTEXT, exchange.context, _MAX_CONTEXT)
    recorder.state(_TOKENIZE, exchange.begin, handle, 0, 0, 0, 0, 1)
    recorder.state(_LAST_SENT, time_ns, handle)
    recorder.state(_REFUSED, time_ns, handle, 0, 0, exchange.status)


HTTP_POINTS: tuple[HookPoint, ...] = (
    *(
        HookPoint(f"{cycle}.run_asgi", ("self", "app"), Level.REQUEST, "front end", run_asgi, "traceparent")
        for cycle in _CYCLES
    ),
    *(
        HookPoint(f"{cycle}.send", ("self", "message"), Level.REQUEST, "front end", send, "first and last byte sent")
        for cycle in _CYCLES
    ),
)
