"""A small simulation of a serving engine that writes a session: what the diagnosis is tested on, exact and without one.

Requests arrive, wait, are prefilled in chunks and decode, a token a step, as in vLLM: with a cap on the batch, a budget
of tokens for a step, and room for so many tokens in the KV cache. A step takes a fixed time and one for each token.
With prefill_first a step has prefill or decode, and prefill goes first, as in SGLang.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from unit.sessions import INSTANCE, PROCESS, THREAD, SessionBuilder

from stagetrace.instrument.stages import BY_NAME, QueueCause

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from stagetrace.exporters.session import Session

MS = 1_000_000
RESPONSE_BYTES = 200_000
RANK_THREAD, FRONT, FRONT_THREAD = 71, 2**62 + 5, 72
OTHER_RANK = 2**62 + 7


@dataclass
class Life:
    """A request while it is simulated."""

    handle: int
    arrival: int
    prompt: int
    output: int
    tokenized: int = 0
    queued: int = 0
    grammar: int = 0
    scheduled: int = 0
    done: int = 0  # tokens of its context that are computed
    target: int = 0  # that complete its prefill
    tokens: int = 0
    first: int = 0
    last: int = 0
    preempted: int = 0
    preempted_ns: int = 0
    out_at: int = 0
    prefill_ns: int = 0
    chunk_begin: int = 0


@dataclass
class Engine:
    """What is simulated; times are ms."""

    requests: int = 40
    width: int | None = 4  # at once, in a closed loop; None: they arrive at a rate
    rate: float | Callable[[int], float] = 5.0  # requests a second, or that by the request's number
    prompt: int | Callable[[random.Random], int] = 60
    output: int | Callable[[random.Random], int] = 30
    cap: int = 64
    budget: int = 2048
    prefill_first: bool = False
    kv_tokens: int = 1_000_000
    fixed: float = 4.0
    per_token: float = 0.05
    stages: Mapping[str, float] = field(default_factory=dict)  # more of a stage in every step
    extra: Callable[[int], Mapping[str, float]] = lambda _: {}  # the same, by the number of the step
    tokenize: float = 1.0
    late: float = 0.2  # the front end, with what comes back
    detokenize: float = 0.1  # of every step
    client: float = 0.1  # until the last byte is handed over
    unsent: float = 0.0  # of the response's bytes, how many are still in the socket's buffer then
    grammar: float = 0.0
    seed: int = 3
    info: Mapping[str, Any] = field(default_factory=dict)
    level: str = "step"
    late_rank: float = 0.0  # ms that rank 1 comes late to the one collective of a step
    ranks: int = 1
    collective: float = 0.5
    experts: tuple[float, ...] = ()  # weights of the experts
    step_columns: Callable[[int, int], Mapping[str, Any]] = lambda _number, _decoding: {}
    occasions: tuple[tuple[str, float, float], ...] = ()  # stage, begin, end: of the rank's process


OTHERS = ("grammar", "gc_pause", "draft", "expert_dispatch")
BASE = {"schedule": 0.1, "prepare": 0.4, "sample": 0.1, "update": 0.1}


def simulate(path: Path, engine: Engine) -> Session:
    """The session that such an engine would have left."""
    return _Run(path, engine).run()


class _Run:
    def __init__(self, path: Path, engine: Engine):
        self.engine, self.chance = engine, random.Random(engine.seed)
        self.builder = SessionBuilder(path, level=engine.level)
        info = {
            **{"engine": "vllm", "engine_version": "0.32.0", "model": "tiny", "max_num_seqs": engine.cap},
            **{"max_num_batched_tokens": engine.budget, "prefix_caching": True, "world_size": engine.ranks},
            **engine.info,
        }
        self.builder.process(info=info)
        for rank in range(1, engine.ranks):
            self.builder.process(OTHER_RANK, "worker", info={"engine": "vllm", "rank": rank})
        if engine.ranks > 1:
            self.builder.manifest.processes[0].info["rank"] = 0
        self.builder.process(FRONT, "front_end", info={"engine": "vllm"})
        self.waiting: list[Life] = []
        self.running: list[Life] = []
        self.over: list[Life] = []
        self.now = 1_000 * MS
        self.step = 0
        self.sequence = 0

    def _size(self, value: int | Callable[[random.Random], int]) -> int:
        return value(self.chance) if callable(value) else value

    def run(self) -> Session:
        engine, coming = self.engine, []
        at = self.now
        for number in range(engine.requests):
            rate = engine.rate(number) if callable(engine.rate) else engine.rate
            at += 0 if engine.width else round(self.chance.expovariate(rate) * 1e9)
            coming.append(Life(number + 1, at, self._size(engine.prompt), self._size(engine.output)))
        while coming or self.waiting or self.running:
            self._take_in(coming)
            if not self.waiting and not self.running:
                self.now = max(self.now, coming[0].arrival + round(engine.tokenize * MS)) + 1
                continue
            self._step()
        for stage, begin, end in engine.occasions:
            self.builder.segment(stage, round(begin * MS), round(end * MS), thread=RANK_THREAD)
        return self.builder.write()

    def _take_in(self, coming: list[Life]) -> None:
        engine = self.engine
        there = len(self.waiting) + len(self.running)
        while coming and (there < engine.width if engine.width else coming[0].arrival <= self.now):
            life = coming.pop(0)
            if engine.width:
                life.arrival = self.now
            life.tokenized = life.arrival + round(engine.tokenize * MS)
            life.queued = max(self.now, life.tokenized)
            life.grammar = round(engine.grammar * MS)
            life.target = life.prompt
            self.waiting.append(life)
            there += 1

    def _step(self) -> None:
        engine = self.engine
        begin = max(
            self.now, min((one.queued + one.grammar for one in self.waiting), default=0) if not self.running else 0
        )
        self.now = begin
        budget, preempted = engine.budget, 0
        decoding, chunks = [], []

        def held() -> int:
            return sum(one.done for one in self.running)

        for one in list(self.running):
            if one not in self.running:
                continue
            need = 1 if one.done >= one.target else min(one.target - one.done, budget)
            while held() + need > engine.kv_tokens and len(self.running) > 1:
                out = self.running.pop()
                preempted += 1
                out.preempted, out.out_at, out.done = out.preempted + 1, begin, 0
                out.target = out.prompt + out.tokens
                self.waiting.insert(0, out)
                decoding = [each for each in decoding if each is not out]
                chunks = [each for each in chunks if each[0] is not out]
                if out is one:
                    break
            if one not in self.running or budget < 1 or not need:
                continue
            budget -= 0 if engine.prefill_first and one.done >= one.target else need
            if one.done >= one.target:
                decoding.append(one)
            else:
                chunks.append((one, need))
        while self.waiting and budget > 0 and len(self.running) < engine.cap and not preempted:
            one = self.waiting[0]
            if one.queued + one.grammar > begin:
                break
            need = min(one.target, budget)
            if held() + need + sum(q for _, q in chunks) + len(decoding) > engine.kv_tokens and self.running:
                break
            self.waiting.pop(0)
            self.running.append(one)
            if one.out_at:
                one.preempted_ns += begin - one.out_at
                one.out_at = 0
            one.scheduled = one.scheduled or begin
            one.chunk_begin = begin
            chunks.append((one, need))
            budget -= need
        if engine.prefill_first and chunks:
            decoding = []
        self._write(begin, decoding, chunks, preempted)

    def _write(self, begin: int, decoding: list[Life], chunks: list[tuple[Life, int]], preempted: int) -> None:
        engine, builder = self.engine, self.builder
        self.step += 1
        tokens = len(decoding) + sum(q for _, q in chunks)
        times = {name: BASE.get(name, 0.0) + engine.stages.get(name, 0.0) for name in (*BASE, *OTHERS)}
        for name, more in engine.extra(self.step).items():
            times[name] = times.get(name, 0.0) + more
        late = engine.late_rank if engine.ranks > 1 else 0.0
        collective = engine.collective if engine.ranks > 1 else 0.0
        columns_told = engine.step_columns(self.step, len(decoding))
        forward = engine.fixed + engine.per_token * columns_told.get("padded_tokens", tokens)
        inside = {name: round(ms * MS) for name, ms in times.items()}
        between = inside.pop("between", 0)
        if between:
            builder.segment("between", begin, begin + between)
            begin += between
        at = begin
        phase = "decode" if not chunks else "mixed" if decoding else "prefill"
        if inside["schedule"]:
            builder.segment("schedule", at, at + inside["schedule"], self.step, phase=phase)
            at += inside["schedule"]
        scheduled = at
        rank_begin = at
        for name, length in (
            ("prepare", inside["prepare"]),
            ("forward", round(forward * MS)),
            ("sample", inside["sample"]),
            ("draft", inside["draft"]),
            ("expert_dispatch", inside["expert_dispatch"]),
        ):
            if length:
                builder.segment(name, at, at + length, self.step, thread=RANK_THREAD, phase=phase)
                if engine.experts and name == "forward":
                    builder.segment(
                        "expert_compute", at, at + length // 2, self.step, thread=RANK_THREAD, a0=0, phase=phase
                    )
            at += length
            if name == "forward" and engine.ranks > 1:
                end = at + round((late + collective) * MS)
                for process, came in ((PROCESS, at), (OTHER_RANK, at + round(late * MS))):
                    builder.segment(
                        "collective", came, end, self.step, process=process, thread=RANK_THREAD, a0=1, a1=9, a2=512,
                        a3=0, a4=self.step,
                    )  # fmt: skip
                at = end
        builder.segment("rank_step", rank_begin, at, self.step, thread=RANK_THREAD, self_ns=0, phase=phase)
        if inside["gc_pause"]:
            builder.segment("gc_pause", at, at + inside["gc_pause"], thread=THREAD)
            at += inside["gc_pause"]
        if inside["grammar"]:
            builder.segment("grammar", at, at + inside["grammar"], self.step, phase=phase)
            at += inside["grammar"]
        builder.segment("execute", scheduled, at, self.step, self_ns=at - scheduled - inside["grammar"], phase=phase)
        builder.segment("update", at, at + inside["update"], self.step, phase=phase)
        end = at + inside["update"]
        builder.segment(
            "detokenize", end, end + round(engine.detokenize * MS), process=FRONT, thread=FRONT_THREAD, a0=len(decoding)
        )
        contexts = [one.done + 1 for one in decoding]
        q_q = sum(q * q for _, q in chunks)
        q_kv = sum(q * (one.done + q) for one, q in chunks)
        columns = {
            "prefill_requests": len(chunks),
            "decode_requests": len(decoding),
            "prefill_tokens": sum(q for _, q in chunks),
            "prefill_context": sum(one.done + q for one, q in chunks),
            "prefill_q_q": q_q,
            "prefill_q_kv": q_kv,
            "decode_tokens": len(decoding),
            "decode_context": sum(contexts),
            "decode_q_q": len(decoding),
            "decode_q_kv": sum(contexts),
            "waiting": len(self.waiting),
            "running": len(self.running),
            "kv_usage": min(round(sum(one.done for one in self.running) / engine.kv_tokens * 1e6), 1_000_000),
            "preempted": preempted,
            "output_tokens": len(decoding) + sum(one.done + q >= one.target for one, q in chunks),
            "ranks_expected": engine.ranks,
            "ranks_reported": engine.ranks,
            **columns_told,
        }
        builder.step(self.step, begin, end, phase, scheduled_ns=scheduled, **columns)
        if engine.experts:
            counts = [0] * len(engine.experts)
            for expert in self.chance.choices(range(len(counts)), engine.experts, k=2 * tokens):
                counts[expert] += 1
            builder.row(
                "experts", process=PROCESS, instance=INSTANCE, step=self.step, layer=0, tokens=tokens, counts=counts
            )
        for one in decoding:
            builder.interval(self.step, end - one.last, 1, phase)
            one.done, one.tokens, one.last = one.done + 1, one.tokens + 1, end
        for one, q in chunks:
            one.done += q
            if one.done >= one.target:
                one.tokens, one.last = one.tokens + 1, end
                one.first = one.first or end
                one.prefill_ns += end - one.chunk_begin
                one.target = one.done
        for one in [each for each in self.running if each.tokens >= each.output]:
            self.running.remove(one)
            self._over(one)
        self.now = end + 20_000

    def _over(self, one: Life) -> None:
        engine = self.engine
        late = round(engine.late * MS)
        self.builder.request(
            one.handle,
            one.last + late + round(engine.client * MS),
            instance=INSTANCE,
            external_id=f"request-{one.handle}",
            prompt_tokens=one.prompt,
            output_tokens=one.tokens,
            cached_tokens=0,
            preemptions=one.preempted,
            arrival_ns=one.arrival,
            dispatched_ns=one.tokenized,
            queued_ns=one.queued,
            scheduled_ns=one.scheduled,
            first_token_ns=one.first,
            first_output_ns=one.first + late,
            first_sent_ns=one.first + late + 50_000,
            last_token_ns=one.last,
            last_output_ns=one.last + late,
            last_sent_ns=one.last + late + round(engine.client * MS),
            response_bytes=RESPONSE_BYTES,
            unsent_bytes=round(engine.unsent * RESPONSE_BYTES),
            tokenize_ns=one.tokenized - one.arrival,
            dispatch_ns=one.queued - one.tokenized,
            queue_ns=one.scheduled - one.queued,
            grammar_ns=one.grammar or None,
            prefill_ns=one.prefill_ns,
            decode_ns=one.last - one.first - one.preempted_ns,
            preempted_ns=one.preempted_ns or None,
            output_ns=late,
        )
        queue = BY_NAME["queue"].id
        place = {"handle": one.handle, "stage": queue, "instance": INSTANCE, "a0": one.prompt}
        middle = min(one.queued + one.grammar, one.scheduled)
        if one.grammar:
            self.builder.row("states", **place, begin_ns=one.queued, end_ns=middle, a1=int(QueueCause.GRAMMAR))
        self.builder.row("states", **place, begin_ns=middle, end_ns=one.scheduled, a1=int(QueueCause.TURN))
