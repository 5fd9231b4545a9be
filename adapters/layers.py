"""Segments of the layer level, for every engine: one call of a layer's part, with the layer and the tokens in it."""

from __future__ import annotations

import inspect
from _thread import get_ident
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.around import Around
from stagetrace.instrument.records import RecordType, header_word
from stagetrace.instrument.stages import BY_NAME

from .rank import layer_index

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stagetrace.instrument.recorder import Recorder

    from .rank import RankStep

_MLP_NAMES = {"mlp", "feed_forward", "ffn", "ff"}


def is_dense_mlp(name: str, experts: Sequence[str]) -> bool:
    """Whether the module of this name is a layer's MLP without experts; `experts` names the modules that run some."""
    if name.rpartition(".")[2] not in _MLP_NAMES or layer_index(name) < 0:
        return False
    return not any(inner.startswith(f"{name}.") for inner in experts)


class Within:
    """Which layer each thread is in: for functions that all layers share and that are not told.

    An engine that overlaps two halves of a batch runs them on threads of their own.
    """

    def __init__(self) -> None:
        self.by_thread: dict[int, int] = {}

    def enter(self, layer: int) -> None:
        """This thread goes on with a layer."""
        self.by_thread[get_ident()] = layer


def asking_for(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """The function, whose parameters a hook takes to have these names (instrument/around.py hands over by name)."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in names]
    )
    return function


def timed(recorder: Recorder, rank: RankStep, stage: str, tensor: str, *words: int) -> Around:
    """One segment of `stage` for every call within a step: `words` (its layer, say), then the rows of a tensor.

    `tensor` names the parameter of the engine's function that has the tokens in its first dimension.
    """
    header = header_word(RecordType.SEGMENT, BY_NAME[stage].id)
    segment = recorder.segment
    first, second = (*words, 0, 0)[:2]

    def alone(given: Any, begin: int, end: int) -> None:
        step = rank.step
        if step:
            segment(header, begin, end, rank.instance, step, given.shape[0])

    def with_one(given: Any, begin: int, end: int) -> None:
        step = rank.step
        if step:
            segment(header, begin, end, rank.instance, step, first, given.shape[0])

    def with_two(given: Any, begin: int, end: int) -> None:
        step = rank.step
        if step:
            segment(header, begin, end, rank.instance, step, first, second, given.shape[0])

    after = (alone, with_one, with_two)[len(words)]
    return Around(after=asking_for(after, tensor, "begin", "end"))


def timed_within(recorder: Recorder, rank: RankStep, within: Within, stage: str, tensor: str) -> Around:
    """The same of a function that all layers share: the layer is the one that the thread is in, -1 for none."""
    header = header_word(RecordType.SEGMENT, BY_NAME[stage].id)
    segment, layer_of = recorder.segment, within.by_thread.get

    def alone(given: Any, begin: int, end: int) -> None:
        step = rank.step
        if step:
            segment(header, begin, end, rank.instance, step, layer_of(get_ident(), -1), given.shape[0])

    def with_bytes(given: Any, begin: int, end: int) -> None:
        step = rank.step
        if step:
            segment(header, begin, end, rank.instance, step, layer_of(get_ident(), -1), given.shape[0], given.nbytes)

    after = with_bytes if len(BY_NAME[stage].attributes) > 2 else alone
    return Around(after=asking_for(after, tensor, "begin", "end"))
