"""The hook points in vLLM: which function, what the handler relies on, from which level on, and what it gives.

A function that has another name or other leading parameters in some releases has a row for each, with its range.
"""

from __future__ import annotations

from dataclasses import replace

from stagetrace.instrument.hooks import HookPoint
from stagetrace.instrument.stages import Collective, Level

from ..http import HTTP_POINTS
from . import compile_key, connector, front_end, layers, scheduler, startup, worker

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_OUTPUTS = "vllm.v1.engine.output_processor:OutputProcessor"
_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_PIPELINE = "vllm.v1.worker.gpu.pp_utils:PPHandler"
_STEP_TIMING = "vllm.v1.worker.gpu.async_utils:StepTimingCollector"
_LOADER = "vllm.model_executor.model_loader"
# The releases that the table is held against (tests/contracts): what docs/compatibility.md says of them is so.
RELEASES = ("0.20.2", "0.24.0", "0.28.0", "0.30.0", "0.32.0", "0.33.0")
_FRONT, _CORE, _RANK = "front end", "engine core", "worker"

_SPECULATORS = "vllm.v1.worker.gpu.spec_decode"
# Those of Model Runner V2, each from the release that has its way of drafting; then what drafted in place of the first.
_V2_SPECULATORS = (
    ("target_dependent_ar.speculator:TargetDependentARSpeculator", "0.32"),
    ("multi_module_mtp.speculator:MultiModuleMTPSpeculator", "0.28"),
    ("standalone_ar.speculator:StandaloneARSpeculator", "0.32"),
    ("ngram.speculator:NgramGPUSpeculator", "0.32"),
    ("dflash.speculator:DFlashSpeculator", "0.24"),
)
_EARLIER_V2_SPECULATORS = (
    ("autoregressive.speculator:AutoRegressiveSpeculator", "0.23", "0.32"),
    ("eagle.speculator:EagleSpeculator", "", "0.23"),
)


def _drafts(speculator: str) -> HookPoint:
    """A speculator of Model Runner V2."""
    target = f"{_SPECULATORS}.{speculator}.propose"
    return HookPoint(target, ("self",), Level.STEP, _RANK, worker.propose_drafts, "draft", missed=False)


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
_MOE = "vllm.model_executor.layers.fused_moe"
_ROUTER = f"{_MOE}.router.base_router:BaseRouter"
_KERNEL = f"{_MOE}.modular_kernel:FusedMoEKernelModularImpl"
_GROUP = "vllm.distributed.parallel_state:GroupCoordinator"
_COMMUNICATORS = "vllm.distributed.device_communicators"


def _in_a_layer(target: str, parameters: tuple[str, ...], stage: str, gives: str = "", since: str = "") -> HookPoint:
    """A function that all layers share; the last of `parameters` is a tensor with a row for each token."""
    handler = layers.of_layer(stage, parameters[-1])
    return HookPoint(target, parameters, Level.LAYER, _RANK, handler, gives or stage, since, compiled=True)


def _of_a_group(function: str, parameters: tuple[str, ...], op: Collective, size: str, since: str = "") -> HookPoint:
    """An operation of a group of ranks; `size` names what has its bytes: a parameter, or the result.

    One that a group did not have before a release was done by others of the table there: it is not missed.
    """
    target, gives = f"{_GROUP}.{function}", f"collective: {op.text} ({function.strip('_')})"
    handler = layers.collective(op, size)
    return HookPoint(target, parameters, Level.LAYER, _RANK, handler, gives, since, missed=False, compiled=True)


_LAYER_POINTS = (
    HookPoint(
        f"{_WORKER}.initialize_from_config",
        ("self",),
        Level.OFF,
        _RANK,
        layers.initialized,
        "what layers the model has, and hooks on them",
    ),
    HookPoint(
        layers.ATTENTION,
        ("self", "layer", "query"),
        Level.LAYER,
        _RANK,
        layers.on_objects,
        "attention",
        compiled=True,
        per_object=True,
    ),
    HookPoint(
        layers.MODULE,
        ("self",),
        Level.LAYER,
        _RANK,
        layers.on_objects,
        "mlp, shared_experts",
        compiled=True,
        per_object=True,
    ),
    HookPoint(
        f"{_MOE}.router.base_router:BaseRouter.set_capture_fn",
        ("self", "capture_fn"),
        Level.OFF,
        _RANK,
        layers.capture_fn_set,
        "that counting goes on when another wants the chosen experts",
    ),
    HookPoint(
        layers.CHOSEN,
        ("self", "capture_fn"),
        Level.LAYER,
        _RANK,
        layers.on_objects,
        "tokens by expert",
        per_object=True,
    ),
    HookPoint(
        "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding.forward",
        ("self", "input_"),
        Level.LAYER,
        _RANK,
        layers.of_model("embed", "input_"),
        "embed",
        compiled=True,
    ),
    HookPoint(
        "vllm.model_executor.layers.logits_processor:LogitsProcessor.forward",
        ("self", "lm_head", "hidden_states"),
        Level.LAYER,
        _RANK,
        layers.of_model("logits", "hidden_states"),
        "logits",
        compiled=True,
    ),
    HookPoint(
        f"{_RUNNER}._execute_mm_encoder",
        ("self", "scheduler_output"),
        Level.LAYER,
        _RANK,
        layers.encoder,
        "encode",
    ),
    HookPoint(
        "vllm.v1.worker.gpu.mm.encoder_runner:EncoderRunner.execute_mm_encoder",
        ("self", "mm_kwargs"),
        Level.LAYER,
        _RANK,
        layers.encoder_runner,
        "encode",
    ),
    HookPoint(
        f"{_MOE}.runner.moe_runner:MoERunner._forward_impl",
        ("self",),
        Level.LAYER,
        _RANK,
        layers.moe_begins,
        "which layer's experts run",
        compiled=True,
    ),
    _in_a_layer(f"{_ROUTER}._select_experts", ("self", "hidden_states"), "moe_route", since="0.24"),
    replace(
        _in_a_layer(f"{_ROUTER}.select_experts", ("self", "hidden_states"), "moe_route"),
        before="0.24",
        stands_for=f"{_ROUTER}._select_experts",
    ),
    _in_a_layer(f"{_KERNEL}._prepare", ("self", "hidden_states"), "expert_dispatch"),
    _in_a_layer(f"{_KERNEL}._fused_experts", ("self", "in_dtype", "a1q"), "expert_compute"),
    _in_a_layer(f"{_KERNEL}._finalize", ("self", "output"), "expert_combine"),
    _in_a_layer(
        f"{_MOE}.modular_kernel:FusedMoEKernelMonolithicImpl.apply",
        ("self", "hidden_states"),
        "expert_compute",
        "expert_compute, of kernels that route as well",
    ),
    # In such a kernel: how it moves tokens, and the choice of experts on the CPU, where most leave it to a router from
    # 0.30 on.
    *(
        _in_a_layer(f"{_MOE}.prepare_finalize.{owner}.{function}", ("self", tensor), stage)
        for owner in (
            "no_dp_ep:MoEPrepareAndFinalizeNoDPEPMonolithic",
            "naive_dp_ep:MoEPrepareAndFinalizeNaiveDPEPMonolithic",
        )
        for function, tensor, stage in (
            ("prepare", "a1", "expert_dispatch"),
            ("finalize", "fused_expert_output", "expert_combine"),
        )
    ),
    *(
        HookPoint(
            f"{_MOE}.{module}:select_experts",
            ("hidden_states",),
            Level.LAYER,
            _RANK,
            layers.chosen_on_cpu,
            "moe_route and tokens by expert, of the CPU's kernels that route as well",
            since,
            before,
            stands_for=f"{_MOE}.router.cpu_router:select_experts",
            compiled=True,
        )
        for module, since, before in (
            ("cpu_fused_moe", "", "0.28"),
            ("experts.cpu_moe", "0.28", "0.30"),
            ("router.cpu_router", "0.30", ""),
        )
    ),
    *(
        _of_a_group(function, ("self", tensor), op, tensor, *since)
        for function, tensor, op, *since in (
            ("_all_reduce_out_place", "input_", Collective.ALL_REDUCE),
            ("_all_gather_out_place", "input_", Collective.ALL_GATHER),
            ("all_gatherv", "input_", Collective.ALL_GATHER),
            ("_reduce_scatter_out_place", "input_", Collective.REDUCE_SCATTER),
            ("reduce_scatterv", "input_", Collective.REDUCE_SCATTER),
            ("reduce_scatterv_into_output", "input_", Collective.REDUCE_SCATTER, "0.32"),
            ("gather", "input_", Collective.GATHER),
            ("broadcast", "input_", Collective.BROADCAST),
            ("dispatch", "hidden_states", Collective.DISPATCH),
            ("dispatch_router_logits", "hidden_states", Collective.DISPATCH),
            ("combine", "hidden_states", Collective.COMBINE),
            ("combine_into_output", "hidden_states", Collective.COMBINE, "0.32"),
            ("send", "tensor", Collective.SEND),
            ("send_tensor_dict", "tensor_dict", Collective.SEND),
            ("isend_tensor_dict", "tensor_dict", Collective.SEND),
        )
    ),
    *(
        _of_a_group(function, ("self",), op, size)
        for function, op, size in (
            ("broadcast_tensor_dict", Collective.BROADCAST, "result"),
            ("recv", Collective.RECEIVE, "result"),
            ("recv_tensor_dict", Collective.RECEIVE, "result"),
            ("barrier", Collective.BARRIER, ""),
        )
    ),
    # What goes past the coordinator of its group.
    HookPoint(
        "vllm.v1.worker.dp_utils:_run_ar",
        ("should_ubatch",),
        Level.LAYER,
        _RANK,
        layers.of_data_parallel(Collective.ALL_REDUCE, "result", "should_ubatch"),
        "collective: all_reduce of the data-parallel ranks' batch sizes",
    ),
    HookPoint(
        "vllm.v1.worker.gpu.dp_utils:sync_cudagraph_and_dp_padding",
        ("cudagraph_manager",),
        Level.LAYER,
        _RANK,
        layers.of_data_parallel(Collective.ALL_REDUCE, "", "cudagraph_manager"),
        "collective: all_reduce of the data-parallel ranks' batch sizes",
    ),
    *(
        HookPoint(
            target,
            ("self", *filter(None, (size,))),
            Level.LAYER,
            _RANK,
            layers.of_pipeline(size, "self"),
            "collective: broadcast of the sampled tokens to the ranks of the pipeline",
            since,
            missed=False,
        )
        for target, size, since in (
            (f"{_RUNNER}._pp_broadcast_prev_sampled_token_ids", "sampled_token_ids", ""),
            (f"{_RUNNER}._pp_receive_prev_sampled_token_ids_to_input_batch", "", ""),
            (f"{_PIPELINE}.broadcast", "sampled_token_ids", "0.24"),
            (f"{_PIPELINE}.receive", "", "0.24"),
        )
    ),
    # The ways in which a CUDA communicator carries out an all_reduce: which one it was.
    *(
        HookPoint(
            f"{_COMMUNICATORS}.{target}",
            ("self",),
            Level.LAYER,
            _RANK,
            layers.carried_out_by(name),
            "the algorithm of a collective",
        )
        for target, name in (
            ("custom_all_reduce:CustomAllreduce.custom_all_reduce", "custom all_reduce"),
            ("symm_mem:SymmMemCommunicator.all_reduce", "symmetric memory"),
            ("pynccl:PyNcclCommunicator.all_reduce", "NCCL"),
            ("flashinfer_all_reduce:FlashInferAllReduce.all_reduce", "FlashInfer"),
            ("quick_all_reduce:QuickAllReduce.quick_all_reduce", "QuickReduce"),
        )
    ),
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
        f"{_SCHEDULER}.set_pause_state",
        ("self", "pause_state"),
        Level.REQUEST,
        _CORE,
        scheduler.paused,
        "the queue's cause while the engine is paused",
    ),
    HookPoint(
        f"{_SCHEDULER}._update_from_kv_xfer_finished",
        ("self", "kv_connector_output"),
        Level.REQUEST,
        _CORE,
        scheduler.kv_transfers_finished,
        "kv_transfer ends",
    ),
    *(
        HookPoint(target, parameters, Level.REQUEST, _CORE, connector.on_connector, gives, per_object=True)
        for target, parameters, gives in (
            (connector.MATCHED, ("self", "request", "num_computed_tokens"), "which requests are to fetch KV"),
            (connector.ALLOCATED, ("self", "request", "blocks", "num_external_tokens"), "kv_transfer begins"),
        )
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
        HookPoint(f"{target}.get_output", ("self",), Level.STEP, _RANK, worker.output_fetched, "that a step is done")
        for target in (
            "vllm.v1.worker.gpu_model_runner:AsyncGPUModelRunnerOutput",
            "vllm.v1.worker.gpu.async_utils:AsyncOutput",
        )
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
        HookPoint(target, ("self",), Level.STEP, _RANK, worker.model_forward, "where prepare becomes forward", since)
        for target, since in ((f"{_RUNNER}._model_forward", ""), (f"{_STEP_TIMING}.forward_start", "0.28"))
    ),
    HookPoint(
        f"{_RUNNER}._bookkeeping_sync", ("self",), Level.STEP, _RANK, worker.bookkeeping_sync, "where sampling ends"
    ),
    HookPoint(f"{_RUNNER_V2}.sample", ("self",), Level.STEP, _RANK, worker.sample, "where sampling ends"),
    HookPoint(f"{_RUNNER}.propose_draft_token_ids", ("self",), Level.STEP, _RANK, worker.propose_drafts, "draft"),
    *(replace(_drafts(name), since=since) for name, since in _V2_SPECULATORS),
    *(
        replace(_drafts(name), since=since, before=before, stands_for=_drafts(_V2_SPECULATORS[0][0]).target)
        for name, since, before in _EARLIER_V2_SPECULATORS
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
    *(
        HookPoint(f"{owner}.{function}", parameters, Level.REQUEST, _RANK, handler, "sleep")
        for owner in (_WORKER, _CPU_WORKER)
        for function, parameters, handler in (
            ("sleep", ("self", "level"), worker.falls_asleep),
            ("wake_up", ("self", "tags"), worker.wakes_up),
        )
    ),
    *(
        HookPoint(
            f"{_WORKER}.{function}",
            ("self",),
            Level.REQUEST,
            _RANK,
            worker.weights_updated,
            "weight_update",
            since,
            missed=False,
        )
        for function, since in (
            ("reload_weights", ""),
            ("start_weight_update", "0.24"),
            ("update_weights", ""),
            ("finish_weight_update", "0.24"),
        )
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
    HookPoint(
        "vllm.v1.engine.core:enable_envs_cache", (), Level.OFF, _CORE, startup.core_is_ready, "startup of the core"
    ),
    *(
        HookPoint(f"{target}.__init__", ("self", "vllm_config"), Level.OFF, _FRONT, startup.whole, "startup")
        for target in ("vllm.v1.engine.async_llm:AsyncLLM", "vllm.v1.engine.llm_engine:LLMEngine")
    ),
    HookPoint(f"{_WORKER}.__init__", ("self", "vllm_config"), Level.OFF, _RANK, startup.begins, "imports"),
    *(
        HookPoint(target, parameters, Level.OFF, process, startup.part(stage, stage == "warm_up"), "start-up")
        for target, parameters, process, stage in _STARTUP
    ),
    *(
        HookPoint(target, ("self",), level, _RANK, connector.on_connector, stage, compiled=True, per_object=True)
        for level, calls in ((Level.STEP, connector.CALLS), (Level.LAYER, connector.LAYER_CALLS))
        for target, stage in calls.items()
    ),
    HookPoint(
        "vllm.envs:compile_factors",
        (),
        Level.OFF,
        _RANK,
        compile_key.factors_gathered,
        "that the compile key is the same with stagetrace among VLLM_PLUGINS",
    ),
    *_LAYER_POINTS,
)
