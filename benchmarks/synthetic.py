"""An engine on paper: front end, engine core and workers that write what the hooks on vLLM write, and compute nothing.

    python synthetic.py [--batch N] [--workers N] [--output-tokens N] --steps-per-second N --seconds S

As a program it opens its rings in the session that STAGETRACE_SESSION names and records in real time. The processes are
recorders with rings of their own in one process; every batch is full, and who ends is followed by the next request.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from typing import TYPE_CHECKING

from stagetrace.instrument.ids import new_instance
from stagetrace.instrument.recorder import Recorder
from stagetrace.instrument.records import Change, Event, RecordType, Text, header_word
from stagetrace.instrument.stages import BY_NAME, STEP_COMPOSITION, Finish

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT_TOKENS = 512
SNAPSHOT_EVERY = 128  # steps
_US = 1_000


def _segment(name: str) -> int:
    return header_word(RecordType.SEGMENT, BY_NAME[name].id)


def _state(name: str) -> int:
    return header_word(RecordType.STATE, BY_NAME[name].id)


_BETWEEN, _SCHEDULE, _EXECUTE, _UPDATE = (_segment(name) for name in ("between", "schedule", "execute", "update"))
_RANK_STEP = _segment("rank_step")
_RANK = [(_segment(name), share) for name, share in
         (("prepare", 10), ("forward", 60), ("sample", 10), ("bookkeep", 5), ("return", 5))]  # fmt: skip
_DETOKENIZE = _segment("detokenize")
_TOKENIZE, _DISPATCH, _QUEUE, _PREFILL, _DECODE = (
    _state(name) for name in ("request_tokenize", "request_dispatch", "queue", "prefill", "decode")
)
_FIRST_OUTPUT, _FIRST_SENT, _LAST_OUTPUT, _LAST_SENT, _FINISHED = (
    header_word(RecordType.EVENT, event)
    for event in (Event.FIRST_OUTPUT, Event.FIRST_SENT, Event.LAST_OUTPUT, Event.LAST_SENT, Event.FINISHED)
)
_JOIN, _LEAVE, _CHUNK = (header_word(RecordType.MEMBER, change) for change in (Change.JOIN, Change.LEAVE, Change.CHUNK))
_NAMES = [attribute.name for attribute in STEP_COMPOSITION]


class Engine:
    """One engine at a steady load. `now` is the engine's own clock, ns: the caller may move it."""

    def __init__(self, batch: int, workers: int, output_tokens: int, now: int = 1_000_000_000):
        self.instance = new_instance()
        self.width, self.output_tokens, self.now = batch, output_tokens, now
        self.step = 0
        self.step_us = 5_000
        self.numbers = itertools.count()
        self.chance = random.Random(batch * 1_000 + workers)
        self.front, self.core = Recorder(), Recorder()
        self.workers = [Recorder() for _ in range(workers)]
        info = {"engine": "synthetic", "engine_version": "1", "model": "none"}
        opened = [
            self.front.open("front_end", info),
            self.core.open("engine_core", {**info, "instance": self.instance, "world_size": workers}),
            *(worker.open("worker", {**info, "rank": rank}) for rank, worker in enumerate(self.workers)),
        ]
        if not all(opened):
            raise SystemExit("a recorder could not be opened: its message is above")
        self.left: dict[int, int] = {}  # request in the batch -> tokens to come
        # The first batch is as old as one at a steady load is, so that requests do not all end in one step.
        for place in range(batch):
            handle = self._arrive()
            self.left[handle] = 1 + place * output_tokens // batch
        self.fresh = dict.fromkeys(self.left, 0)
        self.ended: list[int] = []

    @property
    def recorders(self) -> list[Recorder]:
        """One a process."""
        return [self.front, self.core, *self.workers]

    def _arrive(self) -> int:
        name = f"cmpl-{next(self.numbers):032x}-0"
        handle, front, at = self.front.handle(name), self.front, self.now - 300 * _US
        front.text(handle, Text.REQUEST_ID, name)
        front.text(handle, Text.EXTERNAL_ID, name[5:])
        front.state(_TOKENIZE, at, handle, 0, 0, PROMPT_TOKENS, self.output_tokens, 1)
        front.state(_DISPATCH, at + 100 * _US, handle, 0, 0, PROMPT_TOKENS)
        self.core.state(_QUEUE, at + 200 * _US, handle, self.instance, 0, PROMPT_TOKENS)
        return handle

    def run_step(self) -> None:
        """Records one step: prefill of who is new, a token for everybody; and requests that end, and come."""
        self.step += 1
        core, step, instance, period = self.core, self.step, self.instance, self.step_us * _US
        # Times as uneven as an engine's: with even ones Parquet would make nearly nothing of them.
        begin = self.now + self.chance.randrange(period // 40)
        busy = round(period * self.chance.uniform(0.8, 0.95))
        scheduled, done, end = begin + busy * 4 // 100, begin + busy * 90 // 100, begin + busy * 97 // 100
        for handle in self.fresh:
            core.state(_PREFILL, begin, handle, instance, step, 0, 0)
            core.member(_CHUNK, handle, PROMPT_TOKENS, PROMPT_TOKENS, instance, step, 1, 0)
        for handle in self.ended:
            core.member(_LEAVE, handle, 0, 0, instance, step)
        for handle in self.fresh:
            core.member(_JOIN, handle, 0, 0, instance, step)
        if step % SNAPSHOT_EVERY == 1:
            core.snapshot(instance, step, self.left)
        tokens = PROMPT_TOKENS * len(self.fresh)
        words = {"prefill_requests": len(self.fresh), "prefill_tokens": tokens, "running": len(self.left),
                 "decode_requests": self.width - len(self.fresh), "decode_tokens": self.width - len(self.fresh),
                 "decode_context": 600 * self.width, "kv_usage": 100_000 + step % 1_000}  # fmt: skip
        core.step_begin(begin, scheduled, instance, step, [words.get(name, 0) for name in _NAMES])
        core.segment(_BETWEEN, begin - busy * 2 // 100, begin, 0, 0)
        core.segment(_SCHEDULE, begin, scheduled, instance, step)
        for rank, worker in enumerate(self.workers):
            at = scheduled + (20 + rank) * _US
            for header, share in _RANK:
                until = at + round(busy * share * self.chance.uniform(0.007, 0.008))
                worker.segment(header, at, until, instance, step, rank, *((self.width,) if share == 60 else ()))
                at = until
            worker.segment(_RANK_STEP, scheduled + (10 + rank) * _US, at + 5 * _US, instance, step, rank, self.width)
        for handle in self.fresh:
            core.state(_DECODE, end, handle, instance, step, 1)
        over = [handle for handle, left in self.left.items() if left == 1]
        finish = (Finish.LENGTH, self.output_tokens, PROMPT_TOKENS, 0)
        for handle in over:
            core.state(_FINISHED, end, handle, instance, step, *finish)
        core.segment(_EXECUTE, scheduled, done, instance, step)
        core.segment(_UPDATE, done, end, instance, step)
        core.step_end(end, instance, step)
        self._send(end + 20 * _US, over, finish)
        self.left = {handle: left - 1 for handle, left in self.left.items() if left > 1}
        self.ended = over
        self.now += period
        self.fresh = {self._arrive(): self.output_tokens for _ in over}
        self.left |= self.fresh

    def _send(self, at: int, over: list[int], finish: tuple[int, ...]) -> None:
        for handle in self.fresh:
            self.front.state(_FIRST_OUTPUT, at, handle)
            self.front.state(_FIRST_SENT, at + 40 * _US, handle)
        self.front.segment(_DETOKENIZE, at, at + 60 * _US, 0, 0, self.width)
        for handle in over:
            self.front.state(_LAST_OUTPUT, at + 10 * _US, handle, 0, 0, *finish)
            self.front.state(_LAST_SENT, at + 50 * _US, handle)


def in_real_time(engine: Engine, steps_per_second: float, seconds: float, tell: Callable[[], None]) -> None:
    """Records at that rate; `tell` is called after each step."""
    engine.step_us = round(1e6 / steps_per_second)
    start = engine.now
    while engine.now - start < seconds * 1e9:
        time.sleep(max(0.0, (engine.now - time.monotonic_ns()) / 1e9))
        engine.run_step()
        tell()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--steps-per-second", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    engine = Engine(options.batch, options.workers, options.output_tokens, time.monotonic_ns())
    in_real_time(engine, options.steps_per_second, options.seconds, lambda: None)
    print(engine.step, flush=True)


if __name__ == "__main__":
    main()
