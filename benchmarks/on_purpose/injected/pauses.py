"""Pauses put into functions of an engine, and what was asked for, by kind."""

from __future__ import annotations

import functools
import json
import os
import time
from typing import Any

ASKED: dict[str, dict[str, Any]] = json.loads(os.environ.get("INJECTED", "{}"))


def slept(function: Any, seconds: Any) -> Any:
    """The function after a pause of so many seconds (a number, or what a function of its arguments gives)."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        pause = seconds(*args, **kwargs) if callable(seconds) else seconds
        if pause > 0:
            time.sleep(pause)
        return function(*args, **kwargs)

    return wrapper


def patch(module: Any, place: str, seconds: Any) -> None:
    """Slows a function of a module down."""
    *owners, name = place.split(".")
    owner = functools.reduce(getattr, owners, module)
    setattr(owner, name, slept(getattr(owner, name), seconds))


def paused(*places: str) -> Any:
    """Puts the same pause, `ms` of what was asked, before functions of a module."""

    def apply(module: Any, asked: Any) -> None:
        for place in places:
            patch(module, place, asked["ms"] / 1e3)

    return apply
