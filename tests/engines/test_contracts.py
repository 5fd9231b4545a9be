"""The reading of sources that stands for an import in tests/contracts, held against the engine that is installed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from contracts.facts import gather, judge, targets_of
from contracts.functions import Code
from contracts.sources import Release
from engines.server import environment

from stagetrace.adapters.inspect import inspect_environment
from stagetrace.adapters.vllm.hooks import HOOK_POINTS
from stagetrace.instrument.hooks import rows_for

if TYPE_CHECKING:
    from collections.abc import Callable

# What is made at run time, as a dataclass's functions are, has no source: only what a file defines counts, under the
# name that it is defined by. Prints where the packages lie, and target -> parameters, or type.
LOOK = """
import importlib, inspect, json, sys
import vllm
root = vllm.__path__[0].rpartition("/")[0]
found = {}
def look(target, value):
    function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
    if inspect.isfunction(function) and inspect.unwrap(function).__code__.co_filename.startswith(root + "/vllm/"):
        plain = inspect.isfunction(value)
        found[target] = list(inspect.signature(value).parameters) if plain else type(value).__name__
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for key, value in vars(module).items():
        if not getattr(value, "__module__", "").startswith("vllm.") or getattr(value, "__name__", None) != key:
            continue
        look(f"{name}:{key}", value)
        if inspect.isclass(value):
            for each in {each for one in value.__mro__ if one.__module__.startswith("vllm.") for each in vars(one)}:
                look(f"{name}:{key}.{each}", inspect.getattr_static(value, each))
print(json.dumps([root, found]))
"""


def reader(root: Path) -> Callable[[str], str | None]:
    return lambda path: (root / path).read_text("utf-8") if (root / path).is_file() else None


@pytest.fixture(scope="module")
def looked(engine_python: Path) -> tuple[Path, dict[str, Any]]:
    """Where the engine lies, and every function in the modules that are hooked, by import."""
    modules = sorted({point.module for point in HOOK_POINTS if point.module.startswith("vllm.")})
    done = subprocess.run(
        [engine_python, "-c", LOOK, *modules], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    root, found = json.loads(done.stdout.splitlines()[-1])
    return Path(root), found


def test_every_function_of_the_hooked_modules_is_read_as_it_is_imported(looked: tuple[Path, dict[str, Any]]):
    root, imported = looked
    assert len(imported) > 1000
    code = Code(reader(root))
    facts = {target: code.find(target) for target in imported}
    read = {
        target: fact.missing or (list(fact.parameters) if fact.kind == "function" else fact.kind)
        for target, fact in facts.items()
    }
    assert {target: said for target, said in read.items() if said != imported[target]} == {}


def test_doctor_and_the_sources_say_the_same_of_every_hook_point(
    looked: tuple[Path, dict[str, Any]], engine_python: Path
):
    root, _ = looked
    (engine,) = inspect_environment(str(engine_python), lambda _: None)["engines"]
    said = {point["target"]: (point["status"], point["why"]) for point in engine["points"]}
    release = Release("vllm", engine["version"], "")
    facts = {
        **gather(release, targets_of("vllm"), reader(root)).targets,
        **gather(release, targets_of("uvicorn"), reader(root)).targets,
    }
    assert said == {point.target: judge(point, facts[point.target]) for point in rows_for(HOOK_POINTS, ())}
