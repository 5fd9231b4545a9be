"""How the parts of latencies are shown: a table for each latency, and their part of the JSON object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .latency_parts import PARTS, Group, LatencyParts
from .show import MISSING, Grid, Part, duration_text, plain, share_text

if TYPE_CHECKING:
    from collections.abc import Sequence


def parts_dict(found: Sequence[LatencyParts]) -> dict[str, Any]:
    """By latency and group, in whole nanoseconds."""
    return {each.latency: {group.of: _group(group) for group in each.groups} for each in found}


def _group(group: Group) -> dict[str, Any]:
    return {
        "count": group.count,
        "least_ns": round(group.least_ns),
        "most_ns": round(group.most_ns),
        "mean_ns": round(group.mean_ns),
        "parts": {name: round(amount) for name, amount in group.parts.items()},
        "examples": group.examples,
    }


def parts_tables(found: Sequence[LatencyParts], path: str) -> list[Part]:
    """A table for each latency, and how to see one of the slow requests."""
    shown: list[Part] = [_table(each) for each in found]
    slowest = next((group.examples[0] for each in found for group in reversed(each.groups) if group.examples), None)
    if slowest is not None:
        shown.append(f"One of the slowest: `stagetrace report {plain(path)} --request {plain(slowest)}`")
    return shown


def _table(each: LatencyParts) -> Grid:
    names = [name for name in PARTS if any(name in group.parts for group in each.groups)]
    rows = [[each.latency, *(duration_text(group.mean_ns) for group in each.groups)]]
    rows += [[f"  {name}", *(_cell(group, name) for group in each.groups)] for name in names]
    what = "intervals" if each.latency == "itl" else "requests"
    counts = ", ".join(str(group.count) for group in each.groups)
    title = f"Where {each.latency} went: means over all and over the {what} around a percentile ({counts} {what})"
    return Grid(title, ("", *(group.of for group in each.groups)), rows)


def _cell(group: Group, name: str) -> str:
    if name not in group.parts:
        return MISSING
    amount = group.parts[name]
    return f"{duration_text(amount)} {share_text(amount / group.mean_ns if group.mean_ns else None):>6}"
