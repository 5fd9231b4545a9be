"""Hook points as data, and what puts them in: patch what is imported, wait for the rest, contain every error of ours.

A hook wraps one function of the engine (around.py). Its wrapper calls the original with the arguments as they came and
gives its result or exception back as they are; what it does beside that is guarded by `Hook.failed`, which counts the
error, logs the first, and takes the hook out after a few.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import inspect
import json
import logging
import re
import sys
import threading
from dataclasses import dataclass
from types import MappingProxyType, MethodType
from typing import TYPE_CHECKING, Any

from .around import wrap
from .records import MAX_HOOKS, Text
from .stages import Level

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from .around import Around
    from .recorder import Recorder

log = logging.getLogger("stagetrace")

ERRORS_UNTIL_OUT = 5
FITS = "fits"  # what `check` says of a hook point that can be installed
ABSENT = "not in this version"  # and of one whose range of releases has not the engine's
_NEVER = 255  # a level that is never reached
_MARK = "_stagetrace_hook"  # attribute of a wrapper: the target that it hooks


@dataclass(frozen=True)
class HookPoint:
    """One function of an engine that is hooked.

    One that is hooked `per_object` is not patched where it is defined: the handler of another hook, which sees the
    objects made, hooks it on each (`Hook.on`), each with a handler of its own. That is so where objects of many classes
    share the function's name, or a handler must know which object it is on without looking it up.
    """

    target: str  # module:Class.function
    parameters: tuple[str, ...]  # the leading parameters that the handler relies on, `self` included
    level: Level  # from which level on it records
    process: str  # the kind of process that calls it
    handler: Callable[[Hook], Around]  # what it does before and after the function
    gives: str  # what is recorded
    since: str = ""  # the first release of the engine that has it so, as "0.28"; empty: all the way back
    before: str = ""  # the first one that no longer has it so; empty: all to come
    stands_for: str = ""  # the target that has its place in other releases; empty: its own
    missed: bool = True  # what it gives is lost outside of its range; False: the engine does nothing of the kind there
    compiled: bool = False  # a compiler may reach it: it records nothing while it is traced, or a stream captured
    per_object: bool = False

    @property
    def place(self) -> str:
        """What one function is known by in all releases; of several rows with one place, a release has one at most."""
        return self.stands_for or self.target

    @property
    def module(self) -> str:
        """The module that holds the function."""
        return self.target.partition(":")[0]


Release = tuple[int, ...]
_NO_RELEASE = (0, 2)  # setuptools_scm calls a checkout without tags 0.1.dev3 or 0.0.0.dev0


def release_of(version: str) -> Release:
    """The numbers of an engine's release, as (0, 32, 0) of "0.32.0+cpu" or "0.32.0rc1"; empty where it names none."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    numbers = tuple(map(int, found[1].split("."))) if found else ()
    return numbers if numbers >= _NO_RELEASE else ()


def in_range(point: HookPoint, release: Release) -> bool:
    """Whether the hook point's range has the release; one that is not known counts as newer than all others."""
    if not release:
        return not point.before
    return release_of(point.since) <= release and not (point.before and release >= release_of(point.before))


def rows_for(points: Sequence[HookPoint], release: Release) -> list[HookPoint]:
    """The rows that count in a release: of several for one function those whose range has it, or else the first."""
    there = {point.target for point in points if in_range(point, release)}
    first = {point.target: point for point in reversed(points)}
    return [p for p in points if in_range(p, release) or (p.target not in there and p is first[p.target])]


def range_text(point: HookPoint) -> str:
    """The hook point's range of releases."""
    words = [f"from {point.since} on" if point.since else "", f"before {point.before}" if point.before else ""]
    return ", ".join(filter(None, words)) or "all"


class Hook:
    """A hook point in this process: its recorder, its errors, and what became of it."""

    def __init__(self, point: HookPoint, index: int, recorder: Recorder):
        self.point = point
        self.index = index
        self.recorder = recorder
        self.threshold = int(point.level)  # wrappers record when the level reaches it; an enum is slower to compare
        self.status = "waiting"
        self.why = f"{point.module} is not imported in this process"
        self.errors = 0
        self.objects = 0  # that it was put on, where it is hooked per object
        self.others: Mapping[str, Hook] = MappingProxyType({})  # by target: all hooks of the process

    def failed(self) -> None:
        """Contains the exception that is being handled: counts it, logs the first, takes the hook out after a few."""
        self.errors += 1
        self.recorder.errors[self.index] = self.errors
        if self.errors == 1:
            log.warning(
                "stagetrace: error in the hook on %s; the engine is not affected", self.point.target, exc_info=True
            )
        if self.errors >= ERRORS_UNTIL_OUT and self.threshold != _NEVER:
            self.threshold = _NEVER
            self.set("out", f"taken out after {self.errors} errors")

    def set(self, status: str, why: str = "") -> None:
        """Notes what became of the hook and tells the collector."""
        self.status, self.why = status, why
        if self.recorder.ring is not None:
            self.tell()

    def tell(self) -> None:
        """Writes the hook's status into the ring."""
        point = self.point
        text = {"name": point.target, "status": self.status, "why": self.why, "gives": point.gives, "index": self.index}
        self.recorder.text(self.index, Text.HOOK, json.dumps(text))

    def install(self, module: ModuleType, release: Release = ()) -> None:
        """Patches the function, if it is there and takes what the handler relies on."""
        status, why = check(module, self.point, release)
        if status == FITS and self.point.per_object:
            status, why = "waiting", "it is put on objects when the engine has made them"
        elif status == FITS:
            owner, name, original = _find(module, self.point)
            wrapper = wrap(original, self.point.handler(self), self)
            setattr(wrapper, _MARK, self.point.target)
            setattr(owner, name, wrapper)
            status = "installed"
        self.set(status, why)

    def on(self, owner: object, name: str, around: Around) -> bool:
        """Hooks the method `name` of one object, which then has it as an attribute of its own; whether that was done.

        The hook's errors and its level are those of all the objects together. Raises ValueError when `around` asks for
        what the method does not take, AttributeError when the object takes no attribute.
        """
        bound = getattr(owner, name, None)
        function = getattr(bound, "__func__", None)
        if self.status in ("left out", "out") or getattr(bound, "__self__", None) is not owner:
            return False
        if not inspect.isfunction(function):
            return False
        if getattr(function, _MARK, None) != self.point.target:
            wrapper = wrap(function, around, self)
            setattr(wrapper, _MARK, self.point.target)
            setattr(owner, name, MethodType(wrapper, owner))
            self.objects += 1
        return True

    def told_objects(self) -> None:
        """Tells the collector on how many objects the hook is, when all that there are were seen."""
        if self.status in ("waiting", "unused", "installed"):
            self.set("installed" if self.objects else "unused", f"on {self.objects} objects")


def check(module: ModuleType, point: HookPoint, release: Release = ()) -> tuple[str, str]:
    """Whether the hook point fits the module, and why not. Pure.

    FITS, or ABSENT, missing, mismatch or installed (already). Without a `release`: as in one newer than all known.
    """
    if not in_range(point, release):
        return ABSENT, absence(point)
    try:
        original = _find(module, point)[-1]
    except AttributeError as error:
        return "missing", str(error)
    if not inspect.isfunction(original):
        return "mismatch", f"it is a {type(original).__name__}, not a function"
    if getattr(original, _MARK, None) == point.target:  # twice would record everything twice
        return "installed", "it was hooked before"
    return compare(tuple(inspect.signature(original).parameters), point.parameters)


def absence(point: HookPoint) -> str:
    """Why a hook point is ABSENT."""
    otherwise = "" if point.missed else "; others have nothing of the kind"
    return f"the hook point is for the releases {range_text(point)}{otherwise}"


def compare(found: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[str, str]:
    """Whether a function with the parameters `found` begins with those `wanted`: FITS or mismatch, and why."""
    if found[: len(wanted)] != wanted:
        return "mismatch", f"it takes ({', '.join(found)}), the hook needs ({', '.join(wanted)})"
    return FITS, ""


def _find(module: ModuleType, point: HookPoint) -> tuple[Any, str, Any]:
    """Where the function is kept: its owner, its name there, and itself. Raises AttributeError."""
    *owners, name = point.target.partition(":")[2].split(".")
    owner: Any = module
    for each in owners:
        owner = getattr(owner, each)
    return owner, name, inspect.getattr_static(owner, name)


class Hooks(importlib.abc.MetaPathFinder):
    """The hooks of one engine in this process; also the import finder that patches modules when they are loaded."""

    def __init__(
        self, points: Sequence[HookPoint], recorder: Recorder, maximum: Level = Level.KERNEL, version: str = ""
    ):
        """`version` is the engine's; one that is not known counts as newer than all others."""
        self.release = release_of(version)
        points = rows_for(points, self.release)
        if len(points) > MAX_HOOKS:
            raise ValueError(f"{len(points)} hook points; a ring's header has room for {MAX_HOOKS}")
        self.hooks = [Hook(point, index, recorder) for index, point in enumerate(points)]
        others = MappingProxyType({hook.point.target: hook for hook in self.hooks})
        for hook in self.hooks:
            hook.others = others
        self.maximum = maximum
        self._waiting: dict[str, list[Hook]] = {}
        self._searching = threading.local()
        recorder.on_open(self.tell)

    def install(self) -> None:
        """Patches what is imported already and waits for the import of the rest."""
        if log.level == logging.NOTSET:
            # A library in vLLM's API server (model_hosting_container_standards) sets the root logger to ERROR.
            log.setLevel(logging.WARNING)
        for hook in self.hooks:
            if hook.point.level > self.maximum:
                hook.set("left out", f"it records at level {hook.point.level.name.lower()}, above the maximum level")
                continue
            if not in_range(hook.point, self.release):
                hook.set(ABSENT if hook.point.missed else "left out", absence(hook.point))
                continue
            waiting = self._waiting.setdefault(hook.point.module, [])
            if hook not in waiting:
                waiting.append(hook)
        for name in list(self._waiting):
            if name in sys.modules:
                self._loaded(name, sys.modules[name])
        if self._waiting and self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def tell(self) -> None:
        """Writes every hook's status into the ring."""
        for hook in self.hooks:
            hook.tell()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The module's own spec, with a loader that patches the module after it was executed."""
        if fullname not in self._waiting or getattr(self._searching, "name", None) == fullname:
            return None
        self._searching.name = fullname
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.name = None
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            self._patch_after(spec.loader, fullname)
        return spec

    def _patch_after(self, loader: Any, fullname: str) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._loaded(fullname, module)

        loader.exec_module = exec_module

    def _loaded(self, name: str, module: ModuleType) -> None:
        for hook in self._waiting.pop(name, ()):
            try:
                hook.install(module, self.release)
            except Exception:
                hook.failed()
                hook.set("error", "stagetrace could not install it; the engine's log says why")
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
