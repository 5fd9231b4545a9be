"""What the GPU's benchmark makes of its measurements: kernels between marks, differences, medians, a table. Pure."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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
    low, middle, high = sorted(quantiles(each, n=4, method="inclusive"))  # of equal rounds they differ by rounding
    return Cost(middle, low, high)


class Stretch(NamedTuple):
    """What one stage of a step launched, as a profiler saw it run; ns of its clock."""

    first: int  # begin of the first kernel or copy
    last: int  # end of the last
    busy: int  # in which any of them ran
    number: int


_LAUNCHES = ("cuda_runtime", "cuda_driver")
_RUNS = ("kernel", "gpu_memcpy", "gpu_memset")


def stretches(trace: Mapping[str, Any], begins: str, ends: str) -> dict[tuple[str, int], Stretch]:
    """By stage and step, from a trace as torch.profiler exports it, which has ranges around what each launches.

    The ranges are named `begins` and a stage, `ends` and a stage and a step; what a thread launched between two of them
    is found again on the device by its correlation. A stage that launched nothing is left out.
    """
    base = int(trace.get("baseTimeNanoseconds", 0))
    marks: dict[int, list[tuple[int, int, str]]] = {}  # by thread: begin, end, name
    launched: dict[int, list[tuple[int, int]]] = {}  # by thread: when, correlation
    ran: dict[int, list[tuple[int, int]]] = {}  # by correlation: begin, end
    for event in trace["traceEvents"]:
        kind = event.get("cat")
        if event.get("ph") != "X" or kind is None:
            continue
        begin = base + round(1000 * float(event["ts"]))
        end = begin + round(1000 * float(event.get("dur", 0)))
        if kind in _RUNS:
            ran.setdefault(event["args"]["correlation"], []).append((begin, end))
        elif kind in _LAUNCHES:
            launched.setdefault(event["tid"], []).append((begin, event["args"].get("correlation", 0)))
        elif kind == "user_annotation" and event["name"].startswith((begins, ends)):
            marks.setdefault(event["tid"], []).append((begin, end, event["name"]))
    found = {}
    for thread, ranges in marks.items():
        launches = sorted(launched.get(thread, []))
        opened: dict[str, int] = {}
        for begin, end, name in sorted(ranges):
            if name.startswith(begins):
                opened[name.removeprefix(begins)] = end
                continue
            stage, _, step = name.removeprefix(ends).rpartition(" ")
            since = opened.pop(stage, None)
            if since is None:
                continue
            between = launches[bisect_left(launches, (since, 0)) : bisect_left(launches, (begin, 0))]
            times = sorted(time for _, correlation in between for time in ran.get(correlation, ()))
            if times:
                found[stage, int(step)] = Stretch(
                    times[0][0], max(last for _, last in times), _covered(times), len(times)
                )
    return found


def kernels_of(trace: Mapping[str, Any]) -> list[Kernel]:
    """All that ran on the device, from a trace as torch.profiler exports it."""
    base = int(trace.get("baseTimeNanoseconds", 0))
    found = []
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in _RUNS:
            begin = base + round(1000 * float(event["ts"]))
            found.append(Kernel(event["name"], begin, begin + round(1000 * float(event["dur"]))))
    return found


def _covered(times: Iterable[tuple[int, int]]) -> int:
    """How long at least one of these intervals lasted; they are in the order of their begins."""
    covered, reached = 0, 0
    for begin, end in times:
        covered += max(end - max(begin, reached), 0)
        reached = max(reached, end)
    return covered


class Span(NamedTuple):
    """A device stage of a step as stagetrace recorded it; ns of the host's clock."""

    begin: int
    end: int
    clock_error: int


@dataclass(frozen=True)
class Quartiles:
    """Of some values; None of none."""

    median: float | None
    low: float | None
    high: float | None


def quartiles(values: Sequence[float]) -> Quartiles:
    """The median of some values and the quartiles around it."""
    if len(values) < 2:
        return Quartiles(*[values[0] if values else None] * 3)
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return Quartiles(middle, low, high)


@dataclass(frozen=True)
class Compared:
    """Spans of one stage beside what the profiler saw run between their events."""

    length: Agreement  # a span's duration and its kernels' time
    ahead: Quartiles  # from a span's begin to its first kernel's, ns: the events' own distance, and both clocks' errors
    behind: Quartiles  # from its last kernel's end to the span's
    outside: int  # spans in which a kernel begins or ends further outside than the span's clock error
    busy: float | None  # share of the kernels' time in which one of them ran


def compared(spans: Mapping[int, Span], kernels: Mapping[int, Stretch], offset: int) -> Compared:
    """Both by step. `offset`: of the profiler's clock less the host's, ns."""
    both = [(spans[step], kernels[step]) for step in sorted(spans.keys() & kernels.keys())]
    ahead = [stretch.first - span.begin - offset for span, stretch in both]
    behind = [span.end + offset - stretch.last for span, stretch in both]
    extent = sum(stretch.last - stretch.first for _, stretch in both)
    return Compared(
        agreement([(span.end - span.begin, stretch.last - stretch.first) for span, stretch in both]),
        quartiles(ahead),
        quartiles(behind),
        sum(min(early, late) < -span.clock_error for early, late, (span, _) in zip(ahead, behind, both, strict=True)),
        sum(stretch.busy for _, stretch in both) / extent if extent else None,
    )


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
