"""Who is in an engine's batch, as records: changes from step to step, and everybody at times and where that is less."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stagetrace.instrument.records import PART_WORDS, Change, RecordType, header_word

if TYPE_CHECKING:
    from collections.abc import Collection

    from stagetrace.instrument.recorder import Recorder

SNAPSHOT_EVERY = 128  # steps
_JOIN = header_word(RecordType.MEMBER, Change.JOIN)
_LEAVE = header_word(RecordType.MEMBER, Change.LEAVE)


class Members:
    """The handles of the requests in the last step of one engine instance, as far as they were recorded."""

    def __init__(self, recorder: Recorder, instance: int):
        self.recorder = recorder
        self.instance = instance
        self.handles: frozenset[int] = frozenset()
        self.due_at = 0  # step at which the next snapshot is due
        self.dropped = 0  # control records, as far as a snapshot has made up for them

    def forget(self) -> None:
        """What is recorded next says who everybody is."""
        self.due_at = 0

    def due(self, step: int) -> bool:
        """Whether everybody is to be told at this step, even if nothing changed."""
        return step >= self.due_at or self.recorder.dropped[0] != self.dropped

    def record(self, step: int, handles: Collection[int]) -> None:
        """Writes who takes part in a step: the changes since the last one, or all where that takes fewer slots."""
        recorder = self.recorder
        after = frozenset(handles)
        joined, left = after - self.handles, self.handles - after
        self.handles = after
        if not self.due(step) and len(joined) + len(left) <= 1 + len(after) // PART_WORDS:
            for handle in left:
                recorder.member(_LEAVE, handle, 0, 0, self.instance, step)
            for handle in joined:
                recorder.member(_JOIN, handle, 0, 0, self.instance, step)
            return
        self.dropped = recorder.dropped[0]  # what was lost may have been a change: this makes up for it
        written = recorder.snapshot(self.instance, step, after)
        self.due_at = step + (SNAPSHOT_EVERY if written else 1)
