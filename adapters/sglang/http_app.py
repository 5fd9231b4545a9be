"""SGLang's HTTP application for processes that load no plugins: uvicorn's workers under `--tokenizer-worker-num`.

SGLANG_HTTP_SERVER_APP_PATH names the application that each worker imports; plugin.py sets it to this module. A module
with an application of the user's own calls `stagetrace.adapters.sglang.plugin.register()` before it imports sglang.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`app`, when it is asked for: the hooks go in before SGLang's modules are imported."""
    if name != "app":
        raise AttributeError(name)
    from .plugin import register

    register()
    from sglang.srt.entrypoints.http_server import app

    return app
