"""vLLM's own statistics of every iteration of a server, by a plugin that is installed in a folder of its path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

PLUGIN = Path(__file__).with_name("iteration_log.py")
METADATA = "Metadata-Version: 2.1\nName: iteration-log\nVersion: 1\n"
ENTRY_POINTS = "[vllm.stat_logger_plugins]\niteration_log = iteration_log:IterationLog\n"


def installed(directory: Path) -> dict[str, str]:
    """The variables of a server that has the plugin, which is put into `directory` and writes there."""
    package = directory / "iteration_log-1.dist-info"
    package.mkdir(parents=True)
    shutil.copy(PLUGIN, directory)
    (package / "METADATA").write_text(METADATA)
    (package / "entry_points.txt").write_text(ENTRY_POINTS)
    return {"PYTHONPATH": str(directory), "ITERATIONS": str(directory / "iterations.jsonl")}


def told(settings: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the plugin wrote: of every IterationStats its sums, and the requests that ended with it."""
    return [json.loads(line) for line in Path(settings["ITERATIONS"]).read_text("utf-8").splitlines()]
