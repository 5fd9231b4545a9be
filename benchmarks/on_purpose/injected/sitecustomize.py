"""Run by the engine's Python as it starts: puts a cause of slowness into the engine, as INJECTED (JSON) says.

    {"schedule": {"ms": 8}}        and so on, one or several: the KINDS of in_vllm.py, in_sglang.py and in_both.py

It patches the engine's own functions when their module is imported, before stagetrace does, so that stagetrace sees
an engine that is slow by itself.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from typing import Any

from in_both import KINDS as BOTH
from in_sglang import KINDS as SGLANG
from in_vllm import KINDS as VLLM
from pauses import ASKED


class Finder(importlib.abc.MetaPathFinder):
    """Finds the module as everybody does, and patches it once it has been run."""

    def __init__(self, name: str, patches: list[Any]):
        self.name, self.patches, self.busy = name, patches, False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name or self.busy:
            return None
        self.busy = True
        try:
            spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        finally:
            self.busy = False
        if spec is None or spec.loader is None:
            return None
        loader, run = spec.loader, spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            for apply in self.patches:
                apply(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_patches: dict[str, list[Any]] = {}
for _kinds in (BOTH, VLLM, SGLANG):
    for _kind, _asked in ASKED.items():
        for _name, _apply in _kinds.get(_kind, {}).items():
            _patches.setdefault(_name, []).append(functools.partial(_apply, asked=_asked))
sys.meta_path[:0] = [Finder(*each) for each in _patches.items()]

if "exchange" in ASKED:
    import mending  # noqa: F401  vLLM's build for the CPU has no expert parallelism without it
