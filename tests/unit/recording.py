"""An instrumented process without an engine: it opens the recorder and writes requests and steps, as hooks would.

    python recording.py [--requests N] [--pause S] [--steady] [--long] [--open N] [--until FILE] [--die] [--role NAME]

Records N finished requests, S seconds apart, then some that stay open; prints one line when that is done and, with
--until, lives on until FILE exists. With --steady it goes on with finished requests until then, with --long one more
request has its prefill before them and its decode after them. With --die it ends by SIGKILL.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

from stagetrace.instrument.ids import new_instance
from stagetrace.instrument.recorder import RECORDER, now
from stagetrace.instrument.records import Change, Event, RecordType, Text, header_word
from stagetrace.instrument.stages import BY_NAME, STEP_COMPOSITION, Finish

PROMPT_TOKENS = 40
OUTPUT_TOKENS = 5  # one of the prefill's step, the others of a decode step each
STEPS = OUTPUT_TOKENS  # of each request


class Engine:
    """A scheduler and a worker in one thread, with one request in a step; they compute nothing."""

    def __init__(self, role: str):
        self.instance = new_instance()
        self.step = 0
        self.role = role
        info = {"engine": "none", "engine_version": "1", "model": "none", "instance": self.instance, "world_size": 1}
        if not RECORDER.open(role, info):
            raise SystemExit("the recorder could not be opened")

    def prefill(self, number: int) -> int:
        """Records a request up to its first token. Returns its handle."""
        name = f"{self.role}-{os.getpid()}-{number}"
        handle = RECORDER.handle(name)
        RECORDER.text(handle, Text.REQUEST_ID, name)
        self._state("request_tokenize", handle, PROMPT_TOKENS, OUTPUT_TOKENS, 0)
        self._state("request_dispatch", handle, PROMPT_TOKENS)
        self._state("queue", handle, PROMPT_TOKENS)
        self._state("prefill", handle, 0, 0)
        member = (handle, PROMPT_TOKENS, PROMPT_TOKENS, self.instance, self.step + 1, 1, 0)
        RECORDER.member(header_word(RecordType.MEMBER, Change.CHUNK), *member)
        self._run_step({"prefill_requests": 1, "prefill_tokens": PROMPT_TOKENS}, handle)
        self._state("decode", handle, 1)
        return handle

    def decode(self, handle: int, finish: bool = True) -> None:
        """Records the rest of a request; without `finish` it stays in decode, and its last step open."""
        for _ in range(OUTPUT_TOKENS - 2):
            self._run_step({"decode_requests": 1, "decode_tokens": 1}, handle)
        self._run_step({"decode_requests": 1, "decode_tokens": 1}, handle, end=finish)
        if finish:
            self._event(Event.FINISHED, handle, Finish.LENGTH, OUTPUT_TOKENS, PROMPT_TOKENS, 0)
            self._event(Event.FIRST_OUTPUT, handle)
            self._event(Event.LAST_OUTPUT, handle, Finish.LENGTH, OUTPUT_TOKENS, PROMPT_TOKENS, 0)

    def _state(self, stage: str, handle: int, *words: int) -> None:
        RECORDER.state(
            header_word(RecordType.STATE, BY_NAME[stage].id), now(), handle, self.instance, self.step, *words
        )

    def _event(self, event: Event, handle: int, *words: int) -> None:
        RECORDER.state(header_word(RecordType.EVENT, event), now(), handle, self.instance, self.step, *words)

    def _run_step(self, composition: dict[str, int], handle: int, end: bool = True) -> None:
        self.step += 1
        begin = now()
        RECORDER.snapshot(self.instance, self.step, [handle])
        scheduled = now()
        words = [composition.get(attribute.name, 0) for attribute in STEP_COMPOSITION]
        RECORDER.step_begin(begin, scheduled, self.instance, self.step, words)
        self._segment("schedule", begin, scheduled)
        if not end:
            return
        started = now()
        self._segment("forward", started, now(), 0, 1)
        self._segment("rank_step", started, now(), 0, 1)
        self._segment("execute", scheduled, updating := now())
        ended = now()
        self._segment("update", updating, ended)
        RECORDER.step_end(ended, self.instance, self.step)

    def _segment(self, stage: str, begin: int, end: int, *words: int) -> None:
        header = header_word(RecordType.SEGMENT, BY_NAME[stage].id)
        RECORDER.segment(header, begin, end, self.instance, self.step, *words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--open", type=int, default=0)
    parser.add_argument("--steady", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--die", action="store_true")
    parser.add_argument("--until", type=Path)
    parser.add_argument("--role", default="engine_core")
    options = parser.parse_args()
    engine = Engine(options.role)
    number = 0
    long = engine.prefill(-1) if options.long else None
    while number < options.requests or (options.steady and not options.until.exists()):
        engine.decode(engine.prefill(number))
        number += 1
        time.sleep(options.pause)
    if long is not None:
        engine.decode(long)
    for _ in range(options.open):
        engine.decode(engine.prefill(number), finish=False)
        number += 1
    print(f"recorded {number + options.long} requests", flush=True)
    while options.until is not None and not options.until.exists():
        time.sleep(0.02)
    if options.die:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
