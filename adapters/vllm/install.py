"""Puts the hooks into this process, once; forked children inherit them."""

from __future__ import annotations

import sys

from stagetrace.instrument.gc_pauses import watch
from stagetrace.instrument.hooks import Hooks
from stagetrace.instrument.levels import maximum_level
from stagetrace.instrument.recorder import RECORDER

from .hooks import HOOK_POINTS

_installed: list[Hooks] = []


def install() -> Hooks:
    """Patches vLLM in this process; a second call finds it done."""
    if not _installed:
        version = getattr(sys.modules.get("vllm"), "__version__", "")
        hooks = Hooks(HOOK_POINTS, RECORDER, maximum_level(), str(version))
        hooks.install()
        watch(RECORDER)
        _installed.append(hooks)
    return _installed[0]
