"""The speed of light of a session's steps: their operations and bytes, the rates, and the least time they would take.

Pure but for reading the model's config.json. docs/speed-of-light.md says what is counted, docs/numbers.md what is
shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagetrace.exporters.session import names_of
from stagetrace.instrument.stages import BY_ID, BY_NAME, Phase

from .architecture import Model
from .batch import Batch, Numbers, Sums
from .calibration.ceilings import ceilings_of
from .calibration.results import CalibrationError, find
from .calibration.results import load as load_calibration
from .ceilings import Ceilings, LeastTimes, least_times
from .gap import Gap, Spent, gap, spent
from .hardware import match
from .layers import touched_experts
from .model_config import ConfigError, load_model
from .operations import StepWork, step_work
from .placed import NOWHERE, step_places
from .sharding import Sharding

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy.typing as npt

    from stagetrace.exporters.session import Manifest

    Chosen = np.ndarray[Any, np.dtype[np.bool_]]

DATA_SHEET, MEASURED = "data sheet", "measured"  # kinds of ceilings
MOST_WINDOWS = 12  # over time
WINDOW_WIDTHS_S = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)
_STEP_KEY = ["instance", "step"]
_LAYERS = [BY_NAME[name].id for name in ("attention", "mlp", "expert_compute")]


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
    gap: Gap | None = None  # of kinds of steps: time_ns over the least time, of the ceilings to compare with

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
class Window:
    """What the steps that ended in a window of time did: from `begin_ns` (monotonic) for `width_ns`."""

    begin_ns: int
    width_ns: int
    done: Done

    @property
    def busy(self) -> float:
        """The steps' own time over the window's, of all engine instances.

        Above 1 where several work at a time, or a step began in the window before.
        """
        return (self.done.time_ns or 0) / self.width_ns


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
    windows: tuple[Window, ...] = ()  # over time; those without a step are left out
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


@dataclass(frozen=True)
class RankWork:
    """The work of steps on the ranks of each pipeline stage: of one rank, the busiest of its stage.

    Totals are means over the pipeline's stages: these work at the same time, on several steps.
    """

    parts: tuple[StepWork, ...]

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the numbers rest on."""
        found = tuple(dict.fromkeys(each for part in self.parts for each in part.assumptions))
        if len(self.parts) > 1:
            found += (f"figures of steps are means over the {len(self.parts)} pipeline stages, which work at a time.",)
        return found

    def stages(self) -> list[str]:
        """The stages that have work or communication."""
        return list(dict.fromkeys(stage for part in self.parts for stage in part.stages()))

    def operations(self, stage: str | None = None) -> Numbers:
        """Operations of a stage, or of all."""
        return self._mean([part.operations(stage) for part in self.parts])

    def bytes(self, stage: str | None = None) -> Numbers:
        """Bytes of weights and cache of a stage, or of all."""
        return self._mean([part.bytes(stage) for part in self.parts])

    def bus_bytes(self, stage: str | None = None) -> Numbers:
        """Bytes of collectives on the busiest link, one direction."""
        return self._mean([part.bus_bytes(stage) for part in self.parts])

    def least(self, ceilings: Ceilings, stage: str | None = None) -> LeastTimes:
        """The least times of a stage, or of all."""
        return LeastTimes.mean(self.each_least(ceilings, stage))

    def each_least(self, ceilings: Ceilings, stage: str | None = None) -> list[LeastTimes]:
        """Those of each pipeline stage."""
        return [
            least_times(part.of(stage), [each for each in part.collectives if stage in (None, each.stage)], ceilings)
            for part in self.parts
        ]

    def _mean(self, values: list[Numbers]) -> Numbers:
        return sum(values, np.asarray(0.0)) / len(values)


def work_of(found: Served, steps: pd.DataFrame, experts: pd.DataFrame) -> RankWork:
    """The work of each of the steps."""
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
    work = work_of(found, steps, experts)
    kind = preferred(ceilings)
    own = own_times(steps)
    phases = _by_phase(steps, own, work, ceilings)
    if kind is not None and (least := work.least(ceilings[kind])).whole is not None:
        begins = (steps["end_ns"] - own).to_numpy(dtype=np.int64)
        taken = spent(steps, begins, segments, manifest, names_of(manifest.processes))
        if (taken.times["ranks"] > 0).any():
            phases = _with_gaps(phases, steps, taken, least)
            notes += [note] if (note := taken.note()) else []
    return SpeedOfLight(
        model=found.model.kind or None,
        config=str(found.config),
        ceilings=ceilings,
        phases=phases,
        stages=_by_stage(steps, segments, work, ceilings),
        windows=over_time(steps, own, work, ceilings, window_width(steps)),
        requests=_of_requests(found, requests, ceilings[kind]) if kind else None,
        notes=(*work.assumptions, *_left_out(steps), *notes),
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


def own_times(steps: pd.DataFrame, ended: Mapping[int, int] | None = None) -> pd.Series[int]:
    """For each step the time that is its own, ns: from its begin, or the end of the one before it, to its end.

    Where an engine has two steps in flight their durations overlap; these times do not. `ended`: for engine instances
    the end of their last step before these.
    """
    ordered = steps.sort_values("end_ns")
    before = ordered.groupby("instance")["end_ns"].shift(fill_value=0)
    if ended:
        earlier = ordered["instance"].map(ended).fillna(0).astype("int64")
        before = before.where(before > 0, earlier)
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


def _left_out(steps: pd.DataFrame) -> list[str]:
    """What these steps did that is not among their work."""
    drafts = "draft_tokens" in steps and bool((steps["draft_tokens"] > 0).any())
    return ["what proposes draft tokens is not counted, only what verifies them."] if drafts else []


def _work(model: Model, batch: Batch, ranks: Sharding) -> RankWork:
    return RankWork(tuple(step_work(model, batch, ranks, stage=stage) for stage in range(ranks.pipeline)))


def _roofs(work: RankWork, ceilings: dict[str, Ceilings], chosen: Chosen, stage: str | None = None) -> dict[str, Roofs]:
    found = {}
    for kind, each in ceilings.items():
        least = work.least(each, stage)
        compute, memory, link, whole = (
            None if seconds is None else _sum(seconds, chosen) * 1e9
            for seconds in (least.compute, least.memory, least.link, least.whole)
        )
        found[kind] = Roofs(compute, memory, link, whole)
    return found


def _done(times: pd.Series[int], work: RankWork, ceilings: dict[str, Ceilings], chosen: Chosen) -> Done:
    return Done(
        count=int(chosen.sum()),
        operations=_sum(work.operations(), chosen),
        bytes=_sum(work.bytes(), chosen),
        bus_bytes=_sum(work.bus_bytes(), chosen),
        time_ns=int(times[chosen].sum()),
        roofs=_roofs(work, ceilings, chosen),
    )


def _by_phase(
    steps: pd.DataFrame, times: pd.Series[int], work: RankWork, ceilings: dict[str, Ceilings]
) -> dict[str, Done]:
    chosen = {phase.value: (steps["phase"] == phase.value).to_numpy(dtype=bool) for phase in Phase}
    return {name: _done(times, work, ceilings, which) for name, which in chosen.items() if which.any()}


def over_time(
    steps: pd.DataFrame, times: pd.Series[int], work: RankWork, ceilings: dict[str, Ceilings], width_ns: int
) -> tuple[Window, ...]:
    """Windows of `width_ns` from the first step's begin on, each with the steps that ended in it."""
    if not len(steps):
        return ()
    begin = int(steps["begin_ns"].min())
    place = ((steps["end_ns"] - begin - 1) // width_ns).clip(lower=0).to_numpy(dtype=np.int64)
    return tuple(
        Window(begin + int(number) * width_ns, width_ns, _done(times, work, ceilings, place == number))
        for number in np.unique(place)
    )


def window_width(steps: pd.DataFrame) -> int:
    """The width of at most MOST_WINDOWS windows over all steps, ns: of WINDOW_WIDTHS_S, or as many days as it takes."""
    span = int(steps["end_ns"].max()) - int(steps["begin_ns"].min()) if len(steps) else 0
    day = WINDOW_WIDTHS_S[-1]
    widths = (*WINDOW_WIDTHS_S, day * -(-span // (day * MOST_WINDOWS * 10**9)))
    return next(width * 10**9 for width in widths if width * MOST_WINDOWS * 10**9 >= span)


def _with_gaps(phases: dict[str, Done], steps: pd.DataFrame, taken: Spent, least: LeastTimes) -> dict[str, Done]:
    whole, link_bound = least_and_bound(least, len(steps))
    return {
        name: replace(done, gap=gap(taken, whole, link_bound, (steps["phase"] == name).to_numpy(dtype=bool)))
        for name, done in phases.items()
    }


def least_and_bound(least: LeastTimes, count: int) -> tuple[Numbers, Chosen]:
    """Of each of `count` steps the least time in ns, and whether the link is what bounds it."""
    assert least.whole is not None and least.link is not None
    whole, link = (np.broadcast_to(each, count) for each in (least.whole, least.link))
    return whole * 1e9, (link >= whole) & (link > 0)


def _by_stage(
    steps: pd.DataFrame, segments: pd.DataFrame, work: RankWork, ceilings: dict[str, Ceilings]
) -> dict[str, Done]:
    """Over all kinds of step; the time is that of the stage's segments, of one rank, where layers were recorded.

    Where only some steps have layers (the level was switched), all of it is of these.
    """
    layered, place = _with_layers(steps, segments)
    recorded = _stage_times(steps, segments, place)
    every = layered if layered.any() else np.ones(len(steps), dtype=bool)
    return {
        stage: Done(
            count=int(every.sum()),
            operations=_sum(work.operations(stage), every),
            bytes=_sum(work.bytes(stage), every),
            bus_bytes=_sum(work.bus_bytes(stage), every),
            time_ns=recorded.get(stage),
            roofs=_roofs(work, ceilings, every, stage),
        )
        for stage in work.stages()
    }


def least_of_requests(found: Served, requests: pd.DataFrame, ceilings: Ceilings) -> pd.DataFrame:
    """What each request would take at the speed of light with the device to itself: `least_ttft_ns`, `least_tpot_ns`.

    NaN where its tokens or a ceiling are not known, and for the TPOT of a request with one output token. TTFT: its
    prompt, without what a cache had, in one step; with pipeline stages the longest of theirs, since chunks of a prompt
    can be in all of them at once. TPOT: a step with one token, halfway through its output, all pipeline stages one
    after the other.
    """
    prompt, output, cached = (
        requests[name].to_numpy(dtype=float, na_value=np.nan)
        for name in ("prompt_tokens", "output_tokens", "cached_tokens")
    )
    ones, none = np.ones(len(requests)), Sums(*(np.zeros(len(requests)) for _ in range(5)))

    def least(prefill: Sums, decode: Sums, together: Callable[[list[Numbers]], Numbers]) -> Numbers:
        each = _work(found.model, Batch(prefill, decode), found.ranks).each_least(ceilings)
        known = [np.broadcast_to(part.whole, ones.shape) for part in each if part.whole is not None]
        return together(known) * 1e9 if len(known) == len(each) else ones * np.nan

    q = np.maximum(prompt - np.nan_to_num(cached), 1.0)
    middle = prompt + output / 2
    first = least(Sums(ones, q, prompt, q * q, q * prompt), none, lambda parts: np.max(parts, axis=0))
    each = least(none, Sums(ones, ones, middle, ones, middle), lambda parts: np.sum(parts, axis=0))
    each = np.where(output > 1, each, np.nan)
    return pd.DataFrame({"least_ttft_ns": first, "least_tpot_ns": each}, index=requests.index)


def _of_requests(found: Served, requests: pd.DataFrame, ceilings: Ceilings) -> RequestLight | None:
    """Of the finished requests whose tokens and times are known."""
    own = requests[(requests["status"] == "finished") & ~requests["partial"].astype(bool)]
    own = own.dropna(subset=["prompt_tokens", "output_tokens", "arrival_ns", "first_token_ns", "last_token_ns"])
    if not len(own):
        return None
    least = least_of_requests(found, own, ceilings)
    times = {name: own[name].to_numpy(dtype=np.int64) for name in ("arrival_ns", "first_token_ns", "last_token_ns")}
    output = own["output_tokens"].to_numpy(dtype=float)
    several = output > 1

    def median(values: npt.NDArray[Any]) -> float | None:
        return float(np.median(values)) if len(values) and not np.isnan(values).any() else None

    return RequestLight(
        count=len(own),
        ttft_ns=median(times["first_token_ns"] - times["arrival_ns"]),
        least_ttft_ns=median(least["least_ttft_ns"].to_numpy()),
        tpot_ns=median((times["last_token_ns"] - times["first_token_ns"])[several] / (output[several] - 1)),
        least_tpot_ns=median(least["least_tpot_ns"].to_numpy()[several]),
    )


def _with_layers(steps: pd.DataFrame, segments: pd.DataFrame) -> tuple[Chosen, npt.NDArray[np.int32]]:
    """Which steps have segments of layers, and all of them: the level was not switched meanwhile.

    And of each segment the row of `steps` that it is in, NOWHERE if it is of none of these.
    """
    place = step_places(steps, segments["instance"], segments["step"])
    inside = np.isin(segments["stage"].to_numpy(np.int16), _LAYERS) & (place != NOWHERE)
    layered = np.zeros(len(steps), dtype=bool)
    layered[place[inside]] = True
    layered[place[inside & segments["partial"].to_numpy(bool)]] = False
    return layered, np.where(np.append(layered, False)[place], place, np.int32(NOWHERE))


def _stage_times(steps: pd.DataFrame, segments: pd.DataFrame, place: npt.NDArray[np.int32]) -> dict[str, int]:
    """Self time of layer-level stages in these steps, on average over the ranks of an engine instance, of all instances
    together; nothing where no layers were recorded. `place`: as _with_layers finds it.
    """
    if not (place != NOWHERE).any():
        return {}
    stage = segments["stage"].to_numpy(np.int16)
    of_rank = np.flatnonzero(np.isin(stage, [*_LAYERS, BY_NAME["forward"].id]))
    if not len(of_rank):
        return {}
    threads = segments["process"].to_numpy(np.int64)[of_rank], segments["thread"].to_numpy(np.int64)[of_rank]
    changes = np.flatnonzero((np.diff(threads[0]) != 0) | (np.diff(threads[1]) != 0) | (np.diff(place[of_rank]) != 0))
    telling = of_rank[np.concatenate([[0], changes + 1])]  # of neighbours that are alike the first says it all
    del of_rank, threads, changes
    self_ns = segments["self_ns"].to_numpy(np.int64)
    instances, codes = np.unique(steps["instance"].to_numpy(np.int64), return_inverse=True)
    instance = np.where(place == NOWHERE, np.int16(NOWHERE), codes.astype(np.int16)[place])
    times: dict[str, float] = {}
    for each in range(len(instances)):
        inside = telling[instance[telling] == each]
        ranks = len(segments[["process", "thread"]].iloc[inside].drop_duplicates())
        for number in np.unique(stage[instance == each]) if ranks else ():
            total = int(self_ns[(instance == each) & (stage == number)].sum())
            name = BY_ID[int(number)].name
            times[name] = times.get(name, 0.0) + total / ranks
    return {name: round(time) for name, time in times.items()}


def _sum(values: Numbers, chosen: Chosen) -> float:
    return float(np.broadcast_to(values, chosen.shape)[chosen].sum())
