"""How a kernel window is shown: each stage's and each kernel's time, as tables or as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .kernels import UNATTRIBUTED, RankKernels
from .show import Grid, Part, duration_text, number_text, plain, print_parts, share_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from rich.console import Console

MOST_KERNELS = 15  # that are shown; the JSON object has all


def print_kernels(ranks: Sequence[RankKernels], console: Console) -> None:
    """Prints a window."""
    print_parts(kernel_parts(ranks), console)


def kernel_parts(ranks: Sequence[RankKernels]) -> list[Part]:
    """What is shown, in order. All strings are safe to show."""
    return [part for rank in ranks for part in (_said(rank), _stages(rank), _kernels(rank))]


def _said(rank: RankKernels) -> Part:
    what = "kernels" if rank.on_device else "operators"
    return (
        f"Kernel window, rank {rank.rank} (pid {rank.pid}): {rank.steps} steps in {duration_text(rank.window_ns)},"
        f" ended by {plain(rank.ended)}.\n"
        f"{what.capitalize()} took {duration_text(rank.busy_ns)}, {share_text(rank.attributed)} of it attributed to a"
        f" stage; no {what[:-1]} ran for {duration_text(rank.gap_ns)}.\n"
        f"Tied to segments within {duration_text(rank.error_ns)}. The engine waited {duration_text(rank.held_ns)} for"
        " the profiler, under which its steps are slower: shares count here, not speeds."
    )


def by_stage(rank: RankKernels) -> pd.DataFrame:
    """own_ns, calls and the share by name, of each stage, the largest first; `unattributed` last."""
    events = rank.events.assign(named=rank.events["own_ns"].where(rank.events["how"] == "name", 0.0))
    found = events.groupby("stage").agg(own_ns=("own_ns", "sum"), calls=("own_ns", "size"), named_ns=("named", "sum"))
    found = found.sort_values("own_ns", ascending=False)
    last = found.index == UNATTRIBUTED
    return found[~last].combine_first(found[last]).loc[[*found.index[~last], *found.index[last]]]


def by_kernel(rank: RankKernels) -> pd.DataFrame:
    """own_ns and calls of each kernel or operator in each stage, the largest first."""
    found = rank.events.groupby(["stage", "name", "kind"]).agg(own_ns=("own_ns", "sum"), calls=("own_ns", "size"))
    return found.sort_values("own_ns", ascending=False).reset_index()


def _stages(rank: RankKernels) -> Grid:
    busy, steps = max(rank.busy_ns, 1), max(rank.steps, 1)
    rows = [
        (
            str(stage),
            duration_text(row["own_ns"] / steps),
            share_text(row["own_ns"] / busy),
            number_text(row["calls"] / steps),
            share_text(row["named_ns"] / max(row["own_ns"], 1.0)),
        )
        for stage, row in by_stage(rank).iterrows()
    ]
    title = f"Time by stage, rank {rank.rank}"
    return Grid(
        title, ("stage", "a step", "share", "launches a step" if rank.on_device else "calls a step", "by name"), rows
    )


def _kernels(rank: RankKernels) -> Grid:
    busy, steps = max(rank.busy_ns, 1), max(rank.steps, 1)
    found = by_kernel(rank)
    rows = [
        (
            plain(str(row["name"]), 70),
            str(row["stage"]),
            str(row["kind"]),
            duration_text(row["own_ns"] / steps),
            share_text(row["own_ns"] / busy),
            number_text(row["calls"] / steps),
        )
        for _, row in found.head(MOST_KERNELS).iterrows()
    ]
    rest = len(found) - len(rows)
    title = f"{'Kernels' if rank.on_device else 'Operators'} that took longest, rank {rank.rank}"
    title += f" ({rest} more)" if rest > 0 else ""
    return Grid(title, ("name", "stage", "kind", "a step", "share", "calls a step"), rows)


def kernels_dict(rank: RankKernels) -> dict[str, Any]:
    """One rank's window for a JSON object; times in ns."""
    return {
        "rank": rank.rank,
        "pid": rank.pid,
        "ended": rank.ended,
        "steps": rank.steps,
        "window_ns": rank.window_ns,
        "held_ns": rank.held_ns,
        "clock_error_ns": rank.error_ns,
        "on_device": rank.on_device,
        "busy_ns": rank.busy_ns,
        "gap_ns": rank.gap_ns,
        "attributed": rank.attributed,
        "stages": by_stage(rank).round().astype(int).reset_index().to_dict("records"),
        "kernels": by_kernel(rank).round({"own_ns": 0}).to_dict("records"),
    }
