"""Causes among several ranks and experts: a late rank, moving bytes, uneven experts. Recorded at level layer. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stagetrace.exporters.session import names_of
from stagetrace.instrument.stages import BY_NAME, Collective, Level

from ..layers import expert_loads, experts_by_rank, with_waiting
from .facts import Facts, Values
from .finding import Evidence, Missing, of_steps, seen
from .shares import Share, share_of
from .thresholds import limit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd

    from ..layers import ExpertLoad
    from .finding import Answer

_COLLECTIVE = BY_NAME["collective"].id
_EXCHANGES = (Collective.DISPATCH, Collective.COMBINE)


def _layers(facts: Facts, what: str) -> Missing:
    if facts.level is not None and facts.level < Level.LAYER:
        return Missing(f"{what} are not recorded at level {facts.level.name.lower()}", Level.LAYER)
    return Missing(f"{what} were not recorded: a compiler hides them, or their hooks are not there")


def _ranks(facts: Facts) -> int:
    return max(facts.setting("world_size"), facts.setting("tensor_parallel"), 1)


def _compared(facts: Facts) -> pd.DataFrame | Missing | None:
    """The collectives of complete steps, with how long each waited for the last rank."""
    if _ranks(facts) < 2:
        return None
    rows = facts.segments[facts.segments["stage"] == _COLLECTIVE]
    if not len(rows):
        return _layers(facts, "collectives")
    place = facts.place(rows)
    rows = rows.assign(place=place, duration=rows["end_ns"] - rows["begin_ns"])[place >= 0]
    rows = with_waiting(rows, names_of(facts.manifest.processes))
    return rows if len(rows) else Missing("no collective belongs to a complete step")


def _per_step(facts: Facts, rows: pd.DataFrame, values: pd.Series) -> Values:
    """Sums by step, on one rank."""
    ranks = max(int(rows["process"].nunique()), 1)
    place = rows["place"].to_numpy(dtype=np.int64)
    return np.bincount(place, weights=values.to_numpy(dtype=np.float64), minlength=len(facts.steps)) / ranks


def straggler_rank(facts: Facts) -> Answer:
    """Most of the waiting is for the same rank."""
    rows = _compared(facts)
    if rows is None or isinstance(rows, Missing):
        return rows
    rows = rows[rows["waiting"].notna()]
    if len(rows) < limit("steps"):
        return Missing("too few collectives were recorded on more than one rank")
    # Of every operation: who came last, and how long the others waited for it.
    operation = rows.groupby(["of", "a1", "a4"])
    last = rows.loc[operation["begin_ns"].transform("max") == rows["begin_ns"], ["of", "a1", "a4", "process"]]
    waited = operation["waiting"].sum().rename("waited").reset_index()
    blamed = waited.merge(last.drop_duplicates(["of", "a1", "a4"]), on=["of", "a1", "a4"])
    by_process = blamed.groupby("process")["waited"].sum().sort_values(ascending=False)
    whole = float(by_process.sum())
    blame = float(by_process.iloc[0]) / whole if whole > 0 else 0.0
    worst = int(by_process.index[0])
    # The waiting of the ranks that are not late is what the late one holds up; for every other rank there is waiting as
    # well, and so much of it is chance.
    mine = rows[rows["process"] != worst]
    others = (whole - float(by_process.iloc[0])) / max(rows["process"].nunique() - 1, 1)
    more = 1 - others / float(by_process.iloc[0]) if whole > 0 else 0.0
    lost = np.minimum(_per_step(facts, mine, more * mine["waiting"].astype("float64")), facts.period)
    forward = float(np.maximum(facts.uncut("forward"), 1).sum()) + float(facts.uncut("collective").sum())
    rank = next((each.info.get("rank") for each in facts.manifest.processes if each.key == worst), None)
    return seen(
        of_steps(facts, lost),
        "waiting_share",
        also=blame >= limit("one_rank"),
        evidence=(
            Evidence("the late rank", float(rank) if isinstance(rank, int) else -1.0, "rank"),
            Evidence("of all waiting is for it", blame, "share"),
            Evidence("operations that were compared", float(len(blamed)), "operations"),
            Evidence(
                "waiting in an operation of the others, mean", float(mine["waiting"].mean()) if len(mine) else 0.0, "ns"
            ),
            Evidence(
                "waiting beyond that for another rank, of the time in forward", float(lost.sum()) / forward, "share"
            ),
        ),
        examples=facts.step_examples(lost),
        note="" if isinstance(rank, int) else "Which rank that is was not recorded.",
    )


def collective_share(facts: Facts) -> Answer:
    """Collectives, after the last rank has come."""
    rows = _compared(facts)
    if rows is None or isinstance(rows, Missing):
        return rows
    rows = rows[~rows["a0"].isin(_EXCHANGES).to_numpy(dtype=bool)]
    if not len(rows):
        return None
    waiting = rows["waiting"].astype("Float64").fillna(0.0).astype("float64")
    moving = np.minimum(_per_step(facts, rows, rows["duration"] - waiting), facts.period)
    operations = len(rows)
    return seen(
        of_steps(facts, moving),
        "collective_share",
        evidence=(
            Evidence("operations", float(operations), "operations"),
            Evidence("after the last rank had come, mean", float((rows["duration"] - waiting).mean()), "ns"),
            Evidence("waiting for the last rank, mean", float(waiting.mean()), "ns"),
            Evidence("bytes that a rank gives, mean", float(rows["a2"].mean()), "bytes"),
        ),
        examples=facts.step_examples(moving),
    )


def dispatch_combine_share(facts: Facts) -> Answer:
    """Sending tokens to experts and back."""
    if facts.setting("expert_parallel_size") < 2 and facts.info.get("expert_parallel") is not True:
        return None
    rows = facts.segments[facts.segments["stage"] == _COLLECTIVE]
    rows = rows[rows["a0"].isin(_EXCHANGES).to_numpy(dtype=bool)]
    if not facts.has("expert_dispatch", "expert_combine") and not len(rows):
        return _layers(facts, "expert dispatch and combine")
    place = facts.place(rows)
    rows = rows.assign(place=place)[place >= 0]
    lost = facts.uncut("expert_dispatch", "expert_combine")
    if len(rows):
        lost = lost + _per_step(facts, rows, rows["self_ns"])
    lost = np.minimum(lost, facts.period)
    return seen(
        of_steps(facts, lost),
        "dispatch_share",
        evidence=(
            Evidence("of a step, median", float(np.median(lost)), "ns"),
            Evidence("computing the experts, median", float(np.median(facts.uncut("expert_compute"))), "ns"),
        ),
        examples=facts.step_examples(lost),
    )


def expert_imbalance(facts: Facts) -> Answer:
    """Experts get uneven numbers of tokens over all steps."""
    if not len(facts.experts):
        return None if facts.has_experts is False else _layers(facts, "tokens by expert")
    by_rank = experts_by_rank(facts.manifest.processes)
    loads = expert_loads(facts.experts, by_rank)
    if not loads:
        return None
    worst = max(loads, key=lambda load: load.imbalance)
    tokens = sum(load.tokens for load in loads)
    found = _imbalance(facts, loads)
    ranks = [load.rank_imbalance_per_step for load in loads if load.rank_imbalance_per_step is not None]
    compute = facts.stage("expert_compute")
    # With experts on several ranks all wait for the busiest one: even, they would take what the mean rank takes.
    saved = 1 - 1 / float(np.mean(ranks)) if ranks else 0.0
    parts = of_steps(facts, compute)
    return seen(
        parts,
        None,
        lambda part: float(np.nansum(part.part)) * saved,
        also=found.low >= limit("imbalance") and tokens >= limit("tokens_per_expert") * worst.experts * len(loads),
        evidence=(
            Evidence("most over mean of the experts, over all steps and layers", found.value, "times"),
            Evidence("at least, by the lower end of its 95 % interval", found.low, "times"),
            Evidence("in the most uneven layer", worst.imbalance, "times"),
            Evidence("that layer", float(worst.layer), "layer"),
            Evidence("its busiest expert", float(worst.hot[0][0]), "expert"),
            Evidence("of its tokens go there", worst.hot[0][1], "share"),
            Evidence(
                "busiest over mean of the ranks, in single steps", float(np.mean(ranks)) if ranks else 1.0, "times"
            ),
        ),
        examples=facts.step_examples(compute),
        note=""
        if ranks
        else "Every rank has a part of every expert here, so that it costs next to nothing; it would with expert"
        " parallelism.",
    )


def _imbalance(facts: Facts, loads: Sequence[ExpertLoad]) -> Share:
    """The most over the mean of each layer's experts, of all layers, with its interval over blocks of steps.

    Texts differ in the experts that they go to, so that what is uneven in one session may not be in the next.
    """
    most = max(load.experts for load in loads)
    layers, place = facts.experts["layer"].to_numpy(), facts.place(facts.experts)
    busiest, all_of_it = np.zeros(len(facts.steps)), np.zeros(len(facts.steps))
    for load in loads:
        mine = np.flatnonzero(layers == load.layer)
        hot, rows = load.hot[0][0], facts.experts.iloc[mine]
        given = [counts[hot] if hot < len(counts) else 0 for counts in rows["counts"]]
        np.add.at(busiest, place[mine], np.asarray(given, dtype=np.float64) * load.experts / most)
        shares = rows["tokens"].to_numpy(dtype=np.float64)  # each token goes to as many experts
        np.add.at(all_of_it, place[mine], shares * load.tokens / max(shares.sum(), 1.0))
    share = share_of(busiest, all_of_it)
    return Share(share.value * most, share.low * most, share.high * most)


CHECKS: dict[str, Callable[[Facts], Answer]] = {
    "straggler_rank": straggler_rank,
    "collective_share": collective_share,
    "dispatch_combine_share": dispatch_combine_share,
    "expert_imbalance": expert_imbalance,
}
