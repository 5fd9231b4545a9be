"""Gives free memory back to the system: a process that runs for weeks holds what it needs and no more."""

from __future__ import annotations

import ctypes

import pyarrow as pa


def give_back() -> None:
    """Arrow's pool and the C library keep what was freed, piecemeal and for good; takes some milliseconds."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)
