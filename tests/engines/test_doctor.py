"""Tests of `stagetrace doctor` on a real vLLM, from an environment that has none."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from engines.server import environment

from stagetrace.adapters.vllm.hooks import HOOK_POINTS
from stagetrace.instrument.hooks import ABSENT, in_range, release_of, rows_for

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = (sys.executable, "-m", "stagetrace.cli.main", "doctor", "--json", "--python")
RELEASE = release_of("0.32.0")  # that is installed
ROWS = rows_for(HOOK_POINTS, RELEASE)
TARGETS = [point.target for point in ROWS if in_range(point, RELEASE)]

# Python runs this when it starts. When the inspection is over it looks at what that has left of vLLM.
LOOK = f"""
import atexit, inspect, json, pathlib, sys
TARGETS = {TARGETS!r}
def look():
    marked = {{}}
    for target in TARGETS:
        module, _, path = target.partition(":")
        *owners, name = path.split(".")
        owner = sys.modules[module]
        for each in owners:
            owner = getattr(owner, each)
        function = inspect.getattr_static(owner, name)
        of = function.__globals__["__name__"]
        marked[target] = hasattr(function, "_stagetrace_hook") or of.startswith("stagetrace.")
    finders = [type(finder).__name__ for finder in sys.meta_path]
    pathlib.Path(__file__).with_name("found.json").write_text(json.dumps([marked, finders]))
if "-m" in sys.orig_argv and "stagetrace.adapters.inspect" in sys.orig_argv:
    atexit.register(look)
"""


@pytest.fixture(scope="module")
def inspected(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What doctor said, armed; and the directory in which the inspected process left what it saw of itself."""
    directory = tmp_path_factory.mktemp("doctor")
    (directory / "sitecustomize.py").write_text(LOOK, "utf-8")
    variables = {
        "PYTHONPATH": str(directory),
        "STAGETRACE_SESSION": str(directory / "session"),
        "STAGETRACE_RING_DIR": str(directory / "rings"),
    }
    done = subprocess.run(
        [*COMMAND, engine_python], env=environment(variables), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    view: dict[str, Any] = json.loads(done.stdout)
    return directory, view


def test_every_hook_point_fits(inspected: tuple[Path, dict[str, Any]], engine_python: Path):
    _, view = inspected
    (engine,) = view["inspection"]["engines"]
    assert [point["target"] for point in engine["points"]] == [point.target for point in ROWS]
    for point in engine["points"]:
        there = point["target"] in TARGETS
        assert (point["why"] == "") is point["found"] is point["matches"] is there, point
        assert there or point["status"] == ABSENT
    assert engine["unusable"] == view["troubles"] == []
    version = subprocess.run(
        [engine_python, "-c", "from vllm.version import __version__; print(__version__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (engine["name"], engine["version"]) == ("vllm", version.stdout.split()[-1])
    assert engine["plugin"] == "stagetrace.adapters.vllm.plugin:register"
    assert view["inspection"]["executable"] == str(engine_python)


def test_the_inspected_process_was_not_patched(inspected: tuple[Path, dict[str, Any]]):
    directory, view = inspected
    marked, finders = json.loads((directory / "found.json").read_text())
    assert marked == dict.fromkeys(TARGETS, False)
    assert "Hooks" not in finders
    assert view["session"] == {"path": str(directory / "session"), "exists": False}
    assert not (directory / "session").exists()
    assert not (directory / "rings").exists()
