"""Pure extractors: objects of SGLang in, words of records out. No clock, no ring, no import of SGLang.

Written against SGLang 0.5.23: ScheduleBatch, Req and the finish reasons in srt/managers/schedule_batch.py.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.ids import handle
from stagetrace.instrument.stages import Finish

if TYPE_CHECKING:
    from collections.abc import Sequence

HEALTH_CHECK = "HEALTH_CHECK"  # how the ids of the requests begin that SGLang's /health makes


def instance_of(port_args: Any, dp_rank: int) -> int:
    """The engine instance of a scheduler: the same on all its ranks, another after a restart.

    Nothing travels from a scheduler to its ranks, since every rank schedules for itself. What they share is the token
    of the server's start in PortArgs.instance_id, and their data-parallel rank.
    """
    token = getattr(port_args, "instance_id", "") or port_args.tokenizer_ipc_name  # without the token: random too
    return handle(b"", f"sglang {token} {dp_rank}") or 1


def is_health_check(request: Any) -> bool:
    """Whether a Req comes from the server's own health check."""
    return str(request.rid).startswith(HEALTH_CHECK)


def is_step(batch: Any) -> bool:
    """Whether a ScheduleBatch is work for requests.

    The others are an empty batch, with which a data-parallel rank keeps the others company, and the health check.
    """
    requests = batch.reqs
    return bool(requests) and not (len(requests) == 1 and is_health_check(requests[0]))


def composition(
    chunks: Sequence[tuple[int, int, int]],
    decode_requests: int,
    decode_context: int,
    waiting: int,
    running: int,
    kv_usage: float,
    preempted: int,
) -> tuple[int, ...]:
    """What is in a batch, in the order of stages.STEP_COMPOSITION.

    `chunks` has (q, kv, cached) of every request in prefill: its tokens in the step, its context after it, and the
    prompt tokens found in a cache when it joined (0 in later chunks). The others are in decode, with one token each;
    `decode_context` is the sum of their contexts after the step. `kv_usage` is a fraction.
    """
    prefill_tokens = prefill_context = prefill_q_q = prefill_q_kv = cached_tokens = 0
    for q, kv, cached in chunks:
        prefill_tokens += q
        prefill_context += kv
        prefill_q_q += q * q
        prefill_q_kv += q * kv
        cached_tokens += cached
    return (
        len(chunks),
        decode_requests,
        prefill_tokens,
        prefill_context,
        prefill_q_q,
        prefill_q_kv,
        decode_requests,
        decode_context,
        decode_requests,
        decode_context,
        cached_tokens,
        waiting,
        running,
        int(kv_usage * 1_000_000 + 0.5),
        preempted,
        0,
    )


def kv_usage(scheduler: Any) -> float:
    """The share of the KV cache's tokens that running requests hold, as SGLang's own token usage has it."""
    if scheduler.is_hybrid_swa or scheduler.is_hybrid_ssm:
        return float(scheduler.pool_stats_observer.get_pool_stats().get_max_pool_usage())
    free = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
    return 1.0 - float(free) / float(scheduler.max_total_num_tokens)


def decode_context(batch: Any) -> int:
    """Sum of the contexts of a ScheduleBatch in decode, the tokens of this step included; its own column, on the host.

    While speculation has not resolved that, the requests' own lengths.
    """
    lengths = batch.seq_lens_cpu
    if lengths is None:
        return sum(len(each.origin_input_ids) + len(each.output_ids) for each in batch.reqs)
    return int(lengths.sum())


def finish_of(reason: Any) -> Finish:
    """stages.Finish of a Req's finished_reason."""
    name = type(reason).__name__
    if name == "FINISH_LENGTH":
        return Finish.LENGTH
    if name == "FINISH_ABORT":
        return Finish.ABORT if reason.status_code is None else Finish.ERROR
    return Finish.STOP if name.startswith("FINISH_MATCHED") or name == "FINISHED_MATCHED_REGEX" else Finish.UNKNOWN


def output_tokens(request: Any) -> int:
    """Tokens that a Req has generated, those after its stop left out."""
    until_stop = request.finished_len
    return len(request.output_ids) if until_stop is None else int(until_stop)


def time_ns(seconds: float) -> int:
    """A time of SGLang's request statistics (time.perf_counter, on Linux the monotonic clock) in ns; 0 for none."""
    return int(seconds * 1e9)


def process_info(args: Any, model: Any, parallel: Any, version: str) -> dict[str, object]:
    """What the manifest says of an engine's process: from its ServerArgs, ModelConfig and ParallelContext.

    `world_size` is the number of ranks that run the same steps: without attention data parallelism all of a replica's,
    with it those that share a data-parallel rank. Never anything from a request.
    """
    attention_parallel = int(parallel.attn_tp_size) * int(parallel.attn_cp_size)
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
        "data_parallel": int(parallel.num_dp_ranks),
        "attention_data_parallel": int(parallel.attn_dp_size),
        "expert_parallel": int(parallel.moe_ep_size) > 1,
        "expert_parallel_size": int(parallel.moe_ep_size),
        "world_size": attention_parallel * int(parallel.pp_size),
        "pid": os.getpid(),
    }


def rank_of(parallel: Any) -> int:
    """The rank of this process in its replica, from 0; replicas of plain data parallelism count on from one another."""
    within = int(parallel.pp_rank) * int(parallel.tp_size) + int(parallel.tp_rank)
    if parallel.attn_dp_enabled:
        return within
    return int(parallel.dp_rank or 0) * int(parallel.pp_size) * int(parallel.tp_size) + within


def is_first(parallel: Any) -> bool:
    """Whether this rank is the one that receives the requests of its data-parallel rank."""
    return not (parallel.pp_rank or parallel.attn_tp_rank or parallel.attn_cp_rank)
