"""What happened inside the forward pass, where layers were recorded: stages by kind, collectives, tokens by expert.

All of it is of complete steps. Times are nanoseconds of the host's clock. What every number means is in
docs/numbers.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from stagetrace.exporters.session import names_of, not_visible_of
from stagetrace.instrument.stages import BY_NAME, STAGES, AttentionKind, Collective, Level, Timeline

from .breakdown import Distribution, distribution, distribution_of
from .placed import NOWHERE, step_places

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from stagetrace.exporters.session import Manifest, Process

# The columns that are read beside those of the breakdown.
SEGMENTS = ["partial", "a0", "a1", "a2", "a3", "a4"]
EXPERTS = ["instance", "step", "rank", "layer", "tokens", "counts"]
_MOST_KINDS, _MOST_LAYERS = 1_000, 100_000  # what is beyond is taken for the last
HOT = 3  # experts named of a layer

_STEP_KEY = ["instance", "step"]
_LAYER_STAGES = {
    stage.id: stage for stage in STAGES if stage.level is Level.LAYER and stage.timeline is not Timeline.DEVICE
}
_COLLECTIVE = BY_NAME["collective"]
_ATTENTION = BY_NAME["attention"]
_FORWARD, _SAMPLE = BY_NAME["forward"].id, BY_NAME["sample"].id
_WITH_LAYER = {stage.id for stage in _LAYER_STAGES.values() if stage.attributes and stage.attributes[0].name == "layer"}
# Groups of an engine instance of its own have the same names in the others: the operations of two are not the same.
_OVER_INSTANCES = ("dp", "ep", "world", "eplb", "etdp", "inner_dp")


@dataclass(frozen=True)
class LayerStage:
    """One stage of the layer level, of all ranks and steps; attention by its kind."""

    stage: str
    kind: str | None
    layers: int | None  # how many there are with it
    count: int
    self_ns: int
    share: float | None  # of the time in forward
    duration: Distribution
    slowest_layer: int | None  # by mean duration
    slowest_ns: float | None  # that mean


@dataclass(frozen=True)
class LayerTime:
    """One stage of one layer, of all ranks and steps."""

    stage: str
    kind: str | None
    layer: int
    count: int
    self_ns: int
    mean_ns: float  # duration, with what is inside


@dataclass(frozen=True)
class RankCollectives:
    """The collectives of one rank, where several were recorded."""

    process: int  # its key
    count: int
    total_ns: int
    compared: int  # whose operation was recorded on another rank as well
    waiting_ns: int  # of these, until the last of the recorded ranks had come
    moving_ns: int  # of these, after that


@dataclass(frozen=True)
class CollectiveTime:
    """One operation of one group of ranks, of all steps."""

    op: str
    group: str
    algorithm: str | None
    ranks: int  # that were recorded
    count: int  # of segments: each rank's counts
    bytes: int  # of all of them
    duration: Distribution
    total_ns: int
    compared: int  # segments whose operation was recorded on another rank as well
    waiting_ns: int | None  # of these, until the last of the recorded ranks had come
    moving_ns: int | None  # of these, after that
    bytes_per_s: float | None  # of these, while moving


@dataclass(frozen=True)
class ExpertLoad:
    """How a layer's tokens were spread over its experts, and over the ranks that have them."""

    layer: int
    experts: int
    tokens: int  # sum over experts: a token counts once for each expert that it was sent to
    imbalance: float  # the most over the mean, of the sums over all steps
    imbalance_per_step: float  # of single steps, weighted by their tokens
    rank_imbalance_per_step: float | None  # the same by rank; None where every rank has a part of every expert
    hot: list[tuple[int, float]]  # experts with the most tokens, and their share of them
    idle: int  # experts without a token


@dataclass(frozen=True)
class Layers:
    """What was recorded inside forward passes."""

    stages: list[LayerStage]
    by_layer: list[LayerTime]
    collectives: list[CollectiveTime]
    ranks: list[RankCollectives]
    experts: list[ExpertLoad]
    not_visible: list[str]  # stages that the model has and a compiler has put into its graphs
    not_in_model: list[str]  # stages that no worker's model has

    @property
    def is_empty(self) -> bool:
        """Whether no layer was recorded."""
        return not (self.stages or self.collectives or self.experts)


def layer_breakdown(manifest: Manifest, steps: pd.DataFrame, segments: pd.DataFrame, experts: pd.DataFrame) -> Layers:
    """The layer level of a session; `segments` with SEGMENTS, `experts` with EXPERTS."""
    complete = steps.loc[steps["status"] == "complete", _STEP_KEY].drop_duplicates().reset_index(drop=True)
    calls, whole = _calls(segments, complete)
    collectives = segments.iloc[calls.row[calls.stage == _COLLECTIVE.id]]
    collectives = collectives.assign(duration=collectives["end_ns"] - collectives["begin_ns"])
    names = names_of(manifest.processes)
    not_visible, not_in_model = invisible(manifest.processes)
    collectives = with_waiting(collectives, names) if len(collectives) else collectives
    return Layers(
        stages=_stages(calls),
        by_layer=_by_layer(calls),
        collectives=_collectives(collectives, names),
        ranks=_ranks(collectives),
        experts=expert_loads(experts.merge(complete[whole], on=_STEP_KEY), experts_by_rank(manifest.processes)),
        not_visible=not_visible,
        not_in_model=not_in_model,
    )


def _workers(processes: Iterable[Process]) -> list[Process]:
    return [process for process in processes if isinstance(process.info.get("visible"), list)]


def invisible(processes: Iterable[Process]) -> tuple[list[str], list[str]]:
    """The layer's stages that a compiler hides, and those that no model has, as far as the workers say."""
    workers = _workers(processes)
    if not workers:
        return [], []
    visible = {str(name) for worker in workers for name in worker.info["visible"]}
    hidden = {name for worker in workers for name in not_visible_of(worker)} - visible
    has = visible | hidden | {"logits"}
    if any(worker.info.get("world_size") != 1 or worker.info.get("data_parallel") != 1 for worker in workers):
        has.add("collective")
    named = [stage.name for stage in _LAYER_STAGES.values()]
    return [name for name in named if name in hidden], [name for name in named if name not in has]


# Stages


@dataclass(frozen=True, eq=False)
class _Calls:
    """Segments of layers, and of what they are parts of, one element each."""

    row: npt.NDArray[np.int64]  # of the frame
    stage: npt.NDArray[np.int16]
    kind: npt.NDArray[np.int16]  # of attention, 0 for others
    layer: npt.NDArray[np.int32]  # -1 for none
    duration: npt.NDArray[np.int64]
    self_ns: npt.NDArray[np.int64]

    def groups(self) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
        """Stage, kind and places of each layer stage and kind, in the order of the vocabulary."""
        for stage in np.unique(self.stage):
            if int(stage) in _LAYER_STAGES:
                own = np.flatnonzero(self.stage == stage)
                kinds = self.kind[own]
                for kind in np.unique(kinds):
                    yield int(stage), int(kind), own[kinds == kind]

    def by_layer(self, own: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
        """Of the calls at these places the layers, each one's number of calls, and sums of self time and duration."""
        own = own[self.layer[own] >= 0]
        layer = self.layer[own]
        counts = np.bincount(layer)
        layers = np.flatnonzero(counts)
        sums = (np.bincount(layer, weights=each[own])[layers] for each in (self.self_ns, self.duration))
        return layers, counts[layers], *(each.astype(np.int64) for each in sums)


def _calls(segments: pd.DataFrame, steps: pd.DataFrame) -> tuple[_Calls, npt.NDArray[np.bool_]]:
    """The segments of steps whose layers were recorded, and which steps are not partial in this.

    A step whose layers were not recorded says nothing of how much of it they took.
    """
    stage = segments["stage"].to_numpy(np.int16)
    of_layers = np.isin(stage, [*_LAYER_STAGES])
    whole = np.ones(len(steps), bool)
    chosen = np.zeros(0, np.int64)
    if of_layers.any():
        place = step_places(steps, segments["instance"], segments["step"])
        layered = np.zeros(len(steps), bool)
        known = of_layers & (place != NOWHERE)
        layered[place[known]] = True
        whole[place[known & segments["partial"].to_numpy(bool)]] = False
        used = (of_layers | np.isin(stage, [_FORWARD, _SAMPLE])) & (place != NOWHERE)
        chosen = np.flatnonzero(used)
        chosen = chosen[(layered & whole)[place[chosen]]]
    stage = stage[chosen]
    kind = np.zeros(len(chosen), np.int16)
    attention = np.flatnonzero(stage == _ATTENTION.id)
    kind[attention] = np.clip(segments["a1"].iloc[chosen[attention]].to_numpy(np.int64, na_value=0), 0, _MOST_KINDS)
    layer = np.full(len(chosen), -1, np.int32)
    with_layer = np.flatnonzero(np.isin(stage, [*_WITH_LAYER]))
    layer[with_layer] = np.clip(
        segments["a0"].iloc[chosen[with_layer]].to_numpy(np.int64, na_value=-1), -1, _MOST_LAYERS
    )
    duration = segments["end_ns"].to_numpy(np.int64)[chosen]
    duration -= segments["begin_ns"].to_numpy(np.int64)[chosen]
    return _Calls(chosen, stage, kind, layer, duration, segments["self_ns"].to_numpy(np.int64)[chosen]), whole


def _stages(calls: _Calls) -> list[LayerStage]:
    forward = int(calls.duration[calls.stage == _FORWARD].sum())
    found = []
    for stage, kind, own in calls.groups():
        layers, counts, _, durations = calls.by_layer(own)
        means = durations / counts
        several = len(layers) > 1
        self_ns = int(calls.self_ns[own].sum())
        found.append(
            LayerStage(
                stage=_LAYER_STAGES[stage].name,
                kind=_text(AttentionKind, kind) if kind else None,
                layers=len(layers) if stage in _WITH_LAYER else None,
                count=len(own),
                self_ns=self_ns,
                share=self_ns / forward if forward else None,
                duration=distribution_of(calls.duration[own]),
                slowest_layer=int(layers[means.argmax()]) if several else None,
                slowest_ns=float(means.max()) if several else None,
            )
        )
    return found


def _by_layer(calls: _Calls) -> list[LayerTime]:
    found = []
    for stage, kind, own in calls.groups():
        name = _text(AttentionKind, kind) if kind else None
        for layer, count, self_ns, duration in zip(*(each.tolist() for each in calls.by_layer(own)), strict=True):
            found.append(LayerTime(_LAYER_STAGES[stage].name, name, layer, count, self_ns, duration / count))
    return sorted(found, key=lambda each: each.layer)


def _text(kinds: type[AttentionKind] | type[Collective], number: int) -> str:
    try:
        return kinds(number).text
    except ValueError:  # of a newer vocabulary
        return f"kind {number}"


# Collectives


def _collectives(rows: pd.DataFrame, names: Mapping[int, str]) -> list[CollectiveTime]:
    if not len(rows):
        return []
    found = []
    for _, part in rows.groupby(["a0", "a1", "a3"], sort=True):
        op, group, algorithm = (int(part[column].iloc[0]) for column in ("a0", "a1", "a3"))
        compared = part[part["waiting"].notna()]
        waiting = int(compared["waiting"].sum()) if len(compared) else None
        moving = int(compared["duration"].sum()) - waiting if waiting is not None else None
        found.append(
            CollectiveTime(
                op=_text(Collective, op),
                group=names.get(group, f"group {group:016x}"),
                algorithm=names.get(algorithm),
                ranks=int(part["process"].nunique()),
                count=len(part),
                bytes=int(part["a2"].sum()),
                duration=distribution(part["duration"]),
                total_ns=int(part["duration"].sum()),
                compared=len(compared),
                waiting_ns=waiting,
                moving_ns=moving,
                bytes_per_s=int(compared["a2"].sum()) * 1e9 / moving if moving else None,
            )
        )
    return sorted(found, key=lambda one: -one.total_ns)


def _ranks(rows: pd.DataFrame) -> list[RankCollectives]:
    """Collectives by the rank that took part, where more than one did; `rows` as with_waiting makes them."""
    if not len(rows) or rows["process"].nunique() < 2:
        return []
    found = []
    for process, part in rows.groupby("process", sort=True):
        compared = part[part["waiting"].notna()]
        waiting = int(compared["waiting"].sum())
        moving = int(compared["duration"].sum()) - waiting
        total = int(part["duration"].sum())
        found.append(RankCollectives(int(str(process)), len(part), total, len(compared), waiting, moving))
    return found


def with_waiting(rows: pd.DataFrame, names: Mapping[int, str]) -> pd.DataFrame:
    """Collectives with `waiting`: ns until the last of the recorded ranks had come; null where there is but one.

    Two segments are of the same operation when group and number are the same, and the engine instance unless the group
    is of several. What waits longer than its own duration waited for all of it: it needs not be
    there when the other comes (a send that the host only launches).
    """
    over = {handle for handle, name in names.items() if name.startswith(_OVER_INSTANCES)}
    instance = rows["instance"].where(~rows["a1"].isin(over), 0)
    rows = rows.assign(of=instance)
    numbered = rows[(rows["a4"] > 0).fillna(False).to_numpy(dtype=bool)]
    grouped = numbered.groupby(["of", "a1", "a4"])
    last = grouped["begin_ns"].transform("max")
    ranks = grouped["process"].transform("nunique")
    since = last - numbered["begin_ns"]
    waiting = since.where(since < numbered["duration"], numbered["duration"]).where(ranks > 1)
    return rows.assign(waiting=waiting.astype("Int64"))


# Experts


def experts_by_rank(processes: Iterable[Process]) -> list[list[int]] | None:
    """The experts on each expert-parallel rank; None where every rank has all of them, or that is not known."""
    found: dict[int, list[int]] = {}
    size = 0
    for info in (worker.info for worker in _workers(processes)):
        size, rank = info.get("expert_parallel_size", 0), info.get("expert_parallel_rank")
        local = numbers(info.get("local_experts"))
        if not isinstance(size, int) or not isinstance(rank, int) or size < 2 or not local:
            return None
        found[rank] = local
    if len(found) != size or not size:
        return None
    return [found[rank] for rank in sorted(found)]


def numbers(text: object, most: int = 1 << 16) -> list[int]:
    """The integers in words such as 0-3,8; none where the text is something else, or there are more than `most`."""
    found: list[int] = []
    for word in text.split(",") if isinstance(text, str) else ():
        first, dash, last = word.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or len(first + last) > 12:
            return []
        if int(last) - int(first) >= most - len(found):
            return []
        found += range(int(first), int(last) + 1)
    return found


def expert_loads(experts: pd.DataFrame, by_rank: Sequence[Sequence[int]] | None) -> list[ExpertLoad]:
    """The load of every layer's experts, the most uneven (by step) first."""
    loads = []
    for layer in sorted(experts["layer"].unique().tolist()):
        part = experts[experts["layer"] == layer]
        size = max(map(len, part["counts"]))
        counts = np.zeros((len(part), size), np.int64)
        for row, values in enumerate(part["counts"]):
            counts[row, : len(values)] = values
        per_step = _sums(part, counts)
        total = per_step.sum(axis=0)
        if total.sum() <= 0:
            continue
        order = np.argsort(-total, kind="stable")[:HOT]
        loads.append(
            ExpertLoad(
                layer=int(layer),
                experts=size,
                tokens=int(total.sum()),
                imbalance=float(total.max() / total.mean()),
                imbalance_per_step=imbalance(per_step),
                rank_imbalance_per_step=_rank_imbalance(per_step, by_rank),
                hot=[(int(expert), float(total[expert] / total.sum())) for expert in order],
                idle=int((total == 0).sum()),
            )
        )
    return sorted(loads, key=lambda load: (-load.imbalance_per_step, load.layer))


def touched_experts(experts: pd.DataFrame) -> pd.Series[float]:
    """How many experts got a token in each step (instance, step), of all ranks, on average over its layers."""
    if not len(experts):
        return pd.Series(dtype=float)
    size = max(map(len, experts["counts"]))
    counts = np.zeros((len(experts), size), np.int64)
    for row, values in enumerate(experts["counts"]):
        counts[row, : len(values)] = values
    keys, layer = np.unique(experts[[*_STEP_KEY, "layer"]].to_numpy(dtype=np.int64), axis=0, return_inverse=True)
    summed = np.zeros((len(keys), size), np.int64)
    np.add.at(summed, layer.ravel(), counts)
    found = pd.DataFrame({"instance": keys[:, 0], "step": keys[:, 1], "touched": (summed > 0).sum(axis=1)})
    return found.groupby(_STEP_KEY)["touched"].mean()


def _sums(part: pd.DataFrame, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Counts by step, of all ranks together. Steps of several instances at a time are steps of their own."""
    _, step = np.unique(part[_STEP_KEY].to_numpy(dtype=np.int64), axis=0, return_inverse=True)
    summed = np.zeros((int(step.max()) + 1, counts.shape[1]), np.int64)
    np.add.at(summed, step.ravel(), counts)
    return summed


def imbalance(counts: npt.NDArray[np.int64]) -> float:
    """The most over the mean of each row, weighted by the rows' sums: 1 is even, the number of columns the worst."""
    sums = counts.sum(axis=1)
    busy = sums > 0
    return float(counts[busy].max(axis=1).sum() * counts.shape[1] / sums[busy].sum()) if busy.any() else 1.0


def _rank_imbalance(per_step: npt.NDArray[np.int64], by_rank: Sequence[Sequence[int]] | None) -> float | None:
    if by_rank is None or any(expert >= per_step.shape[1] for local in by_rank for expert in local):
        return None
    return imbalance(np.stack([per_step[:, [*local]].sum(axis=1) for local in by_rank], axis=1))
