"""Breaks a session's time down: requests, steps, stages and losses, as pure functions from frames to dataclasses.

Times are nanoseconds. Percentiles interpolate linearly between the two nearest values (numpy's `linear`). What every
number means is in docs/numbers.md.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from stagetrace.exporters.session import FATES, REQUESTS_SCHEMA, Export, Losses, Manifest, Process
from stagetrace.instrument.stages import BY_ID, BY_NAME, STAGES, STEP_COMPOSITION, Kind, Level, Phase, Timeline

from .placed import COLUMNS as PLACED
from .placed import NOWHERE, RANK, RANK_STEP, SCHEDULER, placed
from .start_up import within_start_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .placed import Flags, Placed, Times

REQUEST_STATUSES = ("finished", "aborted", "error", "lost", "open")
STEP_STATUSES = ("complete", "incomplete", "ranks_missing", "partial")
PERCENTILES = (50, 95, 99)
LOSS_REASONS = tuple(name for name in FATES if name != "read")

# A request's latencies as the difference of two times of it: name, from, to.
_BETWEEN = (
    ("ttft", "arrival_ns", "first_output_ns"),
    ("ttft_client", "received_ns", "first_sent_ns"),
    ("e2e", "arrival_ns", "last_output_ns"),
    ("e2e_client", "received_ns", "last_sent_ns"),
)
STATES = tuple(
    name
    for name in (stage.name.removeprefix("request_") for stage in STAGES if stage.kind is Kind.STATE)
    if f"{name}_ns" in REQUESTS_SCHEMA.names
)
_BEGINNINGS = ["arrival_ns", "dispatched_ns", "queued_ns", "scheduled_ns"]
_STEP_KEY = ["instance", "step"]
_THREAD_KEY = ["process", "thread"]

_STEP = BY_NAME["step"]
# Stages told by event pairs, where a device is timed, and by marks, where they were chosen: of others none is missed.
_ON_DEVICE = [
    {stage.id for stage in STAGES if stage.timeline is Timeline.DEVICE and stage.level is level}
    for level in (Level.STEP, Level.LAYER)
]
# Of a hook (instrument/hooks.py); one that is unused has nothing in this model to be put on.
INSTALLED, WAITING, LEFT_OUT, UNUSED = "installed", "waiting", "left out", "unused"
ABSENT = "not in this version"
UNATTRIBUTED = "unattributed"
OBSERVED = "observed time"

# The columns that the breakdown reads, by table: what to ask of load().
COLUMNS: dict[str, list[str] | None] = {
    "requests": [
        *("status", "partial", "prompt_tokens", "output_tokens", "cached_tokens", "preemptions", "received_ns"),
        *_BEGINNINGS,
        *("first_token_ns", "first_output_ns", "first_sent_ns", "last_token_ns", "last_output_ns", "last_sent_ns"),
        *("end_ns", *(f"{name}_ns" for name in STATES)),
    ],
    "steps": [
        *("instance", "step", "process", "thread", "phase", "status", "begin_ns", "scheduled_ns", "end_ns"),
        *("unattributed_ns", "output_tokens", *(attribute.name for attribute in STEP_COMPOSITION)),
    ],
    "segments": PLACED,
    "intervals": None,
}


@dataclass(frozen=True)
class Distribution:
    """Count, mean and percentiles of times in ns; the numbers are None when there is nothing to count."""

    count: int = 0
    mean: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


@dataclass(frozen=True)
class Rates:
    """Per second of the span from the first arrival to the last end; None when the span is empty."""

    span_ns: int = 0
    requests: float | None = None  # that finished
    output_tokens: float | None = None
    total_tokens: float | None = None  # prompt and output


@dataclass(frozen=True)
class Requests:
    """The requests of a session."""

    count: int
    by_status: dict[str, int]
    partial: int  # of any status
    measured: int  # that the distributions are taken over
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    preemptions: int
    latencies: dict[str, Distribution]
    intervals_by_phase: dict[str, Distribution]  # inter-token latency, by the kind of step that gave the token
    rates: Rates


@dataclass(frozen=True)
class StepKind:
    """The complete steps of one kind."""

    count: int
    total_ns: int
    duration: Distribution
    tokens: float | None  # scheduled per step, mean
    requests: float | None  # in the batch, mean
    output_tokens: int  # of the steps whose membership is known
    membership_unknown: int  # steps


@dataclass(frozen=True)
class Steps:
    """The scheduler steps of a session."""

    count: int
    by_status: dict[str, int]
    kinds: dict[str, StepKind]


@dataclass(frozen=True)
class StageTime:
    """One stage's part of a timeline. `duration` is with what is nested in it, `self_ns` without; share is of self."""

    stage: str
    count: int
    self_ns: int
    share: float | None
    duration: Distribution


@dataclass(frozen=True)
class TimelineBreakdown:
    """Where the time of one timeline went. The stages' shares and the share of `unattributed` add up to 1."""

    name: str
    threads: int
    of: str  # what the shares are of: the envelope, or `observed time`
    envelope_ns: int  # sum of the envelopes' durations
    accounted_ns: int  # sum of self times and unattributed: less than the envelopes where these overlap
    stages: list[StageTime]
    unattributed: StageTime
    by_phase: dict[str, list[StageTime]] = field(default_factory=dict)  # unattributed last


@dataclass(frozen=True)
class RankTime:
    """One rank's part of the complete steps. The shares of its stages and of `unattributed` add up to 1."""

    process: int  # its key
    total_ns: int  # of its rank_steps
    duration: Distribution  # of a rank_step
    stages: list[StageTime]
    unattributed: StageTime


@dataclass(frozen=True)
class OutsideTime:
    """A stage's time that belongs to no step."""

    stage: str
    count: int
    total_ns: int
    inside_ns: int  # of it in a segment of a timeline above, where it has a row as well
    duration: Distribution


@dataclass(frozen=True)
class Stages:
    """The stages of a session, by timeline, and what belongs to no step."""

    timelines: list[TimelineBreakdown]
    ranks: list[RankTime]
    outside: list[OutsideTime]
    left_out: int  # segments of steps that are not complete
    above_level: list[str]  # segments of the vocabulary without a row, that a higher level records
    no_rows: list[str]  # those without a row although the level records them


@dataclass(frozen=True)
class HookTrouble:
    """A hook that was not installed, and in how many processes."""

    name: str
    status: str
    why: str
    processes: int


@dataclass(frozen=True)
class ExportHealth:
    """How far one backend has been sent the session."""

    target: str
    sent: int  # spans that it confirmed
    refused: int  # spans that it would not take while it took others
    left_out: dict[str, int]  # rows that become no spans, by reason
    waiting: int  # commits whose tables it does not have
    trouble: str  # why nothing arrives at present


@dataclass(frozen=True)
class Health:
    """What is missing from the session, and why."""

    lost: dict[str, int]  # by reason, over all rings
    rings: list[Losses]  # those that lost something
    read: int
    accounting_conflicts: int
    hooks: list[HookTrouble]
    errors: dict[str, int]  # contained errors of ours, by hook
    counts: dict[str, int]  # the manifest's, as they are
    exports: list[ExportHealth]
    rotated_ns: int  # wall: what was recorded until then was removed, to keep the session within its bounds; 0: nothing


def weighted_percentiles(
    values: npt.NDArray[np.int64], weights: npt.NDArray[np.int64], percentiles: Sequence[float]
) -> list[float]:
    """Percentiles of `values`, each counted `weights` times (at least 1), as of the array with its values repeated."""
    order = np.argsort(values, kind="stable")
    ordered, ends = values[order].astype(np.float64), np.cumsum(weights[order])
    last = int(ends[-1]) - 1
    results = []
    for percentile in percentiles:
        position = last * percentile / 100
        below = int(position)
        low, high = ordered[np.searchsorted(ends, [below, min(below + 1, last)], side="right")]
        results.append(float(low + (high - low) * (position - below)))
    return results


def distribution(values: pd.Series[int], weights: pd.Series[int] | None = None) -> Distribution:
    """The distribution of times in ns; missing ones are left out, and so is what has no weight."""
    known = values.notna() if weights is None else values.notna() & (weights > 0)
    numbers = np.asarray(values[known], dtype=np.int64)
    if not len(numbers):
        return Distribution()
    if weights is None:
        return distribution_of(numbers)
    repeats = np.asarray(weights[known], dtype=np.int64)
    mean = float(np.average(numbers, weights=repeats))
    return Distribution(int(repeats.sum()), mean, *weighted_percentiles(numbers, repeats, PERCENTILES))


def distribution_of(numbers: npt.NDArray[np.int64]) -> Distribution:
    """The distribution of times in ns, of which none is missing."""
    if not len(numbers):
        return Distribution()
    middle = [float(value) for value in np.percentile(numbers, PERCENTILES)]
    return Distribution(len(numbers), float(numbers.mean()), *middle)


# Requests


def request_breakdown(requests: pd.DataFrame, intervals: pd.DataFrame, steps: pd.DataFrame) -> Requests:
    """Counts, tokens, latencies and rates. What was lost, open or partial is outside every distribution."""
    measured = requests[~requests["status"].isin(["lost", "open"]) & ~requests["partial"]]
    whole = outside_of(intervals, steps[steps["status"] != "complete"])
    latencies = {name: distribution(measured[end] - measured[begin]) for name, begin, end in _BETWEEN}
    latencies["tpot"] = distribution(time_per_output_token(measured))
    latencies["itl"] = distribution(whole["interval_ns"], whole["tokens"])
    latencies |= {name: distribution(measured[f"{name}_ns"]) for name in STATES}
    by_phase = {
        phase.value: distribution(part["interval_ns"], part["tokens"])
        for phase in Phase
        if len(part := whole[whole["phase"] == phase.value])
    }
    return Requests(
        count=len(requests),
        by_status=_counts(requests["status"], REQUEST_STATUSES),
        partial=int(requests["partial"].sum()),
        measured=len(measured),
        prompt_tokens=int(requests["prompt_tokens"].sum()),
        output_tokens=int(requests["output_tokens"].sum()),
        cached_tokens=int(requests["cached_tokens"].sum()),
        preemptions=int(requests["preemptions"].sum()),
        latencies=latencies,
        intervals_by_phase=by_phase,
        rates=rates(requests),
    )


def time_per_output_token(requests: pd.DataFrame) -> pd.Series[int]:
    """Mean time between the tokens of each request that has two or more, rounded to a nanosecond."""
    several = requests[requests["output_tokens"] > 1]
    between = (several["last_token_ns"] - several["first_token_ns"]) / (several["output_tokens"] - 1)
    return between.round().astype("Int64")


def rates(requests: pd.DataFrame) -> Rates:
    """Rates over the span from the first arrival (or the first time known) to the last end, all requests counted."""
    if not len(requests):
        return Rates()
    span = _span([requests[column] for column in (*_BEGINNINGS, "end_ns")])
    if span <= 0:
        return Rates()
    output = int(requests["output_tokens"].sum())
    return Rates(
        span_ns=span,
        requests=int((requests["status"] == "finished").sum()) * 1e9 / span,
        output_tokens=output * 1e9 / span,
        total_tokens=(output + int(requests["prompt_tokens"].sum())) * 1e9 / span,
    )


def _span(times: Iterable[pd.Series[int]]) -> int:
    """From the first to the last of all times, in ns; 0 when there is none."""
    known = [series.dropna() for series in times]
    known = [series for series in known if len(series)]
    return max(int(series.max()) for series in known) - min(int(series.min()) for series in known) if known else 0


# Steps


def step_breakdown(steps: pd.DataFrame) -> Steps:
    """Steps by kind. Only complete ones are measured; the others are counted by their status."""
    complete = steps[steps["status"] == "complete"]
    kinds = {}
    for phase in Phase:
        part = complete[complete["phase"] == phase.value]
        if not len(part):
            continue
        durations = part["end_ns"] - part["begin_ns"]
        kinds[phase.value] = StepKind(
            count=len(part),
            total_ns=int(durations.sum()),
            duration=distribution(durations),
            tokens=float((part["prefill_tokens"] + part["decode_tokens"]).mean()),
            requests=float((part["prefill_requests"] + part["decode_requests"]).mean()),
            output_tokens=int(part["output_tokens"].sum()),
            membership_unknown=int(part["output_tokens"].isna().sum()),
        )
    return Steps(len(steps), _counts(steps["status"], STEP_STATUSES), kinds)


# Stages


def stage_breakdown(requests: pd.DataFrame, steps: pd.DataFrame, segments: pd.DataFrame, level: Level | None) -> Stages:
    """Each timeline's time by stage, unattributed included, and what belongs to no step.

    A timeline with an envelope (step on the scheduler's thread, rank_step on a rank's) is measured against its
    envelopes, over complete steps. Any other (front end, device, helper threads) has none and is measured against the
    observed time. See placed.py for which timeline a segment is on.
    """
    complete = steps[steps["status"] == "complete"]
    starting = within_start_up(segments)  # see start_up.py
    rows = placed(segments[~starting] if starting.any() else segments, complete, steps)
    phases = _phase_codes(complete["phase"])
    in_complete = rows.step != NOWHERE
    at_scheduler = in_complete & _same_thread(rows, complete)
    at_rank = rows.on([RANK]) & in_complete
    enveloped = rows.on([SCHEDULER, RANK])
    free_names = [name for name in rows.threads["timeline"].dropna().unique() if name not in (SCHEDULER, RANK)]
    timed = ~rows.of_kind(Kind.ENVELOPE)

    timelines = []
    if len(complete):
        timelines.append(_scheduler(complete, phases, rows, at_scheduler))
    if at_rank.any():
        timelines.append(_rank(phases, rows, at_rank))
    # Model loading and the like is not what the session observes.
    working = rows.of_kind(Kind.SEGMENT)
    observed = _span(
        [requests[column] for column in (*_BEGINNINGS, "end_ns")]
        + [steps[column] for column in ("begin_ns", "end_ns")]
        + [pd.Series(times[working]) for times in (rows.begin, rows.end)]
    )
    timelines += [_free(str(name), rows, rows.on([name]), observed) for name in sorted(free_names)]

    stepless = (enveloped & ~rows.in_step) | (rows.of_kind(Kind.OCCASION) & ~rows.own_step)
    above = at_scheduler | at_rank | rows.on(free_names)
    present = {int(stage) for stage in np.unique(rows.stage)}
    unknown = {stage for group in _ON_DEVICE if not present & group for stage in group}
    named = [stage for stage in STAGES if stage.id not in unknown]
    absent = [stage for stage in named if stage.kind is Kind.SEGMENT and stage.id not in present]
    return Stages(
        timelines=timelines,
        ranks=_ranks(rows, in_complete),
        outside=_outside(rows, np.flatnonzero(stepless & timed), above),
        left_out=int((enveloped & timed & rows.in_step & ~in_complete).sum()),
        above_level=[stage.name for stage in absent if level is not None and stage.level > level],
        no_rows=[stage.name for stage in absent if level is None or stage.level <= level],
    )


def _phase_codes(phases: pd.Series[str]) -> npt.NDArray[np.int8]:
    """Each step's place in Phase."""
    codes = np.full(len(phases), len(Phase), np.int8)
    for code, phase in enumerate(Phase):
        codes[(phases == phase.value).to_numpy(bool)] = code
    return codes


def _same_thread(rows: Placed, steps: pd.DataFrame) -> Flags:
    """Which segments are on the very thread that their step is on."""
    if not len(steps):
        return np.zeros(len(rows.step), bool)
    codes = pd.MultiIndex.from_frame(rows.threads[_THREAD_KEY])
    threads = pd.MultiIndex.from_frame(steps[_THREAD_KEY])
    of_step = codes.get_indexer(threads) if len(codes) else np.full(len(steps), NOWHERE)
    same: Flags = of_step[rows.step] == rows.thread
    return same


def _scheduler(steps: pd.DataFrame, phases: npt.NDArray[np.int8], rows: Placed, chosen: Flags) -> TimelineBreakdown:
    """The scheduler's thread within complete steps."""
    # A rank_step that nests in a segment took its time out of that segment's: what it does not hand on is unattributed.
    nested = np.flatnonzero(chosen & rows.nested & (rows.stage == RANK_STEP))
    gaps = steps["unattributed_ns"].to_numpy(np.int64, copy=True)
    np.add.at(gaps, rows.step[nested], rows.self_ns[nested])
    threads = len(steps[_THREAD_KEY].drop_duplicates())
    total = int((steps["end_ns"] - steps["begin_ns"]).sum())
    return _with_envelope((SCHEDULER, threads, _STEP.name, total), rows, chosen, phases, gaps, phases)


def _rank(phases: npt.NDArray[np.int8], rows: Placed, chosen: Flags) -> TimelineBreakdown:
    """The ranks' threads within complete steps, all ranks together."""
    envelopes = np.flatnonzero(chosen & (rows.stage == RANK_STEP))
    threads = len(np.unique(rows.thread[chosen]))
    total = int(rows.duration[envelopes].sum())
    head = (RANK, threads, BY_ID[RANK_STEP].name, total)
    return _with_envelope(head, rows, chosen, phases, rows.self_ns[envelopes], phases[rows.step[envelopes]])


def _ranks(rows: Placed, in_complete: Flags) -> list[RankTime]:
    """Every rank's part of the steps; a rank is a thread with rank_steps, the scheduler's own among them."""
    of_rank = np.zeros(np.iinfo(np.uint16).max + 1, bool)  # by stage
    of_rank[[stage.id for stage in STAGES if stage.timeline is Timeline.RANK and stage.kind is not Kind.ENVELOPE]] = (
        True
    )
    own_thread = rows.on([RANK])
    found = []
    for thread in np.unique(rows.thread[(rows.stage == RANK_STEP) & in_complete]):
        chosen = in_complete & (rows.thread == thread)
        envelopes = np.flatnonzero(chosen & (rows.stage == RANK_STEP))
        parts = np.flatnonzero(chosen & ~rows.of_kind(Kind.ENVELOPE) & (own_thread | of_rank[rows.stage]))
        stages, unattributed, _ = _partition(rows, parts, rows.self_ns[envelopes])
        duration = rows.end[envelopes] - rows.begin[envelopes]
        key = int(rows.threads["process"].iloc[int(thread)])
        found.append(RankTime(key, int(duration.sum()), distribution_of(duration), stages, unattributed))
    return found


def _with_envelope(
    head: tuple[str, int, str, int],
    rows: Placed,
    chosen: Flags,
    phases: npt.NDArray[np.int8],
    gaps: Times,
    gap_phases: npt.NDArray[np.int8],
) -> TimelineBreakdown:
    """A timeline's breakdown from its segments and, one an envelope, what these leave uncovered (`gaps`).

    `head` is its name, threads, envelope and the envelopes' time; `phases` is by step.
    """
    parts = np.flatnonzero(chosen & ~rows.of_kind(Kind.ENVELOPE))
    stages, unattributed, accounted = _partition(rows, parts, gaps)
    phase_of = phases[rows.step[parts]]
    by_phase = {}
    for code, phase in enumerate(Phase):
        if len(phase_gaps := gaps[gap_phases == code]):
            found, rest, _ = _partition(rows, parts[phase_of == code], phase_gaps)
            by_phase[phase.value] = [*found, rest]
    return TimelineBreakdown(*head, accounted, stages, unattributed, by_phase)


def _partition(rows: Placed, parts: Times, gaps: Times) -> tuple[list[StageTime], StageTime, int]:
    """Stages in the order of the vocabulary, unattributed, and the time that they add up to."""
    uncovered = int(gaps.sum())
    accounted = int(rows.self_ns[parts].sum()) + uncovered
    stages = [
        StageTime(
            stage=_name(stage),
            count=len(own),
            self_ns=(self_ns := int(rows.self_ns[own].sum())),
            share=self_ns / accounted if accounted else None,
            duration=distribution_of(rows.end[own] - rows.begin[own]),
        )
        for stage, own in _by_stage(rows, parts)
    ]
    share = uncovered / accounted if accounted else None
    return stages, StageTime(UNATTRIBUTED, len(gaps), uncovered, share, distribution_of(gaps)), accounted


def _by_stage(rows: Placed, parts: Times) -> Iterator[tuple[int, Times]]:
    """The segments of each stage, in the order of the vocabulary."""
    stages = rows.stage[parts]
    for stage in np.unique(stages):
        yield int(stage), parts[stages == stage]


def _name(stage: int) -> str:
    """A stage's name; one of a newer vocabulary goes by its number."""
    return BY_ID[stage].name if stage in BY_ID else f"stage {stage}"


def _free(name: str, rows: Placed, chosen: Flags, observed_ns: int) -> TimelineBreakdown:
    """The breakdown of threads that have no envelope: their share of the observed time, once for each thread."""
    threads = len(np.unique(rows.thread[chosen]))
    parts = np.flatnonzero(chosen & ~rows.of_kind(Kind.ENVELOPE))
    total = threads * observed_ns
    rest = np.array([total - int(rows.self_ns[parts].sum())])
    stages, unattributed, accounted = _partition(rows, parts, rest)
    unmeasured = StageTime(UNATTRIBUTED, threads, unattributed.self_ns, unattributed.share, Distribution())
    return TimelineBreakdown(name, threads, OBSERVED, total, accounted, stages, unmeasured)


def _outside(rows: Placed, parts: Times, above: Flags) -> list[OutsideTime]:
    return [
        OutsideTime(
            stage=_name(stage),
            count=len(own),
            total_ns=int((duration := rows.end[own] - rows.begin[own]).sum()),
            inside_ns=int(duration[above[own]].sum()),
            duration=distribution_of(duration),
        )
        for stage, own in _by_stage(rows, parts)
    ]


def outside_of(rows: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """The rows whose step (instance and number) is not among `steps`."""
    marked = rows.merge(steps[_STEP_KEY].drop_duplicates(), how="left", on=_STEP_KEY, indicator="found")
    return marked[marked["found"] == "left_only"].drop(columns="found")


# Losses and hooks


def health(manifest: Manifest, exports: Iterable[Export] = ()) -> Health:
    """What did not reach the session or a backend, by reason, and the hooks that were not installed."""
    return Health(
        lost=lost_by_reason(manifest),
        rings=[losses for losses in manifest.losses if losses.lost],
        read=sum(losses.read for losses in manifest.losses),
        accounting_conflicts=manifest.counts.get("accounting_conflict", 0),
        hooks=hook_troubles(manifest.processes),
        errors=dict(sorted(sum((Counter(process.errors) for process in manifest.processes), Counter()).items())),
        counts=dict(sorted(manifest.counts.items())),
        exports=[
            ExportHealth(
                each.target,
                each.sent,
                each.refused,
                each.left_out,
                max(manifest.derived - each.commit, 0) + (manifest.complete and not each.end),
                each.trouble,
            )
            for each in exports
        ],
        rotated_ns=manifest.rotated_ns,
    )


def lost_by_reason(manifest: Manifest) -> dict[str, int]:
    """What did not reach the tables: what the rings lost, and what was read but is no whole record."""
    lost = Counter({reason: sum(getattr(losses, reason) for losses in manifest.losses) for reason in LOSS_REASONS})
    lost.update({reason: manifest.counts.get(reason, 0) for reason in ("corrupt", "incomplete")})
    return dict(lost)


def hook_troubles(processes: Sequence[Process]) -> list[HookTrouble]:
    """The hooks that are not installed, with the reason, and in how many processes that is so.

    A hook that waits for a module is no trouble in a process that has no use for the module, as long as another
    process has it installed, or found nothing to put it on, or has another hook that gives the same (engines choose
    between modules, and have other functions in other releases).
    """
    hooks = [hook for process in processes for hook in process.hooks]
    given = {_gift(hook) for hook in hooks if hook.get("status") in (INSTALLED, UNUSED)}
    found = Counter(
        (hook.get("name", ""), hook.get("status", ""), hook.get("why", ""))
        for hook in hooks
        if hook.get("status") not in (INSTALLED, LEFT_OUT, UNUSED)
        and not (hook.get("status") in (WAITING, ABSENT) and _gift(hook) in given)
    )
    return [HookTrouble(*what, processes=count) for what, count in sorted(found.items())]


def _gift(hook: dict[str, str]) -> str | None:
    return hook.get("gives") or hook.get("name")


def _counts(values: pd.Series[str], expected: Sequence[str]) -> dict[str, int]:
    """How often each value occurs: those expected always, others (of a newer version) after them."""
    found = {str(value): int(count) for value, count in values.value_counts().items()}
    return {name: found.pop(name, 0) for name in expected} | dict(sorted(found.items()))
