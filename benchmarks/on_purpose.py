"""Sessions of real engines with a cause of slowness put there on purpose, of random size, and clean ones.

Everything that is left to chance comes from one random.Random: the same seed plans the same session.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickstart.load import _words
from quickstart.servers import HOST, MODEL_NAME, SGLANG, VLLM, Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

INJECTED = Path(__file__).resolve().parent / "injected"
EAGER = "--enforce-eager"
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
CLEAN_LOADS = 4  # on one server, so that there are many of what is to have no finding


@dataclass(frozen=True)
class Ask:
    """One request of a load. Lengths are of words, about three tokens each."""

    at_s: float  # when it is sent: since the begin, or in a closed load after a place is free
    words: int
    tokens: int
    shared: int = 0  # of its words, the beginning that others have too
    schema: int | None = None  # structured output, of a schema of that number
    logprobs: int = 0
    reads_s: float = 0.0  # a slow client: it waits so long after every piece that it reads


@dataclass(frozen=True)
class Planned:
    """One session to record."""

    cause: str  # what was put there; "clean" for nothing
    right: tuple[str, ...]  # causes of the diagnosis that name it
    asks: tuple[Ask, ...]
    width: int | None  # so many at once, one after the other; None: each at its time
    arguments: tuple[str, ...] = ()
    injected: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    level: str = "step"
    model: str = "moe"  # moe, dense
    engine: Engine = VLLM
    advised: tuple[str, ...] | None = None  # the arguments once the first advice is taken
    more: tuple[tuple[tuple[Ask, ...], int | None], ...] = ()  # further loads on the same server, a session each
    times_capacity: float | None = None  # requests arrive so many times as fast as this machine's engine serves them

    @property
    def said(self) -> str:
        """What was put there and how much, in a line."""
        sizes = " ".join(
            [*(word for word in self.arguments if word != EAGER), *(f"{k}={v}" for k, v in self.injected.items())]
        )
        load = self.width or (f"{self.times_capacity} times capacity" if self.times_capacity else "open")
        return f"{self.cause} on {self.engine.name}: {sizes or '-'}; {len(self.asks)} requests, {load}"


def _asks(
    chance: random.Random,
    count: int,
    words: tuple[int, int],
    tokens: tuple[int, int],
    rate: float | None = None,
    **more: Any,
) -> tuple[Ask, ...]:
    """Requests of random lengths, in a row or, with a rate in requests a second, as a Poisson process."""
    now, asks = 0.0, []
    for _ in range(count):
        now += chance.expovariate(rate) if rate else 0.0
        asks.append(Ask(now, chance.randint(*words), chance.randint(*tokens), **more))
    return tuple(asks)


def _ordinary(chance: random.Random) -> tuple[tuple[Ask, ...], int | None]:
    """A load that the engine serves well: a few at once, or arrivals that it keeps up with."""
    if chance.random() < 0.5:
        width = chance.randint(2, 5)
        return _asks(chance, 14 * width, (15, 90), (25, 60)), width
    rate = chance.uniform(1.5, 3.5)
    return _asks(chance, 32, (15, 90), (25, 60), rate), None


# Causes


def clean(chance: random.Random) -> Planned:
    (asks, width), *more = (_ordinary(chance) for _ in range(CLEAN_LOADS))
    return Planned("clean", (), asks, width, (EAGER,), model=chance.choice(("moe", "dense")), more=tuple(more))


def clean_mixed(chance: random.Random) -> Planned:
    """Prompts of very different lengths, as the quickstart's, on the engine's own settings."""

    def load() -> tuple[tuple[Ask, ...], int]:
        lengths = [
            (min(500, max(8, round(chance.lognormvariate(4.0, 1.0)))), round(chance.lognormvariate(3.9, 0.5)))
            for _ in range(48)
        ]
        return tuple(Ask(0, words, min(160, max(8, tokens))) for words, tokens in lengths), chance.randint(4, 10)

    (asks, width), *more = (load() for _ in range(2))
    return Planned("clean", (), asks, width, (EAGER,), more=tuple(more))


def clean_ranks(chance: random.Random) -> Planned:
    (asks, width), *more = ((_asks(chance, 30, (15, 60), (20, 40)), chance.randint(2, 4)) for _ in range(2))
    return Planned(
        "clean", (), asks, width, (EAGER, "--tensor-parallel-size", "2"), variables=TWO_RANKS, level="layer",
        more=tuple(more),
    )  # fmt: skip


def kv_cache(chance: random.Random) -> Planned:
    blocks = chance.randint(14, 18)  # one more than the longest request needs, and up
    arguments = (EAGER, "--num-gpu-blocks-override", str(blocks), "--block-size", "32", "--max-model-len", "384")
    asks = _asks(chance, 48, (30, 80), (60, 140))
    advised = (EAGER, "--block-size", "32", "--max-model-len", "384")  # as many blocks as the memory has
    return Planned("kv_cache", ("kv_exhausted",), asks, chance.randint(10, 16), arguments, advised=advised)


def batch_cap(chance: random.Random) -> Planned:
    cap = chance.randint(1, 4)
    asks = _asks(chance, 16 * cap + 16, (15, 60), (25, 60))
    width = cap * chance.randint(3, 5)
    arguments, advised = ((EAGER, "--max-num-seqs", str(most)) for most in (cap, 64))
    return Planned("batch_cap", ("batch_cap",), asks, width, arguments, advised=advised)


def token_budget(chance: random.Random) -> Planned:
    asks = _asks(chance, 40, (80, 240), (8, 24))
    others = (EAGER, "--max-num-seqs", "16", "--no-enable-prefix-caching", "--max-num-batched-tokens")
    arguments, advised = ((*others, str(budget)) for budget in (chance.choice((24, 32, 48)), 2048))
    return Planned("token_budget", ("token_budget",), asks, chance.randint(4, 8), arguments, advised=advised)


def _long_among_short(chance: random.Random, talks: int, rates: tuple[float, float]) -> tuple[Ask, ...]:
    """Short prompts with long answers, so many in 14 s, and long prompts at a rate between two, per second."""
    seconds = 14
    talk = _asks(chance, talks, (10, 30), (80, 140), talks / seconds)
    rate = chance.uniform(*rates)
    long = _asks(chance, int(rate * seconds), (700, 1300), (2, 4), rate)
    return tuple(sorted((*talk, *long), key=lambda ask: ask.at_s))


def long_prompts(chance: random.Random) -> Planned:
    asks = _long_among_short(chance, 36, (1.2, 2.0))
    others = (EAGER, "--no-enable-prefix-caching", "--max-num-batched-tokens")
    arguments, advised = ((*others, budget) for budget in ("4096", "256"))
    return Planned("long_prompts", ("prefill_delays_decode",), asks, None, arguments, advised=advised)


def front_end(chance: random.Random) -> Planned:
    asks = _asks(chance, 60, (10, 40), (30, 60))
    injected = {"kind": "middleware", "ms": round(chance.uniform(2.5, 5.0), 1)}
    return Planned(
        "front_end",
        ("front_end",),
        asks,
        chance.randint(8, 14),
        (EAGER, "--middleware", "sitecustomize.Burn"),
        injected,
    )


def tokenizer(chance: random.Random) -> Planned:
    asks, width = _ordinary(chance)
    injected = {"kind": "tokenizer", "ms": round(chance.uniform(200, 500))}
    return Planned("tokenizer", ("tokenize",), asks, width, (EAGER,), injected)


def late_rank(chance: random.Random) -> Planned:
    asks = _asks(chance, 30, (15, 60), (20, 40))
    injected = {
        "kind": "rank",
        "rank": chance.randint(0, 1),
        "ms": round(chance.uniform(2, 6), 1),
        "every": chance.choice((2, 3, 5)),
    }
    return Planned(
        "late_rank", ("straggler_rank",), asks, chance.randint(2, 4), (EAGER, "--tensor-parallel-size", "2"), injected,
        TWO_RANKS, level="layer",
    )  # fmt: skip


def biased_router(chance: random.Random) -> Planned:
    asks, width = _ordinary(chance)
    experts = chance.sample(range(8), chance.randint(1, 2))
    injected = {"kind": "router", "experts": experts, "bias": round(chance.uniform(2, 5), 1)}
    return Planned("biased_router", ("expert_imbalance",), asks, width, (EAGER,), injected, level="layer")


def slow_grammar(chance: random.Random) -> Planned:
    where = chance.choice(("compile", "fill"))
    milliseconds = chance.uniform(150, 500) if where == "compile" else chance.uniform(6, 15)
    asks = tuple(
        Ask(0, chance.randint(15, 60), chance.randint(25, 50), schema=number if where == "compile" else number % 3)
        for number in range(40)
    )
    injected = {"kind": "grammar", "where": where, "ms": round(milliseconds, 1)}
    advised = (EAGER, "--structured-outputs-config.backend", "guidance")
    return Planned("slow_grammar", ("grammar",), asks, chance.randint(2, 5), (EAGER,), injected, advised=advised)


def scheduler_delay(chance: random.Random) -> Planned:
    asks, width = _ordinary(chance)
    injected = {"kind": "schedule", "ms": round(chance.uniform(4, 15), 1)}
    return Planned("scheduler_delay", ("host_schedule",), asks, width, (EAGER,), injected)


def compile_in_window(chance: random.Random) -> Planned:
    asks = _asks(chance, 40, (15, 60), (25, 50))
    first = chance.randint(150, 300)
    injected = {"kind": "compile", "at": [first, first + chance.randint(60, 150)], "operations": chance.randint(3, 12)}
    return Planned("compile_in_window", ("compile_in_window",), asks, chance.randint(2, 4), (EAGER,), injected)


def slow_client(chance: random.Random) -> Planned:
    pause = round(chance.uniform(0.05, 0.09), 3)  # 45 to 80 kB/s, of 600 kB
    asks = tuple(
        Ask(0, chance.randint(10, 30), chance.randint(220, 280), logprobs=20, reads_s=pause) for _ in range(10)
    )
    return Planned("slow_client", ("slow_client",), asks, 5, (EAGER,))


def slow_sampling(chance: random.Random) -> Planned:
    asks, width = _ordinary(chance)
    return Planned(
        "slow_sampling",
        ("host_sampling",),
        asks,
        width,
        (EAGER,),
        {"kind": "sample", "ms": round(chance.uniform(4, 12), 1)},
    )


def slow_prepare(chance: random.Random) -> Planned:
    asks, width = _ordinary(chance)
    return Planned(
        "slow_prepare",
        ("host_prepare",),
        asks,
        width,
        (EAGER,),
        {"kind": "prepare", "ms": round(chance.uniform(8, 15), 1)},
    )


def overload(chance: random.Random) -> Planned:
    asks = _asks(chance, 320, (60, 160), (60, 120), 1.0)
    factor = round(chance.uniform(1.5, 2.5), 2)
    return Planned(
        "overload", ("arrival_above_capacity",), asks, None, (EAGER, "--max-num-seqs", "128"), times_capacity=factor
    )


def at_rate(asks: Sequence[Ask], rate: float) -> tuple[Ask, ...]:
    """The same requests, closer together or further apart: so many a second."""
    scale = len(asks) / asks[-1].at_s / rate
    return tuple(replace(ask, at_s=ask.at_s * scale) for ask in asks)


def sglang_clean(chance: random.Random) -> Planned:
    (asks, width), *more = (_ordinary(chance) for _ in range(CLEAN_LOADS))
    return Planned("clean", (), asks, width, engine=SGLANG, more=tuple(more))


def sglang_batch_cap(chance: random.Random) -> Planned:
    cap = chance.randint(1, 3)
    asks = _asks(chance, 16 * cap + 12, (15, 60), (25, 60))
    width = cap * chance.randint(3, 5)
    arguments, advised = (("--max-running-requests", str(most)) for most in (cap, 64))
    return Planned("batch_cap", ("batch_cap",), asks, width, arguments, engine=SGLANG, advised=advised)


def sglang_long_prompts(chance: random.Random) -> Planned:
    asks = _long_among_short(chance, 26, (1.0, 1.4))  # its steps are longer on a processor: more is an overload
    return Planned("long_prompts", ("prefill_delays_decode",), asks, None, ("--disable-radix-cache",), engine=SGLANG)


def sglang_kv_cache(chance: random.Random) -> Planned:
    tokens = 32 * chance.randint(14, 18)  # little more than the longest request needs, and up
    arguments = ("--max-total-tokens", str(tokens), "--context-length", "384", "--page-size", "1")
    asks = _asks(chance, 40, (30, 80), (60, 140))
    return Planned("kv_cache", ("kv_exhausted",), asks, chance.randint(10, 16), arguments, engine=SGLANG)


def sglang_token_budget(chance: random.Random) -> Planned:
    budget = str(chance.choice((32, 48, 64)))
    asks = _asks(chance, 30, (80, 240), (8, 24))
    arguments = ("--chunked-prefill-size", budget, "--max-prefill-tokens", budget, "--disable-radix-cache")
    return Planned("token_budget", ("token_budget",), asks, chance.randint(4, 8), arguments, engine=SGLANG)


def sglang_slow_client(chance: random.Random) -> Planned:
    return replace(slow_client(chance), arguments=(), engine=SGLANG)


def _on_sglang(plan: Callable[[random.Random], Planned]) -> Callable[[random.Random], Planned]:
    """The same pause in SGLang's own function (injected)."""

    def planned(chance: random.Random) -> Planned:
        return replace(plan(chance), arguments=(), engine=SGLANG, advised=None)

    planned.__name__ = f"sglang_{plan.__name__}"
    return planned


PLANS: dict[str, Callable[[random.Random], Planned]] = {
    plan.__name__: plan
    for plan in (
        *(
            clean,
            clean_mixed,
            clean_ranks,
            kv_cache,
            batch_cap,
            token_budget,
            long_prompts,
            front_end,
            tokenizer,
            late_rank,
            biased_router,
        ),
        *(slow_grammar, scheduler_delay, compile_in_window, slow_client, slow_sampling, slow_prepare, overload),
        *(sglang_clean, sglang_batch_cap, sglang_long_prompts, sglang_kv_cache, sglang_token_budget),
        *map(_on_sglang, (tokenizer, biased_router, slow_grammar, scheduler_delay, slow_sampling)),
        sglang_slow_client,
    )
}


# The load


async def send(asks: Sequence[Ask], width: int | None, port: int, seed: int) -> list[str]:
    """Sends the requests as planned; what went wrong, by request."""
    chance = random.Random(seed)
    shared = _words(chance, 400)
    texts = [f"{' '.join(shared.split()[: ask.shared])} {_words(chance, ask.words - ask.shared)}" for ask in asks]
    gate = asyncio.Semaphore(width or len(asks))
    began = time.monotonic()
    wrong: list[str] = []

    async def one(ask: Ask, text: str) -> None:
        if width is None:
            await asyncio.sleep(max(began + ask.at_s - time.monotonic(), 0))
        async with gate:
            try:
                await _stream(ask, text, port)
            except (OSError, ValueError) as error:
                wrong.append(f"{type(error).__name__}: {error}")

    await asyncio.gather(*(one(ask, text) for ask, text in zip(asks, texts, strict=True)))
    return wrong


async def _stream(ask: Ask, text: str, port: int) -> None:
    body: dict[str, Any] = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": ask.tokens,
        "temperature": 0,
        "stream": True,
    }
    if ask.schema is None:
        body["ignore_eos"] = True
    else:
        names = {f"field_{ask.schema}_{number}": {"type": "string"} for number in range(4)}
        schema = {"type": "object", "properties": names, "required": [*names]}
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    if ask.logprobs:
        body |= {"logprobs": True, "top_logprobs": ask.logprobs}
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    slow = ask.reads_s > 0
    reader, writer = await _connected(port, slow)
    try:
        writer.write(head.encode() + data)
        await writer.drain()
        status = await reader.readline()
        if b" 200 " not in status:
            raise ValueError(f"the server answered {status.decode().strip()}: {(await reader.read(2000))[-300:]!r}")
        while piece := await reader.read(4096 if slow else 65536):
            if slow:
                await asyncio.sleep(ask.reads_s)
            del piece
    finally:
        writer.close()


async def _connected(port: int, slow: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection; that of a slow client has small buffers and packets, as a phone far away does.

    A server's kernel keeps back what some packets' worth of buffers hold: 3 MB with those of loopback, of 64 KiB, and
    170 kB with Ethernet's.
    """
    import socket

    if not slow:
        return await asyncio.open_connection(HOST, port)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (HOST, port))
    return await asyncio.open_connection(sock=connection, limit=4096)
