"""What a cause, a threshold or a number of a finding means: for `diagnose --explain` and docs/diagnosis.md."""

from __future__ import annotations

import difflib

from ..definitions import UnknownName
from ..definitions import explained as number
from .causes import BY_ID
from .thresholds import THRESHOLDS

# Numbers of a finding: name, unit, meaning, and what it is not.
NUMBERS = (
    (
        "request_time",
        "ns",
        "time that requests spent: a step is shared, so that it counts once for each request that waited for it: for"
        " its next token, its chunk of prefill, or its turn; what happens to one request counts for that one",
        "time of the device or of a clock on the wall",
    ),
    (
        "share",
        "0 to 1",
        "the cause's part of all requests' time in the phase, and the 95 % interval of a bootstrap over blocks of"
        " consecutive requests or steps; its lower end has to reach the threshold, or the share itself where events are"
        " few and the time that they took is counted (prefill_delays_decode, compile_in_window)",
        "how it would be on another day: the interval knows this session alone",
    ),
    (
        "measured",
        "ns",
        "the cause's request time, in all the phases that it is a part of",
        "a part that excludes other causes: a request in a full queue behind slow steps waits for both",
    ),
    (
        "recoverable",
        "ns",
        "at most so much of the measured time could be saved: where some of it is usual, what is above that; of a"
        " queue, less what a batch of at most twice the size makes steps longer; of a token budget, the fixed cost of"
        " steps saved",
        "a promise: what takes its place is known only once it has been tried",
    ),
    (
        "attributed",
        "0 to 1",
        "how much of a phase's time is accounted for: of TTFT by requests' states, of TPOT by the stages of steps",
        "how much of it has a known cause",
    ),
)


def explained(name: str) -> str:
    """What is meant by a name; for `list` all of them. Raises UnknownName."""
    wanted = name.strip().lower().removesuffix("_ns")
    names = [*BY_ID, *(each.name for each in THRESHOLDS), *(each[0] for each in NUMBERS)]
    if wanted == "list":
        return "\n".join(dict.fromkeys(names))
    told = [_cause(wanted)] if wanted in BY_ID else []
    told += [
        f"{each.name} (threshold): {each.value:,g} {each.unit}\n  reason: {each.reason}"
        for each in THRESHOLDS
        if each.name == wanted
    ]
    told += [f"{key} ({unit}): {means}\n  not: {never}" for key, unit, means, never in NUMBERS if key == wanted]
    if told:
        return "\n\n".join(told)
    try:
        return number(name)  # of the report: stages and latencies are in the evidence
    except UnknownName:
        alike = difflib.get_close_matches(wanted, names, 5, 0.5)
        hint = f"did you mean {', '.join(alike)}?" if alike else "`--explain list` names all"
        raise UnknownName(f"{name!r} is neither a cause nor a number that is known here: {hint}") from None


def _cause(name: str) -> str:
    cause = BY_ID[name]
    lines = [
        f"{cause.id}: {cause.title}",
        f"  means: {cause.means}",
        f"  not: {cause.does_not_mean}",
        f"  part of: {' or '.join(each.value for each in cause.phases)}",
        f"  recorded from level: {cause.level.name.lower()}",
    ]
    for engine, tries in cause.next.items():
        lines += [f"  try with {engine}: {each.flag or '(no flag)'}: {each.why}" for each in tries]
    return "\n".join(lines)
