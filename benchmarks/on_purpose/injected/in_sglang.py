"""Causes that are put into SGLang: by kind, the modules and what to do with each."""

from __future__ import annotations

from typing import Any

from in_both import Burn
from pauses import patch, paused

_calls = {"count": 0}


def schedule(module: Any, asked: Any) -> None:
    """The scheduler takes so long for every batch that has a request in it."""

    def seconds(self: Any, running_batch: Any, *_: Any, **__: Any) -> float:
        return asked["ms"] / 1e3 if running_batch.reqs or self.waiting_queue else 0.0

    patch(module, "Scheduler.get_next_batch_to_run", seconds)


def rank(module: Any, asked: Any) -> None:
    """One rank is slow in what it computes before its collectives: in every so many attentions and experts."""

    def seconds(*_: Any, **__: Any) -> float:
        import torch

        _calls["count"] += 1
        late = torch.distributed.get_rank() == asked["rank"]
        return asked["ms"] / 1e3 if late and _calls["count"] % asked["every"] == 0 else 0.0

    for place in ("Qwen3MoeAttention.forward", "Qwen3MoeSparseMoeBlock.forward"):
        patch(module, place, seconds)


def grammar(module: Any, asked: Any) -> None:
    """Compiling a grammar, or filling its mask, takes so long."""
    compiling = asked["where"] == "compile"
    place = "XGrammarGrammarBackend.dispatch_json" if compiling else "XGrammarGrammar.fill_vocab_mask"
    patch(module, place, asked["ms"] / 1e3)


def middleware(module: Any, asked: Any) -> None:
    """The front end's event loop is busy for a while with everything that is sent."""
    module.app.add_middleware(Burn)


def detokenizer(module: Any, asked: Any) -> None:
    """Turning a step's tokens into text takes so long for each of them."""
    name = "DetokenizerManager.handle_batch_token_id_out"
    patch(module, name, lambda _self, batch: asked["ms"] / 1e3 * len(batch.rids))


KINDS = {
    "schedule": {"sglang.srt.managers.scheduler": schedule},
    "rank": {"sglang.srt.models.qwen3_moe": rank},
    "grammar": {"sglang.srt.constrained.xgrammar_backend": grammar},
    "prepare": {"sglang.srt.model_executor.forward_batch_info": paused("ForwardBatch.init_new")},
    "sample": {"sglang.srt.layers.sampler": paused("Sampler.forward")},
    "middleware": {"sglang.srt.entrypoints.http_server": middleware},
    "detokenizer": {"sglang.srt.managers.detokenizer_manager": detokenizer},
}
