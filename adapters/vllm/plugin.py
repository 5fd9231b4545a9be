"""vLLM's door: the entry point in the group vllm.general_plugins, called in every process of the engine.

Not armed (no STAGETRACE_SESSION), it returns before it imports anything of ours. Whatever goes wrong stays here: an
exception from a plugin would end the engine.
"""

import os


def register() -> None:
    """Installs the hooks in this process, once, if it is armed."""
    if not os.environ.get("STAGETRACE_SESSION"):
        return
    try:
        from .install import install

        install()
    except Exception:
        import logging

        logging.getLogger("stagetrace").warning("stagetrace could not be installed in this process", exc_info=True)
