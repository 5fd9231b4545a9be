"""Two causes at once: one that comes with a setting or a load, and one of an engine that is slow by itself."""

from __future__ import annotations

import random
from dataclasses import replace

from . import sglang, vllm
from .plan import Planned

# Closed loads: with arrivals at their own times a pause makes an overload of them.
_SETTINGS = (vllm.batch_cap, vllm.kv_cache, vllm.token_budget, vllm.many_answers)
_PAUSES = (vllm.tokenizer, vllm.scheduler_delay, vllm.slow_sampling, vllm.slow_prepare, vllm.gc_pauses)
_SGLANG_SETTINGS = (sglang.sglang_batch_cap, sglang.sglang_kv_cache)
_SGLANG_PAUSES = (vllm.tokenizer, vllm.scheduler_delay, vllm.slow_sampling)


def _both(one: Planned, other: Planned) -> Planned:
    right = (*one.right, *other.right)
    injected = {**one.injected, **other.injected}
    name = f"{one.cause}+{other.cause}"
    return replace(one, cause=name, right=right, all_of=right, injected=injected, advised=None)


def mixture(chance: random.Random) -> Planned:
    return _both(chance.choice(_SETTINGS)(chance), chance.choice(_PAUSES)(chance))


def sglang_mixture(chance: random.Random) -> Planned:
    return _both(chance.choice(_SGLANG_SETTINGS)(chance), chance.choice(_SGLANG_PAUSES)(chance))
