"""Whether a session's books are right: what was written into the rings is in it once, or is counted as lost."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stagetrace.exporters.collector import batches_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from stagetrace.exporters.session import Session

RINGS = ("control", "detail")


@dataclass
class Book:
    """One ring: the numbers of its slots that are in the session, and what the manifest says."""

    role: str
    numbers: npt.NDArray[np.int64]
    read: int
    overwritten: int
    dropped: int
    other: int  # torn, unfinished, corrupt
    written: int  # slots up to the last cursor


def books(session: Session) -> dict[tuple[str, str], Book]:
    """The books of a session by role and ring, each held against itself: every slot number has exactly one fate."""
    found: dict[tuple[int, str], list[npt.NDArray[np.int64]]] = defaultdict(list)
    cursors: dict[str, list[int]] = {}
    for part in session.raw_parts():
        for commit, table in session.read_raw(part):
            cursors |= {name: mark.cursors for name, mark in commit.rings.items()}
            for batch in batches_of(commit, table):
                for ring, slots in zip(RINGS, (batch.control, batch.detail), strict=True):
                    found[batch.process, ring].append(slots["first"].astype(np.int64))
    manifest = session.read_manifest()
    losses = {(one.process, one.ring): one for one in manifest.losses}
    made = {}
    for process in manifest.processes:
        for place, ring in enumerate(RINGS):
            loss = losses[process.key, ring]
            numbers = np.concatenate(found.get((process.key, ring), [np.empty(0, np.int64)]))
            other = loss.torn + loss.unfinished + loss.corrupt
            written = cursors[process.ring][place]
            book = Book(process.role, numbers, loss.read, loss.overwritten, loss.dropped, other, written)
            assert len(np.unique(numbers)) == len(numbers), f"{process.role} {ring}: a slot is in the session twice"
            assert len(numbers) == loss.read, f"{process.role} {ring}: {len(numbers)} slots there, {loss.read} counted"
            missing = written - len(numbers)
            assert missing == loss.overwritten + other, f"{process.role} {ring}: {missing} slots are not there: {loss}"
            made[process.role, ring] = book
    return made
