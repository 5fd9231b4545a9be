"""What the layer level of every engine knows of the rank that it runs on, and names that it makes of an engine's."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

_AFTER_LAYERS = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)(?:\.|$)")
_ANY_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


class RankStep(Protocol):
    """The step that this process's rank is in. A layer's hook records nothing outside one: dummy runs, captures."""

    rank: int
    instance: int
    step: int  # 0: none


def layer_index(name: str) -> int:
    """The layer that a module's name says it is in, from 0; -1 where it names none.

    The number behind `layers` (or what some models call them), else the first one. Pure.
    """
    found = _AFTER_LAYERS.search(name) or _ANY_NUMBER.search(name)
    return int(found[1]) if found else -1


def ranges(numbers: Iterable[int]) -> str:
    """Integers in few words: 0-3,8 for 0, 1, 2, 3, 8. Pure."""
    runs = groupby(enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0])
    words = []
    for _, run in runs:
        members = [number for _, number in run]
        words.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(words)
