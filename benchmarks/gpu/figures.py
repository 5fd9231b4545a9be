"""What the GPU's benchmark makes of its measurements: kernels between marks, differences, medians, a table. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

MARK = "mark_kernel"  # in the name of a mark's kernel
GOAL_NS, GOAL_SHARE = 2000, 0.02  # a span is as good as its kernels' time within either


class Kernel(NamedTuple):
    """One kernel as a profiler saw it; ns."""

    name: str
    begin: int
    end: int


class Between(NamedTuple):
    """What ran between two marks, and the marks themselves; ns."""

    first: int  # begin of the first kernel, of the mark's own where there is none
    last: int  # end of the last
    opened: int  # begin of the first mark's kernel
    closed: int  # end of the second mark's


class Misfit(ValueError):
    """The kernels are not those of the steps that were run."""


def steps_of(kernels: Sequence[Kernel], order: Sequence[int]) -> list[dict[int, Between]]:
    """For each step what ran between marks 2i and 2i + 1, by i.

    `order` has the marks in the order in which each step passes them. Raises Misfit when there are others.
    """
    ordered = sorted(kernels, key=lambda kernel: kernel.begin)
    at = [number for number, kernel in enumerate(ordered) if MARK in kernel.name]
    if not at or not order or len(at) % len(order):
        raise Misfit(f"{len(at)} marks in the profile, {len(order)} in a step")
    found = []
    for start in range(0, len(at), len(order)):
        opened: dict[int, int] = {}
        step: dict[int, Between] = {}
        for place, mark in zip(at[start : start + len(order)], order, strict=True):
            if mark % 2 == 0:
                opened[mark // 2] = place
                continue
            if mark // 2 not in opened:
                raise Misfit(f"mark {mark} comes before mark {mark - 1}")
            first = opened.pop(mark // 2)
            inside = [kernel for kernel in ordered[first + 1 : place] if MARK not in kernel.name]
            begin, end = (inside[0].begin, max(each.end for each in inside)) if inside else (ordered[first].end,) * 2
            step[mark // 2] = Between(begin, end, ordered[first].begin, ordered[place].end)
        found.append(step)
    return found


@dataclass(frozen=True)
class Agreement:
    """How far spans are from the time of their kernels."""

    count: int
    median_ns: float | None  # of the differences, in absolute value
    worst_ns: float | None
    within: float | None  # share of spans within the goal


def agreement(pairs: Sequence[tuple[int, int]]) -> Agreement:
    """Of pairs of a span's duration and its kernels', in ns."""
    if not pairs:
        return Agreement(0, None, None, None)
    off = [abs(span - kernels) for span, kernels in pairs]
    good = sum(each <= max(GOAL_NS, GOAL_SHARE * kernels) for each, (_, kernels) in zip(off, pairs, strict=True))
    return Agreement(len(pairs), median(off), max(off), good / len(pairs))


@dataclass(frozen=True)
class Cost:
    """What one of something costs, by rounds that had it and rounds that had not; ns, median and quartiles."""

    median: float
    low: float
    high: float


def cost(without: Sequence[float], with_them: Sequence[float], number: int) -> Cost:
    """Of each of `number` in what was timed, from rounds in turn. Raises ValueError with fewer than two rounds."""
    each = [(have - lack) / number for lack, have in zip(without, with_them, strict=True)]
    low, middle, high = quantiles(each, n=4, method="inclusive")
    return Cost(middle, low, high)


def microseconds(nanoseconds: float | None) -> str:
    """With two decimals; a dash for what is not known."""
    return "-" if nanoseconds is None else f"{nanoseconds / 1000:.2f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text, the first column to the left."""
    widths = [max(len(row[at]) for row in (columns, *rows)) for at in range(len(columns))]
    lines = []
    for row in (columns, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join(line.rstrip() for line in lines)
