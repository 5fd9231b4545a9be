"""Reading a package's source says what importing it does: of a package with everything that engines do."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

import pytest
from contracts.facts import judge
from contracts.functions import Code

from stagetrace.instrument.around import Around
from stagetrace.instrument.hooks import FITS, HookPoint, check
from stagetrace.instrument.stages import Level

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PACKAGE = "contracted"
FILES = {
    "__init__.py": "",
    "bases/__init__.py": "from .deep import Deep as Deep\nfrom contracted.bases import mixed\n",
    "bases/deep.py": """
from abc import ABC, abstractmethod
from typing import Generic, TypeVar
T = TypeVar("T")
class Deep(ABC, Generic[T]):
    def deep(self, batch): ...
    def both(self, of_deep): ...
    @abstractmethod
    def must(self, batch): ...
class Deeper(Deep[int]):
    def deeper(self, batch): ...
""",
    "bases/mixed.py": """
from . import deep
from .deep import *
class Mixin:
    def both(self, of_mixin): ...
    def mixed(self, batch): ...
class Left(deep.Deeper):
    pass
class Right(Deep):
    def both(self, of_right): ...
""",
    "engine.py": """
import contextlib
import functools
from typing import TYPE_CHECKING, overload
import contracted.bases.mixed
from contracted.bases import Deep, mixed as other
from contracted.bases.mixed import Mixin, Left
try:
    from contracted.nothing import given
except ImportError:
    def given(instead): ...
if TYPE_CHECKING:
    from contracted.nothing import Deep as Deep
if True:
    def chosen(first): ...
else:
    def chosen(second): ...
def traced(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper
def work(first, /, second=2, *rest, key=None, **more): ...
async def later(first): ...
@contextlib.contextmanager
def managed(first): yield
@functools.lru_cache
def cached(first): ...
alias = work
number = 7
class Runner(Mixin, Deep[str]):
    size = 1
    @overload
    def run(self, batch: int): ...
    @overload
    def run(self, batch: str): ...
    @traced
    def run(self, batch, flag=False): ...
    async def wait(self, batch): ...
    @staticmethod
    def still(batch): ...
    @classmethod
    def made(cls, batch): ...
    @property
    def length(self): ...
    @length.setter
    def length(self, value): ...
    @length.deleter
    def length(self): ...
    @functools.cached_property
    def held(self): ...
    def __new__(cls): return super().__new__(cls)
    def __init_subclass__(cls): ...
    renamed = run
    called = staticmethod(work)
    outer: object = later
    if number:
        def sometimes(self, batch): ...
    else:
        def sometimes(self, other): ...
    class Inner:
        def deep(self, x): ...
class Diamond(Left, other.Right):
    pass
class Dotted(contracted.bases.mixed.Right):
    pass
class Torch(dict):
    def own(self, x): ...
""",
}
OWN = ("given", "chosen", "work", "later", "managed", "cached", "alias", "number", "Runner", "Deep", "gone", "other")
RUNNER = (
    "run",
    "wait",
    "still",
    "made",
    "length",
    "held",
    "__new__",
    "__init_subclass__",
    "renamed",
    "called",
    "sometimes",
)
METHODS = (
    *(f"Runner.{name}" for name in (*RUNNER, "Inner", "Inner.deep", "size", "deep", "both", "must", "mixed", "gone")),
    *(f"Diamond.{name}" for name in ("deep", "both", "deeper", "must", "mixed")),
    *(f"Dotted.{name}" for name in ("both", "deep")),
    *("Torch.own", "Torch.gone", "Gone.run", "number.run", "Runner.run.more"),
)
PARAMETERS = ((), ("self",), ("self", "batch"), ("first",), ("batch",), ("self", "of_mixin"), ("self", "of_right"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        path = directory / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    sys.path.insert(0, str(directory))
    yield directory
    sys.path.remove(str(directory))
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def code_of(root: Path) -> Code:
    return Code(lambda path: (root / path).read_text("utf-8") if (root / path).is_file() else None)


@pytest.mark.parametrize("path", [*OWN, *METHODS])
def test_source_and_import_agree(root: Path, path: str):
    target = f"{PACKAGE}.engine:{path}"
    module = importlib.import_module(f"{PACKAGE}.engine")
    fact = code_of(root).find(target)
    for parameters in PARAMETERS:
        point = HookPoint(target, parameters, Level.STEP, "worker", lambda hook: Around(), "forward")
        real, read = check(module, point), judge(point, fact)
        assert read[0] == real[0]
        if real[0] == "mismatch" and fact.kind not in ("value", "type"):
            assert read[1] == real[1]
    if path in FOUND:
        wanted = HookPoint(target, FOUND[path], Level.STEP, "worker", lambda hook: Around(), "forward")
        assert judge(wanted, fact) == (FITS, "")


# What must not be missed by both alike.
FOUND = {
    "given": ("instead",),
    "work": ("first", "second", "rest", "key", "more"),
    "later": ("first",),
    "managed": ("first",),
    "chosen": ("first",),
    "Runner.run": ("self", "batch", "flag"),
    "Runner.outer": ("first",),
    "Runner.both": ("self", "of_mixin"),
    "Runner.deep": ("self", "batch"),
    "Runner.Inner.deep": ("self", "x"),
    "Runner.sometimes": ("self", "batch"),
    "Diamond.both": ("self", "of_right"),  # not Deep's, whose heir Right is
    "Diamond.deeper": ("self", "batch"),
    "Dotted.both": ("self", "of_right"),
    "Torch.own": ("self", "x"),
}


def test_a_module_that_is_not_there_and_bases_from_elsewhere_are_named(root: Path):
    code = code_of(root)
    assert code.find(f"{PACKAGE}.none:work").missing == f"there is no module {PACKAGE}.none"
    assert code.find(f"{PACKAGE}.engine:Torch.gone").missing == "Torch has no gone, unless dict has"
    assert code.find(f"{PACKAGE}.engine:Diamond.both").at == f"{PACKAGE}.bases.mixed:Right.both"
    assert code.find(f"{PACKAGE}.engine:Runner.run").at == ""
