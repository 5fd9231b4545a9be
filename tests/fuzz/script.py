"""Decisions read from bytes: what lets a fuzzer's bytes say which file is altered where, and to what.

A file of the corpus is such bytes. The order of the decisions in a target is therefore part of the corpus: a decision
that is added in the middle gives every input another meaning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

_SPECIAL = (
    0,
    1,
    2,
    255,
    256,
    1 << 16,
    1 << 31,
    1 << 32,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
    (1 << 64) - 128,
)


class Script:
    """Reads decisions from the front of some bytes; when they are used up every further decision is the first one."""

    def __init__(self, data: bytes):
        self._data = data
        self._at = 0

    @property
    def more(self) -> bool:
        """Whether there are bytes left to decide with."""
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """The next bytes as they are; fewer at the end."""
        piece = self._data[self._at : self._at + count]
        self._at += count
        return piece

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))

    def below(self, limit: int) -> int:
        """A number from 0 to `limit` - 1, of as few bytes as hold it."""
        size = (max(limit - 1, 1).bit_length() + 7) // 8
        return int.from_bytes(self.take(size), "little") % limit

    def flag(self) -> bool:
        """Yes or no; no when the bytes are used up."""
        return self.below(256) & 1 == 1

    def one_of(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[self.below(len(choices))]

    def number(self) -> int:
        """An unsigned number of 64 bits: small, of two or eight bytes, or one at which types end."""
        kind = self.below(4)
        if kind == 0:
            return self.below(256)
        if kind == 1:
            return self.below(1 << 16)
        if kind == 2:
            return self.one_of(_SPECIAL)
        return int.from_bytes(self.take(8).ljust(8, b"\0"), "little")

    def signed(self) -> int:
        """The same bits as a signed number."""
        number = self.number()
        return number - (1 << 64) if number >> 63 else number
