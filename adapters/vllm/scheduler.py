"""Hooks in the engine core: steps, what is in them, and the states that requests take in the scheduler."""

from __future__ import annotations

import os
from _thread import get_ident
from collections import deque
from typing import TYPE_CHECKING, Any

from stagetrace.adapters.waiting import Waiting
from stagetrace.instrument.around import Around
from stagetrace.instrument.ids import new_instance
from stagetrace.instrument.recorder import now
from stagetrace.instrument.records import HEAD, TAILS, Change, Event, RecordType, header_word
from stagetrace.instrument.stages import BY_NAME, STEP_COMPOSITION, STEP_RESULT, IdleReason, Level, QueueCause

from . import connector, extract, startup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stagetrace.instrument.hooks import Hook
    from stagetrace.instrument.recorder import Recorder

# On a SchedulerOutput: (engine instance, step, whether there was no work before it); the executor's pickling keeps it.
STEP_ATTRIBUTE = "_stagetrace"
NO_STEP = (0, 0, False)  # in its place
PROCESS = [0]  # the process that runs a scheduler, if this one does
COMPILED_ATTRIBUTE = "_stagetrace_compiled"  # on a Request: when its grammar was compiled, ns
SNAPSHOT_EVERY = 128  # steps
_InFlight = tuple[int, "Sequence[str]", bytes]  # end of schedule, who gets a first token, the tail of its segments
_Ended = tuple[str, int, tuple[int, ...]]  # request, handle, words of its end
_MOST_IN_FLIGHT = 64  # steps whose update never came are forgotten beyond this
_DECODE_CONTEXT = [attribute.name for attribute in STEP_COMPOSITION].index("decode_context")
_STEP_LEVEL = int(Level.STEP)  # looking into an enum costs as much as a clock read
_pack_head, _pack_tail, _pack_result = HEAD.pack, TAILS[0].pack, TAILS[len(STEP_RESULT)].pack
_OF_NO_STEP = _pack_tail(0, 0)
_NO_WORK = TAILS[1].pack(0, 0, IdleReason.NO_WORK)
_NOT_IN_FLIGHT: _InFlight = (0, (), b"")

_HEADERS = (
    *(
        header_word(RecordType.SEGMENT, BY_NAME[name].id)
        for name in ("schedule", "execute", "update", "between", "idle")
    ),
    header_word(RecordType.STEP_END),
)
_GRAMMAR = header_word(RecordType.SEGMENT, BY_NAME["grammar"].id)
_DP_SYNC = header_word(RecordType.SEGMENT, BY_NAME["dp_sync"].id)
_GRAMMAR_COMPILE = header_word(RecordType.SEGMENT, BY_NAME["grammar_compile"].id)
_QUEUE = header_word(RecordType.STATE, BY_NAME["queue"].id)
_PREFILL = header_word(RecordType.STATE, BY_NAME["prefill"].id)
_DECODE = header_word(RecordType.STATE, BY_NAME["decode"].id)
_PREEMPTED = header_word(RecordType.STATE, BY_NAME["preempted"].id)
_KV_TRANSFER = header_word(RecordType.STATE, BY_NAME["kv_transfer"].id)
_FINISHED = header_word(RecordType.EVENT, Event.FINISHED)
_DRAFTED = header_word(RecordType.EVENT, Event.DRAFTED)
_WAITED = header_word(RecordType.EVENT, Event.WAITED)
_JOIN = header_word(RecordType.MEMBER, Change.JOIN)
_LEAVE = header_word(RecordType.MEMBER, Change.LEAVE)
_CHUNK = header_word(RecordType.MEMBER, Change.CHUNK)
_DROPPED = header_word(RecordType.MEMBER, Change.DROPPED)
_WAITS_FOR_GRAMMAR, _WAITS_ITS_TURN = int(QueueCause.GRAMMAR), int(QueueCause.TURN)
_WAITS_FOR_LORA, _WAITS_FOR_CONNECTOR = int(QueueCause.LORA_LIMIT), int(QueueCause.REMOTE_KV)
_PAUSED = int(QueueCause.PAUSED)

# Requests whose grammar was compiled, by the threads that do it; more than a scheduler will find.
_COMPILED: deque[str] = deque(maxlen=10_000)


class Tracker:
    """What is known of one scheduler between its calls; kept on the scheduler itself, used on its thread alone.

    Its dictionaries hold live requests and steps in flight, nothing that grows.
    """

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.instance = new_instance()
        self.step = 0
        self.handles: dict[str, int] = {}  # of the requests in the scheduler
        self.prefilling: dict[str, int] = {}  # request -> tokens that complete its prefill
        self.batch: list[str] = []  # the requests of the last step: those that were running, then the new ones
        self.in_flight: dict[int, _InFlight] = {}  # by step
        self.compiling: dict[str, int] = {}  # requests queued before their grammar was compiled -> when
        self.connected = False  # whether there is a KV connector
        self.transferring: set[str] = set()  # requests that wait for KV from elsewhere
        self.waits = Waiting()
        self.dropped_requests: set[str] = set()  # those that ended while a step that has them was in flight
        self.accepted = 0  # draft tokens, of the step that is in update
        self.finished: Sequence[_Ended] | None = None  # held back while in update
        self.last_end = 0  # end of the last segment on this timeline
        self.idle = False  # no request was left then
        self.preempted = 0  # since the last step
        self.context = -1  # tokens that its requests have computed, if each had one in it; summed again at snapshots
        self.snapshot_at = 0  # step at which the next snapshot is due
        self.dropped = 0  # control records, as far as a snapshot has made up for them
        self.epoch = recorder.epoch[0]
        self.run_on(0)

    def run_on(self, thread: int) -> None:
        """The scheduler runs on this thread: makes the heads of its records."""
        self.thread = thread
        heads = (_pack_head(header, thread) for header in _HEADERS)
        self.schedule, self.execute, self.update, self.between, self.idling, self.step_end = heads

    def resume(self, scheduler: Any) -> None:
        """The level was switched: what happened since the last record is not known, so it is taken from the engine."""
        self.epoch = self.recorder.epoch[0]
        self.handles = {request_id: self.recorder.handle(request_id) for request_id in scheduler.requests}
        self.prefilling = {
            request.request_id: request.num_tokens for request in scheduler.running if not request.num_output_tokens
        }
        self.batch = []
        self.context = -1
        self.last_end = self.preempted = self.snapshot_at = 0
        self.compiling.clear()
        self.transferring.clear()
        self.waits.forget()

    # Requests

    def queued(self, request: Any) -> None:
        """A request was taken into the waiting queue."""
        handle = self.handles[request.request_id] = self.recorder.handle(request.request_id)
        time_ns, cause = now(), _WAITS_ITS_TURN
        if request.use_structured_output and not getattr(request, COMPILED_ATTRIBUTE, 0):
            cause = _WAITS_FOR_GRAMMAR
            self.compiling[request.request_id] = time_ns
        else:
            self.waits.begins(request.request_id, time_ns)
        self.recorder.state(_QUEUE, time_ns, handle, self.instance, 0, request.num_prompt_tokens, cause)

    def compiled(self, request: Any, handle: int) -> None:
        """A request leaves the queue whose grammar had to be compiled: from when on it waited for its turn."""
        queued = self.compiling.pop(request.request_id)
        time_ns = max(getattr(request, COMPILED_ATTRIBUTE, 0), queued)
        self.recorder.state(_QUEUE, time_ns, handle, self.instance, 0, request.num_prompt_tokens, _WAITS_ITS_TURN)

    def has_waited(self, request: Any, handle: int, time_ns: int) -> None:
        """A request waits no longer: records what held it back, and for how long."""
        own = _WAITS_FOR_LORA if request.lora_request is not None else _WAITS_FOR_CONNECTOR if self.connected else 0
        for cause, ns in self.waits.ends(request.request_id, time_ns, own):
            self.recorder.state(_WAITED, time_ns, handle, self.instance, 0, cause, ns)

    def consider(self, scheduler: Any, output: Any, begin: int) -> None:
        """A batch was chosen, at `begin`, while requests were waiting."""
        while _COMPILED:
            request_id = _COMPILED.popleft()
            if request_id in self.compiling:
                self.waits.begins(request_id, begin)
        self.waits.holds_back(extract.held_back(scheduler, output, self.preempted), begin)

    def transfer_begins(self, request: Any, tokens: int) -> None:
        """A request's KV is to be fetched from elsewhere."""
        request_id, time_ns = request.request_id, now()
        handle = self.handles.get(request_id)
        if handle is None:
            return
        if request_id in self.compiling:
            self.compiled(request, handle)
        self.has_waited(request, handle, time_ns)
        self.transferring.add(request_id)
        self.recorder.state(_KV_TRANSFER, time_ns, handle, self.instance, 0, tokens)

    def transferred(self, request: Any) -> None:
        """A request's KV is there, or its transfer failed."""
        request_id, time_ns = request.request_id, now()
        handle = self.handles.get(request_id)
        if handle is None or request_id not in self.transferring:
            return
        self.transferring.discard(request_id)
        if request.num_preemptions:
            self.recorder.state(_PREEMPTED, time_ns, handle, self.instance, 0, request.num_output_tokens)
            return
        self.waits.begins(request_id, time_ns)
        self.recorder.state(_QUEUE, time_ns, handle, self.instance, 0, request.num_prompt_tokens, _WAITS_ITS_TURN)

    def preempt(self, request: Any) -> None:
        """A request was thrown out of the running batch."""
        handle = self.handles.get(request.request_id)
        if handle is not None:
            self.preempted += 1
            self.prefilling.pop(request.request_id, None)
            self.recorder.state(_PREEMPTED, now(), handle, self.instance, self.step, request.num_output_tokens)

    def free(self, request: Any) -> None:
        """A request ended, for whatever reason. In update the time is that of its last token: update's end."""
        request_id = request.request_id
        handle = self.handles.pop(request_id, None)
        self.prefilling.pop(request_id, None)
        self.compiling.pop(request_id, None)
        if handle is None:
            return
        words = (
            int(extract.finish_of_status(request.status)),
            request.num_output_tokens,
            request.num_prompt_tokens,
            request.num_preemptions,
        )
        time_ns = now()
        drafted = extract.drafted(request)
        if drafted is not None:
            self.recorder.state(_DRAFTED, time_ns, handle, self.instance, self.step, *drafted)
        self.transferring.discard(request_id)
        if request_id in self.waits.since:
            self.has_waited(request, handle, time_ns)
        if self.finished is not None:
            self.finished = (*self.finished, (request_id, handle, words))
        else:
            self._ended(time_ns, self.step, request_id, handle, words)

    def _ended(self, time_ns: int, step: int, request_id: str, handle: int, words: tuple[int, ...]) -> None:
        """Records a request's end. Of a step that is in flight it gets no token."""
        recorder, instance = self.recorder, self.instance
        recorder.state(_FINISHED, time_ns, handle, instance, step, *words)
        if self.in_flight:
            self.dropped_requests.add(request_id)
            if recorder.level[0] >= _STEP_LEVEL:
                for other in self.in_flight:
                    recorder.member(_DROPPED, handle, 0, 0, instance, other)

    # Steps

    def scheduled(self, scheduler: Any, output: Any, begin: int, end: int) -> None:
        """A batch was chosen."""
        recorder = self.recorder
        if recorder.epoch[0] != self.epoch:
            self.resume(scheduler)
        waits = self.waits
        if waits.since or self.compiling or waits.held != _WAITS_ITS_TURN:
            self.consider(scheduler, output, begin)
        if not output.total_num_scheduled_tokens:
            return  # a flush of finished requests: no step, its time is `between`
        new, cached = output.scheduled_new_reqs, output.scheduled_cached_reqs
        thread = get_ident()
        if thread != self.thread:
            self.run_on(thread)
        instance, step = self.instance, self.step + 1
        self.step = step
        output._stagetrace = (instance, step, self.idle)  # STEP_ATTRIBUTE
        tail = _pack_tail(instance, step)
        deep = recorder.level[0] >= _STEP_LEVEL
        chunks: Sequence[tuple[int, int, int]] = ()
        first_tokens: Sequence[str] = ()
        if self.prefilling or new or cached.resumed_req_ids:
            chunks, first_tokens = self._prefill(scheduler, output, begin, deep)
        in_flight = self.in_flight
        if len(in_flight) >= _MOST_IN_FLIGHT:
            in_flight.clear()
        in_flight[step] = (end, first_tokens, tail)
        if not deep:
            self.snapshot_at = self.preempted = 0
            self.idle = False
            self.last_end = end
            return
        requests, before = cached.req_ids, -1
        # Steady decode: the requests are those of the last step (which costs comparing pointers), with a token each.
        steady = output.total_num_scheduled_tokens == len(requests) and not (chunks or new)
        if new or requests != self.batch or step >= self.snapshot_at or recorder.dropped[0] != self.dropped:
            self._membership(requests, new)
        elif steady:
            before = self.context
        running, waiting = scheduler.get_request_counts()
        words = extract.composition(
            output,
            chunks,
            waiting,
            running,
            scheduler.kv_cache_manager.usage,
            self.preempted,
            before,
        )
        self.context = words[_DECODE_CONTEXT] if steady else -1
        step_begin, put, last_end = recorder.step_begin, recorder.put, self.last_end
        step_begin(begin, end, instance, step, words)
        if last_end:
            if self.idle:
                put(self.idling, last_end, begin, _NO_WORK)
            else:
                put(self.between, last_end, begin, _OF_NO_STEP)
        put(self.schedule, begin, end, tail)
        self.idle = False
        self.preempted = 0
        self.last_end = now()

    def _prefill(
        self, scheduler: Any, output: Any, begin: int, deep: bool
    ) -> tuple[list[tuple[int, int, int]], list[str]]:
        """Records the requests in prefill; gives (q, kv, cached) of each and who completes its prefill in this step."""
        cached_of = {}
        for new in output.scheduled_new_reqs:
            cached_of[new.req_id] = new.num_computed_tokens
        resumed = output.scheduled_cached_reqs.resumed_req_ids
        for request_id in (*cached_of, *resumed):
            handle = self.handles.get(request_id)
            if handle is None:  # it came while nothing was recorded
                handle = self.handles[request_id] = self.recorder.handle(request_id)
            request = scheduler.requests[request_id]
            self.prefilling[request_id] = request.num_tokens
            if request_id in self.compiling:
                self.compiled(request, handle)
            if request_id in self.waits.since:
                self.has_waited(request, handle, begin)
            again = 1 if request.num_preemptions else 0
            cached = cached_of.get(request_id, 0)
            external = min(extract.external_tokens(request), cached)  # what came may have been incomplete
            self.recorder.state(_PREFILL, begin, handle, self.instance, self.step, cached, again, external)
        chunks = []
        complete = []
        for request_id, target in self.prefilling.items():
            q = output.num_scheduled_tokens.get(request_id)
            if q is None:
                continue  # not in this step
            kv = scheduler.requests[request_id].num_computed_tokens
            last = kv >= target
            cached = cached_of.get(request_id, 0)
            chunks.append((q, kv, cached))
            if last:
                complete.append(request_id)
            if deep:
                handle = self.handles[request_id]
                self.recorder.member(_CHUNK, handle, q, kv, self.instance, self.step, int(last), cached)
        for request_id in complete:
            del self.prefilling[request_id]
        return chunks, complete

    def _membership(self, running: list[str], new: Sequence[Any]) -> None:
        """Records who takes part in the step and did not in the last one, and the reverse; at times everybody."""
        recorder, instance, step = self.recorder, self.instance, self.step
        handles = self.handles
        due = step >= self.snapshot_at
        if recorder.dropped[0] != self.dropped:  # what was lost may have been a change: tell everything
            self.dropped = recorder.dropped[0]
            due = True
        if new or running != self.batch:
            batch = [*running, *(request.req_id for request in new)]
            before, after = set(self.batch), set(batch)
            joined = after - before
            if len(before) + len(joined) != len(after):
                for request_id in before - after:
                    handle = handles.get(request_id)
                    if handle is None:
                        handle = recorder.handle(request_id)  # it ended
                    recorder.member(_LEAVE, handle, 0, 0, instance, step)
            for request_id in joined:
                handle = handles.get(request_id)
                if handle is None:
                    handle = handles[request_id] = recorder.handle(request_id)
                recorder.member(_JOIN, handle, 0, 0, instance, step)
            self.batch = batch
        if due:
            try:
                members = [*map(handles.__getitem__, self.batch)]
            except KeyError:  # some ended, or came while nothing was recorded
                members = [handles.get(request_id) or recorder.handle(request_id) for request_id in self.batch]
            written = recorder.snapshot(instance, step, members)
            self.snapshot_at = step + (SNAPSHOT_EVERY if written else 1)

    def updating(self, output: Any, given: Any) -> None:
        """The step's tokens are about to be taken in. `given`: the ModelRunnerOutput."""
        self.finished = ()  # requests that end from here on end with the step
        self.accepted = 0
        if output.scheduled_spec_decode_tokens and self.recorder.level[0] >= _STEP_LEVEL:
            self.accepted = extract.accepted_tokens(output, given, self.dropped_requests)

    def updated(self, scheduler: Any, output: Any, given: Any, begin: int, end: int) -> None:
        """The step is over. `given`: the ModelRunnerOutput."""
        finished, self.finished = self.finished, None
        instance, step, _ = getattr(output, STEP_ATTRIBUTE, NO_STEP)
        scheduled_end, first_tokens, tail = self.in_flight.pop(step, _NOT_IN_FLIGHT)
        received = 0
        if output.scheduled_spec_decode_tokens and self.recorder.level[0] >= _STEP_LEVEL:
            received = extract.sampled_tokens(output, given, self.dropped_requests)
        if first_tokens:
            self._first_tokens(scheduler, first_tokens, finished or (), end, instance, step)
        if finished:
            for request_id, handle, words in finished:
                self._ended(end, step or self.step, request_id, handle, words)
        if self.dropped_requests and not self.in_flight:
            self.dropped_requests.clear()
        if not step:
            return
        recorder = self.recorder
        if scheduled_end and recorder.level[0] >= _STEP_LEVEL:
            put, last_end = recorder.put, self.last_end
            put(self.execute, last_end if last_end > scheduled_end else scheduled_end, begin, tail)
            put(self.update, begin, end, tail)
            graph = getattr(given, "cudagraph_stats", None)
            if graph is not None or received:
                padded, mode = extract.graph(graph) if graph is not None else (0, 0)
                put(self.step_end, end, 0, _pack_result(instance, step, self.accepted, received, padded, mode))
            else:
                put(self.step_end, end, 0, tail)
        self.idle = not scheduler.requests
        self.last_end = end

    def _first_tokens(
        self, scheduler: Any, requests: Sequence[str], finished: Sequence[_Ended], end: int, instance: int, step: int
    ) -> None:
        """Records who leaves prefill with the step: those that have a token now."""
        for request_id in requests:
            handle = self.handles.get(request_id)
            if handle is None:
                handle = self.recorder.handle(request_id)
                if not any(handle == ended and words[1] for _, ended, words in finished):
                    continue  # it was aborted while the step ran, or failed
            else:
                request = scheduler.requests.get(request_id)
                if request is not None and not request.num_output_tokens:  # its KV could not be loaded: once more
                    self.prefilling[request_id] = request.num_tokens
                    continue
            self.recorder.state(_DECODE, end, handle, instance, step, 1)


def tracker_of(scheduler: Any, recorder: Recorder) -> Tracker:
    """The scheduler's tracker, made on first use."""
    tracker: Tracker | None = getattr(scheduler, STEP_ATTRIBUTE, None)
    if tracker is None:
        tracker = scheduler._stagetrace = Tracker(recorder)
    return tracker


# Handlers


def opens_recorder(hook: Hook) -> Around:
    """Scheduler.__init__: this process is an engine core."""

    def after(self: Any, vllm_config: Any) -> None:
        from vllm import __version__

        PROCESS[0] = os.getpid()
        tracker = tracker_of(self, hook.recorder)
        info = extract.process_info(vllm_config, __version__)
        hook.recorder.open("engine_core", {**info, "instance": tracker.instance})
        startup.flush(hook.recorder)
        tracker.connected = connector.follow(hook, self, tracker.transfer_begins)

    return Around(after=after)


def kv_transfers_finished(hook: Hook) -> Around:
    """Scheduler._update_from_kv_xfer_finished: a worker said which transfers are over."""
    recorder = hook.recorder

    def after(self: Any, kv_connector_output: Any) -> None:
        tracker = tracker_of(self, recorder)
        for request_id in kv_connector_output.finished_recving or ():
            request = self.requests.get(request_id)
            if request is not None:
                tracker.transferred(request)

    return Around(after=after)


def paused(hook: Hook) -> Around:
    """Scheduler.set_pause_state: the engine takes nobody in, or does again. While it is paused there may be no step."""
    recorder = hook.recorder

    def after(self: Any, pause_state: Any) -> None:
        tracker_of(self, recorder).waits.holds_back(_PAUSED if pause_state else _WAITS_ITS_TURN, now())

    return Around(after=after)


def schedule(hook: Hook) -> Around:
    """Scheduler.schedule: a step begins."""
    recorder = hook.recorder

    def after(self: Any, result: Any, begin: int, end: int) -> None:
        tracker_of(self, recorder).scheduled(self, result, begin, end)

    return Around(after=after)


def update_from_output(hook: Hook) -> Around:
    """Scheduler.update_from_output: the step ends."""
    recorder = hook.recorder

    def before(self: Any, scheduler_output: Any, model_runner_output: Any) -> None:
        tracker_of(self, recorder).updating(scheduler_output, model_runner_output)

    def after(self: Any, scheduler_output: Any, model_runner_output: Any, begin: int, end: int) -> None:
        tracker_of(self, recorder).updated(self, scheduler_output, model_runner_output, begin, end)

    return Around(before, after)


def add_request(hook: Hook) -> Around:
    """Scheduler.add_request: a request enters the queue. A further input of a streaming session is no new request."""
    recorder = hook.recorder

    def after(self: Any, request: Any) -> None:
        tracker = tracker_of(self, recorder)
        if request.request_id not in tracker.handles:
            tracker.queued(request)

    return Around(after=after)


def preempt_request(hook: Hook) -> Around:
    """Scheduler._preempt_request."""
    recorder = hook.recorder

    def after(self: Any, request: Any) -> None:
        tracker_of(self, recorder).preempt(request)

    return Around(after=after)


def free_request(hook: Hook) -> Around:
    """Scheduler._free_request: the one place that every request's end passes."""
    recorder = hook.recorder

    def before(self: Any, request: Any) -> None:
        tracker_of(self, recorder).free(request)

    return Around(before)


def grammar_bitmask(hook: Hook) -> Around:
    """Scheduler.get_grammar_bitmask; recorded where there was a mask to fill."""
    segment = hook.recorder.segment

    def after(scheduler_output: Any, result: Any, begin: int, end: int) -> None:
        if result is not None:
            instance, step, _ = getattr(scheduler_output, STEP_ATTRIBUTE, NO_STEP)
            segment(_GRAMMAR, begin, end, instance, step)

    return Around(after=after)


def grammar_compiled(hook: Hook) -> Around:
    """StructuredOutputManager._create_grammar: on a thread of a pool, while the request is in the queue."""
    recorder = hook.recorder

    def after(request: Any, begin: int, end: int) -> None:
        request._stagetrace_compiled = end  # COMPILED_ATTRIBUTE
        _COMPILED.append(request.request_id)
        if recorder.level[0] >= _STEP_LEVEL:
            recorder.segment(_GRAMMAR_COMPILE, begin, end, 0, 0)

    return Around(after=after)


def starts_workers(hook: Hook) -> Around:
    """Executor.__init__: the process is known before it has a scheduler, also when it never gets one.

    vLLM loads plugins when EngineCore.__init__ has begun, so that is too late for a hook on it.
    """

    def before(vllm_config: Any, begin: int) -> None:
        from vllm import __version__

        hook.recorder.open("engine_core", extract.process_info(vllm_config, __version__))
        startup.begun(hook.recorder, startup.CORE, begin)

    return Around(before, startup.part("start_workers")(hook).after)


def dp_sync(hook: Hook) -> Around:
    """DPEngineCoreProc._has_global_unfinished_reqs: asks the other data-parallel ranks, after every so many steps."""
    segment = hook.recorder.segment

    def after(begin: int, end: int) -> None:
        segment(_DP_SYNC, begin, end, 0, 0)

    return Around(after=after)
