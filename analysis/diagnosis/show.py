"""A diagnosis as tables and text for a terminal or a pipe, or as one JSON object (keys: docs/diagnosis.md)."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..show import Grid, Part, duration_text, number_text, plain, share_text
from .causes import Cause, Phase
from .finding import Evidence, Seen

if TYPE_CHECKING:
    from .diagnose import Diagnosis, Finding
    from .shares import Share

JSON_VERSION = 1
_LONGEST = 400


def parts(found: Diagnosis, everything: bool = False) -> list[Part]:
    """What is printed."""
    shown: list[Part] = [_head(found)]
    if found.answer:
        shown.append(plain(found.answer[:1].upper() + found.answer[1:], _LONGEST))
    else:
        shown.append(_ranking(found))
    for number, finding in enumerate(found.findings, 1):
        shown += _details(number, finding, found.engine)
    if everything and found.quiet:
        rows = [
            [name, each.phase.value, *_share(each.share), duration_text(each.measured_ns)]
            for name, each in sorted(found.quiet.items(), key=lambda item: -item[1].share.value)
        ]
        columns = ("cause", "phase", "share", "at least", "at most", "request time")
        shown.append(Grid("Looked at; does not stand out", columns, rows))
    if everything and found.absent:
        shown.append(f"Nothing of the kind in this session: {', '.join(found.absent)}.")
    if found.missing and (everything or found.findings or not found.answer.startswith("not enough")):
        shown.append(_missing(found))
    return shown


def _head(found: Diagnosis) -> Grid:
    rows = [
        ("session", plain(found.path)),
        ("engine", plain(f"{found.engine} {found.version}".strip()) or "-"),
        ("level", plain(found.level)),
        ("looked at", f"{found.requests} requests, {found.steps} complete steps"),
        ("request time", f"{duration_text(found.request_time_ns)}, of all requests from arrival to end"),
    ]
    for phase, each in found.attributed.items():
        if each.share is not None and phase is not Phase.THROUGHPUT:
            rows.append((phase.value, f"{duration_text(each.total_ns)} in all, {share_text(each.share)} attributed"))
    if found.last_s is not None:
        rows.append(("window", f"what ended in the last {duration_text(found.last_s * 1e9)}"))
    return Grid("stagetrace diagnose", ("", ""), rows, text=True)


def _share(share: Share) -> list[str]:
    return [share_text(share.value), share_text(share.low), share_text(share.high)]


def _ranking(found: Diagnosis) -> Grid:
    rows = [
        [
            f"{number}. {finding.cause.title}",
            finding.cause.id,
            f"{share_text(finding.seen.share.value)} of {finding.seen.phase.value}",
            f"{share_text(finding.seen.share.low)} to {share_text(finding.seen.share.high)}",
            duration_text(finding.seen.measured_ns),
            f"{duration_text(finding.seen.recoverable_ns)} ({share_text(finding.recoverable_share)})",
        ]
        for number, finding in enumerate(found.findings, 1)
    ]
    columns = ("finding", "cause", "share", "95 % interval", "request time", "recoverable at most")
    return Grid("What stands out, by recoverable time", columns, rows, text=True)


def _details(number: int, finding: Finding, engine: str) -> list[Part]:
    cause, seen = finding.cause, finding.seen
    rows = [(each.what, value_text(each)) for each in seen.evidence]
    rows.append((f"of {seen.phase.value} is attributed to stages and states at all", share_text(finding.attributed)))
    shown: list[Part] = [
        Grid(f"{number}. {cause.title[:1].upper()}{cause.title[1:]}: evidence", ("", ""), rows, text=True)
    ]
    text = f"It means: {cause.means}. It does not mean: {cause.does_not_mean}."
    if seen.note:
        text += f" {seen.note}"
    shown.append(text)
    if seen.examples:
        examples = [[each.kind, plain(each.name), each.trace_id, duration_text(each.ns)] for each in seen.examples]
        shown.append(Grid("To look at", ("", "name", "trace id", "of its time"), examples, text=True))
    tries = next_experiments(cause, engine)
    shown.append(Grid("Try next", ("", ""), tries, text=True))
    return shown


def next_experiments(cause: Cause, engine: str) -> list[tuple[str, str]]:
    """Flag and reason, for the engine that was recorded; of all where that is not known."""
    of_engine = cause.next.get(engine)
    chosen = {engine: of_engine} if of_engine is not None else dict(cause.next)
    return [
        (each.flag or "(no flag)", each.why if len(chosen) == 1 else f"{name}: {each.why}")
        for name, tries in chosen.items()
        for each in tries
    ]


def value_text(each: Evidence) -> str:
    """A number of evidence with its unit."""
    if each.unit == "ns":
        return duration_text(each.value)
    if each.unit == "share":
        return share_text(each.value)
    number = int(each.value) if float(each.value).is_integer() else float(each.value)
    return number_text(number) if each.unit in ("rank", "layer", "expert") else f"{number_text(number)} {each.unit}"


def _missing(found: Diagnosis) -> Grid:
    """By reason: that of several causes is often one."""
    reasons: dict[str, list[str]] = {}
    for name, each in found.missing.items():
        remedy = f": record with --level {each.level.name.lower()}" if each.level is not None else ""
        reasons.setdefault(plain(each.why, _LONGEST) + remedy, []).append(name)
    rows = [(", ".join(names), why) for why, names in reasons.items()]
    return Grid("Could not be looked at", ("", ""), rows, text=True)


# JSON


def to_json(found: Diagnosis) -> str:
    """The diagnosis as one JSON object; its keys are documented in docs/diagnosis.md."""
    return json.dumps(as_dict(found), indent=1)


def as_dict(found: Diagnosis) -> dict[str, Any]:
    """What to_json writes."""
    return {
        "version": JSON_VERSION,
        "session": {
            "path": found.path,
            "id": found.session,
            "engine": found.engine,
            "engine_version": found.version,
            "level": found.level,
            "last_s": found.last_s,
        },
        "requests": found.requests,
        "steps": found.steps,
        "request_time_ns": round(found.request_time_ns),
        "attributed": {
            phase.value: {"total_ns": round(each.total_ns), "share": each.share}
            for phase, each in found.attributed.items()
        },
        "answer": found.answer or None,
        "findings": [
            {
                "cause": finding.cause.id,
                "title": finding.cause.title,
                **_seen(finding.seen),
                "recoverable_share": finding.recoverable_share,
                "attributed": finding.attributed,
                "next": [{"flag": flag, "why": why} for flag, why in next_experiments(finding.cause, found.engine)],
            }
            for finding in found.findings
        ],
        "below_threshold": {name: _seen(each) for name, each in found.quiet.items()},
        "absent": list(found.absent),
        "not_looked_at": {
            name: {"why": each.why, "record_at": None if each.level is None else each.level.name.lower()}
            for name, each in found.missing.items()
        },
    }


def _seen(each: Seen) -> dict[str, Any]:
    return {
        "phase": each.phase.value,
        "share": asdict(each.share),
        "measured_ns": round(each.measured_ns),
        "recoverable_ns": round(each.recoverable_ns),
        "evidence": [asdict(one) for one in each.evidence],
        "examples": [asdict(one) for one in each.examples],
        "note": each.note or None,
    }
