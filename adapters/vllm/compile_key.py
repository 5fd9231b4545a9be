"""The key under which vLLM keeps what it has compiled: the same whether stagetrace is there or not.

VLLM_PLUGINS is a part of the key. Where it is set and leaves stagetrace out, `stagetrace run` adds it, and says in
another variable what was there; our hooks are in no graph, so that is what the key is made of.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.around import Around

if TYPE_CHECKING:
    from stagetrace.instrument.hooks import Hook

_FACTOR = "VLLM_PLUGINS"
_BEFORE = "STAGETRACE_VLLM_PLUGINS"  # its value before `stagetrace run` (exporters/arm.py)


def factors_gathered(_: Hook) -> Around:
    """vllm.envs.compile_factors: the variables that are in the key."""

    def after(result: Any) -> None:
        before = os.environ.get(_BEFORE)
        if before is not None and result.get(_FACTOR) is not None:
            result[_FACTOR] = type(result[_FACTOR])(before.split(","))

    return Around(after=after)
