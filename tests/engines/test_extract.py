"""The extractors on objects of the engine's own classes, and the wrappers around its own functions."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from engines.server import environment

from stagetrace.adapters.vllm.hooks import HOOK_POINTS
from stagetrace.instrument.hooks import in_range, release_of
from stagetrace.instrument.stages import Level


def run(engine_python: Path, script: str, *arguments: str) -> Any:
    command = [engine_python, Path(__file__).with_name(script), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_composition_of_vllms_own_batches(engine_python: Path) -> None:
    assert run(engine_python, "composition.py") == []


NEWEST = "0.32.0"  # for the CPU: the one that is installed
# What decorators of vLLM's own hide: there the wrapper names the leading parameters and takes whatever else comes.
HIDDEN = {"vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens"}
ONCE = {point.target for point in HOOK_POINTS if point.level == Level.OFF}  # in a process's life, so it costs nothing


def test_wrappers_have_the_parameters_of_vllms_functions(engine_python: Path) -> None:
    """Under torch.inference_mode too: that they hand on no `*args, **kwargs` is what the benchmarks measure."""
    found = run(engine_python, "wrappers.py", "vllm")
    assert list(found) == [point.target for point in HOOK_POINTS if in_range(point, release_of(NEWEST))]
    hidden = {target for target, (ours, theirs) in found.items() if ours != theirs}
    assert hidden - ONCE == HIDDEN
    for point in HOOK_POINTS:
        if point.target in hidden:
            assert found[point.target][0] == ", ".join((*point.parameters, "*args", "**kwargs"))
