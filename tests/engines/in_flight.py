"""Run by the engine's Python: vLLM's own AsyncScheduler with two steps in flight, which the CPU's engine forces off.

The calls are those of EngineCore.step_with_batch_queue: schedule as long as there is room in the queue of batches, else
take in the oldest one's tokens, which are drawn here. Prints as JSON what was handed out, step by step.
"""

import json
import random
import sys
from collections import deque
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

BLOCK, BLOCKS, IN_FLIGHT, STOP = 16, 40, 2, 5


def scheduler(model: str) -> AsyncScheduler:
    config = EngineArgs(
        model=model, enforce_eager=True, max_model_len=1024, max_num_batched_tokens=128, block_size=BLOCK
    ).create_engine_config()
    config.scheduler_config.async_scheduling = True
    config.cache_config.num_gpu_blocks = BLOCKS
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return AsyncScheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        log_stats=True,
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )


def main() -> None:
    load_general_plugins()
    chance = random.Random(11)
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    engine = scheduler(sys.argv[1])
    left = [(f"request-{number}", chance.randint(20, 200), chance.randint(2, 90)) for number in range(40)]
    in_flight: deque[Any] = deque()
    steps, made = [], {}
    while left or engine.has_unfinished_requests() or in_flight:
        while left and len(engine.requests) < 6:
            name, prompt, most = left.pop()
            params = SamplingParams(max_tokens=most, ignore_eos=False, stop_token_ids=[STOP])
            params.update_from_generation_config({}, STOP)
            made[name] = Request(name, [7] * prompt, params, None, block_hasher=hasher)
            engine.add_request(made[name])
        if len(in_flight) < IN_FLIGHT and engine.has_unfinished_requests():
            output = engine.schedule()
            if output.total_num_scheduled_tokens:
                kv = sum(engine.requests[name].num_computed_tokens for name in output.num_scheduled_tokens)
                complete = [
                    name
                    for name in output.num_scheduled_tokens
                    if engine.requests[name].num_computed_tokens >= engine.requests[name].num_prompt_tokens
                ]
                in_flight.append((output, kv, complete))
                continue
        if len(steps) % 17 == 16 and in_flight:
            name = chance.choice([*in_flight[-1][0].num_scheduled_tokens])
            engine.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        if in_flight:
            output, kv, complete = in_flight.popleft()
            names = [*output.num_scheduled_tokens]
            sampled = [[STOP if chance.random() < 0.03 else 9] if name in complete else [] for name in names]
            ran = ModelRunnerOutput(names, {name: at for at, name in enumerate(names)}, sampled_token_ids=sampled)
            given = engine.update_from_output(output, ran)
            tokens = sum(len(one.new_token_ids) for each in given.values() for one in each.outputs)
            steps.append({"tokens": tokens, "kv": kv, "q": output.total_num_scheduled_tokens, "requests": len(names)})
    print(json.dumps({"steps": steps, "requests": [request.num_output_tokens for request in made.values()]}))


if __name__ == "__main__":
    main()
