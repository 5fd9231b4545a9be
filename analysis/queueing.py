"""Why requests waited in the scheduler's queue: what kept each step from taking another request in.

For engines that do not record it themselves (latency_parts.py takes what is recorded where it is): it follows from what
each step's record says of its batch, and from the limits that the process recorded at its start.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .activity import Pieces

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stagetrace.exporters.session import Process

    from .activity import Times

# The columns of steps that this needs.
COLUMNS = [
    *("instance", "scheduled_ns", "end_ns", "prefill_tokens", "decode_tokens", "prefill_context", "decode_context"),
    *("waiting", "running", "kv_usage", "preempted"),
]
FULL_PPM = 950_000  # KV usage from which a request that is not taken in is said to wait for space
_ALL_PPM = 1_000_000
_LEAST_PPM = 20_000  # usage from which the size of the cache can be estimated


class Wait(IntEnum):
    """What a request in the queue waits for."""

    NEXT_STEP = 0  # the scheduler has not looked at the queue since it came
    GRAMMAR = 1
    KV_SPACE = 2
    BATCH_FULL = 3
    TOKEN_BUDGET = 4
    OTHER = 5  # a step left it waiting, and none of the above was the reason, as far as the records say


def waits(steps: pd.DataFrame, processes: Sequence[Process], prompt_tokens: float | None) -> dict[int, Pieces]:
    """For each engine instance, what kept requests waiting from the end of one schedule to that of the next.

    `steps` with COLUMNS; `prompt_tokens`: of a typical request, to tell whether another one had found room.
    """
    found = {}
    for instance, part in steps.groupby("instance", sort=True):
        own = part.sort_values("scheduled_ns", kind="stable")
        causes = step_causes(own, _limits(processes, int(str(instance))), prompt_tokens)
        last = max(int(own["end_ns"].max()), int(own["scheduled_ns"].iloc[-1]))
        bounds = np.concatenate([own["scheduled_ns"].to_numpy(np.int64), [last]])
        found[int(str(instance))] = Pieces.of(bounds, causes, len(Wait), Wait.OTHER)
    return found


def causes_of_steps(steps: pd.DataFrame, processes: Sequence[Process], prompt_tokens: float | None) -> np.ndarray:
    """What kept each step of whatever instance from taking one more request in (Wait), in the order of `steps`."""
    found = np.full(len(steps), Wait.OTHER, np.int8)
    of = steps["instance"].to_numpy(np.int64)
    for instance in np.unique(of):
        mine = of == instance
        found[mine] = step_causes(steps[mine], _limits(processes, int(instance)), prompt_tokens)
    return found


def step_causes(steps: pd.DataFrame, limits: Mapping[str, int], prompt_tokens: float | None) -> np.ndarray:
    """For each step, what kept it from taking one more request in (Wait), whether one waited or not."""
    kv_usage = steps["kv_usage"].to_numpy(float)
    prefill = steps["prefill_tokens"].to_numpy(np.int64)
    tokens = prefill + steps["decode_tokens"].to_numpy(np.int64)
    causes = np.full(len(steps), Wait.OTHER, np.int8)
    causes[kv_usage + _room_needed(steps, prompt_tokens) >= FULL_PPM] = Wait.KV_SPACE
    if limits.get("max_num_batched_tokens", 0) > 0:
        causes[tokens >= limits["max_num_batched_tokens"]] = Wait.TOKEN_BUDGET
    if limits.get("chunked_prefill_size", 0) > 0:
        causes[(prefill > 0) & (tokens >= limits["chunked_prefill_size"])] = Wait.TOKEN_BUDGET
    if limits.get("max_num_seqs", 0) > 0:
        causes[steps["running"].to_numpy(np.int64) >= limits["max_num_seqs"]] = Wait.BATCH_FULL
    causes[steps["preempted"].to_numpy(np.int64) > 0] = Wait.KV_SPACE  # nothing is taken in while others are thrown out
    return causes


def _room_needed(steps: pd.DataFrame, prompt_tokens: float | None) -> float:
    """The share of the KV cache that a typical prompt needs, in millionths, by what the running contexts take of it."""
    usage = steps["kv_usage"].to_numpy(float)
    context = (steps["prefill_context"] + steps["decode_context"]).to_numpy(float)
    telling = (usage >= _LEAST_PPM) & (context > 0)
    if prompt_tokens is None or not telling.any():
        return 0.0
    return float(min(prompt_tokens * np.median(usage[telling] / context[telling]), _ALL_PPM / 2))


def _limits(processes: Sequence[Process], instance: int) -> dict[str, int]:
    """The scheduler's limits as the instance's process said, or any other's where it said nothing; 0 for none."""
    names = ("max_num_seqs", "max_num_batched_tokens", "chunked_prefill_size")
    telling = [process.info for process in processes if any(name in process.info for name in names)]
    own = [info for info in telling if info.get("instance") == instance] or telling
    values = {name: own[0].get(name, 0) for name in names} if own else {}
    return {name: value for name, value in values.items() if isinstance(value, int) and not isinstance(value, bool)}


def split_queue(
    pieces: Mapping[int, Pieces], instance: pd.Series, begin: Times, end: Times, grammar: np.ndarray
) -> Times:
    """Each stretch in the queue by what was waited for, kinds (Wait) x stretches.

    Until the next schedule ends nobody could have taken the request in. `grammar`: which stretches the engine says were
    for a grammar.
    """
    found = np.zeros((len(Wait), len(begin)), np.int64)
    found[Wait.OTHER] = end - begin
    of = instance.fillna(0).to_numpy(np.int64)
    for each, own in pieces.items():
        chosen = np.flatnonzero(of == each)
        place = np.searchsorted(own.bounds, begin[chosen], side="left")
        looked = np.where(place < len(own.bounds), own.bounds[np.minimum(place, len(own.bounds) - 1)], end[chosen])
        looked = np.minimum(looked, end[chosen])
        split = own.within(looked, end[chosen])
        split[Wait.NEXT_STEP] += looked - begin[chosen]
        found[:, chosen] = split
    found[:, grammar] = 0
    found[Wait.GRAMMAR, grammar] = (end - begin)[grammar]
    return found
