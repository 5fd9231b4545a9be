"""Tests of the mark's kernel without a GPU: run by Triton's interpreter, and compiled for GPUs that are not here.

Triton and PyTorch are those of vLLM's environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

# Two layers that are marked, in steps that go round a ring of four rows. In the fourth step the second layer is left
# out, in the fifth the first is run twice. The copy of the sixth is kept waiting until others have its buffer's place.
INTERPRETED = """
import json, torch
from stagetrace.adapters.marks import Marks
from stagetrace.instrument.device_marks import Marked

class Event:
    ready = True
    def record(self): pass
    def query(self): return self.ready

marks = Marks([Marked("moe", 0), Marked("moe", 1)], "cpu", Event, depth=4)
time = 0
def mark(index):
    global time
    time += 10
    marks.clock.fill_(time)
    marks.mark(index)
found = []
for step in range(1, 12):
    marks.begin_step(step)
    for index in {4: (0, 1), 5: (0, 1, 0, 1, 2, 3)}.get(step, (0, 1, 2, 3)):
        mark(index)
    Event.ready = step != 6
    marks.end_step(step)
    found += marks.read()
Event.ready = False
for step in range(12, 12 + 20):
    marks.begin_step(step)
    marks.end_step(step)
print(json.dumps([found, vars(marks.reader.counts), marks.left_out]))
"""

COMPILED = """
import json, warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from stagetrace.adapters.mark_kernel import CUDA, HIP, mark_kernel

types = {"ring": "*i64", "counter": "*i64", "clock": "*i64", "index": "i32"}
types |= dict.fromkeys(("marks", "depth", "timer"), "constexpr")
found = {}
for target, timer, what, final in (
    (GPUTarget("cuda", 80, 32), CUDA, "ptx", "cubin"),
    (GPUTarget("cuda", 90, 32), CUDA, "ptx", "cubin"),
    (GPUTarget("hip", "gfx942", 64), HIP, "amdgcn", "hsaco"),
):
    source = ASTSource(mark_kernel, types, {"marks": 8, "depth": 64, "timer": timer})
    made = triton.compile(source, target=target, options={"num_warps": 1})
    found[str(target.arch)] = [made.asm[what], len(made.asm[final])]
print(json.dumps(found))
"""


def printed(python: Path, code: str, cache: Path, **settings: str) -> Any:
    """The JSON that a program prints last, with Triton's cache in a directory of the test's."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), **settings}
    done = subprocess.run(
        [python, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_in_the_interpreter(engine_python: Path, tmp_path: Path):
    found, counts, left_out = printed(engine_python, INTERPRETED, tmp_path, TRITON_INTERPRET="1")
    spans = {step: [(marked[1], begin, end) for marked, begin, end in row] for step, row in found}
    assert [*spans] == [*range(1, 12)], "each step once and in order"
    assert spans[1] == [(0, 10, 20), (1, 30, 40)]
    assert spans[4] == [(0, 130, 140)] and spans[5] == [(0, 170, 180), (1, 190, 200)]
    assert spans[6] == [(0, 210, 220), (1, 230, 240)], "it was copied in time, and read later"
    assert all(len(row) == 2 for step, row in spans.items() if step != 4)
    assert counts == {"rows": 11, "absent": 1, "overwritten": 0, "halves": 0, "repeated": 1, "backwards": 0}
    assert left_out == 4, "there are sixteen buffers"


@pytest.mark.parametrize("arch", ["80", "90", "gfx942"])
def test_it_compiles_for(arch: str, compiled: dict[str, tuple[str, int]]):
    text, size = compiled[arch]
    assert size > 1000
    if arch.startswith("gfx"):
        assert text.count("s_memrealtime") == 1
        return
    lines = [line.strip() for line in text.splitlines()]
    of_an_end, of_a_begin = (number for number, line in enumerate(lines) if "%globaltimer" in line)
    stores = [number for number, line in enumerate(lines) if "st.global" in line]
    loads = [number for number, line in enumerate(lines) if "ld.global" in line]
    assert len(stores) == len(loads) == 3 and of_an_end < min(loads) and max(loads) < of_a_begin < min(stores)
    assert all("@%p" in lines[number] for number in stores), "one thread stores"


@pytest.fixture(scope="module")
def compiled(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """The kernel as assembler, and the size of its machine code, by architecture."""
    found: dict[str, tuple[str, int]] = printed(engine_python, COMPILED, tmp_path_factory.mktemp("triton"))
    return found
