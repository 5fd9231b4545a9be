"""Run by the engine's Python: kernel windows under torch's own profiler, without a server; prints how each ended.

Argument: a session's directory. What a window ends by is told apart: all steps, its time, its memory, a switch of the
level, a profiler that runs already, and a trace that cannot be written.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from torch.profiler import profile

from stagetrace.adapters.kernel_window import KernelWindow
from stagetrace.instrument.kernel_request import KernelRequest
from stagetrace.instrument.recorder import Recorder
from stagetrace.instrument.stages import Level

KERNEL, STEP = bytes([Level.KERNEL]), bytes([Level.STEP])
kept: list[torch.Tensor] = []


def main() -> None:
    session = Path(os.environ.setdefault("STAGETRACE_SESSION", sys.argv[1]))
    recorder = Recorder()
    window = KernelWindow(recorder)
    said = {}

    def opened(name: str, *bounds: float) -> Path:
        request = KernelRequest(len(said) + 1, int(bounds[0]), bounds[1], int(bounds[2]))
        request.write(session)
        recorder.level = KERNEL
        recorder.epoch = memoryview(bytearray([request.number, 0, 0, 0])).cast("I")
        said[name] = ""
        return request.folder(session) / f"{os.getpid()}.json"

    def steps(number: int) -> None:
        for step in range(number):
            window.step_begins(1, step, 0)
            torch.ones(8) + 1
            window.step_ends()

    def ended(name: str, result: Path) -> None:
        told = json.loads(result.read_text()) if result.exists() else {"ended": "nothing was said"}
        trace = result.with_suffix(".trace.json").is_file()
        said[name] = [told["ended"].partition(":")[0], len(told.get("steps", ())), trace]

    result = opened("steps", 3, 100, 10_000)
    steps(5)
    ended("steps", result)
    steps(5)  # the same request is not looked at again
    ended("steps", result)
    result = opened("time", 1000, 0.05, 10_000)
    steps(1)
    time.sleep(0.1)
    steps(5)
    ended("time", result)
    result = opened("memory", 1000, 100, 50)
    steps(1)
    kept.append(torch.ones(60_000_000))
    steps(5)
    ended("memory", result)
    result = opened("switch", 1000, 100, 10_000)
    steps(2)
    recorder.level = STEP
    steps(5)
    ended("switch", result)
    result = opened("in use", 3, 100, 10_000)
    with profile():
        steps(5)
    ended("in use", result)
    result = opened("no trace", 3, 100, 10_000)
    (result.with_suffix(".trace.json") / "in the way").mkdir(parents=True)
    steps(5)
    ended("no trace", result)
    result = opened("no folder", 3, 100, 10_000)
    steps(1)
    shutil.rmtree(result.parent)
    steps(5)  # nothing is raised
    ended("no folder", result)
    result = opened("after that", 2, 100, 10_000)
    steps(5)
    ended("after that", result)
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
