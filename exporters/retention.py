"""How much of a session is kept: by age and by size, as `--keep 24h,10GB` says. Whole commits go, the oldest first."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .parts import Part

DEFAULT = "10GB"
FOREVER = "all"
_AGES_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_MOST = 1e9
_LIMIT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Keep:
    """The bounds of a session on disk; None is without bound."""

    age_s: float | None = None
    size: int | None = None  # bytes, of raw records and tables


def parse_keep(text: str) -> Keep:
    """The bounds that a text such as `24h`, `10GB`, `24h,10GB` or `all` names. Raises ValueError, which says how."""
    age: float | None = None
    size: int | None = None
    for word in text.split(","):
        if word.strip() == FOREVER:
            continue
        found = _LIMIT.fullmatch(word.strip())
        number, unit = (float(found[1]), found[2]) if found else (0.0, "")
        number = number if number < _MOST else 0.0
        if number > 0 and unit in _AGES_S and age is None:
            age = number * _AGES_S[unit]
        elif number > 0 and unit.upper() in _SIZES and size is None:
            size = int(number * _SIZES[unit.upper()])
        else:
            raise ValueError(
                f"{word.strip()!r} is no bound: write an age (90m, 24h, 7d), a size (500MB, 10GB), or both"
            )
    return Keep(age, size)


def last_to_remove(sizes: Sequence[tuple[Part, int]], ages_s: Sequence[float], keep: Keep) -> int:
    """The number of the last commit to remove, 0 for none. Pure.

    `sizes` are the parts of raw records with their bytes, oldest first; `ages_s` how long ago each was committed. The
    newest part always stays.
    """
    total = sum(size for _, size in sizes)
    last = 0
    for (part, size), age_s in zip(sizes[:-1], ages_s[:-1], strict=True):
        old = keep.age_s is not None and age_s > keep.age_s
        large = keep.size is not None and total > keep.size
        if not (old or large):
            break
        total -= size
        last = part.last
    return last
