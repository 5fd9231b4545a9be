"""Hooks in the engine core: steps, what is in them, and the states that requests take in the scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stagetrace.instrument.ids import new_instance
from stagetrace.instrument.recorder import now
from stagetrace.instrument.records import Change, Event, RecordType, header_word
from stagetrace.instrument.stages import BY_NAME, IdleReason, Level

from . import extract

if TYPE_CHECKING:
    from collections.abc import Callable

    from stagetrace.instrument.hooks import Hook
    from stagetrace.instrument.recorder import Recorder

STEP_ATTRIBUTE = "_stagetrace"  # on a SchedulerOutput: (engine instance, step); the executor's pickling keeps it
SNAPSHOT_EVERY = 128  # steps
_MOST_IN_FLIGHT = 64  # steps whose update never came are forgotten beyond this

_SCHEDULE = header_word(RecordType.SEGMENT, BY_NAME["schedule"].id)
_EXECUTE = header_word(RecordType.SEGMENT, BY_NAME["execute"].id)
_UPDATE = header_word(RecordType.SEGMENT, BY_NAME["update"].id)
_GRAMMAR = header_word(RecordType.SEGMENT, BY_NAME["grammar"].id)
_BETWEEN = header_word(RecordType.SEGMENT, BY_NAME["between"].id)
_IDLE = header_word(RecordType.SEGMENT, BY_NAME["idle"].id)
_QUEUE = header_word(RecordType.STATE, BY_NAME["queue"].id)
_PREFILL = header_word(RecordType.STATE, BY_NAME["prefill"].id)
_DECODE = header_word(RecordType.STATE, BY_NAME["decode"].id)
_PREEMPTED = header_word(RecordType.STATE, BY_NAME["preempted"].id)
_FINISHED = header_word(RecordType.EVENT, Event.FINISHED)
_JOIN = header_word(RecordType.MEMBER, Change.JOIN)
_LEAVE = header_word(RecordType.MEMBER, Change.LEAVE)
_CHUNK = header_word(RecordType.MEMBER, Change.CHUNK)


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
        self.in_flight: dict[int, tuple[int, tuple[str, ...]]] = {}  # step -> end of schedule, who gets a first token
        self.finished: list[tuple[int, tuple[int, ...]]] | None = None  # held back while in update
        self.last_end = 0  # end of the last segment on this timeline
        self.idle = False  # no request was left then
        self.preempted = 0  # since the last step
        self.snapshot_at = 0  # step at which the next snapshot is due
        self.dropped = 0  # control records, as far as a snapshot has made up for them
        self.epoch = recorder.epoch[0]

    def resume(self, scheduler: Any) -> None:
        """The level was switched: what happened since the last record is not known, so it is taken from the engine."""
        self.epoch = self.recorder.epoch[0]
        self.handles = {request_id: self.recorder.handle(request_id) for request_id in scheduler.requests}
        self.prefilling = {
            request.request_id: request.num_tokens for request in scheduler.running if not request.num_output_tokens
        }
        self.batch = []
        self.last_end = self.preempted = self.snapshot_at = 0

    # Requests

    def queued(self, request: Any) -> None:
        """A request was taken into the waiting queue."""
        handle = self.handles[request.request_id] = self.recorder.handle(request.request_id)
        self.recorder.state(_QUEUE, now(), handle, self.instance, 0, request.num_prompt_tokens)

    def preempt(self, request: Any) -> None:
        """A request was thrown out of the running batch."""
        handle = self.handles.get(request.request_id)
        if handle is not None:
            self.preempted += 1
            self.prefilling.pop(request.request_id, None)
            self.recorder.state(_PREEMPTED, now(), handle, self.instance, self.step, request.num_output_tokens)

    def free(self, request: Any) -> None:
        """A request ended, for whatever reason. In update the time is that of its last token: update's end."""
        handle = self.handles.pop(request.request_id, None)
        self.prefilling.pop(request.request_id, None)
        if handle is None:
            return
        words = (
            int(extract.finish_of_status(request.status)),
            request.num_output_tokens,
            request.num_prompt_tokens,
            request.num_preemptions,
        )
        if self.finished is not None:
            self.finished.append((handle, words))
        else:
            self.recorder.state(_FINISHED, now(), handle, self.instance, self.step, *words)

    # Steps

    def scheduled(self, scheduler: Any, output: Any, begin: int, end: int) -> None:
        """A batch was chosen."""
        if not output.total_num_scheduled_tokens:
            return  # a flush of finished requests: no step, its time is `between`
        recorder = self.recorder
        if recorder.epoch[0] != self.epoch:
            self.resume(scheduler)
        deep = recorder.level[0] >= Level.STEP
        self.step = step = self.step + 1
        instance = self.instance
        setattr(output, STEP_ATTRIBUTE, (instance, step))
        chunks, first_tokens = self._prefill(scheduler, output, begin, deep)
        if len(self.in_flight) >= _MOST_IN_FLIGHT:
            self.in_flight.clear()
        self.in_flight[step] = (end, first_tokens)
        if deep:
            words = extract.composition(
                output,
                chunks,
                waiting=len(scheduler.waiting),
                running=len(scheduler.running),
                kv_usage=scheduler.kv_cache_manager.usage,
                preempted=self.preempted,
            )
            self._membership(output)
            recorder.step_begin(begin, end, instance, step, words)
            if self.last_end:
                recorder.segment(
                    _IDLE if self.idle else _BETWEEN, self.last_end, begin, 0, 0, self.idle and IdleReason.NO_WORK
                )
            recorder.segment(_SCHEDULE, begin, end, instance, step)
        else:
            self.snapshot_at = 0
        self.preempted = 0
        self.idle = False
        self.last_end = now() if deep else end

    def _prefill(
        self, scheduler: Any, output: Any, begin: int, deep: bool
    ) -> tuple[list[tuple[int, int, int]], tuple[str, ...]]:
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
            again = 1 if request.num_preemptions else 0
            cached = cached_of.get(request_id, 0)
            self.recorder.state(_PREFILL, begin, handle, self.instance, self.step, cached, again)
        if not self.prefilling:
            return [], ()
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
        return chunks, tuple(complete)

    def _membership(self, output: Any) -> None:
        """Records who takes part in the step and did not in the last one, and the reverse; at times everybody."""
        running, new = output.scheduled_cached_reqs.req_ids, output.scheduled_new_reqs
        recorder, instance, step = self.recorder, self.instance, self.step
        handles = self.handles
        due = step >= self.snapshot_at
        if recorder.dropped[0] != self.dropped:  # what was lost may have been a change: tell everything
            self.dropped = recorder.dropped[0]
            due = True
        if new or running != self.batch:  # in steady decode equal, at the cost of comparing pointers
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
            members = [handles.get(request_id) or recorder.handle(request_id) for request_id in self.batch]
            written = recorder.snapshot(instance, step, members)
            self.snapshot_at = step + (SNAPSHOT_EVERY if written else 1)

    def update_begins(self, output: Any, begin: int) -> None:
        """The step's results are being taken in: requests that end from here on end with it."""
        step = getattr(output, STEP_ATTRIBUTE, None)
        if step is not None:
            self.finished = []

    def updated(self, scheduler: Any, output: Any, begin: int, end: int) -> None:
        """The step is over."""
        instance, step = getattr(output, STEP_ATTRIBUTE, (0, 0))
        if not step:
            return
        recorder = self.recorder
        scheduled_end, first_tokens = self.in_flight.pop(step, (0, ()))
        finished = self.finished or ()
        for request_id in first_tokens:
            handle = self.handles.get(request_id)
            if handle is None:
                handle = recorder.handle(request_id)
                if not any(handle == ended for ended, _ in finished):
                    continue  # it was aborted while the step ran: no token
            recorder.state(_DECODE, end, handle, instance, step, 1)
        for handle, words in finished:
            recorder.state(_FINISHED, end, handle, instance, step, *words)
        self.finished = None
        if recorder.level[0] >= Level.STEP and scheduled_end:
            recorder.segment(_EXECUTE, max(self.last_end, scheduled_end), begin, instance, step)
            recorder.segment(_UPDATE, begin, end, instance, step)
            recorder.step_end(end, instance, step)
        self.idle = not scheduler.requests
        self.last_end = end


def tracker_of(scheduler: Any, recorder: Recorder) -> Tracker:
    """The scheduler's tracker, made on first use."""
    tracker: Tracker | None = scheduler.__dict__.get(STEP_ATTRIBUTE)
    if tracker is None:
        tracker = scheduler.__dict__[STEP_ATTRIBUTE] = Tracker(recorder)
    return tracker


# Handlers: original and hook in, wrapper out


def opens_recorder(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """Scheduler.__init__: this process is an engine core."""

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, vllm_config, *args, **kwargs)
        try:
            from vllm import __version__

            tracker = tracker_of(self, hook.recorder)
            info = extract.process_info(vllm_config, __version__)
            hook.recorder.open("engine_core", {**info, "instance": tracker.instance})
        except Exception:
            hook.failed()

    return __init__


def schedule(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """Scheduler.schedule: a step begins."""
    recorder = hook.recorder

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.level[0] < hook.threshold:
            return original(self, *args, **kwargs)
        begin = now()
        output = original(self, *args, **kwargs)
        end = now()
        try:
            tracker_of(self, recorder).scheduled(self, output, begin, end)
        except Exception:
            hook.failed()
        return output

    return wrapper


def update_from_output(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """Scheduler.update_from_output: the step ends."""
    recorder = hook.recorder

    def wrapper(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.level[0] < hook.threshold:
            return original(self, scheduler_output, *args, **kwargs)
        begin = now()
        try:
            tracker_of(self, recorder).update_begins(scheduler_output, begin)
        except Exception:
            hook.failed()
        result = original(self, scheduler_output, *args, **kwargs)
        end = now()
        try:
            tracker_of(self, recorder).updated(self, scheduler_output, begin, end)
        except Exception:
            hook.failed()
        return result

    return wrapper


def add_request(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """Scheduler.add_request: a request enters the queue. A further input of a streaming session is no new request."""
    recorder = hook.recorder

    def wrapper(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.level[0] < hook.threshold:
            return original(self, request, *args, **kwargs)
        result = original(self, request, *args, **kwargs)
        try:
            tracker = tracker_of(self, recorder)
            if request.request_id not in tracker.handles:
                tracker.queued(request)
        except Exception:
            hook.failed()
        return result

    return wrapper


def preempt_request(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """Scheduler._preempt_request."""
    recorder = hook.recorder

    def wrapper(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, request, *args, **kwargs)
        if recorder.level[0] >= hook.threshold:
            try:
                tracker_of(self, recorder).preempt(request)
            except Exception:
                hook.failed()
        return result

    return wrapper


def free_request(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """Scheduler._free_request: the one place that every request's end passes."""
    recorder = hook.recorder

    def wrapper(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.level[0] >= hook.threshold:
            try:
                tracker_of(self, recorder).free(request)
            except Exception:
                hook.failed()
        return original(self, request, *args, **kwargs)

    return wrapper


def grammar_bitmask(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """Scheduler.get_grammar_bitmask; recorded where there was a mask to fill."""
    recorder = hook.recorder

    def wrapper(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.level[0] < hook.threshold:
            return original(self, scheduler_output, *args, **kwargs)
        begin = now()
        result = original(self, scheduler_output, *args, **kwargs)
        if result is not None:
            end = now()
            try:
                instance, step = getattr(scheduler_output, STEP_ATTRIBUTE, (0, 0))
                recorder.segment(_GRAMMAR, begin, end, instance, step)
            except Exception:
                hook.failed()
        return result

    return wrapper
