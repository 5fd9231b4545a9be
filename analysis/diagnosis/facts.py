"""What the causes are looked for in: a session's requests, steps and stages, with the time that requests spent in each.

Steps are shared, so that a step's time counts once for every request that waited for it: request time. A request in
decode waits for the step that gives its next token, one in prefill for its chunk, one in the queue for its turn. Times
are nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from stagetrace.instrument.ids import step_trace_id
from stagetrace.instrument.stages import BY_NAME, Level

from ..breakdown import outside_of
from ..placed import step_places
from ..start_up import within_start_up
from .thresholds import limit

if TYPE_CHECKING:
    from stagetrace.exporters.session import Manifest

Values = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

STEP_KEY = ["instance", "step"]
_GC, _BETWEEN = BY_NAME["gc_pause"].id, BY_NAME["between"].id
_SCHEDULE, _RANK_STEP, _STARTUP = (BY_NAME[name].id for name in ("schedule", "rank_step", "startup"))
_PER_STEP = tuple(
    BY_NAME[name].id
    for name in (
        *("schedule", "execute", "update", "grammar", "dp_sync", "emit"),
        *("prepare", "forward", "sample", "bookkeep", "draft", "verify", "return"),
        *("attention", "mlp", "expert_dispatch", "expert_compute", "expert_combine", "collective"),
    )
)
NOW_AND_THEN = ("between", "gc_pause", "compile", "graph_capture", "detokenize")
# The stages whose segments are read, and the columns of each table: what to ask of load().
STAGES = {
    *_PER_STEP,
    *(BY_NAME[name].id for name in NOW_AND_THEN),
    *(_STARTUP, _RANK_STEP),
}
_ATTRIBUTES = ["a0", "a1", "a2", "a3", "a4"]


def columns(manifest: Manifest) -> dict[str, list[str] | None]:
    """Of a session: attributes take half of the memory, and only the layer level's are needed."""
    segments = ["process", "thread", "stage", "begin_ns", "end_ns", "self_ns", "instance", "step"]
    level = Level.__members__.get(manifest.level.upper(), Level.LAYER)  # as it was switched last
    deep = level >= Level.LAYER or any("visible" in process.info for process in manifest.processes)
    return {
        "requests": None,
        "steps": None,
        "segments": [*segments, *_ATTRIBUTES] if deep else segments,
        "intervals": None,
        "experts": ["instance", "step", "rank", "layer", "tokens", "counts"],
    }


@dataclass(frozen=True)
class Example:
    """A request or a step that shows a cause, to look at in a trace backend."""

    kind: str  # request, step
    name: str  # the request's id as the client sees it, or the step's number
    trace_id: str  # 32 hex digits
    ns: int  # of its time that the cause took


class Covered:
    """How much of any span of time was covered by something; spans of one engine instance do not overlap."""

    def __init__(self, instances: npt.NDArray[np.int64], begins: Values, lengths: Values, values: Values):
        """`values` of the `lengths` from `begins` on are spread evenly over these."""
        self._knots: dict[int, tuple[Values, Values]] = {}
        for instance in np.unique(instances):
            mine = instances == instance
            begin, length, value = begins[mine], lengths[mine], values[mine]
            order = np.argsort(begin, kind="stable")
            begin, length, value = begin[order], length[order], value[order]
            total = np.cumsum(value)
            times = np.stack([begin, begin + length], axis=1).ravel()
            sums = np.stack([total - value, total], axis=1).ravel()
            self._knots[int(instance)] = np.maximum.accumulate(times), sums

    def within(self, instances: npt.NDArray[np.int64], begins: Values, ends: Values) -> Values:
        """The sum of values between two times, for each row; 0 where the instance is unknown."""
        found = np.zeros(len(begins))
        for instance, (times, sums) in self._knots.items():
            mine = instances == instance
            if mine.any():
                found[mine] = np.interp(ends[mine], times, sums) - np.interp(begins[mine], times, sums)
        return np.maximum(found, 0.0)


@dataclass(frozen=True)
class Waits:
    """From one token to the next, by rows: the step that gave the next one, the time, and of how many tokens it is."""

    place: npt.NDArray[np.int32]
    time: Values
    tokens: Values


@dataclass(frozen=True)
class Facts:
    """A session as the causes see it. Pure functions of it; nothing here reads a file."""

    manifest: Manifest
    key: bytes  # of the session's ids
    requests: pd.DataFrame  # neither lost, open nor partial, in order of arrival
    steps: pd.DataFrame  # complete, in order of their end
    segments: pd.DataFrame  # of STAGES; the start-up's are among them
    intervals: pd.DataFrame  # of complete steps
    experts: pd.DataFrame  # of complete steps
    least_ns: Values | None = None  # of each step at the speed of light; None without model or ceilings
    memory_ns: Values | None = None  # of it: to move its bytes
    no_light: str = ""  # why there is none
    has_experts: bool | None = None  # whether the model is a Mixture of Experts; None: its config is not known

    @classmethod
    def of(cls, manifest: Manifest, key: bytes, tables: dict[str, pd.DataFrame]) -> Facts:
        """From the tables that columns() names."""
        requests, steps = tables["requests"], tables["steps"]
        measured = requests[~requests["status"].isin(["lost", "open"]) & ~requests["partial"].astype(bool)]
        measured = measured.sort_values("arrival_ns", kind="stable").reset_index(drop=True)
        complete = steps[steps["status"] == "complete"].sort_values("end_ns", kind="stable").reset_index(drop=True)
        segments, experts = tables["segments"], tables["experts"]
        return cls(
            manifest=manifest,
            key=key,
            requests=measured,
            steps=complete,
            segments=segments,
            intervals=outside_of(tables["intervals"], steps[steps["status"] != "complete"]),
            experts=experts.merge(complete[STEP_KEY], on=STEP_KEY) if len(experts) else experts,
        )

    # What was served

    @cached_property
    def info(self) -> dict[str, Any]:
        """What the engine said of itself: the scheduler's process, then the others."""
        found: dict[str, Any] = {}
        for process in sorted(self.manifest.processes, key=lambda each: each.role != "engine_core"):
            found = {**process.info, **found}
        return found

    @property
    def engine(self) -> str:
        """As it calls itself: vllm, sglang, or empty."""
        return str(self.info.get("engine", ""))

    @property
    def level(self) -> Level | None:
        """That the session says it was recorded at."""
        return Level.__members__.get(self.manifest.level.upper())

    def setting(self, *names: str) -> int:
        """The first of some settings of the engine that is a number above 0; 0 where none is."""
        for name in names:
            value = self.info.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return 0

    # Requests

    def request(self, *names: str) -> tuple[Values, ...]:
        """Columns of the requests as numbers, NaN where they are not known."""
        return tuple(self.requests[name].to_numpy(dtype=np.float64, na_value=np.nan) for name in names)

    @property
    def enough_requests(self) -> bool:
        """Whether there are so many that an interval says something."""
        return len(self.requests) >= limit("requests")

    @cached_property
    def ttft(self) -> Values:
        """Of each request, NaN where it is not known."""
        arrival, first = self.request("arrival_ns", "first_output_ns")
        return first - arrival

    @cached_property
    def decode(self) -> Values:
        """Of each request from its first token to its last, as the engine had them; NaN where that is not known."""
        first, last = self.request("first_token_ns", "last_token_ns")
        return last - first

    @cached_property
    def stepped_ttft(self) -> float:
        """How much of the time to first token was spent in the queue or in prefill: where steps are waited for."""
        queue, prefill = self.request("queue_ns", "prefill_ns")
        whole = float(np.nansum(self.ttft))
        return min((float(np.nansum(queue)) + float(np.nansum(prefill))) / whole, 1.0) if whole > 0 else 0.0

    @cached_property
    def e2e(self) -> Values:
        """Of each request until its last byte was handed to the socket, or until the front end had its last token."""
        arrival, last, sent = self.request("arrival_ns", "last_output_ns", "last_sent_ns")
        return np.where(np.isnan(sent), last, sent) - arrival

    @cached_property
    def request_time(self) -> float:
        """All the time of all requests, from arrival to the end: what every recoverable time is a part of."""
        return float(np.nansum(self.e2e))

    @cached_property
    def request_instance(self) -> npt.NDArray[np.int64]:
        """The engine instance of each request, 0 where it is not known."""
        return self.requests["instance"].fillna(0).to_numpy(dtype=np.int64)

    # Steps

    def step(self, name: str) -> Values:
        """A column of the steps as numbers, NaN where it is not known."""
        return self.steps[name].to_numpy(dtype=np.float64, na_value=np.nan)

    @cached_property
    def step_instance(self) -> npt.NDArray[np.int64]:
        """The engine instance of each step."""
        return self.steps["instance"].to_numpy(dtype=np.int64)

    @cached_property
    def done(self) -> Values:
        """When what each step had to compute was done.

        That is its end, but where steps overlap on a processor: there the next step's forward pass runs on the same
        thread before the results of this one are handed on, and its time is not this one's.
        """
        ends = self.step("end_ns")
        following = self._shifted(self.step("begin_ns"), -1)
        if self.info.get("device") != "cpu" or not (following < ends).any():
            return ends
        rows = self.segments[(self.segments["stage"] == _RANK_STEP).to_numpy(dtype=bool)]
        place = self.place(rows)
        computed = np.zeros(len(ends))
        np.maximum.at(computed, place[place >= 0], rows["end_ns"].to_numpy(dtype=np.float64)[place >= 0])
        found: Values = np.where((following < ends) & (computed > 0), np.minimum(computed, ends), ends)
        return found

    @cached_property
    def own(self) -> Values:
        """The time of each step that no other one has: from its begin, or once the one it overlaps is done."""
        begins, before = self.step("begin_ns"), self._shifted(self.done, 1)
        overlaps = begins < self._shifted(self.step("end_ns"), 1)
        return np.clip(self.done - np.where(overlaps, before, begins), 0, None)

    def _shifted(self, values: Values, by: int) -> Values:
        """Of each step the value of another one of its instance, NaN without one; in order of their ends."""
        shifted = pd.Series(values).groupby(self.step_instance).shift(by)
        return np.asarray(shifted, dtype=np.float64)

    @cached_property
    def tokens(self) -> Values:
        """Scheduled in each step."""
        return self.step("prefill_tokens") + self.step("decode_tokens")

    @cached_property
    def decoding(self) -> Values:
        """Requests that waited for the token that each step gave them, as the intervals say."""
        return self.per_step(self.intervals, self.intervals["tokens"])

    @cached_property
    def interval_time(self) -> Values:
        """Time between tokens that ended with each step, over the requests that got one."""
        return self.per_step(self.intervals, self.intervals["tokens"] * self.intervals["interval_ns"])

    @cached_property
    def waits(self) -> Waits:
        """Of requests in decode."""
        place = self.place(self.intervals)
        known = place >= 0
        time, tokens = (self.intervals[name].to_numpy(dtype=np.float64)[known] for name in ("interval_ns", "tokens"))
        return Waits(place[known], time, tokens)

    @cached_property
    def _within(self) -> tuple[tuple[npt.NDArray[np.int64], Values], tuple[npt.NDArray[np.int64], Values]]:
        """Where the waits begin and end: the step that is computed then or is the next one, and how much of it is over.

        Steps are in the order in which they are done.
        """
        waits = self.waits
        until, instance = self.step("end_ns")[waits.place], self.step_instance[waits.place]
        found = []
        for at in (until - waits.time, until):
            step, over = np.zeros(len(at), dtype=np.int64), np.zeros(len(at))
            for each in np.unique(instance):
                mine, rows = np.flatnonzero(self.step_instance == each), instance == each
                place = np.searchsorted(self.done[mine], at[rows], side="left")
                known = place < len(mine)
                of = mine[np.minimum(place, len(mine) - 1)]
                begun = at[rows] - (self.done - self.own)[of]
                step[rows] = of
                over[rows] = np.where(known, np.clip(begun / np.maximum(self.own[of], 1.0), 0, 1), 1.0)
            found.append((step, over))
        return found[0], found[1]

    def waited(self, times: Values) -> Values:
        """How much of each of the waits went by in some part of the steps' time: `times`, spread evenly over each."""
        before: Values = np.zeros(len(times))
        for each in np.unique(self.step_instance):
            mine = self.step_instance == each
            before[mine] = np.cumsum(times[mine]) - times[mine]
        (first, over), (last, then) = self._within
        part = before[last] + times[last] * then - before[first] - times[first] * over
        return np.clip(part, 0.0, self.waits.time)

    def held_up(self, times: Values) -> Values:
        """The same of all tokens that came with each step."""
        return np.bincount(
            self.waits.place, weights=self.waited(times) * self.waits.tokens, minlength=len(self.steps)
        ).astype(np.float64)

    @cached_property
    def starting(self) -> Values:
        """Requests that had no token yet and waited for each step: in prefill, or in the queue behind it."""
        return self.step("prefill_requests") + self.step("waiting")

    def per_step(self, rows: pd.DataFrame, values: pd.Series[Any]) -> Values:
        """Sums of values by the steps of their rows."""
        place = self.place(rows)
        known = place >= 0
        return np.bincount(
            place[known], weights=values.to_numpy(dtype=np.float64)[known], minlength=len(self.steps)
        ).astype(np.float64)

    def place(self, rows: pd.DataFrame) -> npt.NDArray[np.int32]:
        """Which of the steps each row is of; -1 for none of them."""
        return step_places(self.steps, rows["instance"], rows["step"])

    @cached_property
    def _stages(self) -> dict[int, Values]:
        """Of each step the self time of every stage, on one rank where several have it."""
        found: dict[int, Values] = {}
        place = self.place(self.segments)
        stages, times = self.segments["stage"].to_numpy(), self.segments["self_ns"].to_numpy()
        ranks = np.maximum(self.step("ranks_reported"), 1.0)
        for stage in _PER_STEP:
            mine = (stages == stage) & (place >= 0)
            if mine.any():
                total: Values = np.asarray(
                    np.bincount(place[mine], weights=times[mine], minlength=len(self.steps)), dtype=np.float64
                )
                found[stage] = total / ranks if stage >= BY_NAME["prepare"].id else total
        # What belongs to no step goes with the step that waited for it.
        found[_BETWEEN] = self._between
        began = self.done - self.period
        found[_GC] = self._waited_for(self.now_and_then("gc_pause"), began)
        return found

    @cached_property
    def _between(self) -> Values:
        return self._waited_for(self.now_and_then("between"))

    @cached_property
    def _now_and_then(self) -> pd.DataFrame:
        """Of what belongs to no step by itself, where it is inside a step as well."""
        named = self.segments["stage"].isin([_STARTUP, *(BY_NAME[name].id for name in NOW_AND_THEN)])
        rows = self.segments[named.to_numpy(dtype=bool)]
        return rows[~within_start_up(rows)]

    def now_and_then(self, *names: str) -> pd.DataFrame:
        """The segments of some stages of NOW_AND_THEN, after the start-up."""
        return self._now_and_then[self._now_and_then["stage"].isin([BY_NAME[name].id for name in names])]

    def _waited_for(self, rows: pd.DataFrame, since: Values | None = None) -> Values:
        """Time of rows without a step of their own, of processes that make steps, in the step that was held up.

        What began before `since` of that step held up nobody.
        """
        found = np.zeros(len(self.steps))
        if not len(rows) or not len(self.steps):
            return found
        working = self.segments.loc[
            self.segments["stage"].isin([_SCHEDULE, _RANK_STEP]), ["process", "instance"]
        ].dropna().drop_duplicates("process")  # fmt: skip
        rows = rows[["process", "begin_ns", "self_ns"]].merge(working, on="process")
        for instance, part in rows.groupby("instance"):
            mine = np.flatnonzero(self.steps["instance"].to_numpy() == instance)
            begins = part["begin_ns"].to_numpy()
            place = np.searchsorted(self.done[mine], begins, side="right")
            known = place < len(mine)
            if since is not None:
                known[known] = begins[known] >= since[mine[place[known]]]
            np.add.at(found, mine[place[known]], part["self_ns"].to_numpy(dtype=np.float64)[known])
        return found

    def stage(self, *names: str) -> Values:
        """Self time of stages in each step, together, never more than the step's own time."""
        return np.minimum(self.uncut(*names), self.period)

    def uncut(self, *names: str) -> Values:
        """The same as it was recorded."""
        none = np.zeros(len(self.steps))
        return sum((self._stages.get(BY_NAME[name].id, none) for name in names), none)

    def has(self, *names: str) -> bool:
        """Whether any of the stages was recorded in a step."""
        return any(bool(self.uncut(name).any()) for name in names)

    @cached_property
    def period(self) -> Values:
        """The time of each step that is its own, with the scheduler's work between the steps before it.

        The pause before a step in which there was no work is nobody's time.
        """
        begins, before = self.step("begin_ns"), self._shifted(self.step("end_ns"), 1)
        gap = np.where(np.isnan(before), 0.0, begins - before)
        return np.asarray(self.own + np.clip(np.minimum(gap, self._between), 0.0, None), dtype=np.float64)

    @cached_property
    def decode_only(self) -> Flags:
        """Steps of decode alone."""
        return (self.steps["phase"] == "decode").to_numpy(dtype=bool)

    @cached_property
    def usual_decode(self) -> Values:
        """What each step would have taken as a step of decode with the same requests, by a line through those."""
        size = self.step("decode_requests")
        fixed, each = line(size[self.decode_only], self.own[self.decode_only])
        return fixed + each * size

    @cached_property
    def cost(self) -> tuple[float, float]:
        """What a step takes whatever is in it, and what each token adds: a line through the steps."""
        return line(self.tokens, self.own)

    @cached_property
    def since_schedule(self) -> tuple[Values, Values]:
        """Begin of each step, and the time until the next one of its instance begins."""
        begins = self.step("begin_ns")
        following = self._shifted(begins, -1)
        ends = np.where(np.isnan(following), self.step("end_ns"), following)
        return begins, np.maximum(ends - begins, 0.0)

    # Examples

    def request_examples(self, times: Values, most: int = 3) -> tuple[Example, ...]:
        """The requests that lost the most."""
        times = np.nan_to_num(times)
        chosen = [int(row) for row in np.argsort(-times, kind="stable")[:most] if times[row] > 0]
        rows = self.requests
        return tuple(
            Example(
                "request",
                _name(rows["external_id"].iloc[row], rows["request_id"].iloc[row]),
                str(rows["trace_id"].iloc[row]),
                round(times[row]),
            )
            for row in chosen
        )

    def step_examples(self, times: Values, most: int = 3) -> tuple[Example, ...]:
        """The steps that lost the most."""
        times = np.nan_to_num(times)
        chosen = [int(row) for row in np.argsort(-times, kind="stable")[:most] if times[row] > 0]
        instances, numbers = self.steps["instance"].to_numpy(), self.steps["step"].to_numpy()
        return tuple(
            Example(
                "step",
                str(int(numbers[row])),
                step_trace_id(self.key, int(instances[row]), int(numbers[row])).hex(),
                round(times[row]),
            )
            for row in chosen
        )


def _name(*names: object) -> str:
    return next((name for name in names if isinstance(name, str) and name), "")


def line(x: Values, y: Values) -> tuple[float, float]:
    """Intercept and slope of a line through points, neither below 0; outliers at the upper end are left out.

    Without spread in x all of it is intercept.
    """
    if not len(x):
        return 0.0, 0.0
    usual = y <= np.percentile(y, 99)
    x, y = x[usual], y[usual]
    mean_x, mean_y = x.mean(), y.mean()
    spread = ((x - mean_x) ** 2).sum()
    slope = float(((x - mean_x) * (y - mean_y)).sum() / spread) if spread > 0 else 0.0
    slope = max(slope, 0.0)
    fixed = float(mean_y - slope * mean_x)
    if fixed < 0:
        squares = float((x * x).sum())
        return 0.0, float((x * y).sum()) / squares if squares else 0.0
    return fixed, slope
