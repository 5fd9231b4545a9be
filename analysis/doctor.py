"""What `stagetrace doctor` says: of an environment, whether its engines can be recorded; of a session, what its
processes said of themselves. Each is one JSON object, shown as tables or plain text as well.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagetrace.exporters.session import Losses, not_visible_of
from stagetrace.instrument import records, ring
from stagetrace.instrument.identity import read_identity
from stagetrace.instrument.levels import maximum_level
from stagetrace.instrument.stages import Level

from .breakdown import ABSENT, INSTALLED, LOSS_REASONS, hook_troubles, lost_by_reason
from .marks import advice, mark_info
from .show import MISSING, Grid, Part, message_text, plain
from .show_marks import info_dict
from .start_up import process_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stagetrace.exporters.session import Manifest, Process, Session

JSON_VERSION = 2
USABLE, UNUSABLE, UNKNOWN = 0, 1, 2  # exit statuses
_FAILED = ("missing", "mismatch", "error", "out")  # of a hook: it would record here, and cannot
_MIB = 1 << 20
_NO_ENGINE = "There is no engine in this environment. What to do: name the engine's Python, `--python PATH`."
_NO_PROCESS = (
    "No process has opened a ring for this session. What to do: run `stagetrace doctor --python PATH` with the Python"
    " that the engine runs on; it shows whether the hooks fit, and whether VLLM_PLUGINS or SGLANG_PLUGINS leaves"
    " stagetrace out."
)
_UNREAD = "{count} rings of this session are read by no collector. What to do: `stagetrace collect {path}`."
_AMISS = ("skipped", "contradictions", "errors")  # in timing a device: docs/numbers.md, Devices
_NO_TRAFFIC = "no traffic yet"


# An environment


def environment_view(
    inspection: Mapping[str, Any] | None, trouble: str | None, environment: Mapping[str, str], excluding: dict[str, str]
) -> dict[str, Any]:
    """The JSON object of an environment.

    `inspection` is what adapters/inspect.py found (None: nothing, and `trouble` says why), `excluding` has the
    variables that leave our plugin out and what to set them to. `status` is the command's exit status.
    """
    engines = inspection["engines"] if inspection else []
    notes = [note for engine in engines for note in _engine_notes(engine)]
    rings = ring_directory_view()
    variables = {f"{engine['name']}_plugins".upper() for engine in engines} or {"VLLM_PLUGINS"}
    troubles = [message for engine in engines for message in _engine_troubles(engine)]
    troubles += [
        f"{name}={environment[name]} leaves stagetrace out. What to do: set {name}={wanted}, or start the engine with"
        " `stagetrace run`, which does so."
        for name, wanted in excluding.items()
        if name in variables
    ]
    troubles += [rings["trouble"]] if rings["trouble"] else []
    if trouble or not engines:
        status = UNKNOWN
        troubles.insert(0, trouble or _NO_ENGINE)
    else:
        status = UNUSABLE if troubles else USABLE
    return {
        "version": JSON_VERSION,
        "status": status,
        "troubles": troubles,
        "notes": notes,  # what is as it has to be
        "stagetrace": version("stagetrace"),
        "python": platform.python_version(),
        "inspection": inspection,
        "session": _session_variable(environment.get("STAGETRACE_SESSION")),
        "plugin_variables": {
            name: {"value": environment.get(name), "excludes": name in excluding} for name in sorted(variables)
        },
        "rings": rings,
    }


def _engine_troubles(engine: Mapping[str, Any]) -> list[str]:
    found = []
    if engine["plugin"] is None:
        found.append(
            f"{engine['name']} does not find stagetrace's entry point in {engine['group']}."
            " What to do: install stagetrace into its environment again (pip install --no-deps)."
        )
    elif engine["plugin_trouble"]:
        found.append(
            f"stagetrace's entry point cannot be loaded ({engine['plugin_trouble']})."
            " What to do: install stagetrace into the engine's environment again (pip install --no-deps)."
        )
    if engine["unusable"]:
        there = sum(point["status"] != ABSENT for point in engine["points"])
        found.append(
            f"{len(engine['unusable'])} of {there} hook points do not fit {engine['name']}"
            f" {engine['version']}: what they give will be missing, the engine runs all the same."
            " What to do: a release of stagetrace for this version of the engine, or an issue with this output."
        )
    return found


def _engine_notes(engine: Mapping[str, Any]) -> list[str]:
    """What an engine's version means for what is recorded."""
    name = f"{engine['name']} {engine['version']}"
    notes = []
    if not engine["known"]:
        notes.append(
            f"{name} is not a release that the hook points were held against, nor older than one: those that fit are"
            " used, and what they give is as right as the functions are still the same."
        )
    if engine["lost"]:
        gives = {point["target"]: point["gives"] for point in engine["points"]}
        lost = "; ".join(f"{gives[target]} ({target.partition(':')[2]})" for target in engine["lost"])
        notes.append(f"Not to be had from {name}, whose functions are others: {lost}.")
    return notes


def _session_variable(value: str | None) -> dict[str, Any] | None:
    """STAGETRACE_SESSION: its value and whether a session is there; None when it is not set."""
    return {"path": value, "exists": read_identity(Path(value)) is not None} if value else None


def ring_directory_view() -> dict[str, Any]:
    """Where rings would lie: whether that is there, the file system under it, its free room, and what a ring takes."""
    root = ring.ring_directory("")
    there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    size = records.HEADER_SIZE + sum(ring.chosen_slots(maximum_level())) * records.SLOT_SIZE
    free = shutil.disk_usage(there).free
    trouble = None
    status = there.stat()
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        trouble = f"{there} cannot be written, so nothing is recorded. What to do: set STAGETRACE_RING_DIR."
    elif (
        root.exists()
        and not os.environ.get("STAGETRACE_RING_DIR")  # a root that the user named may be shared
        and (status.st_uid != os.getuid() or status.st_mode & stat.S_IWOTH)
    ):
        trouble = f"{root} belongs to another user or is open to all. What to do: set STAGETRACE_RING_DIR."
    elif free < size:
        trouble = (
            f"{there} has {_mib(free)} free and a ring takes {_mib(size)}: rings will be smaller, or there"
            " will be none. What to do: enlarge /dev/shm (docker run --shm-size=1g), or set STAGETRACE_RING_DIR."
        )
    return {
        "directory": str(root),
        "exists": root.exists(),
        "file_system": file_system(there, Path("/proc/self/mounts").read_text("utf-8", "replace")),
        "free_bytes": free,
        "ring_bytes": size,
        "trouble": trouble,
    }


def file_system(path: Path, mounts: str) -> str | None:
    """The type of the file system that holds `path`, by the text of /proc/self/mounts; None when that does not say."""
    real = str(path.resolve())
    found: tuple[int, str] | None = None
    for line in mounts.splitlines():
        words = line.split(" ")
        if len(words) < 3:
            continue
        at = words[1].encode().decode("unicode_escape")  # a blank in a path is \040
        holds = real == at or real.startswith(at.rstrip("/") + "/")
        if holds and (found is None or len(at) >= found[0]):  # of two on the same place the later one is seen
            found = len(at), words[2]
    return found[1] if found else None


def environment_parts(view: Mapping[str, Any]) -> list[Part]:
    """What is shown of an environment, in order. All strings are safe to show."""
    inspection = view["inspection"]
    rows = [("stagetrace", f"{view['stagetrace']} (this command, on Python {view['python']})")]
    if inspection:
        rows.append(("inspected", f"{inspection['executable']}: Python {inspection['python']}"))
        rows.append(("", f"stagetrace {inspection['stagetrace']}"))
    for engine in inspection["engines"] if inspection else ():
        rows.append(("engine", f"{engine['name']} {engine['version']}"))
        rows.append(("entry point", f"{engine['plugin'] or 'not found'} in {engine['group']}"))
    for name, variable in view["plugin_variables"].items():
        value, excludes = variable["value"], variable["excludes"]
        rows.append((name, "not set" if value is None else f"{value!r}" + (" leaves stagetrace out" * excludes)))
    rows += [("STAGETRACE_SESSION", _session_text(view["session"])), ("rings", _rings_text(view["rings"]))]
    shown: list[Part] = [Grid("stagetrace doctor", ("", ""), [(name, plain(text)) for name, text in rows], text=True)]
    for engine in inspection["engines"] if inspection else ():
        shown += _points(engine)
    shown += [message_text(note) for note in view["notes"]]
    lost = any(engine["lost"] for engine in inspection["engines"]) if inspection else False
    fine = "All hook points of this version can be used." if lost else "All hook points can be used."
    return shown + ([message_text(trouble) for trouble in view["troubles"]] or [fine])


def _session_text(session: Mapping[str, Any] | None) -> str:
    if session is None:
        return "not set: engines that start now are not recorded (`stagetrace run` sets it for its command)"
    return f"{session['path']}" + ("" if session["exists"] else " (no session there yet)")


def _rings_text(rings: Mapping[str, Any]) -> str:
    there = "" if rings["exists"] else " (made when needed)"
    kind = rings["file_system"] or "of an unknown file system"
    memory = "" if kind == "tmpfs" else ", which is not memory"
    return (
        f"{rings['directory']}{there}: {kind}{memory}, {_mib(rings['free_bytes'])} free;"
        f" a ring takes {_mib(rings['ring_bytes'])} for each process of an engine"
    )


def _points(engine: Mapping[str, Any]) -> list[Part]:
    """The hook points of an engine, a table for each module, and then those that cannot be used."""
    shown: list[Part] = []
    modules = dict.fromkeys((point["process"], point["target"].partition(":")[0]) for point in engine["points"])
    for process, module in modules:
        rows = [
            [
                plain(text)
                for text in (
                    point["target"].partition(":")[2],
                    "always" if point["level"] == Level.OFF.name.lower() else point["level"],
                    "yes" if point["found"] else ABSENT if point["status"] == ABSENT else "no",
                    ("matches" if point["matches"] else "differs") if point["found"] else MISSING,
                    point["gives"],
                )
            ]
            for point in engine["points"]
            if (point["process"], point["target"].partition(":")[0]) == (process, module)
        ]
        columns = ("hook point", "level", "found", "signature", "gives")
        shown.append(Grid(plain(f"{module} ({process})"), columns, rows, text=True))
    rows = [
        [plain(text) for text in (point["target"], point["why"], _weight(point, engine))]
        for point in engine["points"]
        if point["why"] and not point["matches"]
    ]
    if rows:
        shown.append(Grid("Hook points that do not fit", ("hook point", "why", ""), rows, text=True))
    return shown


def _weight(point: Mapping[str, Any], engine: Mapping[str, Any]) -> str:
    if point["target"] in engine["unusable"]:
        return ""
    if point["target"] in engine["lost"]:
        return "lost in this version"
    return "not needed: another gives the same" if point["status"] != ABSENT else "not needed in this version"


# A session


def session_view(session: Session, rings: Mapping[str, tuple[bool, Mapping[str, int]]]) -> dict[str, Any]:
    """The JSON object of a session: what its processes said.

    `rings` has the rings that lie on this host, by name: whether the process lives, and slots by ring. `status` is the
    command's exit status. Raises SessionError when the manifest cannot be read.
    """
    manifest = session.read_manifest()
    troubles = hook_troubles(manifest.processes)
    known = {(trouble.name, trouble.status, trouble.why) for trouble in troubles}
    processes = [_process_view(process, manifest, rings.get(process.ring), known) for process in manifest.processes]
    unread = rings.keys() - {process.ring for process in manifest.processes}
    messages = [_UNREAD.format(count=len(unread), path=session.path)] if unread else []
    if not processes and not unread:
        messages.append(_NO_PROCESS)
    told = ((process_name(process), mark_info(process)) for process in manifest.processes)
    messages += advice((name, info) for name, info in told if info is not None)
    failed = any(trouble.status in _FAILED for trouble in troubles)
    return {
        "version": JSON_VERSION,
        "status": UNKNOWN if not processes else UNUSABLE if failed else USABLE,
        "troubles": messages,
        "session": {
            "path": str(session.path),
            "id": manifest.session,
            "level": manifest.level,
            "complete": manifest.complete,
        },
        "processes": processes,
        "losses": lost_by_reason(manifest),
    }


def _process_view(
    process: Process,
    manifest: Manifest,
    on_disk: tuple[bool, Mapping[str, int]] | None,
    troubles: set[tuple[str, str, str]],
) -> dict[str, Any]:
    alive = False if process.ended else on_disk[0] if on_disk else None
    slots = on_disk[1] if on_disk else {}
    seconds = observed_seconds(process, manifest)
    return {
        "role": process.role,
        "pid": process.pid,
        "host": process.host,
        "alive": alive,
        "engine": str(process.info.get("engine", "")),
        "engine_version": str(process.info.get("engine_version", "")),
        "hooks_installed": sum(hook.get("status") == INSTALLED for hook in process.hooks),
        "hooks_not_installed": [
            {name: hook.get(name, "") for name in ("name", "status", "why", "gives")}
            for hook in process.hooks
            if (hook.get("name", ""), hook.get("status", ""), hook.get("why", "")) in troubles
        ],
        "errors": dict(sorted(process.errors.items())),
        "not_visible_under_compile": list(not_visible_of(process)),
        "device_time": _device_time_view(process),
        "marks": None if (marks := mark_info(process)) is None else info_dict(marks),
        "rings": [
            _ring_view(losses, slots.get(losses.ring) or losses.slots or None, seconds)
            for losses in manifest.losses
            if losses.process == process.key
        ],
    }


def _device_time_view(process: Process) -> dict[str, Any] | None:
    """How a rank's device is timed, and what was amiss; None where it is not one that is."""
    told = process.info.get("device_time")
    if not isinstance(told, dict):
        return None
    counts = {name: told.get(name) for name in _AMISS}
    return {"by": str(told.get("by", ""))} | {name: n if isinstance(n, int) else 0 for name, n in counts.items()}


def observed_seconds(process: Process, manifest: Manifest) -> float | None:
    """Seconds from a process's start to the manifest's last word of it; None where its clock has no anchor."""
    if not manifest.anchors:
        return None
    monotonic, wall = manifest.anchors[-1]
    seconds = (monotonic + manifest.updated_ns - wall - process.started_ns) / 1e9
    return seconds if seconds > 0 else None


def _ring_view(losses: Losses, slots: int | None, seconds: float | None) -> dict[str, Any]:
    """A ring: its size, and how many seconds of recording it holds at the mean rate so far."""
    written = losses.read + losses.overwritten + losses.torn + losses.unfinished + losses.corrupt
    rate = written / seconds if seconds and written else None
    return {
        "ring": losses.ring,
        "slots": slots,
        "bytes": None if slots is None else slots * records.SLOT_SIZE,
        "slots_per_s": rate,
        "holds_s": None if slots is None or rate is None else slots / rate,
        "read": losses.read,
        "losses": {reason: getattr(losses, reason) for reason in LOSS_REASONS},
    }


def session_parts(view: Mapping[str, Any]) -> list[Part]:
    """What is shown of a session, in order. All strings are safe to show."""
    session, processes = view["session"], view["processes"]
    state = "ended" if session["complete"] else "still recording, or its collector was stopped"
    head = [("session", session["path"]), ("level", session["level"]), ("state", state)]
    shown: list[Part] = [Grid("stagetrace doctor", ("", ""), [(name, plain(text)) for name, text in head], text=True)]
    shown += [message_text(trouble) for trouble in view["troubles"]]
    if not processes:
        return shown
    rows = [
        _safe(
            *_names(each),
            _STATES[each["alive"]],
            each["host"],
            f"{each['engine']} {each['engine_version']}".strip() or MISSING,
            each["hooks_installed"],
            len(each["hooks_not_installed"]),
            sum(each["errors"].values()),
        )
        for each in processes
    ]
    columns = ("process", "pid", "state", "host", "engine", "hooks installed", "not installed", "errors")
    shown.append(Grid("Processes", columns, rows, text=True))
    rows = [
        _safe(*_names(each), hook["name"], hook["status"], hook["why"])
        for each in processes
        for hook in each["hooks_not_installed"]
    ]
    if rows:
        shown.append(Grid("Hooks that are not installed", ("process", "pid", "hook", "status", "why"), rows, text=True))
    rows = [_safe(*_names(each), name, count) for each in processes for name, count in each["errors"].items()]
    if rows:
        shown.append(Grid("Errors of stagetrace's own, contained", ("process", "pid", "hook", "errors"), rows, True))
    rows = [
        _safe(*_names(each), ", ".join(each["not_visible_under_compile"]))
        for each in processes
        if each["not_visible_under_compile"]
    ]
    if rows:
        shown.append(Grid("Not visible under compile", ("process", "pid", "stages"), rows, text=True))
    timed = [(each, each["device_time"]) for each in processes if each["device_time"]]
    if timed:
        rows = [_safe(*_names(each), told["by"], *(told[name] for name in _AMISS)) for each, told in timed]
        shown.append(Grid("Devices are timed", ("process", "pid", "by", "left out", *_AMISS[1:]), rows, text=True))
    rows = [_safe(*_names(each), *_mark_cells(each["marks"])) for each in processes if each["marks"]]
    if rows:
        mark_columns = ("process", "pid", "by", "around", "in layers", "marks a step", "an empty span", "not told")
        shown.append(Grid("Marks on devices", mark_columns, rows, text=True))
    rows = [_safe(*_names(each), *_ring_cells(one)) for each in processes for one in each["rings"]]
    ring_columns = ("process", "pid", "ring", "slots", "MiB", "holds", "slots read", "losses")
    shown.append(
        Grid("Rings, and how long a recording they hold at the mean rate so far", ring_columns, rows, text=True)
    )
    if any(one["slots"] is None for each in processes for one in each["rings"]):
        shown.append("The size of a ring is known only while it is there: it is removed when its process has ended.")
    return shown


_STATES = {True: "alive", False: "ended", None: "not known: its ring is not here"}


def _names(process: Mapping[str, Any]) -> tuple[str, int]:
    return process["role"], process["pid"]


def _safe(*cells: object) -> list[str]:
    return [plain(str(cell)) for cell in cells]


def _mark_cells(told: Mapping[str, Any]) -> Iterable[object]:
    amiss = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in told["not_told"].items())
    layers = ", ".join(map(str, told["marked_layers"]))
    per_step = f"up to {told['marks_per_step']}" if told["marks_per_step"] else MISSING
    empty = MISSING if told["empty_ns"] is None else f"{told['empty_ns']} ns"
    return told["by"], ", ".join(told["stages"]) or MISSING, layers or MISSING, per_step, empty, amiss or "none"


def _ring_cells(one: Mapping[str, Any]) -> Iterable[object]:
    lost = ", ".join(f"{count} {reason}" for reason, count in one["losses"].items() if count)
    size = (one["slots"], f"{one['bytes'] / _MIB:.1f}") if one["slots"] else (MISSING, MISSING)
    if one["slots_per_s"] is None:
        holds = _NO_TRAFFIC
    elif one["holds_s"] is None:
        holds = f"{MISSING} ({one['slots_per_s']:.1f} slots/s)"
    else:
        holds = f"{time_text(one['holds_s'])} ({one['slots_per_s']:.1f} slots/s)"
    return one["ring"], *size, holds, one["read"], lost or "none"


def time_text(seconds: float) -> str:
    """A length of time in the unit that suits it, to about two digits."""
    for unit, size in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds / 86400:.0f} days"


def _mib(size: int) -> str:
    return f"{size / _MIB:.1f} MiB" if size < 10240 * _MIB else f"{size / 1024 / _MIB:.1f} GiB"
