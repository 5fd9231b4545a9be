"""The speed of light of a session's steps: their operations and bytes, the rates, and the least time they would take.

Pure but for reading the model's config.json. docs/speed-of-light.md says what is counted, docs/numbers.md what is
shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagetrace.instrument.stages import BY_ID, BY_NAME, Phase

from .architecture import Model
from .batch import Batch, Numbers
from .ceilings import Ceilings, least_seconds
from .hardware import match
from .model_config import ConfigError, load_model
from .model_files import config_path
from .operations import StepWork, step_work
from .sharding import Sharding

if TYPE_CHECKING:
    from pathlib import Path

    from stagetrace.exporters.session import Manifest, Process

_STEP_KEY = ["instance", "step"]


@dataclass(frozen=True)
class Done:
    """Work that was done in some time, summed over steps; of one rank. None: not recorded, or no ceilings."""

    count: int  # steps
    operations: float
    bytes: float  # weights and cache
    bus_bytes: float
    time_ns: int | None
    least_ns: float | None

    @property
    def operations_per_s(self) -> float | None:
        """None without a time."""
        return self.operations / self.time_ns * 1e9 if self.time_ns else None

    @property
    def bytes_per_s(self) -> float | None:
        """None without a time."""
        return self.bytes / self.time_ns * 1e9 if self.time_ns else None

    @property
    def share(self) -> float | None:
        """Of the speed of light: the least time over the time that it took."""
        return self.least_ns / self.time_ns if self.time_ns and self.least_ns is not None else None


@dataclass(frozen=True)
class SpeedOfLight:
    """What a session's complete steps did, by kind of step and by stage."""

    model: str | None = None  # model_type
    config: str | None = None  # where it was read
    ceilings: str | None = None  # where they are from
    phases: dict[str, Done] = field(default_factory=dict)
    stages: dict[str, Done] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def speed_of_light(
    manifest: Manifest,
    steps: pd.DataFrame,
    segments: pd.DataFrame,
    config: Path | None = None,
    ceilings: Ceilings | None = None,
) -> SpeedOfLight:
    """Of the complete steps in `steps`. `config`: the model's config.json or its directory, else the recorded path.

    Raises ConfigError when a config that was named cannot be read; one that was not named is a note.
    """
    steps = steps[steps["status"] == "complete"]
    process = _server(manifest)
    if not len(steps) or (process is None and config is None):
        return SpeedOfLight()
    info = process.info if process else {}
    path = config_path(config if config is not None else str(info.get("model_path", "")))
    try:
        model = load_model(path, str(info.get("dtype", "auto")), str(info.get("kv_cache_dtype", "auto")))
    except ConfigError as error:
        if config is not None:
            raise
        return SpeedOfLight(notes=(f"no speed of light: {error}. Name it with --model-config.",))
    notes: list[str] = []
    if ceilings is None:
        name = str(info.get("device_name", "") or f"The device ({info.get('device', 'not recorded')})")
        found = match(name, _whole(info.get("multiprocessors")))
        ceilings = Ceilings.of(found.device) if found.device else None
        if ceilings is None:
            notes.append(found.answer)
    work, assumed = _work(model, steps, info)
    times = own_times(steps)
    return SpeedOfLight(
        model=model.kind or None,
        config=str(path),
        ceilings=ceilings.source if ceilings else None,
        phases=_by_phase(steps, times, work, ceilings),
        stages=_by_stage(steps, segments, work, ceilings),
        notes=(*assumed, *notes),
    )


def own_times(steps: pd.DataFrame) -> pd.Series[int]:
    """For each step the time that is its own, ns: from its begin, or the end of the one before it, to its end.

    Where an engine has two steps in flight their durations overlap; these times do not.
    """
    ordered = steps.sort_values("end_ns")
    before = ordered.groupby("instance")["end_ns"].shift(fill_value=0)
    times = ordered["end_ns"] - np.maximum(ordered["begin_ns"], before)
    return times.clip(lower=0).reindex(steps.index)


def _server(manifest: Manifest) -> Process | None:
    return next((each for each in manifest.processes if each.info.get("model_path")), None)


def _whole(value: Any, default: int | None = None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default


def _work(model: Model, steps: pd.DataFrame, info: dict[str, Any]) -> tuple[StepWork, tuple[str, ...]]:
    """The work of every step, of all pipeline stages together, and what it rests on."""
    names = ("tensor_parallel", "pipeline_parallel", "data_parallel")
    tensor, pipeline, data = (_whole(info.get(name), 1) or 1 for name in names)
    ranks = Sharding.vllm(tensor, pipeline, data, info.get("expert_parallel") is True)
    batch = Batch.of_steps({str(name): column for name, column in steps.items()})
    parts = [step_work(model, batch, ranks, stage=stage) for stage in range(pipeline)]
    works = tuple(work for part in parts for work in part.works)
    collectives = tuple(each for part in parts for each in part.collectives)
    assumed = parts[0].assumptions
    if pipeline > 1:
        assumed += (f"figures are of all {pipeline} pipeline stages together, one after the other.",)
    return StepWork(works, collectives, assumed), assumed


def _by_phase(steps: pd.DataFrame, times: pd.Series[int], work: StepWork, ceilings: Ceilings | None) -> dict[str, Done]:
    least = least_seconds(work.works, work.collectives, ceilings) if ceilings else None
    found = {}
    for phase in Phase:
        chosen = (steps["phase"] == phase.value).to_numpy(dtype=bool)
        if chosen.any():
            found[phase.value] = Done(
                count=int(chosen.sum()),
                operations=_sum(work.operations(), chosen),
                bytes=_sum(work.bytes(), chosen),
                bus_bytes=_sum(work.bus_bytes(), chosen),
                time_ns=int(times[chosen].sum()),
                least_ns=None if least is None else _sum(least, chosen) * 1e9,
            )
    return found


def _by_stage(
    steps: pd.DataFrame, segments: pd.DataFrame, work: StepWork, ceilings: Ceilings | None
) -> dict[str, Done]:
    """Over all kinds of step; the time is that of the stage's segments, of one rank, where layers were recorded."""
    recorded = _stage_times(steps, segments)
    every = np.ones(len(steps), dtype=bool)
    found = {}
    for stage in work.stages():
        collectives = [each for each in work.collectives if each.stage == stage]
        least = least_seconds(work.of(stage), collectives, ceilings) if ceilings else None
        found[stage] = Done(
            count=len(steps),
            operations=_sum(work.operations(stage), every),
            bytes=_sum(work.bytes(stage), every),
            bus_bytes=_sum(work.bus_bytes(stage), every),
            time_ns=recorded.get(stage),
            least_ns=None if least is None else _sum(least, every) * 1e9,
        )
    return found


def _stage_times(steps: pd.DataFrame, segments: pd.DataFrame) -> dict[str, int]:
    """Self time of layer-level stages in these steps, per rank; nothing where no layers were recorded."""
    layers = {BY_NAME[name].id for name in ("attention", "mlp", "expert_compute")}
    if not segments["stage"].isin(layers).any():
        return {}
    keys = steps[_STEP_KEY].astype("Int64")
    own = segments.merge(keys, on=_STEP_KEY)
    totals = own.groupby("stage")["self_ns"].sum().to_dict()
    ranks = own.drop_duplicates(["stage", "process", "thread"]).groupby("stage").size().to_dict()
    return {BY_ID[int(str(stage))].name: round(total / ranks[stage]) for stage, total in totals.items()}


def _sum(values: Numbers, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> float:
    return float(np.broadcast_to(values, chosen.shape)[chosen].sum())
