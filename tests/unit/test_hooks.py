"""Tests of hooks: what is patched and when, and that the engine's function stays what it was whatever ours do."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import itertools
import json
import logging
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

import pytest
from unit.decoded import decoded_batch
from unit.rings import die, environment, opened, read_all, reader_of, sized, variables

from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.instrument.around import Around
from stagetrace.instrument.hooks import (
    ABSENT,
    ERRORS_UNTIL_OUT,
    FITS,
    Hook,
    HookPoint,
    Hooks,
    check,
    in_range,
    range_text,
    release_of,
    rows_for,
)
from stagetrace.instrument.recorder import Recorder, now
from stagetrace.instrument.records import MAX_HOOKS, RecordType, header_word
from stagetrace.instrument.stages import BY_NAME, Level

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stagetrace.exporters.drain import RingReader

FORWARD = header_word(RecordType.SEGMENT, BY_NAME["forward"].id)

ENGINE = '''
"""An engine's module."""

loaded = True

def work(first, second=2, *rest, key=None):
    """Doc of work."""
    if first == "raise":
        raise KeyError("from the engine")
    return [first, second, rest, key]

class Runner:
    def run(self, batch, flag=False):
        return (self, batch, flag)

    @staticmethod
    def still(batch):
        return batch

    @classmethod
    def made(cls, batch):
        return batch

    @property
    def size(self):
        return 1

    class Inner:
        def deep(self, x):
            return x

class Special(Runner):
    pass

async def later(first):
    if first == "raise":
        raise KeyError("from the engine")
    return first

constant = 7
class Callable:
    def __call__(self, x):
        return x
instance = Callable()
'''

_numbers = itertools.count()


def times(hook: Hook) -> Around:
    """A handler as the adapters' are: one segment around the original."""
    segment = hook.recorder.segment

    def after(begin: int, end: int) -> None:
        segment(FORWARD, begin, end, 0, 0)

    return Around(after=after)


def fails(hook: Hook) -> Around:
    """A handler whose recording always fails, before the original and not after it."""
    recorder = hook.recorder

    def before() -> None:
        recorder.segment(FORWARD, "no time", now(), 0, 0)  # type: ignore[arg-type]

    return Around(before)


def fails_after(hook: Hook) -> Around:
    """One whose recording fails when the original has returned."""
    recorder = hook.recorder

    def after(end: int) -> None:
        recorder.segment(FORWARD, "no time", end, 0, 0)  # type: ignore[arg-type]

    return Around(after=after)


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that can be imported and is not yet."""
    found = f"engine_{next(_numbers)}"
    (tmp_path / f"{found}.py").write_text(ENGINE, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield found
    assert sys.meta_path == finders, "a finder was left behind"
    sys.modules.pop(found, None)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Recorder, RingReader]]:
    with opened(tmp_path) as (recorder, reader):
        read_all(reader)
        yield recorder, reader


def point(target: str, *parameters: str, handler: Callable[..., Any] = times, level: Level = Level.STEP) -> HookPoint:
    return HookPoint(target, parameters, level, "worker", handler, "forward")


def hooked(recorder: Recorder, *points: HookPoint) -> list[Hook]:
    hooks = Hooks(points, recorder)
    hooks.install()
    return hooks.hooks


def segments(reader: RingReader) -> list[tuple[int, ...]]:
    batch = read_all(reader)
    return decoded_batch(batch).segments


# Where and when


def test_a_module_that_is_imported_already(name: str, pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    module = importlib.import_module(name)
    (hook,) = hooked(recorder, point(f"{name}:work", "first", "second"))
    assert (hook.status, hook.why) == ("installed", "")
    assert module.work(1, key=3) == [1, 2, (), 3]
    ((_, _, _, begin, end, *_),) = segments(reader)
    assert begin <= end


def test_a_module_that_is_imported_later(name: str, pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    (hook,) = hooked(recorder, point(f"{name}:Runner.run", "self", "batch"))
    assert (hook.status, hook.why) == ("waiting", f"{name} is not imported in this process")
    assert sys.meta_path[0].__class__ is Hooks
    module = importlib.import_module(name)
    assert hook.status == "installed"
    runner = module.Runner()
    assert runner.run("batch") == (runner, "batch", False)
    assert len(segments(reader)) == 1
    assert module.__spec__.name == name
    assert module.__file__.endswith(f"{name}.py")


def test_the_finder_waits_for_all_its_modules_and_leaves(name: str, pair: tuple[Recorder, RingReader], tmp_path: Path):
    recorder, _ = pair
    other = f"{name}_other"
    (tmp_path / f"{other}.py").write_text(f"import {name}\n" + ENGINE, "utf-8")  # one is imported while the other is
    before = len(sys.meta_path)
    hooks = hooked(recorder, point(f"{name}:work"), point(f"{other}:work"), point(f"{other}:Runner.run"))
    assert len(sys.meta_path) == before + 1
    importlib.import_module(other)
    assert [hook.status for hook in hooks] == ["installed"] * 3
    assert len(sys.meta_path) == before
    del sys.modules[other]


def test_a_module_in_a_package(pair: tuple[Recorder, RingReader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recorder, _ = pair
    package = f"package_{next(_numbers)}"
    (tmp_path / package / "inner").mkdir(parents=True)
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "inner" / "__init__.py").touch()
    (tmp_path / package / "inner" / "engine.py").write_text(ENGINE, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    (hook,) = hooked(recorder, point(f"{package}.inner.engine:Runner.Inner.deep", "self", "x"))
    module = importlib.import_module(f"{package}.inner.engine")
    assert hook.status == "installed"
    assert module.Runner.Inner().deep(4) == 4


def test_a_module_whose_import_fails_at_first(name: str, pair: tuple[Recorder, RingReader], tmp_path: Path):
    recorder, _ = pair
    path = tmp_path / f"{name}.py"
    path.write_text("raise RuntimeError('not yet')", "utf-8")
    (hook,) = hooked(recorder, point(f"{name}:work", "first"))
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module(name)
    assert hook.status == "waiting"
    path.write_text(ENGINE + "# longer, so that no cached code is taken\n", "utf-8")
    importlib.invalidate_caches()
    importlib.import_module(name)
    assert hook.status == "installed"


def test_a_module_that_is_not_there(name: str, pair: tuple[Recorder, RingReader]):
    recorder, _ = pair
    hooks = Hooks([point(f"{name}_missing:work")], recorder)
    hooks.install()
    try:
        with pytest.raises(ModuleNotFoundError, match=f"{name}_missing"):
            importlib.import_module(f"{name}_missing")
        assert hooks.hooks[0].status == "waiting"
    finally:
        sys.meta_path.remove(hooks)


MISFITS = {
    "a function that is missing": ("gone", ("first",), "missing", "gone"),
    "a class that is missing": ("Gone.run", ("self",), "missing", "Gone"),
    "a method that is missing": ("Runner.gone", ("self",), "missing", "gone"),
    "another first parameter": ("work", ("batch",), "mismatch", "it takes (first, second, rest, key), the hook needs"),
    "another order": ("Runner.run", ("self", "flag", "batch"), "mismatch", "the hook needs (self, flag, batch)"),
    "more than it takes": ("Runner.run", ("self", "batch", "flag", "more"), "mismatch", "it takes (self, batch, flag)"),
    "a static method": ("Runner.still", ("batch",), "mismatch", "it is a staticmethod"),
    "a class method": ("Runner.made", ("cls", "batch"), "mismatch", "it is a classmethod"),
    "a property": ("Runner.size", ("self",), "mismatch", "it is a property"),
    "a class": ("Runner", (), "mismatch", "it is a type"),
    "a number": ("constant", (), "mismatch", "it is a int"),
    "a callable object": ("instance", ("x",), "mismatch", "it is a Callable"),
}


@pytest.mark.parametrize("what", MISFITS)
@pytest.mark.parametrize("early", [True, False], ids=["imported", "imported later"])
def test_what_does_not_fit_is_left_alone_and_reported(
    name: str, pair: tuple[Recorder, RingReader], what: str, early: bool
):
    path, parameters, status, why = MISFITS[what]
    recorder, reader = pair
    if early:
        importlib.import_module(name)
    misfit, good = hooked(recorder, point(f"{name}:{path}", *parameters), point(f"{name}:work", "first"))
    module = importlib.import_module(name)
    assert misfit.status == status
    assert why in misfit.why
    assert good.status == "installed", "one that does not fit keeps another out"
    assert all(not hasattr(value, "_stagetrace_hook") for key, value in vars(module).items() if key != "work")
    assert all(not hasattr(value, "_stagetrace_hook") for value in vars(module.Runner).values())
    assembler = Assembler(bytes(16))
    assembler.add(read_all(reader))
    (found,) = assembler.hooks.values()
    assert {hook["name"]: hook["status"] for hook in found.values()} == {
        f"{name}:{path}": status,
        f"{name}:work": "installed",
    }


# Releases


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("0.32.0", (0, 32, 0)),
        ("0.32.0+cpu", (0, 32, 0)),
        ("v0.33.0rc1", (0, 33, 0)),
        ("0.33.1.dev12+g0a1b2c3", (0, 33, 1)),
        ("0.5.15.post1", (0, 5, 15)),
        ("1.2", (1, 2)),
        ("0.1.dev7+g0a1b2c3", ()),  # a checkout without tags
        ("0.0.0.dev0", ()),
        ("dev", ()),
        ("unknown", ()),
        ("", ()),
    ],
)
def test_release_of(version: str, release: tuple[int, ...]):
    assert release_of(version) == release


RANGES = {
    "all": ("", "", [True, True, True, True, True]),
    "from 0.28 on": ("0.28", "", [False, True, True, True, True]),
    "before 0.28": ("", "0.28", [True, False, False, False, False]),
    "from 0.28 on, before 0.32": ("0.28", "0.32", [False, True, True, False, False]),
}


@pytest.mark.parametrize("text", RANGES)
def test_ranges(text: str):
    since, before, there = RANGES[text]
    ranged = HookPoint("a:b", (), Level.STEP, "worker", times, "forward", since, before)
    versions = ("0.27.1", "0.28.0", "0.31.9", "0.32.0rc1", "no release")
    assert [in_range(ranged, release_of(version)) for version in versions] == there
    assert range_text(ranged) == text


def of_releases(name: str) -> list[HookPoint]:
    """Rows as a table has them: other leading parameters since 0.28, another name before it, and one that ended."""
    work = HookPoint(f"{name}:work", ("batch",), Level.STEP, "worker", times, "forward", before="0.28")
    return [
        work,
        HookPoint(f"{name}:work", ("first",), Level.STEP, "worker", times, "forward", since="0.28"),
        HookPoint(f"{name}:Runner.run", ("self", "batch"), Level.STEP, "worker", times, "sample", since="0.28"),
        HookPoint(
            f"{name}:Runner.plan", ("self",), Level.STEP, "worker", times, "sample", "", "0.28", f"{name}:Runner.run"
        ),
    ]


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("0.28.0", {"work": "installed", "Runner.run": "installed", "Runner.plan": ABSENT}),
        ("0.27.0", {"work": "mismatch", "Runner.run": ABSENT, "Runner.plan": "missing"}),
        ("", {"work": "installed", "Runner.run": "installed", "Runner.plan": ABSENT}),
    ],
)
@pytest.mark.parametrize("early", [True, False], ids=["imported", "imported later"])
def test_a_hook_point_is_only_looked_for_in_its_releases(
    name: str, pair: tuple[Recorder, RingReader], version: str, status: dict[str, str], early: bool
):
    recorder, reader = pair
    if early:
        importlib.import_module(name)
    hooks = Hooks(of_releases(name), recorder, version=version)
    hooks.install()
    importlib.import_module(name)
    assert {hook.point.target.partition(":")[2]: hook.status for hook in hooks.hooks} == status
    (absent, *_) = [hook.why for hook in hooks.hooks if hook.status == ABSENT]
    assert absent.startswith("the hook point is for the releases ")
    assembler = Assembler(bytes(16))
    assembler.add(read_all(reader))
    (told,) = assembler.hooks.values()
    assert {name.partition(":")[2]: hook["status"] for name, hook in told.items()} == status


def test_check_says_not_in_this_version_before_it_looks(name: str):
    module = importlib.import_module(name)
    old, new, run, plan = of_releases(name)
    assert check(module, new, (0, 28, 0)) == check(module, new) == (FITS, "")
    assert check(module, run, (0, 27, 0)) == (ABSENT, "the hook point is for the releases from 0.28 on")
    assert check(module, plan, (0, 28, 0)) == (ABSENT, "the hook point is for the releases before 0.28")
    assert check(module, plan, (0, 27, 0))[0] == "missing"
    assert check(module, old, (0, 27, 0))[0] == "mismatch"


def test_of_several_rows_for_one_function_the_one_in_range_counts(name: str):
    old, new, run, plan = of_releases(name)
    assert rows_for([old, new, run, plan], (0, 27, 0)) == [old, run, plan]
    assert rows_for([old, new, run, plan], (0, 28, 0)) == rows_for([old, new, run, plan], ()) == [new, run, plan]
    ended = HookPoint(f"{name}:work", (), Level.STEP, "worker", times, "forward", before="0.20")
    gone = HookPoint(f"{name}:work", (), Level.STEP, "worker", times, "forward", since="0.20", before="0.28")
    assert rows_for([ended, gone], (0, 30)) == [ended]


def test_an_inherited_method_is_hooked_on_its_heir_alone(name: str, pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    module = importlib.import_module(name)
    hooked(recorder, point(f"{name}:Special.run", "self", "batch"))
    module.Runner().run(1)
    assert len(segments(reader)) == 0
    module.Special().run(1)
    assert len(segments(reader)) == 1


@pytest.mark.parametrize("who", ["the same hooks", "others"])
def test_installing_twice_records_once(name: str, pair: tuple[Recorder, RingReader], who: str):
    recorder, reader = pair
    module = importlib.import_module(name)
    hooks = Hooks([point(f"{name}:work", "first")], recorder)
    hooks.install()
    again = hooks if who == "the same hooks" else Hooks([point(f"{name}:work", "first")], recorder)
    again.install()
    assert hooks.hooks[0].status == again.hooks[0].status == "installed"
    module.work(1)
    assert len(segments(reader)) == 1


def test_installing_twice_before_the_import_records_once(name: str, pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    hooks = Hooks([point(f"{name}:work", "first")], recorder)
    hooks.install()
    hooks.install()
    importlib.import_module(name).work(1)
    assert len(segments(reader)) == 1


def test_there_are_no_more_hooks_than_counters():
    with pytest.raises(ValueError, match=str(MAX_HOOKS)):
        Hooks([point("a:b")] * (MAX_HOOKS + 1), Recorder())


def test_a_hooked_function_looks_like_the_original(name: str, pair: tuple[Recorder, RingReader]):
    recorder, _ = pair
    module = importlib.import_module(name)
    signature = inspect.signature(module.work)
    hooked(recorder, point(f"{name}:work", "first"))
    assert module.work.__name__ == "work"
    assert module.work.__doc__ == "Doc of work."
    assert inspect.signature(module.work) == signature


# The engine's results and exceptions


def test_arguments_and_result_pass_as_they_are(name: str, pair: tuple[Recorder, RingReader]):
    recorder, _ = pair
    module = importlib.import_module(name)
    hooked(recorder, point(f"{name}:work", "first"))
    first, key = object(), object()
    found = module.work(first, 5, 6, 7, key=key)
    assert found[0] is first
    assert found[3] is key
    assert found[1:3] == [5, (6, 7)]


@pytest.mark.parametrize("handler", [times, fails, fails_after])
@pytest.mark.parametrize("level", [Level.OFF, Level.STEP])
def test_an_exception_passes_with_the_frame_that_raised_it(
    name: str, pair: tuple[Recorder, RingReader], handler: Callable[..., Any], level: Level
):
    recorder, _ = pair
    module = importlib.import_module(name)
    hooked(recorder, point(f"{name}:work", "first", handler=handler))
    assert recorder.ring is not None
    recorder.ring.memory[512] = level
    with pytest.raises(KeyError, match="from the engine") as error:
        module.work("raise")
    frame = traceback.extract_tb(error.value.__traceback__)[-1]
    assert (frame.name, frame.filename) == ("work", module.__file__)
    assert error.value.__context__ is None
    assert error.value.__cause__ is None


def test_a_coroutine_function(name: str, pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    module = importlib.import_module(name)
    hooked(recorder, point(f"{name}:later", "first", handler=times))
    thing = object()

    async def several() -> list[Any]:
        return await asyncio.gather(module.later(thing), module.later("raise"), module.later(2), return_exceptions=True)

    first, error, last = asyncio.run(several())
    assert first is thing
    assert isinstance(error, KeyError)
    assert traceback.extract_tb(error.__traceback__)[-1].name == "later"
    assert last == 2
    assert len(segments(reader)) == 2
    assert inspect.iscoroutinefunction(module.later)


@pytest.mark.parametrize("handler", [fails, fails_after])
def test_an_error_in_recording_is_contained_counted_logged_once_and_ends_the_hook(
    name: str, pair: tuple[Recorder, RingReader], caplog: pytest.LogCaptureFixture, handler: Callable[..., Any]
):
    recorder, reader = pair
    module = importlib.import_module(name)
    good, bad = hooked(recorder, point(f"{name}:Runner.run"), point(f"{name}:work", handler=handler))
    read_all(reader)
    with caplog.at_level(logging.WARNING, "stagetrace"):
        for call in range(ERRORS_UNTIL_OUT - 1):
            assert module.work(call) == [call, 2, (), None]
        assert bad.status == "installed"
        for call in range(20):
            assert module.work(call) == [call, 2, (), None]
    assert (bad.errors, bad.status) == (ERRORS_UNTIL_OUT, "out")
    assert reader.errors == {bad.index: ERRORS_UNTIL_OUT}
    assert len(caplog.records) == 1
    assert f"{name}:work" in caplog.messages[0]
    assert "the engine is not affected" in caplog.messages[0]
    assert caplog.records[0].exc_info is not None
    assembler = Assembler(bytes(16))
    assembler.add(read_all(reader))
    (hooks,) = assembler.hooks.values()
    assert hooks[f"{name}:work"]["status"] == "out"
    assert str(ERRORS_UNTIL_OUT) in hooks[f"{name}:work"]["why"]
    assert assembler.hook_names[reader.key] == {bad.index: f"{name}:work"}
    assert (good.status, good.errors) == ("installed", 0)
    module.Runner().run(1)
    assert len(segments(reader)) == 1


def breaks(hook: Hook) -> Around:
    """A handler that cannot even say what it does."""
    raise RuntimeError(f"nothing around {hook.point.target}")


def test_an_error_while_installing_leaves_the_function_alone(
    name: str, pair: tuple[Recorder, RingReader], caplog: pytest.LogCaptureFixture
):
    recorder, reader = pair
    bad, good = hooked(recorder, point(f"{name}:work", handler=breaks), point(f"{name}:Runner.run"))
    module = importlib.import_module(name)
    assert (bad.status, good.status) == ("error", "installed")
    assert module.work(1) == [1, 2, (), None]
    assert reader.errors == {0: 1}
    assert f"RuntimeError: nothing around {name}:work" in caplog.text


@pytest.mark.parametrize(("at", "recorded"), [(0, False), (1, False), (2, True), (3, True)])
def test_a_hook_records_from_its_level_on(name: str, pair: tuple[Recorder, RingReader], at: int, recorded: bool):
    recorder, reader = pair
    module = importlib.import_module(name)
    hooked(recorder, point(f"{name}:work", level=Level.STEP))
    assert recorder.ring is not None
    recorder.ring.memory[512] = at
    module.work(1)
    assert len(segments(reader)) == recorded


def test_hooks_report_to_a_ring_that_is_opened_later(name: str, tmp_path: Path):
    """The plugin runs before the process has a role."""
    recorder = Recorder()
    importlib.import_module(name)
    hooked(recorder, point(f"{name}:work", "first"), point(f"{name}:gone"))
    with opened(tmp_path / "other") as _, environment(**variables(tmp_path)), sized():
        assert recorder.open("worker", {})
    assert recorder.ring is not None
    reader = reader_of(recorder.ring.path)
    assembler = Assembler(bytes(16))
    assembler.add(read_all(reader))
    (found,) = assembler.hooks.values()
    assert [hook["status"] for hook in found.values()] == ["installed", "missing"]
    die(recorder)


def test_threads_that_import_at_once_hook_once(name: str, pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    hooked(recorder, point(f"{name}:work", "first"))
    start = threading.Barrier(4)

    def load() -> None:
        start.wait()
        importlib.import_module(name)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    importlib.import_module(name).work(1)
    assert len(segments(reader)) == 1


def test_a_hooks_status_is_json_that_names_it(name: str, pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    hooked(recorder, point(f"{name}:gone"))
    importlib.import_module(name)
    batch = read_all(reader)
    ((_, _, text),) = decoded_batch(batch).texts
    assert json.loads(text)["name"] == f"{name}:gone"


# On objects, one by one


def on_objects(target: str, *parameters: str, level: Level = Level.LAYER) -> HookPoint:
    return HookPoint(target, parameters, level, "worker", times, "forward", per_object=True)


def numbered(recorder: Recorder, number: int) -> Around:
    segment = recorder.segment

    def after(batch: Any, begin: int, end: int) -> None:
        segment(FORWARD, begin, end, 0, number, batch)

    return Around(after=after)


def test_each_object_has_a_handler_of_its_own(name: str, pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    module = importlib.import_module(name)
    (hook,) = hooked(recorder, on_objects(f"{name}:Runner.run", "self", "batch", level=Level.STEP))
    assert hook.status == "waiting"
    one, two, plain = module.Runner(), module.Special(), module.Runner()
    for number, runner in ((1, one), (2, two), (2, two)):  # the last finds it done
        assert hook.on(runner, "run", numbered(recorder, number))
    hook.told_objects()
    assert (hook.status, hook.why) == ("installed", "on 2 objects")
    assert (
        one.run(7) == (one, 7, False) and two.run(8, flag=True) == (two, 8, True) and plain.run(9) == (plain, 9, False)
    )
    assert [(words[6], words[7]) for words in segments(reader)] == [(1, 7), (2, 8)]
    assert "run" not in vars(plain) and module.Runner.run.__qualname__ == "Runner.run"


def test_their_errors_are_those_of_one_hook(name: str, pair: tuple[Recorder, RingReader]):
    recorder, reader = pair
    module = importlib.import_module(name)
    (hook,) = hooked(recorder, on_objects(f"{name}:Runner.run", "self", "batch", level=Level.STEP))
    runners = [module.Runner() for _ in range(3)]
    for runner in runners:
        assert hook.on(runner, "run", fails(hook))
    for _ in range(ERRORS_UNTIL_OUT):
        for runner in runners:
            assert runner.run(1) == (runner, 1, False)
    assert (hook.errors, hook.status) == (ERRORS_UNTIL_OUT, "out")
    assert not hook.on(module.Runner(), "run", fails(hook))
    hook.told_objects()
    assert hook.status == "out"
    assert not segments(reader)


def test_what_is_no_method_of_the_object_is_left_alone(name: str, pair: tuple[Recorder, RingReader]):
    recorder, _ = pair
    module = importlib.import_module(name)
    (hook,) = hooked(recorder, on_objects(f"{name}:Runner.run", "self"))
    runner = module.Runner()
    before = dict(vars(runner))
    for attribute in ("still", "made", "size", "missing"):
        assert not hook.on(runner, attribute, times(hook))
    with pytest.raises(ValueError, match="the hook asks for nothing_such"):
        hook.on(runner, "run", Around(lambda nothing_such: None))
    assert vars(runner) == before and not hook.objects


def test_above_the_maximum_level_no_object_is_hooked(name: str, pair: tuple[Recorder, RingReader]):
    recorder, _ = pair
    module = importlib.import_module(name)
    hooks = Hooks([on_objects(f"{name}:Runner.run", "self"), point(f"{name}:work")], recorder, Level.STEP)
    hooks.install()
    hook, other = hooks.hooks
    assert hook.status == "left out"
    assert not hook.on(module.Runner(), "run", times(hook))
    assert other.others[f"{name}:Runner.run"] is hook


def test_warnings_are_said_whatever_the_root_logger_lets_through(monkeypatch):
    """A library in an engine's process may have set it to ERROR; a level of the user's own for our logger stays."""
    log, root = logging.getLogger("stagetrace"), logging.getLogger()
    for own, expected in ((logging.NOTSET, True), (logging.ERROR, False)):
        monkeypatch.setattr(log, "level", own)
        monkeypatch.setattr(root, "level", logging.ERROR)
        log.manager._clear_cache()
        Hooks([], Recorder()).install()
        assert log.isEnabledFor(logging.WARNING) is expected
    monkeypatch.undo()
    log.manager._clear_cache()
