"""A plugin of SGLang, for tests alone: ranges of torch.profiler around the functions that the layer hooks are on.

On its path (PYTHONPATH), its entry point is found. SGLang's own profiler then has them in its trace.
"""

from __future__ import annotations

from functools import partial
from typing import Any

RANGES = {
    "attention": "sglang.srt.layers.radix_attention.RadixAttention.forward",
    "expert_compute": "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.run_moe_core",
    "forward": "sglang.srt.model_executor.model_runner.ModelRunner.forward",
}


def register() -> None:
    """Opens the ranges, by SGLang's own registry."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name, target in RANGES.items():
        HookRegistry.register(target, partial(ranged, f"range {name}"), HookType.AROUND)


def ranged(name: str, original: Any, *given: Any, **named: Any) -> Any:
    """The function in a range of that name."""
    from torch.profiler import record_function

    with record_function(name):
        return original(*given, **named)
