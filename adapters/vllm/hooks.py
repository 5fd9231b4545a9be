"""The hook points in vLLM: which function, what the handler relies on, from which level on, and what it gives."""

from __future__ import annotations

from stagetrace.instrument.hooks import HookPoint
from stagetrace.instrument.stages import Level

from ..http import HTTP_POINTS
from . import front_end, scheduler, worker

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_OUTPUTS = "vllm.v1.engine.output_processor:OutputProcessor"
_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_STEP_TIMING = "vllm.v1.worker.gpu.async_utils:StepTimingCollector"
_FRONT, _CORE, _RANK = "front end", "engine core", "worker"

HOOK_POINTS: tuple[HookPoint, ...] = (
    HookPoint(
        f"{_OUTPUTS}.__init__", ("self",), Level.OFF, _FRONT, front_end.opens_recorder, "the process is a front end"
    ),
    HookPoint(
        f"{_OUTPUTS}.add_request",
        ("self", "request"),
        Level.REQUEST,
        _FRONT,
        front_end.add_request,
        "arrival, tokenize, dispatch, ids, trace context",
    ),
    HookPoint(
        f"{_OUTPUTS}.process_outputs",
        ("self", "engine_core_outputs"),
        Level.REQUEST,
        _FRONT,
        front_end.process_outputs,
        "first token in the front end, detokenize",
    ),
    HookPoint(
        f"{_OUTPUTS}._update_stats_from_finished",
        ("self", "req_state", "finish_reason"),
        Level.REQUEST,
        _FRONT,
        front_end.request_finished,
        "finish reason and token counts as the client gets them",
    ),
    HookPoint(
        f"{_OUTPUTS}.abort_requests", ("self", "request_ids"), Level.REQUEST, _FRONT, front_end.abort_requests, "aborts"
    ),
    *HTTP_POINTS,
    HookPoint(
        f"{_SCHEDULER}.__init__",
        ("self", "vllm_config"),
        Level.OFF,
        _CORE,
        scheduler.opens_recorder,
        "the process is an engine core",
    ),
    HookPoint(
        f"{_SCHEDULER}.add_request", ("self", "request"), Level.REQUEST, _CORE, scheduler.add_request, "queue begins"
    ),
    HookPoint(
        f"{_SCHEDULER}.schedule",
        ("self",),
        Level.REQUEST,
        _CORE,
        scheduler.schedule,
        "step begins, its composition, prefill begins, chunks",
    ),
    HookPoint(
        f"{_SCHEDULER}.update_from_output",
        ("self", "scheduler_output"),
        Level.REQUEST,
        _CORE,
        scheduler.update_from_output,
        "step ends, decode begins, last token",
    ),
    HookPoint(
        f"{_SCHEDULER}._preempt_request",
        ("self", "request"),
        Level.REQUEST,
        _CORE,
        scheduler.preempt_request,
        "preemption",
    ),
    HookPoint(
        f"{_SCHEDULER}._free_request",
        ("self", "request"),
        Level.REQUEST,
        _CORE,
        scheduler.free_request,
        "end of a request in the engine",
    ),
    HookPoint(
        f"{_SCHEDULER}.get_grammar_bitmask",
        ("self", "scheduler_output"),
        Level.STEP,
        _CORE,
        scheduler.grammar_bitmask,
        "grammar",
    ),
    HookPoint(
        f"{_WORKER}.execute_model",
        ("self", "scheduler_output"),
        Level.STEP,
        _RANK,
        worker.worker_execute_model,
        "rank_step begins",
    ),
    HookPoint(
        f"{_WORKER}.sample_tokens",
        ("self", "grammar_output"),
        Level.STEP,
        _RANK,
        worker.worker_sample_tokens,
        "rank_step ends",
    ),
    *(
        point
        for runner in (_RUNNER, _RUNNER_V2)
        for point in (
            HookPoint(
                f"{runner}.__init__",
                ("self", "vllm_config"),
                Level.OFF,
                _RANK,
                worker.opens_recorder,
                "the process is a worker",
            ),
            HookPoint(
                f"{runner}.execute_model",
                ("self", "scheduler_output"),
                Level.STEP,
                _RANK,
                worker.runner_execute_model,
                "prepare, forward",
            ),
            HookPoint(
                f"{runner}.sample_tokens",
                ("self", "grammar_output"),
                Level.STEP,
                _RANK,
                worker.runner_sample_tokens,
                "sample, return",
            ),
        )
    ),
    # The two runners have different functions at the borders between stages; only V1 brings tokens to the host here.
    *(
        HookPoint(target, ("self",), Level.STEP, _RANK, worker.model_forward, "where prepare becomes forward")
        for target in (f"{_RUNNER}._model_forward", f"{_STEP_TIMING}.forward_start")
    ),
    HookPoint(
        f"{_RUNNER}._bookkeeping_sync", ("self",), Level.STEP, _RANK, worker.bookkeeping_sync, "where sampling ends"
    ),
    HookPoint(f"{_RUNNER_V2}.sample", ("self",), Level.STEP, _RANK, worker.sample, "where sampling ends"),
)
