"""Stands in for sgl_kernel, which has no build for this CPU: the one function that SGLang needs to serve text.

It registers no torch.ops.sgl_kernel, so SGLang finds no AMX and takes attention, sampling and experts from PyTorch.
"""

from __future__ import annotations

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


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """The other functions for the CPU, which SGLang imports and calls for speculative decoding alone."""
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def missing(*_: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: there is no sgl_kernel for the CPU in this environment")

    return missing
