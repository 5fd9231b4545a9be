"""The metrics that sessions are compared by: their names, units, and which direction is better. Closed, so that a
condition can be checked before a session is read."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from enum import StrEnum

from stagetrace.instrument.stages import STAGES, Kind, Phase

from ..breakdown import STATES
from ..latency_parts import PARTS


class Unit(StrEnum):
    """What a metric is measured in."""

    TIME = "ns"
    RATE = "1/s"
    SHARE = "share"
    COUNT = "1"


class Better(StrEnum):
    """Which direction users want."""

    LOWER = "lower"
    HIGHER = "higher"
    NEITHER = "neither"


class Group(StrEnum):
    """Under which heading a metric is shown."""

    LATENCIES = "Latencies and rates"
    PARTS = "Where end-to-end latency went, mean of a request"
    STEPS = "Steps"
    STAGES = "Stages, self time for each complete step, all ranks together"


@dataclass(frozen=True)
class Metric:
    """One number of a session. `of` names the values or the ratio that it is taken from, `percentile` how."""

    name: str
    of: str
    unit: Unit
    better: Better
    group: Group
    percentile: int | None = None  # None: a ratio of sums, such as a mean


PERCENTILES = (50, 95, 99)
VALUES = ("ttft", "ttft_client", "e2e", "e2e_client", "tpot", "itl", *(f"itl_{phase.value}" for phase in Phase))
STATE_TIMES = tuple(name for name in STATES if name != "grammar")
STEP_TIMES = tuple(f"step_{phase.value}" for phase in Phase)
RATES = ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s")
RATIOS = {
    "cached_share": (Unit.SHARE, Better.HIGHER, Group.LATENCIES),
    "preemptions_per_request": (Unit.COUNT, Better.LOWER, Group.LATENCIES),
    "batch_mean": (Unit.COUNT, Better.NEITHER, Group.STEPS),
    "decode_batch_mean": (Unit.COUNT, Better.NEITHER, Group.STEPS),
    "waiting_mean": (Unit.COUNT, Better.LOWER, Group.STEPS),
    "kv_usage_mean": (Unit.SHARE, Better.NEITHER, Group.STEPS),
    "unattributed_share": (Unit.SHARE, Better.NEITHER, Group.STEPS),
}
TIMED_STAGES = tuple(stage.name for stage in STAGES if stage.kind in (Kind.SEGMENT, Kind.OCCASION))


def _distributed(name: str, group: Group) -> list[Metric]:
    mean = Metric(f"{name}_mean", name, Unit.TIME, Better.LOWER, group)
    return [mean, *(Metric(f"{name}_p{p}", name, Unit.TIME, Better.LOWER, group, p) for p in PERCENTILES)]


METRICS: tuple[Metric, ...] = (
    *(metric for name in (*VALUES, *STATE_TIMES) for metric in _distributed(name, Group.LATENCIES)),
    *(Metric(name, name, Unit.RATE, Better.HIGHER, Group.LATENCIES) for name in RATES),
    *(Metric(name, name, *what) for name, what in RATIOS.items()),
    *(Metric(f"part_{name}", f"part_{name}", Unit.TIME, Better.LOWER, Group.PARTS) for name in PARTS),
    *(metric for name in STEP_TIMES for metric in _distributed(name, Group.STEPS)),
    *(Metric(f"stage_{name}", f"stage_{name}", Unit.TIME, Better.LOWER, Group.STAGES) for name in TIMED_STAGES),
)
BY_NAME = {metric.name: metric for metric in METRICS}


def metric_named(name: str) -> Metric:
    """The metric with this name. Raises ValueError, which names those that are like it."""
    if name in BY_NAME:
        return BY_NAME[name]
    alike = difflib.get_close_matches(name, BY_NAME, 5, 0.5)
    of_it = [metric.name for metric in METRICS if metric.of in (name, f"stage_{name}", f"part_{name}")]
    if of_it:
        raise ValueError(f"{name!r} is not a metric; there are {', '.join(of_it)}")
    known = f"did you mean {', '.join(alike)}?" if alike else ""
    some = ", ".join(("ttft_p95", "tpot_p95", "itl_p99", "e2e_mean", *RATES, "step_decode_p50", "stage_forward"))
    raise ValueError(
        f"{name!r} is not a metric{': ' + known if known else ''} (such as {some}; `--explain list` names all)"
    )
