"""The hook points in vLLM: which function, what the handler relies on, from which level on, and what it gives."""

from __future__ import annotations

from stagetrace.instrument.hooks import HookPoint
from stagetrace.instrument.stages import Level

from . import front_end, scheduler, startup, worker

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_OUTPUTS = "vllm.v1.engine.output_processor:OutputProcessor"
_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_STEP_TIMING = "vllm.v1.worker.gpu.async_utils:StepTimingCollector"
_LOADER = "vllm.model_executor.model_loader"
_CYCLES = (
    "uvicorn.protocols.http.httptools_impl:RequestResponseCycle",
    "uvicorn.protocols.http.h11_impl:RequestResponseCycle",
)
_FRONT, _CORE, _RANK = "front end", "engine core", "worker"

_SPECULATORS = "vllm.v1.worker.gpu.spec_decode"
_V2_SPECULATORS = (
    "target_dependent_ar.speculator:TargetDependentARSpeculator",
    "multi_module_mtp.speculator:MultiModuleMTPSpeculator",
    "standalone_ar.speculator:StandaloneARSpeculator",
    "ngram.speculator:NgramGPUSpeculator",
    "dflash.speculator:DFlashSpeculator",
)
_LOADERS = ("default_loader:DefaultModelLoader", "dummy_loader:DummyModelLoader")
_CPU_WORKER = "vllm.v1.worker.cpu_worker:CPUWorker"
_STARTUP = (
    ("vllm.v1.engine.core:EngineCore._initialize_kv_caches", ("self", "vllm_config"), _CORE, "set_up_kv_cache"),
    ("vllm.v1.worker.worker_base:WorkerWrapperBase.init_device", ("self",), _RANK, "init_device"),
    (f"{_WORKER}.load_model", ("self",), _RANK, "model_load"),
    (f"{_LOADER}.base_loader:initialize_model", ("vllm_config",), _RANK, "build_model"),
    *((f"{_LOADER}.{loader}.load_weights", ("self", "model"), _RANK, "load_weights") for loader in _LOADERS),
    *((f"{owner}.determine_available_memory", ("self",), _RANK, "profile_memory") for owner in (_WORKER, _CPU_WORKER)),
    *((f"{owner}.initialize_kv_cache", ("self",), _RANK, "allocate_kv_cache") for owner in (_RUNNER, _RUNNER_V2)),
    ("vllm.compilation.backends:VllmBackend.__call__", ("self", "graph"), _RANK, "compile"),
    *((f"{owner}.capture_model", ("self",), _RANK, "graph_capture") for owner in (_RUNNER, _RUNNER_V2)),
    *((f"{owner}.compile_or_warm_up_model", ("self",), _RANK, "warm_up") for owner in (_WORKER, _CPU_WORKER)),
)

HOOK_POINTS: tuple[HookPoint, ...] = (
    HookPoint(
        f"{_OUTPUTS}.__init__", ("self",), Level.OFF, _FRONT, front_end.opens_recorder, "the process is a front end"
    ),
    HookPoint(
        f"{_OUTPUTS}.add_request",
        ("self", "request", "prompt", "parent_req", "request_index"),
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
    *(
        HookPoint(f"{cycle}.run_asgi", ("self", "app"), Level.REQUEST, _FRONT, front_end.run_asgi, "traceparent")
        for cycle in _CYCLES
    ),
    *(
        HookPoint(
            f"{cycle}.send", ("self", "message"), Level.REQUEST, _FRONT, front_end.send, "first and last byte sent"
        )
        for cycle in _CYCLES
    ),
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
        ("self", "scheduler_output", "model_runner_output"),
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
        "vllm.v1.structured_output:StructuredOutputManager._create_grammar",
        ("self", "request"),
        Level.REQUEST,
        _CORE,
        scheduler.grammar_compiled,
        "until when the queue was waiting for a grammar",
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
    *(
        HookPoint(target, ("self",), Level.STEP, _RANK, worker.propose_drafts, "draft")
        for target in (
            f"{_RUNNER}.propose_draft_token_ids",
            *(f"{_SPECULATORS}.{name}.propose" for name in _V2_SPECULATORS),
        )
    ),
    *(
        HookPoint(target, ("self",), Level.STEP, _RANK, worker.verify_drafts, "verify")
        for target in (
            "vllm.v1.sample.rejection_sampler:RejectionSampler.forward",
            f"{_SPECULATORS}.rejection_sampler:RejectionSampler.__call__",
        )
    ),
    HookPoint(
        f"{_WORKER}.execute_dummy_batch",
        ("self",),
        Level.STEP,
        _RANK,
        worker.dummy_run,
        "dummy runs of data parallelism",
    ),
    HookPoint(
        "vllm.v1.engine.core:DPEngineCoreProc._has_global_unfinished_reqs",
        ("self",),
        Level.STEP,
        _CORE,
        scheduler.dp_sync,
        "dp_sync",
    ),
    HookPoint(
        "vllm.v1.executor.abstract:Executor.__init__",
        ("self", "vllm_config"),
        Level.OFF,
        _CORE,
        scheduler.starts_workers,
        "the process is to be an engine core; start_workers",
    ),
    # The last that EngineCore.__init__ calls.
    HookPoint("vllm.v1.engine.core:enable_envs_cache", (), Level.OFF, _CORE, startup.is_ready, "startup of the core"),
    *(
        HookPoint(f"{target}.__init__", ("self", "vllm_config"), Level.OFF, _FRONT, startup.whole, "startup")
        for target in ("vllm.v1.engine.async_llm:AsyncLLM", "vllm.v1.engine.llm_engine:LLMEngine")
    ),
    HookPoint(f"{_WORKER}.__init__", ("self", "vllm_config"), Level.OFF, _RANK, startup.begins, "imports"),
    *(
        HookPoint(target, parameters, Level.OFF, process, startup.part(stage, stage == "warm_up"), stage)
        for target, parameters, process, stage in _STARTUP
    ),
)
