"""Hooks in the front end: the process with the tokenizer manager, which also serves HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stagetrace.instrument.around import Around

if TYPE_CHECKING:
    from stagetrace.instrument.hooks import Hook


def opens_recorder(hook: Hook) -> Around:
    """TokenizerManager.__init__: this process is a front end."""

    def after() -> None:
        from sglang.version import __version__

        hook.recorder.open("front_end", {"engine": "sglang", "engine_version": __version__})

    return Around(after=after)
