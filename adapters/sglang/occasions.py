"""Hooks on what happens now and then in a rank, between its steps: weights, sleep, moving experts, KV off the device.

Times are the host's: on a device most of this goes on after the function that began it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stagetrace.instrument.around import Around
from stagetrace.instrument.records import RecordType, header_word
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Callable

    from stagetrace.instrument.hooks import Hook

_SLEEP = header_word(RecordType.SEGMENT, BY_NAME["sleep"].id)


class _Asleep:
    """Since when this process's rank sleeps."""

    since = 0  # ns; 0: it is awake


def occasion(stage: str) -> Callable[[Hook], Around]:
    """A handler that records a function as that stage."""
    header = header_word(RecordType.SEGMENT, BY_NAME[stage].id)

    def handler(hook: Hook) -> Around:
        segment = hook.recorder.segment

        def after(begin: int, end: int) -> None:
            segment(header, begin, end, 0, 0)

        return Around(after=after)

    return handler


def falls_asleep(_: Hook) -> Around:
    """release_memory_occupation: the first of several, where weights and KV are released one by one."""

    def before(begin: int) -> None:
        _Asleep.since = _Asleep.since or begin

    return Around(before)


def wakes_up(hook: Hook) -> Around:
    """resume_memory_occupation: it is awake when nothing is released any more."""
    segment = hook.recorder.segment

    def after(self: Any, end: int) -> None:
        if not getattr(self, "offload_tags", None) and _Asleep.since:
            segment(_SLEEP, _Asleep.since, end, 0, 0)
            _Asleep.since = 0

    def off() -> None:
        _Asleep.since = 0

    return Around(after=after, off=off)
