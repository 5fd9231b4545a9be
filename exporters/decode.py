"""From slots to records: columns of single-slot records, and long records put together from their parts. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stagetrace.instrument import records
from stagetrace.instrument.records import Change, Event, RecordType
from stagetrace.instrument.stages import BY_ID, STEP_COMPOSITION, Kind

from .drain import Slots

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Column = npt.NDArray[np.int64]

_KNOWN: dict[int, npt.NDArray[np.bool_]] = {}  # record type -> which values of the header's stage field are valid
for _type, _values in (
    (RecordType.SEGMENT, [stage.id for stage in BY_ID.values() if stage.kind is not Kind.STATE]),
    (RecordType.STATE, [stage.id for stage in BY_ID.values() if stage.kind is Kind.STATE]),
    (RecordType.EVENT, [*Event]),
    (RecordType.MEMBER, [*Change]),
):
    _KNOWN[_type] = np.zeros(1 << 16, np.bool_)
    _KNOWN[_type][_values] = True
_LONG = (RecordType.STEP_BEGIN, RecordType.SNAPSHOT, RecordType.TEXT)
_DETAIL = (RecordType.SEGMENT, RecordType.STEP_BEGIN, RecordType.STEP_END)
_TIMED = (RecordType.SEGMENT, RecordType.STATE, RecordType.EVENT, RecordType.STEP_END)  # ns is their second word
_STEP_WORDS = 5 + len(STEP_COMPOSITION)
_STEP_PARTS = -(-_STEP_WORDS // records.PART_WORDS)
_REACH = 1 << 16  # slots; a record whose parts lie further apart is given up


@dataclass
class Records:
    """Decoded records of one batch. `rows` of a type: one tuple a record, (sequence, stage, words...)."""

    segments: list[tuple[int, ...]] = field(default_factory=list)
    controls: list[tuple[int, int, int, tuple[int, ...]]] = field(default_factory=list)  # sequence, type, stage, words
    steps: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)  # sequence, type, words; in order
    corrupt: int = 0
    incomplete: int = 0


class Parts:
    """Long records of one ring whose parts have not all come yet."""

    def __init__(self) -> None:
        self._open: dict[int, list[tuple[int, ...] | None]] = {}

    def add(self, part: int, parts: int, words: tuple[int, ...]) -> tuple[int, ...] | None:
        """The whole record when this was its last part. Its words without the record's id."""
        record = self._open.setdefault(words[0], [None] * parts)
        if part >= len(record) or len(record) != parts:
            return None
        record[part] = words[1:]
        if any(piece is None for piece in record):
            return None
        del self._open[words[0]]
        return tuple(word for piece in record if piece is not None for word in piece)

    def give_up(self, before: int) -> int:
        """Forgets records whose first part lies before a slot number; how many there were."""
        old = [record for record in self._open if record <= before]
        for record in old:
            del self._open[record]
        return len(old)

    def __len__(self) -> int:
        return len(self._open)


def decode(control: Slots, detail: Slots, control_parts: Parts, detail_parts: Parts) -> Records:
    """The records in the slots of one process's batch; the parts of unfinished long records stay in `*_parts`."""
    found = Records()
    in_control = [kind for kind in RecordType if kind not in _DETAIL]
    for kind, what, i, k, row, number in _rows(control, in_control, found):
        if kind not in _LONG:
            found.controls.append((number, kind, what, tuple(row)))
        elif (whole := _join(kind, i, k, row, control_parts, found)) is not None:
            found.controls.append((row[0], kind, what, whole))
    for kind, what, i, k, row, number in _rows(detail, _DETAIL, found):
        if kind == RecordType.SEGMENT:
            found.segments.append((number, what, *row))
        elif kind == RecordType.STEP_END:
            found.steps.append((number, kind, tuple(row)))
        elif (whole := _join(kind, i, k, row, detail_parts, found)) is not None:
            found.steps.append((number, kind, whole[:_STEP_WORDS]))
    for slots, open_parts in ((control, control_parts), (detail, detail_parts)):
        if len(slots):
            found.incomplete += open_parts.give_up(int(slots["first"][-1]) - _REACH)
    return found


def _rows(slots: Slots, kinds: Sequence[int], found: Records) -> Iterator[tuple[Any, ...]]:
    """Type, stage, part, parts, words and sequence of the valid slots; the others are counted as corrupt."""
    header, words, sequence = slots["header"].astype(np.int64), slots["words"], slots["first"].astype(np.int64)
    type_, part, parts, stage = header & 255, header >> 8 & 255, header >> 16 & 255, header >> 32 & 0xFFFF
    long = np.isin(type_, _LONG)
    valid = np.isin(type_, kinds) & (part < parts) & (long | (parts == 1))
    valid &= ~long | np.where(part == 0, words[:, 0] == sequence, (words[:, 0] > 0) & (words[:, 0] < sequence))
    for kind, known in _KNOWN.items():
        valid &= (type_ != kind) | known[stage]
    valid &= ~np.isin(type_, _TIMED) | (words[:, 1] >= 0)
    valid &= (type_ != RecordType.SEGMENT) | (words[:, 2] >= words[:, 1])
    found.corrupt += int((~valid).sum())
    return zip(*(column[valid].tolist() for column in (type_, stage, part, parts, words, sequence)), strict=True)


def _join(
    kind: int, part: int, parts: int, row: list[int], open_parts: Parts, found: Records
) -> tuple[int, ...] | None:
    """The whole record when this was its last part; one whose length or times cannot be is counted as corrupt."""
    words = open_parts.add(part, parts, tuple(row))
    if words is None:
        return None
    if kind == RecordType.STEP_BEGIN:
        good = parts == _STEP_PARTS and 0 <= words[1] <= words[2]
    else:
        room = len(words) - 3
        good = 0 <= words[2] <= (room if kind == RecordType.SNAPSHOT else room * 8)
    found.corrupt += not good
    return words if good else None


def text_of(words: tuple[int, ...]) -> tuple[int, int, str]:
    """Handle, kind and string of a text record."""
    handle, kind, length, *rest = words
    data = np.array(rest, "<i8").tobytes()[: max(0, min(length, records.MAX_TEXT))]
    return handle, kind, data.decode("utf-8", "replace")
