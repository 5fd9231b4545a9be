"""Hooks in the processes around the scheduler: requests from their arrival to their last token, text in between.

The tokenizer manager (in the server's process, in each of several tokenizer workers, or in the embedded Engine's) has
the requests; the data-parallel controller hands them on; the detokenizer turns tokens into text. ../http.py has the
client's side. Times that SGLang takes itself are used (`ReqState.time_stats`, in seconds of the same clock as ours).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stagetrace.instrument.around import Around
from stagetrace.instrument.recorder import now
from stagetrace.instrument.records import Event, RecordType, Text, header_word
from stagetrace.instrument.stages import BY_NAME, Finish, Level

from .. import trace_context
from ..http import EXCHANGE
from . import extract, startup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stagetrace.instrument.hooks import Hook
    from stagetrace.instrument.recorder import Recorder

PARENT_ATTRIBUTE = "_stagetrace_parent"  # on a request that was copied from another for n > 1: the other's id
GONE_ATTRIBUTE = "_stagetrace_gone"  # on the ReqState of a request whose client is gone

_MOST_FAMILIES = 1000  # in `_Outputs.samples`; those beyond it failed halfway
_MAX_ID = 256  # bytes of a request id
_MAX_CONTEXT = 1024  # bytes of traceparent and tracestate
_REQUEST_TOKENIZE = header_word(RecordType.STATE, BY_NAME["request_tokenize"].id)
_REQUEST_DISPATCH = header_word(RecordType.STATE, BY_NAME["request_dispatch"].id)
_TOKENIZE = header_word(RecordType.SEGMENT, BY_NAME["tokenize"].id)
_DISPATCH = header_word(RecordType.SEGMENT, BY_NAME["dispatch"].id)
_DETOKENIZE = header_word(RecordType.SEGMENT, BY_NAME["detokenize"].id)
_FIRST_OUTPUT = header_word(RecordType.EVENT, Event.FIRST_OUTPUT)
_LAST_OUTPUT = header_word(RecordType.EVENT, Event.LAST_OUTPUT)
_FINISHED = header_word(RecordType.EVENT, Event.FINISHED)
_ABORTED = header_word(RecordType.EVENT, Event.ABORTED)
_CHILD = header_word(RecordType.EVENT, Event.CHILD)
_STEP_LEVEL = int(Level.STEP)  # looking into an enum costs as much as a clock read


class _Outputs:
    """What the hooks on one process's tokenizer manager share; they run on one thread, the event loop's."""

    waiting: dict[str, int] = {}  # requests that have had no output yet; forgotten while nothing is recorded
    samples: dict[str, int] = {}  # of requests with n > 1 whose samples are not all sent: how many are


# Tokenizer manager


def opens_recorder(hook: Hook) -> Around:
    """TokenizerManager.__init__: this process is a front end, a server's or the embedded Engine's."""
    return _opens(hook, "front_end")


def _arrived(
    recorder: Recorder, state: Any, rid: str, prompt: int, most: int, time_ns: int, by_client: bool
) -> tuple[int, int]:
    """Writes what a request is and where it came from, and that it was tokenized until now.

    Gives its handle, and the ns between the head of its HTTP request and its arrival.
    """
    handle, request = recorder.handle(rid), state.obj
    recorder.text(handle, Text.REQUEST_ID, rid, _MAX_ID)
    recorder.text(handle, Text.EXTERNAL_ID, getattr(request, PARENT_ATTRIBUTE, rid), _MAX_ID)
    exchange = EXCHANGE.get()
    context = (
        (exchange.context if exchange is not None else "")
        or trace_context.of_mapping(getattr(request, "external_trace_header", None))
        or extract.native_trace_context(state.time_stats)
        or ("" if exchange is not None else trace_context.of_surroundings())
    )
    if context:
        recorder.text(handle, Text.TRACE_CONTEXT, context, _MAX_CONTEXT)
    lora = extract.lora_name(request)
    if lora:
        recorder.text(handle, Text.LORA, lora, _MAX_ID)
    arrival_ns, before = min(extract.time_ns(state.time_stats.created_time), time_ns), 0
    by_http = exchange is not None and by_client
    if by_http and exchange is not None:
        exchange.handles.append(handle)
        before = exchange.before(arrival_ns)
    priority = extract.priority(request)
    recorder.state(_REQUEST_TOKENIZE, arrival_ns, handle, 0, 0, prompt, most, int(by_http), priority)
    return handle, before


def _sent(recorder: Recorder, manager: Any, requests: Sequence[Any]) -> None:
    """Writes that tokenized requests are ready to be sent to the engine."""
    time_ns = now()
    for request in requests:
        rid = request.rid
        if rid.startswith(extract.HEALTH_CHECK):
            continue
        state, prompt = manager.rid_to_state[rid], extract.prompt_tokens(request)
        # With n > 1 SGLang first fills its cache with the prompt: by a request of its own, with the first one's times,
        # of which the client is sent nothing.
        by_client = request.time_stats is state.time_stats
        handle, before = _arrived(recorder, state, rid, prompt, extract.max_tokens(request), time_ns, by_client)
        parent = getattr(state.obj, PARENT_ATTRIBUTE, None)
        if parent is not None and by_client:
            index, count = _next_sample(parent, extract.samples(state.obj))
            recorder.state(_CHILD, time_ns, handle, 0, 0, recorder.handle(parent), index, count)
        recorder.state(_REQUEST_DISPATCH, time_ns, handle, 0, 0, prompt, before)
        _Outputs.waiting[rid] = handle


def _next_sample(parent: str, count: int) -> tuple[int, int]:
    """The index of the next sample of a request, and how many there are."""
    samples = _Outputs.samples
    if len(samples) > _MOST_FAMILIES:
        samples.clear()
    index = samples.pop(parent, 0)
    if index + 1 < count:
        samples[parent] = index + 1
    return index, count


def send_one_request(hook: Hook) -> Around:
    """TokenizerManager._send_one_request: a request is ready to be sent."""
    recorder = hook.recorder

    def before(self: Any, tokenized_obj: Any) -> None:
        _sent(recorder, self, (tokenized_obj,))

    return Around(before, off=_Outputs.waiting.clear)


def send_batch_request(hook: Hook) -> Around:
    """TokenizerManager._send_batch_request: several requests of one call are sent in one message."""
    recorder = hook.recorder

    def before(self: Any, tokenized_objs: Any) -> None:
        _sent(recorder, self, tokenized_objs)

    return Around(before, off=_Outputs.waiting.clear)


def copy_for_sampling(hook: Hook) -> Around:
    """GenerateReqInput.regenerate_rid: with n > 1 every sample is a copy of the request, with an id of its own."""

    def before(self: Any) -> None:
        setattr(self, PARENT_ATTRIBUTE, getattr(self, PARENT_ATTRIBUTE, self.rid))

    return Around(before)


def tokenize_texts(hook: Hook) -> Around:
    """TokenizerManager._tokenize_texts, where the tokenizer runs in it and not in a thread that it waits for."""
    segment = hook.recorder.segment

    def after(self: Any, begin: int, end: int) -> None:
        if self.async_dynamic_batch_tokenizer is None:
            segment(_TOKENIZE, begin, end, 0, 0)

    return Around(after=after)


def dispatch(hook: Hook) -> Around:
    """What hands one message on: TokenizerManager._dispatch_to_scheduler, DataParallelController's."""
    segment = hook.recorder.segment

    def after(begin: int, end: int) -> None:
        segment(_DISPATCH, begin, end, 0, 0)

    return Around(after=after)


def _ends(rid: str, request: Any) -> bool:
    """Whether the end of a request is to be written: somebody waits for it."""
    return (
        request is not None and not getattr(request, GONE_ATTRIBUTE, False) and not rid.startswith(extract.HEALTH_CHECK)
    )


def handle_batch_output(hook: Hook) -> Around:
    """TokenizerManager._handle_batch_output: a batch of new text, looped over only if it begins or ends a request."""
    recorder, state = hook.recorder, hook.recorder.state
    waiting = _Outputs.waiting

    def before(self: Any, recv_obj: Any) -> tuple[list[tuple[int, Any]], list[tuple[int, Any]]] | None:
        reasons = recv_obj.finished_reasons
        ending = reasons.count(None) != len(reasons)
        if not waiting and not ending:
            return None
        states = self.rid_to_state
        first: list[tuple[int, Any]] = []
        last: list[tuple[int, Any]] = []
        for index, rid in enumerate(recv_obj.rids):
            handle = waiting.pop(rid, None)
            if handle is not None:
                first.append((handle, states.get(rid)))
            if reasons[index] is not None and _ends(rid, request := states.get(rid)):
                last.append((index, request))
        return first, last

    def after(recv_obj: Any, begin: int, noted: Any) -> None:
        if noted is None:
            return
        first, last = noted
        for handle, request in first:
            state(_FIRST_OUTPUT, extract.first_output_ns(request, begin), handle)
        for index, request in last:
            rid = recv_obj.rids[index]
            words = extract.finished(recv_obj, index)
            end_ns = extract.time_ns(request.time_stats.finished_time)
            state(_LAST_OUTPUT, max(end_ns, begin), recorder.handle(rid), 0, 0, *words)

    def woke_streams(begin: int, end: int, last: bool, recv_obj: Any) -> None:
        if recorder.level[0] >= _STEP_LEVEL:
            recorder.segment(_DETOKENIZE, begin, end, 0, 0, len(recv_obj.rids) if last else 0)

    return Around(before, after, off=waiting.clear, stretch=woke_streams)


def handle_abort(hook: Hook) -> Around:
    """TokenizerManager._handle_abort_req: the scheduler gave a request up that was waiting."""
    recorder = hook.recorder

    def before(self: Any, recv_obj: Any) -> Any:
        return self.rid_to_state.get(recv_obj.rid)

    def after(recv_obj: Any, noted: Any) -> None:
        if not _ends(recv_obj.rid, noted):
            return
        _Outputs.waiting.pop(recv_obj.rid, None)
        end_ns = extract.time_ns(noted.time_stats.finished_time)
        finish = extract.finish_of_reason(recv_obj.finished_reason or {"type": "abort"})
        recorder.state(_LAST_OUTPUT, end_ns, recorder.handle(recv_obj.rid), 0, 0, int(finish), len(noted.output_ids))

    return Around(before, after, off=_Outputs.waiting.clear)


def abort_request(hook: Hook) -> Around:
    """TokenizerManager.abort_request, when the client is gone: nobody gets what the scheduler still sends.

    An abort that another call asked for is no different from an end: the client gets what there is.
    """
    recorder = hook.recorder

    def before(self: Any, rid: str) -> None:
        exchange, request = EXCHANGE.get(), self.rid_to_state.get(rid)
        if exchange is None or request is None or getattr(request, GONE_ATTRIBUTE, False):
            return
        handle = recorder.handle(rid)
        if handle in exchange.handles:
            setattr(request, GONE_ATTRIBUTE, True)
            _Outputs.waiting.pop(rid, None)
            recorder.state(_ABORTED, now(), handle)

    return Around(before, off=_Outputs.waiting.clear)


def request_failed(hook: Hook) -> Around:
    """TokenizerManager._release_req_states_on_failure: requests that were refused before they reached the engine."""
    recorder = hook.recorder

    def before(self: Any, request_states: Any) -> None:
        time_ns = now()
        for rid in extract.refused(request_states, self.rid_to_state):
            handle, _ = _arrived(recorder, request_states[rid], rid, 0, 0, time_ns, True)
            recorder.state(_LAST_OUTPUT, time_ns, handle, 0, 0, Finish.ERROR)
            recorder.state(_FINISHED, time_ns, handle, 0, 0, Finish.ERROR)

    return Around(before)


# Data-parallel controller and detokenizer


def opens_controller(hook: Hook) -> Around:
    """DataParallelController.__init__: this process hands requests to the data-parallel ranks."""
    return _opens(hook, "dp_controller")


def opens_detokenizer(hook: Hook) -> Around:
    """DetokenizerManager.__init__: this process is a detokenizer."""
    return _opens(hook, "detokenizer")


def detokenize(hook: Hook) -> Around:
    """DetokenizerManager.handle_batch_token_id_out: a batch of new tokens becomes text."""
    segment = hook.recorder.segment

    def after(recv_obj: Any, begin: int, end: int) -> None:
        requests = len(recv_obj.rids)
        if requests:
            segment(_DETOKENIZE, begin, end, 0, 0, requests)

    return Around(after=after)


def _opens(hook: Hook, role: str) -> Around:
    def before(begin: int) -> None:
        startup.begun(hook.recorder, role, begin)

    def after(self: Any) -> None:
        from sglang.version import __version__

        hook.recorder.open(role, {"engine": "sglang", "engine_version": __version__})
        startup.built(hook, role, self)

    return Around(before, after)
