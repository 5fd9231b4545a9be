"""Hooks on the start-up of vLLM's processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stagetrace.adapters.startup import begun, flush, piece, ready
from stagetrace.instrument.around import Around

if TYPE_CHECKING:
    from collections.abc import Callable

    from stagetrace.instrument.hooks import Hook

__all__ = ["CORE", "begins", "begun", "core_is_ready", "flush", "part", "whole"]

FRONT_END, CORE, WORKER = "front end", "engine core", "worker"


def whole(hook: Hook) -> Around:
    """A function that builds the front end, and waits until the engine is there."""

    def before(begin: int) -> None:
        begun(hook.recorder, FRONT_END, begin)

    def after() -> None:
        ready(hook.recorder, FRONT_END)

    return Around(before, after)


def core_is_ready(hook: Hook) -> Around:
    """The last function that an engine core calls before it is ready."""

    def after() -> None:
        ready(hook.recorder, CORE)

    return Around(after=after)


def begins(hook: Hook) -> Around:
    """Where a worker begins to build itself."""

    def before(begin: int) -> None:
        begun(hook.recorder, WORKER, begin)

    return Around(before)


def part(stage: str, last: bool = False) -> Callable[[Hook], Around]:
    """A handler that records a function as that stage; with the `last` part the worker is ready."""
    return piece(stage, WORKER if last else "")
