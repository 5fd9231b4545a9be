"""Records of more than one slot: put together from their parts, which come in any order and in any batches. Pure.

Nearly always the parts of a record lie side by side in one batch; those are found with whole columns. The rest, where
two writers interleaved or a batch ended in between, goes part by part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stagetrace.instrument.records import PART_WORDS

if TYPE_CHECKING:
    from collections.abc import Iterator

Column = npt.NDArray[np.int64]

_MOST_OPEN = 4096  # records at a time; a recorder interleaves a handful


class Parts:
    """Long records of one ring whose parts have not all come yet."""

    def __init__(self) -> None:
        self._open: dict[int, list[Column | None]] = {}
        self._given_up = 0

    def add(self, record: int, part: int, parts: int, words: Column) -> Column | None:
        """The whole record's words when this was its last part."""
        pieces = self._open.setdefault(record, [None] * parts)
        if part >= len(pieces) or len(pieces) != parts:
            return None
        pieces[part] = words
        if any(piece is None for piece in pieces):
            if len(self._open) > _MOST_OPEN:
                del self._open[next(iter(self._open))]
                self._given_up += 1
            return None
        del self._open[record]
        return np.concatenate([piece for piece in pieces if piece is not None])

    def give_up(self, before: int) -> int:
        """Forgets records whose first part lies before a slot number; how many were given up since the last time."""
        old = [record for record in self._open if record <= before]
        for record in old:
            del self._open[record]
        given_up, self._given_up = self._given_up + len(old), 0
        return given_up

    def holds(self, records: Column) -> npt.NDArray[np.bool_]:
        """Which of these records have parts here."""
        if not self._open:
            return np.zeros(len(records), np.bool_)
        return np.isin(records, np.fromiter(self._open, np.int64, len(self._open)))

    def __len__(self) -> int:
        return len(self._open)


@dataclass(frozen=True)
class Whole:
    """A long record that was put together part by part."""

    type: int
    parts: int
    record: int  # its id: the number of its first slot
    number: int  # of the slot that completed it
    words: Column


@dataclass(frozen=True)
class LongSlots:
    """Slots of long records, in the order of the ring: a row each."""

    type: Column
    part: Column
    parts: Column
    number: Column  # of the slot
    words: npt.NDArray[np.int64]  # (rows, 13): the record's id, then PART_WORDS words of it

    def side_by_side(self, open_parts: Parts) -> tuple[Column, npt.NDArray[np.bool_]]:
        """Rows at which a record begins whose parts all follow it, and which rows belong to no such record."""
        count = len(self.type)
        ids = self.words[:, 0]
        begins = np.ones(count, np.bool_)
        begins[1:] = (
            (ids[1:] != ids[:-1])
            | (self.type[1:] != self.type[:-1])
            | (self.parts[1:] != self.parts[:-1])
            | (self.part[1:] != self.part[:-1] + 1)
        )
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=count)
        whole = (self.part[starts] == 0) & (lengths == self.parts[starts]) & ~open_parts.holds(ids[starts])
        return starts[whole], ~np.repeat(whole, lengths)

    def one_by_one(self, rows: Column, open_parts: Parts) -> Iterator[Whole]:
        """Takes in these rows' parts; every record that is whole then."""
        for row in rows.tolist():
            record, parts = int(self.words[row, 0]), int(self.parts[row])
            words = open_parts.add(record, int(self.part[row]), parts, self.words[row, 1:])
            if words is not None:
                yield Whole(int(self.type[row]), parts, record, int(self.number[row]), words)

    def pieces(self, starts: Column, parts: int) -> npt.NDArray[np.int64]:
        """The words of records of so many parts that lie side by side from these rows on."""
        rows = starts[:, None] + np.arange(parts)
        return self.words[rows, 1:].reshape(len(starts), parts * PART_WORDS)
