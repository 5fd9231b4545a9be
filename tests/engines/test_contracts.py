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

from stagetrace.adapters.inspect import inspect_environment
from stagetrace.instrument.hooks import ABSENT, in_range, release_of, rows_for

# What is made at run time, as a dataclass's functions are, has no source: only what a file defines counts, under the
# name that it is defined by. Prints where the packages lie, and target -> parameters, or type.
LOOK = """
import importlib, inspect, json, sys
package, *names = sys.argv[1:]
root = importlib.import_module(package).__path__[0].rpartition("/")[0]
found = {}
def look(target, value):
    function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
    if inspect.isfunction(function) and inspect.unwrap(function).__code__.co_filename.startswith(f"{root}/{package}/"):
        plain = inspect.isfunction(value)
        found[target] = list(inspect.signature(value).parameters) if plain else type(value).__name__
for name in names:
    module = importlib.import_module(name)
    for key, value in list(vars(module).items()):
        home = str(getattr(value, "__module__", ""))
        if not home.startswith(f"{package}.") or getattr(value, "__name__", None) != key:
            continue
        look(f"{name}:{key}", value)
        if inspect.isclass(value):
            ours = [one for one in value.__mro__ if one.__module__.startswith(f"{package}.")]
            for each in {each for one in ours for each in vars(one)}:
                look(f"{name}:{key}.{each}", inspect.getattr_static(value, each))
print(json.dumps([root, found]))
"""


@dataclass(frozen=True)
class Looked:
    """An engine as it is when it is imported."""

    engine: Engine
    root: Path  # where its packages lie
    functions: dict[str, Any]  # in the modules that are hooked, by target

    def read(self, path: str) -> str | None:
        file = self.root / path
        return file.read_text("utf-8") if file.is_file() else None


@pytest.fixture(scope="module", params=list(tables()))
def looked(request: pytest.FixtureRequest) -> Looked:
    engine = ENGINES[request.param]
    assert engine.python.is_file(), "run `make engines-env`, or `make test`, which does it"
    modules = {point.module for point in tables()[engine.name] if package_of(point.target) == engine.name}
    done = subprocess.run(
        [engine.python, "-c", LOOK, engine.name, *sorted(modules)],
        env=environment(engine=engine),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    root, found = json.loads(done.stdout.splitlines()[-1])
    return Looked(engine, Path(root), found)


def owner_of(target: str) -> str:
    """The class that has a method; of a function itself."""
    module, _, path = target.partition(":")
    return f"{module}:{path.rpartition('.')[0] or path}"


def test_every_function_of_the_hooked_modules_is_read_as_it_is_imported(looked: Looked):
    assert len(looked.functions) > 500
    code = Code(looked.read)
    # A class that a call makes (SGLang's ServerArgs: msgspec.defstruct) is beyond reading; no hook point is on one.
    made = {owner for owner in map(owner_of, looked.functions) if code.find(owner).kind == "value"}
    assert not made & {owner_of(point.target) for point in tables()[looked.engine.name]}
    facts = {target: code.find(target) for target in looked.functions if owner_of(target) not in made}
    read = {
        target: fact.missing or (list(fact.parameters) if fact.kind == "function" else fact.kind)
        for target, fact in facts.items()
    }
    assert {target: said for target, said in read.items() if said != looked.functions[target]} == {}


def test_doctor_and_the_sources_say_the_same_of_every_hook_point(looked: Looked):
    (engine,) = inspect_environment(str(looked.engine.python), lambda _: None)["engines"]
    said = {point["target"]: point["status"] for point in engine["points"]}
    points = tables()[looked.engine.name]
    facts: dict[str, Fact] = {}
    for package in {package_of(point.target) for point in points}:
        release = Release(package, engine["version"], "")
        facts |= gather(release, targets_of(package), looked.read).targets
    release_here = release_of(engine["version"])
    assert release_here
    read = {
        point.target: judge(point, facts[point.target])[0] if in_range(point, release_here) else ABSENT
        for point in rows_for(points, release_here)
    }
    assert said == read
