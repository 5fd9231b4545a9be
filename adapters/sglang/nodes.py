"""What the ranks of a server share when they run on several nodes, so that all name the same engine instance."""

from __future__ import annotations

import secrets
import sys
from typing import Any

_KEY = "stagetrace/instance"


def shared_token(args: Any) -> str:
    """A random word that is the same on every rank of this start, and another after a restart; empty on one node.

    Whichever rank comes first puts it into the store by which PyTorch's ranks have found each other: one request at the
    start, which waits for no other rank. Empty too where there is no such store.
    """
    if int(getattr(args, "nnodes", None) or 1) == 1:
        return ""
    try:
        store = sys.modules["torch"].distributed.distributed_c10d._get_default_store()
        return str(store.compare_set(_KEY, "", secrets.token_hex(8)).decode())
    except Exception:  # another PyTorch: each node is then an instance of its own
        return ""
