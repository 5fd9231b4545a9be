"""A plugin of SGLang, for tests alone: what expert parallelism and attention data parallelism lack on the CPU.

On its path (PYTHONPATH), its entry point is found. SGLang 0.5.23's experts in plain PyTorch take ids of -1, the experts
of other ranks, for the last expert; and a collective, two probes and one number exist for devices alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def register() -> None:
    """Puts the mends in, by SGLang's own registry."""
    import torch
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    around = HookType.AROUND
    HookRegistry.register("sglang.srt.layers.moe.fused_moe_native.moe_forward_native", local_experts, around)
    HookRegistry.register(
        "sglang.srt.distributed.parallel_state.GroupCoordinator.reduce_scatterv", reduce_scatterv, around
    )
    backend: Any = TorchNativeAttnBackend  # has no such function, so there is nothing for the registry to go around
    backend.get_cpu_graph_seq_len_fill_value = lambda self: 1
    cpu: Any = torch.cpu
    cpu.is_current_stream_capturing = lambda: False
    cpu.empty_cache = lambda: None


def local_experts(
    original: Callable[..., torch.Tensor], layer: Any, x: torch.Tensor, topk_output: Any, config: Any
) -> torch.Tensor:
    """This rank's experts alone; the engine's all_reduce adds up what the ranks have."""
    import torch
    from torch.nn.functional import silu

    ids, weights = topk_output.topk_ids, topk_output.topk_weights
    if not bool((ids < 0).any()):
        return original(layer, x, topk_output, config)
    total = torch.zeros_like(x)
    for expert in range(layer.w13_weight.shape[0]):
        rows, places = torch.where(ids == expert)
        if len(rows):
            gate, up = (x[rows] @ layer.w13_weight[expert].T).chunk(2, dim=-1)
            out = (silu(gate) * up) @ layer.w2_weight[expert].T
            total.index_add_(0, rows, (out * weights[rows, places, None]).to(x.dtype))
    return total


def reduce_scatterv(
    original: Callable[..., torch.Tensor],
    self: Any,
    input_: torch.Tensor,
    output: torch.Tensor | None = None,
    sizes: list[int] | None = None,
) -> torch.Tensor:
    """The sum over the ranks, of which each keeps its slice."""
    del original
    summed = self.all_reduce(input_.clone())
    even = [len(input_) // self.world_size] * self.world_size
    sizes = sizes or even
    begin = sum(sizes[: self.rank_in_group])
    mine = summed[begin : begin + sizes[self.rank_in_group]]
    if output is None:
        return mine.contiguous()
    output.copy_(mine)
    return output
