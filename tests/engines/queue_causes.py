"""Run by the engine's Python: requests that wait in vLLM's own Scheduler, each for another reason.

A scheduler for each reason, called as EngineCore.step does; tokens are made up here. Prints as JSON, by request that
waits, the stages.QueueCause that it was made to wait for.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.plugins import load_general_plugins
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

BLOCK, MOST_BLOCKS = 16, 64


@dataclass
class Case:
    """Two requests, of which the second waits; prompts and tokens to generate of each."""

    prompts: tuple[int, int]
    outputs: tuple[int, int] = (6, 2)
    settings: dict[str, Any] = field(default_factory=dict)
    blocks: int = MOST_BLOCKS
    loras: bool = False
    paused: bool = False


CASES = {
    "BATCH_FULL": Case((20, 20), settings={"max_num_seqs": 1}),
    "TOKEN_BUDGET": Case((500, 20), settings={"max_num_batched_tokens": 64}),
    "KV_SPACE": Case((70, 70), blocks=8),
    "LORA_LIMIT": Case((20, 20), settings={"enable_lora": True, "max_loras": 1}, loras=True),
    "PAUSED": Case((20, 20), paused=True),
    "TURN": Case((20, 20)),
}


def scheduler(model: str, case: Case) -> Scheduler:
    settings = {"max_num_batched_tokens": 512, "block_size": BLOCK, "max_model_len": 512, **case.settings}
    config = EngineArgs(model=model, enforce_eager=True, **settings).create_engine_config()
    config.cache_config.num_gpu_blocks = case.blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=case.blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        log_stats=True,
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )


def step(engine: Scheduler) -> None:
    output = engine.schedule()
    names = [*output.num_scheduled_tokens]
    complete = [engine.requests[name].num_computed_tokens >= engine.requests[name].num_tokens for name in names]
    ran = ModelRunnerOutput(
        names,
        {name: at for at, name in enumerate(names)},
        sampled_token_ids=[[9] if done else [] for done in complete],
    )
    time.sleep(0.005)  # the model
    engine.update_from_output(output, ran)


def main() -> None:
    load_general_plugins()
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    expected = {}
    for cause, case in CASES.items():
        engine = scheduler(sys.argv[1], case)

        def ask(which: int, cause: str = cause, case: Case = case, engine: Scheduler = engine) -> str:
            params = SamplingParams(max_tokens=case.outputs[which], ignore_eos=True)
            params.update_from_generation_config({}, 2)
            lora = LoRARequest(f"adapter {which}", 1 + which, "/somewhere") if case.loras else None
            name = f"{cause} {which}"
            tokens = [7 + which] * case.prompts[which]
            engine.add_request(Request(name, tokens, params, None, block_hasher=hasher, lora_request=lora))
            return name

        ask(0)
        step(engine)
        if case.paused:
            engine.set_pause_state(PauseState.PAUSED_ALL)
        expected[ask(1)] = cause
        if case.paused:
            time.sleep(0.02)  # the engine does not schedule
            engine.set_pause_state(PauseState.UNPAUSED)
        while engine.has_unfinished_requests():
            step(engine)
    print(json.dumps(expected))


if __name__ == "__main__":
    main()
