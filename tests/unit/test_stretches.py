"""Tests of a coroutine's stretches: what runs between two waits is told, and the coroutine runs as it would without."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stagetrace.instrument.around import Around, wrap
from stagetrace.instrument.hooks import Hook, HookPoint
from stagetrace.instrument.recorder import Recorder, now
from stagetrace.instrument.stages import Level


def hooked(function: Any, told: Any, level: Level = Level.OFF) -> tuple[Any, Hook]:
    point = HookPoint("engine:work", (), level, "front end", lambda _: Around(), "nothing")
    hook = Hook(point, 0, Recorder())  # its recorder is closed: at level off
    return wrap(function, Around(stretch=told), hook), hook


def test_others_run_between_two_stretches():
    told: list[tuple[int, int, bool, Any]] = []
    others: list[int] = []

    async def work(batch: Any, *, more: int) -> int:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return more + 1

    async def other() -> None:
        others.append(now())
        await asyncio.sleep(0)
        others.append(now())

    wrapper, _ = hooked(work, lambda begin, end, last, batch: told.append((begin, end, last, batch)))

    async def main() -> int:
        beside = asyncio.ensure_future(other())
        result: int = await wrapper("a batch", more=4)
        await beside
        return result

    assert asyncio.run(main()) == 5
    assert [row[2:] for row in told] == [(False, "a batch"), (False, "a batch"), (True, "a batch")]
    moments = [moment for begin, end, *_ in told for moment in (begin, end)]
    assert moments == sorted(moments)
    assert told[0][1] <= others[0] <= told[1][0] and told[1][1] <= others[1] <= told[2][0]


def test_waiting_for_a_future_and_its_exception():
    told: list[bool] = []

    async def work(future: asyncio.Future[int]) -> int:
        try:
            return await future
        except KeyError:
            return -1

    wrapper, _ = hooked(work, lambda begin, end, last: told.append(last))

    async def main(error: Exception | None) -> int:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(wrapper(future))
        await asyncio.sleep(0)
        if error is None:
            future.set_result(7)
        else:
            future.set_exception(error)
        found: int = await task
        return found

    assert asyncio.run(main(None)) == 7
    assert asyncio.run(main(KeyError("theirs"))) == -1
    assert told == [False, True] * 2
    with pytest.raises(OSError, match="theirs"):
        asyncio.run(main(OSError("theirs")))
    assert told[4:] == [False]


def test_a_coroutine_that_is_cancelled_cleans_up_once():
    cleaned: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append("once")

    wrapper, _ = hooked(work, lambda begin, end, last: None)

    async def main() -> None:
        task = asyncio.ensure_future(wrapper())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert cleaned == ["once"]


def test_a_coroutine_that_is_closed_is_closed_within():
    cleaned: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            cleaned.append("once")

    wrapper, _ = hooked(work, lambda begin, end, last: None)
    coroutine = wrapper()
    coroutine.send(None)
    coroutine.close()
    assert cleaned == ["once"]


def test_an_error_of_ours_is_contained():
    def raises(begin: int, end: int, last: bool) -> None:
        raise RuntimeError("ours")

    async def work() -> int:
        await asyncio.sleep(0)
        return 5

    wrapper, hook = hooked(work, raises)
    assert asyncio.run(wrapper()) == 5
    assert hook.errors == 2


def test_below_the_level_nothing_is_told():
    told: list[Any] = []

    async def work() -> int:
        return 5

    wrapper, _ = hooked(work, lambda begin, end, last: told.append(last), Level.STEP)
    assert asyncio.run(wrapper()) == 5 and not told


def test_what_a_stretch_asks_for_must_be_there():
    async def work(batch: Any) -> None: ...

    with pytest.raises(ValueError, match="other"):
        hooked(work, lambda begin, end, last, other: None)
