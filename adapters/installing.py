"""Puts an engine's hooks into this process, once; forked children inherit them. What every engine's plugin calls."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stagetrace.instrument.hooks import HookPoint, Hooks

_installed: dict[str, Hooks] = {}


def install(package: str) -> Hooks:
    """Patches an engine by the table in `package`.hooks; a second call finds it done."""
    if package not in _installed:
        from stagetrace.instrument.gc_pauses import watch
        from stagetrace.instrument.hooks import Hooks
        from stagetrace.instrument.levels import maximum_level
        from stagetrace.instrument.recorder import RECORDER

        points: Sequence[HookPoint] = importlib.import_module(f"{package}.hooks").HOOK_POINTS
        engine = sys.modules.get(package.rpartition(".")[2])
        hooks = Hooks(points, RECORDER, maximum_level(), str(getattr(engine, "__version__", "")))
        hooks.install()
        watch(RECORDER)
        _installed[package] = hooks
    return _installed[package]


def register(package: str) -> None:
    """What a plugin does in an armed process. Whatever goes wrong stays here: an exception could end the engine."""
    try:
        install(package)
    except Exception:
        import logging

        logging.getLogger("stagetrace").warning("stagetrace could not be installed in this process", exc_info=True)
