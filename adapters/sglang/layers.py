"""Hooks inside a rank's forward pass: attention, MLP and MoE by layer, collectives, tokens by expert.

What is of interest layer by layer is hooked on the objects of the loaded model (`attach`), before any graph is
captured. SGLang lets others in around its dispatchers of tokens to experts; that door is taken. No Python runs while a
captured graph is replayed: nothing of what is in it is seen but the tokens by expert, whose counting is captured too.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

from stagetrace.adapters.collectives import Collectives, Group
from stagetrace.adapters.experts import DeviceCounts, HostCounts, contained
from stagetrace.adapters.layers import is_dense_mlp, timed
from stagetrace.adapters.marking import ATTENTION as ATTENTION_PLACE
from stagetrace.adapters.marking import COLLECTIVE, MLP, MOE, Place
from stagetrace.adapters.rank import layer_index, ranges
from stagetrace.instrument.around import Around, Guards
from stagetrace.instrument.recorder import RECORDER, now
from stagetrace.instrument.records import RecordType, header_word
from stagetrace.instrument.stages import BY_NAME, AttentionKind, Collective

from .worker import DEVICE, RANK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from stagetrace.instrument.hooks import Hook
    from stagetrace.instrument.recorder import Recorder

_LAYERS = "sglang.srt.layers"
# Classes that compute a layer's attention: where each is, and the parameter of its forward that has the tokens.
ATTENTION = {
    "RadixAttention": (f"{_LAYERS}.radix_attention:RadixAttention.forward", "q"),
    "RadixLinearAttention": (f"{_LAYERS}.radix_linear_attention:RadixLinearAttention.forward", "mixed_qkv"),
    "MambaMixer2": (f"{_LAYERS}.attention.mamba.mamba:MambaMixer2.forward", "hidden_states"),
}
MODULE = "sglang.srt.models.llama:LlamaMLP.forward"  # stands for those of every model, each of a class of its own
ROUTER = f"{_LAYERS}.moe.topk:TopK.forward"
CHOSEN = f"{_LAYERS}.moe.topk:select_experts"  # most routers end in it; counted is what each router returns
EXPERTS = f"{_LAYERS}.moe.fused_moe_triton.layer:FusedMoE.run_moe_core"
_DISPATCHER = f"{_LAYERS}.moe.token_dispatcher.base:BaseDispatcher"
# The dispatchers' own doors, by the stage that is between the two: where it begins, where it ends.
DOORS = {
    "expert_dispatch": (f"{_DISPATCHER}.register_pre_dispatch_hook", f"{_DISPATCHER}.register_post_dispatch_hook"),
    "expert_combine": (f"{_DISPATCHER}.register_pre_combine_hook", f"{_DISPATCHER}.register_post_combine_hook"),
}

_MARK = "_stagetrace"  # attribute of SGLang's objects that we keep ours in
_ROUTERS = ("TopK", "HashTopK")
_SHARED_NAMES = ("shared_experts", "shared_expert")
_MATRIX = 2  # dimensions
_GROUPS = ("_TP", "_ATTN_TP", "_ATTN_CP", "_MOE_EP", "_MOE_TP", "_MOE_DP")  # of SGLang's parallel_state
# A group's operations that are called inside layers; those that are called within one of these are a part of it.
_IN_LAYERS = (
    *("all_reduce", "quant_all_reduce", "reduce_scatter_tensor", "reduce_scatterv", "reduce_scatter"),
    *("all_to_all_single", "all_gather_into_tensor", "all_gather", "all_gatherv"),
)
_ENCODE = header_word(RecordType.SEGMENT, BY_NAME["encode"].id)
_LOGITS = header_word(RecordType.SEGMENT, BY_NAME["logits"].id)
_EXPERT_COMPUTE = header_word(RecordType.SEGMENT, BY_NAME["expert_compute"].id)

COLLECTIVES = Collectives(RECORDER, RANK)


class _Model:
    """What there is to say of this rank's model, once it is loaded."""

    info: dict[str, object] = {}


def model_info() -> dict[str, object]:
    """For the record that a rank makes of itself: the stages that its model has, its experts."""
    return _Model.info


# What is in the model. Pure


def _classes(module: Any) -> set[str]:
    return {each.__name__ for each in type(module).__mro__}


def attention_kind(module: Any, latent: bool) -> AttentionKind:
    """What a module that computes attention looks at; `latent`: the model's attention is MLA."""
    names = _classes(module)
    if "MambaMixer2" in names:
        return AttentionKind.MAMBA
    if "RadixLinearAttention" in names:
        return AttentionKind.LINEAR
    if getattr(module, "is_cross_attention", False):
        return AttentionKind.CROSS
    if latent:
        return AttentionKind.MLA
    window = getattr(module, "sliding_window_size", None)
    return AttentionKind.SLIDING if window is not None and window > 0 else AttentionKind.FULL


def is_moe(module: Any) -> bool:
    """Whether a module runs a layer's experts."""
    return "FusedMoE" in _classes(module)


def blocks(modules: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, int, Any]]:
    """The dense parts of a model's layers: stage (mlp or shared_experts), layer, module."""
    named = [*modules]
    experts = [name for name, module in named if is_moe(module)]
    for name, module in named:
        if is_dense_mlp(name, experts):
            yield "mlp", layer_index(name), module
        elif name.rpartition(".")[2] in _SHARED_NAMES and layer_index(name) >= 0:
            yield "shared_experts", layer_index(name), module


def layer_of(name: str, module: Any) -> int:
    """The layer that a module is in: as SGLang numbers it, or as its name says where SGLang does not."""
    layer = getattr(module, "layer_id", None)
    return layer_index(name) if layer is None else int(layer)


def own_rows(rows: int, sizes: Sequence[int] | None, dp_rank: int, tokens: int) -> slice:
    """Which of so many rows that a layer routes are this rank's tokens.

    `sizes` are the rows of each data-parallel rank, padding included, None without attention data parallelism: where
    all of them are gathered, they follow one another. `tokens` are the rank's own, without padding.
    """
    gathered = sizes is not None and len(sizes) > 1 and rows == sum(sizes)
    begin = sum(sizes[:dp_rank]) if gathered and sizes is not None else 0
    return slice(begin, begin + tokens)


def rows_of(tensor: Any) -> int:
    """Tokens in what experts compute: rows of a matrix; where each expert has a matrix of its own, padding included."""
    shape = tensor.shape
    return int(shape[0] if len(shape) <= _MATRIX else shape[0] * shape[1])


# On the loaded model


def on_objects(_: Hook) -> Around:
    """Of a function that is hooked on objects: `attach` gives each a handler of its own."""
    return Around()


def attention_is_set_up(hook: Hook) -> Around:
    """ModelRunner.init_attention_backends: the model is loaded and as it will be, and no graph captured yet."""

    def after(self: Any) -> None:
        if not self.is_draft_worker:
            attach(hook, self)

    return Around(after=after)  # at every level: what is attached has a level of its own


def attach(hook: Hook, runner: Any) -> None:
    """Puts the hooks on the objects of a runner's model, and says what there is to be seen in it."""
    others = hook.others
    if others[ROUTER].status == "left out":
        return  # no layer will be recorded in this process
    modules = [*runner.model.named_modules()]
    seen: set[str] = set()
    latent = getattr(runner.model_config.attention_arch, "name", "") == "MLA"
    attentions = []
    for name, module in modules:
        classes = _classes(module)
        if "VocabParallelEmbedding" in classes and "ParallelLMHead" not in classes:
            seen.add("embed")
        for of in classes & ATTENTION.keys():
            target, tokens = ATTENTION[of]
            layer, kind = layer_of(name, module), int(attention_kind(module, latent))
            if others[target].on(module, "forward", timed(hook.recorder, RANK, "attention", tokens, layer, kind)):
                seen.add("attention")
                attentions.append(Place(ATTENTION_PLACE, layer, module, "forward"))
    places = [*attentions]
    for stage, layer, module in blocks(modules):
        if _attach_block(others[MODULE], stage, layer, module):
            seen.add(stage)
            if stage == MLP:
                places.append(Place(MLP, layer, module, "forward"))
    experts = _attach_experts(hook, modules, runner, seen)
    targets = {target for target, _ in ATTENTION.values()} | {MODULE, ROUTER, CHOSEN, EXPERTS}
    for target in (*targets, *(door for pair in DOORS.values() for door in pair)):
        others[target].told_objects()
    places += [Place(MOE, layer_of(name, module), module, "forward") for name, module in modules if is_moe(module)]
    places += _collective_places()
    DEVICE.open(str(runner.device), hook.recorder)
    marks = DEVICE.marks.put(hook.recorder, places, attentions, runner.device, DEVICE.event)
    _Model.info = {"visible": sorted(seen), "not_visible_under_compile": [], **experts, **marks}


def _collective_places() -> list[Place]:
    """The operations of this rank's groups that are called inside layers."""
    from sglang.srt.distributed import parallel_state

    groups = {id(group): group for name in _GROUPS if (group := getattr(parallel_state, name, None)) is not None}
    several = [group for group in groups.values() if group.world_size > 1]
    return [Place(COLLECTIVE, -1, group, name) for group in several for name in _IN_LAYERS if hasattr(group, name)]


def _attach_block(hook: Hook, stage: str, layer: int, module: Any) -> bool:
    forward = getattr(module, "forward", None)
    parameters = [*inspect.signature(forward).parameters] if inspect.ismethod(forward) else []
    return bool(parameters) and hook.on(module, "forward", timed(hook.recorder, RANK, stage, parameters[0], layer))


# Experts


def _attach_experts(hook: Hook, modules: list[tuple[str, Any]], runner: Any, seen: set[str]) -> dict[str, object]:
    """Has a model's routers, dispatchers and experts timed and its tokens counted; what there is to say of them."""
    others = hook.others
    experts = [(layer_of(name, module), module) for name, module in modules if is_moe(module)]
    routers = [(layer_of(name, module), module) for name, module in modules if _classes(module) & {*_ROUTERS}]
    if not experts:
        return {}
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    for layer, module in experts:
        if others[EXPERTS].on(module, "run_moe_core", _computing(hook.recorder, layer)):
            seen.add("expert_compute")
        for stage, doors in DOORS.items():
            dispatcher = getattr(module, "dispatcher", None)
            if dispatcher is not None and _listen(others, dispatcher, stage, doors, layer):
                seen.add(stage)
    counts, told = _counting(hook, experts[0][1], sorted({layer for layer, _ in routers}), runner, parallel)
    per_token = int(told["experts_per_token"])  # type: ignore[call-overload]
    gathered = int(parallel.attn_dp_size) > 1 and isinstance(counts, HostCounts)
    for layer, router in routers:
        if others[ROUTER].on(router, "forward", _routing(hook.recorder, router.forward, layer)):
            seen.add("moe_route")
        if counts is not None:
            dp_rank = int(parallel.attn_dp_rank) if gathered else None
            router.forward = counted(others[CHOSEN], layer, counts, router.forward, per_token, dp_rank)
            others[CHOSEN].objects += 1
    return told


def _routing(recorder: Recorder, forward: Callable[..., Any], layer: int) -> Around:
    """Of a router's forward; SGLang's TopK takes whatever comes and hands it on."""
    if "hidden_states" in inspect.signature(forward).parameters:
        return timed(recorder, RANK, "moe_route", "hidden_states", layer)
    segment, header = recorder.segment, header_word(RecordType.SEGMENT, BY_NAME["moe_route"].id)

    def after(args: Any, kwargs: Any, begin: int, end: int) -> None:
        step = RANK.step
        if step:
            given = args[0] if args else kwargs["hidden_states"]
            segment(header, begin, end, RANK.instance, step, layer, given.shape[0])

    return Around(after=after)


def _computing(recorder: Recorder, layer: int) -> Around:
    """Of FusedMoE.run_moe_core."""
    segment = recorder.segment

    def after(dispatch_output: Any, begin: int, end: int) -> None:
        step = RANK.step
        if step:
            tokens = rows_of(dispatch_output.hidden_states)
            segment(_EXPERT_COMPUTE, begin, end, RANK.instance, step, layer, tokens)

    return Around(after=after)


def _listen(others: Any, dispatcher: Any, stage: str, doors: tuple[str, str], layer: int) -> bool:
    """Registers with a dispatcher what times one of its halves; whether it has such a door."""
    first, last = (others[door] for door in doors)
    names = [door.rpartition(".")[2] for door in doors]
    if "left out" in (first.status, last.status) or not all(hasattr(dispatcher, name) for name in names):
        return False
    header = header_word(RecordType.SEGMENT, BY_NAME[stage].id)
    segment = first.recorder.segment
    began = 0
    rows = size = 0

    def begins(_: Any, given: Any, *__: Any) -> None:
        nonlocal began, rows, size
        began = 0
        if RANK.step:
            if stage == "expert_dispatch":
                rows, size = given.shape[0], given.nbytes
            began = now()

    def ends(_: Any, given: Any) -> None:
        nonlocal began
        end, step = now(), RANK.step
        if began and step:
            if stage == "expert_combine":
                segment(header, began, end, RANK.instance, step, layer, given.shape[0], given.nbytes)
            else:
                segment(header, began, end, RANK.instance, step, layer, rows, size)
        began = 0

    for hook, name, called in ((first, names[0], begins), (last, names[1], ends)):
        getattr(dispatcher, name)(listening(hook, called))
        hook.objects += 1
    return True


def listening(hook: Hook, function: Callable[..., None]) -> Callable[..., None]:
    """The function, for the engine to call: what is given goes on as it is, whatever becomes of ours."""
    compiling, capturing = _guards()
    recorder = hook.recorder

    def called(*given: Any) -> None:
        if compiling() or recorder.level[0] < hook.threshold or capturing():
            return
        try:
            function(*given)
        except Exception:
            hook.failed()

    return called


def _guards() -> tuple[Callable[[], bool], Callable[[], bool]]:
    """Whether a compiler traces what runs, and whether a stream captures it."""
    guards = Guards.of_torch()
    if guards is None:
        return bool, bool
    return guards.compiling, guards.capturing or bool


def _counting(
    hook: Hook, module: Any, layers: list[int], runner: Any, parallel: Any
) -> tuple[HostCounts | DeviceCounts | None, dict[str, object]]:
    """What counts this rank's choices, None where another rank does or they are not known; what there is to say."""
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    shared = int(getattr(module, "num_fused_shared_experts", 0) or 0)
    size, rank = int(module.moe_ep_size), int(module.moe_ep_rank)
    local = int(module.num_local_experts) - shared
    experts = local * size  # those that balancing adds are counted apart
    told: dict[str, object] = {
        "experts": experts,
        "experts_per_token": int(module.top_k) - shared,
        "expert_parallel_size": size,
        "expert_parallel_rank": rank,
        "expert_balancing": bool(getattr(runner.server_args, "enable_eplb", False)),
        "local_experts": ranges(range(rank * local, (rank + 1) * local)),
    }
    chosen = hook.others[CHOSEN]
    if chosen.status == "left out" or (shared and size > 1):  # each rank's numbers have its shared experts in between
        return None, told
    # Ranks that are given the same tokens choose the same experts: one of them counts.
    apart = not get_moe_a2a_backend().is_none()
    if not apart and (parallel.attn_tp_rank or parallel.attn_cp_rank):
        return None, told
    if str(runner.device) == "cpu":
        return HostCounts(chosen, RANK, experts), told
    if not apart and parallel.attn_dp_rank:
        return None, told  # the first of the data-parallel ranks counts the tokens of all
    counts = DeviceCounts(chosen, RANK, layers, experts, runner.device)
    RANK.at_start, RANK.at_end = (contained(chosen, counts.begin),), (contained(chosen, counts.end),)
    return counts, told


def counted(
    hook: Hook,
    layer: int,
    counts: HostCounts | DeviceCounts,
    forward: Callable[..., Any],
    per_token: int,
    dp_rank: int | None,
) -> Callable[..., Any]:
    """A router's forward, whose choices are counted after it: what it takes is its own time alone.

    Choices of padding are -1, and those of shared experts come last. `dp_rank`: the rows may be those of all
    data-parallel ranks, of which this rank counts its own; None: all rows count.
    """
    compiling, capturing = _guards()
    on_device = isinstance(counts, DeviceCounts)
    recorder = hook.recorder

    def called(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        # A graph that is captured below the level is replayed at it: counting must be in it.
        if not compiling() and (recorder.level[0] >= hook.threshold or (on_device and capturing())):
            try:
                chosen = getattr(result, "topk_ids", None)  # None: the experts' kernel chooses
                if chosen is not None:
                    chosen = chosen[:, :per_token]
                    if dp_rank is not None and RANK.batch is not None:
                        sizes = RANK.batch.global_num_tokens_cpu
                        chosen = chosen[own_rows(chosen.shape[0], sizes, dp_rank, RANK.tokens)]
                    counts.count(layer, chosen, None)
            except Exception:
                hook.failed()
        return result

    return called


# Functions that a model has once


def of_model(stage: str, tensor: str) -> Callable[[Hook], Around]:
    """A handler of a stage that is not a layer's."""
    return lambda hook: timed(hook.recorder, RANK, stage, tensor)


def logits(hook: Hook) -> Around:
    """LogitsProcessor.forward; it is given all positions, and computes the logits of those that are asked for."""
    segment = hook.recorder.segment

    def after(result: Any, begin: int, end: int) -> None:
        step = RANK.step
        if step:
            found = result.next_token_logits
            segment(_LOGITS, begin, end, RANK.instance, step, 0 if found is None else found.shape[0])

    return Around(after=after)


def encoder(hook: Hook) -> Around:
    """embed_mm_inputs: what is no text is encoded, and put between the text."""
    segment = hook.recorder.segment

    def after(mm_inputs_list: Any, begin: int, end: int) -> None:
        if RANK.step:
            inputs = sum(len(each.mm_items) for each in mm_inputs_list if each is not None)
            segment(_ENCODE, begin, end, RANK.instance, RANK.step, inputs)

    return Around(after=after)


# Collectives


def group_of(coordinator: Any) -> Group:
    """What we know of a GroupCoordinator; its name when a step first uses it, since the groups are built one by one."""
    known = vars(coordinator)
    group: Group | None = known.get(_MARK)
    if group is None:
        group = known[_MARK] = Group("", coordinator.world_size == 1)
    if not group.name and RANK.step:
        from sglang.srt.runtime_context import get_parallel

        group.name = group_name(coordinator, get_parallel())
        group.algorithm = algorithm_of(coordinator)
    return group


def group_name(coordinator: Any, parallel: Any) -> str:
    """A group's name with its ranks; it begins with `dp` where these run the steps of several schedulers. Pure."""
    name = f"{coordinator.unique_name} (ranks {ranges(coordinator.ranks)})"
    of_one = int(parallel.tp_size) // int(parallel.attn_dp_size)  # ranks of a pipeline stage that share a scheduler
    schedulers = {rank % int(parallel.tp_size) // of_one for rank in coordinator.ranks}
    return f"dp {name}" if len(schedulers) > 1 else name


def algorithm_of(coordinator: Any) -> str:
    """What carries out a coordinator's operations, unless a hook on one of several ways says which: its backend."""
    distributed = sys.modules["torch"].distributed
    group = getattr(coordinator, "device_group", None)
    return str(distributed.get_backend(group)) if group is not None else ""


def collective(op: Collective, size: str = "input_") -> Callable[[Hook], Around]:
    """A handler of an operation of a GroupCoordinator."""
    return lambda _: COLLECTIVES.around(op, group_of, "self", size)


def carried_out_by(name: str) -> Callable[[Hook], Around]:
    """A handler of one of several ways to carry an operation out."""
    return lambda _: COLLECTIVES.carried_out_by(name)
