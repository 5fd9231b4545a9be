"""Causes that are put into SGLang: by kind, the modules and what to do with each."""

from __future__ import annotations

from typing import Any

from pauses import patch


def schedule(module: Any, asked: Any) -> None:
    """The scheduler takes so long for every batch that has a request in it."""

    def seconds(self: Any, running_batch: Any, *_: Any, **__: Any) -> float:
        return asked["ms"] / 1e3 if running_batch.reqs or self.waiting_queue else 0.0

    patch(module, "Scheduler.get_next_batch_to_run", seconds)


def grammar(module: Any, asked: Any) -> None:
    """Compiling a grammar, or filling its mask, takes so long."""
    compiling = asked["where"] == "compile"
    place = "XGrammarGrammarBackend.dispatch_json" if compiling else "XGrammarGrammar.fill_vocab_mask"
    patch(module, place, asked["ms"] / 1e3)


def sample(module: Any, asked: Any) -> None:
    """Sampling takes so long."""
    patch(module, "Sampler.forward", asked["ms"] / 1e3)


KINDS = {
    "schedule": {"sglang.srt.managers.scheduler": schedule},
    "grammar": {"sglang.srt.constrained.xgrammar_backend": grammar},
    "sample": {"sglang.srt.layers.sampler": sample},
}
