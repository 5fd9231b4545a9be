"""SGLang's door: the entry point in the group sglang.srt.plugins, called in every process that loads plugins.

Not armed (no STAGETRACE_SESSION), it returns before it imports anything of ours. Several tokenizer workers load no
plugins; SGLang lets a variable name the application that they import: ours (http_app.py), unless the user has named
another.
"""

import os

APP_PATH_VARIABLE = "SGLANG_HTTP_SERVER_APP_PATH"
APP_PATH = "stagetrace.adapters.sglang.http_app:app"


def register() -> None:
    """Installs the hooks in this process, once, if it is armed, and sees to those that load no plugins."""
    if os.environ.get("STAGETRACE_SESSION"):
        from stagetrace.adapters import installing

        os.environ.setdefault(APP_PATH_VARIABLE, APP_PATH)
        installing.register(__package__)
