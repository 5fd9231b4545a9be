"""Stands in for sgl_kernel.speculative: what drafts by n-grams need."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def reconstruct_indices_from_tree_mask(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Where each draft of a request is in its tree: row i of the mask says which drafts are before draft i."""
    for row, mask in enumerate(tree_mask.view(batch_size, draft_token_num, draft_token_num).tolist()):
        before = [[j for j in range(i) if mask[i][j]] for i in range(draft_token_num)]
        parents = [max(each, default=-1) for each in before]
        for i, parent in enumerate(parents):
            at = row * draft_token_num + i
            positions[at] = len(before[i]) + int(verified_seq_len[row])
            retrieve_index.view(-1)[at] = at
            children = (j for j, other in enumerate(parents) if other == i)
            retrieve_next_token.view(-1)[at] = next(children, -1)
            siblings = (j for j in range(i + 1, draft_token_num) if parent >= 0 and parents[j] == parent)
            retrieve_next_sibling.view(-1)[at] = next(siblings, -1)
