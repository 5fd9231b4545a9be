"""What decode gave, as plain tuples: for tests that look at single records."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stagetrace.exporters.assembly.decode import Rows, decode
from stagetrace.exporters.assembly.long_records import Parts
from stagetrace.exporters.drain import SLOT, Batch, Slots
from stagetrace.instrument.records import RecordType

NONE = np.empty(0, SLOT)
Words = tuple[int, ...]


@dataclass
class Decoded:
    """Records in the order of their slots. A text's words are its handle, its kind and the string itself."""

    segments: list[Words]  # number, stage, words ...
    controls: list[tuple[int, RecordType, int, tuple[object, ...]]]  # number, type, stage, words
    steps: list[tuple[int, RecordType, Words]]  # number, type, words
    corrupt: int
    incomplete: int

    @property
    def texts(self) -> list[tuple[object, ...]]:
        """Handle, kind and string of every text."""
        return [words for _, type_, _, words in self.controls if type_ == RecordType.TEXT]


def decoded(control: Slots = NONE, detail: Slots = NONE, parts: tuple[Parts, Parts] | None = None) -> Decoded:
    """The records in these slots; `parts` are what earlier ones left of long records."""
    found = decode(control, detail, *(parts or (Parts(), Parts())))
    controls: list[tuple[int, int, RecordType, int, tuple[object, ...]]] = []
    for type_, rows in (
        (RecordType.STATE, found.states),
        (RecordType.EVENT, found.events),
        (RecordType.MEMBER, found.members),
    ):
        controls += [(number, number, type_, stage, words) for number, stage, words in tuples(rows)]
    for one in found.snapshots:
        words = (one.instance, one.step, len(one.requests), *one.requests)
        controls.append((one.number, one.sequence, RecordType.SNAPSHOT, 0, words))
    for text in found.texts:
        controls.append((text.number, text.number, RecordType.TEXT, 0, (text.handle, text.kind, text.text)))
    steps = [(number, RecordType.STEP_BEGIN, words) for number, _, words in tuples(found.step_begins)]
    steps += [(number, RecordType.STEP_END, words) for number, _, words in tuples(found.step_ends)]
    return Decoded(
        [(number, stage, *words) for number, stage, words in tuples(found.segments)],
        [record[1:] for record in sorted(controls, key=lambda record: record[0])],
        sorted(steps),
        found.corrupt,
        found.incomplete,
    )


def decoded_batch(batch: Batch) -> Decoded:
    """The records of a batch, alone."""
    return decoded(batch.control, batch.detail)


def tuples(rows: Rows) -> list[tuple[int, int, Words]]:
    """Number, stage and words of each record."""
    return [
        (number, stage, tuple(words))
        for number, stage, words in zip(rows.number.tolist(), rows.stage.tolist(), rows.words.T.tolist(), strict=True)
    ]
