"""Loads a session's tables as typed pandas frames, whole or the last part of it.

Columns keep the units of the schema (times are integer nanoseconds). An integer column that may be null is `Int64`, any
other integer keeps its width; strings that are missing are missing values, not empty ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from stagetrace.exporters.session import TABLES, Manifest, Session

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

_INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64())  # Int8 to Int64 where a column of these may be null
_REQUEST_KEY = ["handle", "end_ns"]
_STEP_KEY = ["instance", "step", "end_ns"]
_WITH_REQUEST = ("states", "members")
_WITH_STEP = ("segments", "intervals", "experts")
_CLOCKS_DIFFER_NS = 10_000_000_000  # at most, the file system's clock and the collector's
NEWEST = 1 << 63  # as a time of commit: the newest part alone


@dataclass(frozen=True)
class Frames:
    """What was loaded of a session; the window's ends are on the monotonic clock, None for the whole session."""

    manifest: Manifest
    tables: dict[str, pd.DataFrame]
    rows: Mapping[str, int]  # that were read of each table, in the window or not: 0 only where there are none at all
    since_ns: int | None = None
    until_ns: int | None = None

    def __getitem__(self, name: str) -> pd.DataFrame:
        """The frame of a table that was asked for. Raises KeyError for one that was not."""
        return self.tables[name]


_Piece = dict[str, Any]  # by column: values and, where it may be null, which are; else a series


def frame(table: pa.Table, schema: pa.Schema) -> pd.DataFrame:
    """An Arrow table as a frame whose columns have the types that `schema` promises."""
    names = [field.name for field in schema if field.name in table.column_names]
    return _joined([_piece(table, schema)], names, schema)


def _piece(table: pa.Table, schema: pa.Schema) -> _Piece:
    """The columns of a part, not bound to Arrow's memory."""
    found: _Piece = {}
    for field in schema:
        if field.name not in table.column_names:
            continue
        column = table[field.name]
        if field.type not in _INTEGERS:
            found[field.name] = column.to_pandas()
        elif not field.nullable:
            found[field.name] = np.array(column)
        elif column.null_count == len(column):
            found[field.name] = _nothing(field.type.to_pandas_dtype(), len(column))
        else:
            missing = np.array(column.is_null()) if column.null_count else np.zeros(len(column), bool)
            values = column.fill_null(0) if column.null_count else column
            found[field.name] = (np.array(values), missing)
    return found


def _joined(pieces: list[_Piece], names: Sequence[str], schema: pa.Schema) -> pd.DataFrame:
    """The frame of all pieces, which are used up: a column is held twice for as long as it is joined, no longer."""
    columns: dict[str, Any] = {}
    for name in names:
        parts = [piece.pop(name) for piece in pieces]
        field = schema.field(name)
        if field.type not in _INTEGERS:
            parts = parts or [pa.chunked_array([], field.type).to_pandas()]
            columns[name] = pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]
        elif not field.nullable:
            columns[name] = np.concatenate(parts) if parts else np.zeros(0, field.type.to_pandas_dtype())
        else:
            columns[name] = pd.arrays.IntegerArray(*_values_and_missing(parts, field.type.to_pandas_dtype()))
    return pd.DataFrame(columns, copy=False)


def _values_and_missing(parts: list[Any], dtype: type) -> tuple[Any, Any]:
    if all(value.strides == (0,) for value, _ in parts):
        return _nothing(dtype, sum(len(value) for value, _ in parts))
    return np.concatenate([value for value, _ in parts]), np.concatenate([flags for _, flags in parts])


def _nothing(dtype: type, length: int) -> tuple[Any, Any]:
    """A column that is null throughout, as most attributes are; it takes no memory and cannot be written."""
    return np.broadcast_to(np.zeros(1, dtype), length), np.broadcast_to(np.ones(1, bool), length)


def read(
    session: Session,
    name: str,
    columns: Sequence[str] | None = None,
    committed_ns: int | None = None,
    stages: Collection[int] | None = None,
) -> pd.DataFrame:
    """One table of a session, or some of its columns, whole or what was committed since (see Session.read_table).

    With `stages`, of segments only the rows of these. Raises SessionError when a part of it cannot be read.
    """
    schema = TABLES[name]
    wanted = schema.names if columns is None else list(columns)
    names = [each for each in schema.names if each in wanted]

    def chosen(part: pa.Table) -> _Piece:
        if stages is not None and name == "segments":
            part = part.filter(pc.is_in(part["stage"], pa.array(sorted(stages), schema.field("stage").type)))
        return _piece(part, schema)

    return _joined(session.read_pieces(name, chosen, wanted, committed_ns), names, schema)


def load(
    session: Session,
    last_s: float | None = None,
    columns: Mapping[str, Sequence[str] | None] | None = None,
    stages: Collection[int] | None = None,
) -> Frames:
    """A session's tables, or of each table in `columns` the columns named (None: all), over the last `last_s` seconds.

    What ended in the window is in it, whole. The window ends at the last thing recorded; in a session that is still
    being written at the manifest's last update if that is later, so that a server that went quiet shows nothing. A
    window needs a few more columns than those named and adds them. With `stages`, of segments only these are there.
    Raises SessionError.
    """
    _return_memory()
    manifest = session.read_manifest()
    wanted = dict.fromkeys(TABLES) if columns is None else dict(columns)
    if last_s is not None:
        wanted = {"requests": _REQUEST_KEY, "steps": _STEP_KEY} | wanted
        wanted = {name: _with_keys(name, names) for name, names in wanted.items()}
    window = None if last_s is None else round(last_s * 1e9)
    committed = None if window is None else _committed_since(session, manifest, wanted, window)
    # States and members go with their request, and may have been written long before it ended.
    tables = {
        name: read(session, name, names, None if name in _WITH_REQUEST else committed, stages)
        for name, names in wanted.items()
    }
    rows = {name: len(table) for name, table in tables.items()}
    if window is None:
        return Frames(manifest, tables, rows)
    until = _last_time(manifest, tables)
    return Frames(manifest, windowed(tables, until - window), rows, until - window, until)


def _return_memory() -> None:
    """Has Arrow give back at once what it no longer needs: its default pool keeps as much again as a session takes."""
    try:
        pa.jemalloc_set_decay_ms(0)
        pa.set_memory_pool(pa.jemalloc_memory_pool())
    except NotImplementedError:  # not in every build of Arrow
        pa.set_memory_pool(pa.system_memory_pool())


def _committed_since(session: Session, manifest: Manifest, names: Iterable[str], window_ns: int) -> int | None:
    """The wall time since when all that is in a window was committed; None when the clocks are not known.

    What is in a window was committed after it had ended. Where the wall clock was set, the earliest time counts.
    """
    newest = {name: read(session, name, ["end_ns"], NEWEST) for name in names if "end_ns" in TABLES[name].names}
    since = _last_time(manifest, newest) - window_ns  # or later: a newest part can hold what ended long ago
    times = [wall + since - monotonic for monotonic, wall in manifest.anchors]
    return min(times) - _CLOCKS_DIFFER_NS if times else None


def windowed(tables: Mapping[str, pd.DataFrame], since: int) -> dict[str, pd.DataFrame]:
    """Of tables with the keys that load() adds, what ended after `since` (ns, monotonic).

    States and members go with their request, segments, intervals and counts of experts with their step.
    """
    requests = tables["requests"].loc[tables["requests"]["end_ns"] > since]
    ends = tables["steps"][_STEP_KEY].astype("Int64").rename(columns={"end_ns": "step_end_ns"})
    kept = {}
    for name, table in tables.items():
        if name in _WITH_REQUEST:
            part = table[table["handle"].isin(requests["handle"])]
        elif name in _WITH_STEP:
            end = table.merge(ends, how="left", on=_STEP_KEY[:2])["step_end_ns"]
            own = table["end_ns"].astype("Int64") if "end_ns" in table else pd.Series(since, end.index, dtype="Int64")
            part = table[(end.fillna(own) > since).to_numpy(dtype=bool)]
        else:
            part = table[table["end_ns"] > since]
        kept[name] = part.reset_index(drop=True)
    return kept


def _with_keys(name: str, columns: Sequence[str] | None) -> Sequence[str] | None:
    """The columns asked for, and those that the window needs."""
    keys = [key for key in (*_REQUEST_KEY[:1], *_STEP_KEY) if key in TABLES[name].names]
    return None if columns is None else list(dict.fromkeys([*columns, *keys]))


def _last_time(manifest: Manifest, tables: Mapping[str, pd.DataFrame]) -> int:
    """The last time known of the session, ns on the monotonic clock; 0 when nothing is known."""
    times = [int(table["end_ns"].max()) for table in tables.values() if "end_ns" in table and len(table)]
    if not manifest.complete and manifest.anchors:
        monotonic, wall = manifest.anchors[-1]
        times.append(monotonic + manifest.updated_ns - wall)
    return max(times, default=0)
