"""Steps: what is known of one from its begin to its row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from stagetrace.instrument.stages import STEP_COMPOSITION, GraphMode, Phase, phase

from ..session import STEPS_SCHEMA
from .columns import choices, column, integers, table_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

PHASES = tuple(one.value for one in Phase)  # a phase is its index here
STATUSES = ("complete", "incomplete", "ranks_missing", "partial")  # and so is a step's status
COMPLETE, INCOMPLETE, RANKS_MISSING, PARTIAL = range(len(STATUSES))
_GRAPH_MODES = tuple(mode.name.lower() for mode in GraphMode)

_NAMES = [attribute.name for attribute in STEP_COMPOSITION]
_PREFILL, _DECODE = _NAMES.index("prefill_tokens"), _NAMES.index("decode_tokens")
_PHASE_OF = {
    (bool(prefill), bool(decode)): PHASES.index(phase(prefill, decode).value) for prefill in (0, 1) for decode in (0, 1)
}


@dataclass(slots=True)
class Step:
    """A step that has no row yet. Times in ns."""

    instance: int
    number: int
    process: int
    thread: int
    begin: int
    scheduled: int
    composition: list[int]
    end: int = 0
    unattributed: int = 0
    members: int = -1  # unknown
    output_tokens: int = -1
    accepted: int = 0  # draft tokens
    padded: int = 0  # tokens with padding; 0: not known
    graph: int = 0  # GraphMode
    status: int = COMPLETE
    ranks: int = 0  # expected
    reported: int = 0
    phase: int = field(init=False)

    def __post_init__(self) -> None:
        self.phase = _PHASE_OF[self.composition[_PREFILL] != 0, self.composition[_DECODE] != 0]


def steps_table(steps: Sequence[Step]) -> pa.Table:
    """Rows of the steps table."""
    if not steps:
        return STEPS_SCHEMA.empty_table()
    rows = [
        (s.instance, s.number, s.process, s.thread, s.phase, s.status, s.begin, s.scheduled, s.end, s.unattributed,
         s.ranks, s.reported, s.members, s.output_tokens, s.accepted, s.padded, s.graph, *s.composition)
        for s in steps
    ]  # fmt: skip
    columns = integers(rows)
    (instance, number, process, thread, phases, status, begin, scheduled, end, unattributed, ranks, reported,
     members, tokens, accepted, padded, graph), composition = columns[:17], columns[17:]  # fmt: skip
    return table_of(
        STEPS_SCHEMA,
        instance=instance,
        step=number,
        process=process,
        thread=thread,
        phase=choices(phases, PHASES),
        status=choices(status, STATUSES),
        begin_ns=begin,
        scheduled_ns=scheduled,
        end_ns=end,
        unattributed_ns=unattributed,
        ranks_expected=ranks,
        ranks_reported=reported,
        members=column(members, members < 0),
        output_tokens=column(tokens, members < 0),
        accepted_tokens=accepted,
        padded_tokens=column(padded, padded <= 0),
        graph_mode=choices(np.where((graph > 0) & (graph < len(_GRAPH_MODES)), graph, -1), _GRAPH_MODES),
        **dict(zip(_NAMES, composition, strict=True)),
    )
