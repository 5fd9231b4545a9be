"""Tests of the GPU's benchmark with PyTorch, without a GPU: its model, its marks in Triton's interpreter.

Under a compiler the stages stay in place: what is launched inside them is launched in the order of the layers.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"

STEPS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
import device_time
device_time.borrow_stagetrace()
from block import Model, Size

class Event:
    def record(self): pass
    def query(self): return True
    def elapsed_time(self, other): return 0.0

class Source:
    event = staticmethod(Event)
    def stream(self): return 1
    def capturing(self): return False
    def record_aside(self, event): event.record()

torch.manual_seed(3)
model = Model(Size(layers=2, tokens=4, hidden=32, heads=2, experts=4, inner=16), device="cpu")
x = torch.randn(4, 32)
timed = device_time.timed(2, "cpu", False, Event, Source())
device_time.mark_stages(timed.marks)
launch, launched, clock = timed.marks.mark, [], 0
def mark(index):
    global clock
    clock += 10
    timed.marks.clock.fill_(clock)
    launched.append(index)
    launch(index)
timed.marks.mark = mark
found = []
with torch.inference_mode():
    plain = model(x)
    for number, run in enumerate((model, torch.compile(model, fullgraph=True, backend="aot_eager")), 1):
        run(x)
        launched.clear()
        out = []
        device_time.step(number, lambda: out.append(run(x)), timed)
        timed.pairs.poll()
        same = torch.allclose(out[0], plain, atol=1e-5)
        spans = [(*span.marked, span.end - span.begin) for _, row in timed.marks.read() for span in row]
        found.append([launched[:], spans, same])
class Graph:  # as a graph is: what a replay computes lies where the first run's result lay
    def __init__(self, function):
        self.function, self.result = function, function()
    def replay(self):
        old, new = ((each if isinstance(each, tuple) else (each,)) for each in (self.result, self.function()))
        for into, value in zip(old, new):
            into.copy_(value)

def captured(function):
    graph = Graph(function)
    return graph, graph.result

device_time.mark_stages(None)
device_time.captured = captured
with torch.inference_mode():
    run = device_time.pieces(model, x)
    x.add_(1)
    pieces = torch.allclose(run(), model(x), atol=1e-5)
print(json.dumps([timed.order, found, [step for step, *_ in timed.written], pieces]))
"""


@pytest.fixture(scope="module")
def steps(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An eager and a compiled step on the CPU: marks in order, spans, whether the result is the same; pairs' steps."""
    cache = tmp_path_factory.mktemp("triton")
    done = subprocess.run(
        [engine_python, "-c", STEPS, GPU],
        env={**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", [0, 1], ids=["eager", "compiled"])
def test_marks_are_passed_in_the_order_that_is_expected(steps: Any, number: int):
    order, found, written, pieces = steps
    launched, spans, same = found[number]
    assert same and launched == order == [0, *range(2, 12), 1]
    inner = [[stage, layer, 0, 10] for layer in (0, 1) for stage in ("attention", "moe")]
    assert spans == [["forward", -1, 0, 110], ["empty", -1, 0, 10], *inner]
    assert written == [1, 2]
    assert pieces, "in pieces around attention the model gives the same, also for another input"


def test_without_a_gpu_it_says_what_to_do(engine_python: Path):
    done = subprocess.run(
        [engine_python, GPU / "device_time.py"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2 and "PyTorch finds no GPU here. What to do:" in done.stderr
