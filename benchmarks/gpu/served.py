"""An engine that engine.py asks things of: vLLM offline, in its own processes, and what profiles its worker.

    python served.py SOCKET SETTINGS      # one JSON object a line, there and back

SETTINGS is a JSON object of arguments for vllm.LLM. The worker imports this module as well, for `Profiled`: nothing of
vLLM or PyTorch is imported before it is needed.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import time
import traceback
from typing import Any

BEGINS, ENDS = "stagetrace begins ", "stagetrace ends "  # ranges of the profile: with a stage; with a stage and a step
SEED = 11


class Profiled:
    """What is added to vLLM's worker (worker_extension_cls): torch.profiler, told where stagetrace's pairs are."""

    stagetrace_profiler: Any = None

    def stagetrace_profile_begins(self) -> int:
        """Starts it. Gives wall less monotonic time, ns."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        mark_pairs()
        self.stagetrace_profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        self.stagetrace_profiler.start()
        return time.time_ns() - time.monotonic_ns()

    def stagetrace_profile_ends(self, path: str) -> int:
        """Stops it and writes what it saw. Gives wall less monotonic time, ns."""
        import torch

        torch.cuda.synchronize()
        offset = time.time_ns() - time.monotonic_ns()
        self.stagetrace_profiler.stop()
        unmark_pairs()
        self.stagetrace_profiler.export_chrome_trace(path)
        self.stagetrace_profiler = None
        return offset

    def stagetrace_device(self) -> dict[str, Any]:
        """What stagetrace times the device by in this process."""
        from stagetrace.adapters.vllm.worker import DEVICE

        return dict(DEVICE._said())


def mark_pairs() -> None:
    """Has a range of the profiler's right before each pair's first event and right after its last."""
    from torch.profiler import record_function

    from stagetrace.adapters.vllm.worker import DEVICE
    from stagetrace.instrument.device_pairs import STAGES

    pairs: Any = DEVICE.pairs
    if pairs is None:
        raise RuntimeError(f"stagetrace times no device in this process: {DEVICE._said()}")
    begin, end = pairs.begin, pairs.end

    def marked_begin(stage: int) -> None:
        with record_function(BEGINS + STAGES[stage]):
            pass
        begin(stage)

    def marked_end(stage: int, instance: int, step: int, rank: int) -> None:
        end(stage, instance, step, rank)
        with record_function(f"{ENDS}{STAGES[stage]} {step}"):
            pass

    pairs.begin, pairs.end = marked_begin, marked_end


def unmark_pairs() -> None:
    """The pairs are what they were."""
    from stagetrace.adapters.vllm.worker import DEVICE

    pairs: Any = DEVICE.pairs
    if pairs is not None:
        del pairs.begin, pairs.end


class Served:
    """An engine, and what it can be asked."""

    def __init__(self, settings: dict[str, Any]):
        from vllm import LLM

        self.llm: Any = LLM(**settings)
        self.vocabulary = int(self.llm.model_config.hf_config.vocab_size)

    def info(self) -> dict[str, Any]:
        """What runs."""
        import torch
        import vllm

        config = self.llm.llm_engine.vllm_config
        compilation = config.compilation_config
        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "runner": 2 if getattr(config, "use_v2_model_runner", False) else 1,
            "compiled": getattr(compilation.mode, "name", str(compilation.mode)),
            "graphs": getattr(compilation.cudagraph_mode, "name", str(compilation.cudagraph_mode)),
            "overlapped": bool(config.scheduler_config.async_scheduling),
        }

    def generate(self, width: int, prompt: int, tokens: int) -> dict[str, Any]:
        """So many requests at once, of prompts left to chance and as many tokens each. Seconds, in all."""
        from vllm import SamplingParams

        chance = random.Random(SEED)
        prompts = [
            {"prompt_token_ids": [chance.randrange(3, self.vocabulary) for _ in range(prompt)]} for _ in range(width)
        ]
        wanted = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        done = self.llm.generate(prompts, wanted, use_tqdm=False)
        took = time.perf_counter() - begin
        made = [len(each.outputs[0].token_ids) for each in done]
        if made != [tokens] * width:
            raise RuntimeError(f"{tokens} tokens were asked for by {width} requests, they got {made}")
        return {"seconds": took}

    def profile(self, width: int, prompt: int, tokens: int, path: str) -> dict[str, Any]:
        """The same under the profiler, whose trace is written to `path`."""
        (before,) = self.llm.collective_rpc("stagetrace_profile_begins")
        try:
            found = self.generate(width, prompt, tokens)
        finally:
            (after,) = self.llm.collective_rpc("stagetrace_profile_ends", args=(path,))
        return found | {"offset_ns": (before + after) // 2, "slewed_ns": after - before}

    def device(self) -> dict[str, Any]:
        """What stagetrace times the device by in the worker."""
        (found,) = self.llm.collective_rpc("stagetrace_device")
        return dict(found)


def main() -> int:
    """Answers until the other side is gone."""
    path, settings = sys.argv[1:]
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    connection.set_inheritable(False)
    lines = connection.makefile("rw", encoding="utf-8")

    def answer(found: dict[str, Any]) -> None:
        lines.write(json.dumps(found) + "\n")
        lines.flush()

    try:
        served = Served(json.loads(settings))
        answer(served.info())
    except Exception:
        answer({"error": traceback.format_exc()})
        return 1
    for line in lines:
        asked = json.loads(line)
        try:
            answer(getattr(served, asked.pop("ask"))(**asked))
        except Exception:
            answer({"error": traceback.format_exc()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
