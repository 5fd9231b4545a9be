"""A small transformer with attention and a Mixture of Experts, whose stages are operators that no compiler looks into.

As in vLLM on CUDA, where attention, experts and collectives are such operators: what is launched around their work,
from the Python inside, is launched in eager runs, in compiled ones, and while a graph is captured. Shapes never depend
on data, so that a stream can capture all of it. PyTorch alone is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

STAGES = ("attention", "moe", "collective")


@dataclass(frozen=True)
class Size:
    """Of the model and of its batch."""

    layers: int = 8
    tokens: int = 64
    hidden: int = 2048
    heads: int = 16
    experts: int = 8
    chosen: int = 2
    inner: int = 1024  # of an expert


class Around:
    """What is called before and after each stage of each layer: (stage, layer), and with its choice of experts.

    Nothing unless it is set.
    """

    before: Callable[[str, int], None] = staticmethod(lambda stage, layer: None)
    after: Callable[[str, int], None] = staticmethod(lambda stage, layer: None)
    chosen: Callable[[int, torch.Tensor], None] = staticmethod(lambda layer, chosen: None)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
    Around.before("attention", layer)
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).contiguous()
    Around.after("attention", layer)
    return out


def _experts(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor, layer: int
) -> torch.Tensor:
    """Every expert on every token, then weighted: as much work whatever was chosen."""
    Around.before("moe", layer)
    Around.chosen(layer, chosen)
    inner = torch.bmm(x.expand(up.shape[0], *x.shape), up)
    out = torch.bmm(nn.functional.silu(inner), down)
    out = (out * weights.t().unsqueeze(-1)).sum(0)
    Around.after("moe", layer)
    return out


def _all_reduce(x: torch.Tensor, layer: int) -> torch.Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        Around.before("collective", layer)
        dist.all_reduce(out)
        Around.after("collective", layer)
    return out


def _operators() -> Any:
    """The three as operators of PyTorch's, defined once a process."""
    made = []
    for function in (_attend, _experts, _all_reduce):
        # Annotations are text here: PyTorch wants the types.
        function.__annotations__ = {name: int if name == "layer" else torch.Tensor for name in function.__annotations__}
        operator = torch.library.custom_op(
            f"stagetrace_bench::{function.__name__.strip('_')}", function, mutates_args=()
        )
        operator.register_fake(lambda x, *rest: x.new_empty(x.shape))
        made.append(operator)
    return made


attend, experts, all_reduce = _operators()


class Layer(nn.Module):
    """Attention, then experts; `before_attention` and `after_attention` are what a piecewise graph captures."""

    def __init__(self, size: Size, layer: int, **where: Any):
        super().__init__()
        self.size, self.layer = size, layer
        self.qkv = nn.Linear(size.hidden, 3 * size.hidden, bias=False, **where)
        self.out = nn.Linear(size.hidden, size.hidden, bias=False, **where)
        self.router = nn.Linear(size.hidden, size.experts, bias=False, **where)
        scale = size.hidden**-0.5
        self.up = nn.Parameter(scale * torch.randn(size.experts, size.hidden, size.inner, **where))
        self.down = nn.Parameter(scale * torch.randn(size.experts, size.inner, size.hidden, **where))

    def before_attention(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values: (1, heads, tokens, width) each."""
        size = self.size
        normed = nn.functional.rms_norm(x, (size.hidden,))
        q, k, v = self.qkv(normed).view(x.shape[0], 3, size.heads, -1).permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
        return q, k, v

    def after_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The rest of the layer."""
        x = x + all_reduce(self.out(attended[0].transpose(0, 1).reshape(x.shape)), self.layer)
        normed = nn.functional.rms_norm(x, (self.size.hidden,))
        scores = self.router(normed).softmax(-1)
        kept, chosen = scores.topk(self.size.chosen, -1)
        weights = torch.zeros_like(scores).scatter(-1, chosen, kept)
        return x + experts(normed, chosen, weights, self.up, self.down, self.layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All of the layer."""
        q, k, v = self.before_attention(x)
        return self.after_attention(x, attend(q, k, v, self.layer))


class Model(nn.Module):
    """Layers, one after the other, on a batch that stays where it is."""

    def __init__(self, size: Size, **where: Any):
        super().__init__()
        self.layers = nn.ModuleList(Layer(size, layer, **where) for layer in range(size.layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The hidden states after the last layer."""
        for layer in self.layers:
            x = layer(x)
        return x
