"""Hooks in a worker: one rank's part of every step. They fit the V1 model runner and Model Runner V2.

V2 computes the logits while sampling and brings no tokens to the host in the step: there `sample` has the logits in it
and there is no `bookkeep`. On a GPU the host only launches this; when it ran is told by pairs of events around it.
"""

from __future__ import annotations

from _thread import get_ident
from os import getpid
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.around import Around
from stagetrace.instrument.device_pairs import DRAFT, FORWARD, SAMPLE
from stagetrace.instrument.records import HEAD, TAILS, RecordType, header_word
from stagetrace.instrument.stages import BY_NAME, IdleReason

from ..device import device_info
from ..device_time import DeviceTime, on_device
from ..kernel_window import KernelWindow
from . import extract, scheduler, startup
from .scheduler import STEP_ATTRIBUTE

if TYPE_CHECKING:
    from collections.abc import Callable

    from stagetrace.instrument.hooks import Hook

_HEADERS = tuple(
    header_word(RecordType.SEGMENT, BY_NAME[name].id)
    for name in ("rank_step", "prepare", "forward", "sample", "bookkeep", "draft", "verify", "return", "idle")
)
_DUMMY_RUN = header_word(RecordType.SEGMENT, BY_NAME["dummy_run"].id)
_SLEEP = header_word(RecordType.SEGMENT, BY_NAME["sleep"].id)
_WEIGHT_UPDATE = header_word(RecordType.SEGMENT, BY_NAME["weight_update"].id)
_WAITING_FOR_SCHEDULER = int(IdleReason.WAITING_FOR_SCHEDULER)
_pack_head = HEAD.pack
_pack_tail, _pack_longer_tail = TAILS[1].pack, TAILS[2].pack
_NO_WORK = _pack_tail(0, 0, IdleReason.NO_WORK)
_BETWEEN_STEPS = _pack_tail(0, 0, IdleReason.WAITING_FOR_SCHEDULER)


class _Rank:
    """The step that this process's worker is in; a worker takes one step at a time, on one thread."""

    def __init__(self) -> None:
        self.rank = 0
        self.instance = 0
        self.step = 0  # 0: none
        self.tokens = 0  # scheduled in it
        self.at_start: tuple[Callable[[], None], ...] = ()  # called when a step begins, and when it was launched;
        self.at_end: tuple[Callable[[], None], ...] = ()  # they raise nothing
        self.window: KernelWindow | None = None
        self.begin = 0  # of the rank's step
        self.ended = 0  # end of the step before, 0 where nothing was recorded
        self.asleep = 0  # since when; 0: it is awake
        self.alone = False  # no scheduler shares the thread: between two steps the rank does nothing
        self.forwarded = 0  # end of its first half; the second is sampling
        self.forward_begin = 0
        self.sample_end = 0
        self.bookkeep_end = 0
        self.of_rank = self.of_tokens = b""  # tails of the step's segments: with the rank; with its tokens as well
        self.run_on(0)

    def run_on(self, thread: int) -> None:
        """Steps run on this thread: makes the heads of their segments."""
        self.thread = thread
        heads = (_pack_head(header, thread) for header in _HEADERS)
        self.rank_step, self.prepare, self.forward, self.sample, self.bookkeep, *rest = heads
        self.draft, self.verify, self.return_, self.idle = rest
        self.alone = getpid() != scheduler.PROCESS[0]

    def start(self, instance: int, step: int, tokens: int, begin: int) -> None:
        """A step begins, on the thread that calls this."""
        thread = get_ident()
        if thread != self.thread:
            self.run_on(thread)
        self.instance, self.begin = instance, begin
        self.of_rank = _pack_tail(instance, step, self.rank)
        self.of_tokens = _pack_longer_tail(instance, step, self.rank, tokens)
        self.step, self.tokens = step, tokens
        for call in self.at_start:
            call()
        if self.window is not None:
            self.window.step_begins(instance, step, self.rank)

    def finish(self, end: int) -> None:
        """The step is over."""
        for call in self.at_end:
            call()
        if self.window is not None:
            self.window.step_ends()
        self.step, self.ended = 0, end

    def forget(self) -> None:
        """There is no step that is recorded."""
        self.step = self.ended = self.asleep = 0


RANK = _Rank()
DEVICE = DeviceTime(RANK)


def opens_recorder(hook: Hook) -> Around:
    """GPUModelRunner.__init__: this process is a worker, and its device and groups are ready."""

    def after(vllm_config: Any) -> None:
        from vllm import __version__

        RANK.rank = int(vllm_config.parallel_config.rank)
        RANK.window = KernelWindow(hook.recorder)
        info = extract.process_info(vllm_config, __version__)
        kind = str(info["device"])
        device = device_info(kind) | DEVICE.open(kind, hook.recorder)
        hook.recorder.open("worker", {**info, **device, **extract.ranks(vllm_config)})
        startup.flush(hook.recorder)

    return Around(after=after)


def worker_execute_model(hook: Hook) -> Around:
    """Worker.execute_model: the rank's step begins; it ends here when no sampling follows on this rank."""
    put, rank = hook.recorder.put, RANK

    def before(scheduler_output: Any, begin: int) -> None:
        rank.step = 0
        number = getattr(scheduler_output, STEP_ATTRIBUTE, None)
        if number is not None:
            instance, step, idle = number
            rank.start(instance, step, scheduler_output.total_num_scheduled_tokens, begin)
            if rank.ended and rank.alone:
                put(rank.idle, rank.ended, begin, _NO_WORK if idle else _BETWEEN_STEPS)

    def after(result: Any, end: int) -> None:
        rank.forwarded = end
        if result is not None and rank.step:
            put(rank.rank_step, rank.begin, end, rank.of_tokens)
            rank.finish(end)

    return on_device(Around(before, after, off=rank.forget), before=DEVICE.step_begins, off=DEVICE.forget)


def worker_sample_tokens(hook: Hook) -> Around:
    """Worker.sample_tokens: the rank waited to be told, and its step ends."""
    put, rank = hook.recorder.put, RANK

    def after(begin: int, end: int) -> None:
        step = rank.step
        if step:
            put(rank.idle, rank.forwarded, begin, _pack_tail(rank.instance, step, _WAITING_FOR_SCHEDULER))
            put(rank.rank_step, rank.begin, end, rank.of_tokens)
            rank.finish(end)

    return on_device(Around(after=after), after=DEVICE.fetched)


def output_fetched(_: Hook) -> Around:
    """get_output of what a step gave: it has waited for the step, on a thread of its own where steps overlap.

    While another thread captured a graph, asking for an event would break that; so would what the engine does here.
    """
    return on_device(Around(), after=DEVICE.fetched)


def dummy_run(hook: Hook) -> Around:
    """Worker.execute_dummy_batch: a step without requests, because other data-parallel ranks have some."""
    segment, rank = hook.recorder.segment, RANK

    def before() -> None:
        rank.forget()  # the gap around it is not idle

    def after(begin: int, end: int) -> None:
        segment(_DUMMY_RUN, begin, end, 0, 0, rank.rank)

    return Around(before, after)


def runner_execute_model(hook: Hook) -> Around:
    """GPUModelRunner.execute_model: prepare until the model is called, forward from there on, logits included."""
    put, rank = hook.recorder.put, RANK

    def before() -> None:
        rank.forward_begin = 0

    def after(begin: int, end: int) -> None:
        if rank.step:
            forward = rank.forward_begin
            put(rank.prepare, begin, forward or end, rank.of_rank)
            if forward:
                put(rank.forward, forward, end, rank.of_tokens)

    return on_device(Around(before, after), after=DEVICE.ends(FORWARD))


def model_forward(_: Hook) -> Around:
    """What is called right before the model is: where prepare ends."""
    rank = RANK

    def before(begin: int) -> None:
        rank.forward_begin = begin

    return on_device(Around(before), before=DEVICE.begins(FORWARD))


def runner_sample_tokens(hook: Hook) -> Around:
    """GPUModelRunner.sample_tokens: sample, then bookkeep, then return."""
    put, rank = hook.recorder.put, RANK

    def before() -> None:
        rank.sample_end = rank.bookkeep_end = 0

    def after(begin: int, end: int) -> None:
        if rank.step:
            sampled, kept = rank.sample_end, rank.bookkeep_end
            put(rank.sample, begin, sampled or end, rank.of_rank)
            if kept:
                put(rank.bookkeep, sampled, kept, rank.of_rank)
            if sampled:
                put(rank.return_, kept or sampled, end, rank.of_rank)

    return on_device(Around(before, after), before=DEVICE.begins(SAMPLE), after=DEVICE.ends(SAMPLE))


def bookkeeping_sync(_: Hook) -> Around:
    """GPUModelRunner._bookkeeping_sync of V1: where the sampled tokens come to the host."""
    rank = RANK

    def after(begin: int, end: int) -> None:
        rank.sample_end, rank.bookkeep_end = begin, end

    return on_device(Around(after=after), before=DEVICE.ends(SAMPLE))


def sample(_: Hook) -> Around:
    """GPUModelRunner.sample of V2: where sampling ends."""
    rank = RANK

    def after(end: int) -> None:
        rank.sample_end = end

    return on_device(Around(after=after), after=DEVICE.ends(SAMPLE))


def propose_drafts(hook: Hook) -> Around:
    """What proposes speculative tokens: GPUModelRunner.propose_draft_token_ids of V1, a speculator's propose of V2."""
    put, rank = hook.recorder.put, RANK

    def after(begin: int, end: int) -> None:
        if rank.step:
            put(rank.draft, begin, end, rank.of_rank)

    return on_device(Around(after=after), before=DEVICE.begins(DRAFT), after=DEVICE.ends(DRAFT))


def verify_drafts(hook: Hook) -> Around:
    """The RejectionSampler of V1 and of V2: which drafts the model would have sampled."""
    put, rank = hook.recorder.put, RANK

    def after(begin: int, end: int) -> None:
        if rank.step:
            put(rank.verify, begin, end, rank.of_rank)

    return Around(after=after)


def falls_asleep(_: Hook) -> Around:
    """Worker.sleep."""
    rank = RANK

    def before(begin: int) -> None:
        rank.forget()  # the gap around it is not idle
        rank.asleep = begin

    return Around(before)


def wakes_up(hook: Hook) -> Around:
    """Worker.wake_up: with tags it wakes in parts, the last of which ends its sleep; each tells the time until then."""
    segment, rank = hook.recorder.segment, RANK

    def after(tags: Any, end: int) -> None:
        asleep = rank.asleep
        if asleep and not rank.ended:  # no step since
            segment(_SLEEP, asleep, end, 0, 0)
            rank.asleep = 0 if tags is None else end

    return Around(after=after, off=rank.forget)


def weights_updated(hook: Hook) -> Around:
    """What replaces weights, or a part of them, in a running engine."""
    segment = hook.recorder.segment

    def after(begin: int, end: int) -> None:
        segment(_WEIGHT_UPDATE, begin, end, 0, 0)

    return Around(after=after)
