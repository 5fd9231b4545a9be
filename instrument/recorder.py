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
from typing import TYPE_CHECKING, NamedTuple, Protocol

from . import records
from .identity import claim_identity
from .ids import handle as hash_handle
from .levels import maximum_level, session_level
from .ring import Ring
from .stages import STEP_COMPOSITION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

log = logging.getLogger("stagetrace")

_SHIFT = records.SLOT_SIZE.bit_length() - 1
_MOST_PARTS = 255  # of a record: the header word has a byte for it
_MARGIN = 64  # control slots kept free, so that writers that race past the check still do not overwrite

STEP_END = records.header_word(records.RecordType.STEP_END)
_STEP_BEGIN_1 = records.header_word(records.RecordType.STEP_BEGIN, 0, 0, 2)
_STEP_BEGIN_2 = records.header_word(records.RecordType.STEP_BEGIN, 0, 1, 2)
_EXPERTS = int(records.RecordType.EXPERTS)  # the header word of a record's part, but for part and parts
_EXPERTS_ALONE = records.header_word(records.RecordType.EXPERTS)
_PART_BYTES = 8 * records.PART_WORDS
_FIRST_BYTES = 8 * (records.PART_WORDS - 5)  # of the composition, in a step's first slot
_FIRST_SLOT = struct.Struct(f"<QQQ5q{_FIRST_BYTES}sQ")

now = time.monotonic_ns


class Recorder:
    """Writes records into this process's rings. Everything is safe to call when the recorder is closed.

    What writes single records (`segment`, `put`, `step_begin`, `step_end`, `experts`, `state`, `member`) are functions
    that stay the same for the process's life: a hook keeps those that it calls. They have the rings in their closures,
    which is faster than looking them up in an object.
    """

    def __init__(self) -> None:
        self.key = b""
        self.ring: Ring | None = None
        self._pid = 0
        self._opened: list[Callable[[], None]] = []
        self.segment, self.put, self.step_begin, self.step_end, self.experts, self._aim_detail = _detail_writers()
        self.state, self.member, self._long, self._aim_control = _control_writers()
        self._close()

    def _close(self) -> None:
        # Hooks that are in the middle of a call when this happens (a fork) still write: into the scratch slot.
        self.level: bytes | memoryview = bytes(1)
        self.epoch: memoryview = memoryview(bytes(4)).cast("I")  # changes with every switch of the level
        scratch = memoryview(bytearray(records.SLOT_SIZE))
        self.dropped = memoryview(bytearray(16)).cast("Q")  # how many; before which slot
        self.errors = memoryview(bytearray(records.MAX_HOOKS * 8)).cast("Q")
        self._aim_detail(scratch)
        self._aim_control(scratch, memoryview(bytes(8)).cast("Q"), self.dropped, 1 << 62)

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
        self.dropped = memory[records.CONTROL_DROPPED_OFFSET :][:16].cast("Q")
        self.errors = memory[records.ERRORS_OFFSET : records.HEADER_SIZE].cast("Q")
        self._aim_detail(memory[detail:])
        read = memory[records.CONTROL_READ_OFFSET :][:8].cast("Q")
        self._aim_control(memory[control:detail], read, self.dropped, ring.control_slots - _MARGIN)
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
            os.close(self.ring.lock)
            self.ring = None

    def handle(self, text: str) -> int:
        """The integer that stands for `text` in this session's records."""
        return hash_handle(self.key, text)

    # Long control records

    def snapshot(self, instance: int, step: int, requests: Iterable[int]) -> bool:
        """Writes all requests that take part in a step. False when dropped."""
        members = tuple(requests)
        return self._long(records.RecordType.SNAPSHOT, (instance, step, len(members), *members))

    def text(self, handle: int, kind: int, text: str, limit: int = records.MAX_TEXT) -> bool:
        """Writes what a handle stands for, cut to `limit` bytes. False when dropped."""
        data = text.encode("utf-8", "replace")[:limit]
        count = -(-len(data) // 8)
        words = struct.unpack(f"<{count}q", data.ljust(count * 8, b"\0"))
        return self._long(records.RecordType.TEXT, (handle, kind, len(data), *words))


# Detail ring: overwrites the oldest


class Segment(Protocol):
    """Writes one segment of the thread that calls it, with up to three attributes.

    `header` is `records.header_word(SEGMENT, stage)`, times are ns of the monotonic clock.
    """

    def __call__(  # noqa: D102
        self,
        header: int,
        begin: int,
        end: int,
        instance: int,
        step: int,
        a0: int = 0,
        a1: int = 0,
        a2: int = 0,
    ) -> None: ...


class DetailWriters(NamedTuple):
    """The functions that write into the detail ring, and the one that says where it is."""

    segment: Segment
    put: Callable[[bytes, int, int, bytes], None]
    step_begin: Callable[[int, int, int, int, Sequence[int]], None]
    step_end: Callable[[int, int, int], None]
    experts: Callable[[int, int, int, int, int, bytes, int], bool]
    aim: Callable[[memoryview], None]


def _detail_writers() -> DetailWriters:
    memory = memoryview(bytearray(records.SLOT_SIZE))
    mask = 0
    slots = itertools.count()
    pack_short, pack_packed = records.SHORT_SLOT.pack_into, records.PACKED_SLOT.pack_into
    pack_composition = struct.Struct(f"<{len(STEP_COMPOSITION)}q").pack
    pack_first, pack_part = _FIRST_SLOT.pack_into, records.PART_SLOT.pack_into

    def aim(at: memoryview) -> None:
        nonlocal memory, mask, slots
        memory, mask, slots = at, len(at) // records.SLOT_SIZE - 1, itertools.count()

    def segment(
        header: int, begin: int, end: int, instance: int, step: int, a0: int = 0, a1: int = 0, a2: int = 0
    ) -> None:
        number = next(slots)
        at, number = (number & mask) << _SHIFT, number + 1
        pack_short(memory, at, number, header, get_ident(), begin, end, instance, step, a0, a1, a2, number)

    def put(head: bytes, begin: int, end: int, tail: bytes) -> None:
        """Writes a segment of which `records.HEAD` and one of `records.TAILS` are packed already.

        For several of one thread and step this takes two thirds of the time.
        """
        number = next(slots)
        at, number = (number & mask) << _SHIFT, number + 1
        pack_packed(memory, at, number, head, begin, end, tail, number)

    def step_begin(begin: int, scheduled: int, instance: int, step: int, composition: Sequence[int]) -> None:
        """Writes a step's begin, with what is in its batch in the order of stages.STEP_COMPOSITION."""
        batch = pack_composition(*composition)
        number = next(slots)
        at, first = (number & mask) << _SHIFT, number + 1
        pack_first(memory, at, first, _STEP_BEGIN_1, first, get_ident(), begin, scheduled, instance, step, batch, first)
        number = next(slots)
        at, number = (number & mask) << _SHIFT, number + 1
        pack_part(memory, at, number, _STEP_BEGIN_2, first, batch[_FIRST_BYTES:], number)

    def step_end(end: int, instance: int, step: int) -> None:
        """Writes a step's end."""
        put(records.HEAD.pack(STEP_END, get_ident()), end, 0, records.TAILS[0].pack(instance, step))

    def experts(instance: int, step: int, rank: int, layer: int, tokens: int, counts: bytes, width: int) -> bool:
        """Writes how many of `tokens` a layer sent to each expert; False where there are too many experts for a record.

        `counts` has an unsigned little-endian number of `width` bytes for each expert.
        """
        data = records.EXPERTS_HEAD.pack(instance, step, rank, layer, tokens, len(counts) // width, width) + counts
        if len(data) <= _PART_BYTES:
            number = next(slots)
            at, number = (number & mask) << _SHIFT, number + 1
            pack_part(memory, at, number, _EXPERTS_ALONE, number, data, number)
            return True
        parts = -(-len(data) // _PART_BYTES)
        if parts > _MOST_PARTS:
            return False
        first = 0
        for part in range(parts):
            number = next(slots)
            at, number = (number & mask) << _SHIFT, number + 1
            first = first or number
            header = _EXPERTS | part << 8 | parts << 16
            pack_part(memory, at, number, header, first, data[part * _PART_BYTES : (part + 1) * _PART_BYTES], number)
        return True

    return DetailWriters(segment, put, step_begin, step_end, experts, aim)


# Control ring: drops the newest when the collector has not made room


class State(Protocol):
    """Writes that a request enters a state, or one of its events; `header` says which. False when dropped."""

    def __call__(  # noqa: D102
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
    ) -> bool: ...


class Member(Protocol):
    """Writes a change of the batch's membership at a step; `header` says which. False when dropped."""

    def __call__(  # noqa: D102
        self, header: int, request: int, q: int, kv: int, instance: int, step: int, last: int = 0, cached: int = 0
    ) -> bool: ...


class ControlWriters(NamedTuple):
    """The functions that write into the control ring, and the one that says where it is."""

    state: State
    member: Member
    long: Callable[[int, tuple[int, ...]], bool]
    aim: Callable[[memoryview, memoryview, memoryview, int], None]


def _control_writers() -> ControlWriters:
    memory = memoryview(bytearray(records.SLOT_SIZE))
    read = dropped = memoryview(bytearray(16)).cast("Q")  # slots that the collector has committed; see Recorder.dropped
    mask = capacity = following = 0  # `following`: the number after that of the last slot, or a little less
    slots = itertools.count()
    drops = itertools.count(1)
    pack_short, pack_state = records.SHORT_SLOT.pack_into, records.STATE_SLOT.pack_into
    pack_part = records.PART_SLOT.pack_into

    def aim(at: memoryview, read_word: memoryview, dropped_words: memoryview, most: int) -> None:
        nonlocal memory, read, dropped, mask, capacity, following, slots, drops
        memory, mask, read, dropped = at, len(at) // records.SLOT_SIZE - 1, read_word, dropped_words
        capacity, following, slots, drops = most, 0, itertools.count(), itertools.count(1)

    def state(
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
        nonlocal following
        if following - read[0] >= capacity:
            return drop()
        number = next(slots)
        at, number = (number & mask) << _SHIFT, number + 1
        following = number
        pack_state(memory, at, number, header, get_ident(), time_ns, request, instance, step, a0, a1, a2, a3, number)
        return True

    def member(
        header: int, request: int, q: int, kv: int, instance: int, step: int, last: int = 0, cached: int = 0
    ) -> bool:
        nonlocal following
        if following - read[0] >= capacity:
            return drop()
        number = next(slots)
        at, number = (number & mask) << _SHIFT, number + 1
        following = number
        pack_short(memory, at, number, header, request, q, kv, instance, step, last, cached, 0, number)
        return True

    def long(type_: int, words: tuple[int, ...]) -> bool:
        """Writes a record of any length in as many slots as it takes. False when dropped."""
        nonlocal following
        parts = -(-len(words) // records.PART_WORDS)
        if parts > _MOST_PARTS or following + parts - read[0] > capacity:
            return drop()
        data = struct.pack(f"<{len(words)}q", *words)
        first = 0
        for part in range(parts):
            number = next(slots)
            at, number = (number & mask) << _SHIFT, number + 1
            following = number
            first = first or number
            header = records.header_word(type_, 0, part, parts)
            pack_part(memory, at, number, header, first, data[part * _PART_BYTES : (part + 1) * _PART_BYTES], number)
        return True

    def drop() -> bool:
        dropped[1] = following
        count = next(drops)
        # A thread that was interrupted here must not set the count back; `max` could be interrupted again.
        if count > dropped[0]:  # noqa: PLR1730
            dropped[0] = count
        return False

    return ControlWriters(state, member, long, aim)


RECORDER = Recorder()
os.register_at_fork(after_in_child=RECORDER.after_fork_in_child)
