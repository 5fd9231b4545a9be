"""Hooks on the start-up of SGLang's processes.

A scheduler's process is a rank as well: what it does until it is ready is the rank's start-up. The front end begins
when the schedulers' processes have been started, and waits for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stagetrace.adapters.startup import begun, flush, piece, ready, write
from stagetrace.instrument.around import Around
from stagetrace.instrument.records import RecordType, header_word
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from stagetrace.instrument.hooks import Hook

__all__ = ["begun", "build_model", "built", "captured", "piece", "ready", "schedulers_are_ready", "weights_loaded"]

FRONT_END = "front_end"
_TOKENIZER_WORKER = "TokenizerWorker"  # one of several, which waits for nobody
_GRAPH_RUNNERS = ("decode_cuda_graph_runner", "prefill_cuda_graph_runner")
_BUILD_MODEL, _LOAD_WEIGHTS, _GRAPH_CAPTURE = (
    header_word(RecordType.SEGMENT, BY_NAME[name].id) for name in ("build_model", "load_weights", "graph_capture")
)


class _Loading:
    """The model that this process loads."""

    built = 0  # ns: end of the making of its modules; 0: there is none that waits for its weights


def built(hook: Hook, part: str, manager: Any) -> None:
    """A manager was built and its process has a ring; a front end then waits for the schedulers."""
    if part == FRONT_END and type(manager).__name__ != _TOKENIZER_WORKER:
        flush(hook.recorder)
    else:
        ready(hook.recorder, part)


def schedulers_are_ready(hook: Hook) -> Around:
    """_wait_for_scheduler_ready: what the front end does last before it serves."""
    return piece("start_workers", FRONT_END)(hook)


def build_model(hook: Hook) -> Around:
    """_initialize_model: the model's modules, whose weights come next."""

    def after(begin: int, end: int) -> None:
        _Loading.built = end
        write(hook.recorder, _BUILD_MODEL, begin, end)

    return Around(after=after)


def weights_loaded(hook: Hook) -> Around:
    """A loader's load_model: what follows the making of the modules is reading weights into them."""

    def after(end: int) -> None:
        begin, _Loading.built = _Loading.built, 0
        if begin:
            write(hook.recorder, _LOAD_WEIGHTS, begin, end)

    return Around(after=after)


def captured(hook: Hook) -> Around:
    """ModelRunner.init_cuda_graphs; recorded where there was one to capture."""

    def after(self: Any, begin: int, end: int) -> None:
        if any(getattr(self, runner, None) is not None for runner in _GRAPH_RUNNERS):
            write(hook.recorder, _GRAPH_CAPTURE, begin, end)

    return Around(after=after)
