"""Requests that are not over: their records, of both processes and in any order, until they become rows. Columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stagetrace.instrument.records import Event, Text
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from .decode import Rows

Block = npt.NDArray[np.int64]
Column = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# A block has a row for each of these and a column for each record. WHAT is a state's stage, or an event's negative.
HANDLE, WHAT, NS, INSTANCE, STEP, FIRST_ATTRIBUTE = range(6)
ATTRIBUTES = 4  # as many as a state or an event has
FIELDS = FIRST_ATTRIBUTE + ATTRIBUTES

OF_REQUESTS = (Text.REQUEST_ID, Text.EXTERNAL_ID, Text.TRACE_CONTEXT, Text.LORA)  # texts
_MOST_REQUESTS = 50_000
_MOST_RECORDS = 1_000_000
_TOKENIZE = BY_NAME["request_tokenize"].id
_BY_HTTP = FIRST_ATTRIBUTE + 2
_NEVER = np.iinfo(np.int64).max


@dataclass(slots=True)
class Request:
    """What is known of an open request beside its states and events."""

    texts: dict[int, str] = field(default_factory=dict)  # records.Text -> string


@dataclass(frozen=True)
class Lives:
    """The records of some requests, side by side, those of one in the order in which they came."""

    block: Block
    firsts: Column  # of each request: the column of its first record

    @property
    def handle(self) -> Column:
        """Of each request."""
        handle: Column = self.block[HANDLE][self.firsts]
        return handle

    @property
    def lengths(self) -> Column:
        """How many records each has."""
        return np.diff(self.firsts, append=self.block.shape[1])

    def had(self, event: Event) -> Flags:
        """Whether an event of this kind came."""
        return np.logical_or.reduceat(self.block[WHAT] == -event, self.firsts)

    @property
    def stateful(self) -> Flags:
        """Whether it has been in any state."""
        return np.logical_or.reduceat(self.block[WHAT] > 0, self.firsts)

    @property
    def last_ns(self) -> Column:
        """Time of its last record."""
        return np.maximum.reduceat(self.block[NS], self.firsts)

    @property
    def begin_ns(self) -> Column:
        """Time of its first state; meaningless without one."""
        return np.minimum.reduceat(np.where(self.block[WHAT] > 0, self.block[NS], _NEVER), self.firsts)

    @property
    def instance(self) -> Column:
        """The engine instance that its last record with one names, or 0."""
        at = np.where(self.block[INSTANCE] != 0, np.arange(self.block.shape[1]), -1)
        last = np.maximum.reduceat(at, self.firsts)
        return np.where(last < 0, 0, self.block[INSTANCE][last])

    @property
    def last_step(self) -> Column:
        """The engine's step when it ended it."""
        ended = self.block[WHAT] == -Event.FINISHED
        return np.maximum.reduceat(np.where(ended, self.block[STEP], 0), self.firsts)

    @property
    def parent(self) -> Column:
        """Of each the handle of its parent, 0 where it is no child."""
        of_children = np.where(self.block[WHAT] == -Event.CHILD, self.block[FIRST_ATTRIBUTE], 0)
        parent: Column = np.maximum.reduceat(of_children, self.firsts) if len(self) else self.firsts
        return parent

    @property
    def family(self) -> Column:
        """A number for each, the same for the children of one parent."""
        parent = self.parent
        family: Column = np.unique(np.where(parent != 0, parent, self.handle), return_inverse=True)[1]
        return family

    @property
    def over(self) -> Flags:
        """Whether nothing more will come. With one child of a request the client gave up all."""
        count = self.block.shape[1]
        arrived = np.where(self.block[WHAT] == _TOKENIZE, np.arange(count), count)
        arrival = np.minimum.reduceat(arrived, self.firsts)
        straight = arrival == count  # it did not come through a front end
        by_http = self.block[_BY_HTTP][np.where(straight, 0, arrival)] != 0
        sent: Flags = np.where(by_http, self.had(Event.LAST_SENT), self.had(Event.LAST_OUTPUT))
        given_up = any_of(self.family, self.had(Event.ABORTED))
        over: Flags = self.had(Event.FINISHED) & (straight | given_up | sent)
        return over | self.had(Event.REFUSED)

    @property
    def ending(self) -> Flags:
        """Whether it ended on one side; what is missing is the other's word, or a slow client's last byte."""
        return self.had(Event.FINISHED) | self.had(Event.LAST_OUTPUT) | self.had(Event.ABORTED)

    def of(self, chosen: Flags) -> Lives:
        """Some of these requests."""
        lengths = self.lengths[chosen]
        return Lives(self.block[:, np.repeat(chosen, self.lengths)], np.cumsum(lengths) - lengths)

    def __len__(self) -> int:
        return len(self.firsts)


def any_of(family: Column, flags: Flags) -> Flags:
    """Of each request, whether the flag of any of its family is set."""
    found = np.zeros(int(family.max(initial=-1)) + 1, np.bool_)
    found[family[flags]] = True
    return found[family]


class OpenRequests:
    """All requests that are not over."""

    def __init__(self) -> None:
        self.by_handle: dict[int, Request] = {}
        self._blocks: list[Block] = []

    def add(self, states: Rows, events: Rows) -> None:
        """Takes in records of states and events."""
        for rows, sign in ((states, 1), (events, -1)):
            if not len(rows):
                continue
            block = np.empty((FIELDS, len(rows)), np.int64)
            block[WHAT] = sign * rows.stage
            block[NS], block[HANDLE], block[INSTANCE:] = rows.words[1], rows.words[2], rows.words[3 : 5 + ATTRIBUTES]
            self._blocks.append(block)
            for handle in np.unique(block[HANDLE]).tolist():
                if handle not in self.by_handle:
                    self.by_handle[handle] = Request()

    def name(self, handle: int, kind: int, text: str) -> None:
        """Takes in what a handle stands for."""
        request = self.by_handle.get(handle)
        if request is None:
            request = self.by_handle[handle] = Request()
        request.texts[kind] = text

    def lives(self) -> Lives:
        """The records of all open requests, in the order of each one's first record."""
        if not self._blocks:
            return Lives(np.empty((FIELDS, 0), np.int64), np.empty(0, np.int64))
        block = np.concatenate(self._blocks, axis=1) if len(self._blocks) > 1 else self._blocks[0]
        handles, first, which = np.unique(block[HANDLE], return_index=True, return_inverse=True)
        place = np.empty(len(handles), np.int64)
        place[np.argsort(first, kind="stable")] = np.arange(len(handles))
        which = place[which]
        order = np.argsort(which, kind="stable")
        self._blocks = [block[:, order]]
        return Lives(self._blocks[0], np.flatnonzero(np.diff(which[order], prepend=-1)))

    def remove(self, lives: Lives, closing: Flags) -> list[Request]:
        """Lets go of requests, of those that `lives` gave; what else was known of each."""
        self._blocks = [lives.block[:, np.repeat(~closing, lives.lengths)]] if not closing.all() else []
        return [self.by_handle.pop(handle, Request()) for handle in lives.handle[closing].tolist()]

    def give_up_names(self, lives: Lives) -> int:
        """When there are too many requests, forgets those of which only a name came, the oldest first; how many."""
        crowd = len(self.by_handle) - _MOST_REQUESTS
        if crowd <= 0:
            return 0
        alive = {*lives.handle.tolist()}
        bare = [handle for handle in self.by_handle if handle not in alive][:crowd]
        for handle in bare:
            del self.by_handle[handle]
        return len(bare)

    def too_many(self, lives: Lives) -> Flags:
        """Which are to be closed although they are open, the oldest first, so that memory stays bounded."""
        crowd = len(self.by_handle) - _MOST_REQUESTS
        newer = np.cumsum(lives.lengths[::-1])[::-1]  # records of it and of those that came after it
        return (newer > _MOST_RECORDS) | (np.arange(len(lives)) < crowd)

    def __len__(self) -> int:
        return len(self.by_handle)
