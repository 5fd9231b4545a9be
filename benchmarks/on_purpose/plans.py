"""All the plans, by name: sessions of real engines with a cause put there on purpose, of random size, and clean ones.

Everything that is left to chance comes from one random.Random: the same seed plans the same session.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from . import mixtures, sglang, vllm
from .plan import Planned

PLANS: dict[str, Callable[[random.Random], Planned]] = {
    plan.__name__: plan
    for plan in (
        *(vllm.clean, vllm.clean_mixed, vllm.clean_ranks),
        *(vllm.kv_cache, vllm.batch_cap, vllm.token_budget, vllm.long_prompts, vllm.overload),
        *(vllm.front_end, vllm.tokenizer, vllm.slow_client),
        *(vllm.late_rank, vllm.biased_router, vllm.slow_grammar),
        *(vllm.scheduler_delay, vllm.compile_in_window, vllm.slow_sampling, vllm.slow_prepare),
        *(vllm.gc_pauses, vllm.detokenizer, vllm.drafts, vllm.many_answers, vllm.thrashed_cache),
        *(vllm.slow_links, vllm.slow_exchange, vllm.far_below_roof),
        *(sglang.sglang_clean, sglang.sglang_clean_ranks, sglang.sglang_late_rank),
        *(sglang.sglang_batch_cap, sglang.sglang_long_prompts),
        *(sglang.sglang_kv_cache, sglang.sglang_token_budget, sglang.sglang_slow_client),
        *(sglang.sglang_slow_prepare, sglang.sglang_front_end, sglang.sglang_detokenizer),
        sglang.sglang_overload,
        *map(
            sglang.on_sglang,
            (
                *(vllm.tokenizer, vllm.biased_router, vllm.slow_grammar),
                *(vllm.scheduler_delay, vllm.slow_sampling, vllm.gc_pauses),
            ),
        ),
        *(mixtures.mixture, mixtures.sglang_mixture),
    )
}
