"""A plugin of vLLM's for its statistics: every IterationStats as a line of JSON in the file that ITERATIONS names."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class IterationLog(StatLoggerBase):
    """One for each engine, in the front end."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._file = Path(os.environ["ITERATIONS"]).open("a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def record(self, scheduler_stats: Any, iteration_stats: Any, *given: Any, **named: Any) -> None:
        if iteration_stats is None:
            return
        line = {
            "prompt_tokens": iteration_stats.num_prompt_tokens,
            "generation_tokens": iteration_stats.num_generation_tokens,
            "preempted": iteration_stats.num_preempted_reqs,
            "first_tokens": len(iteration_stats.time_to_first_tokens_iter),
            "finished": [asdict(each) for each in iteration_stats.finished_requests],
        }
        self._file.write(json.dumps(line, default=str) + "\n")

    def log_engine_initialized(self) -> None:
        pass
