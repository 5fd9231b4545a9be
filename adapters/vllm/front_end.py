"""Hooks in the front end: requests from their arrival to their last token; ../http.py has the client's side."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.around import Around
from stagetrace.instrument.recorder import now
from stagetrace.instrument.records import Event, RecordType, Text, header_word
from stagetrace.instrument.stages import BY_NAME, Level

from .. import trace_context
from ..http import EXCHANGE
from . import extract, startup

if TYPE_CHECKING:
    from stagetrace.instrument.hooks import Hook

_MAX_ID = 256  # bytes of a request id
_MAX_CONTEXT = 1024  # bytes of traceparent and tracestate
_TOKENIZE = header_word(RecordType.STATE, BY_NAME["request_tokenize"].id)
_DISPATCH = header_word(RecordType.STATE, BY_NAME["request_dispatch"].id)
_DETOKENIZE = header_word(RecordType.SEGMENT, BY_NAME["detokenize"].id)
_FIRST_OUTPUT = header_word(RecordType.EVENT, Event.FIRST_OUTPUT)
_LAST_OUTPUT = header_word(RecordType.EVENT, Event.LAST_OUTPUT)
_ABORTED = header_word(RecordType.EVENT, Event.ABORTED)
_CHILD = header_word(RecordType.EVENT, Event.CHILD)
_STEP_LEVEL = int(Level.STEP)  # looking into an enum costs as much as a clock read


class _Outputs:
    """What the hooks on one process's output processor share; they run on one thread, the event loop's."""

    waiting: dict[str, int] = {}  # requests that have had no output yet; forgotten while nothing is recorded
    begin = 0  # of the batch of outputs that is being processed


def opens_recorder(hook: Hook) -> Around:
    """OutputProcessor.__init__: this process is a front end, a server's or the offline LLM's."""

    def after() -> None:
        from vllm import __version__

        hook.recorder.open("front_end", {"engine": "vllm", "engine_version": __version__})
        startup.flush(hook.recorder)

    return Around(after=after)


def add_request(hook: Hook) -> Around:
    """OutputProcessor.add_request: a request is ready to be sent; its arrival is vLLM's own, on the wall clock."""
    recorder = hook.recorder

    def before(self: Any, request: Any) -> bool:
        return request.request_id in self.request_states  # a further input of a streaming session

    def after(self: Any, request: Any, parent_req: Any, request_index: int, noted: bool | None) -> None:
        if noted is not False:
            return
        time_ns = now()
        age_ns = int((time.time() - request.arrival_time) * 1e9)
        handle = recorder.handle(request.request_id)
        prompt = extract.prompt_tokens(request)
        recorder.text(handle, Text.REQUEST_ID, request.request_id, _MAX_ID)
        external = getattr(request, "external_req_id", None)
        if external:
            recorder.text(handle, Text.EXTERNAL_ID, external, _MAX_ID)
        exchange = EXCHANGE.get()
        parent = 0 if parent_req is None else recorder.handle(parent_req.request_id)
        context = trace_context.of_mapping(request.trace_headers)
        if exchange is not None:
            exchange.handles.append(handle)
            context = exchange.context or context
        elif not context:
            context = trace_context.of_surroundings()
        if context:
            recorder.text(handle, Text.TRACE_CONTEXT, context, _MAX_CONTEXT)
        if getattr(self, "tracing_enabled", False) and not request.trace_headers:
            traceparent, _, state = context.partition("\n")
            request.trace_headers = (
                {"traceparent": traceparent, "tracestate": state}
                if context
                else trace_context.of_our_own(recorder, handle, parent or handle)
            )
        by_http = int(exchange is not None)
        arrival_ns = time_ns - max(age_ns, 0)
        most, priority = extract.max_tokens(request), int(request.priority)
        recorder.state(_TOKENIZE, arrival_ns, handle, 0, 0, prompt, most, by_http, priority)
        if parent_req is not None:
            recorder.state(_CHILD, time_ns, handle, 0, 0, parent, request_index, parent_req.n)
        if request.lora_request is not None:
            recorder.text(handle, Text.LORA, request.lora_request.lora_name, _MAX_ID)
        before_arrival = 0 if exchange is None else exchange.before(arrival_ns)
        recorder.state(_DISPATCH, time_ns, handle, 0, 0, prompt, before_arrival)
        _Outputs.waiting[request.request_id] = handle

    return Around(before, after)


def process_outputs(hook: Hook) -> Around:
    """OutputProcessor.process_outputs: a batch of new tokens, looped over only while a request awaits its first."""
    recorder, segment, state = hook.recorder, hook.recorder.segment, hook.recorder.state
    waiting = _Outputs.waiting

    def before(engine_core_outputs: Any, begin: int) -> None:
        _Outputs.begin = begin
        if waiting:
            for output in engine_core_outputs:
                handle = waiting.pop(output.request_id, None)
                if handle is not None:
                    state(_FIRST_OUTPUT, begin, handle)

    def after(engine_core_outputs: Any, begin: int, end: int) -> None:
        if engine_core_outputs and recorder.level[0] >= _STEP_LEVEL:
            segment(_DETOKENIZE, begin, end, 0, 0, len(engine_core_outputs))

    return Around(before, after, off=waiting.clear)


def request_finished(hook: Hook) -> Around:
    """OutputProcessor._update_stats_from_finished: the front end saw a request finished, by a stop string too."""
    recorder = hook.recorder

    def after(req_state: Any, finish_reason: Any) -> None:
        output = req_state.detokenizer.num_output_tokens() if req_state.detokenizer is not None else 0
        recorder.state(
            _LAST_OUTPUT,
            _Outputs.begin,
            recorder.handle(req_state.request_id),
            0,
            0,
            int(extract.finish_of_reason(finish_reason)),
            output,
            req_state.prompt_len,
            req_state.num_cached_tokens,
        )

    return Around(after=after)


def abort_requests(hook: Hook) -> Around:
    """OutputProcessor.abort_requests: the client is gone or gave up; the result names the requests that it hit."""
    recorder = hook.recorder

    def after(result: Any) -> None:
        for request_id in result:
            _Outputs.waiting.pop(request_id, None)
            recorder.state(_ABORTED, now(), recorder.handle(request_id))

    return Around(after=after, off=_Outputs.waiting.clear)
