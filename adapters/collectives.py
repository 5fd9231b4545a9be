"""Operations of groups of ranks, for every engine: numbered the same on every rank, nested ones counted once.

A group's operations are numbered from the start, at every level, so that the numbers of two ranks mean the same
operation also when recording was switched on between two of them. What is called within another (a dispatch is made of
an all_gather) has a number and no record.
"""

from __future__ import annotations

from _thread import get_ident
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.around import Around
from stagetrace.instrument.records import HEAD, TAILS, RecordType, Text, header_word
from stagetrace.instrument.stages import BY_NAME, Collective

from .layers import asking_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from stagetrace.instrument.recorder import Recorder

    from .rank import RankStep

BETWEEN_TWO = (Collective.SEND, Collective.RECEIVE)  # the others of the group do not take part: no number
_HEADER = header_word(RecordType.SEGMENT, BY_NAME["collective"].id)
_pack_head, _pack_tail = HEAD.pack, TAILS[5].pack


class Group:
    """What is known of one of the engine's groups of ranks; kept on the engine's own object."""

    __slots__ = ("algorithm", "alone", "handle", "name", "sequence")

    def __init__(self, name: str, alone: bool, algorithm: str = ""):
        self.name = name
        self.alone = alone  # it has one rank: nothing is sent
        self.algorithm: int | str = algorithm  # a name until it was told, then its handle
        self.handle = 0  # until its name was told
        self.sequence = 0  # of its last operation


class Collectives:
    """All groups of this process."""

    def __init__(self, recorder: Recorder, rank: RankStep):
        self.recorder = recorder
        self.rank = rank
        self._within: dict[int, int] = {}  # thread -> step in which it is in an operation
        self._algorithm: dict[int, int] = {}  # thread -> what carries its operation out, by handle
        self._told: dict[str, int] = {}

    def tell(self, name: str) -> int:
        """The handle of a name, which is told once; 0 for no name. It is told again where the record was dropped."""
        if not name:
            return 0
        found = self._told.get(name)
        if found is None:
            found = self.recorder.handle(name)
            if self.recorder.text(found, Text.NAME, name):
                self._told[name] = found
        return found

    def carried_out_by(self, name: str) -> Around:
        """Around what carries an operation out in one of several ways, and gives None where it does not."""

        def after(result: Any) -> None:
            if result is not None and self.rank.step:
                self._algorithm[get_ident()] = self.tell(name)

        return Around(after=after)

    def around(self, op: Collective, group_of: Callable[[Any], Group], owner: str, size: str) -> Around:
        """Around an operation: `owner` and `size` are parameters of its function, or `result`.

        `group_of` makes the group's `Group` of the first, the second is a tensor, or several in a list or a
        dictionary; an empty name is no tensor.
        """
        put, rank, within = self.recorder.put, self.rank, self._within
        number = int(op)
        paired = op in BETWEEN_TWO

        def count(at: Any) -> Group:
            group = group_of(at)
            group.sequence += 1
            return group

        def before(at: Any) -> tuple[Group, int] | None:
            group = group_of(at)
            group.sequence = sequence = group.sequence + 1
            step = rank.step
            if group.alone or not step:
                return None
            thread = get_ident()
            if within.get(thread) == step:
                return None
            within[thread] = step
            return group, 0 if paired else sequence

        def after(given: Any, noted: tuple[Group, int] | None, begin: int, end: int) -> None:
            if noted is None:
                return
            group, sequence = noted
            thread, step = get_ident(), rank.step
            within[thread] = 0
            algorithm: int | str = self._algorithm.pop(thread, 0) if self._algorithm else 0
            if not group.handle:
                group.handle = self.tell(group.name)
            if not algorithm:
                algorithm = group.algorithm
                if isinstance(algorithm, str):
                    algorithm = group.algorithm = self.tell(algorithm)
            tail = _pack_tail(rank.instance, step, number, group.handle, size_of(given), algorithm, sequence)
            put(_pack_head(_HEADER, thread), begin, end, tail)

        asked = ("noted", "begin", "end")
        if size:
            ended = asking_for(after, size, *asked)
        else:
            ended = asking_for(lambda noted, begin, end: after(None, noted, begin, end), *asked)
        return Around(asking_for(before, owner), ended, off=asking_for(count, owner))


def size_of(given: Any) -> int:
    """Bytes of a tensor, or of all tensors in a list, a tuple or a dictionary; 0 for anything else. Pure."""
    if given is None:
        return 0
    size = getattr(given, "nbytes", None)
    if size is not None:
        return int(size)
    if isinstance(given, dict):
        given = given.values()
    elif not isinstance(given, (list, tuple)):
        return 0
    return sum(size_of(each) for each in given)
