"""Stands in for sgl_kernel, which has no build for this CPU: what SGLang needs to serve text and to verify drafts.

It registers no torch.ops.sgl_kernel, so SGLang finds no AMX and takes attention, sampling and experts from PyTorch.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Writes each request's slice of `out_cache_loc` into its row of the pool, from its start to its end."""
    del pool_len  # the width of a row, which the tensor has
    taken = 0
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in rows:
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start]
        taken += end - start


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Reads each request's slots from its row of the pool, from its start to its end, one request after the other."""
    del pool_len  # the width of a row, which the tensor has
    taken = 0
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in rows:
        out_cache_loc[taken : taken + end - start] = req_to_token[row, start:end]
        taken += end - start


def verify_tree_greedy_cpu(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Follows each request's tree of drafts as long as a child is what the model says; the last one says one more."""
    for row, (tokens, said) in enumerate(zip(candidates.tolist(), target_predict.tolist(), strict=True)):
        index = retrive_index[row].tolist()
        child, sibling = retrive_next_token[row].tolist(), retrive_next_sibling[row].tolist()
        node, path = 0, [0]
        while len(path) < accept_index.shape[1]:
            following = child[node]
            while following != -1 and tokens[following] != said[node]:
                following = sibling[following]
            if following == -1:
                break
            node = following
            path.append(node)
        for place, each in enumerate(path):
            accept_index[row, place] = index[each]
            predicts[index[each]] = said[each]
        accept_token_num[row] = len(path) - 1


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """Packs the slots of the accepted tokens; -1 is none."""
    accepted = accept_index.flatten()
    accepted = accepted[accepted > -1].long()
    accept_out_cache_loc[: len(accepted)] = out_cache_loc[accepted]


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copies slots of the KV cache in every layer, where they are not in their place already."""
    moved = [(to, at) for to, at in zip(tgt_loc.tolist(), src_loc.tolist(), strict=True) if to != at]
    for address, size in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        read = [(to, ctypes.string_at(address + at * size, size)) for to, at in moved]
        for to, data in read:
            ctypes.memmove(address + to * size, data, size)


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """The other functions for the CPU, which SGLang imports, and calls for speculation with a draft model alone."""
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def missing(*_: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: there is no sgl_kernel for the CPU in this environment")

    return missing
