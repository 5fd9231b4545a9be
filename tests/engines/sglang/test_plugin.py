"""What SGLang's plugin does in a process: nothing unless it is armed; then every hook, where its module is imported."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

from engines.server import environment
from quickstart.servers import SGLANG

from stagetrace.adapters.sglang.hooks import HOOK_POINTS
from stagetrace.instrument.hooks import in_range, release_of
from stagetrace.instrument.stages import Level

if TYPE_CHECKING:
    from pathlib import Path

# Its lock has uvicorn without httptools.
ROWS = [point for point in HOOK_POINTS if in_range(point, release_of("0.5.23")) and "httptools" not in point.module]
TARGETS = [point.target for point in ROWS if point.level <= Level.STEP]  # as without STAGETRACE_MAX_LEVEL

# As SGLang's processes do it: plugins first, then the modules. What the hooked functions are before and after.
LOAD = """
import importlib, inspect, json, sys
targets, output = json.loads(sys.argv[1]), sys.argv[2]
from sglang.srt.plugins import load_plugins
finders = list(sys.meta_path)
load_plugins()
early = sorted({target.partition(":")[0] for target in targets} & set(sys.modules))
ours = sorted(name for name in sys.modules if name.partition(".")[0] == "stagetrace")
same = finders == sys.meta_path
def wrappers(target):
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    found, function = 0, inspect.getattr_static(owner, name)
    while function is not None:
        found += function.__code__.co_filename.startswith("<stagetrace hook on ")
        function = getattr(function, "__wrapped__", None)
    return found
found = {target: wrappers(target) for target in targets}
left = any(type(finder).__name__ == "Hooks" for finder in sys.meta_path)
with open(output, "w") as file:
    json.dump({"wrappers": found, "early": early, "ours": ours, "same": same, "waits": left}, file)
"""


def loaded(python: Path, directory: Path, **variables: str) -> dict[str, Any]:
    output = directory / "found.json"
    command = [python, "-c", LOAD, json.dumps(TARGETS), output]
    done = subprocess.run(
        command, env=environment(variables, SGLANG), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_not_armed_sglang_is_untouched(engine_python: Path, tmp_path: Path) -> None:
    found = loaded(engine_python, tmp_path)
    assert found["wrappers"] == dict.fromkeys(TARGETS, 0)
    assert found["same"]
    parts = ["stagetrace", "adapters", "sglang", "plugin"]
    # Its own entry point was called: this test would pass without a plugin otherwise.
    assert found["ours"] == [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def test_armed_every_function_is_hooked_when_its_module_is_imported(engine_python: Path, tmp_path: Path) -> None:
    session = tmp_path / "session"
    found = loaded(engine_python, tmp_path, STAGETRACE_SESSION=str(session))
    assert found["wrappers"] == dict.fromkeys(TARGETS, 1)
    assert found["early"] == [], "the plugin imported what it hooks"
    assert found["waits"]  # for httptools alone, which never comes
    assert not session.exists()  # no scheduler and no front end was made, so nothing was recorded
