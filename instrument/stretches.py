"""When a coroutine runs: each stretch between two waits, in which nothing else runs on its thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .recorder import now

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

    from .hooks import Hook


class Stretches:
    """A coroutine to be awaited in place of another, which it runs as that would run.

    `told` gets begin and end of every stretch in ns, whether it was the last one, and what is `given`; an error in it
    is the hook's. A stretch that ends with an exception of the coroutine's is not told.
    """

    __slots__ = ("_coroutine", "_given", "_hook", "_told")

    def __init__(
        self, coroutine: Coroutine[Any, Any, Any], told: Callable[..., None], hook: Hook, given: tuple[Any, ...]
    ):
        self._coroutine, self._told, self._hook, self._given = coroutine, told, hook, given

    def __await__(self) -> Generator[Any, Any, Any]:
        coroutine = self._coroutine
        resume: Callable[[Any], Any] = coroutine.send
        value: Any = None
        while True:
            begin = now()
            try:
                waits_for = resume(value)
            except StopIteration as done:
                self._tell(begin, True)
                return done.value
            self._tell(begin, False)
            try:
                value = yield waits_for
                resume = coroutine.send
            except GeneratorExit:
                coroutine.close()
                raise
            except BaseException as error:
                resume, value = coroutine.throw, error

    def _tell(self, begin: int, last: bool) -> None:
        try:
            self._told(begin, now(), last, *self._given)
        except Exception:
            self._hook.failed()
