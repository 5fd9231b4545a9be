"""Pure extractors: objects of vLLM in, words of records out. No clock, no ring, no import of vLLM.

Written against vLLM 0.32.0: SchedulerOutput and CachedRequestData in v1/core/sched/output.py, RequestStatus in
v1/request.py, FinishReason in v1/engine/__init__.py.
"""

from __future__ import annotations

import os
from operator import mul
from typing import TYPE_CHECKING, Any

from stagetrace.adapters.waiting import OWN
from stagetrace.instrument.stages import Finish, GraphMode, QueueCause

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

# An enum's attributes are slow to look up.
_KV_SPACE, _BATCH_FULL, _TOKEN_BUDGET = map(int, (QueueCause.KV_SPACE, QueueCause.BATCH_FULL, QueueCause.TOKEN_BUDGET))
_PAUSED, _TURN = int(QueueCause.PAUSED), int(QueueCause.TURN)

_FINISH_BY_REASON = (Finish.STOP, Finish.LENGTH, Finish.ABORT, Finish.ERROR, Finish.REPETITION)
_GRAPH_MODES = {mode.name: mode for mode in GraphMode if mode}
_FINISH_BY_STATUS = {
    "FINISHED_STOPPED": Finish.STOP,
    "FINISHED_LENGTH_CAPPED": Finish.LENGTH,
    "FINISHED_ABORTED": Finish.ABORT,
    "FINISHED_IGNORED": Finish.LENGTH,
    "FINISHED_ERROR": Finish.ERROR,
    "FINISHED_REPETITION": Finish.REPETITION,
}


def composition(
    output: Any,
    chunks: Sequence[tuple[int, int, int]],
    waiting: int,
    running: int,
    kv_usage: float,
    preempted: int,
    before: int = -1,
) -> tuple[int, ...]:
    """What is in a scheduled batch, in the order of stages.STEP_COMPOSITION.

    `output` is the SchedulerOutput, `chunks` has (q, kv, cached) of every request in prefill: its tokens in the step,
    its context after it, and the prompt tokens found in a cache when it joined (0 in later chunks). All others are in
    decode. `kv_usage` is a fraction. `before` is the sum of the tokens that the cached requests had computed before the
    step, where that is known; else it is summed. The batch is not looped over in Python: decode's context is vLLM's own
    column, summed in C, and so is what speculation needs.
    """
    requests, tokens = len(output.num_scheduled_tokens), output.total_num_scheduled_tokens
    drafts = output.scheduled_spec_decode_tokens
    if before < 0:
        before = sum(output.scheduled_cached_reqs.num_computed_tokens)
    kv_millionths = int(kv_usage * 1_000_000 + 0.5)
    if not (chunks or drafts or output.scheduled_new_reqs):  # steady decode: every q is 1
        context = before + tokens
        return (
            0,
            requests,
            0,
            0,
            0,
            0,
            tokens,
            context,
            requests,
            context,
            0,
            waiting,
            running,
            kv_millionths,
            preempted,
            0,
        )
    prefill_requests = prefill_tokens = prefill_context = prefill_before = prefill_q_q = prefill_q_kv = 0
    cached_tokens = 0
    for q, kv, found in chunks:
        prefill_requests += 1
        prefill_tokens += q
        prefill_context += kv
        prefill_before += kv - q
        prefill_q_q += q * q
        prefill_q_kv += q * kv
        cached_tokens += found
    decode_requests = requests - prefill_requests
    decode_tokens = tokens - prefill_tokens
    decode_context = decode_q_q = decode_q_kv = 0
    if decode_requests:
        for new in output.scheduled_new_reqs:
            before += new.num_computed_tokens
        decode_context = before - prefill_before + decode_tokens
        decode_q_q, decode_q_kv = decode_requests, decode_context  # every q is 1
    draft_tokens = 0
    if drafts:
        # Whoever decodes has a token and its drafts in the step: no list of drafts is looked at, each a cache miss. (In
        # the one step after a connector failed to load KV, tokens computed again count as drafts.) A request that is
        # resumed has drafts in its prefill.
        draft_tokens = sum(map(len, drafts.values())) if prefill_requests else tokens - requests
        chunk = max(output.num_scheduled_tokens.values())
        if chunk * requests == tokens and not prefill_requests:  # the same for everyone
            decode_q_q, decode_q_kv = decode_tokens * chunk, decode_context * chunk
        else:
            q_q, q_kv = _products(output)
            decode_q_q, decode_q_kv = q_q - prefill_q_q, q_kv - prefill_q_kv
    return (
        prefill_requests,
        decode_requests,
        prefill_tokens,
        prefill_context,
        prefill_q_q,
        prefill_q_kv,
        decode_tokens,
        decode_context,
        decode_q_q,
        decode_q_kv,
        cached_tokens,
        waiting,
        running,
        kv_millionths,
        preempted,
        draft_tokens,
    )


def _products(output: Any) -> tuple[int, int]:
    """Sums of q squared and of q times kv over the whole batch; in C, since a loop would cost 0.3 µs a request."""
    scheduled, cached = output.num_scheduled_tokens, output.scheduled_cached_reqs
    if [*scheduled] == cached.req_ids:  # in one order where none is new: comparing pointers is cheaper than looking up
        chunks = [*scheduled.values()]
    else:
        chunks = list(map(scheduled.__getitem__, cached.req_ids))
    q_q = sum(map(mul, chunks, chunks))
    q_kv = q_q + sum(map(mul, chunks, cached.num_computed_tokens))
    for new in output.scheduled_new_reqs:
        q = scheduled[new.req_id]
        q_q += q * q
        q_kv += q * (new.num_computed_tokens + q)
    return q_q, q_kv


def sampled_tokens(output: Any, given: Any, dropped: Collection[str]) -> int:
    """How many tokens a step sampled.

    `output` is the SchedulerOutput, `given` the ModelRunnerOutput; `dropped` are requests that ended meanwhile: what
    was sampled for them counts for nothing. update takes off what lies behind a stop. In C: a loop would cost 0.2 µs a
    request.
    """
    sampled = given.sampled_token_ids
    return sum(map(len, sampled)) - sum(map(len, _lost(output, given, dropped)))


def accepted_tokens(output: Any, given: Any, dropped: Collection[str]) -> int:
    """How many draft tokens a step accepted, as in vLLM's metrics: before update takes off what lies behind a stop.

    Of each request that it sampled for all tokens but one. Arguments as in sampled_tokens.
    """
    sampled, lost = given.sampled_token_ids, _lost(output, given, dropped)
    requests: int = len(sampled) - sampled.count([]) - (len(lost) - lost.count([]))
    return sampled_tokens(output, given, dropped) - requests


def _lost(output: Any, given: Any, dropped: Collection[str]) -> list[list[int]]:
    """What a step sampled for requests that had ended meanwhile."""
    return [
        given.sampled_token_ids[given.req_id_to_index[request_id]]
        for request_id in dropped
        if request_id in output.num_scheduled_tokens
    ]


def drafted(request: Any) -> tuple[int, int] | None:
    """Draft tokens that were verified for a request, and accepted of them; None where vLLM does not keep count.

    It does with --per-request-spec-decode-metrics; its histogram says how many steps accepted 0, 1, ... tokens.
    """
    metrics = getattr(request, "spec_decode_metrics", None)
    if metrics is None or not metrics.num_draft_tokens:
        return None
    return metrics.num_draft_tokens, sum(map(mul, metrics.histogram, range(len(metrics.histogram))))


def graph(stats: Any) -> tuple[int, int]:
    """The tokens that a forward pass ran on, and the stages.GraphMode, of a CUDAGraphStat."""
    return int(stats.num_padded_tokens), int(_GRAPH_MODES.get(stats.runtime_mode, GraphMode.UNKNOWN))


def held_back(scheduler: Any, output: Any, preempted: int) -> int:
    """Why requests that wait were not taken into the step that was just scheduled: a stages.QueueCause, or OWN.

    In constant time, in the order in which Scheduler.schedule asks. `preempted`: how many it threw out. vLLM does not
    say that a request did not fit into the KV cache: that is what is left when nothing else held it back.
    TURN where there are none, or it cannot be told.
    """
    _, waiting = scheduler.get_request_counts()
    if not waiting:
        return _TURN
    if scheduler._pause_state:
        return _PAUSED
    if preempted:  # nobody is taken in then
        return _KV_SPACE
    deferred = getattr(scheduler, "deferred_waiting", None)
    if waiting <= len(scheduler.skipped_waiting if deferred is None else deferred):  # the former before 0.31
        return OWN
    config, tokens = scheduler.scheduler_config, output.total_num_scheduled_tokens
    speculation = scheduler.vllm_config.speculative_config
    slots = 0 if speculation is None else getattr(speculation, "max_num_new_slots_for_drafting", 0)
    left = scheduler.max_num_scheduled_tokens - tokens
    drafting = slots and tokens + slots * (len(output.num_scheduled_tokens) + 1)
    if left <= 0 or drafting >= config.max_num_batched_tokens:
        return _TOKEN_BUDGET
    most = getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs)
    if len(scheduler.running) + scheduler.num_waiting_for_streaming_input >= most:
        return _BATCH_FULL
    first = scheduler.waiting.peek_request() if scheduler.waiting else None
    if first is None or first.has_encoder_inputs:  # the encoder has a budget as well
        return _TURN
    if not config.enable_chunked_prefill and first.num_tokens > left:
        return _TOKEN_BUDGET
    return _KV_SPACE


def external_tokens(request: Any) -> int:
    """Of a request that is scheduled first: prompt tokens whose KV came from outside the engine, by a connector."""
    # Taken from it with its first token; older releases have none.
    return int(getattr(getattr(request, "prefill_stats", None), "num_external_cached_tokens", 0))


def finish_of_reason(reason: Any) -> Finish:
    """stages.Finish of a FinishReason (an int from 0), as the front end has it."""
    number = int(reason)
    return _FINISH_BY_REASON[number] if 0 <= number < len(_FINISH_BY_REASON) else Finish.UNKNOWN


def finish_of_status(status: Any) -> Finish:
    """stages.Finish of a RequestStatus, as the scheduler has it."""
    return _FINISH_BY_STATUS.get(getattr(status, "name", ""), Finish.UNKNOWN)


def prompt_tokens(request: Any) -> int:
    """Tokens in an EngineCoreRequest's prompt; 0 where it came as embeddings of unknown length."""
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    embeddings = getattr(request, "prompt_embeds", None)
    return 0 if embeddings is None else int(embeddings.shape[0])


def max_tokens(request: Any) -> int:
    """The most tokens that an EngineCoreRequest may generate; 0 where that is unbounded, or nothing is generated."""
    return int(getattr(request.sampling_params, "max_tokens", None) or 0)


def ranks(config: Any) -> dict[str, int]:
    """The ranks of this process's worker: among all of its engine (`rank`), and in each parallel group."""
    from vllm.distributed import parallel_state

    found = {"rank": int(config.parallel_config.rank)}
    for name in ("tp", "pp", "dp", "ep"):
        group = getattr(parallel_state, f"_{name.upper()}", None)  # None: there is no such group
        if group is not None:
            found[f"{name}_rank"] = int(group.rank_in_group)
    found["dp_rank"] = int(getattr(config.parallel_config, "data_parallel_index", found.get("dp_rank", 0)))
    return found


def process_info(config: Any, version: str) -> dict[str, object]:
    """What the manifest says of an engine's process, from its VllmConfig. Never anything from a request."""
    parallel = config.parallel_config
    scheduler = config.scheduler_config
    model = config.model_config
    tokens = getattr(config.cache_config, "kv_cache_size_tokens", None)  # known to the scheduler alone
    return {
        **({"kv_cache_tokens": int(tokens)} if tokens else {}),
        "engine": "vllm",
        "engine_version": version,
        "model": str(getattr(model, "served_model_name", None) or model.model),
        "model_path": str(model.model),
        "dtype": str(model.dtype),
        "enforce_eager": bool(model.enforce_eager),
        "max_model_len": int(model.max_model_len),
        "max_num_seqs": int(scheduler.max_num_seqs),
        "max_num_batched_tokens": int(scheduler.max_num_batched_tokens),
        "async_scheduling": bool(getattr(scheduler, "async_scheduling", False)),
        "block_size": int(config.cache_config.block_size or 0),
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "device": str(getattr(config.device_config, "device_type", "")),
        "tensor_parallel": int(parallel.tensor_parallel_size),
        "pipeline_parallel": int(parallel.pipeline_parallel_size),
        "data_parallel": int(parallel.data_parallel_size),
        # A dense model's replicas are told that they are alone; their index says which one it is.
        "data_parallel_rank": int(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank)),
        "expert_parallel": bool(getattr(parallel, "enable_expert_parallel", False)),
        "world_size": int(parallel.world_size),
        "pid": os.getpid(),
    }
