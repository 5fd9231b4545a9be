"""The extractors on objects of the engine's own classes, and the wrappers around its own functions."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from engines.server import environment

from stagetrace.adapters.vllm.hooks import HOOK_POINTS


def run(engine_python: Path, script: str) -> Any:
    command = [engine_python, Path(__file__).with_name(script)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_composition_of_vllms_own_batches(engine_python: Path) -> None:
    assert run(engine_python, "composition.py") == []


def test_every_wrapper_has_the_parameters_of_vllms_function(engine_python: Path) -> None:
    """None falls back to `*args, **kwargs`, under vLLM's decorators neither: that is what the benchmarks measure."""
    found = run(engine_python, "wrappers.py")
    assert len(found) == len(HOOK_POINTS)
    assert {target: theirs for target, (_, theirs) in found.items()} == {
        target: ours for target, (ours, _) in found.items()
    }
