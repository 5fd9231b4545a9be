"""A recorder with a real ring for a benchmark, and a collector that is always in time."""

from __future__ import annotations

import os
import struct
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stagetrace.instrument import records
from stagetrace.instrument.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stagetrace.instrument.ring import Ring

_WORD = struct.Struct("<Q")


@contextmanager
def armed() -> Iterator[Path]:
    """A directory for a session (`session`) and its rings, named in the environment; gone afterwards.

    It is in memory where the machine has /dev/shm, as a server's rings are.
    """
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(dir=memory, prefix="stagetrace-benchmark-") as directory:
        os.environ |= {
            "STAGETRACE_SESSION": str(Path(directory) / "session"),
            "STAGETRACE_RING_DIR": str(Path(directory) / "rings"),
            "STAGETRACE_LEVEL": "step",
        }
        try:
            yield Path(directory)
        finally:
            for name in ("STAGETRACE_SESSION", "STAGETRACE_RING_DIR", "STAGETRACE_LEVEL"):
                os.environ.pop(name)
                if name in before:
                    os.environ[name] = before[name]


@contextmanager
def recording() -> Iterator[tuple[Recorder, Ring]]:
    """A recorder that is open at level step; its session and ring are gone afterwards."""
    with armed():
        recorder = Recorder()
        try:
            if not recorder.open("benchmark", {}) or recorder.ring is None:
                raise RuntimeError("the recorder could not be opened: its message is above")
            yield recorder, recorder.ring
        finally:
            recorder.after_fork_in_child()  # lets go of the ring


def make_room(ring: Ring) -> None:
    """Gives the control ring's slots back to the writer, as the collector does once it has them."""
    _WORD.pack_into(ring.memory, records.CONTROL_READ_OFFSET, _written(ring, 0, ring.control_slots))


def detail_slots(ring: Ring) -> int:
    """How many slots of the detail ring were written so far."""
    return _written(ring, ring.control_slots, ring.detail_slots)


def _written(ring: Ring, first: int, count: int) -> int:
    words = records.SLOT_SIZE // 8
    slots = np.frombuffer(ring.memory, "<u8", count * words, records.HEADER_SIZE + first * records.SLOT_SIZE)
    return int(slots[::words].max())  # every slot begins with its number plus one


def dropped(ring: Ring) -> int:
    """Control records that found no room."""
    return int(_WORD.unpack_from(ring.memory, records.CONTROL_DROPPED_OFFSET)[0])


def set_level(ring: Ring, level: int) -> None:
    """Sets the byte that the hooks read first."""
    ring.memory[records.LEVEL_OFFSET] = level
