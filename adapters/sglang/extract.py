"""Pure extractors: objects of SGLang in, words of records out. No clock, no ring, no import of SGLang.

Written against SGLang 0.5.23; paths are relative to sglang/srt.
"""

from __future__ import annotations

import os
from typing import Any

from stagetrace.instrument.ids import handle


def instance_of(port_args: Any, dp_rank: int) -> int:
    """The engine instance of a scheduler: the same on all its ranks, another after a restart.

    Nothing travels from a scheduler to its ranks, since every rank schedules for itself. What they share is the token
    of the server's start in PortArgs.instance_id, and their data-parallel rank.
    """
    token = getattr(port_args, "instance_id", "") or port_args.tokenizer_ipc_name  # without the token: random too
    return handle(b"", f"sglang {token} {dp_rank}") or 1


def process_info(args: Any, model: Any, parallel: Any, version: str) -> dict[str, object]:
    """What the manifest says of an engine's process: from its ServerArgs, ModelConfig and ParallelContext.

    `world_size` is the number of ranks that run the same steps: without attention data parallelism all of a replica's,
    with it those that share a data-parallel rank. Never anything from a request.
    """
    attention_parallel = parallel.attn_tp_size * parallel.attn_cp_size
    return {
        "engine": "sglang",
        "engine_version": version,
        "model": str(args.served_model_name or args.model_path),
        "model_path": str(args.model_path),
        "dtype": str(model.dtype),
        "max_model_len": int(model.context_len),
        "max_num_seqs": int(args.max_running_requests or 0),
        "chunked_prefill_size": int(args.chunked_prefill_size or 0),
        "mixed_chunk": bool(args.enable_mixed_chunk),
        "overlap_schedule": not args.disable_overlap_schedule,
        "block_size": int(args.page_size or 1),
        "prefix_caching": not args.disable_radix_cache,
        "kv_cache_dtype": str(args.kv_cache_dtype),
        "device": str(args.device),
        "tensor_parallel": int(parallel.tp_size),
        "pipeline_parallel": int(parallel.pp_size),
        "data_parallel": int(args.dp_size),
        "attention_data_parallel": int(parallel.attn_dp_size),
        "expert_parallel_size": int(parallel.moe_ep_size),
        "expert_parallel": parallel.moe_ep_size > 1,
        "world_size": attention_parallel * int(parallel.pp_size),
        "pid": os.getpid(),
    }
