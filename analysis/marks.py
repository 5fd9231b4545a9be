"""What marks told of stages inside the forward pass on the device, rank by rank, and what they did not. Pure; ns.

Marks are in some layers alone (`stagetrace run --marks`), so nothing here is of a whole model but what says that it is
estimated. What every number means is in docs/numbers.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from stagetrace.instrument.device_marks import PLACES
from stagetrace.instrument.stages import BY_NAME, Level, Phase

from .architecture import Dense, Experts
from .breakdown import Distribution, distribution_of
from .placed import NOWHERE, step_places

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt

    from stagetrace.exporters.session import Process

    from .speed_of_light import Served

    Kinds = npt.NDArray[np.object_]

SEGMENTS = ["process", "stage", "begin_ns", "end_ns", "instance", "step", "partial", "a0"]
NOT_TOLD = ("left_out", "absent", "overwritten", "halves", "repeated", "backwards", "unplaced", "errors")
"""What a process counts of its marks: why a span has no row, and `repeated`, of which the last time is told alone."""
STAGES = {BY_NAME[f"device_{place}"].id: f"device_{place}" for place in PLACES}
_FORWARD, _COLLECTIVE = BY_NAME["device_forward"].id, BY_NAME["device_collective"].id
_NO_ROWS = pd.DataFrame({name: pd.Series(dtype="int64") for name in ("process", "stage", "layer", "duration", "place")})


@dataclass(frozen=True)
class MarkInfo:
    """What a process said of its marks."""

    by: str  # marks, or nothing
    why: str = ""  # there are none
    stages: tuple[str, ...] = ()  # of PLACES, that have marks
    layers: tuple[int, ...] = ()  # that have some
    per_step: int = 0  # marks that a step passes at most
    not_visible: tuple[str, ...] = ()  # of PLACES, that were chosen and could not have marks
    empty_ns: int | None = None  # of the shortest span with nothing in it, which is taken off the others
    not_told: Mapping[str, int] = field(default_factory=dict)  # of NOT_TOLD those that are not 0

    @property
    def there(self) -> bool:
        """Whether there is a mark."""
        return self.by == "marks" and bool(self.stages)


@dataclass(frozen=True)
class MarkedLayer:
    """A stage in one layer, of steps of one kind."""

    layer: int
    count: int
    total_ns: int
    duration: Distribution


@dataclass(frozen=True)
class MarkedStage:
    """A stage in the layers that have marks, of steps of one kind."""

    stage: str
    phase: str | None
    steps: int  # that passed its marks
    layers: int  # that were told
    count: int  # spans
    total_ns: int
    share: float | None  # of device_forward, in those of these steps whose device_forward was recorded
    estimated_share: float | None  # the same if all layers that have the stage took as long as these on average
    duration: Distribution
    by_layer: list[MarkedLayer]  # none of collectives


@dataclass(frozen=True)
class RankMarks:
    """One rank's."""

    process: int  # its key
    info: MarkInfo
    stages: list[MarkedStage]


def mark_info(process: Process) -> MarkInfo | None:
    """What a process said of its marks; None where it said nothing, since none were chosen."""
    told = process.info.get("marks")
    if not isinstance(told, dict):
        return None
    stages, layers, hidden = (
        list(told[name]) if isinstance(told.get(name), list) else [] for name in ("stages", "layers", "not_visible")
    )
    counts = {name: _count(told.get(name)) for name in NOT_TOLD}
    return MarkInfo(
        by=str(told.get("by", "")),
        why=str(told.get("why", "")),
        stages=tuple(str(name) for name in stages),
        layers=tuple(layer for layer in layers if isinstance(layer, int)),
        per_step=_count(told.get("per_step")),
        not_visible=tuple(str(name) for name in hidden),
        empty_ns=_count(told.get("empty_ns")) or None,
        not_told={name: count for name, count in counts.items() if count},
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def marks_text(info: MarkInfo) -> str:
    """Which marks there are, in words."""
    return f"{', '.join(info.stages)} in layers {', '.join(map(str, info.layers))}"


def rank_marks(
    steps: pd.DataFrame, segments: pd.DataFrame, processes: Sequence[Process], served: Served | None
) -> list[RankMarks]:
    """Every rank that has marks, was to have some, or has rows of some, in the order of the session's processes.

    `segments` with SEGMENTS, of `steps` their numbers and kinds; `served` is the model, where that is known.
    """
    rows, forwards = _rows(steps, segments)
    present = set(rows["process"].unique().tolist())
    having = layers_having(served)
    kinds = steps["phase"].to_numpy(dtype=object)
    found = []
    for process in processes:
        info = mark_info(process)
        if info is None and process.key not in present:
            continue
        own, around = (each[each["process"] == process.key] for each in (rows, forwards))
        times = around.groupby("place")["duration"].sum()
        found.append(RankMarks(process.key, info or MarkInfo("marks"), _stages(own, times, kinds, having)))
    return found


def layers_having(served: Served | None) -> dict[str, int]:
    """In how many layers of the model each stage is; empty where that is not known, or a rank has only some of them."""
    if served is None or served.ranks.pipeline > 1 or served.model.not_understood:
        return {}
    layers = served.model.layers
    counts = {
        "device_attention": sum(bool(layer.mixers) for layer in layers),
        "device_mlp": sum(isinstance(layer.feed_forward, Dense) for layer in layers),
        "device_moe": sum(isinstance(layer.feed_forward, Experts) for layer in layers),
    }
    return {stage: count for stage, count in counts.items() if count}


def _rows(steps: pd.DataFrame, segments: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Spans between marks, and forward passes on the device: process, stage, layer, duration and row of their step."""
    stage = segments["stage"].to_numpy(np.int16)
    marked = np.isin(stage, [*STAGES])
    if not marked.any():
        return _NO_ROWS, _NO_ROWS
    # A step that a switch of the level cut has some of its spans.
    chosen = segments[(marked & ~segments["partial"].to_numpy(bool)) | (stage == _FORWARD)]
    rows = pd.DataFrame(
        {
            "process": chosen["process"].to_numpy(np.int64),
            "stage": chosen["stage"].to_numpy(np.int16),
            "layer": chosen["a0"].to_numpy(np.int64, na_value=-1),
            "duration": (chosen["end_ns"] - chosen["begin_ns"]).to_numpy(np.int64),
            "place": step_places(steps, chosen["instance"], chosen["step"]),
        }
    )
    forward = (rows["stage"] == _FORWARD).to_numpy()
    return rows[~forward], rows[forward & (rows["place"] != NOWHERE).to_numpy()]


def _stages(rows: pd.DataFrame, forwards: pd.Series[int], kinds: Kinds, having: Mapping[str, int]) -> list[MarkedStage]:
    """By stage in the order of the vocabulary, then by the kind of step."""
    place = rows["place"].to_numpy()
    kind = np.where(place == NOWHERE, None, kinds[place]) if len(kinds) else np.full(len(place), None)
    found = []
    for stage, name in STAGES.items():
        for phase in (*(each.value for each in Phase), None):
            own = rows[(rows["stage"] == stage).to_numpy() & (kind == phase)]
            if len(own):
                found.append(_stage(name, phase, own, forwards, having.get(name)))
    return found


def _stage(
    name: str, phase: str | None, rows: pd.DataFrame, forwards: pd.Series[int], having: int | None
) -> MarkedStage:
    layer, duration = rows["layer"].to_numpy(), rows["duration"].to_numpy()
    layers = np.unique(layer)
    steps = rows["place"][rows["place"] != NOWHERE].unique()
    around = forwards[forwards.index.isin(steps)]
    inside = int(duration[rows["place"].isin(around.index).to_numpy()].sum())
    share = inside / int(around.sum()) if around.sum() else None
    estimated = share * having / len(layers) if share is not None and having and len(layers) <= having else None
    return MarkedStage(
        stage=name,
        phase=phase,
        steps=len(steps),
        layers=len(layers),
        count=len(rows),
        total_ns=int(duration.sum()),
        share=share,
        estimated_share=estimated,
        duration=distribution_of(duration),
        by_layer=[
            MarkedLayer(int(each), len(own), int(own.sum()), distribution_of(own))
            for each in layers
            if name != STAGES[_COLLECTIVE]
            for own in (duration[layer == each],)
        ],
    )


def advice(told: Iterable[tuple[str, MarkInfo]]) -> list[str]:
    """What keeps marks that were chosen from telling anything, and what to do; processes by name."""
    nothing: dict[tuple[str, bool], list[str]] = {}
    hidden: dict[tuple[str, ...], list[str]] = {}
    for name, info in told:
        if info.by == "nothing":
            nothing.setdefault((info.why, bool(info.not_told.get("errors"))), []).append(name)
        elif info.not_visible:
            hidden.setdefault(info.not_visible, []).append(name)
    found = []
    for (why, failed), names in nothing.items():
        way = (
            "the first error is in the engine's log; an issue with it helps"
            if failed
            else "marks need a CUDA or HIP device and a PyTorch with Triton"
        )
        found.append(
            f"There are no marks in {_listed(names)}: {why or 'it does not say why'}. What to do: {way}. Everything"
            " else is recorded without them, and `stagetrace ctl kernel` says which kernels a stage's time goes to."
        )
    for stages, names in hidden.items():
        found.append(
            f"No marks around {', '.join(stages)} in {_listed(names)}: a compiler has put it into its graphs, or the"
            " model has none. What to do: run the engine uncompiled to have it marked (slower; vLLM: --enforce-eager),"
            " or see its kernels with `stagetrace ctl kernel`."
        )
    return found


def _listed(names: Sequence[str]) -> str:
    most = 4
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(dict.fromkeys(names[:most])) + more


def unread(level: Level | None, marks: Sequence[RankMarks]) -> str | None:
    """Why no mark was read where there are some; None where one was, or there is none."""
    if any(rank.stages for rank in marks) or not any(rank.info.there for rank in marks):
        return None
    if level is not None and level < Level.LAYER:
        return (
            f"Marks are captured, but not read at level {level.name.lower()}."
            " What to do: `stagetrace ctl level layer` has them read."
        )
    return "Marks are there, but no step that was recorded has passed one."
