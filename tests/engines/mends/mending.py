"""Mends vLLM's build for the CPU, in every process that imports this before vLLM.

What it lacks for expert parallelism: experts of other ranks are left out (vLLM hands their numbers to a kernel that
then reads beyond its weights), and the groups of ranks can gather and scatter pieces of unequal sizes.

With MENDS_OPAQUE=1 it compiles models as it does for CUDA: the MoE and the collectives are operators that no compiler
looks into, where the CPU's platform has them inlined, and vLLM's own backend compiles the graph in pieces, between the
attention of one layer and that of the next, where the CPU's platform takes PyTorch's backend.

For tests alone: nothing of stagetrace is in it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from typing import Any

_EXPERTS = "vllm.model_executor.layers.fused_moe.experts.cpu_moe"
_COMMUNICATOR = "vllm.distributed.device_communicators.cpu_communicator"
_RUNNER = "vllm.model_executor.layers.fused_moe.runner.moe_runner"
_PLATFORM = "vllm.platforms.cpu"
_PASS = "vllm.compilation.passes.utility.fix_functionalization"


def mend_experts(module: Any) -> None:
    """Experts that are not on this rank weigh nothing, whichever is computed in their place."""
    apply = module.CPUUnquantizedExperts.apply

    def local(self: Any, **given: Any) -> None:
        placed, ids = given["expert_map"], given["topk_ids"]
        if placed is not None:
            here = placed[ids.long()].to(ids.dtype)
            given["topk_weights"] = given["topk_weights"] * (here >= 0)
            given["topk_ids"] = here.clamp(min=0)
        apply(self, **given)

    module.CPUUnquantizedExperts.apply = local


def mend_communicator(module: Any) -> None:
    """Pieces are padded to the largest on their way; what is scattered is summed everywhere, and cut."""
    import torch

    def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
        if isinstance(input_, list):
            return [all_gatherv(self, one, dim, sizes) for one in input_]
        assert dim == 0
        rows = sizes or [input_.shape[0]] * self.world_size
        padded = input_.new_zeros((max(rows), *input_.shape[1:]))
        padded[: input_.shape[0]] = input_
        pieces = [torch.empty_like(padded) for _ in rows]
        torch.distributed.all_gather(pieces, padded, group=self.device_group)
        return torch.cat([piece[:count] for piece, count in zip(pieces, rows, strict=True)])

    def reduce_scatterv(self: Any, input_: Any, dim: int = -1, sizes: list[int] | None = None) -> Any:
        assert dim == 0
        rows = sizes or [input_.shape[0] // self.world_size] * self.world_size
        summed = input_.clone()
        torch.distributed.all_reduce(summed, group=self.device_group)
        first = sum(rows[: self.rank_in_group])
        return summed[first : first + rows[self.rank_in_group]].contiguous()

    module.CpuCommunicator.all_gatherv = all_gatherv
    module.CpuCommunicator.reduce_scatterv = reduce_scatterv


def mend_runner(module: Any) -> None:
    """The experts are entered through vLLM's operators, as everywhere but on a CPU and a TPU."""
    import torch

    def select_forward(self: Any) -> Any:
        operators = torch.ops.vllm
        return operators.moe_forward if self._shared_experts is None else operators.moe_forward_shared

    module.MoERunner._select_forward = select_forward


def mend_platform(module: Any) -> None:
    """Collectives are vLLM's operators, and what was to be compiled is compiled by vLLM's backend."""
    platform = module.CpuPlatform
    check_and_update_config = platform.check_and_update_config.__func__

    def updated(cls: Any, vllm_config: Any) -> None:
        compilation = vllm_config.compilation_config
        asked = compilation.mode
        check_and_update_config(cls, vllm_config)
        if compilation.mode:  # not 0, which is eager
            compilation.mode = asked
            compilation.compile_sizes = compilation.compile_sizes or []  # which on a GPU the sizes of graphs make

    platform.use_custom_op_collectives = classmethod(lambda cls: True)
    platform.check_and_update_config = classmethod(updated)


def mend_pass(module: Any) -> None:
    """A pass that saves copies names operators that the build for the CPU lacks: left out, as it is on an XPU."""
    module.FixFunctionalizationPass.__call__ = lambda self, graph: None


MENDS = {_EXPERTS: mend_experts, _COMMUNICATOR: mend_communicator}
if os.environ.get("MENDS_OPAQUE") == "1":
    MENDS |= {_RUNNER: mend_runner, _PLATFORM: mend_platform, _PASS: mend_pass}


class Finder(importlib.abc.MetaPathFinder):
    """Mends a module right after it was executed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """The module's own spec, with a loader that mends it."""
        mend = MENDS.pop(name, None)
        if mend is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            mend(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
