"""Whether the hook points fit the engines of an environment: asked of its Python in a process of its own.

`PYTHON -m stagetrace.adapters.inspect` imports the engine's modules, which takes seconds, prints, and may even crash,
and compares them with the hook tables; it patches nothing and starts no engine. Standard library only: the environment
may have stagetrace without its dependencies. Its standard output has one JSON object a line, {"importing": MODULE} as
it goes and {"found": INSPECTION} at the end; whatever else is printed in that process goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, packages_distributions, version
from importlib.util import find_spec
from typing import IO, TYPE_CHECKING, Any, Union

from stagetrace.instrument.hooks import ABSENT, FITS, HookPoint, Release, absence, check, in_range, release_of, rows_for

from .sglang.hooks import HOOK_POINTS as SGLANG_HOOK_POINTS
from .sglang.hooks import RELEASES as SGLANG_RELEASES
from .vllm.hooks import HOOK_POINTS as VLLM_HOOK_POINTS
from .vllm.hooks import RELEASES as VLLM_RELEASES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

VERSION = 2  # of the JSON object
PLUGIN = "stagetrace"  # our name among an engine's plugins
MODULE = "stagetrace.adapters.inspect"
NO_MODULE = "no module"  # what holds the function, or what that needs, is not installed
PATIENCE_S = 600.0
_PATIENCE_AT_EXIT_S = 30.0
_LONGEST_WHY = 1000
_LAST_WORDS = 15  # lines of standard error that a failure is reported with

# Package -> the group of its plugins, our hook points, and the releases that they were held against.
ENGINES: dict[str, tuple[str, Sequence[HookPoint], Sequence[str]]] = {
    "vllm": ("vllm.general_plugins", VLLM_HOOK_POINTS, VLLM_RELEASES),
    "sglang": ("sglang.srt.plugins", SGLANG_HOOK_POINTS, SGLANG_RELEASES),
}


@dataclass(frozen=True)
class Point:
    """A hook point held against the engine that is installed."""

    target: str  # module:Class.function
    process: str
    level: str  # from which level on it records; `off`: at every level
    gives: str
    status: str  # instrument.hooks.check's; NO_MODULE; or `error`: it could not be looked at
    why: str  # empty when it can be used
    found: bool  # the function is there
    matches: bool  # and takes what the hook relies on

    @property
    def usable(self) -> bool:
        """Whether the hook can be installed."""
        return self.found and self.matches


@dataclass(frozen=True)
class Engine:
    """An engine that is installed."""

    name: str
    version: str
    group: str  # of entry points, through which it loads plugins
    plugin: str | None  # what our entry point names; None: there is none
    plugin_trouble: str  # why the entry point cannot be loaded; empty when it can
    points: list[Point]
    unusable: list[str]  # targets: see `unusable`
    lost: list[str]  # targets: see `lost`
    known: bool  # it is not newer than every release that the hook points were held against


@dataclass(frozen=True)
class Inspection:
    """What an environment has; as JSON it is what this module's process answers."""

    python: str  # version
    executable: str
    stagetrace: str  # version
    engines: list[Engine]
    version: int = VERSION  # of this object


class CannotInspect(Exception):
    """The environment could not be inspected; the message says why and what to do."""


# In the inspected environment

_Module = Union["ModuleType", tuple[str, str]]  # as imported, or the status and reason of the hook points in it


def inspect_engines(say: Callable[[str], None]) -> Inspection:
    """Inspects this process's environment; `say` is told each module before it is imported."""
    engines = [_engine(name, *known, say) for name, known in ENGINES.items() if _is_installed(name)]
    return Inspection(platform.python_version(), sys.executable, _version("stagetrace"), engines)


def _is_installed(package: str) -> bool:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None  # a folder that happens to have the name has no origin


def unusable(points: Sequence[Point]) -> list[str]:
    """The targets that cannot be hooked and are missed.

    One whose module is not installed is missed only if no other point gives the same: engines choose between modules.
    """
    given = {point.gives for point in points if point.usable}
    return [
        point.target
        for point in points
        if not point.usable and point.status != ABSENT and not (point.status == NO_MODULE and point.gives in given)
    ]


def lost(points: Sequence[HookPoint], release: Release) -> list[str]:
    """The targets that the release has not, and nothing that stands for them: what they give is lost there. Pure."""
    there = {point.place for point in points if in_range(point, release)}
    return [point.target for point in rows_for(points, release) if point.missed and point.place not in there]


def _engine(
    name: str,
    group: str,
    table: Sequence[HookPoint],
    releases: Sequence[str],
    say: Callable[[str], None],
) -> Engine:
    say(name)
    number = str(getattr(_imported(name), "__version__", None) or _version_of(name))
    release = release_of(number)
    points = rows_for(table, release)
    modules: dict[str, _Module] = {}
    for module in dict.fromkeys(point.module for point in points if in_range(point, release)):
        say(module)
        modules[module] = _imported(module)
    found = [_point(point, modules.get(point.module), release) for point in points]
    newest = max(map(release_of, releases), default=())
    return Engine(
        name=name,
        version=number,
        group=group,
        **_plugin(group),
        points=found,
        unusable=unusable(found),
        lost=lost(points, release),
        known=bool(release) and release <= newest,
    )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def _version_of(package: str) -> str:
    """The version by the metadata; a package need not have the name of its distribution."""
    return next((_version(each) for each in packages_distributions().get(package, ())), "unknown")


def _plugin(group: str) -> dict[str, Any]:
    """What our entry point names, and why it cannot be loaded. Loading imports a module that does nothing by itself."""
    for point in entry_points(group=group, name=PLUGIN):
        try:
            point.load()
        except Exception as error:
            return {"plugin": point.value, "plugin_trouble": _reason(error)}
        return {"plugin": point.value, "plugin_trouble": ""}
    return {"plugin": None, "plugin_trouble": ""}


def _point(point: HookPoint, module: _Module | None, release: Release) -> Point:
    """`module` is None where nothing is looked for in it."""
    if module is None or not in_range(point, release):
        status, why = ABSENT, absence(point)
    elif isinstance(module, tuple):
        status, why = module
    else:
        try:
            status, why = check(module, point, release)
        except Exception as error:
            status, why = "error", _reason(error)
    fits = status in (FITS, "installed")
    return Point(
        target=point.target,
        process=point.process,
        level=point.level.name.lower(),
        gives=point.gives,
        status=status,
        why=why,
        found=fits or status == "mismatch",
        matches=fits,
    )


def _imported(name: str) -> _Module:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError):
            return NO_MODULE, _reason(error)
        return "error", f"{name} cannot be imported: {_reason(error)}"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_WHY]


def main() -> None:
    """Inspects this process's environment and prints what it has."""
    os.environ.pop("STAGETRACE_SESSION", None)  # an engine that loads its plugins on import must not be patched
    answer = os.fdopen(os.dup(1), "w")  # not inherited; what engines print, from C as well, goes to standard error
    os.dup2(2, 1)
    with answer:

        def say(**line: object) -> None:
            print(json.dumps(line), file=answer, flush=True)

        found = inspect_engines(lambda module: say(importing=module))
        say(found=asdict(found))


# In the process that asks


def inspect_environment(python: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """What the environment of the interpreter `python` has, as an Inspection is in JSON.

    `progress` is told each module before it is imported there. Raises CannotInspect.
    """
    last = ""
    # -P: modules of the user's directory are no part of the environment.
    arguments = [python, "-P", "-m", MODULE]
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        except OSError as error:
            raise CannotInspect(
                f"cannot run {python}: {error.strerror}. Name a Python interpreter, as ENVIRONMENT/bin/python"
            ) from error
        overdue = threading.Timer(PATIENCE_S, process.kill)
        overdue.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                said = _said(line)
                if "found" in said:
                    return _understood(said["found"], python)
                if "importing" in said:
                    last = said["importing"]
                    progress(last)
            ended = process.wait()
        finally:
            _end(process)
            late = not overdue.is_alive()
            overdue.cancel()
        raise CannotInspect(_failure(python, ended, late, last, _last_words(errors)))


def _said(line: bytes) -> dict[str, Any]:
    """What a line says; nothing if it is none of ours (Python itself can be set up to print when it starts)."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _understood(found: dict[str, Any], python: str) -> dict[str, Any]:
    if found.get("version") != VERSION:
        raise CannotInspect(f"{python} has another version of stagetrace ({found.get('stagetrace')}): install this one")
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        if sys.exc_info()[0] is None:
            process.wait(_PATIENCE_AT_EXIT_S)  # it has answered; engines may have something to tidy
    except subprocess.TimeoutExpired:
        pass
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _last_words(errors: IO[bytes]) -> list[str]:
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").splitlines()
    return [line[:_LONGEST_WHY] for line in lines[-_LAST_WORDS:]]


def _failure(python: str, ended: int, late: bool, importing: str, words: list[str]) -> str:
    if words and not importing and "No module named" in words[-1] and "stagetrace" in words[-1]:
        return (
            f"{python} has no stagetrace, or an older one: install it there"
            f" ({python} -m pip install --no-deps, from a checkout of this repository)"
        )
    how = f"was ended by a signal ({signal.strsignal(-ended)})" if ended < 0 else f"ended with exit status {ended}"
    if late:
        how = f"was ended after {PATIENCE_S:.0f} s"
    where = f" while it imported {importing}" if importing else ""
    said = "\n".join(["; the last that it said:", *words]) if words else " and said nothing"
    return f"the inspection with {python} {how}{where}{said}"


if __name__ == "__main__":
    main()
