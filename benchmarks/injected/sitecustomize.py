"""Run by the engine's Python as it starts: puts a cause of slowness into the engine, as INJECTED (JSON) says.

    {"kind": "schedule", "ms": 8}        and so on: KINDS has them all

It patches the engine's own functions when their module is imported, before stagetrace does, so that stagetrace sees
an engine that is slow by itself.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from typing import Any

ASKED: dict[str, Any] = json.loads(os.environ.get("INJECTED", "{}"))
_calls = {"count": 0}


def slept(function: Any, seconds: Any) -> Any:
    """The function after a pause of so many seconds (a number, or what a function of its arguments gives)."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        pause = seconds(*args, **kwargs) if callable(seconds) else seconds
        if pause > 0:
            time.sleep(pause)
        return function(*args, **kwargs)

    return wrapper


def patch(module: Any, place: str, seconds: Any) -> None:
    """Slows a function of a module down."""
    *owners, name = place.split(".")
    owner = functools.reduce(getattr, owners, module)
    setattr(owner, name, slept(getattr(owner, name), seconds))


def _serving(text: Any) -> bool:
    return not isinstance(text, str) or len(text) > 40  # what is tokenized while the server starts is short


def tokenizer(module: Any) -> None:
    """Tokenizing takes so long for a thousand characters."""

    def seconds(_self: Any, text: Any = "", *_: Any, **__: Any) -> float:
        size = len(text) if isinstance(text, str) else sum(map(len, text))
        return ASKED["ms"] / 1e3 * size / 1000 if _serving(text) else 0.0

    patch(module, "TokenizersBackend._encode_plus", seconds)


def schedule(module: Any) -> None:
    """The scheduler takes so long for every batch that has a request in it."""
    name = "Scheduler.schedule"
    patch(module, name, lambda self, *_, **__: ASKED["ms"] / 1e3 if self.running or self.waiting else 0.0)


def sglang_schedule(module: Any) -> None:
    """The same of SGLang's scheduler."""

    def seconds(self: Any, running_batch: Any, *_: Any, **__: Any) -> float:
        return ASKED["ms"] / 1e3 if running_batch.reqs or self.waiting_queue else 0.0

    patch(module, "Scheduler.get_next_batch_to_run", seconds)


def rank(module: Any) -> None:
    """One rank comes late to its collectives: every so many."""

    def seconds(self: Any, *_: Any, **__: Any) -> float:
        _calls["count"] += 1
        late = self.rank_in_group == ASKED["rank"] and self.world_size > 1
        return ASKED["ms"] / 1e3 if late and _calls["count"] % ASKED["every"] == 0 else 0.0

    patch(module, "GroupCoordinator.all_reduce", seconds)


def grammar(module: Any) -> None:
    """Compiling a grammar, or filling its bitmask, takes so long."""
    place = "XgrammarBackend.compile_grammar" if ASKED["where"] == "compile" else "XgrammarGrammar.fill_bitmask"
    patch(module, place, ASKED["ms"] / 1e3)


def sglang_grammar(module: Any) -> None:
    """The same in SGLang."""
    compiling = ASKED["where"] == "compile"
    place = "XGrammarGrammarBackend.dispatch_json" if compiling else "XGrammarGrammar.fill_vocab_mask"
    patch(module, place, ASKED["ms"] / 1e3)


def router(module: Any) -> None:
    """The routers favour some experts by so much."""
    block = module.Qwen3MoeSparseMoeBlock
    original = block.__init__

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        choose = self.gate.forward

        def biased(x: Any) -> Any:
            logits, *rest = choose(x)
            for expert in ASKED["experts"]:
                logits[..., expert] += ASKED["bias"]
            return (logits, *rest)

        self.gate.forward = biased

    block.__init__ = wrapper


def prepare(module: Any) -> None:
    """Building the inputs of the forward pass takes so long."""
    patch(module, "GPUModelRunner._prepare_inputs", ASKED["ms"] / 1e3)


def sample(module: Any) -> None:
    """Sampling takes so long."""
    patch(module, "Sampler.forward", ASKED["ms"] / 1e3)


def backend(module: Any) -> None:
    """The engine's compiler backend compiles as torch.compile does by itself, without the engine's cache."""

    def __call__(self: Any, graph: Any, example_inputs: Any) -> Any:  # noqa: N807
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, example_inputs)

    module.VllmBackend.__call__ = __call__


def compiled(module: Any) -> None:
    """After so many forward passes the engine's compiler backend compiles a graph."""
    runner = module.GPUModelRunner
    original = runner._model_forward

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        _calls["count"] += 1
        if _calls["count"] in ASKED["at"]:
            import torch
            from vllm.compilation.backends import VllmBackend

            size = 64 + _calls["count"] % 7

            def work(x: Any) -> Any:
                for _ in range(ASKED["operations"]):
                    x = torch.nn.functional.gelu(x @ x.T + size) + x
                return x

            torch.compile(work, backend=VllmBackend(self.vllm_config), fullgraph=True)(torch.randn(size, size))
        return original(self, *args, **kwargs)

    runner._model_forward = wrapper


KINDS = {
    "tokenizer": {"transformers.tokenization_utils_tokenizers": tokenizer},
    "schedule": {"vllm.v1.core.sched.scheduler": schedule, "sglang.srt.managers.scheduler": sglang_schedule},
    "rank": {"vllm.distributed.parallel_state": rank},
    "grammar": {
        "vllm.v1.structured_output.backend_xgrammar": grammar,
        "sglang.srt.constrained.xgrammar_backend": sglang_grammar,
    },
    "router": {"vllm.model_executor.models.qwen3_moe": router, "sglang.srt.models.qwen3_moe": router},
    "prepare": {"vllm.v1.worker.gpu_model_runner": prepare},
    "sample": {"vllm.v1.sample.sampler": sample, "sglang.srt.layers.sampler": sample},
    "compile": {"vllm.v1.worker.gpu_model_runner": compiled, "vllm.compilation.backends": backend},
}


class Finder(importlib.abc.MetaPathFinder):
    """Finds the module as everybody does, and patches it once it has been run."""

    def __init__(self, name: str, apply: Any):
        self.name, self.apply, self.busy = name, apply, False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name or self.busy:
            return None
        self.busy = True
        try:
            spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        finally:
            self.busy = False
        if spec is None or spec.loader is None:
            return None
        loader, run = spec.loader, spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            self.apply(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class Burn:
    """An ASGI middleware that keeps the event loop busy for a while with everything that is sent (--middleware)."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def burning(message: Any) -> None:
            if message["type"] == "http.response.body":
                until = time.perf_counter() + ASKED["ms"] / 1e3
                while time.perf_counter() < until:
                    pass
            await send(message)

        serves = scope["type"] == "http" and "/completions" in scope["path"]
        await self.app(scope, receive, burning if serves else send)


for _name, _apply in KINDS.get(ASKED.get("kind", ""), {}).items():
    sys.meta_path.insert(0, Finder(_name, _apply))
