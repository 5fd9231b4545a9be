"""Counts of tokens by expert, on their way to their table: they wait for nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ..session import EXPERTS_SCHEMA
from .columns import table_of

if TYPE_CHECKING:
    from .decode import Experts

_COUNTS = EXPERTS_SCHEMA.field("counts").type


class ExpertCounts:
    """What was recorded since the last take."""

    def __init__(self) -> None:
        self._found: list[tuple[int, Experts]] = []

    def add(self, process: int, experts: list[Experts]) -> None:
        """Takes in what one process recorded."""
        self._found += [(process, one) for one in experts]

    def table(self) -> pa.Table:
        """Rows of the experts table; they are forgotten then."""
        found, self._found = self._found, []
        if not found:
            return EXPERTS_SCHEMA.empty_table()
        instance, step, rank, layer, tokens = np.concatenate([one.heads for _, one in found]).T
        sizes = np.concatenate([np.full(len(one.heads), one.counts.shape[1]) for _, one in found])
        ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        counts = np.concatenate([one.counts.ravel() for _, one in found])
        return table_of(
            EXPERTS_SCHEMA,
            process=np.concatenate([np.full(len(one.heads), process) for process, one in found]),
            instance=np.ascontiguousarray(instance),
            step=np.ascontiguousarray(step),
            rank=np.ascontiguousarray(rank),
            layer=np.ascontiguousarray(layer),
            tokens=np.ascontiguousarray(tokens),
            counts=pa.ListArray.from_arrays(pa.array(ends), pa.array(counts), type=_COUNTS),
        )
