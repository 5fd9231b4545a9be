"""The start-up of an engine's processes: what happens before a process has its ring waits until it has one."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.around import Around
from stagetrace.instrument.recorder import now
from stagetrace.instrument.records import RecordType, header_word
from stagetrace.instrument.stages import BY_NAME, Level

if TYPE_CHECKING:
    from collections.abc import Callable

    from stagetrace.instrument.hooks import Hook
    from stagetrace.instrument.recorder import Recorder

_MOST_WAITING = 64  # parts
_IMPORTS = header_word(RecordType.SEGMENT, BY_NAME["imports"].id)
_STARTUP = header_word(RecordType.SEGMENT, BY_NAME["startup"].id)


class _Start:
    """How far this process has come, and what is still to be written of that."""

    pid = 0  # whose; a forked child starts anew
    begin = 0  # ns; 0: it is ready
    part = ""  # of the engine, that began first in the process; others that share it are within its start-up
    waiting: list[tuple[int, int, int]] = []  # header, begin, end


def process_started_ns() -> int:
    """When this process started (or was forked), in ns of the monotonic clock; to 10 ms, as the kernel says it."""
    with open("/proc/self/stat", "rb") as file:
        ticks = int(file.read().rpartition(b")")[2].split()[19])
    age_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return now() - max(age_ns, 0)


def write(recorder: Recorder, header: int, begin: int, end: int) -> None:
    """Writes a part of the start-up, or keeps it for the ring."""
    if recorder.ring is None:
        if len(_Start.waiting) < _MOST_WAITING:
            _Start.waiting.append((header, begin, end))
    elif recorder.level[0] >= Level.REQUEST:
        recorder.segment(header, begin, end, 0, 0)


def flush(recorder: Recorder) -> None:
    """Writes what was waiting, if there is a ring now."""
    if recorder.ring is not None:
        waiting, _Start.waiting = _Start.waiting, []
        for part in waiting:
            write(recorder, *part)


def begun(recorder: Recorder, part: str, time_ns: int) -> None:
    """A part of the engine begins to build itself; what came before it is imports, once a process."""
    if _Start.pid != os.getpid():
        _Start.pid, _Start.begin, _Start.part, _Start.waiting = os.getpid(), process_started_ns(), part, []
        write(recorder, _IMPORTS, _Start.begin, time_ns)
    elif not _Start.begin:
        _Start.begin, _Start.part = time_ns, part  # one more engine in a process that has had one
    flush(recorder)


def ready(recorder: Recorder, part: str) -> None:
    """A part of the engine is ready, and with it the process, if it is the part that began first."""
    flush(recorder)
    if _Start.begin and _Start.part == part:
        write(recorder, _STARTUP, _Start.begin, now())
        _Start.begin = 0


def piece(stage: str, last_of: str = "") -> Callable[[Hook], Around]:
    """A handler that records a function as that stage; `last_of`: a part of the engine that is ready after it."""
    header = header_word(RecordType.SEGMENT, BY_NAME[stage].id)

    def handler(hook: Hook) -> Around:
        recorder: Any = hook.recorder

        def after(begin: int, end: int) -> None:
            flush(recorder)
            write(recorder, header, begin, end)
            if last_of:
                ready(recorder, last_of)

        return Around(after=after)

    return handler
