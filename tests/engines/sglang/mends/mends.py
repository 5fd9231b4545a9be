"""A plugin of SGLang, for tests alone: what expert and data parallelism and speculation lack on the CPU.

On its path (PYTHONPATH), its entry point is found. SGLang 0.5.23's experts in plain PyTorch take ids of -1, the experts
of other ranks, for the last expert; its attention in plain PyTorch verifies no drafts; and a collective, two probes and
one number exist for devices alone.
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
    HookRegistry.register(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend",
        attention_of_drafts,
        around,
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


def attention_of_drafts(
    original: Callable[..., torch.Tensor],
    self: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    forward_batch: Any,
    save_kv_cache: bool = True,
) -> torch.Tensor:
    """Where drafts are verified: each sees the request's tokens, and of the drafts those before it in the tree."""
    import torch
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc
    from torch.nn.functional import scaled_dot_product_attention

    if not forward_batch.forward_mode.is_target_verify():
        return original(self, q, k, v, layer, forward_batch, save_kv_cache)
    pool, slots = self.token_to_kv_pool, forward_batch.out_cache_loc
    pool.set_kv_buffer(layer, KVWriteLoc(slots, self.swa_out_cache_loc), k, v)
    keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
    drafts = forward_batch.spec_info.draft_token_num
    trees = forward_batch.spec_info.custom_mask.view(-1, drafts, drafts).bool()
    out = torch.empty_like(q).view(-1, drafts, layer.tp_q_head_num, layer.v_head_dim)
    queries = q.view(-1, drafts, layer.tp_q_head_num, layer.qk_head_dim)
    rows = zip(forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist(), strict=True)
    for number, (row, length) in enumerate(rows):
        at = torch.cat((self.req_to_token_pool.req_to_token[row, :length], slots.view(-1, drafts)[number]))
        seen = torch.cat((trees.new_ones(drafts, length), trees[number]), dim=1)
        heads = (each.transpose(0, 1)[None] for each in (queries[number], keys[at], values[at]))
        found = scaled_dot_product_attention(*heads, attn_mask=seen, scale=layer.scaling, enable_gqa=True)
        out[number] = found[0].transpose(0, 1)
    return out.view_as(q)
