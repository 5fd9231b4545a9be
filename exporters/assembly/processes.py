"""What processes say of themselves: who they are, and what became of their hooks. Text of any content is safe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

from stagetrace.instrument.records import MAX_NAME

if TYPE_CHECKING:
    from collections.abc import Mapping

NAMES = "names"  # what is known of a process: handle, in decimal digits -> name
_MOST_KEYS = 256
_MOST_NAMES = 1024
_MOST_HOOKS = 1024
_MOST_ROLES = 8
_LARGEST = 1 << 62


class Processes:
    """By the process's key."""

    def __init__(self) -> None:
        self.info: dict[int, dict[str, Any]] = {}
        self.hooks: dict[int, dict[str, dict[str, str]]] = {}  # hook point -> what became of it
        self.hook_names: dict[int, dict[int, str]] = {}  # index -> hook point

    def told(self, process: int, data: dict[str, Any]) -> None:
        """A process said what it is, or that it is one thing more (a scheduler that is also a worker)."""
        info = self.info.setdefault(process, {})
        if isinstance(info.get(NAMES), dict):
            data = {**data, NAMES: info[NAMES]}
        roles = dict.fromkeys([*str(info.get("role") or "").split("+"), str(data.get("role") or "")])
        if len(info.keys() | data.keys()) <= _MOST_KEYS:
            info.update(data)
        info["role"] = "+".join([role for role in roles if role][:_MOST_ROLES])

    def named(self, process: int, handle: int, name: str) -> None:
        """A process said what a handle in its records stands for."""
        names = self.info.setdefault(process, {}).setdefault(NAMES, {})
        if isinstance(names, dict) and len(names) < _MOST_NAMES:
            names[str(handle)] = name[:MAX_NAME]

    def hooked(self, process: int, index: int, data: Mapping[str, Any]) -> None:
        """A process said what became of a hook point; `index` names it where the record does not."""
        index = small_integer(data.get("index")) or index
        hook = {name: str(data.get(name, "")) for name in ("name", "status", "why", "gives")} | {"index": str(index)}
        hooks = self.hooks.setdefault(process, {})
        names = self.hook_names.setdefault(process, {})
        if len(hooks) < _MOST_HOOKS and len(names) < _MOST_HOOKS:
            hooks[hook["name"]] = hook
            names[index] = hook["name"]

    def introduce(self, process: int, info: dict[str, Any], hooks: list[dict[str, str]]) -> None:
        """Makes a process known whose own words are no longer among the records."""
        if info:
            self.told(process, info)
        for hook in hooks:
            index = hook.get("index", "")
            self.hooked(process, int(index) if index.isdecimal() else 0, hook | {"index": None})


def parse(text: str) -> dict[str, Any] | None:
    """The JSON object in a record of text; None where it is none, or cannot be written again."""
    try:
        data = json.loads(text, parse_constant=_no_number)
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # a lone surrogate, say
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def small_integer(value: object, least: int = 0) -> int | None:
    """The value if it is an integer that fits a column, from `least` on."""
    return value if isinstance(value, int) and least <= value < _LARGEST * 2 else None
