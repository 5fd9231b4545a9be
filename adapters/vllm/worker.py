"""Hooks in a worker: one rank's part of every step. They fit the V1 model runner and Model Runner V2.

V2 computes the logits while sampling and brings no tokens to the host in the step: there `sample` has the logits in it
and there is no `bookkeep`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stagetrace.instrument.recorder import now
from stagetrace.instrument.records import RecordType, header_word
from stagetrace.instrument.stages import BY_NAME, IdleReason

from . import extract
from .scheduler import STEP_ATTRIBUTE

if TYPE_CHECKING:
    from collections.abc import Callable

    from stagetrace.instrument.hooks import Hook
    from stagetrace.instrument.recorder import Recorder

_RANK_STEP = header_word(RecordType.SEGMENT, BY_NAME["rank_step"].id)
_PREPARE = header_word(RecordType.SEGMENT, BY_NAME["prepare"].id)
_FORWARD = header_word(RecordType.SEGMENT, BY_NAME["forward"].id)
_SAMPLE = header_word(RecordType.SEGMENT, BY_NAME["sample"].id)
_BOOKKEEP = header_word(RecordType.SEGMENT, BY_NAME["bookkeep"].id)
_IDLE = header_word(RecordType.SEGMENT, BY_NAME["idle"].id)
_RETURN = header_word(RecordType.SEGMENT, BY_NAME["return"].id)


class _Rank:
    """The step that this process's worker is in; a worker takes one step at a time, on one thread."""

    rank = 0
    instance = 0
    step = 0  # 0: none
    tokens = 0
    begin = 0  # of the rank's step
    forwarded = 0  # end of its first half; the second is sampling
    forward_begin = 0
    sample_end = 0
    bookkeep_end = 0

    def close(self, recorder: Recorder, end: int) -> None:
        """Writes the rank's step."""
        recorder.segment(_RANK_STEP, self.begin, end, self.instance, self.step, self.rank, self.tokens)
        self.step = 0


RANK = _Rank()


def opens_recorder(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """GPUModelRunner.__init__: this process is a worker, and its device and groups are ready."""

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, vllm_config, *args, **kwargs)
        try:
            from vllm import __version__

            RANK.rank = int(vllm_config.parallel_config.rank)
            info = extract.process_info(vllm_config, __version__)
            hook.recorder.open("worker", {**info, "rank": RANK.rank})
        except Exception:
            hook.failed()

    return __init__


def worker_execute_model(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """Worker.execute_model: the rank's step begins; it ends here when no sampling follows on this rank."""
    recorder = hook.recorder
    rank = RANK

    def wrapper(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.level[0] < hook.threshold:
            rank.step = 0
            return original(self, scheduler_output, *args, **kwargs)
        try:
            rank.instance, rank.step = getattr(scheduler_output, STEP_ATTRIBUTE, (0, 0))
            rank.tokens = scheduler_output.total_num_scheduled_tokens
        except Exception:
            rank.step = 0
            hook.failed()
        rank.begin = now()
        result = original(self, scheduler_output, *args, **kwargs)
        rank.forwarded = now()
        if result is not None and rank.step:
            try:
                recorder.segment(
                    _RANK_STEP, rank.begin, rank.forwarded, rank.instance, rank.step, rank.rank, rank.tokens
                )
                rank.step = 0
            except Exception:
                hook.failed()
        return result

    return wrapper


def worker_sample_tokens(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """Worker.sample_tokens: the rank waited to be told, and its step ends."""
    recorder = hook.recorder
    rank = RANK

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not rank.step or recorder.level[0] < hook.threshold:
            return original(self, *args, **kwargs)
        begin = now()
        result = original(self, *args, **kwargs)
        if rank.step:
            try:
                reason = IdleReason.WAITING_FOR_SCHEDULER
                recorder.segment(_IDLE, rank.forwarded, begin, rank.instance, rank.step, reason)
                rank.close(recorder, now())
            except Exception:
                hook.failed()
        return result

    return wrapper


def runner_execute_model(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """GPUModelRunner.execute_model: prepare until the model is called, forward from there on, logits included."""
    recorder = hook.recorder
    rank = RANK

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not rank.step or recorder.level[0] < hook.threshold:
            return original(self, *args, **kwargs)
        rank.forward_begin = 0
        begin = now()
        result = original(self, *args, **kwargs)
        end = now()
        try:
            forward = rank.forward_begin or end
            recorder.segment(_PREPARE, begin, forward, rank.instance, rank.step, rank.rank)
            if rank.forward_begin:
                recorder.segment(_FORWARD, forward, end, rank.instance, rank.step, rank.rank, rank.tokens)
        except Exception:
            hook.failed()
        return result

    return wrapper


def model_forward(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """What is called right before the model is: where prepare ends."""
    recorder = hook.recorder
    rank = RANK

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if rank.step and recorder.level[0] >= hook.threshold:
            rank.forward_begin = now()
        return original(self, *args, **kwargs)

    return wrapper


def runner_sample_tokens(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """GPUModelRunner.sample_tokens: sample, then bookkeep, then return."""
    recorder = hook.recorder
    rank = RANK

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not rank.step or recorder.level[0] < hook.threshold:
            return original(self, *args, **kwargs)
        rank.sample_end = rank.bookkeep_end = 0
        begin = now()
        result = original(self, *args, **kwargs)
        end = now()
        try:
            ids = (rank.instance, rank.step, rank.rank)
            sampled = rank.sample_end or end
            recorder.segment(_SAMPLE, begin, sampled, *ids)
            if rank.bookkeep_end:
                recorder.segment(_BOOKKEEP, sampled, rank.bookkeep_end, *ids)
            if rank.sample_end:
                recorder.segment(_RETURN, rank.bookkeep_end or sampled, end, *ids)
        except Exception:
            hook.failed()
        return result

    return wrapper


def bookkeeping_sync(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """GPUModelRunner._bookkeeping_sync of V1: where the sampled tokens come to the host."""
    recorder = hook.recorder
    rank = RANK

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not rank.step or recorder.level[0] < hook.threshold:
            return original(self, *args, **kwargs)
        rank.sample_end = now()
        result = original(self, *args, **kwargs)
        rank.bookkeep_end = now()
        return result

    return wrapper


def sample(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """GPUModelRunner.sample of V2: where sampling ends."""
    recorder = hook.recorder
    rank = RANK

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if rank.step and recorder.level[0] >= hook.threshold:
            rank.sample_end = now()
        return result

    return wrapper
