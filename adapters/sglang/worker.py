"""Hooks in a rank: its part of every step, from what the scheduler hands over until the result is back.

Scheduler and worker of a rank share a process and a thread. With overlap the host only launches the work here: on a
device that runs by itself a step's forward pass goes on after its rank_step; when it ran is told by pairs of events.
"""

from __future__ import annotations

from _thread import get_ident
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.around import Around
from stagetrace.instrument.device_pairs import DRAFT, FORWARD, SAMPLE
from stagetrace.instrument.records import HEAD, TAILS, RecordType, header_word
from stagetrace.instrument.stages import BY_NAME

from ..device_time import DeviceTime, built, on_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from stagetrace.instrument.hooks import Hook

    from ..kernel_window import KernelWindow

_HEADERS = tuple(
    header_word(RecordType.SEGMENT, BY_NAME[name].id)
    for name in ("rank_step", "prepare", "forward", "sample", "return", "draft", "verify")
)
_pack_head = HEAD.pack
_pack_tail, _pack_longer_tail = TAILS[1].pack, TAILS[2].pack


class _Rank:
    """The step that this process's rank is in; a rank takes one step at a time, on one thread."""

    def __init__(self) -> None:
        self.rank = 0
        self.instance = 0  # of the scheduler; 0: it is not known
        self.step = 0  # 0: none
        self.tokens = 0  # computed in it
        self.per_decode = 1  # tokens of a request in a decode step: with speculation its last one and the drafts
        self.batch: Any = None  # ForwardBatch of its forward pass
        self.at_start: tuple[Callable[[], None], ...] = ()  # called around every forward pass of the model, on its
        self.at_end: tuple[Callable[[], None], ...] = ()  # stream; they raise nothing
        self.window: KernelWindow | None = None
        self.begin = 0  # of the rank's step
        self.reached = 0  # end of the last segment in it
        self.of_rank = self.of_tokens = b""  # tails of the step's segments: with the rank; with its tokens as well
        self.run_on(0)

    def run_on(self, thread: int) -> None:
        """Steps run on this thread: makes the heads of their segments."""
        self.thread = thread
        heads = (_pack_head(header, thread) for header in _HEADERS)
        self.rank_step, self.prepare, self.forward, self.sample, self.return_, self.draft, self.verify = heads

    def start(self, step: int, tokens: int, begin: int) -> None:
        """A step begins, on the thread that calls this."""
        thread = get_ident()
        if thread != self.thread:
            self.run_on(thread)
        self.begin, self.reached = begin, 0
        self.of_rank = _pack_tail(self.instance, step, self.rank)
        self.of_tokens = _pack_longer_tail(self.instance, step, self.rank, tokens)
        self.step, self.tokens = step, tokens
        if self.window is not None:
            self.window.step_begins(self.instance, step, self.rank)

    def end(self, put: Callable[[bytes, int, int, bytes], None], end: int) -> None:
        """The step is handed back; `put` writes a segment."""
        if self.reached:
            put(self.return_, self.reached, end, self.of_rank)
        put(self.rank_step, self.begin, end, self.of_tokens)
        if self.window is not None:
            self.window.step_ends()
        self.step, self.batch = 0, None

    def forget(self) -> None:
        """There is no step that is recorded."""
        self.step, self.batch = 0, None


RANK = _Rank()
DEVICE = DeviceTime(RANK)
_begins, _ends = ([of(stage) for stage in (FORWARD, SAMPLE, DRAFT)] for of in (DEVICE.begins, DEVICE.ends))


def forward(hook: Hook) -> Around:
    """ModelRunner.forward: what came before it in the step is prepare. A draft model's passes are draft."""
    put, rank = hook.recorder.put, RANK

    def before(self: Any, forward_batch: Any, begin: int) -> None:
        if rank.step and not rank.reached:
            put(rank.prepare, rank.begin, begin, rank.of_rank)
        if not self.is_draft_worker:
            rank.batch = forward_batch
            for call in rank.at_start:
                call()

    def after(self: Any, begin: int, end: int) -> None:
        if not self.is_draft_worker:
            for call in rank.at_end:
                call()
            rank.batch = None
        if rank.step:
            if self.is_draft_worker:
                put(rank.draft, begin, end, rank.of_rank)
            else:
                put(rank.forward, begin, end, rank.of_tokens)
            rank.reached = end

    if not built():
        return Around(before, after)

    def before_on_device(self: Any, forward_batch: Any, begin: int) -> None:
        before(self, forward_batch, begin)
        _begins[DRAFT if self.is_draft_worker else FORWARD]()

    def after_on_device(self: Any, begin: int, end: int) -> None:
        _ends[DRAFT if self.is_draft_worker else FORWARD]()
        after(self, begin, end)

    return Around(before_on_device, after_on_device)


def sample(hook: Hook) -> Around:
    """ModelRunner.sample: tokens from logits; later than the forward pass where a grammar waits for the last tokens."""
    put, rank = hook.recorder.put, RANK

    def after(begin: int, end: int) -> None:
        if rank.step:
            put(rank.sample, begin, end, rank.of_rank)
            rank.reached = end

    return on_device(Around(after=after), before=_begins[SAMPLE], after=_ends[SAMPLE])


def verify(hook: Hook) -> Around:
    """eagle_sample: which drafts the model would have sampled, from its logits; then what it samples after them."""
    put, rank = hook.recorder.put, RANK

    def after(begin: int, end: int) -> None:
        if rank.step:
            put(rank.verify, begin, end, rank.of_rank)
            rank.reached = end

    return Around(after=after)
