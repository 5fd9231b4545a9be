"""The benchmarks that need the engine: they run and print what they promise. No speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def object_of(program: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / program), "--quick", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_step_cost(engine_python: Path) -> None:
    found = object_of("step_cost.py", "--python", str(engine_python), "--batches", "1", "256")
    assert set(found["microseconds"]) >= {"decode", "speculation", "join_leave", "mixed"}
    assert all(set(by) == {"1", "256"} for by in found["microseconds"].values())
    assert found["batch_256_over_1"] > 0
    assert isinstance(found["speculation_us_per_request"], float)


def test_layer_cost(engine_python: Path) -> None:
    found = object_of("layer_cost.py", "--python", str(engine_python))
    own = found["nanoseconds"]
    for name in ("attention", "moe_route", "expert_dispatch", "embed", "collective", "a step"):
        assert 0 < own[f"{name}, level step"] < own[f"{name}, recording"]
    # Embedding, logits, and by layer: attention, route, dispatch, compute, combine, and counts in a slot.
    assert found["step_slots"] == 2 + 4 * (5 + 1)


@pytest.mark.matrix
def test_dense_prefill(engine_python: Path) -> None:
    found = object_of("dense_prefill.py", "--python", str(engine_python))
    assert {"embed", "forward", "attention", "mlp", "logits"} == set(found["stages"])
    assert found["steps"] == 1 and 0 < found["of_light"] <= found["mfu"] + 1e-9 < 1.05
    assert all(0 < stage["of_light"] < 1.05 for stage in found["stages"].values())
    assert found["gap"]["launch"] is None and found["gap"]["communication"] == found["gap"]["imbalance"] == 0
    assert found["gap_of_step"] == pytest.approx(1 - found["of_light"], abs=1e-3)
    assert found["gap_of_step"] == pytest.approx(found["gap"]["host"] + found["gap"]["kernel"], abs=1e-3)


@pytest.mark.matrix
@pytest.mark.usefixtures("engine_python")
def test_engine_overhead() -> None:
    found = object_of("engine_overhead.py", "--collector")
    assert set(found["hook_self_time_pct"]) == {"off", "request", "step", "layer"}
    own = found["hook_self_time_pct"]
    assert 0 < own["off"] < own["step"]
    assert own["request"] < own["step"]
    assert own["layer"] > own["step"]
    # The steps that were timed are those of the server: they write as much.
    assert found["detail_slots_per_step"] == pytest.approx(found["timed_slots_per_step"], abs=0.5)
    assert {"engine core", "worker", "front end", "collector"} <= set(found["cpu"])
    for one in (found, found["collector_stopped"], found["collector"]):
        for name in ("tpot", "ttft", "throughput"):
            low, high = one[f"{name}_pct_ci95"]
            assert low <= one[f"{name}_pct"] <= high
