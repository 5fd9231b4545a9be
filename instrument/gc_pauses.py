"""Records every collection of the cyclic garbage collector as `gc_pause`."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from .recorder import now
from .records import RecordType, header_word
from .stages import BY_NAME

if TYPE_CHECKING:
    from .recorder import Recorder

_STAGE = BY_NAME["gc_pause"]
_GC_PAUSE = header_word(RecordType.SEGMENT, _STAGE.id)


class GcPauses:
    """The callback of one process; forked children inherit it with the recorder that it writes to."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.begin = 0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        """Called by the collector at the begin and the end of a collection, in whatever code it interrupts."""
        if self.recorder.level[0] < _STAGE.level:
            return
        if phase == "start":
            self.begin = now()
        elif self.begin:
            self.recorder.segment(_GC_PAUSE, self.begin, now(), 0, 0, info["generation"], info["collected"])
            self.begin = 0


def watch(recorder: Recorder) -> None:
    """Has the collections of this process recorded, once."""
    if not any(isinstance(callback, GcPauses) for callback in gc.callbacks):
        gc.callbacks.append(GcPauses(recorder))
