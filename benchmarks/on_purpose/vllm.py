"""Causes put into vLLM, and clean sessions of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from .plan import EAGER, WIDE, Ask, Planned, asks_of, long_among_short, ordinary

MENDS = Path(__file__).resolve().parents[2] / "tests" / "engines" / "mends"  # of vLLM's build for the CPU
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
CLEAN_LOADS = 4  # on one server, so that there are many of what is to have no finding


def clean(chance: random.Random) -> Planned:
    (asks, width), *more = (ordinary(chance) for _ in range(CLEAN_LOADS))
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
    (asks, width), *more = ((asks_of(chance, 30, (15, 60), (20, 40)), chance.randint(2, 4)) for _ in range(2))
    return Planned(
        "clean", (), asks, width, (EAGER, "--tensor-parallel-size", "2"), variables=TWO_RANKS, level="layer",
        more=tuple(more),
    )  # fmt: skip


def kv_cache(chance: random.Random) -> Planned:
    blocks = chance.randint(14, 18)  # one more than the longest request needs, and up
    arguments = (EAGER, "--num-gpu-blocks-override", str(blocks), "--block-size", "32", "--max-model-len", "384")
    asks = asks_of(chance, 48, (30, 80), (60, 140))
    advised = (EAGER, "--block-size", "32", "--max-model-len", "384")  # as many blocks as the memory has
    return Planned("kv_cache", ("kv_exhausted",), asks, chance.randint(10, 16), arguments, advised=advised)


def batch_cap(chance: random.Random) -> Planned:
    cap = chance.randint(1, 4)
    asks = asks_of(chance, 16 * cap + 16, (15, 60), (25, 60))
    width = cap * chance.randint(3, 5)
    arguments, advised = ((EAGER, "--max-num-seqs", str(most)) for most in (cap, 64))
    return Planned("batch_cap", ("batch_cap",), asks, width, arguments, advised=advised)


def token_budget(chance: random.Random) -> Planned:
    asks = asks_of(chance, 40, (80, 240), (8, 24))
    others = (EAGER, "--max-num-seqs", "16", "--no-enable-prefix-caching", "--max-num-batched-tokens")
    arguments, advised = ((*others, str(budget)) for budget in (chance.choice((24, 32, 48)), 2048))
    return Planned("token_budget", ("token_budget",), asks, chance.randint(4, 8), arguments, advised=advised)


def long_prompts(chance: random.Random) -> Planned:
    asks = long_among_short(chance, 36, (1.2, 2.0))
    others = (EAGER, "--no-enable-prefix-caching", "--max-num-batched-tokens")
    arguments, advised = ((*others, budget) for budget in ("4096", "256"))
    return Planned("long_prompts", ("prefill_delays_decode",), asks, None, arguments, advised=advised)


def front_end(chance: random.Random) -> Planned:
    asks = asks_of(chance, 60, (10, 40), (30, 60))
    injected = {"middleware": {"ms": round(chance.uniform(2.5, 5.0), 1)}}
    return Planned(
        "front_end",
        ("front_end",),
        asks,
        chance.randint(8, 14),
        (EAGER, "--middleware", "in_both.Burn"),
        injected,
    )


def tokenizer(chance: random.Random) -> Planned:
    asks, width = ordinary(chance)
    injected = {"tokenizer": {"ms": round(chance.uniform(200, 500))}}
    return Planned("tokenizer", ("tokenize",), asks, width, (EAGER,), injected)


def late_rank(chance: random.Random) -> Planned:
    asks = asks_of(chance, 30, (15, 60), (20, 40))
    injected = {
        "rank": {
            "rank": chance.randint(0, 1),
            "ms": round(chance.uniform(2, 6), 1),
            "every": chance.choice((2, 3, 5)),
        }
    }
    return Planned(
        "late_rank", ("straggler_rank",), asks, chance.randint(2, 4), (EAGER, "--tensor-parallel-size", "2"), injected,
        TWO_RANKS, level="layer",
    )  # fmt: skip


def biased_router(chance: random.Random) -> Planned:
    asks, width = ordinary(chance)
    experts = chance.sample(range(8), chance.randint(1, 2))
    injected = {"router": {"experts": experts, "bias": round(chance.uniform(2, 5), 1)}}
    return Planned("biased_router", ("expert_imbalance",), asks, width, (EAGER,), injected, level="layer")


def slow_grammar(chance: random.Random) -> Planned:
    where = chance.choice(("compile", "fill"))
    milliseconds = chance.uniform(150, 500) if where == "compile" else chance.uniform(6, 15)
    asks = tuple(
        Ask(0, chance.randint(15, 60), chance.randint(25, 50), schema=number if where == "compile" else number % 3)
        for number in range(40)
    )
    injected = {"grammar": {"where": where, "ms": round(milliseconds, 1)}}
    advised = (EAGER, "--structured-outputs-config.backend", "guidance")
    return Planned("slow_grammar", ("grammar",), asks, chance.randint(2, 5), (EAGER,), injected, advised=advised)


def scheduler_delay(chance: random.Random) -> Planned:
    asks, width = ordinary(chance)
    injected = {"schedule": {"ms": round(chance.uniform(4, 15), 1)}}
    return Planned("scheduler_delay", ("host_schedule",), asks, width, (EAGER,), injected)


def compile_in_window(chance: random.Random) -> Planned:
    asks = asks_of(chance, 40, (15, 60), (25, 50))
    first = chance.randint(150, 300)
    injected = {"compile": {"at": [first, first + chance.randint(60, 150)], "operations": chance.randint(3, 12)}}
    return Planned("compile_in_window", ("compile_in_window",), asks, chance.randint(2, 4), (EAGER,), injected)


def slow_client(chance: random.Random) -> Planned:
    pause = round(chance.uniform(0.05, 0.09), 3)  # 45 to 80 kB/s, of 600 kB
    asks = tuple(
        Ask(0, chance.randint(10, 30), chance.randint(220, 280), logprobs=20, reads_s=pause) for _ in range(10)
    )
    return Planned("slow_client", ("slow_client",), asks, 5, (EAGER,))


def slow_sampling(chance: random.Random) -> Planned:
    asks, width = ordinary(chance)
    return Planned(
        "slow_sampling",
        ("host_sampling",),
        asks,
        width,
        (EAGER,),
        {"sample": {"ms": round(chance.uniform(4, 12), 1)}},
    )


def slow_prepare(chance: random.Random) -> Planned:
    asks, width = ordinary(chance)
    return Planned(
        "slow_prepare",
        ("host_prepare",),
        asks,
        width,
        (EAGER,),
        {"prepare": {"ms": round(chance.uniform(8, 15), 1)}},
    )


def overload(chance: random.Random) -> Planned:
    asks = asks_of(chance, 320, (60, 160), (60, 120), 1.0)
    factor = round(chance.uniform(1.5, 2.5), 2)
    return Planned(
        "overload", ("arrival_above_capacity",), asks, None, (EAGER, "--max-num-seqs", "128"), times_capacity=factor
    )


def gc_pauses(chance: random.Random) -> Planned:
    asks, width = ordinary(chance)
    injected = {"gc": {"objects": 1000 * chance.randint(400, 1200), "every": chance.randint(5, 15)}}
    return Planned("gc_pauses", ("gc_pauses",), asks, width, (EAGER,), injected)


def detokenizer(chance: random.Random) -> Planned:
    asks = asks_of(chance, 60, (10, 40), (30, 60))
    injected = {"detokenizer": {"ms": round(chance.uniform(2.0, 5.0), 1)}}
    return Planned("detokenizer", ("detokenize",), asks, chance.randint(8, 14), (EAGER,), injected)


def drafts(chance: random.Random) -> Planned:
    """Drafts for text that nobody can foresee, from a slow proposer."""
    asks = asks_of(chance, 40, (15, 90), (25, 60), temperature=1.0)
    tokens = chance.randint(2, 5)
    method = {"method": "ngram", "num_speculative_tokens": tokens, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    injected = {"draft": {"ms": round(chance.uniform(3, 10), 1)}}
    arguments = (EAGER, "--speculative-config", json.dumps(method))
    return Planned("drafts", ("speculation_does_not_pay",), asks, chance.randint(2, 5), arguments, injected)


def many_answers(chance: random.Random) -> Planned:
    """Several answers to each prompt, without the prefix cache that would compute it once."""
    asks = asks_of(chance, 24, (150, 300), (6, 20), answers=chance.randint(3, 5), temperature=1.0)
    arguments = (EAGER, "--no-enable-prefix-caching")
    return Planned("many_answers", ("prefix_cache_off",), asks, chance.randint(1, 2), arguments)


def slow_links(chance: random.Random) -> Planned:
    asks = asks_of(chance, 30, (15, 60), (20, 40))
    injected = {"links": {"ms": round(chance.uniform(1.0, 3.0), 1)}}
    return Planned(
        "slow_links", ("collective_share",), asks, chance.randint(2, 4), (EAGER, "--tensor-parallel-size", "2"),
        injected, TWO_RANKS, level="layer",
    )  # fmt: skip


def slow_exchange(chance: random.Random) -> Planned:
    asks = asks_of(chance, 30, (15, 60), (20, 40))
    injected = {"exchange": {"ms": round(chance.uniform(1.5, 4.0), 1)}}
    arguments = (EAGER, "--data-parallel-size", "2", "--enable-expert-parallel")
    variables = {**TWO_RANKS, "PYTHONPATH": str(MENDS)}
    return Planned(
        "slow_exchange", ("dispatch_combine_share",), asks, chance.randint(3, 6), arguments, injected, variables,
        level="layer",
    )  # fmt: skip


def at_roof(chance: random.Random) -> Planned:
    """Nothing is put there: a model that is bound by its weights, a few requests at a time."""
    asks = asks_of(chance, 16, (5, 15), (15, 30))
    return Planned("at_roof", ("decode_at_roof",), asks, chance.randint(1, 3), (EAGER,), model=WIDE)


def far_below_roof(chance: random.Random) -> Planned:
    asks = asks_of(chance, 16, (5, 15), (10, 16))
    injected = {"forward": {"ms": round(chance.uniform(150, 300))}}
    return Planned(
        "far_below_roof", ("decode_far_below_roof",), asks, chance.randint(2, 4), (EAGER,), injected, model=WIDE
    )
