"""Causes that are put into what both engines use: by kind, the modules and what to do with each."""

from __future__ import annotations

import functools
import time
from typing import Any

from pauses import ASKED, patch


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
    "tokenizer": {"transformers.tokenization_utils_tokenizers": tokenizer},
    "router": {"vllm.model_executor.models.qwen3_moe": router, "sglang.srt.models.qwen3_moe": router},
}
