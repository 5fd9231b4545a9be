"""vLLM's door: the entry point in the group vllm.general_plugins, called in every process of the engine.

Not armed (no STAGETRACE_SESSION), it returns before it imports anything of ours.
"""

import os


def register() -> None:
    """Installs the hooks in this process, once, if it is armed."""
    if os.environ.get("STAGETRACE_SESSION"):
        from stagetrace.adapters import installing

        installing.register(__package__)
