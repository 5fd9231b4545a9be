"""What an engine's processes did until they were ready, as a pure function from frames to dataclasses. Times in ns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from stagetrace.instrument.stages import BY_ID, BY_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stagetrace.exporters.session import Process

_STARTUP = BY_NAME["startup"].id
_THREAD = ["process", "thread"]
UNATTRIBUTED = "unattributed"  # of a start-up: in none of its parts


@dataclass(frozen=True)
class Piece:
    """One part of a process's start-up."""

    stage: str
    count: int
    total_ns: int  # with what is inside
    self_ns: int  # without


@dataclass(frozen=True)
class StartUp:
    """One process's way from its start until it was ready; the self times of its pieces add up to it."""

    process: str  # its role, and the ranks that it has
    total_ns: int
    pieces: list[Piece]


def start_up(segments: pd.DataFrame, processes: Sequence[Process]) -> list[StartUp]:
    """The start-up of every process that recorded it, in the order in which they were started."""
    inside = segments[within_start_up(segments)]
    names = {process.key: process_name(process) for process in processes}
    found = []
    for key in _in_order(inside, "process"):
        rows = inside[inside["process"] == key]
        outer = rows[rows["stage"] == _STARTUP]
        total = int(outer["end_ns"].max() - outer["begin_ns"].min())
        parts = rows[rows["stage"] != _STARTUP]
        pieces = [_piece(stage, parts[parts["stage"] == stage]) for stage in _in_order(parts, "stage")]
        rest = total - sum(piece.self_ns for piece in pieces)
        found.append(StartUp(names.get(key, ""), total, [*pieces, Piece(UNATTRIBUTED, len(outer), rest, rest)]))
    return found


def _in_order(rows: pd.DataFrame, column: str) -> list[int]:
    """The values of a column, in the order in which what has them began."""
    return [int(each) for each in rows.groupby(column)["begin_ns"].min().sort_values().index.tolist()]


def _piece(stage: int, rows: pd.DataFrame) -> Piece:
    name = BY_ID[stage].name if stage in BY_ID else str(stage)
    return Piece(name, len(rows), int((rows["end_ns"] - rows["begin_ns"]).sum()), int(rows["self_ns"].sum()))


def within_start_up(segments: pd.DataFrame) -> pd.Series:
    """Which segments are part of a start-up: on its thread, and over when that was."""
    ready = segments[segments["stage"] == _STARTUP].groupby(_THREAD)["end_ns"].max().reset_index()
    inside = np.zeros(len(segments), bool)
    process, thread, end = (segments[name].to_numpy(np.int64) for name in (*_THREAD, "end_ns"))
    for its_process, its_thread, until in ready.to_numpy(np.int64).tolist():
        inside |= (process == its_process) & (thread == its_thread) & (end <= until)
    return pd.Series(inside, index=segments.index)


def process_name(process: Process) -> str:
    """A process's role, and which rank it is where there are several."""
    size = process.info.get("world_size"), process.info.get("data_parallel")
    words = [process.role]
    for name, total in (("rank", size[0]), ("data_parallel_rank", size[1])):
        if isinstance(total, int) and total > 1 and name in process.info:
            words.append(f"{name.replace('_', ' ')} {process.info[name]}")
    return ", ".join(words)
