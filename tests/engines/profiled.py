"""Run by the engine's Python: a long prefill under torch.profiler, with ranges opened around what the hooks are on.

    profiled.py MODEL ARGUMENTS, which is JSON for vLLM's LLM

Prints JSON: `ranges`, name -> how often, and how long together in µs; `chosen`, what every call of a router returned,
in the order of the calls: how many tokens for each expert.
"""

import json
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernelModularImpl
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def ranged(name: str, function: Any) -> Any:
    """The function in a range of the profiler's."""

    def inside(*given: Any, **named: Any) -> Any:
        with record_function(name):
            return function(*given, **named)

    return inside


def main() -> None:
    llm = LLM(
        model=sys.argv[1],
        max_model_len=4096,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        **json.loads(sys.argv[2]),
    )
    for layer in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values():
        if hasattr(layer, "impl"):
            layer.impl.forward = ranged("attention", layer.impl.forward)
        if getattr(layer, "shared_experts", None) is not None:
            shared = layer.shared_experts._layer
            shared.forward = ranged("shared_experts", shared.forward)
    for name, owner, function in (
        ("expert_compute", FusedMoEKernelModularImpl, "_fused_experts"),
        ("moe_route", BaseRouter, "_select_experts"),
        ("rank", GPUModelRunner, "execute_model"),
    ):
        setattr(owner, function, ranged(name, getattr(owner, function)))
    chosen: list[list[int]] = []
    number = llm.llm_engine.model_config.get_num_experts()
    select_experts = FusedMoERouter.select_experts

    def counted(*given: Any, **named: Any) -> Any:
        weights, experts = select_experts(*given, **named)
        chosen.append(torch.bincount(experts.flatten(), minlength=number).tolist())
        return weights, experts

    FusedMoERouter.select_experts = counted
    tokens = [{"prompt_token_ids": [7 + (number * 31 + at) % 900 for at in range(2000)]} for number in range(3)]
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        llm.generate(tokens, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    ranges = {
        event.key: [event.count, event.cpu_time_total]
        for event in profiler.key_averages()
        if event.key in ("attention", "expert_compute", "moe_route", "shared_experts", "rank")
    }
    print(json.dumps({"ranges": ranges, "chosen": chosen}))


if __name__ == "__main__":
    main()
