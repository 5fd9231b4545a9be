"""The recorder: what every hook calls to write a record. One per process; a closed one writes into a scratch slot.

No lock, no system call, no growing memory: a slot's number comes from an `itertools.count`, whose `next` is atomic
under the interpreter's lock and safe to re-enter (signal handlers, garbage-collector callbacks); the slot is then this
writer's alone. `level` is the byte that hooks read first.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import struct
import time
from _thread import get_ident
from pathlib import Path
from typing import TYPE_CHECKING

from . import records
from .identity import claim_identity
from .ids import handle as hash_handle
from .levels import maximum_level, session_level
from .ring import Ring
from .stages import MAX_ATTRIBUTES, STEP_COMPOSITION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

log = logging.getLogger("stagetrace")

_pack = records.SLOT.pack_into
_pack_short = records.SHORT_SLOT.pack_into
_SHIFT = records.SLOT_SIZE.bit_length() - 1
_MOST_PARTS = 255  # of a record: the header word has a byte for it
_MARGIN = 64  # control slots kept free, so that writers that race past the check still do not overwrite

now = time.monotonic_ns


class Recorder:
    """Writes records into this process's rings. Every method is safe to call when the recorder is closed."""

    def __init__(self) -> None:
        self.key = b""
        self.ring: Ring | None = None
        self._pid = 0
        self._opened: list[Callable[[], None]] = []
        self._close()

    def _close(self) -> None:
        # Hooks that are in the middle of a call when this happens (a fork) still write: into the scratch slot.
        self.level: bytes | memoryview = bytes(1)
        self.epoch: memoryview = memoryview(bytes(4)).cast("I")  # changes with every switch of the level
        self._control_memory = self._detail_memory = memoryview(bytearray(records.SLOT_SIZE))
        self._control_mask = self._detail_mask = 0
        self._control_slots = itertools.count()
        self._detail_slots = itertools.count()
        self._control_next = 0
        self._control_capacity = 1 << 62
        self._read = memoryview(bytes(8)).cast("Q")
        self.dropped = memoryview(bytearray(16)).cast("Q")
        self._drops = itertools.count(1)
        self.errors = memoryview(bytearray(records.MAX_HOOKS * 8)).cast("Q")

    def open(self, role: str, info: Mapping[str, object]) -> bool:
        """Opens this process's ring, unless it is open, and writes what the process is.

        `role` and `info` of further calls in one process (a scheduler that is also a worker) are added to what is
        known of it. Returns whether the recorder is open; a failure is logged with what to do and leaves it closed.
        """
        session = os.environ.get("STAGETRACE_SESSION")
        if not session:
            return False
        if self.ring is None or self._pid != os.getpid():
            try:
                self._open(Path(session), role)
            except OSError as error:
                log.warning("stagetrace records nothing in this process (%s, pid %d): %s", role, os.getpid(), error)
                return False
        self.text(0, records.Text.PROCESS, json.dumps({"role": role, **info}, default=str))
        return True

    def _open(self, session: Path, role: str) -> None:
        identity = claim_identity(session)
        ring = Ring.create(identity.session, session, role, session_level(session), maximum_level())
        ring.memory[records.LEVEL_OFFSET] = session_level(session)  # again: it may have been switched meanwhile
        memory = memoryview(ring.memory)
        control = records.HEADER_SIZE
        detail = control + ring.control_slots * records.SLOT_SIZE
        self.key = identity.key
        self._pid = os.getpid()
        self._control_memory = memory[control:detail]
        self._detail_memory = memory[detail:]
        self._control_mask = ring.control_slots - 1
        self._detail_mask = ring.detail_slots - 1
        self._control_slots = itertools.count()
        self._detail_slots = itertools.count()
        self._control_next = 0
        self._control_capacity = ring.control_slots - _MARGIN
        self._read = memory[records.CONTROL_READ_OFFSET :][:8].cast("Q")
        self.dropped = memory[records.CONTROL_DROPPED_OFFSET :][:16].cast("Q")  # how many; before which slot
        self._drops = itertools.count(1)
        self.errors = memory[records.ERRORS_OFFSET : records.HEADER_SIZE].cast("Q")
        self.ring = ring
        for tell in self._opened:
            tell()
        self.epoch = memory[records.EPOCH_OFFSET :][:4].cast("I")
        self.level = memory[records.LEVEL_OFFSET :][:1]

    def on_open(self, tell: Callable[[], None]) -> None:
        """Has `tell` called whenever a ring was opened, before anything is recorded in it."""
        self._opened.append(tell)

    def after_fork_in_child(self) -> None:
        """The parent's ring is the parent's alone; the child opens its own when it turns out to have a role."""
        if self.ring is not None:
            self._close()
            os.close(self.ring.descriptor)
            self.ring = None

    def handle(self, text: str) -> int:
        """The integer that stands for `text` in this session's records."""
        return hash_handle(self.key, text)

    # Detail ring: overwrites the oldest

    def segment(
        self,
        header: int,
        begin: int,
        end: int,
        instance: int,
        step: int,
        a0: int = 0,
        a1: int = 0,
        a2: int = 0,
        *more: int,
    ) -> None:
        """Writes one segment; `header` is `records.header_word(SEGMENT, stage)`, times in ns of the monotonic clock.

        `more` are the attributes from the fourth on. Few stages have as many, and packing them costs time.
        """
        number = next(self._detail_slots)
        if more:
            attributes = (a0, a1, a2, *more, *_NO_ATTRIBUTES[3 + len(more) :])
            _pack(
                self._detail_memory,
                (number & self._detail_mask) << _SHIFT,
                number + 1,
                header,
                get_ident(),
                begin,
                end,
                instance,
                step,
                *attributes,
                number + 1,
            )
            return
        _pack_short(
            self._detail_memory,
            (number & self._detail_mask) << _SHIFT,
            number + 1,
            header,
            get_ident(),
            begin,
            end,
            instance,
            step,
            a0,
            a1,
            a2,
            number + 1,
        )

    def step_begin(self, begin: int, scheduled: int, instance: int, step: int, composition: Sequence[int]) -> None:
        """Writes a step's begin, with what is in its batch in the order of stages.STEP_COMPOSITION."""
        first = next(self._detail_slots) + 1
        _pack(
            self._detail_memory,
            (first - 1 & self._detail_mask) << _SHIFT,
            first,
            _STEP_BEGIN_FIRST,
            first,
            get_ident(),
            begin,
            scheduled,
            instance,
            step,
            *composition[:_FIRST_PART],
            first,
        )
        second = next(self._detail_slots) + 1
        _pack(
            self._detail_memory,
            (second - 1 & self._detail_mask) << _SHIFT,
            second,
            _STEP_BEGIN_SECOND,
            first,
            *composition[_FIRST_PART:],
            *_REST,
            second,
        )

    def step_end(self, end: int, instance: int, step: int) -> None:
        """Writes a step's end."""
        number = next(self._detail_slots)
        _pack(
            self._detail_memory,
            (number & self._detail_mask) << _SHIFT,
            number + 1,
            _STEP_END,
            get_ident(),
            end,
            0,
            instance,
            step,
            *_NO_ATTRIBUTES,
            number + 1,
        )

    # Control ring: drops the newest when the collector has not made room

    def state(
        self,
        header: int,
        time_ns: int,
        request: int,
        instance: int = 0,
        step: int = 0,
        a0: int = 0,
        a1: int = 0,
        a2: int = 0,
        a3: int = 0,
    ) -> bool:
        """Writes that a request enters a state, or one of its events; `header` says which. False when dropped."""
        if not self._room(1):
            return False
        number = next(self._control_slots)
        self._control_next = number + 1
        _pack(
            self._control_memory,
            (number & self._control_mask) << _SHIFT,
            number + 1,
            header,
            get_ident(),
            time_ns,
            request,
            instance,
            step,
            a0,
            a1,
            a2,
            a3,
            0,
            0,
            0,
            0,
            number + 1,
        )
        return True

    def member(
        self, header: int, request: int, q: int, kv: int, instance: int, step: int, last: int = 0, cached: int = 0
    ) -> bool:
        """Writes a change of the batch's membership at a step; `header` says which. False when dropped."""
        if not self._room(1):
            return False
        number = next(self._control_slots)
        self._control_next = number + 1
        _pack(
            self._control_memory,
            (number & self._control_mask) << _SHIFT,
            number + 1,
            header,
            request,
            q,
            kv,
            instance,
            step,
            last,
            cached,
            0,
            0,
            0,
            0,
            0,
            0,
            number + 1,
        )
        return True

    def snapshot(self, instance: int, step: int, requests: Iterable[int]) -> bool:
        """Writes all requests that take part in a step. False when dropped."""
        members = tuple(requests)
        return self._long_control(records.RecordType.SNAPSHOT, (instance, step, len(members), *members))

    def text(self, handle: int, kind: int, text: str, limit: int = records.MAX_TEXT) -> bool:
        """Writes what a handle stands for, cut to `limit` bytes. False when dropped."""
        data = text.encode("utf-8", "replace")[:limit]
        count = -(-len(data) // 8)
        words = struct.unpack(f"<{count}q", data.ljust(count * 8, b"\0"))
        return self._long_control(records.RecordType.TEXT, (handle, kind, len(data), *words))

    def _long_control(self, type_: int, words: tuple[int, ...]) -> bool:
        parts = -(-len(words) // records.PART_WORDS)
        if parts > _MOST_PARTS:
            self._drop()
            return False
        if not self._room(parts):
            return False
        words += (0,) * (parts * records.PART_WORDS - len(words))
        record = 0
        for part in range(parts):
            number = next(self._control_slots)
            self._control_next = number + 1
            record = record or number + 1
            _pack(
                self._control_memory,
                (number & self._control_mask) << _SHIFT,
                number + 1,
                records.header_word(type_, 0, part, parts),
                record,
                *words[part * records.PART_WORDS : (part + 1) * records.PART_WORDS],
                number + 1,
            )
        return True

    def _room(self, slots: int) -> bool:
        if self._control_next + slots - self._read[0] <= self._control_capacity:
            return True
        self._drop()
        return False

    def _drop(self) -> None:
        self.dropped[1] = self._control_next
        drops = next(self._drops)
        # A thread that was interrupted here must not set the count back; `max` could be interrupted again.
        if drops > self.dropped[0]:  # noqa: PLR1730
            self.dropped[0] = drops


_STEP_END = records.header_word(records.RecordType.STEP_END)
_NO_ATTRIBUTES = (0,) * MAX_ATTRIBUTES
_STEP_BEGIN_FIRST = records.header_word(records.RecordType.STEP_BEGIN, 0, 0, 2)
_STEP_BEGIN_SECOND = records.header_word(records.RecordType.STEP_BEGIN, 0, 1, 2)
_FIRST_PART = records.PART_WORDS - 5  # words of the composition in a step's first slot
_REST = (0,) * (records.PART_WORDS + _FIRST_PART - len(STEP_COMPOSITION))


RECORDER = Recorder()
os.register_at_fork(after_in_child=RECORDER.after_fork_in_child)
