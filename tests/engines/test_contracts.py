"""The reading of sources that stands for an import in tests/contracts, held against the engines that are installed."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from contracts.facts import gather, judge, package_of, tables, targets_of
from contracts.functions import Code, Fact
from contracts.sources import Release
from engines.server import environment
from quickstart.servers import ENGINES, Engine

from stagetrace.adapters.inspect import NO_MODULE, inspect_environment
from stagetrace.instrument.hooks import ABSENT, in_range, release_of, rows_for

# What is made at run time, as a dataclass's functions are, has no source: only what a file defines counts, under the
# name that it is defined by. Prints target -> parameters, or type.
LOOK = """
import importlib, inspect, json, sys
package, *names = sys.argv[1:]
root = importlib.import_module(package).__path__[0]
found = {}
def look(target, value):
    function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
    if inspect.isfunction(function) and inspect.unwrap(function).__code__.co_filename.startswith(f"{root}/"):
        plain = inspect.isfunction(value)
        found[target] = list(inspect.signature(value).parameters) if plain else type(value).__name__
for name in names:
    module = importlib.import_module(name)
    for key, value in list(vars(module).items()):
        if getattr(value, "__module__", None) != name or getattr(value, "__name__", None) != key:
            continue  # it is another module's
        look(f"{name}:{key}", value)
        if inspect.isclass(value):
            ours = [one for one in value.__mro__ if one.__module__.startswith(f"{package}.")]
            for each in {each for one in ours for each in vars(one)}:
                look(f"{name}:{key}.{each}", inspect.getattr_static(value, each))
print(json.dumps(found))
"""


FIND = "import sys; from importlib.util import find_spec; print(find_spec(sys.argv[1]).submodule_search_locations[0])"


@dataclass(frozen=True)
class Installed:
    """An engine, and where its packages lie."""

    engine: Engine
    root: Path

    def read(self, path: str) -> str | None:
        file = self.root / path
        return file.read_text("utf-8") if file.is_file() else None


def run(engine: Engine, program: str, *arguments: str) -> str:
    """The last line that a program prints with the engine's Python."""
    assert engine.python.is_file(), "run `make engines-env`, or `make test`, which does it"
    command = [engine.python, "-c", program, engine.name, *arguments]
    done = subprocess.run(command, env=environment(engine=engine), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module", params=list(tables()))
def installed(request: pytest.FixtureRequest) -> Installed:
    engine = ENGINES[request.param]
    return Installed(engine, Path(run(engine, FIND)).parent)


def owner_of(target: str) -> str:
    """The class that has a method; of a function itself."""
    module, _, path = target.partition(":")
    return f"{module}:{path.rpartition('.')[0] or path}"


@pytest.mark.matrix
def test_every_function_of_the_hooked_modules_is_read_as_it_is_imported(installed: Installed):
    points = tables()[installed.engine.name]
    newest = {
        point.module for point in points if in_range(point, ())
    }  # the installed engine is the newest that runs here
    modules = {module for module in newest if module.startswith(f"{installed.engine.name}.")}
    functions: dict[str, Any] = json.loads(run(installed.engine, LOOK, *sorted(modules)))
    assert len(functions) > 300
    code = Code(installed.read)
    # A class that a call makes (SGLang's ServerArgs: msgspec.defstruct) is beyond reading; no hook point is on one.
    made = {owner for owner in map(owner_of, functions) if code.find(owner).kind == "value"}
    assert not made & {owner_of(point.target) for point in points}
    facts = {target: code.find(target) for target in functions if owner_of(target) not in made}
    read = {
        target: fact.missing or (list(fact.parameters) if fact.kind == "function" else fact.kind)
        for target, fact in facts.items()
    }
    # Triton's kernels are plain functions here: it is not there on a CPU.
    others = {target: said for target, said in read.items() if said not in (functions[target], "JITFunction")}
    # A function that is a value there (a field's default) is defined elsewhere; no hook point is on one.
    values = {target for target, said in others.items() if said == "value"}
    assert not values & {point.target for point in points}
    others = {target: said for target, said in others.items() if target not in values}
    assert others == {}


def test_doctor_and_the_sources_say_the_same_of_every_hook_point(installed: Installed):
    (engine,) = inspect_environment(str(installed.engine.python), lambda _: None)["engines"]
    said = {point["target"]: point["status"] for point in engine["points"]}
    points = tables()[installed.engine.name]
    facts: dict[str, Fact] = {}
    for package in {package_of(point.target) for point in points}:
        release = Release(package, engine["version"], "")
        facts |= gather(release, targets_of(package), installed.read).targets
    release_here = release_of(engine["version"])
    assert release_here
    read = {
        point.target: judge(point, facts[point.target])[0] if in_range(point, release_here) else ABSENT
        for point in rows_for(points, release_here)
    }
    # An HTTP parser that is not installed has its sources in uvicorn all the same.
    elsewhere = {target for target, status in said.items() if status == NO_MODULE and target.startswith("uvicorn.")}
    assert {target: status for target, status in said.items() if target not in elsewhere} == {
        target: status for target, status in read.items() if target not in elsewhere
    }
