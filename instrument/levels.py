"""The level that a process of a session starts with, and the highest one that it has hooks for."""

from __future__ import annotations

import os
from pathlib import Path

from .stages import Level

LEVEL_FILE = "level"  # in the session's directory: written by `stagetrace ctl`, read by processes that start later


def named(text: str | None, default: Level) -> Level:
    """The level of that name, in either case; `default` for any other text."""
    name = (text or "").strip().upper()
    return Level[name] if name in Level.__members__ else default


def session_level(session: Path) -> Level:
    """The level that the session records at now: as last switched, else STAGETRACE_LEVEL, else step."""
    try:
        text = (session / LEVEL_FILE).read_text("ascii", "replace")
    except OSError:
        text = None
    return named(text, named(os.environ.get("STAGETRACE_LEVEL"), Level.STEP))


def maximum_level() -> Level:
    """Hooks up to this level are installed: STAGETRACE_MAX_LEVEL, else what the process starts with, at least step."""
    start = named(os.environ.get("STAGETRACE_LEVEL"), Level.STEP)
    return named(os.environ.get("STAGETRACE_MAX_LEVEL"), max(start, Level.STEP))
