"""The speed of light of a session's steps: their operations and bytes, the rates, and the least time they would take.

Pure but for reading the model's config.json. docs/speed-of-light.md says what is counted, docs/numbers.md what is
shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagetrace.instrument.stages import BY_ID, BY_NAME, Phase

from .architecture import Model
from .batch import Batch, Numbers, Sums
from .calibration.ceilings import ceilings_of
from .calibration.results import CalibrationError, find
from .calibration.results import load as load_calibration
from .ceilings import Ceilings, least_times
from .hardware import match
from .layers import touched_experts
from .model_config import ConfigError, load_model
from .operations import StepWork, step_work
from .sharding import Sharding

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stagetrace.exporters.session import Manifest

    from .operations import Work
    from .sharding import Collective

    Chosen = np.ndarray[Any, np.dtype[np.bool_]]

DATA_SHEET, MEASURED = "data sheet", "measured"  # kinds of ceilings
_STEP_KEY = ["instance", "step"]


@dataclass(frozen=True)
class Roofs:
    """The least time of some work under each roof of one set of ceilings, summed over steps; None: not known."""

    compute_ns: float | None
    memory_ns: float | None
    link_ns: float | None
    whole_ns: float | None  # of each step the longest of the three


@dataclass(frozen=True)
class Done:
    """Work that was done in some time, summed over steps; of one rank."""

    count: int  # steps
    operations: float
    bytes: float  # weights and cache
    bus_bytes: float
    time_ns: int | None  # None: not recorded
    roofs: dict[str, Roofs]  # by kind of ceilings: DATA_SHEET, MEASURED; those that there are

    @property
    def operations_per_s(self) -> float | None:
        """None without a time."""
        return self.operations / self.time_ns * 1e9 if self.time_ns else None

    @property
    def bytes_per_s(self) -> float | None:
        """None without a time."""
        return self.bytes / self.time_ns * 1e9 if self.time_ns else None

    def _share(self, kind: str, least: Callable[[Roofs], float | None]) -> float | None:
        ns = least(self.roofs[kind]) if kind in self.roofs else None
        return ns / self.time_ns if self.time_ns and ns is not None else None

    def share(self, kind: str) -> float | None:
        """Of the speed of light: the least time over the time that it took."""
        return self._share(kind, lambda roofs: roofs.whole_ns)

    def mfu(self, kind: str) -> float | None:
        """Model FLOPs utilisation (Chowdhery et al., PaLM, 2022, appendix B): of the peak of the arithmetic used."""
        return self._share(kind, lambda roofs: roofs.compute_ns)

    def mbu(self, kind: str) -> float | None:
        """Model bandwidth utilisation (Databricks, LLM Inference Performance Engineering, 2023): of the memory's."""
        return self._share(kind, lambda roofs: roofs.memory_ns)

    def bus(self, kind: str) -> float | None:
        """Of the link's bandwidth, as nccl-tests counts bytes."""
        return self._share(kind, lambda roofs: roofs.link_ns)


@dataclass(frozen=True)
class RequestLight:
    """What one request would take at the speed of light with the device to itself, beside what requests took, in ns.

    TTFT: its prompt, without what a cache had, in one step. TPOT: a step with one token, halfway through its output.
    Medians over the finished requests with both.
    """

    count: int
    ttft_ns: float | None
    least_ttft_ns: float | None
    tpot_ns: float | None
    least_tpot_ns: float | None


@dataclass(frozen=True)
class SpeedOfLight:
    """What a session's complete steps did, by kind of step and by stage."""

    model: str | None = None  # model_type
    config: str | None = None  # where it was read
    ceilings: dict[str, Ceilings] = field(default_factory=dict)  # by kind
    phases: dict[str, Done] = field(default_factory=dict)
    stages: dict[str, Done] = field(default_factory=dict)
    requests: RequestLight | None = None
    notes: tuple[str, ...] = ()

    @property
    def against(self) -> str | None:
        """The kind of ceilings to compare with."""
        return preferred(self.ceilings)


@dataclass(frozen=True)
class Served:
    """A model as a session's engine served it."""

    model: Model
    config: Path
    ranks: Sharding


def served(manifest: Manifest, kept: Path, config: Path | None = None) -> Served | str | None:
    """What was served, or why that is not known; None where no process said anything.

    `config`: the model's config.json or its directory, else `kept`, that of the session, else in the directory that was
    recorded. Raises ConfigError when one that was named cannot be read.
    """
    process = next((each for each in manifest.processes if each.info.get("model_path")), None)
    if process is None and config is None:
        return None
    info = process.info if process else {}
    recorded = kept if kept.is_file() else Path(str(info.get("model_path", "")))
    path = recorded if config is None else config
    path = path / "config.json" if path.is_dir() else path
    try:
        model = load_model(path, str(info.get("dtype", "auto")), str(info.get("kv_cache_dtype", "auto")))
    except ConfigError as error:
        if config is not None:
            raise
        return f"no speed of light: {error}. Name it with --model-config."
    try:
        return Served(model, path, _ranks(info))
    except ValueError as error:
        return f"no speed of light: the recorded ranks do not fit: {error}."


def work_of(found: Served, steps: pd.DataFrame, experts: pd.DataFrame) -> tuple[StepWork, tuple[str, ...]]:
    """The work of each of the steps, and what it rests on."""
    columns = {str(name): column for name, column in steps.items()}
    return _work(found.model, Batch.of_steps(columns, _touched(steps, experts)), found.ranks)


def speed_of_light(
    manifest: Manifest,
    steps: pd.DataFrame,
    segments: pd.DataFrame,
    requests: pd.DataFrame,
    experts: pd.DataFrame,
    kept: Path,
    config: Path | None = None,
    calibration: Path | None = None,
) -> SpeedOfLight:
    """Of the complete steps in `steps`; `kept` and `config` as in `served`.

    `calibration`: a file that `stagetrace calibrate` made, else the one that is kept for the device that was recorded.
    Raises ConfigError and CalibrationError when one that was named cannot be read; one that was not named is a note.
    """
    steps = steps[steps["status"] == "complete"]
    found = served(manifest, kept, config) if len(steps) else None
    if found is None:
        return SpeedOfLight()
    if isinstance(found, str):
        return SpeedOfLight(notes=(found,))
    ceilings, notes = ceilings_for(manifest, calibration)
    work, assumed = work_of(found, steps, experts)
    kind = preferred(ceilings)
    return SpeedOfLight(
        model=found.model.kind or None,
        config=str(found.config),
        ceilings=ceilings,
        phases=_by_phase(steps, own_times(steps), work, ceilings),
        stages=_by_stage(steps, segments, work, ceilings),
        requests=_of_requests(found.model, found.ranks, requests, ceilings[kind]) if kind else None,
        notes=(*assumed, *notes),
    )


def preferred(ceilings: Mapping[str, Ceilings]) -> str | None:
    """The kind of ceilings to compare with: measured ones where there are any."""
    return MEASURED if MEASURED in ceilings else DATA_SHEET if DATA_SHEET in ceilings else None


def _device(manifest: Manifest) -> dict[str, Any]:
    """What was recorded of the device: of a worker, as it alone looks at it."""
    infos = [each.info for each in manifest.processes]
    return next((info for info in infos if info.get("device_name")), next(iter(infos), {}))


def ceilings_for(manifest: Manifest, named: Path | None = None) -> tuple[dict[str, Ceilings], list[str]]:
    """Those of the data sheet and those that were measured, as far as there are any; and what is to be said.

    `named`: the calibration to take. Raises CalibrationError when that cannot be read.
    """
    info = _device(manifest)
    name, threads = str(info.get("device_name", "")), _whole(info.get("device_threads"))
    found: dict[str, Ceilings] = {}
    notes: list[str] = []
    sheet = match(name or f"The device ({info.get('device', 'not recorded')})", _whole(info.get("multiprocessors")))
    if sheet.device:
        found[DATA_SHEET] = Ceilings.of(sheet.device)
    path = named or (find(name, threads) if name else None)
    if path is not None:
        try:
            calibration = load_calibration(path)
        except CalibrationError as error:
            if named is not None:
                raise
            notes.append(f"a calibration is left out: {error}")
        else:
            found[MEASURED] = ceilings_of(calibration)
            if calibration.busy:
                notes.append(f"the machine was busy when it was calibrated: {calibration.busy}")
            if name and (calibration.name, calibration.threads) != (name, threads):
                notes.append(
                    f"the calibration is of {calibration.name} with {calibration.threads or 'any number of'} threads,"
                    f" and the session of {name} with {threads or 'any number of'}"
                )
    if not found:
        notes.append(f"{sheet.answer} Measure it: `stagetrace calibrate`.")
    return found, notes


def own_times(steps: pd.DataFrame) -> pd.Series[int]:
    """For each step the time that is its own, ns: from its begin, or the end of the one before it, to its end.

    Where an engine has two steps in flight their durations overlap; these times do not.
    """
    ordered = steps.sort_values("end_ns")
    before = ordered.groupby("instance")["end_ns"].shift(fill_value=0)
    times = ordered["end_ns"] - np.maximum(ordered["begin_ns"], before)
    return times.clip(lower=0).reindex(steps.index)


def _whole(value: Any, default: int | None = None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default


def _touched(steps: pd.DataFrame, experts: pd.DataFrame) -> Numbers | None:
    """Experts that got a token in each step, NaN where that was not recorded; None where it never was."""
    if not len(experts):
        return None
    found = touched_experts(experts).reindex(pd.MultiIndex.from_frame(steps[_STEP_KEY].astype("int64")))
    return None if found.isna().all() else np.asarray(found, dtype=np.float64)


def _ranks(info: dict[str, Any]) -> Sharding:
    def count(name: str) -> int:
        return _whole(info.get(name), 1) or 1

    tensor, pipeline = count("tensor_parallel"), count("pipeline_parallel")
    if info.get("engine") == "sglang":
        return Sharding.sglang(tensor, pipeline, count("attention_data_parallel"), count("expert_parallel_size"))
    return Sharding.vllm(tensor, pipeline, count("data_parallel"), info.get("expert_parallel") is True)


def _work(model: Model, batch: Batch, ranks: Sharding) -> tuple[StepWork, tuple[str, ...]]:
    """The work of every step, of all pipeline stages together, and what it rests on."""
    parts = [step_work(model, batch, ranks, stage=stage) for stage in range(ranks.pipeline)]
    works = tuple(work for part in parts for work in part.works)
    collectives = tuple(each for part in parts for each in part.collectives)
    assumed = parts[0].assumptions
    if ranks.pipeline > 1:
        assumed += (f"figures are of all {ranks.pipeline} pipeline stages together, one after the other.",)
    return StepWork(works, collectives, assumed), assumed


def _roofs(
    works: Sequence[Work], collectives: Sequence[Collective], ceilings: dict[str, Ceilings], chosen: Chosen
) -> dict[str, Roofs]:
    found = {}
    for kind, each in ceilings.items():
        least = least_times(works, collectives, each)
        compute, memory, link, whole = (
            None if seconds is None else _sum(seconds, chosen) * 1e9
            for seconds in (least.compute, least.memory, least.link, least.whole)
        )
        found[kind] = Roofs(compute, memory, link, whole)
    return found


def _by_phase(
    steps: pd.DataFrame, times: pd.Series[int], work: StepWork, ceilings: dict[str, Ceilings]
) -> dict[str, Done]:
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
                roofs=_roofs(work.works, work.collectives, ceilings, chosen),
            )
    return found


def _by_stage(
    steps: pd.DataFrame, segments: pd.DataFrame, work: StepWork, ceilings: dict[str, Ceilings]
) -> dict[str, Done]:
    """Over all kinds of step; the time is that of the stage's segments, of one rank, where layers were recorded."""
    recorded = _stage_times(steps, segments)
    every = np.ones(len(steps), dtype=bool)
    return {
        stage: Done(
            count=len(steps),
            operations=_sum(work.operations(stage), every),
            bytes=_sum(work.bytes(stage), every),
            bus_bytes=_sum(work.bus_bytes(stage), every),
            time_ns=recorded.get(stage),
            roofs=_roofs(
                list(work.of(stage)), [each for each in work.collectives if each.stage == stage], ceilings, every
            ),
        )
        for stage in work.stages()
    }


def _of_requests(model: Model, ranks: Sharding, requests: pd.DataFrame, ceilings: Ceilings) -> RequestLight | None:
    """Of the finished requests whose tokens and times are known."""
    own = requests[(requests["status"] == "finished") & ~requests["partial"].astype(bool)]
    own = own.dropna(subset=["prompt_tokens", "output_tokens", "arrival_ns", "first_token_ns", "last_token_ns"])
    if not len(own):
        return None
    prompt, output = (own[name].to_numpy(dtype=float) for name in ("prompt_tokens", "output_tokens"))
    cached = own["cached_tokens"].fillna(0).to_numpy(dtype=float)
    ones = np.ones(len(own))

    def least(prefill: Sums, decode: Sums) -> Numbers | None:
        work, _ = _work(model, Batch(prefill, decode), ranks)
        return least_times(work.works, work.collectives, ceilings).whole

    none = Sums(*(np.zeros(len(own)) for _ in range(5)))
    q = np.maximum(prompt - cached, 1.0)
    middle = prompt + output / 2
    first = least(Sums(ones, q, prompt, q * q, q * prompt), none)
    each = least(none, Sums(ones, ones, middle, ones, middle))
    several = output > 1
    ttft = own["first_token_ns"].to_numpy(dtype=float) - own["arrival_ns"].to_numpy(dtype=float)
    tpot = (own["last_token_ns"].to_numpy(dtype=float) - own["first_token_ns"].to_numpy(dtype=float))[several]

    def median(values: Numbers | None) -> float | None:
        return float(np.median(values)) if values is not None and len(values) else None

    return RequestLight(
        count=len(own),
        ttft_ns=median(ttft),
        least_ttft_ns=median(None if first is None else np.broadcast_to(first, ttft.shape) * 1e9),
        tpot_ns=median(tpot / (output[several] - 1)),
        least_tpot_ns=median(None if each is None else np.broadcast_to(each, output.shape)[several] * 1e9),
    )


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


def _sum(values: Numbers, chosen: Chosen) -> float:
    return float(np.broadcast_to(values, chosen.shape)[chosen].sum())
