"""Arrow columns from NumPy's: nulls by a mask, choices by their index. Pure."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Sequence

Column = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def column(values: Column, null: Flags) -> pa.Array:
    """Integers, some of which are null."""
    return pa.array(values, mask=null)


def choices(index: Column, names: Sequence[str]) -> pa.Array:
    """Strings, each one of `names` by its index; null below 0."""
    return pa.array([*names], pa.string()).take(pa.array(index, mask=index < 0))


def integers(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """Rows of integers, equally long and at least one, as an array of a row for each column."""
    width = len(rows[0])
    found = np.fromiter(chain.from_iterable(rows), np.int64, width * len(rows))
    return np.ascontiguousarray(found.reshape(len(rows), width).T)


def table_of(schema: pa.Schema, **columns: Column | Flags | pa.Array | Sequence[object]) -> pa.Table:
    """A table in its schema from a column for each field: of NumPy, of Arrow, or Python's values with None for null."""
    arrays = []
    for field in schema:
        values = columns.pop(field.name)
        if isinstance(values, pa.Array):
            arrays.append(values if values.type == field.type else values.cast(field.type))
        elif isinstance(values, np.ndarray) and values.dtype == np.int64 and field.type != pa.int64():
            arrays.append(pa.array(values).cast(field.type))
        else:
            arrays.append(pa.array(values, field.type))
    assert not columns, f"no such columns: {[*columns]}"
    return pa.Table.from_arrays(arrays, schema=schema)
