"""A session's layout on disk: the one file that knows it.

    session.json                 identity: id and hash key, created once by whoever comes first (instrument/identity.py)
    manifest.json                what is known of engines, processes, clocks and losses; replaced as a whole
    raw/part-00000001.parquet    raw records, the session's truth; each part carries every ring's cursor
    tables/<name>/part-*.parquet derived tables: requests, states, members, steps, segments, intervals
    collector.log

Times in tables are integer nanoseconds on the host's monotonic clock; manifest.json has anchors to wall time.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stagetrace.instrument.identity import Identity, read_identity
from stagetrace.instrument.stages import MAX_ATTRIBUTES, STEP_COMPOSITION

MANIFEST_VERSION = 1
DEFAULT_ROOT = "stagetrace-sessions"

_ATTRIBUTES = [pa.field(f"a{i}", pa.int64()) for i in range(MAX_ATTRIBUTES)]
_I64 = pa.int64()
_ENCODINGS = {pa.int64(): "DELTA_BINARY_PACKED", pa.binary(128): "BYTE_STREAM_SPLIT"}

RAW_SCHEMA = pa.schema(
    [
        pa.field("process", _I64, nullable=False),  # the process's key: see Process
        pa.field("ring", pa.int8(), nullable=False),  # 0 control, 1 detail
        pa.field("slot", pa.binary(128), nullable=False),  # the slot as the engine wrote it (instrument/records.py)
    ]
)

# One row per request that ended, or that was open when its process died or the session ended. A null is a time that
# was not recorded; the sums of the states (`*_ns`) are null where the state was never entered.
REQUESTS_SCHEMA = pa.schema(
    [
        pa.field("handle", _I64, nullable=False),
        pa.field("request_id", pa.string()),  # the engine's own id
        pa.field("external_id", pa.string()),  # the id that the client sees
        pa.field("trace_id", pa.string(), nullable=False),  # 32 hex digits: the caller's, else derived
        pa.field("parent_span_id", pa.string()),  # 16 hex digits: the caller's span, null without a traceparent
        pa.field("trace_flags", pa.int16(), nullable=False),  # of the traceparent; 1 (sampled) without one
        pa.field("trace_state", pa.string()),
        pa.field("instance", _I64),  # the engine instance that served it
        pa.field("status", pa.string(), nullable=False),  # finished, aborted, error, lost, open
        pa.field("finish", pa.string(), nullable=False),  # stages.Finish, in lower case
        pa.field("partial", pa.bool_(), nullable=False),  # recording was switched, or its beginning was not recorded
        pa.field("prompt_tokens", _I64),
        pa.field("output_tokens", _I64),
        pa.field("cached_tokens", _I64),
        pa.field("max_tokens", _I64),
        pa.field("preemptions", _I64, nullable=False),
        pa.field("arrival_ns", _I64),  # arrival in the front end
        pa.field("dispatched_ns", _I64),  # sent to the engine
        pa.field("queued_ns", _I64),  # in the scheduler's queue
        pa.field("scheduled_ns", _I64),  # first scheduled
        pa.field("first_token_ns", _I64),  # the engine had the first token
        pa.field("first_output_ns", _I64),  # the front end had it
        pa.field("first_sent_ns", _I64),  # it was handed to the client's socket
        pa.field("last_token_ns", _I64),  # the engine had the last token
        pa.field("last_output_ns", _I64),  # the front end had it and saw that the request is finished
        pa.field("last_sent_ns", _I64),  # the last byte was handed to the client's socket
        pa.field("end_ns", _I64, nullable=False),  # the last time known of the request
        pa.field("tokenize_ns", _I64),
        pa.field("dispatch_ns", _I64),
        pa.field("queue_ns", _I64),
        pa.field("prefill_ns", _I64),
        pa.field("decode_ns", _I64),
        pa.field("preempted_ns", _I64),
        pa.field("output_ns", _I64),
    ]
)

# One row per state of a request, prefill chunks included (their parent is the prefill state that holds them).
STATES_SCHEMA = pa.schema(
    [
        pa.field("handle", _I64, nullable=False),
        pa.field("stage", pa.int16(), nullable=False),  # a stage id of kind state
        pa.field("begin_ns", _I64, nullable=False),
        pa.field("end_ns", _I64, nullable=False),
        pa.field("instance", _I64),
        pa.field("step", _I64),  # the step at which the state began; for a chunk its step
        *_ATTRIBUTES,
    ]
)

# Runs of consecutive steps that a request took part in: first and last step, both included.
MEMBERS_SCHEMA = pa.schema(
    [
        pa.field("handle", _I64, nullable=False),
        pa.field("instance", _I64, nullable=False),
        pa.field("first_step", _I64, nullable=False),
        pa.field("last_step", _I64, nullable=False),
    ]
)

STEPS_SCHEMA = pa.schema(
    [
        pa.field("instance", _I64, nullable=False),
        pa.field("step", _I64, nullable=False),
        pa.field("process", _I64, nullable=False),
        pa.field("thread", _I64, nullable=False),
        pa.field("phase", pa.string(), nullable=False),  # prefill, decode, mixed
        pa.field("status", pa.string(), nullable=False),  # complete, incomplete, ranks_missing, partial
        pa.field("begin_ns", _I64, nullable=False),
        pa.field("scheduled_ns", _I64, nullable=False),  # end of schedule
        pa.field("end_ns", _I64, nullable=False),
        pa.field("unattributed_ns", _I64, nullable=False),  # of the step, on the scheduler's timeline: in no segment
        pa.field("ranks_expected", pa.int32(), nullable=False),
        pa.field("ranks_reported", pa.int32(), nullable=False),
        pa.field("members", pa.int32()),  # requests in the step; null while membership is unknown
        *[pa.field(attribute.name, _I64, nullable=False) for attribute in STEP_COMPOSITION],
        pa.field("output_tokens", _I64),  # tokens that the step's requests received; null while membership is unknown
    ]
)

# One row per segment, envelope rank_step and occasion. `parent` is the sequence number, in the same process, of the
# segment that holds it, or null: then its parent is the step, if it has one.
SEGMENTS_SCHEMA = pa.schema(
    [
        pa.field("process", _I64, nullable=False),
        pa.field("sequence", _I64, nullable=False),  # of the record in its ring: unique within the process
        pa.field("thread", _I64, nullable=False),  # with the process: the timeline
        pa.field("stage", pa.int16(), nullable=False),
        pa.field("begin_ns", _I64, nullable=False),
        pa.field("end_ns", _I64, nullable=False),
        pa.field("self_ns", _I64, nullable=False),  # its time less that of the segments directly inside it
        pa.field("parent", _I64),
        pa.field("parent_stage", pa.int16()),
        pa.field("instance", _I64),
        pa.field("step", _I64),
        pa.field("phase", pa.string()),  # of its step
        *_ATTRIBUTES,
    ]
)

# Inter-token intervals of requests in decode, as the engine had the tokens: how many requests waited how long for the
# token that a step gave them. Weighted by `tokens` they are the distribution of inter-token latency.
INTERVALS_SCHEMA = pa.schema(
    [
        pa.field("instance", _I64, nullable=False),
        pa.field("step", _I64, nullable=False),
        pa.field("phase", pa.string(), nullable=False),
        pa.field("interval_ns", _I64, nullable=False),
        pa.field("tokens", _I64, nullable=False),
    ]
)

TABLES: dict[str, pa.Schema] = {
    "requests": REQUESTS_SCHEMA,
    "states": STATES_SCHEMA,
    "members": MEMBERS_SCHEMA,
    "steps": STEPS_SCHEMA,
    "segments": SEGMENTS_SCHEMA,
    "intervals": INTERVALS_SCHEMA,
}


class SessionError(Exception):
    """A session that cannot be read; the message says what to do."""


@dataclass
class Process:
    """One instrumented process. `key` names it in the tables; it is a hash of its ring's name."""

    key: int
    ring: str
    role: str
    pid: int
    host: str
    started_ns: int  # monotonic
    ended: bool = False
    info: dict[str, Any] = field(default_factory=dict)  # engine, version, model, flags, ranks
    hooks: list[dict[str, str]] = field(default_factory=list)  # name, status (installed, missing, ...), why, gives
    errors: dict[str, int] = field(default_factory=dict)  # contained errors of ours, by hook


@dataclass
class Losses:
    """What of one ring did not reach the session, by reason; in slots, but for `dropped` (records).

    What was read and turned out to be no record is in the manifest's counts: `corrupt` slots, `incomplete` records.
    """

    process: int
    ring: str
    slots: int = 0  # size of the ring
    read: int = 0
    overwritten: int = 0
    dropped: int = 0
    torn: int = 0
    unfinished: int = 0
    corrupt: int = 0

    @property
    def lost(self) -> int:
        """Everything but what was read."""
        return self.overwritten + self.dropped + self.torn + self.unfinished + self.corrupt


@dataclass
class Manifest:
    """manifest.json: everything about a session that is not a table."""

    version: int = MANIFEST_VERSION
    session: str = ""
    host: str = ""
    command: list[str] = field(default_factory=list)
    level: str = "step"
    started_ns: int = 0  # wall
    updated_ns: int = 0  # wall
    complete: bool = False  # the collector ended in order
    anchors: list[tuple[int, int]] = field(default_factory=list)  # (monotonic ns, wall ns)
    processes: list[Process] = field(default_factory=list)
    losses: list[Losses] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # accounting_conflict, spans exported, ...


class Session:
    """A session directory, for writing by the collector and reading by the analysis."""

    def __init__(self, path: Path, identity: Identity):
        self.path = path
        self.identity = identity

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Session:
        """The session at `path`. Raises SessionError when there is none."""
        root = Path(path)
        identity = read_identity(root)
        if identity is None:
            raise SessionError(
                f"{root} is not a stagetrace session: it has no readable session.json."
                " Name the directory that `stagetrace run` printed."
            )
        return cls(root, identity)

    @classmethod
    def newest(cls, root: str | os.PathLike[str] = DEFAULT_ROOT) -> Session:
        """The session under `root` that was started last. Raises SessionError when there is none."""
        sessions = [path for path in Path(root).glob("*") if (path / "session.json").is_file()]
        if not sessions:
            raise SessionError(
                f"there is no session under {Path(root).resolve()}: record one with"
                " `stagetrace run -- COMMAND`, or name a session's directory."
            )
        return cls.open(max(sessions, key=lambda path: (path / "session.json").stat().st_mtime_ns))

    @property
    def log(self) -> Path:
        """The collector's log file."""
        return self.path / "collector.log"

    # Manifest

    def read_manifest(self) -> Manifest:
        """The manifest, or an empty one before the collector's first commit. Raises SessionError if it is broken."""
        try:
            data = json.loads((self.path / "manifest.json").read_text("utf-8"))
        except FileNotFoundError:
            return Manifest(session=self.identity.session)
        except ValueError as error:
            raise SessionError(f"{self.path / 'manifest.json'} is not JSON ({error})") from error
        if data.get("version") != MANIFEST_VERSION:
            raise SessionError(
                f"{self.path} was written by another version of stagetrace"
                f" (manifest version {data.get('version')}, this is {MANIFEST_VERSION})"
            )
        data["processes"] = [Process(**process) for process in data["processes"]]
        data["losses"] = [Losses(**losses) for losses in data["losses"]]
        data["anchors"] = [(int(monotonic), int(wall)) for monotonic, wall in data["anchors"]]
        return Manifest(**data)

    def write_manifest(self, manifest: Manifest) -> None:
        """Replaces the manifest as a whole."""
        manifest.updated_ns = time.time_ns()
        text = json.dumps(asdict(manifest), indent=1, ensure_ascii=False)
        replace(self.path / "manifest.json", text.encode("utf-8"))

    # Raw records

    def raw_parts(self) -> list[Path]:
        """The committed parts of raw records, oldest first."""
        return _parts(self.path / "raw")

    def write_raw(self, table: pa.Table, cursors: dict[str, list[int]], number: int) -> None:
        """Commits one part of raw records with every ring's cursor: all of it or nothing is seen."""
        metadata = {b"stagetrace.cursors": json.dumps(cursors).encode()}
        _write_part(self.path / "raw", table.replace_schema_metadata(metadata), number)

    def read_raw(self, part: Path) -> tuple[pa.Table, dict[str, list[int]]]:
        """One part of raw records and the cursors after it, by ring name: [control, detail]."""
        table = pq.read_table(part)
        return table, json.loads((table.schema.metadata or {}).get(b"stagetrace.cursors", b"{}"))

    # Derived tables

    def write_table(self, name: str, table: pa.Table, number: int) -> None:
        """Commits one part of a derived table; an empty one leaves no file."""
        if table.num_rows:
            _write_part(self.path / "tables" / name, table, number)

    def read_table(self, name: str, columns: list[str] | None = None, committed_ns: int | None = None) -> pa.Table:
        """A derived table in the order of its parts; empty (with its schema) when nothing was derived yet.

        With `committed_ns` (wall clock) parts that were committed before it are left out, but for the newest: a table
        that is read as empty is empty.
        """
        schema = TABLES[name]
        if columns is not None:
            schema = pa.schema([schema.field(column) for column in columns])
        directory = self.path / "tables" / name
        parts = [pq.read_table(part, columns=columns) for part in _parts(directory, committed_ns)]
        return (
            pa.concat_tables([part.select(schema.names).cast(schema) for part in parts])
            if parts
            else schema.empty_table()
        )

    def clear_tables(self) -> None:
        """Removes the derived tables, before they are rebuilt from the raw records."""
        for name in TABLES:
            for part in _parts(self.path / "tables" / name):
                part.unlink()


def _parts(directory: Path, committed_ns: int | None = None) -> list[Path]:
    """The parts in a directory, oldest first; with `committed_ns` (wall clock) the newest and those since then."""
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries if fnmatchcase(entry.name, "part-*.parquet"))
    except FileNotFoundError:
        return []
    first = 0
    if committed_ns is not None and names:  # from the newest back: a long session has many
        first = len(names) - 1
        while first and (directory / names[first - 1]).stat().st_mtime_ns >= committed_ns:
            first -= 1
    return [directory / name for name in names[first:]]


def _write_part(directory: Path, table: pa.Table, number: int) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    final = directory / f"part-{number:08}.parquet"
    partial = final.with_suffix(".partial")
    # Times and numbers grow: their differences take half the room of a dictionary, and a third less time to write.
    encodings = {field.name: _ENCODINGS[field.type] for field in table.schema if field.type in _ENCODINGS}
    named = [name for name in table.schema.names if name not in encodings]
    pq.write_table(table, partial, compression="zstd", use_dictionary=named, column_encoding=encodings)
    partial.replace(final)


def replace(path: Path, data: bytes) -> None:
    """Writes a file so that readers see the old or the new one, whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def new_session_path(root: str | os.PathLike[str] = DEFAULT_ROOT) -> Path:
    """A fresh directory name under `root`: the local time, with a number where two begin in the same second."""
    stem = time.strftime("%Y%m%d-%H%M%S")
    path = Path(root) / stem
    number = 1
    while path.exists():
        number += 1
        path = Path(root) / f"{stem}-{number}"
    return path
