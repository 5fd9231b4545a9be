"""What the benchmarks share: timing alternatives in turn, medians with their spread, tables, and the JSON object.

The machine is never quiet, so no figure is a lone time: alternatives are timed in turn in one loop, ratios are taken
within a round, and what is shown is the median over the rounds with its quartiles.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping, Sequence

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    def json(self) -> list[float]:
        """The quartiles; the median has a key of its own."""
        return [significant(self.low), significant(self.high)]


def spread(values: Values) -> Spread:
    """The median and quartiles of some values."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return Spread(float(median), float(low), float(high))


def rounds(alternatives: Mapping[str, Callable[[], float]], count: int, seed: int = 3) -> dict[str, Values]:
    """Calls every alternative once in each of `count` rounds, in an order of its own; what each returned, by round.

    The first round warms up and is left out. The garbage collector is off meanwhile: what it does is in none of them.
    """
    chance = random.Random(seed)
    order = list(alternatives)
    found: dict[str, list[float]] = {name: [] for name in order}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(count + 1):
            chance.shuffle(order)
            for name in order:
                value = alternatives[name]()
                if number:
                    found[name].append(value)
    finally:
        if collecting:
            gc.enable()
    return {name: np.array(values) for name, values in found.items()}


def per_call(statement: str, names: Mapping[str, Any], calls: int) -> Callable[[], float]:
    """A function that runs `statement` so many times and gives ns for each, the loop's own time included.

    It is this thread's time on a processor: when the machine runs something else meanwhile, that does not count.
    """
    # Names that no statement uses: with one of them it would time something else.
    source = f"def _run(_times, _now):\n _begin = _now()\n for _ in _times:\n  {statement}\n return _now() - _begin"
    scope = dict(names)
    exec(source, scope)
    run = scope["_run"]
    return lambda: float(run(range(calls), time.thread_time_ns) / calls)


def interval(values: Values, seed: int = 3, resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % confidence interval of the values' mean, by bootstrap. Infinite with fewer than three values."""
    if len(values) < 3:
        return -np.inf, np.inf
    chosen = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[chosen].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


# What is shown


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was when they began."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def machine_line(found: Mapping[str, Any]) -> str:
    """The same as a line of text."""
    load = found["load_average"][0]
    return f"{found['cores']} cores of {found['cpu']}, Python {found['python']}, load average {load} at the start"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table as the reports have it: the first column names, the others are figures."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", header_style="dim", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough for every column where there is none."""
    return Console(highlight=False, markup=False) if sys.stdout.isatty() else Console(width=140, markup=False)


def figure(value: Spread | float, digits: int = 3) -> str:
    """A number with so many significant digits; of a spread, the median with its quartiles."""
    if isinstance(value, Spread):
        return f"{figure(value.median, digits)} ({figure(value.low, digits)} to {figure(value.high, digits)})"
    return f"{significant(value, digits):,.15g}" if np.isfinite(value) else "none"


def significant(value: float, digits: int = 4) -> float:
    """The number rounded to so many significant digits; NaN and infinities as they are."""
    return float(f"{value:.{digits}g}")


def met(value: float, goal: float) -> str:
    """How a figure stands to the most that it should be."""
    return f"{'met' if value <= goal else 'MISSED'} (goal: at most {goal:g})"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object at the end, too")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works, not to measure")


def print_json(figures: Mapping[str, Any]) -> None:
    """The one JSON object, on the last line; what is not a number is null."""
    print(json.dumps(_plain(figures)), flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float | np.floating):
        return significant(float(value)) if np.isfinite(value) else None
    return value
