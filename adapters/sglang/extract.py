"""Pure extractors: objects of SGLang in, words of records out. No clock, no ring, no import of SGLang.

Written against SGLang 0.5.23 (paths are relative to sglang/srt): ScheduleBatch, Req and the finish reasons in
managers/schedule_batch.py; ReqState in managers/tokenizer_manager.py, requests and outputs in managers/io_struct.py,
the times in observability/req_time_stats.py.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.ids import handle
from stagetrace.instrument.stages import Finish, QueueCause

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HEALTH_CHECK = "HEALTH_CHECK"  # how the ids of the requests begin that SGLang's /health makes
_FINISH_BY_TYPE = {"stop": Finish.STOP, "length": Finish.LENGTH, "abort": Finish.ABORT}
# An enum's attributes are slow to look up.
_KV_SPACE, _BATCH_FULL, _TOKEN_BUDGET = map(int, (QueueCause.KV_SPACE, QueueCause.BATCH_FULL, QueueCause.TOKEN_BUDGET))
_PAUSED, _TURN = int(QueueCause.PAUSED), int(QueueCause.TURN)
_CLIENT_ERROR = 400  # from this HTTP status on an abort is an error that the client is told


def instance_of(port_args: Any, dp_rank: int, token: str = "") -> int:
    """The engine instance of a scheduler: the same on all its ranks, another after a restart.

    Nothing travels from a scheduler to its ranks, since every rank schedules for itself. What they share is the token
    of the server's start in PortArgs.instance_id, or on several nodes `token`, and their data-parallel rank.
    """
    # Without an instance_id: the name of a socket, which is random too.
    token = token or getattr(port_args, "instance_id", "") or port_args.tokenizer_ipc_name
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
    per_decode: int = 1,
) -> tuple[int, ...]:
    """What is in a batch, in the order of stages.STEP_COMPOSITION.

    `chunks` has (q, kv, cached) of every request in prefill: its tokens in the step, its context after it, and the
    prompt tokens found in a cache when it joined (0 in later chunks). The others are in decode, with `per_decode`
    tokens each: one, and with speculation the drafts to verify; `decode_context` is the sum of their contexts after
    the step. `kv_usage` is a fraction.
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
        decode_requests * per_decode,
        decode_context,
        decode_requests * per_decode * per_decode,
        decode_context * per_decode,
        cached_tokens,
        waiting,
        running,
        int(kv_usage * 1_000_000 + 0.5),
        preempted,
        decode_requests * (per_decode - 1),
    )


def kv_usage(scheduler: Any) -> float:
    """The share of the KV cache's tokens that running requests hold, as SGLang's own token usage has it."""
    if scheduler.is_hybrid_swa or scheduler.is_hybrid_ssm:
        return float(scheduler.pool_stats_observer.get_pool_stats().get_max_pool_usage())
    free = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
    return 1.0 - float(free) / float(scheduler.max_total_num_tokens)


def held_back(scheduler: Any, batch: Any, running: Any, preempted: int) -> int:
    """Why requests that wait were not taken into the batch that was just chosen: a stages.QueueCause.

    In constant time. `batch` is None where there is none; `running`: the batch of those in decode, beside it;
    `preempted`: how many were thrown out. SGLang notes in `batch_is_full` that nobody can be taken in until a request
    leaves, for want of a place or of room for KV; what a step may prefill is counted again each time.
    TURN where none waits, or it cannot be told (priorities, a delayed prefill, LoRA adapters).
    """
    if not scheduler.waiting_queue:
        return _TURN
    if getattr(scheduler, "_engine_paused", False):
        return _PAUSED
    if preempted:
        return _KV_SPACE
    prefills = batch is not None and batch.forward_mode.is_extend()
    requests = len(running.reqs) + (len(batch.reqs) if prefills and batch is not running else 0)
    if scheduler.req_to_token_pool.available_size() <= 0 or requests >= scheduler.max_running_requests:
        return _BATCH_FULL
    if prefills:
        left = scheduler.max_prefill_tokens - batch.extend_num_tokens
        if scheduler.chunked_req is not None or left <= 0:
            return _TOKEN_BUDGET
        chunk = scheduler.chunked_prefill_size
        if chunk is not None and batch.extend_num_tokens >= chunk:
            return _TOKEN_BUDGET
        if not running.batch_is_full and len(scheduler.waiting_queue[0].origin_input_ids) >= left:
            return _TOKEN_BUDGET
    return _KV_SPACE if running.batch_is_full else _TURN


def decode_context(batch: Any, per_decode: int = 1) -> int:
    """Sum of the contexts of a ScheduleBatch in decode, the tokens of this step included; its own column, on the host.

    With speculation (`per_decode` > 1) that column is another, and the requests' own lengths are taken: with overlap
    they lack what the last step gave, which is not known yet.
    """
    lengths = batch.seq_lens_cpu
    if lengths is None or per_decode > 1:
        tokens = sum(len(each.origin_input_ids) + len(each.output_ids) for each in batch.reqs)
        return tokens + len(batch.reqs) * (per_decode - 1)
    return int(lengths.sum())


def per_decode(args: Any) -> int:
    """Tokens of a request in a decode step, by the ServerArgs: its last one, and with speculation the drafts."""
    if not getattr(args, "speculative_algorithm", None):
        return 1
    return max(1, int(getattr(args, "speculative_num_draft_tokens", None) or 1))


def drafted(request: Any, per_decode: int) -> tuple[int, int] | None:
    """Draft tokens that were verified for a Req, and accepted of them; None where there were none."""
    steps = int(getattr(request, "spec_verify_ct", 0) or 0)
    if not steps or per_decode == 1:
        return None
    return steps * (per_decode - 1), int(request.spec_num_correct_drafts)


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


def queued_at(time_stats: Any) -> float:
    """When a request was taken in, in seconds of SGLang's clock; 0 if it was not.

    A server that only prefills or only decodes takes it into another queue first, until its KV has a place.
    """
    names = ("prefill_bootstrap_queue_entry_time", "decode_prealloc_queue_entry_time", "wait_queue_entry_time")
    return next((float(found) for name in names if (found := getattr(time_stats, name, 0.0))), 0.0)


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


def limits(scheduler: Any) -> dict[str, int]:
    """The limits that a Scheduler goes by, which it works out where its arguments name none; those that there are."""
    found = {
        "max_num_seqs": getattr(scheduler, "max_running_requests", None),
        "chunked_prefill_size": getattr(scheduler, "chunked_prefill_size", None),
        "kv_cache_tokens": getattr(scheduler, "max_total_num_tokens", None),
    }
    return {name: int(value) for name, value in found.items() if value}


def rank_of(parallel: Any) -> int:
    """The rank of this process in its replica, from 0; replicas of plain data parallelism count on from one another."""
    within = int(parallel.pp_rank) * int(parallel.tp_size) + int(parallel.tp_rank)
    if parallel.attn_dp_enabled:
        return within
    return int(parallel.dp_rank or 0) * int(parallel.pp_size) * int(parallel.tp_size) + within


def is_first(parallel: Any) -> bool:
    """Whether this rank is the one that receives the requests of its data-parallel rank."""
    return not (parallel.pp_rank or parallel.attn_tp_rank or parallel.attn_cp_rank)


# In the front end


def finish_of_reason(reason: Mapping[str, Any]) -> Finish:
    """stages.Finish of a finish reason as it travels to the front end: an abort with an error's status is an error."""
    finish = _FINISH_BY_TYPE.get(str(reason.get("type")), Finish.UNKNOWN)
    if finish is Finish.ABORT and int(reason.get("status_code") or 0) >= _CLIENT_ERROR:
        return Finish.ERROR
    return finish


def prompt_tokens(request: Any) -> int:
    """Tokens in a tokenized request's prompt; 0 where it is embeddings of unknown length, or goes on in a session."""
    if getattr(request, "session_params", None) is not None:
        return 0  # the scheduler has what came before
    tokens = request.input_ids if request.input_ids is not None else getattr(request, "input_embeds", None)
    return 0 if tokens is None else len(tokens)


def max_tokens(request: Any) -> int:
    """The most tokens that a tokenized request may generate; 0 where that is unbounded, or nothing is generated."""
    return int(getattr(request.sampling_params, "max_new_tokens", None) or 0)


def lora_name(request: Any) -> str:
    """The LoRA adapter that a request asks for; empty for none, or for a list of them."""
    name = getattr(request, "lora_path", None)
    return name if isinstance(name, str) else ""


def priority(request: Any) -> int:
    """A request's priority, 0 without one."""
    found = getattr(request, "priority", None)
    return found if isinstance(found, int) else 0


def samples(request: Any) -> int:
    """How many answers a GenerateReqInput asks for: OpenAI's n."""
    parameters = getattr(request, "sampling_params", None)
    return int(parameters.get("n") or 1) if isinstance(parameters, dict) else 1


def refused(states: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Of the ReqStates of a call that failed, by id, those that never reached the scheduler and are no health check.

    `known` are those of all requests. With n > 1 SGLang makes n states for each prompt before it looks at them.
    """
    found = [
        rid
        for rid, state in states.items()
        if not state.dispatched and known.get(rid) is state and not rid.startswith(HEALTH_CHECK)
    ]
    return found[: -(-len(found) // samples(states[found[0]].obj))] if found else []


def native_trace_context(time_stats: Any) -> str:
    """The root span that SGLang's own tracing has begun for a request: a traceparent and a newline; empty without."""
    native = getattr(time_stats, "trace_ctx", None)
    if native is None or getattr(native, "tracing_enable", False) is not True:
        return ""
    span = getattr(native, "root_span", None)
    if span is None:
        return ""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}\n"


def first_output_ns(state: Any, begin: int) -> int:
    """When the front end had a request's first token: SGLang's own time where it took it here, else the batch's begin.

    For a request that is not streamed SGLang's first token time is the scheduler's.
    """
    if state is None or not getattr(state.obj, "stream", False):
        return begin
    return max(time_ns(state.time_stats.first_token_time), begin)


def finished(output: Any, index: int) -> tuple[int, int, int, int]:
    """The words of Event.LAST_OUTPUT, of one request in a batch of outputs: stages.Finish, output, prompt, cached."""
    return (
        int(finish_of_reason(output.finished_reasons[index])),
        _count(output, "completion_tokens", index),
        _count(output, "prompt_tokens", index),
        _count(output, "cached_tokens", index),
    )


def _count(output: Any, name: str, index: int) -> int:
    """A number of tokens; embeddings have no output, for example."""
    counts = getattr(output, name, None)
    return int(counts[index]) if counts else 0
