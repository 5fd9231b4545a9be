"""A kernel window in a rank, for every engine: torch.profiler over some steps of a server that goes on serving.

It opens and closes between two steps, when `stagetrace ctl kernel` has asked for it: this, and it alone, reads and
writes files in the engine's process, and on a device closing it waits for what was launched. A rank in which anybody
else's profiler runs is left alone. Whatever fails ends the window and is said in its result; nothing is raised.
"""

from __future__ import annotations

import json
import logging
import os
import time
from _thread import get_ident
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.kernel_request import STEP_RANGE, KernelRequest, read_request, write_whole
from stagetrace.instrument.stages import Level

if TYPE_CHECKING:
    from stagetrace.instrument.recorder import Recorder

log = logging.getLogger(__name__)

_KERNEL = int(Level.KERNEL)
_PAGE = os.sysconf("SC_PAGE_SIZE")


class KernelWindow:
    """The windows of one rank, one at a time. Its two calls cost a comparison each as long as nobody asks for one."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._epoch = -1  # of the switch whose request was looked at: once, not in every step
        self._open: _Open | None = None

    def step_begins(self, instance: int, step: int, rank: int) -> None:
        """A step begins, on the thread that runs all of it."""
        if self._open is None and self._recorder.level[0] < _KERNEL:
            return
        try:
            if self._open is None:
                self._look(rank)
            if self._open is not None:
                self._open.mark(instance, step)
        except Exception as error:
            self._give_up(error)

    def step_ends(self) -> None:
        """The step is over."""
        window = self._open
        if window is None:
            return
        try:
            why = window.over(self._recorder.level[0] < _KERNEL)
            if why:
                window.close(why)
                self._open = None
        except Exception as error:
            self._give_up(error)

    def _look(self, rank: int) -> None:
        epoch = self._recorder.epoch[0]
        if epoch == self._epoch:
            return
        self._epoch = epoch
        session = Path(os.environ["STAGETRACE_SESSION"])
        request = read_request(session)
        if request is None:
            return
        place = request.folder(session) / str(os.getpid())
        if profiler_in_use():
            write_whole(place.with_suffix(".json"), json.dumps({"rank": rank, "ended": "profiler in use"}))
            return
        place.with_suffix(".begun").touch()
        self._open = _Open(request, place, rank)
        self._open.start()

    def _give_up(self, error: Exception) -> None:
        window, self._open = self._open, None
        log.warning("stagetrace: the kernel window failed: %s: %s", type(error).__name__, error)
        if window is not None:
            window.abandon(f"failed: {type(error).__name__}: {error}"[:300])


class _Open:
    """A window that is open: the profiler, the steps so far, and what ends it."""

    def __init__(self, request: KernelRequest, place: Path, rank: int):
        from torch.profiler import profile, record_function, supported_activities

        self._request = request
        self._place = place
        self._range = record_function
        self._profile: Any = profile(activities=supported_activities())
        self._said: dict[str, Any] = {"rank": rank, "thread": get_ident(), "steps": []}
        self._memory = resident_bytes()
        self._taken = 0
        self._begin = 0
        self._held = 0  # ns that the engine waited for the profiler's start and end

    def start(self) -> None:
        """Starts the profiler."""
        before = time.monotonic_ns()
        self._profile.start()
        self._begin = time.monotonic_ns()
        self._held = self._begin - before

    def mark(self, instance: int, step: int) -> None:
        """Notes a step, with the times before and after a range of the profiler's: what ties its clock to ours."""
        before = time.monotonic_ns()
        with self._range(STEP_RANGE):
            pass
        self._said["steps"].append([instance, step, before, time.monotonic_ns()])

    def over(self, switched: bool) -> str:
        """Why the window is to end after this step; empty: it goes on."""
        self._taken += 1
        if self._taken >= self._request.steps:
            return "all steps"
        if switched:
            return "level switched"
        if time.monotonic_ns() - self._begin > self._request.seconds * 1e9:
            return "time"
        return "memory" if resident_bytes() - self._memory > self._request.megabytes * 1_000_000 else ""

    def close(self, why: str) -> None:
        """Stops the profiler and writes what it has seen."""
        end = time.monotonic_ns()
        profile, self._profile = self._profile, None
        profile.stop()
        trace = self._place.with_suffix(".trace.json")
        profile.export_chrome_trace(str(trace))
        if not trace.is_file():  # PyTorch only logs that
            raise OSError(f"{trace} could not be written")
        held = self._held + time.monotonic_ns() - end
        self._tell(ended=why, begin_ns=self._begin, end_ns=end, held_ns=held)

    def abandon(self, why: str) -> None:
        """Ends a window that failed."""
        try:
            if self._profile is not None:
                self._profile.stop()
        except Exception as error:
            log.warning("stagetrace: the profiler could not be stopped: %s", error)
        self._profile = None
        try:
            self._tell(ended=why)
        except OSError as error:
            log.warning("stagetrace: the kernel window's end could not be written: %s", error)

    def _tell(self, **words: Any) -> None:
        write_whole(self._place.with_suffix(".json"), json.dumps(self._said | words))


def profiler_in_use() -> bool:
    """Whether a profiler of PyTorch's runs in this process."""
    import torch

    return bool(torch._C._autograd._profiler_enabled())


def resident_bytes() -> int:
    """The process's resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
