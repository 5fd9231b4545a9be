"""Causes that are put into vLLM: by kind, the modules and what to do with each."""

from __future__ import annotations

import functools
from typing import Any

from pauses import patch, paused

_EXCHANGES = tuple(f"AgRsAll2AllManager.{name}" for name in ("dispatch", "dispatch_router_logits", "combine"))
_calls = {"count": 0}


def schedule(module: Any, asked: Any) -> None:
    """The scheduler takes so long for every batch that has a request in it."""
    name = "Scheduler.schedule"
    patch(module, name, lambda self, *_, **__: asked["ms"] / 1e3 if self.running or self.waiting else 0.0)


def rank(module: Any, asked: Any) -> None:
    """One rank comes late to its collectives: every so many."""

    def seconds(self: Any, *_: Any, **__: Any) -> float:
        _calls["count"] += 1
        late = self.rank_in_group == asked["rank"] and self.world_size > 1
        return asked["ms"] / 1e3 if late and _calls["count"] % asked["every"] == 0 else 0.0

    patch(module, "GroupCoordinator.all_reduce", seconds)


def grammar(module: Any, asked: Any) -> None:
    """Compiling a grammar, or filling its bitmask, takes so long."""
    place = "XgrammarBackend.compile_grammar" if asked["where"] == "compile" else "XgrammarGrammar.fill_bitmask"
    patch(module, place, asked["ms"] / 1e3)


def backend(module: Any, asked: Any) -> None:
    """The engine's compiler backend compiles as torch.compile does by itself, without the engine's cache."""

    def __call__(self: Any, graph: Any, example_inputs: Any) -> Any:  # noqa: N807
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, example_inputs)

    module.VllmBackend.__call__ = __call__


def compiled(module: Any, asked: Any) -> None:
    """After so many forward passes the engine's compiler backend compiles a graph."""
    runner = module.GPUModelRunner
    original = runner._model_forward

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        _calls["count"] += 1
        if _calls["count"] in asked["at"]:
            import torch
            from vllm.compilation.backends import VllmBackend

            size = 64 + _calls["count"] % 7

            def work(x: Any) -> Any:
                for _ in range(asked["operations"]):
                    x = torch.nn.functional.gelu(x @ x.T + size) + x
                return x

            torch.compile(work, backend=VllmBackend(self.vllm_config), fullgraph=True)(torch.randn(size, size))
        return original(self, *args, **kwargs)

    runner._model_forward = wrapper


KINDS = {
    "schedule": {"vllm.v1.core.sched.scheduler": schedule},
    "rank": {"vllm.distributed.parallel_state": rank},
    "grammar": {"vllm.v1.structured_output.backend_xgrammar": grammar},
    "prepare": {"vllm.v1.worker.gpu_model_runner": paused("GPUModelRunner._prepare_inputs")},
    "forward": {"vllm.v1.worker.gpu_model_runner": paused("GPUModelRunner._model_forward")},
    "sample": {"vllm.v1.sample.sampler": paused("Sampler.forward")},
    "detokenizer": {"vllm.v1.engine.detokenizer": paused("BaseIncrementalDetokenizer.update")},
    "draft": {"vllm.v1.spec_decode.ngram_proposer": paused("NgramProposer.propose")},
    # On every rank, so that none is late.
    "links": {"vllm.distributed.device_communicators.cpu_communicator": paused("CpuCommunicator.all_reduce")},
    "exchange": {"vllm.distributed.device_communicators.all2all": paused(*_EXCHANGES)},
    "compile": {"vllm.v1.worker.gpu_model_runner": compiled, "vllm.compilation.backends": backend},
}
