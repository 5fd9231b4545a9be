"""Numbered Parquet parts in a directory: each renamed into place whole, and merged in blocks as a session grows long.

    part-00000001.parquet            what one commit wrote
    part-00000001-00000064.parquet   those of a block of commits, a row group each
    part-end.parquet                 what was still open at the end; gone again when the session is taken up once more

A part that lies within a merged one is what a merge left behind when it was interrupted: it does not count. A merged
part names the commits of its row groups, so that one commit can still be read by itself.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

BLOCK = 64  # commits that are merged into one part
END = 1 << 31  # stands for the number of the end's part
_ENCODINGS = {pa.int64(): "DELTA_BINARY_PACKED", pa.binary(128): "BYTE_STREAM_SPLIT"}
_NUMBERS = b"stagetrace.numbers"
_NAME = re.compile(r"part-(?:(\d{8})(?:-(\d{8}))?|end)\.parquet")
_LOOKS = 8


class Part(NamedTuple):
    """A part's file, and the first and last of the commits that are in it."""

    first: int
    last: int
    path: Path


def list_parts(directory: Path) -> list[Part]:
    """The parts in a directory, oldest first; each commit is in one of them at most."""
    before = _look(directory)
    for _ in range(_LOOKS):  # a merge that goes on meanwhile renames and removes
        now = _look(directory)
        if now == before:
            break
        before = now
    return before


def _look(directory: Path) -> list[Part]:
    found = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if match := _NAME.fullmatch(entry.name):
                    first = int(match[1]) if match[1] else END
                    found.append(Part(first, int(match[2]) if match[2] else first, directory / entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    found.sort(key=lambda part: (part.first, -part.last))
    shown: list[Part] = []
    for part in found:
        if not shown or part.last > shown[-1].last:
            shown.append(part)
    return shown


def write_part(directory: Path, table: pa.Table, number: int, metadata: Mapping[bytes, bytes] | None = None) -> None:
    """Writes one part: all of it is seen, or nothing. Raises OSError, and leaves nothing behind then."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = "part-end" if number == END else f"part-{number:08}"
    if metadata is not None:
        table = table.replace_schema_metadata(metadata)
    rows = max(table.num_rows, 1)  # one row group
    _into_place(
        directory / f"{name}.parquet",
        lambda partial: pq.write_table(table, partial, row_group_size=rows, **_settings(table.schema)),
    )


def _settings(schema: pa.Schema) -> dict[str, Any]:
    """How columns are written: times and numbers grow, and their differences take half the room of a dictionary."""
    encodings = {field.name: _ENCODINGS[field.type] for field in schema if field.type in _ENCODINGS}
    named = [name for name in schema.names if name not in encodings]
    return {"compression": "zstd", "use_dictionary": named, "column_encoding": encodings}


def read_part(part: Part, first: int, last: int, columns: list[str] | None = None) -> pa.Table:
    """What a part holds of the commits from `first` to `last`. Raises OSError, ValueError or pyarrow's errors."""
    with pq.ParquetFile(part.path) as file:
        if first <= part.first and part.last <= last:
            return file.read(columns)
        numbers = json.loads((file.metadata.metadata or {}).get(_NUMBERS, b"[]"))
        groups = [group for group, number in enumerate(numbers) if first <= number <= last]
        return file.read_row_groups(groups, columns=columns)


def merge_block(directory: Path, block: int, metadata: Mapping[str, str]) -> bool:
    """Merges the parts of one block of commits (from 0) into one; `metadata` is the new part's. False if it is done.

    Raises OSError or pyarrow's errors, and leaves the parts as they were then.
    """
    first, last = block * BLOCK + 1, (block + 1) * BLOCK
    parts = [part for part in list_parts(directory) if first <= part.first and part.last <= last]
    if len(parts) < 2:
        remove_within(parts)
        return False

    def write(partial: Path) -> None:
        schema = pq.read_schema(parts[0].path).remove_metadata()
        with pq.ParquetWriter(partial, schema, **_settings(schema)) as writer:
            numbers = []
            for part in parts:
                # On this thread alone: each of Arrow's keeps memory of its own, several times what a merge needs.
                with pq.ParquetFile(part.path, pre_buffer=False) as file:
                    table = file.read(use_threads=False)
                if table.num_rows:
                    writer.write_table(table.replace_schema_metadata(None), row_group_size=table.num_rows)
                    numbers.append(part.first)
            writer.add_key_value_metadata({**metadata, _NUMBERS.decode(): json.dumps(numbers)})

    newest = parts[-1].path.stat().st_mtime_ns
    merged = Part(parts[0].first, parts[-1].last, directory / f"part-{parts[0].first:08}-{parts[-1].last:08}.parquet")
    _into_place(merged.path, write, newest)
    remove_within([merged])
    return True


def remove_within(parts: Sequence[Part]) -> None:
    """Removes what a merge into these parts left behind."""
    for part in parts:
        if part.first == part.last:
            continue
        for number in range(part.first, part.last + 1):
            part.path.with_name(f"part-{number:08}.parquet").unlink(missing_ok=True)


def _into_place(final: Path, write: Callable[[Path], object], mtime_ns: int | None = None) -> None:
    partial = final.with_suffix(".partial")
    try:
        write(partial)
        if mtime_ns is not None:
            os.utime(partial, ns=(mtime_ns, mtime_ns))
        partial.replace(final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
