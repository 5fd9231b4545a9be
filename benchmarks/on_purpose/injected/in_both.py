"""Causes that are put into what both engines use: by kind, the modules and what to do with each."""

from __future__ import annotations

import functools
import itertools
import time
from gc import collect
from typing import Any

from pauses import ASKED, patch

# The method that makes a batch, by the scheduler's module, and whether there is a request.
_BATCHES = {
    "vllm.v1.core.sched.scheduler": ("schedule", lambda self, *_, **__: self.running or self.waiting),
    "sglang.srt.managers.scheduler": (
        "get_next_batch_to_run",
        lambda self, running_batch, **_: running_batch.reqs or self.waiting_queue,
    ),
}


def _serving(text: Any) -> bool:
    return not isinstance(text, str) or len(text) > 40  # what is tokenized while the server starts is short


def tokenizer(module: Any, asked: Any) -> None:
    """Tokenizing takes so long for a thousand characters."""

    def seconds(_self: Any, text: Any = "", *_: Any, **__: Any) -> float:
        size = len(text) if isinstance(text, str) else sum(map(len, text))
        return asked["ms"] / 1e3 * size / 1000 if _serving(text) else 0.0

    patch(module, "TokenizersBackend._encode_plus", seconds)


def router(module: Any, asked: Any) -> None:
    """The routers favour some experts by so much."""
    block = module.Qwen3MoeSparseMoeBlock
    original = block.__init__

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        choose = self.gate.forward

        def biased(x: Any) -> Any:
            logits, *rest = choose(x)
            for expert in asked["experts"]:
                logits[..., expert] += asked["bias"]
            return (logits, *rest)

        self.gate.forward = biased

    block.__init__ = wrapper


def gc(module: Any, asked: Any) -> None:
    """With so many objects alive in the scheduler's process, a full collection every so many batches."""
    held: list[Any] = []
    calls = itertools.count(1)

    def collected(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if serves(self, *args, **kwargs) and next(calls) % asked["every"] == 0:
                if not held:
                    held.extend([number] for number in range(asked["objects"]))
                collect()
            return function(self, *args, **kwargs)

        return wrapper

    name, serves = _BATCHES[module.__name__]
    setattr(module.Scheduler, name, collected(getattr(module.Scheduler, name)))


class Burn:
    """An ASGI middleware that keeps the event loop busy for a while with everything that is sent (--middleware)."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def burning(message: Any) -> None:
            if message["type"] == "http.response.body":
                until = time.perf_counter() + ASKED["middleware"]["ms"] / 1e3
                while time.perf_counter() < until:
                    pass
            await send(message)

        serves = scope["type"] == "http" and "/completions" in scope["path"]
        await self.app(scope, receive, burning if serves else send)


KINDS = {
    "gc": dict.fromkeys(_BATCHES, gc),
    "tokenizer": {"transformers.tokenization_utils_tokenizers": tokenizer},
    "router": {"vllm.model_executor.models.qwen3_moe": router, "sglang.srt.models.qwen3_moe": router},
}
