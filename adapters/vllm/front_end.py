"""Hooks in the front end: requests from their arrival to the last byte handed to the client's socket.

The socket is uvicorn's, whose request cycle carries an `Exchange` through the HTTP handling: it brings the caller's
`traceparent` to the requests that come out of it (vLLM drops it while its own tracing is off), and their handles to
the place that sends the bytes.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.recorder import now
from stagetrace.instrument.records import Event, RecordType, Text, header_word
from stagetrace.instrument.stages import BY_NAME, Level

from . import extract

if TYPE_CHECKING:
    from collections.abc import Callable

    from stagetrace.instrument.hooks import Hook

_MAX_ID = 256  # bytes of a request id
_MAX_CONTEXT = 1024  # bytes of traceparent and tracestate
_TOKENIZE = header_word(RecordType.STATE, BY_NAME["request_tokenize"].id)
_DISPATCH = header_word(RecordType.STATE, BY_NAME["request_dispatch"].id)
_DETOKENIZE = header_word(RecordType.SEGMENT, BY_NAME["detokenize"].id)
_FIRST_OUTPUT = header_word(RecordType.EVENT, Event.FIRST_OUTPUT)
_FIRST_SENT = header_word(RecordType.EVENT, Event.FIRST_SENT)
_LAST_OUTPUT = header_word(RecordType.EVENT, Event.LAST_OUTPUT)
_LAST_SENT = header_word(RecordType.EVENT, Event.LAST_SENT)
_ABORTED = header_word(RecordType.EVENT, Event.ABORTED)


class Exchange:
    """One HTTP request and its response."""

    __slots__ = ("context", "handles", "sent")

    def __init__(self, headers: Any):
        self.context = trace_context(headers)
        self.handles: list[int] = []
        self.sent = False


EXCHANGE: ContextVar[Exchange | None] = ContextVar("stagetrace_exchange", default=None)


class _Outputs:
    """What the hooks on one process's output processor share; they run on one thread, the event loop's."""

    waiting: dict[str, int] = {}  # requests that have had no output yet
    begin = 0  # of the batch of outputs that is being processed


def trace_context(headers: Any) -> str:
    """The traceparent and tracestate of ASGI headers (pairs of bytes), on a line each; empty without a traceparent."""
    found = {name: value for name, value in headers if name in (b"traceparent", b"tracestate")}
    if b"traceparent" not in found:
        return ""
    return b"\n".join((found[b"traceparent"], found.get(b"tracestate", b""))).decode("latin-1")


def opens_recorder(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """OutputProcessor.__init__: this process is a front end, a server's or the offline LLM's."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        try:
            from vllm import __version__

            hook.recorder.open("front_end", {"engine": "vllm", "engine_version": __version__})
        except Exception:
            hook.failed()

    return __init__


def add_request(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """OutputProcessor.add_request: a request is ready to be sent; its arrival is vLLM's own, on the wall clock."""
    recorder = hook.recorder

    def record(request: Any) -> None:
        time_ns = now()
        age_ns = int((time.time() - request.arrival_time) * 1e9)
        handle = recorder.handle(request.request_id)
        prompt = extract.prompt_tokens(request)
        recorder.text(handle, Text.REQUEST_ID, request.request_id, _MAX_ID)
        external = getattr(request, "external_req_id", None)
        if external:
            recorder.text(handle, Text.EXTERNAL_ID, external, _MAX_ID)
        exchange = EXCHANGE.get()
        if exchange is not None:
            exchange.handles.append(handle)
            if exchange.context:
                recorder.text(handle, Text.TRACE_CONTEXT, exchange.context, _MAX_CONTEXT)
        by_http = int(exchange is not None)
        recorder.state(_TOKENIZE, time_ns - max(age_ns, 0), handle, 0, 0, prompt, extract.max_tokens(request), by_http)
        recorder.state(_DISPATCH, time_ns, handle, 0, 0, prompt)
        _Outputs.waiting[request.request_id] = handle

    def wrapper(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.level[0] < hook.threshold:
            return original(self, request, *args, **kwargs)
        known = request.request_id in self.request_states  # a further input of a streaming session
        result = original(self, request, *args, **kwargs)
        if not known:
            try:
                record(request)
            except Exception:
                hook.failed()
        return result

    return wrapper


def process_outputs(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """OutputProcessor.process_outputs: a batch of new tokens, looped over only while a request awaits its first."""
    recorder = hook.recorder
    waiting = _Outputs.waiting

    def wrapper(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.level[0] < hook.threshold:
            return original(self, engine_core_outputs, *args, **kwargs)
        begin = _Outputs.begin = now()
        try:
            if waiting:
                for output in engine_core_outputs:
                    handle = waiting.pop(output.request_id, None)
                    if handle is not None:
                        recorder.state(_FIRST_OUTPUT, begin, handle)
        except Exception:
            hook.failed()
        result = original(self, engine_core_outputs, *args, **kwargs)
        try:
            if recorder.level[0] >= Level.STEP and engine_core_outputs:
                recorder.segment(_DETOKENIZE, begin, now(), 0, 0, len(engine_core_outputs))
        except Exception:
            hook.failed()
        return result

    return wrapper


def request_finished(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """OutputProcessor._update_stats_from_finished: the front end saw a request finished, by a stop string too."""
    recorder = hook.recorder

    def record(state: Any, reason: Any) -> None:
        output = state.detokenizer.num_output_tokens() if state.detokenizer is not None else 0
        recorder.state(
            _LAST_OUTPUT,
            _Outputs.begin,
            recorder.handle(state.request_id),
            0,
            0,
            int(extract.finish_of_reason(reason)),
            output,
            state.prompt_len,
            state.num_cached_tokens,
        )

    def wrapper(self: Any, req_state: Any, finish_reason: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, req_state, finish_reason, *args, **kwargs)
        try:
            if _Outputs.waiting:  # its first output may have come while nothing was recorded
                _Outputs.waiting.pop(req_state.request_id, None)
            if recorder.level[0] >= hook.threshold:
                record(req_state, finish_reason)
        except Exception:
            hook.failed()
        return result

    return wrapper


def abort_requests(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """OutputProcessor.abort_requests: the client is gone or gave up; the result names the requests that it hit."""
    recorder = hook.recorder

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        try:
            recording = recorder.level[0] >= hook.threshold
            for request_id in result:
                _Outputs.waiting.pop(request_id, None)
                if recording:
                    recorder.state(_ABORTED, now(), recorder.handle(request_id))
        except Exception:
            hook.failed()
        return result

    return wrapper


def run_asgi(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """uvicorn's RequestResponseCycle.run_asgi: an HTTP request is handled in a task of its own."""
    recorder = hook.recorder

    async def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.level[0] >= hook.threshold:
            try:
                exchange = self._stagetrace = Exchange(self.scope["headers"])
                EXCHANGE.set(exchange)
            except Exception:
                hook.failed()
        return await original(self, *args, **kwargs)

    return wrapper


def send(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """uvicorn's RequestResponseCycle.send: a part of the response was handed to the socket."""
    recorder = hook.recorder

    def record(exchange: Exchange, message: Any) -> None:
        time_ns = now()
        if not exchange.sent and message.get("body"):
            exchange.sent = True
            for handle in exchange.handles:
                recorder.state(_FIRST_SENT, time_ns, handle)
        if not message.get("more_body", False):
            for handle in exchange.handles:
                recorder.state(_LAST_SENT, time_ns, handle)

    async def wrapper(self: Any, message: Any) -> Any:
        result = await original(self, message)
        if recorder.level[0] >= hook.threshold:
            try:
                if message["type"] == "http.response.body" and not self.disconnected:
                    exchange: Exchange | None = getattr(self, "_stagetrace", None)
                    if exchange is None or not exchange.handles:
                        return result
                    if not exchange.sent or not message.get("more_body", False):
                        record(exchange, message)
            except Exception:
                hook.failed()
        return result

    return wrapper
