"""What a comparison takes of each session: its metrics' values by block of time, and what its load was."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from stagetrace.instrument.stages import BY_ID, Phase

from ..breakdown import COLUMNS as BREAKDOWN
from ..breakdown import STATES, outside_of, time_per_output_token
from ..latency_parts import COLUMNS as PARTS_COLUMNS
from ..latency_parts import PARTS, Engines, request_parts
from ..load import load
from ..marks import mark_info, marks_text
from ..placed import NOWHERE, step_places
from ..start_up import within_start_up
from .metrics import STATE_TIMES, TIMED_STAGES
from .resampling import Ratio, Values, blocks_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stagetrace.exporters.session import Manifest, Session

    from ..load import Frames

    Places = npt.NDArray[np.int32]

_LATENCIES = (
    ("ttft", "arrival_ns", "first_output_ns"),
    ("ttft_client", "received_ns", "first_sent_ns"),
    ("e2e", "arrival_ns", "last_output_ns"),
    ("e2e_client", "received_ns", "last_sent_ns"),
)
_SETTINGS = (
    *("engine", "engine_version", "model", "dtype", "kv_cache_dtype", "device", "device_name", "enforce_eager"),
    *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "chunked_prefill_size", "prefix_caching"),
    *("async_scheduling", "overlap_schedule", "tensor_parallel", "pipeline_parallel", "data_parallel"),
    "expert_parallel",
)


@dataclass(frozen=True, eq=False)
class Load:
    """What was asked of a server."""

    settings: dict[str, str]  # engine, model, limits and the like: what its processes said
    prompt_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]
    arrivals_per_s: float | None
    concurrency: float | None  # requests in flight, mean over the time between the first arrival and the last end


@dataclass(frozen=True, eq=False)
class Sample:
    """One session. Values and ratios are by the name of what metrics are taken `of` (see metrics.py)."""

    path: str
    session: str
    window: float | None
    measured: int  # requests
    steps: int  # complete ones
    blocks: int
    load: Load
    values: dict[str, Values] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[str, float | None]:
        """What tells it from another."""
        return self.session, self.window


def columns() -> dict[str, list[str] | None]:
    """What a sample needs of each table."""
    found: dict[str, list[str] | None] = {}
    for needed in (BREAKDOWN, PARTS_COLUMNS):
        for name, wanted in needed.items():
            found[name] = list(dict.fromkeys([*(found.get(name) or ()), *(wanted or ())]))
    return found


def sample(session: Session, last_s: float | None = None) -> Sample:
    """A session's sample, or that of its last `last_s` seconds. Raises SessionError when it cannot be read."""
    return sample_of(load(session, last_s, columns()), str(session.path), last_s)


def sample_of(frames: Frames, path: str, last_s: float | None = None) -> Sample:
    """The sample of frames with `columns()`."""
    requests, steps, manifest = frames["requests"], frames["steps"], frames.manifest
    measured = requests[~requests["status"].isin(["lost", "open"]) & ~requests["partial"]].reset_index(drop=True)
    complete = steps[steps["status"] == "complete"].reset_index(drop=True)
    edges = _edges(measured["end_ns"] if len(measured) else complete["end_ns"])
    found = Sample(
        path,
        manifest.session,
        last_s,
        len(measured),
        len(complete),
        len(edges) + 1,
        _load(manifest, requests, measured),
    )
    if len(measured):
        _of_requests(found, measured, edges)
        _of_parts(found, frames, measured, edges)
        _rates(found, requests, edges)
    if len(complete):
        _of_steps(found, complete, edges)
        _of_intervals(found, frames["intervals"], steps, complete, edges)
        _of_stages(found, frames["segments"], complete, edges)
    return found


def _edges(ends: pd.Series) -> npt.NDArray[np.int64]:
    """The times that part the blocks, so that each has about as many of `ends`."""
    ordered = np.sort(ends.to_numpy(np.int64))
    blocks = blocks_for(len(ordered))
    places = (np.arange(1, blocks) * len(ordered)) // blocks
    return ordered[places - 1] if blocks > 1 else ordered[:0]


def _blocks(times: pd.Series, edges: npt.NDArray[np.int64]) -> Places:
    return np.searchsorted(edges, times.to_numpy(np.int64), side="left").astype(np.int32)


def _add(found: Sample, name: str, values: pd.Series, block: Places, weights: Any = None) -> None:
    """Adds values; missing ones, and what has no weight, are left out."""
    known = values.notna().to_numpy(bool)
    if weights is not None:
        known = known & (np.asarray(weights) > 0)
    if known.any():
        counts = np.ones(int(known.sum()), np.int64) if weights is None else np.asarray(weights, np.int64)[known]
        found.values[name] = Values(values[known].to_numpy(np.float64), counts, block[known], found.blocks)


def _sums(block: Places, amounts: Any, blocks: int) -> npt.NDArray[np.float64]:
    return np.bincount(block, weights=np.asarray(amounts, np.float64), minlength=blocks).astype(np.float64)


def _of_requests(found: Sample, measured: pd.DataFrame, edges: npt.NDArray[np.int64]) -> None:
    block = _blocks(measured["end_ns"], edges)
    for name, begin, end in _LATENCIES:
        _add(found, name, measured[end] - measured[begin], block)
    _add(found, "tpot", time_per_output_token(measured).reindex(measured.index), block)
    for name in STATES:
        if name in STATE_TIMES:
            _add(found, name, measured[f"{name}_ns"], block)
    counts = np.bincount(block, minlength=found.blocks).astype(np.float64)
    found.ratios["preemptions_per_request"] = Ratio(_sums(block, measured["preemptions"], found.blocks), counts)
    cached, prompt = (_sums(block, measured[f"{name}_tokens"].fillna(0), found.blocks) for name in ("cached", "prompt"))
    if prompt.any():
        found.ratios["cached_share"] = Ratio(cached, prompt)


def _of_parts(found: Sample, frames: Frames, measured: pd.DataFrame, edges: npt.NDArray[np.int64]) -> None:
    own = measured[~measured["handle"].duplicated(keep=False)].reset_index(drop=True)
    engines = Engines.of(frames["steps"], frames.manifest.processes, frames["requests"])
    values, parts = request_parts(own, frames["states"], engines)["e2e"]
    known = np.flatnonzero(~np.isnan(values))
    block = _blocks(own["end_ns"].iloc[known], edges)
    counts = np.bincount(block, minlength=found.blocks).astype(np.float64)
    for name, amounts in zip(PARTS, parts[:, known], strict=True):
        if amounts.any():
            found.ratios[f"part_{name}"] = Ratio(_sums(block, amounts, found.blocks), counts)


def _rates(found: Sample, requests: pd.DataFrame, edges: npt.NDArray[np.int64]) -> None:
    """Rates by block, each over its own stretch of time: together they are over the span of all."""
    begins = pd.concat(
        [requests[name].dropna() for name in ("arrival_ns", "dispatched_ns", "queued_ns", "scheduled_ns")]
    )
    first, last = int(begins.min()) if len(begins) else int(requests["end_ns"].min()), int(requests["end_ns"].max())
    if last <= first:
        return
    lengths = np.diff(np.concatenate([[first], np.clip(edges, first, last), [last]])) / 1e9
    block = _blocks(requests["end_ns"], edges)
    finished = (requests["status"] == "finished").to_numpy(np.float64)
    output, prompt = (requests[f"{name}_tokens"].fillna(0).to_numpy(np.float64) for name in ("output", "prompt"))
    for name, amounts in (
        ("requests_per_s", finished),
        ("output_tokens_per_s", output),
        ("total_tokens_per_s", output + prompt),
    ):
        found.ratios[name] = Ratio(_sums(block, amounts, found.blocks), lengths)


def _of_steps(found: Sample, complete: pd.DataFrame, edges: npt.NDArray[np.int64]) -> None:
    block = _blocks(complete["end_ns"], edges)
    duration = complete["end_ns"] - complete["begin_ns"]
    for phase in Phase:
        chosen = (complete["phase"] == phase.value).to_numpy(bool)
        if chosen.any():
            _add(found, f"step_{phase.value}", duration[chosen], block[chosen])
    counts = np.bincount(block, minlength=found.blocks).astype(np.float64)
    for name, amounts in (
        ("batch_mean", complete["prefill_requests"] + complete["decode_requests"]),
        ("decode_batch_mean", complete["decode_requests"]),
        ("waiting_mean", complete["waiting"]),
        ("kv_usage_mean", complete["kv_usage"] / 1e6),
    ):
        found.ratios[name] = Ratio(_sums(block, amounts, found.blocks), counts)
    uncovered = _sums(block, complete["unattributed_ns"], found.blocks)
    found.ratios["unattributed_share"] = Ratio(uncovered, _sums(block, duration, found.blocks))


def _of_intervals(
    found: Sample, intervals: pd.DataFrame, steps: pd.DataFrame, complete: pd.DataFrame, edges: npt.NDArray[np.int64]
) -> None:
    whole = outside_of(intervals, steps[steps["status"] != "complete"])
    place = step_places(complete, whole["instance"], whole["step"])
    whole, place = whole[place != NOWHERE], place[place != NOWHERE]
    if not len(whole):
        return
    block = _blocks(complete["end_ns"].iloc[place], edges)
    weights = whole["tokens"].to_numpy(np.int64)
    _add(found, "itl", whole["interval_ns"], block, weights)
    for phase in Phase:
        chosen = (whole["phase"] == phase.value).to_numpy(bool)
        if chosen.any():
            _add(found, f"itl_{phase.value}", whole["interval_ns"][chosen], block[chosen], weights[chosen])


def _of_stages(found: Sample, segments: pd.DataFrame, complete: pd.DataFrame, edges: npt.NDArray[np.int64]) -> None:
    """Each stage's self time for each complete step; of occasions that belong to no step by the time of their end."""
    starting = within_start_up(segments)
    segments = segments[~starting] if starting.any() else segments
    place = step_places(complete, segments["instance"], segments["step"])
    block = np.where(place == NOWHERE, -1, _blocks(complete["end_ns"], edges)[place])
    stepless = segments["step"].isna().to_numpy(bool)
    block[stepless] = _blocks(segments["end_ns"][stepless], edges)
    counts = np.bincount(_blocks(complete["end_ns"], edges), minlength=found.blocks).astype(np.float64)
    stage, self_ns = segments["stage"].to_numpy(), segments["self_ns"].to_numpy(np.float64)
    for each in np.unique(stage):
        name = BY_ID[int(each)].name if int(each) in BY_ID else ""
        chosen = np.flatnonzero((stage == each) & (block >= 0)) if name in TIMED_STAGES else np.zeros(0, np.int64)
        if len(chosen):
            found.ratios[f"stage_{name}"] = Ratio(_sums(block[chosen], self_ns[chosen], found.blocks), counts)


def _load(manifest: Manifest, requests: pd.DataFrame, measured: pd.DataFrame) -> Load:
    settings = {"level": manifest.level, "host": manifest.host}
    for name in _SETTINGS:
        said = sorted({str(each.info[name]) for each in manifest.processes if each.info.get(name) not in (None, "")})
        if said:
            settings[name] = ", ".join(said)
    marks = sorted({marks_text(info) for each in manifest.processes if (info := mark_info(each)) and info.there})
    settings["marks"] = "; ".join(marks) or "none"
    arrivals = np.sort(requests["arrival_ns"].dropna().to_numpy(np.int64))
    rate = None
    if len(arrivals) > 1 and arrivals[-1] > arrivals[0]:
        rate = (len(arrivals) - 1) * 1e9 / float(arrivals[-1] - arrivals[0])
    lives = measured.dropna(subset=["arrival_ns"])
    begin, end = lives["arrival_ns"].to_numpy(np.int64), lives["end_ns"].to_numpy(np.int64)
    span = float(end.max() - begin.min()) if len(lives) else 0.0
    return Load(
        settings=settings,
        prompt_tokens=measured["prompt_tokens"].dropna().to_numpy(np.int64),
        output_tokens=measured["output_tokens"].dropna().to_numpy(np.int64),
        arrivals_per_s=rate,
        concurrency=float((end - begin).sum()) / span if span else None,
    )


# Sides


@dataclass(frozen=True, eq=False)
class Side:
    """One or several sessions of the same load, taken together; their blocks follow one another."""

    samples: Sequence[Sample]

    @property
    def blocks(self) -> tuple[int, ...]:
        """Of each session."""
        return tuple(each.blocks for each in self.samples)

    def values(self, name: str) -> Values | None:
        """The values of all sessions; None where none has any."""
        parts = [(number, each.values[name]) for number, each in enumerate(self.samples) if name in each.values]
        if not parts:
            return None
        before = np.concatenate([[0], np.cumsum(self.blocks)])
        return Values(
            np.concatenate([part.values for _, part in parts]),
            np.concatenate([part.weights for _, part in parts]),
            np.concatenate([part.block + before[number] for number, part in parts]).astype(np.int32),
            sum(self.blocks),
        )

    def ratio(self, name: str) -> Ratio | None:
        """The ratio of all sessions; None where none has it."""
        if all(name not in each.ratios for each in self.samples):
            return None
        nothing = [Ratio(np.zeros(each.blocks), np.zeros(each.blocks)) for each in self.samples]
        parts = [each.ratios.get(name, empty) for each, empty in zip(self.samples, nothing, strict=True)]
        return Ratio(np.concatenate([part.above for part in parts]), np.concatenate([part.below for part in parts]))
