"""Time on the device for the stages of a step, for every engine: pairs of events around what a rank launches.

The pairs themselves are in instrument/device_pairs.py. Here are torch.cuda's events (CUDA and HIP), and what puts the
pairs into a rank's hooks: at import, where PyTorch was built for such a device, and when the worker turns out to run on
one. Elsewhere the hooks are what they are without. Marks (marking.py) go with the pair of the forward pass.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.device_clock import DRIFT_PPM, RESOLUTION_NS
from stagetrace.instrument.device_pairs import FORWARD, DevicePairs
from stagetrace.instrument.hooks import ERRORS_UNTIL_OUT
from stagetrace.instrument.records import Text
from stagetrace.instrument.stages import Level

from .marking import LayerMarks

if TYPE_CHECKING:
    from collections.abc import Callable

    from stagetrace.instrument.around import Around
    from stagetrace.instrument.recorder import Recorder

    from .rank import RankStep


log = logging.getLogger(__name__)

_STEP_LEVEL = int(Level.STEP)


class CudaEvents:
    """Events of the current device, on the current stream. Nothing in here waits."""

    def __init__(self) -> None:
        torch: Any = sys.modules["torch"]
        self._make: Callable[..., Any] = torch.cuda.Event
        self.capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        device = torch.cuda.current_device()
        self._aside = torch.cuda.Stream()
        self.stream: Callable[[], int] = (
            functools.partial(raw, device) if raw else lambda: int(torch.cuda.current_stream().cuda_stream)
        )

    def event(self) -> Any:
        """A new event with timing."""
        return self._make(enable_timing=True)

    def record_aside(self, event: Any) -> None:
        """Launches it on a stream of ours, which has nothing else to do and waits for no other."""
        event.record(self._aside)


class DeviceTime:
    """The pairs of the rank in this process. Until it runs on a device that has them, nothing here does anything."""

    def __init__(self, rank: RankStep):
        self._rank = rank
        self._recorder: Recorder | None = None
        self._told = 0  # of what was amiss
        self._errors = 0
        self.pairs: DevicePairs | None = None
        self.event: Callable[[], Any] | None = None  # makes one; None: the device is not timed
        self.marks = LayerMarks(rank)

    def open(self, kind: str, recorder: Recorder) -> dict[str, object]:
        """The rank runs on a device of this kind, as the engine names it. What its process is to say of it.

        A second call finds it done.
        """
        if kind != "cuda" or not built():
            return {}
        if self.event is not None:
            return {"device_time": self._said()}
        self._recorder = recorder
        try:
            events = CudaEvents()
            self.pairs = DevicePairs(events, recorder.put, forwarded=self.marks.paired)
            self.event = events.event
        except Exception:
            self.failed()
            return {}
        return {"device_time": self._said()}

    def step_begins(self) -> None:
        """Before the rank's part of a step."""
        pairs = self.pairs
        if pairs is not None and self._rank.step:
            try:
                pairs.step_begins()
                amiss = pairs.skipped + pairs.contradictions
                if amiss > 2 * self._told:  # so that it is told a few times in all
                    self._told = amiss
                    self._tell()
            except Exception:
                self.failed()

    def begins(self, stage: int) -> Callable[[], None]:
        """For right before the host launches a stage (device_pairs.STAGES)."""

        def begin() -> None:
            if self.pairs is not None and self._rank.step:
                try:
                    self.pairs.begin(stage)
                except Exception:
                    self.failed()
                if stage == FORWARD:
                    self.marks.begin()

        return begin

    def ends(self, stage: int) -> Callable[[], None]:
        """For right after it has launched the stage."""

        def end() -> None:
            rank = self._rank
            if self.pairs is not None and rank.step:
                if stage == FORWARD:
                    self.marks.end()
                try:
                    self.pairs.end(stage, rank.instance, rank.step, rank.rank)
                except Exception:
                    self.failed()

        return end

    def fetched(self) -> None:
        """The engine has waited for the device, or has found that it need not; hooks of lower levels say so as well."""
        pairs, recorder = self.pairs, self._recorder
        if pairs is not None and recorder is not None:
            try:
                if recorder.level[0] >= _STEP_LEVEL:
                    pairs.poll()
                    self.marks.poll()
                else:
                    pairs.forget()
                    self.marks.forget()
            except Exception:
                self.failed()

    def forget(self) -> None:
        """Nothing is recorded."""
        if self.pairs is not None:
            try:
                self.pairs.forget()
                self.marks.forget()
            except Exception:
                self.failed()

    def failed(self) -> None:
        """Contains the exception that is being handled: logs the first, does without pairs after a few.

        The hooks that the pairs are in go on: what they record of the host is not to be lost with it.
        """
        self._errors += 1
        if self._errors == 1:
            log.warning("stagetrace: error in timing the device; the engine is not affected", exc_info=True)
        if self._errors >= ERRORS_UNTIL_OUT:
            self.pairs = None
            self._tell()

    def _tell(self) -> None:
        if self._recorder is not None:
            said = {"role": "worker", "device_time": self._said()}
            self._recorder.text(0, Text.PROCESS, json.dumps(said))

    def _said(self) -> dict[str, object]:
        pairs = self.pairs
        if pairs is None:
            return {"by": "nothing", "errors": self._errors}
        return {
            "by": "event pairs",
            "drift_ppm": DRIFT_PPM,
            "resolution_ns": RESOLUTION_NS,
            "skipped": pairs.skipped,
            "contradictions": pairs.contradictions,
            "errors": self._errors,
        }


def built() -> bool:
    """Whether this process's PyTorch can have a CUDA or HIP device. Whether there is one is not asked."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and bool(torch.backends.cuda.is_built())


def on_device(
    around: Around,
    before: Callable[[], None] | None = None,
    after: Callable[[], None] | None = None,
    off: Callable[[], None] | None = None,
) -> Around:
    """What is around a function, and these nearer to it; where PyTorch was not built for such a device, only that."""
    if not built():
        return around
    return replace(
        around,
        before=_then(around.before, before),
        after=_first(around.after, after),
        off=_then(around.off, off),
    )


# With the parameters of the function that has some, since those are asked for by name.


def _then(function: Callable[..., Any] | None, also: Callable[[], None] | None) -> Callable[..., Any] | None:
    if function is None or also is None:
        return function or also

    @functools.wraps(function)
    def both(*values: Any) -> Any:
        found = function(*values)
        also()
        return found

    return both


def _first(function: Callable[..., Any] | None, also: Callable[[], None] | None) -> Callable[..., Any] | None:
    if function is None or also is None:
        return function or also

    @functools.wraps(function)
    def both(*values: Any) -> Any:
        also()
        return function(*values)

    return both
