"""Causes put into SGLang, and clean sessions of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from quickstart.servers import SGLANG

from . import vllm
from .plan import Planned, asks_of, long_among_short, ordinary
from .vllm import CLEAN_LOADS

RANKS = ("--tp-size", "2")
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


def sglang_clean(chance: random.Random) -> Planned:
    (asks, width), *more = (ordinary(chance) for _ in range(CLEAN_LOADS))
    return Planned("clean", (), asks, width, engine=SGLANG, more=tuple(more))


def sglang_clean_ranks(chance: random.Random) -> Planned:
    """With several requests at once: of a tiny model's small batch its collectives are a large part."""
    (asks, width), *more = ((asks_of(chance, 48, (15, 60), (20, 40)), chance.randint(6, 10)) for _ in range(2))
    return Planned("clean", (), asks, width, RANKS, variables=TWO_RANKS, level="layer", engine=SGLANG, more=tuple(more))


def sglang_late_rank(chance: random.Random) -> Planned:
    """In every so many of the eight attentions and experts of a step, which takes 40 to 60 ms."""
    plan = vllm.late_rank(chance)
    size = {"ms": round(chance.uniform(4, 9), 1), "every": chance.choice((2, 3))}
    injected = {"rank": {**plan.injected["rank"], **size}}
    return replace(plan, arguments=RANKS, injected=injected, variables=TWO_RANKS, engine=SGLANG)


def sglang_batch_cap(chance: random.Random) -> Planned:
    cap = chance.randint(1, 3)
    asks = asks_of(chance, 16 * cap + 12, (15, 60), (25, 60))
    width = cap * chance.randint(3, 5)
    arguments, advised = (("--max-running-requests", str(most)) for most in (cap, 64))
    return Planned("batch_cap", ("batch_cap",), asks, width, arguments, engine=SGLANG, advised=advised)


def sglang_long_prompts(chance: random.Random) -> Planned:
    asks = long_among_short(chance, 26, (1.0, 1.4))  # its steps are longer on a processor: more is an overload
    return Planned("long_prompts", ("prefill_delays_decode",), asks, None, ("--disable-radix-cache",), engine=SGLANG)


def sglang_kv_cache(chance: random.Random) -> Planned:
    tokens = 32 * chance.randint(14, 18)  # little more than the longest request needs, and up
    arguments = ("--max-total-tokens", str(tokens), "--context-length", "384", "--page-size", "1")
    asks = asks_of(chance, 40, (30, 80), (60, 140))
    return Planned("kv_cache", ("kv_exhausted",), asks, chance.randint(10, 16), arguments, engine=SGLANG)


def sglang_token_budget(chance: random.Random) -> Planned:
    budget = chance.choice((32, 48, 64))
    asks = asks_of(chance, 30, (80, 240), (8, 24))
    arguments, advised = (("--chunked-prefill-size", str(tokens), "--disable-radix-cache") for tokens in (budget, 2048))
    width = chance.randint(4, 8)
    return Planned("token_budget", ("token_budget",), asks, width, arguments, engine=SGLANG, advised=advised)


def sglang_overload(chance: random.Random) -> Planned:
    asks = asks_of(chance, 160, (30, 80), (30, 60), 1.0)
    arguments = ("--max-running-requests", "128", "--max-total-tokens", "65536")
    factor = round(chance.uniform(1.5, 2.5), 2)
    return Planned("overload", ("arrival_above_capacity",), asks, None, arguments, engine=SGLANG, times_capacity=factor)


def sglang_slow_client(chance: random.Random) -> Planned:
    return replace(vllm.slow_client(chance), arguments=(), engine=SGLANG)


def sglang_slow_prepare(chance: random.Random) -> Planned:
    asks, width = ordinary(chance)
    injected = {"prepare": {"ms": round(chance.uniform(25, 45), 1)}}  # its steps take 10 to 30 ms
    return Planned("slow_prepare", ("host_prepare",), asks, width, injected=injected, engine=SGLANG)


def sglang_front_end(chance: random.Random) -> Planned:
    asks = asks_of(chance, 40, (10, 40), (30, 60))
    injected = {"middleware": {"ms": round(chance.uniform(8, 14), 1)}}
    return Planned("front_end", ("front_end",), asks, chance.randint(8, 12), injected=injected, engine=SGLANG)


def sglang_detokenizer(chance: random.Random) -> Planned:
    asks = asks_of(chance, 40, (10, 40), (30, 60))
    injected = {"detokenizer": {"ms": round(chance.uniform(6, 12), 1)}}
    return Planned("detokenizer", ("detokenize",), asks, chance.randint(6, 10), injected=injected, engine=SGLANG)


def on_sglang(plan: Callable[[random.Random], Planned]) -> Callable[[random.Random], Planned]:
    """The same pause in SGLang's own function (injected)."""

    def planned(chance: random.Random) -> Planned:
        return replace(plan(chance), arguments=(), engine=SGLANG, advised=None)

    planned.__name__ = f"sglang_{plan.__name__}"
    return planned
