"""The same model and load on both engines, stage by stage: one comparison of two sessions.

    make quickstart && make quickstart ENGINE=sglang
    .venv/bin/python examples/quickstart/compare.py                 the newest session of each engine
    .venv/bin/python examples/quickstart/compare.py SESSION SESSION

The engines share the vocabulary, not the way they work: with one a stage may hold what another stage of the other does
(docs/stages.md says what each means), or what waits in one overlaps work in the other. vLLM's rank has a process of its
own, for which its scheduler waits in `execute`; SGLang's rank works inside its scheduler's `execute`, which is then
short. So the times of a stage are comparable, and their sum is not a time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from stagetrace.analysis.report import Summary, summarise
from stagetrace.analysis.show import MISSING, Grid, duration_text, number_text, plain, print_parts, share_text
from stagetrace.exporters.session import Session, SessionError
from stagetrace.instrument.stages import STAGES, Phase

if TYPE_CHECKING:
    from collections.abc import Sequence

SESSIONS = Path("stagetrace-sessions")  # where `stagetrace run` puts them
LATENCIES = ("ttft", "ttft_client", "e2e", "e2e_client", "tpot", "itl")
STATES = ("tokenize", "dispatch", "queue", "prefill", "decode", "preempted", "output")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare two sessions of the same load, stage by stage.")
    parser.add_argument("sessions", nargs="*", type=Path, help=f"two of them; by default the newest in {SESSIONS}/")
    arguments = parser.parse_args()
    if len(arguments.sessions) not in (0, 2):
        parser.error("name two sessions, or none")
    try:
        one, other = [summarise(Session.open(path)) for path in arguments.sessions] or newest_of_each_engine()
    except (SessionError, LookupError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    print_parts(comparison(one, other), Console(highlight=False, soft_wrap=True))
    return 0


def newest_of_each_engine() -> list[Summary]:
    """The newest sessions of two engines. Raises LookupError."""
    found: dict[str, Summary] = {}
    for path in sorted(SESSIONS.glob("*/"), reverse=True):
        try:
            summary = summarise(Session.open(path))
        except SessionError:
            continue
        if summary.requests.measured:
            found.setdefault(engine_of(summary), summary)
        if len(found) == 2:
            return [found[name] for name in sorted(found, reverse=True)]
    raise LookupError(f"there are no sessions of two engines in {SESSIONS}/: run the quickstart with each, as above")


def engine_of(summary: Summary) -> str:
    """The name of a session's engine."""
    return next((plain(engine.name) for engine in summary.engines if engine.name), MISSING)


def comparison(one: Summary, other: Summary) -> list[Grid]:
    """The tables of two sessions side by side; the last column is the second's number over the first's. Pure."""
    names = [_title(one), _title(other)]
    columns = ["", *names, "second / first"]
    return [
        Grid("What ran", ["", *names], _what_ran(one, other)),
        Grid("Requests: median", columns, _times(one, other, "p50")),
        Grid("Requests: 95th percentile", columns, _times(one, other, "p95")),
        Grid("Steps: median", columns, _steps(one, other)),
        Grid("Stages: self time per output token", columns, _stages(one, other)),
    ]


def _title(summary: Summary) -> str:
    version = next((plain(engine.version) for engine in summary.engines if engine.version), "")
    return f"{engine_of(summary)} {version}".strip()


def _what_ran(one: Summary, other: Summary) -> list[list[str]]:
    def column(summary: Summary) -> list[str]:
        requests, rates = summary.requests, summary.requests.rates
        model = next((plain(engine.model) for engine in summary.engines if engine.model), MISSING)
        found = (requests.measured, requests.prompt_tokens, requests.cached_tokens, requests.output_tokens)
        return [
            *(plain(summary.path), model),
            *map(number_text, found),
            number_text(rates.output_tokens),
            number_text(summary.steps.count),
            share_text(_unattributed(summary)),
        ]

    names = ["session", "model", "requests", "prompt tokens", "of them cached", "output tokens"]
    names += ["output tokens/s", "steps", "step time unattributed"]
    return [list(row) for row in zip(names, column(one), column(other), strict=True)]


def _unattributed(summary: Summary) -> float | None:
    return next((one.unattributed.share for one in summary.stages.timelines if one.of == "step"), None)


def _times(one: Summary, other: Summary, percentile: str) -> list[list[str]]:
    rows = []
    for name in (*LATENCIES, *STATES):
        pair = [getattr(summary.requests.latencies[name], percentile) for summary in (one, other)]
        if any(value is not None for value in pair):
            rows.append([name, *_pair(pair)])
    return rows


def _steps(one: Summary, other: Summary) -> list[list[str]]:
    rows = []
    for phase in Phase:
        kinds = [summary.steps.kinds.get(phase.value) for summary in (one, other)]
        if any(kinds):
            rows.append([f"{phase.value} steps", *_pair([kind.duration.p50 if kind else None for kind in kinds])])
            numbers = [number_text(kind.tokens) if kind else MISSING for kind in kinds]
            rows.append([f"tokens in a {phase.value} step", *numbers, ""])
    return rows


def _stages(one: Summary, other: Summary) -> list[list[str]]:
    """Every stage that either engine has, in the vocabulary's order; all ranks and processes together."""
    each = [_per_output_token(summary) for summary in (one, other)]
    rows = []
    for stage in STAGES:
        pair = [times.get(stage.name) for times in each]
        if any(value is not None for value in pair):
            rows.append([stage.name, *_pair(pair)])
    return rows


def _per_output_token(summary: Summary) -> dict[str, float]:
    tokens = summary.requests.output_tokens
    found: dict[str, float] = {}
    if tokens:
        for timeline in summary.stages.timelines:
            for stage in timeline.stages:
                found[stage.stage] = found.get(stage.stage, 0.0) + stage.self_ns / tokens
    return found


def _pair(values: Sequence[float | None]) -> list[str]:
    first, second = values
    ratio = f"{second / first:.2f}" if first and second is not None else MISSING
    return [duration_text(first), duration_text(second), ratio]


if __name__ == "__main__":
    sys.exit(main())
