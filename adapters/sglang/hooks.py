"""The hook points in SGLang: which function, what the handler relies on, from which level on, and what it gives.

SGLang's own HookRegistry is not used. It imports every module that it patches, in every process (the tokenizer and the
detokenizer would import the model), looks through all loaded modules for each target, and lets a hook's error through.
The plugin's door is: from there modules are patched when the engine imports them, so each process has what it runs.

A function that has another name or other leading parameters in some releases has a row for each, with its range.
"""

from __future__ import annotations

from stagetrace.instrument.hooks import HookPoint
from stagetrace.instrument.stages import Collective, Level

from ..http import HTTP_POINTS
from . import front_end, layers, occasions, scheduler, startup, worker

_TOKENIZER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"
_CONTROLLER = "sglang.srt.managers.data_parallel_controller:DataParallelController"
_DETOKENIZER = "sglang.srt.managers.detokenizer_manager:DetokenizerManager"
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_RUNNER = "sglang.srt.model_executor.model_runner:ModelRunner"
_FRONT, _CORE, _RANK = "front end", "scheduler", "rank"

# The releases that the table is held against (tests/contracts).
RELEASES = ("0.5.15", "0.5.18", "0.5.20", "0.5.22", "0.5.23")

_FRONT_POINTS = (
    HookPoint(
        f"{_TOKENIZER}.__init__", ("self",), Level.OFF, _FRONT, front_end.opens_recorder, "the process is a front end"
    ),
    HookPoint(
        f"{_TOKENIZER}._send_one_request",
        ("self", "tokenized_obj"),
        Level.REQUEST,
        _FRONT,
        front_end.send_one_request,
        "arrival, tokenize, dispatch, ids, trace context",
    ),
    HookPoint(
        f"{_TOKENIZER}._send_batch_request",
        ("self", "tokenized_objs"),
        Level.REQUEST,
        _FRONT,
        front_end.send_batch_request,
        "the same of several requests in one message",
    ),
    HookPoint(
        "sglang.srt.managers.io_struct:GenerateReqInput.regenerate_rid",
        ("self",),
        Level.REQUEST,
        _FRONT,
        front_end.copy_for_sampling,
        "which request the samples belong to (n > 1)",
    ),
    HookPoint(
        f"{_TOKENIZER}._handle_batch_output",
        ("self", "recv_obj"),
        Level.REQUEST,
        _FRONT,
        front_end.handle_batch_output,
        "first token in the front end, finish reason and token counts as the client gets them",
    ),
    HookPoint(
        f"{_TOKENIZER}._handle_abort_req",
        ("self", "recv_obj"),
        Level.REQUEST,
        _FRONT,
        front_end.handle_abort,
        "requests that were given up while they waited",
    ),
    HookPoint(
        f"{_TOKENIZER}.abort_request",
        ("self", "rid"),
        Level.REQUEST,
        _FRONT,
        front_end.abort_request,
        "clients that went away",
    ),
    HookPoint(
        f"{_TOKENIZER}._release_req_states_on_failure",
        ("self", "request_states"),
        Level.REQUEST,
        _FRONT,
        front_end.request_failed,
        "requests that were refused",
        since="0.5.22",
    ),
    HookPoint(
        f"{_TOKENIZER}._tokenize_texts",
        ("self", "texts"),
        Level.STEP,
        _FRONT,
        front_end.tokenize_texts,
        "tokenize",
    ),
    HookPoint(
        f"{_TOKENIZER}._dispatch_to_scheduler", ("self", "obj"), Level.STEP, _FRONT, front_end.dispatch, "dispatch"
    ),
    *HTTP_POINTS,
    HookPoint(
        f"{_CONTROLLER}.__init__",
        ("self",),
        Level.OFF,
        "data-parallel controller",
        front_end.opens_controller,
        "the process is a data-parallel controller",
    ),
    HookPoint(
        f"{_CONTROLLER}.dispatching_with_trace",
        ("self", "req"),
        Level.STEP,
        "data-parallel controller",
        front_end.dispatch,
        "dispatch to a data-parallel rank",
    ),
    HookPoint(
        f"{_DETOKENIZER}.__init__",
        ("self",),
        Level.OFF,
        "detokenizer",
        front_end.opens_detokenizer,
        "the process is a detokenizer",
    ),
    HookPoint(
        f"{_DETOKENIZER}.handle_batch_token_id_out",
        ("self", "recv_obj"),
        Level.STEP,
        "detokenizer",
        front_end.detokenize,
        "detokenize",
    ),
)

_SCHEDULER_POINTS = (
    HookPoint(
        f"{_SCHEDULER}.__init__",
        ("self", "server_args", "port_args"),
        Level.OFF,
        _CORE,
        scheduler.opens_recorder,
        "the process is a scheduler and a rank",
    ),
    HookPoint(
        f"{_SCHEDULER}._add_request_to_queue",
        ("self", "req"),
        Level.REQUEST,
        _CORE,
        scheduler.add_request,
        "queue begins",
    ),
    HookPoint(
        "sglang.srt.constrained.grammar_manager:GrammarManager.process_req_with_grammar",
        ("self", "req"),
        Level.REQUEST,
        _CORE,
        scheduler.wait_for_grammar,
        "queue begins, of requests whose grammar is compiled",
    ),
    HookPoint(
        f"{_SCHEDULER}.get_next_batch_to_run",
        ("self",),
        Level.REQUEST,
        _CORE,
        scheduler.schedule,
        "schedule",
    ),
    HookPoint(
        "sglang.srt.disaggregation.prefill:SchedulerDisaggregationPrefillMixin.get_next_disagg_prefill_batch_to_run",
        ("self",),
        Level.REQUEST,
        _CORE,
        scheduler.schedule,
        "schedule, on a server that only prefills",
    ),
    HookPoint(
        "sglang.srt.disaggregation.decode:SchedulerDisaggregationDecodeMixin.get_next_disagg_decode_batch_to_run",
        ("self",),
        Level.REQUEST,
        _CORE,
        scheduler.schedule,
        "schedule, on a server that only decodes",
    ),
    HookPoint(
        "sglang.srt.managers.scheduler_components.dp_attn:SchedulerDPAttnAdapter.prepare_mlp_sync_batch",
        ("self",),
        Level.STEP,
        _CORE,
        scheduler.dp_sync,
        "dp_sync",
    ),
    HookPoint(
        f"{_SCHEDULER}.run_batch",
        ("self", "batch"),
        Level.REQUEST,
        _CORE,
        scheduler.run_batch,
        "step begins, its composition, prefill begins, chunks, rank_step",
    ),
    HookPoint(
        f"{_SCHEDULER}.launch_batch_sample_if_needed",
        ("self", "batch_result", "cur_batch"),
        Level.STEP,
        _CORE,
        scheduler.launch_sample,
        "rank_step of sampling that waits for the last step's tokens",
        since="0.5.16",
    ),
    HookPoint(
        f"{_SCHEDULER}.launch_batch_sample_if_needed",
        ("self", "batch_result"),
        Level.STEP,
        _CORE,
        scheduler.launch_sample_of_current,
        "rank_step of sampling that waits for the last step's tokens",
        before="0.5.16",
    ),
    HookPoint(
        f"{_SCHEDULER}.process_batch_result",
        ("self", "batch"),
        Level.REQUEST,
        _CORE,
        scheduler.process_result,
        "step ends, decode begins, last token",
    ),
    HookPoint(
        "sglang.srt.observability.req_time_stats:SchedulerReqTimeStats.set_completion_time",
        ("self",),
        Level.REQUEST,
        _CORE,
        scheduler.completed,
        "that a request of the batch ended",
    ),
    HookPoint(
        "sglang.srt.managers.schedule_batch:Req.reset_for_retract",
        ("self",),
        Level.REQUEST,
        _CORE,
        scheduler.retract,
        "preemption",
    ),
    HookPoint(
        f"{_SCHEDULER}.send_abort_output",
        ("self", "abort_req", "req"),
        Level.REQUEST,
        _CORE,
        scheduler.abort_output,
        "end of a request outside a batch",
        since="0.5.23",
    ),
    HookPoint(
        "sglang.srt.managers.scheduler_components.output_sender:SenderWrapper.send_output",
        ("self", "output", "recv_obj"),
        Level.REQUEST,
        _CORE,
        scheduler.output_sent,
        "end of a request outside a batch",
        before="0.5.23",
        stands_for=f"{_SCHEDULER}.send_abort_output",
    ),
    HookPoint(
        "sglang.srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer.stream_output",
        ("self", "reqs"),
        Level.STEP,
        _CORE,
        scheduler.stream_output,
        "emit",
    ),
    HookPoint(
        "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.update_regex_vocab_mask",
        ("self",),
        Level.STEP,
        _CORE,
        scheduler.grammar_mask,
        "grammar",
    ),
)

_RANK_POINTS = (
    HookPoint(
        f"{_RUNNER}.forward", ("self", "forward_batch"), Level.STEP, _RANK, worker.forward, "prepare, forward, draft"
    ),
    HookPoint(
        f"{_RUNNER}.sample", ("self", "logits_output", "forward_batch"), Level.STEP, _RANK, worker.sample, "sample"
    ),
    HookPoint(
        "sglang.srt.speculative.eagle_utils:eagle_sample",
        ("verify_input", "batch", "logits_output"),
        Level.STEP,
        _RANK,
        worker.verify,
        "verify",
    ),
)

_LAYERS = "sglang.srt.layers"
_GROUP = "sglang.srt.distributed.parallel_state:GroupCoordinator"
_COMMUNICATORS = "sglang.srt.distributed.device_communicators"


def _on_objects(target: str, parameters: tuple[str, ...], gives: str) -> HookPoint:
    """What is put on the objects of the loaded model."""
    handler = layers.on_objects
    return HookPoint(target, parameters, Level.LAYER, _RANK, handler, gives, compiled=True, per_object=True)


def _of_a_group(function: str, parameters: tuple[str, ...], op: Collective, size: str) -> HookPoint:
    """An operation of a group of ranks; `size` names what has its bytes: a parameter, or the result."""
    target, gives = f"{_GROUP}.{function}", f"collective: {op.text} ({function.strip('_')})"
    handler = layers.collective(op, size)
    return HookPoint(target, parameters, Level.LAYER, _RANK, handler, gives, missed=False, compiled=True)


_LAYER_POINTS = (
    HookPoint(
        f"{_RUNNER}.init_attention_backends",
        ("self",),
        Level.OFF,
        _RANK,
        layers.attention_is_set_up,
        "what layers the model has, and hooks on them",
    ),
    _on_objects(layers.ATTENTION["RadixAttention"][0], ("self", "q"), "attention"),
    _on_objects(
        layers.ATTENTION["RadixLinearAttention"][0], ("self", "forward_batch", "mixed_qkv"), "attention: linear"
    ),
    _on_objects(layers.ATTENTION["MambaMixer2"][0], ("self", "hidden_states"), "attention: mamba"),
    _on_objects(layers.MODULE, ("self", "x"), "mlp, shared_experts; of every model's own class"),
    _on_objects(layers.ROUTER, ("self",), "moe_route"),
    _on_objects(layers.CHOSEN, ("hidden_states", "router_logits", "topk_config"), "tokens by expert"),
    _on_objects(layers.EXPERTS, ("self", "dispatch_output"), "expert_compute"),
    *(
        _on_objects(door, ("self", "hook"), f"where {stage} {at}")
        for stage, doors in layers.DOORS.items()
        for door, at in zip(doors, ("begins", "ends"), strict=True)
    ),
    HookPoint(
        f"{_LAYERS}.vocab_parallel_embedding:VocabParallelEmbedding.forward",
        ("self", "input_"),
        Level.LAYER,
        _RANK,
        layers.of_model("embed", "input_"),
        "embed",
        compiled=True,
    ),
    HookPoint(
        f"{_LAYERS}.logits_processor:LogitsProcessor.forward",
        ("self", "input_ids", "hidden_states"),
        Level.LAYER,
        _RANK,
        layers.logits,
        "logits",
        compiled=True,
    ),
    HookPoint(
        "sglang.srt.managers.mm_utils:embed_mm_inputs",
        ("mm_inputs_list",),
        Level.LAYER,
        _RANK,
        layers.encoder,
        "encode",
        compiled=True,
    ),
    # The functions that models call; under torch.compile only those with an underscore are run, within operators.
    *(
        _of_a_group(function, ("self", *parameters), op, parameters[-1])
        for function, parameters, op in (
            ("all_reduce", ("input_",), Collective.ALL_REDUCE),
            ("quant_all_reduce", ("input_",), Collective.ALL_REDUCE),
            ("_all_reduce_in_place", ("input_",), Collective.ALL_REDUCE),
            ("_all_reduce_out_place", ("input_",), Collective.ALL_REDUCE),
            ("reduce_scatter_tensor", ("output", "input"), Collective.REDUCE_SCATTER),
            ("_reduce_scatter_tensor", ("output", "input"), Collective.REDUCE_SCATTER),
            ("reduce_scatterv", ("input_",), Collective.REDUCE_SCATTER),
            ("reduce_scatter", ("output", "input_list"), Collective.REDUCE_SCATTER),
            ("all_to_all_single", ("output", "input"), Collective.ALL_TO_ALL),
            ("_all_to_all_single", ("output", "input"), Collective.ALL_TO_ALL),
            ("all_gather_into_tensor", ("output", "input"), Collective.ALL_GATHER),
            ("_all_gather_into_tensor", ("output", "input"), Collective.ALL_GATHER),
            ("all_gather", ("input_",), Collective.ALL_GATHER),
            ("all_gatherv", ("input_",), Collective.ALL_GATHER),
            ("gather", ("input_",), Collective.GATHER),
            ("broadcast", ("input_",), Collective.BROADCAST),
            ("send", ("tensor",), Collective.SEND),
            ("send_tensor_dict", ("tensor_dict",), Collective.SEND),
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
    # The ways in which a group on a device carries out an all_reduce: which one it was.
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
            ("custom_all_reduce_v2:CustomAllReduceV2.custom_all_reduce", "custom all_reduce"),
            ("torch_symm_mem:TorchSymmMemCommunicator.all_reduce", "symmetric memory"),
            ("pynccl:PyNcclCommunicator.outplace_all_reduce", "NCCL"),
            ("quick_all_reduce:QuickAllReduce.quick_all_reduce", "QuickReduce"),
            ("pymscclpp:PyMscclppCommunicator.all_reduce", "MSCCL++"),
        )
    ),
)

_LOADER = "sglang.srt.model_loader.loader"
_STARTUP_POINTS = tuple(
    HookPoint(target, parameters, Level.OFF, process, handler, f"start-up: {stage}")
    for target, parameters, process, handler, stage in (
        (
            "sglang.srt.entrypoints.engine:_wait_for_scheduler_ready",
            (),
            _FRONT,
            startup.schedulers_are_ready,
            "start_workers, and its end",
        ),
        (f"{_RUNNER}.init_torch_distributed", ("self",), _RANK, startup.piece("init_device"), "init_device"),
        (f"{_RUNNER}.load_model", ("self",), _RANK, startup.piece("model_load"), "model_load"),
        (f"{_LOADER}:_initialize_model", ("model_config",), _RANK, startup.build_model, "build_model"),
        *(
            (f"{_LOADER}:{loader}.load_model", ("self",), _RANK, startup.weights_loaded, "load_weights")
            for loader in ("DefaultModelLoader", "DummyModelLoader")
        ),
        (f"{_RUNNER}.alloc_memory_pool", ("self",), _RANK, startup.piece("allocate_kv_cache"), "allocate_kv_cache"),
        (f"{_RUNNER}.init_cuda_graphs", ("self",), _RANK, startup.captured, "graph_capture"),
    )
)

_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"
_HOST_CACHE = "sglang.srt.managers.cache_controller:HiCacheController"
_OCCASIONS = tuple(
    HookPoint(target, parameters, level, _RANK, handler, stage)
    for target, parameters, level, handler, stage in (
        *(
            (
                f"{_UPDATER}.update_weights_from_{source}",
                ("self", "recv_req"),
                Level.REQUEST,
                occasions.occasion("weight_update"),
                "weight_update",
            )
            for source in ("disk", "tensor", "distributed")
        ),
        (f"{_UPDATER}.release_memory_occupation", ("self",), Level.REQUEST, occasions.falls_asleep, "sleep"),
        (f"{_UPDATER}.resume_memory_occupation", ("self",), Level.REQUEST, occasions.wakes_up, "sleep"),
        (
            "sglang.srt.eplb.expert_location_updater:ExpertLocationUpdater.update",
            ("self",),
            Level.REQUEST,
            occasions.occasion("eplb_rebalance"),
            "eplb_rebalance",
        ),
        (f"{_HOST_CACHE}.start_loading", ("self",), Level.STEP, occasions.occasion("kv_load"), "kv_load"),
        (f"{_HOST_CACHE}.start_writing", ("self",), Level.STEP, occasions.occasion("kv_store"), "kv_store"),
    )
)

HOOK_POINTS: tuple[HookPoint, ...] = (
    *_FRONT_POINTS,
    *_SCHEDULER_POINTS,
    *_RANK_POINTS,
    *_OCCASIONS,
    *_STARTUP_POINTS,
    *_LAYER_POINTS,
)
