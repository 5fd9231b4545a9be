"""Reads a ring file: every slot number gets exactly one fate (read, overwritten, torn, unfinished), each counted.

The writer publishes no head; it is found from the slots' sequence numbers. A slot is taken only when it was complete
at the poll before, so that nothing rests on the order in which another processor sees the writer's stores.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stagetrace.instrument import records
from stagetrace.instrument.stages import Level

from .session import Losses

log = logging.getLogger(__name__)

SLOT = np.dtype(
    [("first", "<u8"), ("header", "<u8"), ("words", "<i8", (records.SLOT_WORDS,)), ("last", "<u8")],
)
Slots = npt.NDArray[Any]  # of dtype SLOT
Numbers = npt.NDArray[np.uint64]

CONTROL, DETAIL = 0, 1
RING_NAMES = ("control", "detail")
_CHUNK = 4096
_PATIENCE = 3  # polls that find a slot unwritten before written ones until it is given up


class NotARing(Exception):
    """The file is no ring, or one of another version of stagetrace; the message says which."""


@dataclass
class Area:
    """One ring of a file: its slots and how far they were read."""

    slots: Slots
    losses: Losses
    cursor: int = 0  # number of the next slot to read
    lost_at: int = 0  # number after the newest slot that was not read
    heads: deque[int] = field(default_factory=lambda: deque([0] * _PATIENCE, _PATIENCE))  # found at the last polls

    def find_head(self) -> int:
        """The number after the newest slot that was begun, looking on from the head of the last poll."""
        size = len(self.slots)
        head = max(self.heads[-1], self.cursor)
        chunk = 256
        while True:
            numbers = np.arange(head, head + min(chunk, size), dtype=np.uint64)
            where = (numbers & np.uint64(size - 1)).astype(np.intp)
            first, last = self.slots["first"][where], self.slots["last"][where]
            taken = first > numbers  # first is number + 1, or more where the writer is a lap ahead
            taken &= ~_stray(first, last, numbers + np.uint64(1), size) & (last <= first)
            if not taken.any():
                return head
            newest = int(first[taken].max())
            head = max(newest, head + int(np.flatnonzero(taken)[-1]) + 1)
            chunk = _CHUNK

    def read(self, limit: int, final: bool) -> Slots:
        """The slots from the cursor up to slot number `limit`; the cursor moves on.

        Reading stops at a slot that is not written yet, until it has been so for some polls; with `final` (its
        process is dead) at none.
        """
        size = len(self.slots)
        read: list[Slots] = []
        if self.cursor < limit - size:  # everything a whole ring before the newest slot is gone
            self.losses.overwritten += limit - size - self.cursor
            self.cursor = self.lost_at = limit - size
        waiting = False
        while self.cursor < limit and not waiting:
            count = min(limit - self.cursor, _CHUNK, size)
            numbers = np.arange(self.cursor + 1, self.cursor + count + 1, dtype=np.uint64)
            where = ((numbers - np.uint64(1)) & np.uint64(size - 1)).astype(np.intp)
            copy = self.slots[where]
            first, last = self.slots["first"][where], self.slots["last"][where]  # again, after the copy
            whole = (copy["first"] == numbers) & (copy["last"] == numbers) & (first == numbers) & (last == numbers)
            stray = _stray(first, last, numbers, size)
            lapped = ~stray & ((first > numbers) | (last > numbers))
            missing = np.flatnonzero(~(whole | lapped))
            missing = missing[missing >= self.heads[0] - self.cursor]  # of the others it was seen often enough
            if not final and missing.size:
                waiting = True
                count = int(missing[0])
                copy, first, last, whole, stray, lapped = (
                    column[:count] for column in (copy, first, last, whole, stray, lapped)
                )
            given_up = ~whole & ~lapped
            torn = given_up & ~stray & (first != last)
            self.losses.read += int(whole.sum())
            self.losses.overwritten += int(lapped.sum())
            self.losses.corrupt += int((given_up & stray).sum())
            self.losses.torn += int(torn.sum())
            self.losses.unfinished += int((given_up & ~stray & ~torn).sum())
            if not whole.all():
                self.lost_at = self.cursor + int(np.flatnonzero(~whole)[-1]) + 1
            read.append(copy[whole])
            self.cursor += count
        return np.concatenate(read) if read else np.empty(0, SLOT)


def _stray(first: Numbers, last: Numbers, numbers: Numbers, size: int) -> npt.NDArray[np.bool_]:
    """Where a sequence number cannot have been written by a recorder: in its place it is `numbers` modulo the size."""
    mask, most = np.uint64(size - 1), np.uint64(1 << 62)
    stray = np.zeros(len(numbers), np.bool_)
    for found in (first, last):
        stray |= (found != 0) & (((found ^ numbers) & mask != 0) | (found > most))
    return stray


@dataclass
class Batch:
    """What one poll of one ring file brought."""

    process: int
    control: Slots = field(default_factory=lambda: np.empty(0, SLOT))
    detail: Slots = field(default_factory=lambda: np.empty(0, SLOT))
    gap: bool = False  # control records were dropped or lost since the last batch
    gap_end: int = 0  # number of the first control slot after all that was dropped or lost
    ended: bool = False  # the process is dead and this was the last

    def __len__(self) -> int:
        return len(self.control) + len(self.detail)


class RingReader:
    """The reader's side of one ring file. Raises NotARing when the file is none."""

    def __init__(self, path: Path, key: int):
        self.path = path
        self.key = key
        self.ended = False
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(self._descriptor).st_size
            if size < records.HEADER_SIZE:
                raise NotARing(f"{path} is too short for a ring")
            self._size = size
            self._memory = mmap.mmap(self._descriptor, size)
            self._read_header(size)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _read_header(self, size: int) -> None:
        (magic, version, slot_size, control, detail, pid, started, wall, maximum, role, session, host) = (
            records.HEADER.unpack_from(self._memory)
        )
        if magic != records.MAGIC:
            raise NotARing(f"{self.path} is not a ring of stagetrace")
        if version != records.VERSION or slot_size != records.SLOT_SIZE:
            raise NotARing(f"{self.path} has ring format {version}, this stagetrace reads {records.VERSION}")
        powers = all(slots and not slots & (slots - 1) for slots in (control, detail))
        if not powers or size != records.HEADER_SIZE + (control + detail) * records.SLOT_SIZE:
            raise NotARing(f"{self.path} has a damaged header")
        self.pid, self.started_ns, self.wall_ns = pid, started, wall
        self.maximum = Level(min(maximum, Level.KERNEL))
        self.role, self.session, self.host = (
            text.rstrip(b"\0").decode("utf-8", "replace") for text in (role, session, host)
        )
        bounds = (records.HEADER_SIZE, records.HEADER_SIZE + control * records.SLOT_SIZE)
        self.areas = [
            Area(np.frombuffer(self._memory, SLOT, count, offset), Losses(self.key, name, count))
            for name, count, offset in zip(RING_NAMES, (control, detail), bounds, strict=True)
        ]
        self._look_at(self._memory)

    def _look_at(self, header: mmap.mmap | bytearray) -> None:
        """Takes the words that change from this header page."""
        self._dropped = np.frombuffer(header, "<u8", 2, records.CONTROL_DROPPED_OFFSET)
        self._control_read = np.frombuffer(header, "<u8", 1, records.CONTROL_READ_OFFSET)
        self._errors = np.frombuffer(header, "<u8", records.MAX_HOOKS, records.ERRORS_OFFSET)
        self._level = np.frombuffer(header, "u1", 1, records.LEVEL_OFFSET)

    def _cut(self) -> bool:
        """Whether somebody cut the file short; to read on would then kill this process (SIGBUS), as it does the engine.

        What was written and not yet read is `unfinished` from then on.
        """
        if os.fstat(self._descriptor).st_size >= self._size:
            return False
        if self.ended:
            return True
        log.warning(
            "%s was cut short: what was not read yet is lost, and its process cannot go on recording", self.path
        )
        self._look_at(bytearray(os.pread(self._descriptor, records.HEADER_SIZE, 0).ljust(records.HEADER_SIZE, b"\0")))
        for area in self.areas:
            area.slots = np.zeros(len(area.slots), SLOT)
        return True

    def alive(self) -> bool:
        """Whether the process that writes this ring lives: it holds the file's lock."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return False

    @property
    def level(self) -> Level:
        """The level that the process records at now."""
        return Level(min(int(self._level[0]), Level.KERNEL))

    @property
    def errors(self) -> dict[int, int]:
        """Contained errors by index of the hook."""
        return {int(index): int(self._errors[index]) for index in np.flatnonzero(self._errors)}

    @property
    def cursors(self) -> list[int]:
        """The numbers of the next slots to read: control, detail."""
        return [area.cursor for area in self.areas]

    def resume(self, cursors: list[int], losses: list[Losses]) -> None:
        """Goes on behind what a session already holds, and with the losses that it knows of."""
        before = {loss.ring: loss for loss in losses}
        for area, cursor in zip(self.areas, cursors, strict=True):
            area.cursor = cursor
            area.heads.extend([cursor] * _PATIENCE)
            area.losses = before.get(area.losses.ring, area.losses)
            area.losses.slots = len(area.slots)

    def poll(self) -> Batch:
        """What came since the last poll; once the process is dead, all of the rest."""
        control, detail = self.areas
        final = self._cut() or not self.alive()
        before = control.losses.lost
        # What explains a detail record was written before it, and so is in the same batch or an earlier one: the
        # detail's head is looked up before control's, and where control waits for a slot, detail does too.
        heads = (detail.find_head(), control.find_head())
        control_limit, detail_limit = (heads[1], heads[0]) if final else (control.heads[-1], detail.heads[-1])
        batch = Batch(self.key, control.read(control_limit, final), ended=final)
        if control.cursor >= control_limit:
            batch.detail = detail.read(detail_limit, final)
        for head, area in zip(heads, (detail, control), strict=True):
            area.heads.append(max(head, area.cursor))
        control.losses.dropped, dropped_at = int(self._dropped[0]), int(self._dropped[1])
        batch.gap = control.losses.lost > before
        batch.gap_end = max(control.lost_at, dropped_at)
        self.ended = final
        return batch

    def committed(self) -> None:
        """Gives the control ring's slots that were read back to the writer: they are in the session."""
        self._control_read[0] = self.areas[CONTROL].cursor

    def close(self) -> None:
        """Lets go of the file."""
        del self.areas, self._dropped, self._control_read, self._errors, self._level
        try:
            self._memory.close()
        except BufferError:
            pass  # a batch that is still in use maps it; it goes with the batch
        os.close(self._descriptor)
