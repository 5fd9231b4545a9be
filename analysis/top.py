"""What `stagetrace top` shows: the last seconds of a session as one view, drawn in lines, or as one JSON object.

docs/numbers.md says what each number means and documents the keys of the JSON object.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.text import Text

from stagetrace.exporters.session import Export, Manifest, Process
from stagetrace.instrument.levels import LEVEL_FILE, session_level
from stagetrace.instrument.stages import Level, Phase

from .breakdown import (
    COLUMNS,
    Distribution,
    Health,
    Requests,
    Steps,
    TimelineBreakdown,
    health,
    request_breakdown,
    stage_breakdown,
    step_breakdown,
)
from .load import NEWEST, load, read, windowed
from .show import MISSING, duration_text, encodable, number_text, plain, share_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

    from stagetrace.exporters.session import Session

    from .load import Frames

JSON_VERSION = 1
NARROWEST = 80
STALE_NS = 10_000_000_000  # a collector that has not written for so long has stopped
# The collector commits every two seconds at least, and writes a request at the second commit after its end.
_COMMIT_NS = 2_000_000_000
_SETTLE_NS = 2 * _COMMIT_NS
_SHOWN_LATENCIES = ("ttft", "tpot", "itl")
_RINGS = ("control", "detail")
_LABEL = 11  # cells of a line's first word
_HOUR_NS = 3600 * 10**9

_STARTING = (
    "No collector has written to this session yet. What to do: wait, if it was just started; else"
    " `stagetrace collect {path}`."
)
_STALE = (
    "The collector has not written for {age}; this is the last that it saw. What to do: see its log"
    " ({path}/collector.log under `stagetrace run`); if it has ended, `stagetrace collect {path}` goes on with it."
)
_NO_PROCESS = "No process records into this session yet. What to do: wait, or ask `stagetrace report {path}`."
_ALL_ENDED = "Every process that recorded into this session has ended."
_OFF = "Recording is off. What to do: `stagetrace ctl arm --session {path}` switches it on."


class State(StrEnum):
    """What a session's collector does."""

    STARTING = "starting"
    RECORDING = "recording"
    STALE = "stale"
    ENDED = "ended"


@dataclass(frozen=True)
class Cursors:
    """How far the collector had read every ring (control, detail; by the ring's name), and when (wall clock)."""

    wall_ns: int
    slots: Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Beside:
    """What is known of a session beside its manifest and the window of its tables."""

    level: str | None = None  # that it was switched to, None when it was not
    newest_steps: pd.DataFrame | None = None  # the last that are known, for when there is none in the window
    before: Cursors | None = None  # at the beginning of the window, None where the session is younger
    after: Cursors | None = None  # at its end, None when nothing was written in it
    exports: Sequence[Export] = ()


@dataclass(frozen=True)
class RingFill:
    """One ring of a living process, and how long it takes to fill at the rate at which it was written last."""

    process: int  # the process's key
    role: str
    pid: int
    ring: str
    slots: int | None  # None when the collector did not say
    per_s: float  # slots written
    holds_ns: float | None  # None when the size is not known or nothing was written


@dataclass(frozen=True)
class Batch:
    """What the scheduler had in hand at its last step, all schedulers together."""

    running: int
    waiting: int
    kv_usage: float  # 0 to 1, the highest of all schedulers
    age_ns: int  # since the end of the step
    idle: bool  # no step ended in the window


@dataclass(frozen=True)
class Tokens:
    """Tokens per second. Prompt tokens are those computed; cached ones come on top."""

    of: str  # steps; requests where no step is recorded
    prompt: float | None
    cached: float | None
    output: float | None
    unknown: int  # steps whose output tokens are not known


@dataclass(frozen=True)
class View:
    """Everything that is shown of a session's last seconds."""

    path: str
    session: str
    state: State
    age_ns: int | None  # since the collector wrote last
    duration_ns: int | None
    engines: list[str]
    level: str  # recorded at now
    host: str
    alive: int  # processes
    window_s: float  # asked for
    steps_ns: int  # of it that the session covers
    requests_ns: int  # the same, for the window of the requests
    message: str | None
    batch: Batch | None  # None before the first step
    waiting_peak: int | None  # in the window, and so are those below
    kv_peak: float | None
    preempted: int
    requests: Requests
    tokens: Tokens
    steps: Steps
    timelines: list[TimelineBreakdown]
    rings: list[RingFill]
    health: Health


# The view


def look(session: Session, window_s: float, now_ns: int) -> View:
    """The last `window_s` seconds of a session as it is on disk; `now_ns` is the wall clock. Raises SessionError."""
    frames = load(session, window_s + _SETTLE_NS / 1e9, COLUMNS | {"requests": None, "steps": None})
    before, after = _cursors(session, frames.manifest.updated_ns - round(window_s * 1e9))
    switched = session_level(session.path).name.lower() if (session.path / LEVEL_FILE).exists() else None
    exports = tuple(session.read_exports().values())
    beside = Beside(switched, read(session, "steps", None, NEWEST), before, after, exports)
    return view(frames, beside, str(session.path), window_s, now_ns)


def view(frames: Frames, beside: Beside, path: str, window_s: float, now_ns: int) -> View:
    """The view of frames that hold `window_s` seconds and, before them, those in which a request settles."""
    manifest = frames.manifest
    window, until = round(window_s * 1e9), frames.until_ns or 0
    settled = until if manifest.complete else until - _SETTLE_NS
    recent = windowed(frames.tables, until - window)
    steps = recent["steps"]
    ends = frames["requests"]["end_ns"]
    requests = frames["requests"][(ends > settled - window) & (ends <= settled)]
    level = beside.level or manifest.level
    steps_ns, requests_ns = (max(min(window, end - _started(manifest)), 0) for end in (until, settled))
    state = _state(manifest, now_ns)
    counted = request_breakdown(requests, recent["intervals"], steps)
    by_request = level == Level.REQUEST.name.lower()
    return View(
        path=path,
        session=manifest.session,
        state=state,
        age_ns=max(now_ns - manifest.updated_ns, 0) if manifest.updated_ns else None,
        duration_ns=max(manifest.updated_ns - manifest.started_ns, 0) if manifest.started_ns else None,
        engines=_engines(manifest),
        level=level,
        host=manifest.host,
        alive=sum(not process.ended for process in manifest.processes),
        window_s=window_s,
        steps_ns=steps_ns,
        requests_ns=requests_ns,
        message=_message(manifest, state, level, path, now_ns),
        batch=_batch(manifest, steps if len(steps) else beside.newest_steps, now_ns, idle=not len(steps)),
        waiting_peak=int(steps["waiting"].max()) if len(steps) else None,
        kv_peak=int(steps["kv_usage"].max()) / 1e6 if len(steps) else None,
        preempted=int(steps["preempted"].sum()),
        requests=counted,
        tokens=_tokens_of_requests(counted, requests_ns) if by_request else _tokens_of_steps(steps, steps_ns),
        steps=step_breakdown(steps),
        # Without the requests: those that ended in the window began before it, and would stretch the observed time.
        timelines=stage_breakdown(requests[:0], steps, recent["segments"], None).timelines,
        rings=_fills(manifest, beside),
        health=health(manifest, beside.exports),
    )


def per_second(count: float, length_ns: int) -> float | None:
    """A rate; None over no time."""
    return count * 1e9 / length_ns if length_ns > 0 else None


def _state(manifest: Manifest, now_ns: int) -> State:
    if not manifest.started_ns:
        return State.STARTING
    if manifest.complete:
        return State.ENDED
    return State.STALE if now_ns - manifest.updated_ns > STALE_NS else State.RECORDING


def _message(manifest: Manifest, state: State, level: str, path: str, now_ns: int) -> str | None:
    """What is out of the ordinary and what to do about it, the gravest first."""
    place = plain(path)
    if state is State.STARTING:
        return _STARTING.format(path=place)
    if state is State.STALE:
        return _STALE.format(path=place, age=duration_text(now_ns - manifest.updated_ns))
    if state is State.ENDED:
        return None
    if not manifest.processes:
        return _NO_PROCESS.format(path=place)
    if all(process.ended for process in manifest.processes):
        return _ALL_ENDED
    return _OFF.format(path=place) if level == Level.OFF.name.lower() else None


def _engines(manifest: Manifest) -> list[str]:
    keys = ("engine", "engine_version", "model")
    names = (" ".join(filter(None, (str(each.info.get(key, "")) for key in keys))) for each in manifest.processes)
    whole = [*dict.fromkeys(filter(None, names))]
    # A process that does not know its model names the engine alone.
    return [name for name in whole if not any(other.startswith(f"{name} ") for other in whole)]


def _started(manifest: Manifest) -> int:
    """When the session began, on the monotonic clock; 0 when that is not known."""
    if not manifest.anchors:
        return 0
    monotonic, wall = manifest.anchors[0]
    return monotonic + manifest.started_ns - wall


def _wall(manifest: Manifest, monotonic_ns: int) -> int:
    monotonic, wall = manifest.anchors[-1] if manifest.anchors else (0, 0)
    return wall + monotonic_ns - monotonic


def _batch(manifest: Manifest, steps: pd.DataFrame | None, now_ns: int, idle: bool) -> Batch | None:
    """What the last step of every scheduler says; None when there is no step."""
    if steps is None:
        return None
    ended = [process.key for process in manifest.processes if process.ended]
    if not manifest.complete:  # what an ended process was doing it does no longer
        steps = steps[~steps["process"].isin(ended)]
    if not len(steps):
        return None
    last = steps.sort_values("end_ns").drop_duplicates("instance", keep="last")
    return Batch(
        running=int(last["running"].sum()),
        waiting=int(last["waiting"].sum()),
        kv_usage=int(last["kv_usage"].max()) / 1e6,
        age_ns=max(now_ns - _wall(manifest, int(last["end_ns"].max())), 0),
        idle=idle,
    )


def _tokens_of_steps(steps: pd.DataFrame, length_ns: int) -> Tokens:
    return Tokens(
        of="steps",
        prompt=per_second(int(steps["prefill_tokens"].sum()), length_ns),
        cached=per_second(int(steps["cached_tokens"].sum()), length_ns),
        output=per_second(int(steps["output_tokens"].sum()), length_ns),
        unknown=int(steps["output_tokens"].isna().sum()),
    )


def _tokens_of_requests(requests: Requests, length_ns: int) -> Tokens:
    computed = requests.prompt_tokens - requests.cached_tokens
    return Tokens(
        of="requests",
        prompt=per_second(computed, length_ns),
        cached=per_second(requests.cached_tokens, length_ns),
        output=per_second(requests.output_tokens, length_ns),
        unknown=0,
    )


# Rings


def _cursors(session: Session, since_ns: int) -> tuple[Cursors | None, Cursors | None]:
    """The cursors of the last commit of raw records up to `since_ns` (wall), and of the last one after it."""
    after = None
    for part in reversed(session.raw_parts()):
        for commit in reversed(session.read_commits(part)):
            if not commit.rings:
                continue
            slots = {name: mark.cursors for name, mark in commit.rings.items()}
            if (
                commit.wall_ns <= since_ns
            ):  # what was read after it was so shortly before the next commit at the earliest
                return Cursors(max(commit.wall_ns, since_ns - _COMMIT_NS), slots), after
            after = after or Cursors(commit.wall_ns, slots)
    return None, after


def _fills(manifest: Manifest, beside: Beside) -> list[RingFill]:
    """The rings of the living processes, those that fill fastest first."""
    slots = {(loss.process, loss.ring): loss.slots for loss in manifest.losses}
    fills = []
    for process in manifest.processes:
        if process.ended:
            continue
        for ring, per_s in zip(_RINGS, _rates(manifest, process, beside), strict=True):
            size = slots.get((process.key, ring)) or None
            holds = size * 1e9 / per_s if size and per_s else None
            fills.append(RingFill(process.key, process.role, process.pid, ring, size, per_s, holds))
    return sorted(fills, key=lambda fill: float("inf") if fill.holds_ns is None else fill.holds_ns)


def _rates(manifest: Manifest, process: Process, beside: Beside) -> list[float]:
    """Slots that a process wrote per second: control, detail."""
    if beside.after is None:
        return [0.0 for _ in _RINGS]
    begin = _wall(manifest, process.started_ns)
    before: Sequence[int] = [0 for _ in _RINGS]
    if beside.before is not None:
        begin = max(begin, beside.before.wall_ns)
        before = beside.before.slots.get(process.ring, before)
    after = beside.after.slots.get(process.ring, before)
    length = beside.after.wall_ns - begin
    return [per_second(last - first, length) or 0.0 for first, last in zip(before, after, strict=True)]


# JSON


def to_json(shown: View) -> str:
    """The view as one JSON object; its keys are documented in docs/numbers.md. Strings are as they were recorded."""
    return json.dumps(as_dict(shown), indent=1)


def as_dict(shown: View) -> dict[str, Any]:
    """What to_json writes."""
    requests, batch, state = shown.requests, shown.batch, shown.health
    return {
        "version": JSON_VERSION,
        "session": {
            "path": shown.path,
            "id": shown.session,
            "state": shown.state.value,
            "age_ns": shown.age_ns,
            "duration_ns": shown.duration_ns,
            "engines": shown.engines,
            "level": shown.level,
            "host": shown.host,
            "processes_alive": shown.alive,
        },
        "message": shown.message,
        "window": {"asked_s": shown.window_s, "steps_ns": shown.steps_ns, "requests_ns": shown.requests_ns},
        "batch": batch and vars(batch),
        "waiting_peak": shown.waiting_peak,
        "kv_usage_peak": shown.kv_peak,
        "preempted": shown.preempted,
        "requests": {
            "by_status": requests.by_status,
            "finished_per_s": per_second(requests.by_status["finished"], shown.requests_ns),
            "latencies": {name: _distribution(requests.latencies[name]) for name in _SHOWN_LATENCIES},
        },
        "tokens": {
            "of": shown.tokens.of,
            "prompt_per_s": shown.tokens.prompt,
            "cached_per_s": shown.tokens.cached,
            "output_per_s": shown.tokens.output,
            "steps_unknown": shown.tokens.unknown,
        },
        "steps": {
            "by_status": shown.steps.by_status,
            "by_phase": {
                name: {
                    "count": kind.count,
                    "per_s": per_second(kind.count, shown.steps_ns),
                    "duration": _distribution(kind.duration),
                    "tokens_mean": kind.tokens,
                    "requests_mean": kind.requests,
                }
                for name, kind in shown.steps.kinds.items()
            },
        },
        "timelines": [
            {
                "name": timeline.name,
                "threads": timeline.threads,
                "share_of": timeline.of,
                "accounted_ns": timeline.accounted_ns,
                "stages": [
                    {"stage": row.stage, "count": row.count, "self_ns": row.self_ns, "share": row.share}
                    for row in [*timeline.stages, timeline.unattributed]
                ],
            }
            for timeline in shown.timelines
        ],
        "rings": [vars(ring) for ring in shown.rings],
        "losses": {"slots_read": state.read, "by_reason": state.lost},
        "accounting_conflicts": state.accounting_conflicts,
        "hooks_not_installed": [vars(hook) for hook in state.hooks],
        "contained_errors": state.errors,
    }


def _distribution(values: Distribution) -> dict[str, int | None]:
    times = {"mean_ns": values.mean, "p50_ns": values.p50, "p95_ns": values.p95, "p99_ns": values.p99}
    return {"count": values.count} | {name: None if time is None else round(time) for name, time in times.items()}


# Lines


@dataclass(frozen=True)
class Screen:
    """A view, or why there is none, as a screenful: what does not fit is counted."""

    content: View | str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines in the size that the terminal has now."""
        width, height = options.max_width, options.height or options.size.height
        if isinstance(self.content, str):
            message = " ".join(plain(word) for word in self.content.split())
            drawn = [Text("stagetrace top", style="bold"), *_wrapped(message, width)]
        else:
            drawn = lines(self.content, width)
        room = height - 1
        if len(drawn) > room:
            drawn[room - 1 :] = [Text(f"({len(drawn) - room + 1} more lines: enlarge the terminal)", style="dim")]
        drawn += [Text()] * (room - len(drawn)) + [Text("q ends", style="dim")]
        yield Text("\n", no_wrap=True, overflow="crop").join(drawn)


def lines(shown: View, width: int) -> list[Text]:
    """The view in lines of at most `width` cells, at least 80. All strings are safe to show."""
    width = max(width, NARROWEST)
    drawn = [_title(shown), Text(f"session    {plain(shown.path)}")]
    if shown.message:
        drawn += _wrapped(shown.message, width, "yellow")
    drawn += [Text(), *_load(shown, width), Text(), *_times(shown)]
    for timeline in shown.timelines:
        rows = [*timeline.stages, timeline.unattributed]
        most = max((row.share or 0 for row in rows), default=0)
        words = [
            Text(f"{plain(row.stage)} {share_text(row.share)}", "bold" if row.share and row.share == most else "")
            for row in rows
        ]
        name = timeline.name if timeline.threads == 1 else f"{timeline.name} x{timeline.threads}"
        drawn += [*([Text()] if timeline is shown.timelines[0] else []), *_flow(name, words, width)]
    drawn += [Text(), *_trouble(shown.health, width)]
    drawn += _ring_lines(shown.rings, width)
    for line in drawn:
        line.truncate(width, overflow="crop")
    return drawn


_COLOURS = {State.STARTING: "yellow", State.RECORDING: "green", State.STALE: "red", State.ENDED: "yellow"}


def _title(shown: View) -> Text:
    title = Text.assemble(("stagetrace top", "bold"), "  ", (shown.state.value, _COLOURS[shown.state]))
    if shown.duration_ns:
        title.append(f" {duration_text(shown.duration_ns)}")
    words = (f"window {duration_text(shown.window_s * 1e9)}", f"level {shown.level}", *shown.engines)
    for word in words:
        title.append(f"  {plain(word)}")
    return title


def _load(shown: View, width: int) -> list[Text]:
    """What is being served."""
    batch, status, tokens = shown.batch, shown.requests.by_status, shown.tokens
    running, usage = [Text(f"{MISSING} running"), Text(f"{MISSING} waiting")], MISSING
    if batch is not None:
        usage = share_text(batch.kv_usage)
        peak = "" if shown.waiting_peak is None else f" (at most {shown.waiting_peak})"
        running = [Text(f"{batch.running} running"), Text(f"{batch.waiting} waiting{peak}")]
        age = duration_text(batch.age_ns)
        if shown.state is State.ENDED:
            running.append(Text("at the last step"))
        elif batch.idle:
            running.append(Text(f"idle since {age}: that was at the last step", "yellow"))
        elif batch.age_ns > _SETTLE_NS:
            running.append(Text(f"{age} ago"))
    finished = number_text(per_second(status["finished"], shown.requests_ns))
    failed = [Text(f"{status[name]} {name}", "red") for name in ("error", "lost") if status[name]]
    requests = [*running, Text(f"{finished}/s finished"), Text(f"{status['aborted']} aborted"), *failed]
    rates = [
        Text(f"{number_text(tokens.prompt)} prompt"),
        Text(f"{number_text(tokens.cached)} more cached"),
        Text(f"{number_text(tokens.output)} output"),
    ]
    if tokens.of != "steps":
        rates.append(Text("of requests that ended"))
    if tokens.unknown:
        rates.append(Text(f"output of {tokens.unknown} steps unknown", "yellow"))
    peak = "" if shown.kv_peak is None else f" (at most {share_text(shown.kv_peak)})"
    return [
        *_flow("requests", requests, width),
        *_flow("tokens/s", rates, width),
        *_flow("KV usage", [Text(f"{usage}{peak}"), Text(f"{shown.preempted} preempted")], width),
    ]


def _times(shown: View) -> list[Text]:
    """Latencies on the left, steps by their kind on the right."""
    left = [f"{'latency':<8}{'count':>7}{'p50':>8}{'p95':>8}{'p99':>8}"]
    for name in _SHOWN_LATENCIES:
        each = shown.requests.latencies[name]
        times = "".join(f"{duration_text(time):>8}" for time in (each.p50, each.p95, each.p99))
        left.append(f"{name:<8}{each.count:>7}{times}")
    right = [f"{'steps':<8}{'per s':>7}{'p50':>8}{'p95':>8}{'tokens':>8}"]
    for phase in Phase:
        kind = shown.steps.kinds.get(phase.value)
        time = kind.duration if kind else Distribution()
        rate = number_text(per_second(kind.count if kind else 0, shown.steps_ns))
        tokens = number_text(kind.tokens if kind else None)
        right.append(f"{phase.value:<8}{rate:>7}{duration_text(time.p50):>8}{duration_text(time.p95):>8}{tokens:>8}")
    return [
        Text(f"{one}  {other}", "bold" if number == 0 else "")
        for number, (one, other) in enumerate(zip(left, right, strict=True))
    ]


def _trouble(state: Health, width: int) -> list[Text]:
    """What did not reach the session and what went wrong in the hooks, since the session began."""
    lost = [Text(f"{count} {reason}", "red") for reason, count in state.lost.items() if count]
    if state.accounting_conflicts:
        lost.append(Text(f"{state.accounting_conflicts} accounting conflicts", "red"))
    read_ = Text(f"of {state.read} slots read") if lost else Text(f"none, {state.read} slots read")
    errors = [Text(f"{plain(name)} {count}", "red") for name, count in state.errors.items()] or [Text("none")]
    if state.hooks:
        errors.append(Text(f"{len(state.hooks)} hooks are not installed (stagetrace report)", "yellow"))
    exports = [
        Text(f"{plain(each.target)}: {each.waiting} commits wait, {plain(each.trouble)}", "red")
        for each in state.exports
        if each.trouble
    ]
    if exports:
        errors += exports
    return [*_flow("losses", [*lost, read_], width), *_flow("errors", errors, width)]


def _ring_lines(rings: Sequence[RingFill], width: int) -> list[Text]:
    """For each process how long its rings take to fill."""
    if not rings:
        return _flow("rings", [Text("none")], width)
    processes: dict[int, list[RingFill]] = {}
    for ring in rings:
        processes.setdefault(ring.process, []).append(ring)
    drawn: list[Text] = []
    for own in processes.values():
        holds = [_holds(ring) for ring in sorted(own, key=lambda ring: ring.ring)]
        drawn += _flow("" if drawn else "rings", [Text(f"{plain(own[0].role)} {own[0].pid}:"), *holds], width)
    return drawn


def _holds(ring: RingFill) -> Text:
    if not ring.per_s:
        return Text(f"{ring.ring} at rest")
    if ring.holds_ns is None:
        return Text(f"{ring.ring} {number_text(ring.per_s)} slots/s")
    time = duration_text(ring.holds_ns) if ring.holds_ns < _HOUR_NS else "over 1 h"
    return Text(f"{ring.ring} holds {time}", "yellow" if ring.holds_ns < _COMMIT_NS else "")


def _flow(label: str, words: Sequence[Text], width: int) -> list[Text]:
    """A label and words after it, in as many lines as they take."""
    drawn = [Text(f"{label:<{_LABEL - 2}}", "bold")]
    for word in words:
        if drawn[-1].cell_len > _LABEL and drawn[-1].cell_len + 2 + word.cell_len > width:
            drawn.append(Text(" " * (_LABEL - 2)))
        drawn[-1].append("  ").append_text(word)
    return drawn


def _wrapped(message: str, width: int, style: str = "") -> list[Text]:
    return [Text(line, style) for line in textwrap.wrap(message, width)]


def plain_lines(shown: View, width: int, encoding: str) -> str:
    """The lines as plain text that the output can encode."""
    return encodable("\n".join(line.plain.rstrip() for line in lines(shown, width)), encoding)
