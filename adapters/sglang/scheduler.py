"""Hooks in the scheduler: steps, what is in them, and the states that requests take in it.

Every rank runs a scheduler of its own, and all of one replica come to the same schedule: `forward_ct`, which counts the
batches that were run, is a step's number on all of them. So the first rank alone writes what the scheduler does; the
others write their part of each step.

With overlap the result of a step is taken in after the next one was launched. A batch then comes as a copy, whose
`forward_iter` says which step it was.
"""

from __future__ import annotations

from _thread import get_ident
from typing import TYPE_CHECKING, Any

from stagetrace.adapters.device import device_info
from stagetrace.adapters.device_time import on_device
from stagetrace.adapters.kernel_window import KernelWindow
from stagetrace.adapters.members import Members
from stagetrace.adapters.waiting import Waiting
from stagetrace.instrument.around import Around
from stagetrace.instrument.recorder import now
from stagetrace.instrument.records import HEAD, TAILS, Change, Event, RecordType, header_word
from stagetrace.instrument.stages import BY_NAME, Finish, GraphMode, IdleReason, Level, QueueCause

from . import extract, layers, nodes, startup
from .worker import DEVICE, RANK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stagetrace.instrument.hooks import Hook
    from stagetrace.instrument.recorder import Recorder

_MOST_IN_FLIGHT = 64  # steps whose result never came are forgotten beyond this
_STEP_LEVEL = int(Level.STEP)  # looking into an enum costs as much as a clock read
_pack_head, _pack_tail, _pack_result = HEAD.pack, TAILS[0].pack, TAILS[4].pack
_OF_NO_STEP = _pack_tail(0, 0)
_NO_WORK = TAILS[1].pack(0, 0, IdleReason.NO_WORK)
_OTHER_RANK = TAILS[1].pack(0, 0, IdleReason.WAITING_FOR_RANK)
_NO_BATCH = (None, 0, 0)

_HEADERS = (
    *(
        header_word(RecordType.SEGMENT, BY_NAME[name].id)
        for name in ("schedule", "execute", "update", "between", "idle", "dp_sync")
    ),
    header_word(RecordType.STEP_END),
)
_GRAMMAR = header_word(RecordType.SEGMENT, BY_NAME["grammar"].id)
_EMIT = header_word(RecordType.SEGMENT, BY_NAME["emit"].id)
_QUEUE = header_word(RecordType.STATE, BY_NAME["queue"].id)
_PREFILL = header_word(RecordType.STATE, BY_NAME["prefill"].id)
_DECODE = header_word(RecordType.STATE, BY_NAME["decode"].id)
_PREEMPTED = header_word(RecordType.STATE, BY_NAME["preempted"].id)
_FINISHED = header_word(RecordType.EVENT, Event.FINISHED)
_DRAFTED = header_word(RecordType.EVENT, Event.DRAFTED)
_WAITED = header_word(RecordType.EVENT, Event.WAITED)
_WAITS_FOR_GRAMMAR, _WAITS_ITS_TURN = int(QueueCause.GRAMMAR), int(QueueCause.TURN)
_CHUNK = header_word(RecordType.MEMBER, Change.CHUNK)


class Tracker:
    """What is known of the first rank's scheduler between its calls; used on its thread alone.

    What it keeps is of live requests and of steps in flight: nothing that grows.
    """

    def __init__(self, recorder: Recorder, instance: int, pipeline: bool = False, per_decode: int = 1):
        self.recorder = recorder
        self.instance = instance
        self.per_decode = per_decode  # tokens of a request in a decode step
        self.verified: dict[int, Any] = {}  # step that verifies drafts -> its GenerationBatchResult
        self.step = 0  # that was run last
        self.pipeline = pipeline  # between its own work it waits for the other stages
        self.live: dict[str, int] = {}  # request -> handle, 0 for a health check, from queue to end
        self.waiting: set[str] = set()  # of these: not scheduled yet, or not again
        self.waits = Waiting()  # of these: in the queue, not thrown out of the batch
        self.compiling: set[str] = set()  # of these: their grammar is not there yet
        self.prefilling: set[str] = set()
        self.batch: list[Any] = []  # the requests of the last step, as the engine has them
        self.members = Members(recorder, instance)
        self.in_flight: dict[int, Sequence[Any]] = {}  # step -> requests whose prefill it completes
        self.chosen: tuple[Any, int, int] = _NO_BATCH  # batch that was scheduled and not run yet; begin, end
        self.synced: tuple[int, int] = (0, 0)  # begin and end of the last agreement of data-parallel ranks
        self.ended = 0  # requests that ended since the last look
        self.last_end = 0  # end of the last segment on this timeline
        self.idle = False  # no request was left then
        self.company = 0  # begin of a run of an empty batch, beside other data-parallel ranks' work
        self.woken = 0  # when the first request came after that, if it is known
        self.preempted = 0  # since the last step
        self.context = -1  # sum of the last step's contexts, if that was decode alone
        self.epoch = recorder.epoch[0]
        self.run_on(0)

    def run_on(self, thread: int) -> None:
        """The scheduler runs on this thread: makes the heads of its records."""
        self.thread = thread
        heads = (_pack_head(header, thread) for header in _HEADERS)
        self.schedule, self.execute, self.update, self.between, self.idling, self.dp_sync, self.step_end = heads

    def resume(self, scheduler: Any) -> None:
        """The level was switched: what happened since the last record is not known, so it is taken from the engine."""
        self.epoch = self.recorder.epoch[0]
        last, chunked = scheduler.last_batch, scheduler.chunked_req
        queued = [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue]
        begun = [*scheduler.running_batch.reqs, *(last.reqs if last else ()), *([chunked] if chunked else ())]
        self.live = {each.rid: self._handle(each) for each in (*queued, *begun) if not each.finished()}
        self.waiting = {each.rid for each in queued}
        self.waits.forget()
        self.compiling.clear()
        self.prefilling = {chunked.rid} if chunked else set()
        self.in_flight, self.verified = {}, {}
        self.batch = []
        self.members.forget()
        self.context = -1
        self.last_end = self.preempted = self.ended = self.woken = 0

    def _handle(self, request: Any) -> int:
        return 0 if extract.is_health_check(request) else self.recorder.handle(request.rid)

    # Requests

    def queued(self, request: Any, since: float, cause: int = _WAITS_ITS_TURN) -> None:
        """A request was taken in, at `since` on SGLang's clock; `cause`: what it waits for first."""
        if request.rid in self.live:
            if request.rid in self.compiling and cause == _WAITS_ITS_TURN:
                self.compiled(request, now())
            return  # it comes back: after a retraction, or when its grammar is compiled
        time_ns = extract.time_ns(since) or now()
        handle = self.live[request.rid] = self._handle(request)
        self.waiting.add(request.rid)
        if handle:
            if self.idle and not self.woken:
                self.woken = extract.time_ns(request.time_stats.scheduler_recv_time) or time_ns
            if cause == _WAITS_FOR_GRAMMAR:
                self.compiling.add(request.rid)
            else:
                self.waits.begins(request.rid, time_ns)
            self.recorder.state(_QUEUE, time_ns, handle, self.instance, 0, len(request.origin_input_ids), cause)

    def compiled(self, request: Any, time_ns: int) -> None:
        """A request's grammar is there: from now on it waits for its turn."""
        self.compiling.discard(request.rid)
        handle = self.live[request.rid]
        self.waits.begins(request.rid, time_ns)
        self.recorder.state(_QUEUE, time_ns, handle, self.instance, 0, len(request.origin_input_ids), _WAITS_ITS_TURN)

    def has_waited(self, rid: str, handle: int, until: int, time_ns: int) -> None:
        """A request left the queue at `time_ns`: records what held it back until `until`, and for how long."""
        for cause, ns in self.waits.ends(rid, until):
            self.recorder.state(_WAITED, time_ns, handle, self.instance, 0, cause, ns)

    def consider(self, scheduler: Any, batch: Any, running: Any, begin: int) -> None:
        """A batch was chosen, at `begin`, or none. Micro-batches of a pipeline have limits of their own: not told."""
        waits = self.waits
        if (waits.since or waits.held != _WAITS_ITS_TURN) and not self.pipeline:
            waits.holds_back(extract.held_back(scheduler, batch, running, self.preempted), begin)

    def preempt(self, request: Any) -> None:
        """A request was thrown out of the running batch."""
        handle = self.live.get(request.rid)
        if handle is None:
            return
        self.preempted += 1
        self.waiting.add(request.rid)
        self.prefilling.discard(request.rid)
        if handle:
            self.recorder.state(_PREEMPTED, now(), handle, self.instance, self.step, len(request.output_ids))

    def free(self, request: Any, time_ns: int, step: int, finish: Finish) -> None:
        """A request ended."""
        handle = self.live.pop(request.rid, None)
        self.waiting.discard(request.rid)
        self.prefilling.discard(request.rid)
        self.compiling.discard(request.rid)
        if handle:
            self.has_waited(request.rid, handle, time_ns, time_ns)
            self.recorder.state(
                _FINISHED,
                time_ns,
                handle,
                self.instance,
                step,
                int(finish),
                extract.output_tokens(request),
                len(request.origin_input_ids),
                request.retraction_count,
            )
            drafts = extract.drafted(request, self.per_decode)
            if drafts is not None:
                self.recorder.state(_DRAFTED, time_ns, handle, self.instance, step, *drafts)

    # Steps

    def launch(self, scheduler: Any, batch: Any, step: int, begin: int) -> bool:
        """A batch is about to be run, at `begin`; says whether it is a step that is recorded."""
        recorder = self.recorder
        if recorder.epoch[0] != self.epoch:
            self.resume(scheduler)
        thread = get_ident()
        if thread != self.thread:
            self.run_on(thread)
        chosen, scheduled, end = self.chosen
        self.chosen = _NO_BATCH
        if chosen is not batch:  # its scheduling was not seen
            scheduled = end = begin
        if not extract.is_step(batch):
            for request in batch.reqs:
                self.waiting.discard(request.rid)
            self.company = 0 if batch.reqs else begin
            return False
        deep = recorder.level[0] >= _STEP_LEVEL
        chunks: Sequence[tuple[int, int, int]] = ()
        first_tokens: Sequence[Any] = ()
        requests = batch.reqs
        decodes = len(requests)
        context = -1
        if batch.forward_mode.is_extend():
            chunks, first_tokens, decodes, context = self._prefill(batch, step, scheduled, deep)
        self.step = step
        in_flight = self.in_flight
        if len(in_flight) >= _MOST_IN_FLIGHT:
            in_flight.clear()
            self.verified.clear()
        in_flight[step] = first_tokens
        if not deep:
            self.members.forget()
            self.preempted = 0
            self.idle = False
            self.last_end = end
            return False
        # Steady decode: the requests are those of the last step (which costs comparing pointers), with a token each.
        steady = requests == self.batch
        if not steady:
            self.batch = requests[:]  # the engine changes its list in place
        if not steady or self.members.due(step):
            live = self.live
            self.members.record(step, [h for h in [live.get(each.rid, 0) for each in requests] if h])
        per_decode = 1 if chunks else self.per_decode
        if context < 0:
            known = steady and self.context >= 0 and per_decode == 1
            context = self.context + decodes if known else extract.decode_context(batch, per_decode)
        self.context = -1 if chunks else context
        running = scheduler.running_batch
        words = extract.composition(
            chunks,
            decodes,
            context,
            len(scheduler.waiting_queue),
            len(requests) + (len(running.reqs) if running is not batch else 0),
            extract.kv_usage(scheduler),
            self.preempted,
            per_decode,
        )
        put = recorder.put
        tail = _pack_tail(self.instance, step)
        recorder.step_begin(scheduled, end, self.instance, step, words)
        self._gap(scheduled)
        put(self.schedule, scheduled, end, tail)
        synced, done = self.synced
        if synced >= scheduled:
            put(self.dp_sync, synced, done, tail)
        if self.pipeline and end < begin:
            put(self.idling, end, begin, _OTHER_RANK)
        self.idle = False
        self.woken = self.preempted = 0
        return True

    def _prefill(
        self, batch: Any, step: int, begin: int, deep: bool
    ) -> tuple[list[tuple[int, int, int]], list[Any], int, int]:
        """Records the requests in prefill.

        Gives (q, kv, cached) of each, who completes its prefill in this step, and of the others, which are in decode,
        their number and the sum of their contexts.
        """
        recorder, instance, live, waiting, prefilling = (
            self.recorder,
            self.instance,
            self.live,
            self.waiting,
            self.prefilling,
        )
        chunks, complete = [], []
        decodes = context = 0
        chunked = batch.chunked_req
        for request, q, before in zip(batch.reqs, batch.extend_lens, batch.prefix_lens, strict=True):
            rid, kv = request.rid, before + q
            handle = live.get(rid)
            if handle is None:  # it came while nothing was recorded
                handle = live[rid] = self._handle(request)
            cached = 0
            if rid in waiting:
                waiting.discard(rid)
                prefilling.add(rid)
                cached = before
                if handle:
                    stats = request.time_stats
                    entered = extract.time_ns(stats.last_forward_entry_time)
                    again = 1 if request.retraction_count else 0
                    if rid in self.waits.since:
                        self.has_waited(rid, handle, begin, max(entered, begin))
                    recorder.state(_PREFILL, max(entered, begin), handle, instance, step, cached, again)
            elif rid not in prefilling:
                decodes += 1
                context += kv
                continue
            last = request is not chunked
            chunks.append((q, kv, cached))
            if last:
                complete.append(request)
                prefilling.discard(rid)
            if deep and handle:
                recorder.member(_CHUNK, handle, q, kv, instance, step, int(last), cached)
        return chunks, complete, decodes, context

    def _gap(self, until: int) -> None:
        """Records the time since the last segment: without work until a request came, then the loop's own."""
        put, since = self.recorder.put, self.last_end
        if not since or since >= until:
            return
        if self.idle:
            woken = min(max(self.woken or until, since), until)
            put(self.idling, since, woken, _NO_WORK)
            since = woken
        if since < until:
            put(self.between, since, until, _OF_NO_STEP)

    def kept_company(self, end: int) -> None:
        """An empty batch was run, because other data-parallel ranks have work and all meet in collectives."""
        if self.recorder.level[0] >= _STEP_LEVEL:
            self._gap(self.company)
            self.recorder.put(self.idling, self.company, end, _OTHER_RANK)
            self.last_end = end
        self.company = 0

    def executed(self, step: int, begin: int, end: int) -> None:
        """The batch was handed to the rank, which ran or launched it."""
        self.recorder.put(self.execute, begin, end, _pack_tail(self.instance, step))
        self.last_end = end

    def received(self, batch: Any) -> int:
        """Tokens that the requests of a step that verifies drafts have; 0 for any other, which give one each."""
        return sum(map(extract.output_tokens, batch.reqs)) if batch.forward_iter in self.verified else 0

    def updated(self, batch: Any, before: int, begin: int, end: int) -> None:
        """The result of a step was taken in; `before` is what `received` said then.

        Outputs are sent from within: a request's moments are SGLang's own, before the front end can have the token.
        """
        step = batch.forward_iter
        received = self.received(batch) - before
        outcome = self.verified.pop(step, None)
        first_tokens = self.in_flight.pop(step, None)
        if first_tokens:
            for request in first_tokens:
                handle = self.live.get(request.rid)
                if handle and not request.is_retracted:
                    first = _within(request.time_stats.last_prefill_finished_time, begin, end)
                    self.recorder.state(_DECODE, first, handle, self.instance, step, 1)
        if self.ended:
            self.ended = 0
            for request in batch.reqs:
                if request.finished() and request.rid in self.live:
                    last = _within(request.time_stats.completion_time, begin, end)
                    self.free(request, last, step, extract.finish_of(request.finished_reason))
        if first_tokens is None:
            return  # it was no step, or it began while nothing was recorded
        recorder = self.recorder
        if recorder.level[0] >= _STEP_LEVEL and recorder.epoch[0] == self.epoch:
            put, tail = recorder.put, _pack_tail(self.instance, step)
            if self.pipeline and self.last_end:
                put(self.idling, self.last_end, begin, _OTHER_RANK)
            put(self.update, begin, end, tail)
            if outcome is not None:
                accepted = int(outcome.num_correct_drafts)
                tail = _pack_result(self.instance, step, accepted, received, 0, GraphMode.UNKNOWN)
            put(self.step_end, end, 0, tail)
        if not self.live:
            self.idle = True
            self.batch = []  # holds no request beyond its life
        self.last_end = end


def _within(seconds: float, begin: int, end: int) -> int:
    """A moment of SGLang's in ns, if it lies between these; else the end."""
    moment = extract.time_ns(seconds)
    return moment if begin <= moment <= end else end


class _Here:
    """The tracker of this process: there is one if it is a first rank."""

    tracker: Tracker | None = None


# Handlers


def opens_recorder(hook: Hook) -> Around:
    """Scheduler.__init__: this process is a rank, and its groups are ready; the first rank is the engine core too."""

    def before(begin: int) -> None:
        startup.begun(hook.recorder, "scheduler", begin)

    def after(self: Any, server_args: Any, port_args: Any) -> None:
        from sglang.srt.runtime_context import get_parallel
        from sglang.version import __version__

        parallel = get_parallel()
        dp_rank = int(parallel.dp_rank or 0)
        RANK.instance = extract.instance_of(port_args, dp_rank, nodes.shared_token(server_args))
        RANK.rank = extract.rank_of(parallel)
        RANK.per_decode = extract.per_decode(server_args)
        RANK.window = KernelWindow(hook.recorder)
        info = extract.process_info(server_args, self.model_config, parallel, __version__)
        info |= {**extract.limits(self), "data_parallel_rank": dp_rank}
        if extract.is_first(parallel):
            hook.recorder.open("engine_core", {**info, "instance": RANK.instance})
            _Here.tracker = Tracker(hook.recorder, RANK.instance, parallel.pp_size > 1, RANK.per_decode)
        kind = str(info["device"])
        rank = {"rank": RANK.rank, **device_info(kind), **layers.model_info(), **DEVICE.open(kind, hook.recorder)}
        hook.recorder.open("worker", {**info, **rank})
        startup.ready(hook.recorder, "scheduler")

    return Around(before, after)


def add_request(hook: Hook) -> Around:
    """Scheduler._add_request_to_queue: a request enters the queue, for the first time or again."""

    def after(self: Any, req: Any) -> None:
        tracker = _Here.tracker
        since = 0.0 if tracker is None or req.finished() else extract.queued_at(req.time_stats)
        if tracker is not None and since:
            tracker.queued(req, since)

    return Around(after=after)


def wait_for_grammar(hook: Hook) -> Around:
    """GrammarManager.process_req_with_grammar: a request waits for its grammar, which is part of its queue time."""

    def after(req: Any, result: Any) -> None:
        tracker = _Here.tracker
        if tracker is not None and result:
            tracker.queued(req, req.time_stats.scheduler_recv_time, _WAITS_FOR_GRAMMAR)

    return Around(after=after)


def retract(hook: Hook) -> Around:
    """Req.reset_for_retract: a request gives up its KV and will be computed again."""

    def after(self: Any) -> None:
        if _Here.tracker is not None:
            _Here.tracker.preempt(self)

    return Around(after=after)


def abort_output(hook: Hook) -> Around:
    """Scheduler.send_abort_output: a request ends outside a batch: aborted while it waited, or thrown out for good."""

    def after(req: Any) -> None:
        tracker = _Here.tracker
        if tracker is not None:
            tracker.free(req, now(), 0, Finish.ABORT)

    return Around(after=after)


def output_sent(hook: Hook) -> Around:
    """SenderWrapper.send_output before 0.5.23: the same, in what is sent to the tokenizer with its request."""

    def after(output: Any, recv_obj: Any) -> None:
        tracker = _Here.tracker
        if tracker is not None and type(output).__name__ == "AbortReq" and recv_obj is not None:
            tracker.free(recv_obj, now(), 0, Finish.ABORT)

    return Around(after=after)


def completed(hook: Hook) -> Around:
    """SchedulerReqTimeStats.set_completion_time: a request of the batch whose result is taken in has ended."""

    def after() -> None:
        if _Here.tracker is not None:
            _Here.tracker.ended += 1

    return Around(after=after)


def schedule(hook: Hook) -> Around:
    """Scheduler.get_next_batch_to_run: a batch was chosen, or none. Its step's number is known when it is run."""

    def after(self: Any, result: Any, begin: int, end: int) -> None:
        tracker = _Here.tracker
        if tracker is not None:
            batch = getattr(result, "batch_to_run", result)
            if batch is not None:
                tracker.chosen = (batch, begin, end)
            tracker.consider(self, batch, getattr(result, "running_batch", None) or self.running_batch, begin)

    return Around(after=after)


def dp_sync(hook: Hook) -> Around:
    """SchedulerDPAttnAdapter.prepare_mlp_sync_batch: the data-parallel ranks tell each other what they will run."""

    def after(begin: int, end: int) -> None:
        if _Here.tracker is not None:
            _Here.tracker.synced = (begin, end)

    return Around(after=after)


def run_batch(hook: Hook) -> Around:
    """Scheduler.run_batch: a step begins on every rank, and the rank does its part or launches it."""
    recorder, rank = hook.recorder, RANK

    def before(self: Any, batch: Any, begin: int) -> None:
        rank.step = 0
        step, tracker = self.forward_ct + 1, _Here.tracker
        if tracker is not None:
            recorded = tracker.launch(self, batch, step, begin)
        else:
            recorded = recorder.level[0] >= _STEP_LEVEL and extract.is_step(batch)
        if recorded:
            rank.start(step, _tokens(batch), now())

    def after(result: Any, end: int) -> None:
        tracker, step = _Here.tracker, rank.step
        if step and tracker is not None and getattr(result, "accept_lens", None) is not None:
            tracker.verified[step] = result
        _hand_back(recorder, end)

    return on_device(Around(before, after, off=rank.forget), before=DEVICE.step_begins, off=DEVICE.forget)


def launch_sample(hook: Hook) -> Around:
    """Scheduler.launch_batch_sample_if_needed: sampling that had to wait for the last step's tokens (a grammar)."""
    recorder = hook.recorder

    def after(end: int) -> None:
        _hand_back(recorder, end)

    return Around(_launch_sample, after, off=RANK.forget)


def launch_sample_of_current(hook: Hook) -> Around:
    """The same before 0.5.16: the batch is the scheduler's current one."""

    def before(self: Any, batch_result: Any, begin: int) -> None:
        _launch_sample(batch_result, self.cur_batch, begin)

    return Around(before, launch_sample(hook).after, off=RANK.forget)


def _launch_sample(batch_result: Any, cur_batch: Any, begin: int) -> None:
    RANK.step = 0
    if batch_result is not None and batch_result.delay_sample_func is not None and extract.is_step(cur_batch):
        RANK.start(cur_batch.forward_iter, _tokens(cur_batch), begin)


def _hand_back(recorder: Recorder, end: int) -> None:
    step, tracker = RANK.step, _Here.tracker
    if step:
        RANK.end(recorder.put, end)
        if tracker is not None:
            tracker.executed(step, RANK.begin, end)
    elif tracker is not None and tracker.company:
        tracker.kept_company(end)


def _tokens(batch: Any) -> int:
    if batch.forward_mode.is_extend():
        return int(batch.extend_num_tokens)
    return len(batch.reqs) * RANK.per_decode


def process_result(hook: Hook) -> Around:
    """Scheduler.process_batch_result: the step ends. On a device the wait for it is in here."""

    def before(batch: Any) -> int:
        tracker = _Here.tracker
        return tracker.received(batch) if tracker is not None and tracker.verified else 0

    def after(batch: Any, noted: int | None, begin: int, end: int) -> None:
        if _Here.tracker is not None:
            _Here.tracker.updated(batch, noted or 0, begin, end)

    return on_device(Around(before, after), after=DEVICE.fetched)


def stream_output(hook: Hook) -> Around:
    """SchedulerOutputStreamer.stream_output: outputs go to the detokenizer."""
    segment = hook.recorder.segment

    def after(begin: int, end: int) -> None:
        if _Here.tracker is not None:
            segment(_EMIT, begin, end, 0, 0)

    return Around(after=after)


def grammar_mask(hook: Hook) -> Around:
    """SamplingBatchInfo.update_regex_vocab_mask; recorded where there was a mask to fill."""
    segment = hook.recorder.segment

    def after(self: Any, begin: int, end: int) -> None:
        if RANK.step and self.grammars:
            segment(_GRAMMAR, begin, end, 0, 0)

    return Around(after=after)
