"""Run by the engine's Python: wraps every function that is hooked, as it is in the engine that is installed.

Its argument is the adapter, vllm or sglang. Prints one JSON object: target -> the wrapper's parameters and those of the
engine's own function, as it is called. Left out are rows for other releases, and those of an HTTP parser that is not
installed.
"""

from __future__ import annotations

import importlib
import json
import sys

from stagetrace.instrument.around import _undecorated, parameters_of, wrap
from stagetrace.instrument.hooks import FITS, Hook, _find, check, in_range, release_of
from stagetrace.instrument.recorder import Recorder

HOOK_POINTS = importlib.import_module(f"stagetrace.adapters.{sys.argv[1]}.hooks").HOOK_POINTS
release = release_of(importlib.import_module(f"{sys.argv[1]}.version").__version__)
found = {}
for index, point in enumerate(HOOK_POINTS):
    if not in_range(point, release):
        continue
    try:
        module = importlib.import_module(point.module)
    except ModuleNotFoundError:
        if point.module.startswith("uvicorn."):
            continue
        raise
    assert check(module, point) == (FITS, ""), point.target
    original = _find(module, point)[-1]
    hook = Hook(point, index, Recorder())
    wrapper = wrap(original, point.handler(hook), hook)
    found[point.target] = [parameters_of(wrapper).declared(), parameters_of(_undecorated(original)).declared()]
print(json.dumps(found))
