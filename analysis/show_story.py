"""How one request's story is shown: tables for a terminal or a pipe, or one JSON object."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .load import load
from .show import MISSING, Grid, Part, duration_text, number_text, plain, print_parts, share_text
from .story import COLUMNS, Company, Passage, Story, find_request, story

if TYPE_CHECKING:
    from rich.console import Console

    from stagetrace.exporters.session import Session

JSON_VERSION = 1
MOST_CHUNKS = 20  # that are shown; the JSON object has all


def tell(session: Session, wanted: str, last_s: float | None = None) -> Story:
    """The story of the request that `wanted` names. Raises NoSuchRequest and SessionError."""
    frames = load(session, last_s, COLUMNS)
    requests = frames["requests"]
    row = find_request(requests, wanted)
    return story(row, requests, frames["states"], frames["members"], frames["steps"], frames.manifest.processes)


def to_json(told: Story) -> str:
    """The story as one JSON object; its keys are documented in docs/numbers.md."""
    return json.dumps(as_dict(told), indent=1)


def as_dict(told: Story) -> dict[str, Any]:
    """What to_json writes."""
    found: dict[str, Any] = {"version": JSON_VERSION, **asdict(told)}
    for standing in found["standings"]:
        for name in ("p50_ns", "p95_ns", "p99_ns"):
            standing[name] = None if standing[name] is None else round(standing[name])
    return found


def print_story(told: Story, console: Console) -> None:
    """Prints the story."""
    print_parts(parts(told), console)


def parts(told: Story) -> list[Part]:
    """What is shown, in order. All strings are safe to show."""
    return [_header(told), _standings(told), _timeline(told), *_chunks(told)]


def _header(told: Story) -> Grid:
    facts = {name: value for name, value in told.facts.items() if not name.endswith("_ns")}
    times = {name: value for name, value in told.facts.items() if name.endswith("_ns")}
    ended = told.status if told.finish in ("", "unknown") else f"{told.status} ({told.finish})"
    rows = [
        ("request id", plain(told.request_id) or MISSING),
        ("client's id", plain(told.external_id) or MISSING),
        ("trace id", plain(told.trace_id) or MISSING),
        ("ended", ended + (", partial: recording was switched, or its beginning was not recorded" * told.partial)),
        *((name.replace("_", " "), plain(str(value))) for name, value in facts.items()),
        *(
            (name.removesuffix("_ns").replace("_", " "), f"after {duration_text(int(at))}")
            for name, at in times.items()
        ),
    ]
    return Grid("stagetrace report, one request", ("", ""), rows, text=True)


def _standings(told: Story) -> Grid:
    rows = [
        [
            each.latency,
            duration_text(each.value_ns),
            share_text(each.rank_share),
            *(duration_text(time) for time in (each.p50_ns, each.p95_ns, each.p99_ns)),
        ]
        for each in told.standings
    ]
    title = f"Its latencies beside the session's {told.measured} measured requests"
    return Grid(title, ("", "this request", "slower than", "p50", "p95", "p99"), rows)


def _timeline(told: Story) -> Grid:
    rows: list[list[str]] = []
    for passage in told.passages:
        rows.append(
            [passage.state, duration_text(passage.begin_ns), duration_text(passage.duration_ns), _notes(passage)]
        )
        rows += [
            ["", "", duration_text(amount), name]
            for name, amount in passage.parts.items()
            if len(passage.parts) > 1 or name.startswith("queue")
        ]
        if passage.company is not None:
            rows += [["", "", "", line] for line in _company(passage.company)]
    return Grid("Timeline", ("state", "begins after", "for", ""), rows, text=True)


def _notes(passage: Passage) -> str:
    shown = []
    for name, value in passage.notes.items():
        if name == "kv_usage_ppm":
            shown.append(f"KV usage {share_text(int(value) / 1e6)}")
        elif value or name in ("step", "waiting", "running"):
            shown.append(f"{name.replace('_', ' ')} {plain(str(value))}")
    return ", ".join(shown)


def _company(company: Company) -> list[str]:
    if not company.steps:
        return ["no step of it is known"]
    kinds = ", ".join(f"{count} {phase}" for phase, count in company.by_phase.items())
    lines = [f"in {company.steps} steps ({kinds}) with {number_text(company.others)} other requests on average"]
    if company.others_prefill_tokens:
        lines.append(f"{company.others_prefill_tokens} prefill tokens of others in these steps")
    if company.steps_without:
        lines.append(f"{company.steps_without} steps ended meanwhile without it")
    if company.longest_ns is not None and company.steps > 1:
        lines.append(f"the longest interval between two of its steps {duration_text(company.longest_ns)}")
    return lines


def _chunks(told: Story) -> list[Part]:
    chunks = [chunk for passage in told.passages for chunk in passage.chunks]
    if not chunks:
        return []
    rows = [
        [
            MISSING if chunk.step is None else str(chunk.step),
            duration_text(chunk.begin_ns),
            duration_text(chunk.duration_ns),
            str(chunk.tokens),
            str(chunk.context),
            MISSING if chunk.others is None else str(chunk.others),
            MISSING if chunk.others_prefill_tokens is None else str(chunk.others_prefill_tokens),
        ]
        for chunk in chunks[:MOST_CHUNKS]
    ]
    more = f", the first {MOST_CHUNKS} of {len(chunks)}" if len(chunks) > MOST_CHUNKS else ""
    columns = ("step", "begins after", "step took", "tokens", "context", "other requests", "others' prefill tokens")
    return [Grid(f"Chunks of its prefill{more}", columns, rows)]
