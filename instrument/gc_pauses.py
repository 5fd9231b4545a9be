"""Records every collection of the cyclic garbage collector as `gc_pause`."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

from .recorder import now
from .records import RecordType, header_word
from .stages import BY_NAME

if TYPE_CHECKING:
    from .recorder import Recorder

log = logging.getLogger("stagetrace")

_STAGE = BY_NAME["gc_pause"]
_GC_PAUSE = header_word(RecordType.SEGMENT, _STAGE.id)


class GcPauses:
    """The callback of one process; forked children inherit it with the recorder that it writes to."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.begin = 0
        self.broken = False

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        """Called by the collector at the begin and the end of a collection, in whatever code it interrupts."""
        if self.recorder.level[0] < _STAGE.level or self.broken:
            return
        try:
            if phase == "start":
                self.begin = now()
            elif self.begin:
                self.recorder.segment(_GC_PAUSE, self.begin, now(), 0, 0, info["generation"], info["collected"])
                self.begin = 0
        except Exception:  # Python would print it at every collection
            self.broken = True
            log.warning("stagetrace: error in recording gc_pause; the engine is not affected", exc_info=True)


def watch(recorder: Recorder) -> None:
    """Has the collections of this process recorded, once."""
    if not any(isinstance(callback, GcPauses) for callback in gc.callbacks):
        gc.callbacks.append(GcPauses(recorder))
