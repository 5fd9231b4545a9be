"""From slots to columns: each type's records of a batch as arrays of words; what cannot be is counted. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stagetrace.instrument import records
from stagetrace.instrument.records import COUNT_BYTES, EXPERTS_HEAD, PART_WORDS, SLOT_WORDS, Change, Event, RecordType
from stagetrace.instrument.stages import BY_ID, STEP_COMPOSITION, Kind

from .long_records import Column, LongSlots, Parts, Whole

if TYPE_CHECKING:
    from ..drain import Slots

Words = npt.NDArray[np.int64]  # (words, records): a row is one word of all records
Flags = npt.NDArray[np.bool_]

STEP_WORDS = 5 + len(STEP_COMPOSITION)
_STEP_PARTS = -(-STEP_WORDS // PART_WORDS)
_EXPERTS_WORDS = EXPERTS_HEAD.size // 8
_LARGEST_SMALL = 1 << 31
_REACH = 1 << 16  # slots; a record whose parts lie further apart is given up
_TYPES = 16  # of the table below; a type beyond it is none

_LONG_TYPES = (RecordType.STEP_BEGIN, RecordType.SNAPSHOT, RecordType.TEXT, RecordType.EXPERTS)
_DETAIL_TYPES = (RecordType.SEGMENT, RecordType.STEP_BEGIN, RecordType.STEP_END, RecordType.EXPERTS)
_TIMED_TYPES = (RecordType.SEGMENT, RecordType.STATE, RecordType.EVENT, RecordType.STEP_END)  # ns: their second word


def _types(*kinds: int) -> Flags:
    """Which values of the header's lowest byte are one of these types."""
    found = np.zeros(256, np.bool_)
    found[[*kinds]] = True
    return found


_LONG, _TIMED, _SEGMENT = _types(*_LONG_TYPES), _types(*_TIMED_TYPES), _types(RecordType.SEGMENT)
_IN_DETAIL = _types(*_DETAIL_TYPES)
_IN_CONTROL = _types(*(kind for kind in RecordType if kind not in _DETAIL_TYPES))

_KNOWN = np.zeros((_TYPES, 1 << 16), np.bool_)  # record type -> which values of the header's stage field are valid
for _type in RecordType:
    _KNOWN[_type] = True
for _type, _values in (
    (RecordType.SEGMENT, [stage.id for stage in BY_ID.values() if stage.kind is not Kind.STATE]),
    (RecordType.STATE, [stage.id for stage in BY_ID.values() if stage.kind is Kind.STATE]),
    (RecordType.EVENT, [*Event]),
    (RecordType.MEMBER, [*Change]),
):
    _KNOWN[_type] = False
    _KNOWN[_type, _values] = True


@dataclass(frozen=True)
class Rows:
    """Records of one type, in the order of their slots."""

    number: Column  # of the slot that completed it, from 1, ascending; of a record of one slot its sequence number
    stage: Column  # the header word's stage, event or change
    words: Words

    def __len__(self) -> int:
        return len(self.number)


@dataclass(frozen=True)
class Snapshot:
    """All requests in a step."""

    number: int  # of the slot that completed it, from 1
    sequence: int  # of its first slot
    instance: int
    step: int
    requests: list[int]


@dataclass(frozen=True)
class Experts:
    """How many tokens went to each expert, of several layers and steps of models with the same number of experts."""

    heads: npt.NDArray[np.int64]  # (rows, 5): instance, step, rank, layer, tokens
    counts: npt.NDArray[np.int64]  # (rows, experts)


@dataclass(frozen=True)
class TextRecord:
    """What a handle stands for."""

    number: int  # of the slot that completed it, from 1
    handle: int
    kind: int
    text: str


def _none(words: int = SLOT_WORDS) -> Rows:
    return Rows(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((words, 0), np.int64))


@dataclass
class Records:
    """Decoded records of one batch."""

    states: Rows = field(default_factory=_none)
    events: Rows = field(default_factory=_none)
    members: Rows = field(default_factory=_none)
    snapshots: list[Snapshot] = field(default_factory=list)
    texts: list[TextRecord] = field(default_factory=list)
    segments: Rows = field(default_factory=_none)
    step_begins: Rows = field(default_factory=lambda: _none(STEP_WORDS))
    step_ends: Rows = field(default_factory=_none)
    experts: list[Experts] = field(default_factory=list)
    corrupt: int = 0
    incomplete: int = 0

    def __len__(self) -> int:
        short = (self.states, self.events, self.members, self.segments, self.step_begins, self.step_ends)
        return (
            sum(map(len, short)) + len(self.snapshots) + len(self.texts) + sum(len(one.heads) for one in self.experts)
        )


def decode(control: Slots, detail: Slots, control_parts: Parts, detail_parts: Parts) -> Records:
    """The records in the slots of one process's batch; the parts of unfinished long records stay in `*_parts`."""
    found = Records()
    if len(control):
        slots = _Valid(control, _IN_CONTROL)
        found.corrupt += slots.corrupt
        found.states, found.events, found.members = (
            slots.rows(kind) for kind in (RecordType.STATE, RecordType.EVENT, RecordType.MEMBER)
        )
        _join_control(slots.long(), control_parts, found)
        found.incomplete += control_parts.give_up(_reach(control))
    if len(detail):
        slots = _Valid(detail, _IN_DETAIL)
        found.corrupt += slots.corrupt
        found.segments, found.step_ends = slots.rows(RecordType.SEGMENT), slots.rows(RecordType.STEP_END)
        _join_detail(slots.long(), detail_parts, found)
        found.incomplete += detail_parts.give_up(_reach(detail))
    return found


def _reach(slots: Slots) -> int:
    return int(slots["first"][-1]) - _REACH


class _Valid:
    """The slots of a ring that a recorder can have written."""

    def __init__(self, slots: Slots, types: Flags):
        header, self._words = slots["header"].astype(np.int64), slots["words"]
        self._number = slots["first"].astype(np.int64)
        self._type, self._stage = header & 255, header >> 32 & 0xFFFF
        self._part, self._parts = header >> 8 & 255, header >> 16 & 255
        first, second, third = (self._words[:, i] for i in range(3))
        self._long = long = _LONG[self._type]
        valid = types[self._type] & (self._part < self._parts) & (long | (self._parts == 1))
        valid &= _KNOWN[np.where(self._type < _TYPES, self._type, 0), self._stage]
        # A long record's id is the number of its first slot.
        own = np.where(self._part == 0, first == self._number, (first > 0) & (first < self._number))
        valid &= ~long | own
        valid &= ~_TIMED[self._type] | (second >= 0)
        valid &= ~_SEGMENT[self._type] | (third >= second)
        self._valid = valid
        self.corrupt = len(valid) - int(np.count_nonzero(valid))

    def rows(self, kind: RecordType) -> Rows:
        """The records of a type of one slot."""
        at = np.flatnonzero(self._valid & (self._type == kind))
        if (np.diff(self._number[at]) < 0).any():  # never so in a ring
            at = at[np.argsort(self._number[at], kind="stable")]
        return Rows(self._number[at], self._stage[at], np.ascontiguousarray(self._words[at].T))

    def long(self) -> LongSlots:
        """The parts of records of more than one slot."""
        at = np.flatnonzero(self._valid & self._long)
        return LongSlots(self._type[at], self._part[at], self._parts[at], self._number[at], self._words[at])


def _join_detail(slots: LongSlots, open_parts: Parts, found: Records) -> None:
    """Begins of steps, and counts of experts."""
    starts, rest = slots.side_by_side(open_parts)
    late = [*slots.one_by_one(np.flatnonzero(rest), open_parts)]
    of_steps = slots.type[starts] == RecordType.STEP_BEGIN
    _join_steps(slots, starts[of_steps], [one for one in late if one.type == RecordType.STEP_BEGIN], found)
    _join_experts(slots, starts[~of_steps], [one for one in late if one.type != RecordType.STEP_BEGIN], found)


def _join_steps(slots: LongSlots, starts: Column, put_together: list[Whole], found: Records) -> None:
    """Begins of steps; one whose length or times cannot be is counted as corrupt."""
    whole = starts[slots.parts[starts] == _STEP_PARTS]
    late = [record for record in put_together if record.parts == _STEP_PARTS]
    found.corrupt += len(starts) - len(whole) + len(put_together) - len(late)
    words = slots.pieces(whole, _STEP_PARTS)[:, :STEP_WORDS]
    number = slots.number[whole + _STEP_PARTS - 1]
    if late:
        number = np.concatenate([number, np.array([record.number for record in late], np.int64)])
        words = np.concatenate([words, np.stack([record.words[:STEP_WORDS] for record in late])])
    order = np.argsort(number, kind="stable")
    number, words = number[order], words[order]
    good = (words[:, 1] >= 0) & (words[:, 2] >= words[:, 1])
    found.corrupt += len(good) - int(np.count_nonzero(good))
    found.step_begins = Rows(
        number[good], np.zeros(np.count_nonzero(good), np.int64), np.ascontiguousarray(words[good].T)
    )


def _join_experts(slots: LongSlots, starts: Column, put_together: list[Whole], found: Records) -> None:
    """Counts of experts, those of one length together; one whose numbers cannot be is counted as corrupt."""
    pieces = [slots.pieces(starts[slots.parts[starts] == parts], parts) for parts in _distinct(slots.parts[starts])]
    for words in (*pieces, *(record.words[None, :] for record in put_together)):
        for experts, width in np.unique(words[:, 5:7], axis=0).tolist():
            rows = words[(words[:, 5] == experts) & (words[:, 6] == width)]
            fits = width in COUNT_BYTES and 0 < experts * width <= 8 * (rows.shape[1] - _EXPERTS_WORDS)
            good = (rows[:, :5] >= 0).all(axis=1) & (rows[:, 2:4] < _LARGEST_SMALL).all(axis=1) & fits
            found.corrupt += len(rows) - int(np.count_nonzero(good))
            if not good.any():
                continue
            rows = np.ascontiguousarray(rows[good])
            counts = rows[:, _EXPERTS_WORDS:].copy().view(f"<u{width}")[:, :experts]
            found.experts.append(Experts(rows[:, :5], counts.astype(np.int64)))


def _distinct(values: Column) -> list[int]:
    return [int(value) for value in np.unique(values)]


def _join_control(slots: LongSlots, open_parts: Parts, found: Records) -> None:
    """Snapshots and texts; one whose length cannot be is counted as corrupt."""
    starts, rest = slots.side_by_side(open_parts)
    pieces = np.ascontiguousarray(slots.words[:, 1:])
    data = memoryview(pieces.tobytes())
    heads = pieces[starts, :3]
    counts = slots.parts[starts]
    room = counts * PART_WORDS - 3
    room[slots.type[starts] == RecordType.TEXT] *= 8
    good = (heads[:, 2] >= 0) & (heads[:, 2] <= room)
    found.corrupt += len(good) - int(np.count_nonzero(good))
    for start, parts, number, kind, sequence, (handle, what, length) in zip(
        starts[good].tolist(),
        counts[good].tolist(),
        slots.number[starts + counts - 1][good].tolist(),
        slots.type[starts][good].tolist(),
        slots.words[starts, 0][good].tolist(),
        heads[good].tolist(),
        strict=True,
    ):
        if kind == RecordType.TEXT:
            begin = start * PART_WORDS * 8 + 24
            found.texts.append(TextRecord(number, handle, what, _text(data[begin : begin + length])))
        else:
            found.snapshots.append(_snapshot(number, sequence, pieces[start : start + parts].ravel()))
    late = [*slots.one_by_one(np.flatnonzero(rest), open_parts)]
    for record in late:
        handle, what, length = record.words[:3].tolist()
        if not 0 <= length <= (len(record.words) - 3) * (8 if record.type == RecordType.TEXT else 1):
            found.corrupt += 1
        elif record.type == RecordType.TEXT:
            text = _text(memoryview(record.words[3:].tobytes())[:length])
            found.texts.append(TextRecord(record.number, handle, what, text))
        else:
            found.snapshots.append(_snapshot(record.number, record.record, record.words))
    if late:
        found.snapshots.sort(key=lambda one: one.number)
        found.texts.sort(key=lambda one: one.number)


def _text(data: memoryview) -> str:
    return str(data[: records.MAX_TEXT], "utf-8", "replace")


def _snapshot(number: int, sequence: int, words: Column) -> Snapshot:
    return Snapshot(number, sequence, int(words[0]), int(words[1]), words[3 : 3 + int(words[2])].tolist())
