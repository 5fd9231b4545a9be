"""Hooks in the HTTP server, whichever engine is behind it: the caller's trace context in, first and last byte out.

The server is uvicorn, whose request cycle carries an `Exchange` through the HTTP handling: it brings the caller's
`traceparent` to the requests that come out of it (engines drop it while their own tracing is off), and their handles to
the place that sends the bytes.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.around import Around
from stagetrace.instrument.hooks import HookPoint
from stagetrace.instrument.recorder import now
from stagetrace.instrument.records import Event, RecordType, header_word
from stagetrace.instrument.stages import Level

from . import trace_context

if TYPE_CHECKING:
    from stagetrace.instrument.hooks import Hook

_CYCLES = (
    "uvicorn.protocols.http.httptools_impl:RequestResponseCycle",
    "uvicorn.protocols.http.h11_impl:RequestResponseCycle",
)
_FIRST_SENT = header_word(RecordType.EVENT, Event.FIRST_SENT)
_LAST_SENT = header_word(RecordType.EVENT, Event.LAST_SENT)


class Exchange:
    """One HTTP request and its response."""

    __slots__ = ("context", "handles", "sent")

    def __init__(self, headers: Any):
        self.context = trace_context.of_headers(headers)
        self.handles: list[int] = []
        self.sent = False


EXCHANGE: ContextVar[Exchange | None] = ContextVar("stagetrace_exchange", default=None)


def run_asgi(hook: Hook) -> Around:
    """uvicorn's RequestResponseCycle.run_asgi: an HTTP request is handled in a task of its own."""

    def before(self: Any) -> None:
        exchange = self._stagetrace = Exchange(self.scope["headers"])
        EXCHANGE.set(exchange)

    return Around(before)


def send(hook: Hook) -> Around:
    """uvicorn's RequestResponseCycle.send: a part of the response was handed to the socket."""
    state = hook.recorder.state

    def after(self: Any, message: Any) -> None:
        if message["type"] != "http.response.body" or self.disconnected:
            return
        exchange: Exchange | None = getattr(self, "_stagetrace", None)
        if exchange is None or not exchange.handles:
            return
        first, last = not exchange.sent and message.get("body"), not message.get("more_body", False)
        if not first and not last:
            return
        time_ns = now()
        if first:
            exchange.sent = True
        for handle in exchange.handles:
            if first:
                state(_FIRST_SENT, time_ns, handle)
            if last:
                state(_LAST_SENT, time_ns, handle)

    return Around(after=after)


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
