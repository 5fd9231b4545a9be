"""Hooks inside a worker's forward pass: attention, MLP and MoE by layer, collectives, tokens by expert.

Two ways lead into a layer. What is a class of vLLM's own is hooked there, and the layer it works for is the one whose
MoE is being run. What has a class of each model's own, or is of interest layer by layer, is hooked on the objects of
the loaded model (`attach`). What is called inside an operator that no compiler looks into is seen under torch.compile
as well: attention, and on a GPU the MoE and the collectives. The rest of a compiled model is said to be not visible.
"""

from __future__ import annotations

import inspect
import json
import sys
from _thread import get_ident
from typing import TYPE_CHECKING, Any

from stagetrace.adapters.collectives import Collectives, Group
from stagetrace.adapters.experts import DeviceCounts, HostCounts, chained, contained
from stagetrace.adapters.layers import Within, is_dense_mlp, timed, timed_within
from stagetrace.adapters.marking import ATTENTION as ATTENTION_PLACE
from stagetrace.adapters.marking import COLLECTIVE, MLP, MOE, Place
from stagetrace.adapters.rank import layer_index, ranges
from stagetrace.instrument.around import Around
from stagetrace.instrument.recorder import RECORDER
from stagetrace.instrument.records import RecordType, Text, header_word
from stagetrace.instrument.stages import BY_NAME, AttentionKind, Collective

from . import connector
from .worker import DEVICE, RANK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from stagetrace.instrument.hooks import Hook

ATTENTION = "vllm.v1.attention.backend:AttentionImpl.forward"
MODULE = "vllm.model_executor.models.interfaces_base:VllmModel.forward"
CHOSEN = "vllm.model_executor.layers.fused_moe.router.fused_moe_router:FusedMoERouter.set_capture_fn"

_MARK = "_stagetrace"  # attribute of vLLM's objects that we keep ours in
_CHAIN = "_stagetrace_chain"
_SAMPLED = "_stagetrace_sampled"
# What vLLM's opaque operators call on a layer that has no `impl`, and the parameters that may have the tokens.
_CALLED = (
    *("forward_impl", "conv_ssm_forward", "_forward_core", "_forward_core_fused_norm_packed", "_forward_core_rocm"),
    "_forward",
)
_TOKENS = ("query", "q", "hidden_states", "projected_states", "mixed_qkv", "mixed_qkvz", "qkvz", "x")

# A group's operations that are called inside layers.
_IN_LAYERS = (
    *("_all_reduce_out_place", "_all_gather_out_place", "all_gatherv", "_reduce_scatter_out_place", "reduce_scatterv"),
    *("reduce_scatterv_into_output", "dispatch", "dispatch_router_logits", "combine", "combine_into_output"),
)

_ENCODE = header_word(RecordType.SEGMENT, BY_NAME["encode"].id)

_ROUTE = header_word(RecordType.SEGMENT, BY_NAME["moe_route"].id)

WITHIN = Within()
COLLECTIVES = Collectives(RECORDER, RANK)


class _OnCpu:
    """What counts the experts that are chosen past a router: of the CPU's kernels that route as well."""

    counts: HostCounts | None = None


# What is in the model. Pure


def attention_kind(layer: Any) -> AttentionKind:
    """What a layer of vLLM's static forward context looks at."""
    names = {each.__name__ for each in type(layer).__mro__}
    if names & {"MLAAttention", "MLAAttentionLayer"}:
        return AttentionKind.MLA
    if "CrossAttention" in names:
        return AttentionKind.CROSS
    if "MambaBase" in names:
        kind = getattr(layer, "mamba_type", "")
        return AttentionKind.MAMBA if "mamba" in str(getattr(kind, "name", kind)).lower() else AttentionKind.LINEAR
    if "ChunkedLocalAttention" in names or getattr(layer, "sliding_window", None):
        return AttentionKind.SLIDING
    return AttentionKind.FULL


def attention_calls(layer: Any) -> Iterator[tuple[Any, str, str]]:
    """The object, its method, and the parameter with the tokens, of what computes a layer's attention."""
    impl = getattr(layer, "impl", None)
    mla = attention_kind(layer) is AttentionKind.MLA
    for owner, names in ((layer, ("forward_impl",)),) if mla else ((impl, ("forward",)), (layer, _CALLED)):
        found = False
        for name in names:
            method = getattr(owner, name, None)
            if inspect.ismethod(method):
                parameters = inspect.signature(method).parameters
                tokens = next((each for each in _TOKENS if each in parameters), None)
                if tokens is not None:
                    found = True
                    yield owner, name, tokens
        if found:
            return


def is_moe(module: Any) -> bool:
    """Whether a module runs a layer's experts."""
    return any(each.__name__ in ("MoERunner", "MoERunnerInterface") for each in type(module).__mro__)


def blocks(modules: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, int, Any]]:
    """The dense parts of a model's layers: stage (mlp or shared_experts), layer, module.

    `modules` are all of them by name, an outer one before those inside it.
    """
    named = [*modules]
    experts = [name for name, module in named if is_moe(module)]
    shared = {}
    for name, module in named:
        if type(module).__name__ == "SharedExperts" and hasattr(module, "_layer"):
            shared[id(module._layer)] = layer_index(name)
    for name, module in named:
        if id(module) in shared:
            yield "shared_experts", shared.pop(id(module)), module
            continue
        if is_dense_mlp(name, experts):
            yield "mlp", layer_index(name), module


def compiled_within(modules: Iterable[tuple[str, Any]]) -> tuple[str, ...]:
    """The names of the modules that are compiled, each with a dot: what begins with one is in their graphs."""
    return tuple(f"{name}." if name else "" for name, each in modules if _is_compiled(each))


def _is_compiled(module: Any) -> bool:
    """By vLLM's decorator, or as a whole by PyTorch's `Module.compile` (its mode STOCK_TORCH_COMPILE)."""
    by_decorator = getattr(module, "do_not_compile", True) is False
    return by_decorator or getattr(module, "_compiled_call_impl", None) is not None


def is_opaque(runner: Any) -> bool:
    """Whether a MoE runner enters its experts through an operator, which no compiler looks into.

    The way in is chosen when the runner is made: on a GPU it is the operator, on the CPU the function in it.
    """
    return type(getattr(runner, "_forward_entry", None)).__module__ == "torch._ops"


# On the loaded model


def on_objects(_: Hook) -> Around:
    """Of a function that is hooked on objects: `attach` gives each a handler of its own."""
    return Around()


def initialized(hook: Hook) -> Around:
    """Worker.initialize_from_config: the model is loaded, the KV connector made, and no graph captured yet."""

    def after(self: Any) -> None:
        connector.attach(hook, RANK)
        attach(hook, self.model_runner)

    return Around(after=after)  # at every level: what is attached has a level of its own


def attach(hook: Hook, runner: Any) -> None:
    """Puts the hooks on the objects of a runner's model, and says what there is to be seen in it."""
    if hook.others[ATTENTION].status == "left out":
        return  # no layer will be recorded in this process
    model = runner.get_model()
    compilation = runner.vllm_config.compilation_config
    modules = [*model.named_modules()]
    compiled = compiled_within(modules)
    found: dict[str, int] = {}
    unseen: dict[str, int] = {}

    def seen(stage: str, visible: bool) -> None:
        into = found if visible else unseen
        into[stage] = into.get(stage, 0) + 1

    attentions = _attach_attention(hook.others[ATTENTION], compilation.static_forward_context, bool(compiled), seen)
    places = [*attentions]
    opaque = not compiled or all(is_opaque(module) for _, module in modules if is_moe(module))
    for stage, layer, module, name in _with_names(modules):
        inside = bool(compiled) and name.startswith(compiled) and not (stage == "shared_experts" and opaque)
        if not inside:
            _attach_block(hook.others[MODULE], stage, layer, module)
            if stage == MLP:
                places.append(Place(MLP, layer, module, "forward"))
        seen(stage, not inside)
    for _ in (module for _, module in modules if type(module).__name__ == "VocabParallelEmbedding"):
        seen("embed", not compiled)
    experts = _attach_experts(hook.others[CHOSEN], modules, runner, opaque)
    for stage in ("moe_route", "expert_dispatch", "expert_compute", "expert_combine"):
        if experts:
            seen(stage, opaque)
    for target in (ATTENTION, MODULE, CHOSEN):
        hook.others[target].told_objects()
    invisible = unseen.keys() - found.keys()
    if opaque:
        moes = [module for _, module in modules if is_moe(module)]
        places += [Place(MOE, layer_index(module.layer_name), module, "_forward_impl") for module in moes]
    if compiled and _traced_collectives(experts, opaque):
        invisible |= {"collective"}
    else:
        places += _collective_places()
    marks = DEVICE.marks.put(hook.recorder, places, attentions, runner.device, DEVICE.event)
    info = {"visible": sorted(found), "not_visible_under_compile": sorted(invisible), **experts, **marks}
    hook.recorder.text(0, Text.PROCESS, json.dumps({"role": "worker", **info}))


def _with_names(modules: list[tuple[str, Any]]) -> Iterator[tuple[str, int, Any, str]]:
    names = {id(module): name for name, module in modules}
    for stage, layer, module in blocks(modules):
        yield stage, layer, module, names[id(module)]


def _on_host(runner: Any) -> bool:
    return str(getattr(runner.device, "type", runner.device)) == "cpu"


def _traced_collectives(experts: Mapping[str, object], opaque: bool) -> bool:
    """Whether a compiler that traces the model goes through its ranks' collectives, where there are several ranks."""
    from vllm.distributed.parallel_state import get_tp_group

    tensor_parallel = get_tp_group()
    in_model = tensor_parallel.world_size > 1 and not getattr(tensor_parallel, "use_custom_op_call", False)
    return in_model or (not opaque and experts.get("expert_parallel_size", 1) != 1)


def _collective_places() -> list[Place]:
    """The operations of this rank's groups that are called inside layers."""
    from vllm.distributed import parallel_state

    groups = {id(group): group for group in (parallel_state._TP, parallel_state._EP, parallel_state._DP) if group}
    several = [group for group in groups.values() if group.world_size > 1]
    return [Place(COLLECTIVE, -1, group, name) for group in several for name in _IN_LAYERS if hasattr(group, name)]


def _attach_attention(
    hook: Hook, layers: Mapping[str, Any], compiled: bool, seen: Callable[[str, bool], None]
) -> list[Place]:
    """Hooks every layer's attention; where each is."""
    places = []
    for name, layer in layers.items():
        if is_moe(layer):
            continue
        if compiled and getattr(layer, "use_direct_call", False):  # this platform has no operator for it
            seen("attention", False)
            continue
        kind = int(attention_kind(layer))
        for owner, method, tokens in attention_calls(layer):
            around = timed(hook.recorder, RANK, "attention", tokens, layer_index(name), kind)
            if hook.on(owner, method, around):
                seen("attention", True)
                places.append(Place(ATTENTION_PLACE, layer_index(name), owner, method))
    return places


def _attach_block(hook: Hook, stage: str, layer: int, module: Any) -> None:
    forward = getattr(module, "forward", None)
    if inspect.ismethod(forward):
        parameters = [*inspect.signature(forward).parameters]
        if parameters:
            hook.on(module, "forward", timed(hook.recorder, RANK, stage, parameters[0], layer))


def _attach_experts(hook: Hook, modules: list[tuple[str, Any]], runner: Any, visible: bool) -> dict[str, object]:
    """Has every layer's choice of experts counted; what there is to say of the experts."""
    runners = [(layer_index(module.layer_name), module) for _, module in modules if is_moe(module)]
    if not runners:
        return {}
    config = runners[0][1].moe_config
    experts = int(getattr(config, "num_logical_experts", None) or config.num_experts)
    told: dict[str, object] = {
        "experts": experts,
        "experts_per_token": int(config.experts_per_token),
        "expert_parallel_size": int(config.ep_size),
        "expert_parallel_rank": int(config.ep_rank),
        "expert_balancing": bool(runner.parallel_config.enable_eplb),
    }
    local = _local_experts(runners[0][1], experts)
    if local and not told["expert_balancing"]:
        told["local_experts"] = ranges(local)
    # Ranks that are given the same tokens choose the same experts: one of them counts.
    from vllm.distributed.parallel_state import get_tp_group

    alone = bool(getattr(config, "is_sequence_parallel", False)) or get_tp_group().rank_in_group == 0
    if getattr(runners[0][1], "do_naive_dispatch_combine", False):  # tokens are gathered before they are routed
        alone = alone and runner.parallel_config.data_parallel_rank == 0
    if not (visible and alone) or hook.status == "left out":
        return told
    counts: HostCounts | DeviceCounts
    if _on_host(runner):
        counts = _OnCpu.counts = HostCounts(hook, RANK, experts)
    else:
        layers = sorted({layer for layer, _ in runners})
        counts = DeviceCounts(hook, RANK, layers, experts, runner.device)
        RANK.at_start = (contained(hook, counts.begin),)
        RANK.at_end = (contained(hook, counts.end),)
    for layer, module in runners:
        _chain(hook, module.router, layer, counts)
    return told


def _local_experts(module: Any, experts: int) -> list[int]:
    """The experts whose weights are on this rank."""
    placed = getattr(module.routed_experts, "expert_map", None)
    if placed is None:
        return [*range(experts)]
    return [expert for expert, at in enumerate(placed.tolist()[:experts]) if at >= 0]


def _chain(hook: Hook, router: Any, layer: int, counts: HostCounts | DeviceCounts) -> None:
    if not hasattr(router, "set_capture_fn"):
        return

    def chain(previous: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
        made = chained(hook, layer, counts, padding_of, previous)
        made.__dict__[_MARK] = previous
        return made

    setattr(router, _CHAIN, chain)
    router.capture_fn = chain(getattr(router, "capture_fn", None))
    hook.objects += 1


def capture_fn_set(_: Hook) -> Around:
    """BaseRouter.set_capture_fn: somebody wants the chosen experts after us; ours calls theirs."""

    def after(self: Any) -> None:
        chain = vars(self).get(_CHAIN)
        if chain is not None and not hasattr(self.capture_fn, _MARK):
            self.capture_fn = chain(self.capture_fn)

    return Around(after=after)


def padding_of(tokens: int) -> Any:
    """Which of so many tokens are padding, by the engine's own mask; None where none is, or that is not known."""
    if RANK.tokens == tokens and RANK.step:
        return None
    context = sys.modules["vllm.forward_context"]._forward_context
    mask = None if context is None else getattr(context, "is_padding", None)
    return None if mask is None or mask.shape[0] != tokens else mask


# Functions that all layers share


def moe_begins(_: Hook) -> Around:
    """MoERunner._forward_impl: what follows on this thread is this layer's MoE."""

    by_thread = WITHIN.by_thread

    def before(self: Any) -> None:
        layer = self.__dict__.get(_MARK)
        if layer is None:
            layer = self.__dict__[_MARK] = layer_index(self.layer_name)
        by_thread[get_ident()] = layer

    return Around(before)


def of_layer(stage: str, tensor: str) -> Callable[[Hook], Around]:
    """A handler of a stage of the layer that is being run."""
    return lambda hook: timed_within(hook.recorder, RANK, WITHIN, stage, tensor)


def chosen_on_cpu(hook: Hook) -> Around:
    """The CPU's select_experts: the layer's choice where no router is asked."""
    segment, layer_of = hook.recorder.segment, WITHIN.by_thread.get

    def after(hidden_states: Any, result: Any, begin: int, end: int) -> None:
        step = RANK.step
        if not step:
            return
        layer, tokens = layer_of(get_ident(), -1), hidden_states.shape[0]
        segment(_ROUTE, begin, end, RANK.instance, step, layer, tokens)
        counts = _OnCpu.counts
        if counts is not None:
            counts.count(layer, result[1], padding_of(tokens))

    return Around(after=after)


def encoder(hook: Hook) -> Around:
    """GPUModelRunner._execute_mm_encoder; recorded where there was something to encode."""
    segment = hook.recorder.segment

    def after(scheduler_output: Any, begin: int, end: int) -> None:
        given = scheduler_output.scheduled_encoder_inputs
        if given and RANK.step:
            segment(_ENCODE, begin, end, RANK.instance, RANK.step, sum(map(len, given.values())))

    return Around(after=after)


def encoder_runner(hook: Hook) -> Around:
    """EncoderRunner.execute_mm_encoder of Model Runner V2."""
    segment = hook.recorder.segment

    def after(mm_kwargs: Any, begin: int, end: int) -> None:
        if mm_kwargs and RANK.step:
            segment(_ENCODE, begin, end, RANK.instance, RANK.step, len(mm_kwargs))

    return Around(after=after)


def of_model(stage: str, tensor: str) -> Callable[[Hook], Around]:
    """A handler of a stage that is not a layer's."""
    return lambda hook: timed(hook.recorder, RANK, stage, tensor)


# Collectives


def group_of(coordinator: Any) -> Group:
    """What we know of a GroupCoordinator."""
    known = vars(coordinator)
    group: Group | None = known.get(_MARK)
    if group is None:
        name = f"{coordinator.unique_name} (ranks {ranges(coordinator.ranks)})"
        group = known[_MARK] = Group(name, coordinator.world_size == 1, algorithm_of(coordinator))
    return group


def algorithm_of(coordinator: Any) -> str:
    """What carries out a coordinator's operations, unless a hook on one of several ways says which: its class."""
    communicator = getattr(coordinator, "device_communicator", None)
    module = getattr(communicator, "dist_module", None)
    if type(module).__name__ == "_CPUSHMDistributed":
        return "shared memory"
    return str(getattr(coordinator, "torch_distributed_backend", "") or "")


def collective(op: Collective, size: str = "input_") -> Callable[[Hook], Around]:
    """A handler of an operation of a GroupCoordinator."""
    return lambda _: COLLECTIVES.around(op, group_of, "self", size)


def of_data_parallel(op: Collective, size: str, owner: str) -> Callable[[Hook], Around]:
    """A handler of an operation of the data-parallel group that goes past its coordinator."""

    def group(_: Any) -> Group:
        from vllm.distributed.parallel_state import get_dp_group

        return group_of(get_dp_group())

    return lambda _: COLLECTIVES.around(op, group, owner, size)


def of_pipeline(size: str, owner: str) -> Callable[[Hook], Around]:
    """A handler of what brings sampled tokens to the other ranks of the pipeline, past their coordinator.

    It has numbers of its own: of what goes from stage to stage a rank in the middle has more than the first and last.
    """

    def group(_: Any) -> Group:
        from vllm.distributed.parallel_state import get_pp_group

        coordinator = get_pp_group()
        known = vars(coordinator)
        found: Group | None = known.get(_SAMPLED)
        if found is None:
            name = f"{coordinator.unique_name} sampled tokens (ranks {ranges(coordinator.ranks)})"
            found = known[_SAMPLED] = Group(name, coordinator.world_size == 1, algorithm_of(coordinator))
        return found

    return lambda _: COLLECTIVES.around(Collective.BROADCAST, group, owner, size)


def carried_out_by(name: str) -> Callable[[Hook], Around]:
    """A handler of one of several ways to carry an operation out."""
    return lambda _: COLLECTIVES.carried_out_by(name)
