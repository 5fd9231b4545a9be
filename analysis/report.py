"""The summary of a session: gathered once, shown as tables on a terminal, plain text in a pipe, or one JSON object.

docs/numbers.md says what each number means and documents the keys of the JSON object.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.stages import STAGES, Level, Phase

from .breakdown import (
    COLUMNS,
    OBSERVED,
    Distribution,
    ExportHealth,
    Health,
    Requests,
    Stages,
    StageTime,
    Steps,
    TimelineBreakdown,
    health,
    request_breakdown,
    stage_breakdown,
    step_breakdown,
)
from .device import SEGMENTS as DEVICE_SEGMENTS
from .device import DeviceTime, device_times
from .gap import SEGMENTS as GAP_SEGMENTS
from .gap import Gap
from .kernels import RankKernels, newest_window
from .latency_parts import COLUMNS as PARTS_COLUMNS
from .latency_parts import LatencyParts, latency_parts
from .layers import EXPERTS, Layers, layer_breakdown
from .layers import SEGMENTS as LAYER_SEGMENTS
from .load import load
from .marks import SEGMENTS as MARK_SEGMENTS
from .marks import RankMarks, rank_marks
from .show import (
    MISSING,
    Grid,
    Part,
    duration_text,
    message_text,
    number_text,
    plain,
    print_parts,
    rate_text,
    share_text,
)
from .show_device import device_dict, device_parts
from .show_kernels import kernel_parts, kernels_dict
from .show_marks import marks_dict, marks_parts
from .show_parts import parts_dict, parts_tables
from .speed_of_light import DATA_SHEET, Done, RequestLight, Served, SpeedOfLight, Window, served, speed_of_light
from .start_up import StartUp, process_name, start_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from rich.console import Console

    from stagetrace.exporters.session import Manifest, Session

JSON_VERSION = 1
MOST_LAYERS = 8  # of experts that are shown; the JSON object has all
LONGEST_NOTE = 2000

_NO_PROCESS = (
    "No process has opened a ring, so nothing was recorded. Either the server has not come up yet, or the command"
    " loaded no supported engine (vLLM, SGLang), or VLLM_PLUGINS or SGLANG_PLUGINS is set and leaves stagetrace out."
    " What to do: check that the command starts the engine in an environment in which stagetrace is installed; where"
    " the command or its environment sets one of them, add `stagetrace` to its comma-separated list."
)
_OFF = (
    "The engine was instrumented, but recording is off (level off), so nothing was recorded."
    " What to do: record with `stagetrace run --level step -- COMMAND` (or STAGETRACE_LEVEL=step) and send requests."
)
_NO_REQUEST = (
    "The engine was instrumented, but no request was recorded."
    " What to do: send requests to the server while it records; if you did, see the hooks and losses."
)
_NONE_IN_WINDOW = (
    "Nothing ended in the last {last}, though the session has requests or steps before that."
    " What to do: name a longer time, or leave --last out to see the whole session."
)


@dataclass(frozen=True)
class Engine:
    """An engine that was instrumented."""

    name: str
    version: str
    model: str


@dataclass(frozen=True)
class Summary:
    """Everything that a report shows."""

    path: str
    session: str
    complete: bool  # the collector ended in order
    engines: list[Engine]
    level: str
    host: str
    processes: int
    duration_ns: int | None  # of the session, by the wall clock
    last_s: float | None  # the window asked for
    requests: Requests
    parts: list[LatencyParts]
    steps: Steps
    stages: Stages
    names: dict[int, str]  # of processes, by their key
    start_up: list[StartUp]
    device: list[DeviceTime]  # of the ranks whose device was timed
    marks: list[RankMarks]  # of the ranks that have some, or were to have some
    kernels: list[RankKernels]  # of the newest kernel window
    kernels_note: str  # why they cannot be shown, where there is a window
    layers: Layers
    light: SpeedOfLight
    health: Health
    message: str | None  # what to do when there is nothing, or not all, to show


def summarise(
    session: Session, last_s: float | None = None, model_config: Path | None = None, calibration: Path | None = None
) -> Summary:
    """The summary of a session, or of its last `last_s` seconds. Raises SessionError when it cannot be read.

    `model_config`: the model's config.json or its directory, else where the session says it is. `calibration`: what
    `stagetrace calibrate` made, else the one that is kept for the device. Raises ConfigError and CalibrationError when
    one that was named cannot be read.
    """
    frames = load(session, last_s, _columns())
    kernels, kernels_note = newest_window(session)
    manifest = frames.manifest
    requests, steps, segments = frames["requests"], frames["steps"], frames["segments"]
    return Summary(
        path=str(session.path),
        session=manifest.session,
        complete=manifest.complete,
        engines=_engines(manifest),
        level=manifest.level,
        host=manifest.host,
        processes=len(manifest.processes),
        duration_ns=max(manifest.updated_ns - manifest.started_ns, 0) if manifest.started_ns else None,
        last_s=last_s,
        requests=request_breakdown(requests, frames["intervals"], steps),
        parts=latency_parts(requests, frames["states"], steps, frames["intervals"], manifest.processes),
        steps=step_breakdown(steps),
        names={process.key: process_name(process) for process in manifest.processes},
        stages=stage_breakdown(requests, steps, segments, _level(manifest.level)),
        start_up=start_up(segments, manifest.processes),
        device=device_times(steps, segments, manifest.processes),
        marks=rank_marks(steps, segments, manifest.processes, _model(session, manifest, model_config)),
        kernels=kernels,
        kernels_note=kernels_note,
        layers=layer_breakdown(manifest, steps, segments, frames["experts"]),
        light=speed_of_light(
            manifest, steps, segments, requests, frames["experts"], session.model_config, model_config, calibration
        ),
        health=health(manifest, session.read_exports().values()),
        message=_message(manifest, len(requests), len(steps), sum(frames.rows.values()), last_s),
    )


def _level(name: str) -> Level | None:
    return Level[name.upper()] if name.upper() in Level.__members__ else None


def _model(session: Session, manifest: Manifest, config: Path | None) -> Served | None:
    """What was served, where that is known. Raises ConfigError when a config that was named cannot be read."""
    found = served(manifest, session.model_config, config)
    return None if isinstance(found, str) else found


def _columns() -> dict[str, list[str] | None]:
    """The columns that a report needs, by table."""
    found: dict[str, list[str] | None] = {"experts": EXPERTS}
    of_segments = (LAYER_SEGMENTS, GAP_SEGMENTS, DEVICE_SEGMENTS, MARK_SEGMENTS)
    all_needed: list[Mapping[str, list[str] | None]] = [COLUMNS, PARTS_COLUMNS]
    all_needed += [{"segments": columns} for columns in of_segments]
    for needed in all_needed:
        for name, columns in needed.items():
            found[name] = list(dict.fromkeys([*(found.get(name) or ()), *(columns or ())]))
    return found


def _engines(manifest: Manifest) -> list[Engine]:
    keys = ("engine", "engine_version", "model")
    found = (tuple(str(process.info.get(key, "")) for key in keys) for process in manifest.processes)
    return [Engine(*words) for words in dict.fromkeys(found) if any(words)]


def _message(manifest: Manifest, requests: int, steps: int, rows: int, last_s: float | None) -> str | None:
    """What to do when there is no request to report; None when there is one."""
    if requests:
        return None
    if not manifest.processes and not rows:
        return _NO_PROCESS
    if last_s is not None and rows and not steps:
        return _NONE_IN_WINDOW.format(last=duration_text(last_s * 1e9))
    if manifest.level.upper() == Level.OFF.name and not rows:
        return _OFF
    return _NO_REQUEST


# JSON


def to_json(summary: Summary) -> str:
    """The summary as one JSON object; its keys are documented in docs/numbers.md. Strings are as they were recorded."""
    return json.dumps(as_dict(summary), indent=1)


def as_dict(summary: Summary) -> dict[str, Any]:
    """What to_json writes."""
    requests, steps, stages, state = summary.requests, summary.steps, summary.stages, summary.health
    return {
        "version": JSON_VERSION,
        "session": {
            "path": summary.path,
            "id": summary.session,
            "complete": summary.complete,
            "engines": [vars(engine) for engine in summary.engines],
            "level": summary.level,
            "host": summary.host,
            "processes": summary.processes,
            "duration_ns": summary.duration_ns,
            "last_s": summary.last_s,
        },
        "message": summary.message,
        "requests": {
            "count": requests.count,
            "by_status": requests.by_status,
            "partial": requests.partial,
            "measured": requests.measured,
            "prompt_tokens": requests.prompt_tokens,
            "output_tokens": requests.output_tokens,
            "cached_tokens": requests.cached_tokens,
            "preemptions": requests.preemptions,
            "latencies": {name: _distribution(each) for name, each in requests.latencies.items()},
            "itl_by_phase": {name: _distribution(each) for name, each in requests.intervals_by_phase.items()},
            "rates": {
                "span_ns": requests.rates.span_ns,
                "requests_per_s": requests.rates.requests,
                "output_tokens_per_s": requests.rates.output_tokens,
                "total_tokens_per_s": requests.rates.total_tokens,
            },
        },
        "latency_parts": parts_dict(summary.parts),
        "steps": {
            "count": steps.count,
            "by_status": steps.by_status,
            "by_phase": {
                name: {
                    "count": kind.count,
                    "total_ns": kind.total_ns,
                    "duration": _distribution(kind.duration),
                    "tokens_mean": kind.tokens,
                    "requests_mean": kind.requests,
                    "output_tokens": kind.output_tokens,
                    "membership_unknown": kind.membership_unknown,
                }
                for name, kind in steps.kinds.items()
            },
        },
        "timelines": [
            {
                "name": timeline.name,
                "threads": timeline.threads,
                "share_of": timeline.of,
                "envelope_ns": timeline.envelope_ns,
                "accounted_ns": timeline.accounted_ns,
                "stages": [_stage(stage) for stage in [*timeline.stages, timeline.unattributed]],
                "by_phase": {name: [_stage(stage) for stage in part] for name, part in timeline.by_phase.items()},
            }
            for timeline in stages.timelines
        ],
        "ranks": [
            {
                "process": summary.names.get(rank.process, ""),
                "total_ns": rank.total_ns,
                "duration": _distribution(rank.duration),
                "stages": [_stage(stage) for stage in [*rank.stages, rank.unattributed]],
            }
            for rank in stages.ranks
        ],
        "device": [device_dict(each, summary.names) for each in summary.device],
        "marks": [marks_dict(each, summary.names) for each in summary.marks],
        "kernel_window": [kernels_dict(rank) for rank in summary.kernels],
        "start_up": [
            {
                "process": each.process,
                "total_ns": each.total_ns,
                "stages": [vars(piece) for piece in each.pieces],
            }
            for each in summary.start_up
        ],
        "layers": _layers_dict(summary.layers, summary.names),
        "outside_steps": [
            {
                "stage": row.stage,
                "count": row.count,
                "total_ns": row.total_ns,
                "inside_ns": row.inside_ns,
                "duration": _distribution(row.duration),
            }
            for row in stages.outside
        ],
        "speed_of_light": {
            "model": summary.light.model,
            "config": summary.light.config,
            "ceilings": {kind: each.source for kind, each in summary.light.ceilings.items()},
            "by_phase": {name: _done(each) for name, each in summary.light.phases.items()},
            "by_stage": {name: _done(each) for name, each in summary.light.stages.items()},
            "over_time": [
                {"begin_ns": each.begin_ns, "width_ns": each.width_ns, "busy": each.busy, **_done(each.done)}
                for each in summary.light.windows
            ],
            "requests": None if summary.light.requests is None else vars(summary.light.requests),
            "notes": list(summary.light.notes),
        },
        "segments_left_out": stages.left_out,
        "not_recorded": {"above_level": stages.above_level, "no_rows": stages.no_rows},
        "losses": {
            "slots_read": state.read,
            "by_reason": state.lost,
            "rings": [{**vars(ring), "lost": ring.lost} for ring in state.rings],
        },
        "accounting_conflicts": state.accounting_conflicts,
        "hooks_not_installed": [vars(hook) for hook in state.hooks],
        "contained_errors": state.errors,
        "counts": state.counts,
        "exports": [vars(each) for each in state.exports],
        "rotated_ns": state.rotated_ns,
    }


def _layers_dict(layers: Layers, names: dict[int, str]) -> dict[str, Any]:
    with_durations = {
        name: [vars(row) | {"duration": _distribution(row.duration)} for row in rows]
        for name, rows in (("stages", layers.stages), ("collectives", layers.collectives))
    }
    return {
        **with_durations,
        "by_layer": [vars(row) | {"mean_ns": round(row.mean_ns)} for row in layers.by_layer],
        "ranks": [vars(row) | {"process": names.get(row.process, "")} for row in layers.ranks],
        "experts": [vars(load) for load in layers.experts],
        "not_visible_under_compile": layers.not_visible,
        "not_in_model": layers.not_in_model,
    }


def _distribution(values: Distribution) -> dict[str, int | None]:
    times = {"mean_ns": values.mean, "p50_ns": values.p50, "p95_ns": values.p95, "p99_ns": values.p99}
    return {"count": values.count} | {name: None if time is None else round(time) for name, time in times.items()}


def _done(done: Done) -> dict[str, Any]:
    return {
        "steps": done.count,
        "operations": done.operations,
        "bytes": done.bytes,
        "bus_bytes": done.bus_bytes,
        "time_ns": done.time_ns,
        "operations_per_s": done.operations_per_s,
        "bytes_per_s": done.bytes_per_s,
        "against": {
            kind: {
                "least_ns": roofs.whole_ns,
                "share": done.share(kind),
                "mfu": done.mfu(kind),
                "mbu": done.mbu(kind),
                "link_share": done.bus(kind),
            }
            for kind, roofs in done.roofs.items()
        },
        "gap": None if done.gap is None else vars(done.gap),
    }


def _stage(row: StageTime) -> dict[str, Any]:
    return {
        "stage": row.stage,
        "count": row.count,
        "self_ns": row.self_ns,
        "share": row.share,
        "duration": _distribution(row.duration),
    }


# Tables


_DISTRIBUTION = ("count", "mean", "p50", "p95", "p99")


def _cells(values: Distribution) -> list[str]:
    return [str(values.count), *(duration_text(time) for time in (values.mean, values.p50, values.p95, values.p99))]


def print_summary(summary: Summary, console: Console) -> None:
    """Prints the summary: rich tables on a terminal, else aligned plain text that no width wraps."""
    print_parts(parts(summary), console)


def parts(summary: Summary) -> list[Part]:
    """What a report shows, in order. All strings are safe to show."""
    shown: list[Part] = [_header(summary)]
    if summary.message:
        shown.append(message_text(summary.message))
    if summary.requests.count:
        shown += _requests(summary.requests)
        shown += parts_tables(summary.parts, summary.path)
    if summary.steps.count:
        shown += _steps(summary.steps)
    shown += _stages(summary)
    shown += device_parts(summary.device, summary.names)
    shown += marks_parts(summary.marks, summary.names, _level(summary.level))
    shown += _start_up(summary.start_up)
    shown += [summary.kernels_note] if summary.kernels_note else kernel_parts(summary.kernels)
    shown += _layers(summary.layers)
    shown += _light(summary.light)
    shown += _health(summary.health, summary.path)
    return shown


def _header(summary: Summary) -> Grid:
    engines = dict.fromkeys(plain(f"{engine.name} {engine.version}".strip()) for engine in summary.engines)
    models = dict.fromkeys(plain(engine.model) for engine in summary.engines)
    state = "ended" if summary.complete else "still recording, or its collector was stopped"
    rows = [
        ("session", plain(summary.path)),
        ("engine", ", ".join(filter(None, engines)) or MISSING),
        ("model", ", ".join(filter(None, models)) or MISSING),
        ("level", plain(summary.level)),
        ("duration", f"{duration_text(summary.duration_ns)} ({state})"),
        ("host", plain(summary.host) or MISSING),
    ]
    if summary.last_s is not None:
        rows.append(("window", f"what ended in the last {duration_text(summary.last_s * 1e9)}"))
    return Grid("stagetrace report", ("", ""), rows, text=True)


def _requests(requests: Requests) -> list[Part]:
    statuses = ", ".join(f"{count} {status}" for status, count in requests.by_status.items() if count)
    if requests.partial:
        statuses += f" ({requests.partial} of them partial)"
    rates = requests.rates
    rows = [
        ("requests", f"{requests.count}: {plain(statuses)}"),
        ("prompt tokens", f"{requests.prompt_tokens}, {requests.cached_tokens} of them cached"),
        ("output tokens", str(requests.output_tokens)),
        ("preemptions", str(requests.preemptions)),
        (
            "rates",
            f"{number_text(rates.requests)} requests/s, {number_text(rates.output_tokens)} output tokens/s,"
            f" {number_text(rates.total_tokens)} total tokens/s over {duration_text(rates.span_ns)}",
        ),
    ]
    latencies = [[name, *_cells(values)] for name, values in requests.latencies.items() if values.count]
    if len(requests.intervals_by_phase) > 1:
        place = next((row for row, cells in enumerate(latencies, 1) if cells[0] == "itl"), len(latencies))
        latencies[place:place] = [
            [f"itl, {phase} steps", *_cells(values)] for phase, values in requests.intervals_by_phase.items()
        ]
    title = f"Latencies and states of {requests.measured} requests (without lost, open and partial ones)"
    return [Grid("Requests", ("", ""), rows, text=True), Grid(title, ("", *_DISTRIBUTION), latencies)]


def _steps(steps: Steps) -> list[Part]:
    columns = ("phase", "count", "total", "p50", "p95", "p99", "tokens/step", "requests/step", "output tokens")
    rows = [
        [
            name,
            str(kind.count),
            *(duration_text(time) for time in (kind.total_ns, kind.duration.p50, kind.duration.p95, kind.duration.p99)),
            number_text(kind.tokens),
            number_text(kind.requests),
            f"{kind.output_tokens}"
            + (f" + {kind.membership_unknown} steps unknown" if kind.membership_unknown else ""),
        ]
        for name, kind in steps.kinds.items()
    ]
    others = ", ".join(f"{n} {status}" for status, n in steps.by_status.items() if n and status != "complete")
    title = f"Steps: {steps.by_status['complete']} complete" + (f"; left out: {plain(others)}" if others else "")
    return [Grid(title, columns, rows)]


def _stages(summary: Summary) -> list[Part]:
    stages = summary.stages
    shown: list[Part] = []
    for timeline in stages.timelines:
        shown.append(_timeline(timeline))
        if timeline.accounted_ns != timeline.envelope_ns:
            shown.append(
                f"Stages and unattributed of the {timeline.name} add up to {duration_text(timeline.accounted_ns)}, its"
                f" {timeline.of}s to {duration_text(timeline.envelope_ns)}: they differ where steps overlap, or"
                " where what belongs to no step ran within one."
            )
        if len(timeline.by_phase) > 1:
            shown.append(_by_phase(timeline))
    if len(stages.ranks) > 1:
        shown.append(_ranks(summary))
    if stages.outside:
        columns = ("stage", "count", "total", "of it above", "p50", "p95", "p99")
        rows = [
            [
                plain(row.stage),
                str(row.count),
                *(duration_text(time) for time in (row.total_ns, row.inside_ns)),
                *(duration_text(time) for time in (row.duration.p50, row.duration.p95, row.duration.p99)),
            ]
            for row in stages.outside
        ]
        shown.append(Grid("Outside steps, and now and then", columns, rows))
    if stages.left_out:
        shown.append(f"{stages.left_out} segments are of steps that are not complete and are left out of the shares.")
    if summary.steps.count and stages.above_level:
        shown.append(_above_level(summary.level, stages.above_level))
    known = {*summary.layers.not_visible, *summary.layers.not_in_model}
    names = ", ".join(name for name in stages.no_rows if name not in known)
    if summary.steps.count and names:
        shown.append(f"No rows: {names} (they did not happen, or their hook is not there).")
    return shown


def _ranks(summary: Summary) -> Grid:
    ranks = summary.stages.ranks
    names = list(dict.fromkeys(stage.stage for rank in ranks for stage in [*rank.stages, rank.unattributed]))
    collectives = {each.process: each for each in summary.layers.ranks}
    rows = []
    for rank in ranks:
        shares = {stage.stage: stage.share for stage in [*rank.stages, rank.unattributed]}
        cells = [plain(summary.names.get(rank.process) or f"process {rank.process}"), str(rank.duration.count)]
        cells += [duration_text(time) for time in (rank.total_ns, rank.duration.p50, rank.duration.p99)]
        if collectives:
            own = collectives.get(rank.process)
            times = (None, None) if own is None else (own.waiting_ns, own.moving_ns)
            cells += [duration_text(time) for time in times]
        rows.append([*cells, *(share_text(shares.get(name)) for name in names)])
    waiting = ("waiting in collectives", "moving") if collectives else ()
    return Grid("Ranks, each on its own", ("rank", "steps", "total", "p50", "p99", *waiting, *names), rows)


def _start_up(processes: list[StartUp]) -> list[Part]:
    columns = ("process", "stage", "count", "total", "self time", "share")
    rows = []
    for each in processes:
        rows.append([plain(each.process), "startup", "1", duration_text(each.total_ns), MISSING, MISSING])
        rows += [
            [
                "",
                piece.stage,
                str(piece.count),
                *(duration_text(time) for time in (piece.total_ns, piece.self_ns)),
                share_text(piece.self_ns / each.total_ns if each.total_ns else None),
            ]
            for piece in each.pieces
        ]
    return [Grid("Start-up, each process from its start until it was ready", columns, rows)] if rows else []


def _layers(layers: Layers) -> list[Part]:
    shown: list[Part] = []
    if layers.stages:
        columns = ("stage", "kind", "layers", "count", "self time", "of forward", "p50", "p95", "p99", "slowest layer")
        rows = [
            [
                row.stage,
                row.kind or MISSING,
                MISSING if row.layers is None else str(row.layers),
                str(row.count),
                duration_text(row.self_ns),
                share_text(row.share),
                *(duration_text(time) for time in (row.duration.p50, row.duration.p95, row.duration.p99)),
                MISSING if row.slowest_layer is None else f"{row.slowest_layer}: {duration_text(row.slowest_ns)}",
            ]
            for row in layers.stages
        ]
        shown.append(Grid("Inside forward, all ranks together", columns, rows))
    shown += _collectives(layers)
    if layers.experts:
        shown.append(_experts(layers))
    if layers.not_visible and not layers.is_empty:
        shown.append(
            f"Not visible under compile: {', '.join(layers.not_visible)}. The compiler has put them into its graphs, so"
            " their time is forward's own (vLLM's --enforce-eager shows them, at another speed)."
        )
    return shown


def _collectives(layers: Layers) -> list[Part]:
    if not layers.collectives:
        return []
    rows = [
        [
            row.op,
            plain(row.group),
            plain(row.algorithm or MISSING),
            str(row.count),
            rate_text(row.bytes / row.count, "B"),
            duration_text(row.total_ns),
            *(duration_text(time) for time in (row.duration.p50, row.duration.p99)),
            share_text(
                None if row.waiting_ns is None else row.waiting_ns / max(row.waiting_ns + (row.moving_ns or 0), 1)
            ),
            rate_text(row.bytes_per_s, "B/s"),
        ]
        for row in layers.collectives
    ]
    columns = ("operation", "group", "by", "count", "size", "total", "p50", "p99", "waiting", "when moving")
    return [Grid("Collectives, all ranks together", columns, rows)]


def _experts(layers: Layers) -> Grid:
    shown = layers.experts[:MOST_LAYERS]
    rows = [
        [
            str(load.layer),
            str(load.experts),
            str(load.tokens),
            f"{load.imbalance_per_step:.2f}",
            f"{load.imbalance:.2f}",
            MISSING if load.rank_imbalance_per_step is None else f"{load.rank_imbalance_per_step:.2f}",
            ", ".join(f"{expert} ({share_text(share)})" for expert, share in load.hot),
            str(load.idle),
        ]
        for load in shown
    ]
    more = f"; the {len(shown)} most uneven of {len(layers.experts)} layers" if len(shown) < len(layers.experts) else ""
    columns = ("layer", "experts", "tokens", "most/mean in a step", "in all", "by rank", "hottest", "idle")
    return Grid(f"Tokens by expert{more}", columns, rows)


def _above_level(level: str, names: Iterable[str]) -> str:
    levels = {stage.name: stage.level for stage in STAGES}
    needed = min(levels[name] for name in names)
    return f"Not recorded at level {plain(level)}: {', '.join(names)} (recorded from level {needed.name.lower()} on)."


def _timeline(timeline: TimelineBreakdown) -> Grid:
    threads = "1 thread" if timeline.threads == 1 else f"{timeline.threads} threads"
    of = timeline.of if timeline.of == OBSERVED else f"{timeline.of} time"
    total = duration_text(timeline.accounted_ns)
    title = f"Stages on the {timeline.name} timeline ({threads}), share of {total} of {of}"
    rows = [
        [
            plain(row.stage),
            str(row.count),
            duration_text(row.self_ns),
            share_text(row.share),
            *(duration_text(time) for time in (row.duration.p50, row.duration.p95, row.duration.p99)),
        ]
        for row in [*timeline.stages, timeline.unattributed]
    ]
    return Grid(title, ("stage", "count", "self time", "share", "p50", "p95", "p99"), rows)


def _by_phase(timeline: TimelineBreakdown) -> Grid:
    phases = [phase.value for phase in Phase if phase.value in timeline.by_phase]
    found = {phase: {row.stage: row for row in timeline.by_phase[phase]} for phase in phases}
    rows = []
    for each in [*timeline.stages, timeline.unattributed]:
        cells = [plain(each.stage)]
        for phase in phases:
            row = found[phase].get(each.stage)
            cells += [share_text(row.share), duration_text(row.duration.p50)] if row else [MISSING, MISSING]
        rows.append(cells)
    columns = ["stage", *(f"{phase} {what}" for phase in phases for what in ("share", "p50"))]
    return Grid(f"Stages on the {timeline.name} timeline by kind of step", columns, rows)


def _light(light: SpeedOfLight) -> list[Part]:
    shown: list[Part] = []
    kind = light.against
    against = f"; ceilings: {plain(light.ceilings[kind].source)}" if kind else ""
    for what, rows in (("kind of step", light.phases), ("stage", light.stages)):
        if not rows:
            continue
        lines = [
            [
                name,
                *(rate_text(amount / done.count, "") for amount in (done.operations, done.bytes, done.bus_bytes)),
                duration_text(None if done.time_ns is None else done.time_ns / done.count),
                rate_text(done.operations_per_s, "/s"),
                rate_text(done.bytes_per_s, "B/s"),
                *(share_text(share(kind) if kind else None) for share in (done.mfu, done.mbu, done.bus, done.share)),
                *([share_text(done.share(DATA_SHEET))] if len(light.ceilings) > 1 else []),
            ]
            for name, done in rows.items()
        ]
        columns = (
            what,
            "operations/step",
            "bytes/step",
            "link bytes/step",
            "time/step",
            "operations",
            "memory",
            "MFU",
            "MBU",
            "of link",
            "of light",
            *(["of data sheet"] if len(light.ceilings) > 1 else []),
        )
        shown.append(Grid(f"Speed of light by {what}, of one rank{against}", columns, lines))
    if any(done.gap for done in light.phases.values()):
        shown.append(_gaps({name: done for name, done in light.phases.items() if done.gap}))
    if len(light.windows) > 1:
        shown.append(_over_time(light.windows, kind))
    if light.requests is not None:
        shown.append(_request_light(light.requests))
    return shown + [plain_sentence(note) for note in light.notes]


def _gaps(phases: dict[str, Done]) -> Grid:
    """Each part as a time a step, and its share of the time that was measured; what was not told apart is a dash."""

    def cell(done: Done, part_ns: int | None) -> str:
        if part_ns is None:
            return MISSING
        return f"{duration_text(part_ns / done.count)} ({share_text(part_ns / done.time_ns if done.time_ns else None)})"

    untold = any(done.gap and done.gap.untold_ns for done in phases.values())
    rows = [
        [
            name,
            duration_text((done.time_ns or 0) / done.count),
            cell(done, (done.time_ns or 0) - gap.total_ns),
            *(cell(done, part_ns) for part_ns in gap.parts.values()),
            *([cell(done, gap.untold_ns)] if untold else []),
        ]
        for name, done in phases.items()
        if (gap := done.gap)
    ]
    columns = ("kind of step", "time/step", "least", *Gap.names(), *(["not recorded"] if untold else []))
    return Grid("Between the least time and the time that steps took, a step (share of its time)", columns, rows)


def _over_time(windows: Sequence[Window], kind: str | None) -> Grid:
    begin = windows[0].begin_ns
    rows = [
        [
            duration_text(window.begin_ns - begin),
            str(window.done.count),
            share_text(window.busy),
            rate_text(window.done.operations_per_s, "/s"),
            rate_text(window.done.bytes_per_s, "B/s"),
            *(
                share_text(share(kind) if kind else None)
                for share in (window.done.mfu, window.done.mbu, window.done.bus, window.done.share)
            ),
        ]
        for window in windows
    ]
    columns = ("from", "steps", "in steps", "operations", "memory", "MFU", "MBU", "of link", "of light")
    return Grid(f"Speed of light over time, windows of {duration_text(windows[0].width_ns)}", columns, rows)


def _request_light(found: RequestLight) -> Grid:
    pairs = (("TTFT", found.ttft_ns, found.least_ttft_ns), ("TPOT", found.tpot_ns, found.least_tpot_ns))
    rows = [
        [name, duration_text(taken), duration_text(least), share_text(least / taken if taken and least else None)]
        for name, taken, least in pairs
    ]
    title = f"Speed of light of one request alone, medians of {found.count} finished requests"
    return Grid(title, ("", "measured", "least", "of light"), rows)


def plain_sentence(text: str) -> str:
    """A note as a sentence that is safe to show."""
    return plain(text[:1].upper() + text[1:], LONGEST_NOTE)


_RESTORED = (
    "The manifest was made again from the raw records. No longer known: the command, the hosts, errors of hooks, and"
    " what was lost of rings that were gone long before the end."
)
_DAMAGES = {
    "parts_damaged": "parts of the raw records are damaged and left out; collector.log names them.",
    "assembly_errors": "batches of records could not be assembled and are in the raw records alone; collector.log says"
    " why. Please report this, and try `stagetrace rebuild` with a newer stagetrace.",
}


def _export(state: ExportHealth, path: str) -> str:
    said = [f"{state.sent} spans sent"]
    if state.refused:
        said.append(f"{state.refused} refused")
    if state.left_out.get("commits_rotated"):
        said.append(f"{state.left_out['commits_rotated']} commits were removed before they could be sent")
    if not state.waiting:
        said.append("nothing waits")
    else:
        why = f" ({plain(state.trouble)})" if state.trouble else ""
        said.append(f"{state.waiting} commits wait{why}: `stagetrace export {plain(path)}` sends them")
    return f"Export to {plain(state.target)}: {', '.join(said)}."


def _health(state: Health, path: str) -> list[Part]:
    shown: list[Part] = []
    lost = ", ".join(f"{count} {reason}" for reason, count in state.lost.items() if count)
    conflicts = state.accounting_conflicts
    accounting = f"{conflicts} accounting conflicts" if conflicts != 1 else "1 accounting conflict"
    shown.append(f"Losses: {lost or 'none'}; {state.read} slots read; {accounting}.")
    if state.rotated_ns:
        when = datetime.fromtimestamp(state.rotated_ns / 1e9).astimezone().isoformat(" ", "seconds")
        slots = state.counts.get("slots_rotated", 0)
        shown.append(f"What was recorded before {when} was removed to keep the session small: {slots} slots (--keep).")
    if state.counts.get("manifest_restored"):
        shown.append(_RESTORED)
    for name, what in _DAMAGES.items():
        if state.counts.get(name):
            shown.append(f"{state.counts[name]} {what}")
    shown += [_export(each, path) for each in state.exports]
    if state.hooks:
        rows = [[plain(hook.name), plain(hook.status), plain(hook.why), str(hook.processes)] for hook in state.hooks]
        shown.append(Grid("Hooks that are not installed", ("hook", "status", "why", "processes"), rows, text=True))
    if state.errors:
        rows = [[plain(name), str(count)] for name, count in state.errors.items()]
        shown.append(Grid("Errors of stagetrace's own, contained", ("hook", "errors"), rows))
    return shown
