"""What a hook does around an engine's function, and the wrapper that does it: compiled with the function's parameters.

A wrapper that takes `*args, **kwargs` makes a tuple and a dictionary at every call and unpacks them again, which costs
more than all else that a hook does while its level is off. So the wrapper is written out as source, with exactly the
parameters of the function that it stands for; `source` shows what comes of it.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import sys
from dataclasses import dataclass
from keyword import iskeyword
from typing import TYPE_CHECKING, Any

from .recorder import now
from .stretches import Stretches

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import FunctionType

    from .hooks import Hook

# Decorators that hand on what they are given and take nothing else: what they decorate says what can be given.
TRANSPARENT = {("torch.utils._contextlib", "context_decorator.<locals>.decorate_context")}

# What a handler's functions get under these names; every other name is that of a parameter of the engine's function.
OURS = {"begin": "_begin", "end": "_end", "result": "_result", "noted": "_noted"}
_USED = {
    *OURS.values(),
    *("_original", "_before", "_after", "_off", "_hook", "_recorder", "_now", "_compiling", "_capturing", "Exception"),
    *("_stretches", "_stretch"),
}
_OF_STRETCH = ("begin", "end", "last")
# vLLM hashes the files of all that it compiles, and leaves out code of this name: wrappers change no key of its cache.
_GENERATED = "<string>"


@dataclass(frozen=True)
class Around:
    """What a hook does beside calling the engine's function. An error in any of it is contained.

    `before` and `after` get what they name as parameters: parameters of the engine's function, by its names for them;
    `begin` and `end`, in ns of the monotonic clock, read before `before` and right after the engine's function;
    `result`, what that returned; `noted`, what `before` returned (None when it failed). Without an exception of the
    engine's, `after` is called even when `before` failed. While the level is below the hook's, neither is, but `off`
    is, before the engine's function: to forget what must not outlive a time without records, or to count what must be
    counted at every level. It gets parameters of the engine's function alone.

    A coroutine waits, and others run meanwhile: `stretch` is called after each stretch in which it ran, with begin, end
    and whether it was the last one, then with the parameters of the engine's function that it names.
    """

    before: Callable[..., Any] | None = None
    after: Callable[..., Any] | None = None
    off: Callable[..., Any] | None = None
    stretch: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Guards:
    """What a wrapper that a compiler may reach asks first. It then does nothing but call the engine's function."""

    compiling: Callable[[], bool]  # its code is being traced: whatever it did would become part of the graph
    capturing: Callable[[], bool] | None = None  # a stream is being captured; None: this machine has no such stream

    @classmethod
    def of_torch(cls) -> Guards | None:
        """Those of the process's PyTorch; None where it has not been imported, so that there is no compiler."""
        torch = sys.modules.get("torch")
        if torch is None:
            return None
        if not torch.backends.cuda.is_built():
            return cls(torch.compiler.is_compiling)
        cuda = torch.cuda

        def capturing() -> bool:
            # Whether there is a device is not asked: in a process that forks later the question alone does harm.
            return bool(cuda.is_initialized() and cuda.is_current_stream_capturing())

        return cls(torch.compiler.is_compiling, capturing)


@dataclass(frozen=True)
class Parameters:
    """The parameters of a function, by kind and in order."""

    positional: tuple[str, ...]  # without a default or with one; `positional_only` of them cannot be named
    positional_only: int = 0
    rest: str | None = None  # *rest
    keyword: tuple[str, ...] = ()  # those that must be named
    keywords: str | None = None  # **keywords
    defaults: int = 0  # of the positional ones, the last so many
    keyword_defaults: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.positional, *filter(None, (self.rest,)), *self.keyword, *filter(None, (self.keywords,)))

    @property
    def writable(self) -> bool:
        """Whether they can be written into a wrapper's source."""
        return not _USED & set(self.names) and all(name.isidentifier() and not iskeyword(name) for name in self.names)

    def declared(self) -> str:
        """As a function's definition has them; in place of a default stands `...`."""
        first = len(self.positional) - self.defaults
        words = [name if number < first else f"{name}=..." for number, name in enumerate(self.positional)]
        if self.positional_only:
            words.insert(self.positional_only, "/")
        if self.rest or self.keyword:
            words.append(f"*{self.rest or ''}")
        words += [f"{name}=..." if name in self.keyword_defaults else name for name in self.keyword]
        return ", ".join([*words, *([f"**{self.keywords}"] if self.keywords else [])])

    def passed(self) -> str:
        """As a call hands them on."""
        words = [*self.positional, *([f"*{self.rest}"] if self.rest else [])]
        words += [f"{name}={name}" for name in self.keyword]
        return ", ".join([*words, *([f"**{self.keywords}"] if self.keywords else [])])


def parameters_of(function: FunctionType) -> Parameters:
    """The parameters that a function really takes; not those of a function that it decorates."""
    code = function.__code__
    count, named = code.co_argcount, code.co_argcount + code.co_kwonlyargcount
    others = list(code.co_varnames[named:])
    return Parameters(
        positional=code.co_varnames[:count],
        positional_only=code.co_posonlyargcount,
        rest=others.pop(0) if code.co_flags & inspect.CO_VARARGS else None,
        keyword=code.co_varnames[count:named],
        keywords=others.pop(0) if code.co_flags & inspect.CO_VARKEYWORDS else None,
        defaults=len(function.__defaults__ or ()),
        keyword_defaults=frozenset(function.__kwdefaults__ or ()),
    )


def _undecorated(function: FunctionType) -> FunctionType:
    """What is under the decorators that hand everything on."""
    while (function.__globals__.get("__name__"), function.__code__.co_qualname) in TRANSPARENT:
        inner = getattr(function, "__wrapped__", None)
        if not inspect.isfunction(inner):
            break
        function = inner
    return function


def source(parameters: Parameters, around: Around, asynchronous: bool = False, guards: Guards | None = None) -> str:
    """The wrapper's source. Raises ValueError when a name is used twice or not there. Pure."""
    before, after = (_arguments(each, parameters, OURS) for each in (around.before, around.after))
    off = _arguments(around.off, parameters, {})
    asked = {*(before or ()), *(after or ())}
    call = f"{'await ' if asynchronous else ''}_original({parameters.passed()})"
    timed = call
    if around.stretch is not None:
        given = "".join(f"{name}, " for name in _given(around.stretch, parameters))
        timed = f"await _stretches(_original({parameters.passed()}), _stretch, _hook, ({given}))"
    lines = [f"{'async ' if asynchronous else ''}def hooked({parameters.declared()}):"]
    if guards is not None:
        lines += ["    if _compiling():", f"        return {call}"]
    lines.append("    if _recorder.level[0] < _hook.threshold:")
    if off is not None:
        lines += _contained(f"_off({', '.join(off)})", "        ")
    lines.append(f"        return {call}")
    if guards is not None and guards.capturing is not None:
        lines += ["    if _capturing():"]
        if off is not None:
            lines += _contained(f"_off({', '.join(off)})", "        ")
        lines += [f"        return {call}"]
    if "_noted" in asked:
        lines.append("    _noted = None")
    if "_begin" in asked:
        lines.append("    _begin = _now()")
    if before is not None:
        lines += _contained(f"{'_noted = ' if '_noted' in asked else ''}_before({', '.join(before)})", "    ")
    if after is None:
        lines.append(f"    return {timed}")
    else:
        lines.append(f"    _result = {timed}")
        if "_end" in asked:
            lines.append("    _end = _now()")
        lines += [*_contained(f"_after({', '.join(after)})", "    "), "    return _result"]
    return "\n".join([*lines, ""])


def _contained(call: str, indent: str) -> list[str]:
    return [f"{indent}{line}" for line in ("try:", f"    {call}", "except Exception:", "    _hook.failed()")]


def _arguments(
    function: Callable[..., Any] | None, parameters: Parameters, ours: Mapping[str, str]
) -> list[str] | None:
    """What a handler's function is called with; None when there is no function."""
    if function is None:
        return None
    try:
        wanted = [*inspect.signature(function).parameters]
    except ValueError:  # a method of a built-in type, dict.clear say
        wanted = []
    for name in wanted:
        if name not in ours and name not in parameters.names:
            raise ValueError(f"the hook asks for {name}, which is none of ({', '.join(parameters.names)})")
    return [ours.get(name, name) for name in wanted]


def _given(stretch: Callable[..., Any], parameters: Parameters) -> list[str]:
    """The engine's parameters that `Around.stretch` asks for, behind its own three."""
    return (_arguments(stretch, parameters, dict.fromkeys(_OF_STRETCH, "")) or [])[len(_OF_STRETCH) :]


def wrap(original: FunctionType, around: Around, hook: Hook) -> Callable[..., Any]:
    """A function that does what is around the original. It can stand wherever the original did.

    Where the parameters cannot be written out (a decorator hides those that the hook relies on, a name is one of those
    used here) it takes the leading ones that the hook point names, and whatever else comes. Raises ValueError when the
    hook asks for another.
    """
    inner = _undecorated(original)
    parameters = parameters_of(inner)
    exact = parameters.writable and set(hook.point.parameters) <= set(parameters.names)
    if not exact:
        parameters = Parameters(hook.point.parameters, rest="args", keywords="kwargs")
    guards = Guards.of_torch() if hook.point.compiled else None
    text = source(parameters, around, inspect.iscoroutinefunction(original), guards)
    scope: dict[str, Any] = {
        "_original": original,
        "_before": around.before,
        "_after": around.after,
        "_off": around.off,
        "_stretches": Stretches,
        "_stretch": around.stretch,
        "_hook": hook,
        "_recorder": hook.recorder,
        "_now": now,
        "_compiling": guards and guards.compiling,
        "_capturing": guards and guards.capturing,
    }
    wrapper = _compiled(text, _GENERATED if guards else f"<stagetrace hook on {hook.point.target}>", scope)
    if exact:
        wrapper.__defaults__, wrapper.__kwdefaults__ = inner.__defaults__, inner.__kwdefaults__
    return functools.wraps(original)(wrapper)


def _compiled(text: str, name: str, scope: Mapping[str, Any]) -> FunctionType:
    """The function in a source text, whose lines a traceback can show where the name is its own."""
    if name != _GENERATED:
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    found = dict(scope)
    exec(compile(text, name, "exec"), found)
    wrapper: FunctionType = found["hooked"]
    return wrapper
