"""The extractors on objects of SGLang's own classes, and the wrappers around its own functions."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from engines.server import environment
from quickstart.servers import SGLANG

from stagetrace.adapters.sglang.hooks import HOOK_POINTS
from stagetrace.instrument.hooks import in_range, release_of

HERE = Path(__file__).parent
# What SGLang's own decorators hide: there the wrapper names the leading parameters and takes whatever else comes.
HIDDEN = {
    "sglang.srt.managers.scheduler:Scheduler.run_batch",
    "sglang.srt.managers.scheduler:Scheduler.process_batch_result",
}


def run(engine_python: Path, script: Path, *arguments: str) -> Any:
    command = [engine_python, script, *arguments]
    done = subprocess.run(command, env=environment(engine=SGLANG), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_finishes_of_sglangs_own_reasons(engine_python: Path) -> None:
    assert run(engine_python, HERE / "finishes.py") == {
        "FINISH_MATCHED_TOKEN": "STOP",
        "FINISH_MATCHED_STR": "STOP",
        "FINISHED_MATCHED_REGEX": "STOP",
        "FINISH_LENGTH": "LENGTH",
        "FINISH_ABORT": "ABORT",
        "refused": "ERROR",
        "none": "UNKNOWN",
    }


def test_wrappers_have_the_parameters_of_sglangs_functions(engine_python: Path) -> None:
    found = run(engine_python, HERE.parent / "wrappers.py", "sglang")
    # Its lock has uvicorn without httptools.
    rows = [point for point in HOOK_POINTS if in_range(point, release_of("0.5.23")) and "httptools" not in point.module]
    assert list(found) == [point.target for point in rows]
    assert {target for target, (ours, theirs) in found.items() if ours != theirs} == HIDDEN
