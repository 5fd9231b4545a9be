"""Tests of the wrapper around an engine's function: whatever the function takes, the wrapper takes, and hands on."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import linecache
import pickle
import sys
import traceback
import types
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagetrace.adapters.vllm.hooks import HOOK_POINTS
from stagetrace.instrument import around as around_module
from stagetrace.instrument.around import Around, parameters_of, source, wrap
from stagetrace.instrument.hooks import ERRORS_UNTIL_OUT, Hook, HookPoint
from stagetrace.instrument.recorder import Recorder
from stagetrace.instrument.stages import Level

if TYPE_CHECKING:
    from collections.abc import Callable


def a_hook(*parameters: str, level: Level = Level.OFF) -> Hook:
    point = HookPoint("engine:work", parameters, level, "worker", lambda _: Around(), "nothing")
    return Hook(point, 0, Recorder())  # its recorder is closed: at level off


class Called:
    """What a hook's functions were called with, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def note(self, name: str, *asks: str) -> Callable[..., None]:
        """A function of a hook that asks for these, and notes what it got."""

        def noting(*given: Any) -> None:
            self.calls.append((name, given))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        noting.__signature__ = inspect.Signature([inspect.Parameter(one, kind) for one in asks])  # type: ignore[attr-defined]
        return noting


# Any signature


@dataclass(frozen=True)
class Shape:
    """A function's parameters as source, and names to call it with."""

    declared: str
    names: list[str]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    names = (f"p{number}" for number in itertools.count())
    only, either = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    defaults = draw(st.integers(0, only + either))
    positional = [next(names) for _ in range(only + either)]
    words = [
        name if number < len(positional) - defaults else f"{name}=D[{number}]" for number, name in enumerate(positional)
    ]
    if only:
        words.insert(only, "/")
    rest, keywords = draw(st.booleans()), draw(st.booleans())
    named = [(next(names), draw(st.booleans())) for _ in range(draw(st.integers(0, 3)))]
    if rest or named:
        words.append("*rest" if rest else "*")
    words += [f"{name}=D[{number}]" if default else name for number, (name, default) in enumerate(named)]
    words += ["**more"] if keywords else []
    return Shape(", ".join(words), [*positional, *(name for name, _ in named), "unknown"])


def outcome(function: Callable[..., Any], given: list[int], named: dict[str, int]) -> Any:
    try:
        return function(*given, **named)
    except TypeError:
        return TypeError


@given(shapes(), st.data())
@settings(deadline=None)
def test_a_wrapper_takes_and_hands_on_what_the_function_does(shape: Shape, data: st.DataObject):
    scope: dict[str, Any] = {"D": [object() for _ in range(8)]}
    exec(f"def work({shape.declared}): return dict(locals())", scope)
    work = scope["work"]
    wrapper = wrap(work, Around(lambda: None, lambda begin, end, result: None), a_hook())
    assert str(inspect.signature(wrapper, follow_wrapped=False)) == str(inspect.signature(work))
    for _ in range(5):
        given_ = data.draw(st.lists(st.integers(), max_size=7))
        named = data.draw(st.dictionaries(st.sampled_from(shape.names), st.integers(), max_size=5))
        assert outcome(wrapper, given_, named) == outcome(work, given_, named)


def test_defaults_are_the_very_same():
    thing = object()

    def work(first: object = thing, *, key: object = thing) -> tuple[object, object]:
        return first, key

    wrapper = wrap(work, Around(lambda: None), a_hook())
    assert wrapper() == (thing, thing)


def test_names_that_no_source_can_have():
    """No `def` makes such a function, but a code object can be altered."""

    def work(first: int) -> int:
        return 5

    called = Called()
    for odd in ("not a name", "a=1): pass\nraise SystemExit\ndef f(x", "if", ".0"):
        work.__code__ = work.__code__.replace(co_varnames=(odd,))
        wrapper = wrap(work, Around(called.note("before")), a_hook())
        assert wrapper(1) == wrapper(**{odd: 1}) == 5
    assert len(called.calls) == 8


@pytest.mark.parametrize("name", sorted(around_module._USED))
def test_a_parameter_with_a_name_that_the_wrapper_needs(name: str):
    scope: dict[str, Any] = {}
    exec(f"def work(first, {name}): return first, {name}", scope)
    called = Called()
    wrapper = wrap(scope["work"], Around(after=called.note("after", "first", "result")), a_hook("first"))
    assert wrapper(1, 2) == wrapper(1, **{name: 2}) == wrapper(**{name: 2, "first": 1}) == (1, 2)
    assert called.calls == [("after", (1, (1, 2)))] * 3


def test_a_parameter_may_be_called_as_what_a_hook_gets():
    def work(begin: str, result: str) -> str:
        return begin + result

    called = Called()
    wrapper = wrap(work, Around(after=called.note("after", "begin", "result")), a_hook("begin"))
    assert wrapper("a", result="b") == "ab"
    ((_, (begin, result)),) = called.calls
    assert isinstance(begin, int)
    assert result == "ab"


def test_a_name_that_is_not_there_is_refused():
    def work(first: int) -> None: ...

    with pytest.raises(ValueError, match=r"asks for second, which is none of \(first\)"):
        wrap(work, Around(after=lambda second: None), a_hook())


# Decorators


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that takes an argument of its own away."""

    @functools.wraps(function)
    def decorated(*args: Any, verbose: bool = False, **kwargs: Any) -> Any:
        return function(*args, **kwargs), verbose

    return decorated


def handing_on(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return decorated


@pytest.mark.parametrize("decorator", [logged, handing_on])
def test_what_a_decorator_takes_can_still_be_given(decorator: Callable[..., Any]):
    @decorator
    def work(self: object, batch: object, flag: bool = False, *, key: int = 1) -> Any:
        return self, batch, flag, key

    called = Called()
    wrapper = wrap(work, Around(after=called.note("after", "batch")), a_hook("self", "batch"))
    for given_, named in (
        ((1, 2), {}),
        ((1,), {"batch": 2}),
        ((), {"self": 1, "batch": 2, "flag": True, "key": 5}),
        ((1, 2, True), {"key": 5}),
    ):
        assert wrapper(*given_, **named) == work(*given_, **named)
    if decorator is logged:
        assert wrapper(1, 2, verbose=True) == ((1, 2, False, 1), True)
    assert {call for _, call in called.calls} == {(2,)}
    assert inspect.signature(wrapper) == inspect.signature(work)


def test_a_decorator_that_is_known_to_hand_everything_on_costs_nothing(monkeypatch: pytest.MonkeyPatch):
    name = handing_on.__code__.co_consts  # the decorated function's code is among them
    (code,) = (one for one in name if inspect.iscode(one))
    monkeypatch.setattr(around_module, "TRANSPARENT", {(__name__, code.co_qualname)})

    @handing_on
    @handing_on
    def work(self: object, batch: object, flag: bool = False) -> Any:
        return self, batch, flag

    wrapper = wrap(work, Around(after=lambda batch: None), a_hook("self", "batch"))
    assert parameters_of(wrapper).names == ("self", "batch", "flag")
    assert wrapper(1, batch=2) == (1, 2, False)
    assert wrapper(1, 2, True) == (1, 2, True)


# What is done, and when


def test_order_and_what_is_given():
    called = Called()

    def work(self: str, batch: str) -> str:
        called.note("work")(batch)
        return batch.upper()

    def before(batch: str, begin: int, self: str) -> str:
        called.note("before")(batch, begin, self)
        return "noted"

    def after(result: str, noted: str, begin: int, end: int) -> None:
        called.note("after")(result, noted, begin, end)

    wrapper = wrap(work, Around(before, after, off=called.note("off")), a_hook("self"))
    assert wrapper("me", "batch") == "BATCH"
    (first, (batch, begin, me)), (second, _), (third, (result, noted, began, end)) = called.calls
    assert (first, second, third) == ("before", "work", "after")
    assert (batch, me, result, noted) == ("batch", "me", "BATCH", "noted")
    assert 0 < begin == began <= end


def test_below_its_level_only_off_is_called():
    called = Called()

    def work() -> int:
        called.note("work")()
        return 5

    around = Around(*map(called.note, ("before", "after", "off")))
    hook = a_hook(level=Level.STEP)
    wrapper = wrap(work, around, hook)
    assert wrapper() == 5
    assert [name for name, _ in called.calls] == ["off", "work"]


def test_every_part_is_contained():
    calls = []

    def work() -> int:
        calls.append("work")
        return 5

    def fails() -> None:
        calls.append("fails")
        raise RuntimeError

    def after(noted: object) -> None:
        assert noted is None
        fails()

    hook = a_hook()
    wrapper = wrap(work, Around(fails, after, fails), hook)
    assert wrapper() == 5
    assert calls == ["fails", "work", "fails"]
    assert hook.errors == 2
    for _ in range(ERRORS_UNTIL_OUT):
        assert wrapper() == 5
    assert hook.status == "out"
    calls.clear()
    assert wrapper() == 5
    assert calls == ["fails", "work"], "out, it still forgets, and that is contained as well"


def test_the_engines_exception_passes_and_after_is_not_called():
    called = Called()

    def work() -> None:
        raise KeyError("from the engine")

    def fails() -> None:
        raise RuntimeError("ours")

    wrapper = wrap(work, Around(fails, called.note("after", "end")), a_hook())
    with pytest.raises(KeyError, match="from the engine") as error:
        wrapper()
    assert not called.calls
    assert error.value.__context__ is None


@pytest.mark.parametrize("where", ["before", "after"])
def test_what_ends_the_process_is_not_contained(where: str):
    def ends() -> None:
        raise KeyboardInterrupt

    wrapper = wrap(lambda: 5, Around(**{where: ends}), a_hook())
    with pytest.raises(KeyboardInterrupt):
        wrapper()


def test_a_coroutine_function_stays_one():
    called = Called()

    async def work(batch: int) -> int:
        await asyncio.sleep(0)
        called.note("work")(batch)
        return batch + 1

    wrapper = wrap(work, Around(called.note("before"), called.note("after", "result")), a_hook())
    assert inspect.iscoroutinefunction(wrapper)
    assert asyncio.run(wrapper(4)) == 5
    assert called.calls == [("before", ()), ("work", (4,)), ("after", (5,))]


# What it looks like


def plain_work(first: int, second: int = 2) -> int:
    """Doc."""
    if first == 0:
        raise KeyError("from the engine")
    return first + second


def test_a_traceback_shows_the_wrappers_lines():
    wrapper = wrap(plain_work, Around(after=lambda end: None), a_hook())
    with pytest.raises(KeyError) as error:
        wrapper(0)
    frames = traceback.extract_tb(error.value.__traceback__)
    assert frames[-2].filename == "<stagetrace hook on engine:work>"
    assert frames[-2].line == "_result = _original(first, second)"
    assert frames[-1].name == "plain_work"


def test_it_stands_for_the_original(monkeypatch: pytest.MonkeyPatch):
    wrapper = wrap(plain_work, Around(after=lambda end: None), a_hook())
    assert (wrapper.__name__, wrapper.__qualname__, wrapper.__doc__) == ("plain_work", "plain_work", "Doc.")
    assert wrapper.__wrapped__ is plain_work  # type: ignore[attr-defined]
    assert inspect.getsource(wrapper) == inspect.getsource(plain_work)
    monkeypatch.setitem(globals(), "plain_work", wrapper)
    assert pickle.loads(pickle.dumps(wrapper)) is wrapper  # by name, as functions are


def test_the_source_of_a_wrapper():
    def work(self: Any, batch: Any, /, flag: bool = False, *rest: Any, key: Any = None, **more: Any) -> None: ...

    around = Around(lambda batch, begin: 1, lambda self, noted, result, begin, end: None, dict[str, int]().clear)
    assert (
        source(parameters_of(work), around)
        == """\
def hooked(self, batch, /, flag=..., *rest, key=..., **more):
    if _recorder.level[0] < _hook.threshold:
        try:
            _off()
        except Exception:
            _hook.failed()
        return _original(self, batch, flag, *rest, key=key, **more)
    _noted = None
    _begin = _now()
    try:
        _noted = _before(batch, _begin)
    except Exception:
        _hook.failed()
    _result = _original(self, batch, flag, *rest, key=key, **more)
    _end = _now()
    try:
        _after(self, _noted, _result, _begin, _end)
    except Exception:
        _hook.failed()
    return _result
"""
    )


def test_the_source_of_a_small_one():
    assert (
        source(parameters_of(plain_work), Around(lambda begin: None))
        == """\
def hooked(first, second=...):
    if _recorder.level[0] < _hook.threshold:
        return _original(first, second)
    _begin = _now()
    try:
        _before(_begin)
    except Exception:
        _hook.failed()
    return _original(first, second)
"""
    )


@pytest.mark.parametrize("point", HOOK_POINTS, ids=lambda point: point.target)
def test_a_handler_asks_for_what_its_hook_point_says(point: HookPoint):
    """So that `doctor`, which compares the hook point with the engine, tells the truth."""
    source(around_module.Parameters(point.parameters), point.handler(Hook(point, 0, Recorder())))


# Where a compiler reaches


class Torch(types.ModuleType):
    """As much of PyTorch as a wrapper asks of it."""

    def __init__(self, cuda: bool):
        super().__init__("torch")
        self.is_compiling = self.is_capturing = False
        self.compiler = types.SimpleNamespace(is_compiling=lambda: self.is_compiling)
        self.backends = types.SimpleNamespace(cuda=types.SimpleNamespace(is_built=lambda: cuda))
        self.is_initialized = True
        self.cuda = types.SimpleNamespace(
            is_initialized=lambda: self.is_initialized, is_current_stream_capturing=lambda: self.is_capturing
        )


def guarded(around: Around, level: Level = Level.OFF) -> Callable[..., Any]:
    hook = a_hook(level=level)
    point = replace(hook.point, compiled=True)
    return wrap(plain_work, around, Hook(point, 0, Recorder()))


@pytest.mark.parametrize("cuda", [False, True])
def test_nothing_is_recorded_while_a_compiler_traces_or_a_stream_is_captured(
    cuda: bool, monkeypatch: pytest.MonkeyPatch
):
    torch = Torch(cuda)
    monkeypatch.setitem(sys.modules, "torch", torch)
    called = Called()
    wrapper = guarded(Around(called.note("before"), called.note("after"), called.note("off", "first")))
    assert wrapper(1) == 3
    assert [name for name, _ in called.calls] == ["before", "after"]
    torch.is_compiling = True
    assert wrapper(1) == 3
    assert len(called.calls) == 2, "what it does would become part of the graph"
    torch.is_compiling, torch.is_capturing = False, True
    assert wrapper(4) == 6
    assert called.calls[2:] == ([("off", (4,))] if cuda else [("before", ()), ("after", ())])
    torch.is_initialized = False  # there is no stream yet
    assert wrapper(4) == 6
    assert called.calls[-2:] == [("before", ()), ("after", ())]


def test_without_pytorch_there_is_nothing_to_ask(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert guarded(Around(after=lambda end: None))(1) == 3


def test_a_guarded_wrapper_is_one_of_the_files_that_a_compile_cache_leaves_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", Torch(cuda=False))
    wrapper = guarded(Around(after=lambda end: None))
    assert wrapper.__code__.co_filename == "<string>"
    assert "<string>" not in linecache.cache


def test_off_gets_the_engines_arguments_and_no_times():
    called = Called()
    wrapper = wrap(plain_work, Around(off=called.note("off", "second")), a_hook(level=Level.LAYER))
    assert wrapper(1, 5) == 6
    assert called.calls == [("off", (5,))]
    with pytest.raises(ValueError, match="the hook asks for begin"):
        wrap(plain_work, Around(off=called.note("off", "begin")), a_hook())
