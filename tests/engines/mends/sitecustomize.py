"""Mends vLLM in every process that has this folder on its path (mending.py)."""

import mending  # noqa: F401
