"""A session's layout on disk: the one file that knows it.

    session.json                 identity: id and hash key, created once by whoever comes first (instrument/identity.py)
    manifest.json                what is known of engines, processes, clocks and losses; replaced as a whole
    raw/part-*.parquet           raw records, the session's truth; each commit carries every ring's cursor
    tables/<name>/part-*.parquet derived tables: requests, states, members, steps, segments, intervals, experts
    exports/<name>.json          how far a backend has been sent the tables
    level, switches.jsonl        the level as last switched, and every switch (exporters/control.py)
    collector.log

Parts have the numbers of the commits in them (parts.py). What a table's part N holds follows from the commits up to N
alone, so that replaying them gives the same parts again. Times in tables are integer nanoseconds on the host's
monotonic clock; manifest.json has anchors to wall time.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from stagetrace.instrument.identity import Identity, read_identity
from stagetrace.instrument.kernel_request import KERNEL_DIRECTORY
from stagetrace.instrument.stages import MAX_ATTRIBUTES, QUEUE_CAUSES, STEP_COMPOSITION

from .parts import BLOCK, END, Part, list_parts, merge_block, read_part, remove_within, write_part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_Piece = TypeVar("_Piece")

MANIFEST_VERSION = 2
ANCHOR_NS = 1_000_000  # by which wall and monotonic clock drift apart before that is noted
DEFAULT_ROOT = "stagetrace-sessions"

_ATTRIBUTES = [pa.field(f"a{i}", pa.int64()) for i in range(MAX_ATTRIBUTES)]
_I64 = pa.int64()

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
        # Of one of several answers to one request (n > 1), which have one external_id; null for others.
        pa.field("parent", _I64),  # the parent's handle
        pa.field("child", _I64),  # which answer, from 0
        pa.field("children", _I64),  # how many there are
        pa.field("lora", pa.string()),  # name of the adapter; null for the base model
        pa.field("priority", _I64),
        pa.field("status", pa.string(), nullable=False),  # finished, aborted, error, lost, open
        pa.field("finish", pa.string(), nullable=False),  # stages.Finish, in lower case
        pa.field("refused", _I64),  # the HTTP status, where the front end refused it and no engine has seen it
        pa.field("partial", pa.bool_(), nullable=False),  # recording was switched, or its beginning was not recorded
        pa.field("prompt_tokens", _I64),
        pa.field("output_tokens", _I64),
        pa.field("cached_tokens", _I64),  # of the prompt: found in a cache, those from outside the engine included
        pa.field("external_tokens", _I64),  # of these: from outside the engine
        pa.field("draft_tokens", _I64),  # speculative tokens that were verified; null where the engine keeps no count
        pa.field("accepted_tokens", _I64),  # of these: accepted
        pa.field("max_tokens", _I64),
        pa.field("preemptions", _I64, nullable=False),
        pa.field("received_ns", _I64),  # the head of its HTTP request was read; null where it did not come by HTTP
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
        pa.field("response_bytes", _I64),  # of the HTTP response's body
        pa.field("unsent_bytes", _I64),  # at last_sent_ns: those that the client's kernel had not acknowledged
        pa.field("end_ns", _I64, nullable=False),  # the last time known of the request
        pa.field("tokenize_ns", _I64),
        pa.field("dispatch_ns", _I64),
        pa.field("queue_ns", _I64),
        # Of the queue: until its grammar was compiled; then, where the engine says, by what held it back. What is left
        # it waited for its turn, or for what the engine does not say.
        pa.field("grammar_ns", _I64),
        *[pa.field(f"{cause.name.lower()}_ns", _I64) for cause in QUEUE_CAUSES],
        pa.field("kv_transfer_ns", _I64),
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
        pa.field("accepted_tokens", _I64, nullable=False),  # of the draft tokens
        pa.field("padded_tokens", _I64),  # what the forward pass ran on; null where the engine does not say
        pa.field("graph_mode", pa.string()),  # none, piecewise, full; null where the engine does not say
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
        pa.field("partial", pa.bool_(), nullable=False),  # recording at its level was switched during its step
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

# How many tokens a layer sent to each expert in a step. Several rows of one layer and step, of several ranks too, are
# of different tokens: they add up.
EXPERTS_SCHEMA = pa.schema(
    [
        pa.field("process", _I64, nullable=False),
        pa.field("instance", _I64, nullable=False),
        pa.field("step", _I64, nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("tokens", _I64, nullable=False),  # that were routed
        pa.field("counts", pa.list_(pa.field("element", _I64, nullable=False)), nullable=False),  # by logical expert
    ]
)

TABLES: dict[str, pa.Schema] = {
    "requests": REQUESTS_SCHEMA,
    "states": STATES_SCHEMA,
    "members": MEMBERS_SCHEMA,
    "steps": STEPS_SCHEMA,
    "segments": SEGMENTS_SCHEMA,
    "intervals": INTERVALS_SCHEMA,
    "experts": EXPERTS_SCHEMA,
}


class SessionError(Exception):
    """A session that cannot be read; the message says what to do."""


class ManifestDamaged(SessionError):
    """The manifest cannot be read, though it is of this version: the raw records can make another."""


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
    last_commit: int = 0  # the last one that has records of it
    info: dict[str, Any] = field(default_factory=dict)  # engine, version, model, flags, ranks
    hooks: list[dict[str, str]] = field(default_factory=list)  # name, status (installed, missing, ...), why, gives
    errors: dict[str, int] = field(default_factory=dict)  # contained errors of ours, by hook


def names_of(processes: Iterable[Process]) -> dict[int, str]:
    """What the handles in processes' records stand for, as far as they said."""
    found = {}
    for process in processes:
        names = process.info.get("names")
        for handle, name in names.items() if isinstance(names, dict) else ():
            if str(handle).isdecimal():
                found[int(handle)] = str(name)
    return found


def not_visible_of(process: Process) -> tuple[str, ...]:
    """The layer level's stages that a compiler has put into the graphs of a worker, as far as it said."""
    told = process.info.get("not_visible_under_compile")
    return tuple(str(name) for name in told) if isinstance(told, list) else ()


@dataclass
class Losses:
    """What of one ring did not reach the session, by reason; in slots, but for `dropped` (records).

    `given_up` was read and could not be written: the disk was full for longer than memory holds, newest detail first.
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
    given_up: int = 0

    @property
    def lost(self) -> int:
        """Everything but what was read."""
        return self.overwritten + self.dropped + self.torn + self.unfinished + self.corrupt + self.given_up


FATES = tuple(each.name for each in fields(Losses) if each.name not in ("process", "ring", "slots"))  # `read` is one


@dataclass
class RingMark:
    """How far a ring was read at a commit, and what it had lost by then."""

    cursors: list[int]  # numbers of the next slots to read: control, detail
    losses: list[Losses]


@dataclass
class BatchMark:
    """One poll of one ring in a commit: so many rows of control, then of detail; the rest as in drain.Batch."""

    process: int
    control: int
    detail: int
    gap: bool = False
    gap_end: int = 0
    ended: bool = False


@dataclass
class Commit:
    """What a commit of raw records says beside them: enough to go on behind it, and to derive its tables again."""

    number: int
    taken_ns: int  # monotonic: the time as of which tables were derived
    wall_ns: int
    switches: int = 0  # of the level that were known then
    batches: list[BatchMark] = field(default_factory=list)
    rings: dict[str, RingMark] = field(default_factory=dict)  # by file name: those that were still in place
    counts: dict[str, int] = field(default_factory=dict)  # of the assembly, before this commit

    @property
    def slots(self) -> int:
        """How many rows of raw records it has."""
        return sum(batch.control + batch.detail for batch in self.batches)


@dataclass
class Export:
    """exports/<name>.json: how far one backend has been sent the tables."""

    target: str  # where to and how, without credentials
    commit: int = 0  # the last one whose tables it has
    end: bool = False  # whether it has what was open at the end
    sent: int = 0  # spans that the backend confirmed
    refused: int = 0  # spans that it would not take while it took others
    left_out: dict[str, int] = field(default_factory=dict)  # rows that become no spans, by reason
    trouble: str = ""  # why nothing arrives at present
    counted: dict[str, int] = field(default_factory=dict)  # totals that its metrics were told as what was added
    counted_ns: int = 0  # wall: when


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
    derived: int = 0  # number of the last commit whose tables are all written
    rotated: int = 0  # number of the last commit that was removed to keep the session within its bounds
    rotated_ns: int = 0  # wall: until when that removed
    anchors: list[tuple[int, int]] = field(default_factory=list)  # (monotonic ns, wall ns)
    processes: list[Process] = field(default_factory=list)
    losses: list[Losses] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # accounting_conflict, corrupt, slots_rotated, ...

    def note_clocks(self, monotonic_ns: int, wall_ns: int) -> None:
        """Notes an anchor where the clocks have drifted apart, or the wall clock was set, since the last one."""
        if self.anchors:
            before, then = self.anchors[-1]
            if abs((wall_ns - monotonic_ns) - (then - before)) <= ANCHOR_NS:
                return
        self.anchors.append((monotonic_ns, wall_ns))


class Session:
    """A session directory, for writing by the collector and reading by the analysis."""

    def __init__(self, path: Path, identity: Identity):
        self.path = path
        self.identity = identity
        self._derived = path / "tables"
        self._merged: set[int] = set()  # blocks that are known to be merged

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
        """The manifest, or an empty one before the collector's first commit.

        Raises ManifestDamaged, and SessionError for one that is of another version or may not be read.
        """
        path = self.path / "manifest.json"
        remedy = f"`stagetrace rebuild {self.path}` makes a new one from the raw records"
        try:
            data = json.loads(path.read_text("utf-8", "replace"))
        except FileNotFoundError:
            return Manifest(session=self.identity.session)
        except OSError as error:
            raise SessionError(f"{path} cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise ManifestDamaged(f"{path} is not JSON ({error}): {remedy}") from error
        if isinstance(data, dict) and data.get("version") != MANIFEST_VERSION:
            raise SessionError(
                f"{self.path} was written by another version of stagetrace"
                f" (manifest version {data.get('version')}, this is {MANIFEST_VERSION})"
            )
        try:
            data["processes"] = [_checked(Process(**process)) for process in data["processes"]]
            data["losses"] = [_checked(Losses(**losses)) for losses in data["losses"]]
            data["anchors"] = [(int(monotonic), int(wall)) for monotonic, wall in data["anchors"]]
            return _checked(Manifest(**data))
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise ManifestDamaged(f"{path} is damaged ({type(error).__name__}: {error}): {remedy}") from error

    def write_manifest(self, manifest: Manifest, updated_ns: int | None = None) -> None:
        """Replaces the manifest as a whole; what it says is known as of now, or of `updated_ns` (wall)."""
        manifest.updated_ns = time.time_ns() if updated_ns is None else updated_ns
        text = json.dumps(asdict(manifest), indent=1, ensure_ascii=False)
        replace(self.path / "manifest.json", text.encode("utf-8", "replace"))

    def set_manifest_aside(self) -> Path:
        """Renames a damaged manifest; says how it is called now."""
        path = self.path / "manifest.json"
        aside = path.with_suffix(".json.damaged")
        path.replace(aside)
        return aside

    # The model

    @property
    def model_config(self) -> Path:
        """The config.json of the model that was served, as the collector found it; it need not be there."""
        return self.path / "model" / "config.json"

    def keep_model_config(self, content: bytes) -> None:
        """Keeps the model's config.json. Raises OSError."""
        self.model_config.parent.mkdir(mode=0o700, exist_ok=True)
        replace(self.model_config, content)

    def kernel_window(self, number: int | None = None) -> Path:
        """The folder of a kernel window, or of the newest one that has a trace. Raises SessionError for none."""
        found = (self.path / KERNEL_DIRECTORY).glob("*/*.trace.json")
        numbers = {int(path.parent.name) for path in found if path.parent.name.isdecimal()}
        if not numbers or (number is not None and number not in numbers):
            which = "" if number is None else f" {number} that has a trace"
            raise SessionError(
                f"{self.path} has no kernel window{which}: open one with `stagetrace ctl kernel` while its server runs"
            )
        return self.path / KERNEL_DIRECTORY / str(max(numbers) if number is None else number)

    # Raw records

    @property
    def _raw(self) -> Path:
        return self.path / "raw"

    def _tables(self, name: str) -> Path:
        return self._derived / name

    def raw_parts(self) -> list[Part]:
        """The committed parts of raw records, oldest first."""
        return list_parts(self._raw)

    def write_raw(self, table: pa.Table, commit: Commit) -> None:
        """Commits raw records (rows of RAW_SCHEMA): all of them or nothing is seen. Raises OSError."""
        write_part(self._raw, table, commit.number, {_COMMITS: json.dumps([asdict(commit)]).encode()})

    def read_commits(self, part: Part) -> list[Commit]:
        """What the commits in a part of raw records say, oldest first. Raises SessionError for a damaged part."""
        try:
            data = json.loads((pq.read_metadata(part.path).metadata or {})[_COMMITS])
            return [_commit(each) for each in data]
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SessionError(f"{part.path} is damaged ({type(error).__name__}: {error})") from error

    def read_raw(self, part: Part) -> Iterator[tuple[Commit, pa.Table]]:
        """The commits in a part and their records. Raises SessionError for a damaged part."""
        commits = self.read_commits(part)
        group = 0
        try:
            with pq.ParquetFile(part.path) as file:
                for commit in commits:
                    table = RAW_SCHEMA.empty_table()
                    if commit.slots:
                        table = file.read_row_group(group).replace_schema_metadata(None).cast(RAW_SCHEMA)
                        group += 1
                    if table.num_rows != commit.slots or table["slot"].null_count:
                        raise SessionError(f"{part.path} is damaged: a commit of it has not the records that it names")
                    yield commit, table
        except (pa.ArrowException, OSError, ValueError) as error:
            raise SessionError(f"{part.path} is damaged ({type(error).__name__}: {error})") from error

    def set_aside(self, part: Part) -> Path:
        """Renames a damaged part, so that it is neither read nor written over; says how it is called now."""
        aside = part.path.with_suffix(".damaged")
        part.path.replace(aside)
        return aside

    # Derived tables

    def write_table(self, name: str, table: pa.Table, number: int) -> None:
        """Writes one part of a derived table; an empty one leaves no file. Raises OSError."""
        if table.num_rows:
            write_part(self._tables(name), table, number)

    def read_table(
        self,
        name: str,
        columns: list[str] | None = None,
        committed_ns: int | None = None,
        numbers: tuple[int, int] | None = None,
    ) -> pa.Table:
        """A derived table in the order of its parts; empty (with its schema) when nothing was derived yet.

        With `committed_ns` (wall clock) parts that were committed before it are left out, but for the newest: a table
        that is read as empty is empty. With `numbers` it is what the commits from the first to the second
        gave. Raises SessionError for a damaged part.
        """
        schema = _chosen(name, columns)
        pieces = self.read_pieces(name, lambda piece: piece, columns, committed_ns, numbers)
        return pa.concat_tables(pieces) if pieces else schema.empty_table()

    def read_pieces(
        self,
        name: str,
        made: Callable[[pa.Table], _Piece],
        columns: list[str] | None = None,
        committed_ns: int | None = None,
        numbers: tuple[int, int] | None = None,
    ) -> list[_Piece]:
        """What `made` makes of each part of a table, in order, so that no more than one part need be held as it is.

        The rest as in read_table. Raises SessionError for a damaged part.
        """
        schema = _chosen(name, columns)
        for attempt in range(_ATTEMPTS):  # a part may be merged or removed between looking and reading
            try:
                parts = list_parts(self._tables(name))
                if committed_ns is not None:
                    parts = _since(parts, committed_ns)
                first, last = numbers or (0, END)
                parts = [part for part in parts if part.last >= first and part.first <= last]
                return [made(self._piece(name, read_part(part, first, last, columns), schema)) for part in parts]
            except FileNotFoundError:
                if attempt == _ATTEMPTS - 1:
                    raise
            except (pa.ArrowException, OSError, ValueError) as error:
                raise SessionError(
                    f"{self.path}: a file under tables/{name} is damaged ({error}):"
                    f" `stagetrace rebuild {self.path}` derives it again"
                ) from error
        return []

    def _piece(self, name: str, part: pa.Table, schema: pa.Schema) -> pa.Table:
        try:
            return part.select(schema.names).cast(schema)
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise SessionError(
                f"{self.path}: a file under tables/{name} has other columns ({error}):"
                f" `stagetrace rebuild {self.path}` derives it again"
            ) from error

    @contextmanager
    def new_tables(self) -> Iterator[Session]:
        """The same session with empty tables to write; they take the place of its own when the body has ended well.

        Raises OSError.
        """
        fresh = Session(self.path, self.identity)
        fresh._derived = self.path / "tables.new"
        shutil.rmtree(fresh._derived, ignore_errors=True)
        try:
            yield fresh
            old = self.path / "tables.old"
            shutil.rmtree(old, ignore_errors=True)
            if self._derived.exists():
                self._derived.rename(old)
            if fresh._derived.exists():
                fresh._derived.rename(self._derived)
            shutil.rmtree(old, ignore_errors=True)
            self._merged.clear()
        finally:
            shutil.rmtree(fresh._derived, ignore_errors=True)

    def remove_tables(self, first: int, last: int = END) -> None:
        """Removes what the tables hold of the commits from `first` to `last`; by default to the end, which is END."""
        for name in TABLES:
            for part in list_parts(self._tables(name)):
                if first <= part.first and part.last <= last:
                    part.path.unlink(missing_ok=True)

    def check_tables(self) -> None:
        """Raises SessionError where there is nothing to read: no records yet, or records without their tables."""
        derived = self.read_manifest().derived
        if not derived and not self.raw_parts():
            raise SessionError(f"{self.path} has no records yet")
        if derived and not self._derived.is_dir():
            raise SessionError(
                f"{self.path} has records and no tables: `stagetrace rebuild {self.path}` derives them again"
            )

    def table_files(self, name: str) -> list[Path]:
        """The Parquet files of a derived table, in order: for queries that read them themselves."""
        return [part.path for part in list_parts(self._tables(name))]

    # As it grows

    def merge(self, last: int) -> None:
        """Merges whole blocks of commits up to `last` into one part each.

        Raises SessionError for a damaged part, OSError or pyarrow's errors; what was there is unchanged then.
        """
        blocks = [block for block in range(last // BLOCK) if block not in self._merged]
        parts = self.raw_parts() if blocks else []
        for block in blocks:
            own = [part for part in parts if block * BLOCK < part.first and part.last <= (block + 1) * BLOCK]
            commits = [commit for part in own for commit in self.read_commits(part)]
            for commit in commits[:-1]:
                commit.rings = {}  # of interest while it is the newest, or was so lately
            metadata = {_COMMITS.decode(): json.dumps([asdict(commit) for commit in commits])}
            merge_block(self._raw, block, metadata)
            for name in TABLES:
                merge_block(self._tables(name), block, {})
            self._merged.add(block)

    def sizes(self) -> list[tuple[Part, int]]:
        """Every part of raw records, oldest first, with the bytes on disk of it and of the tables up to it."""
        others = [part for name in TABLES for part in list_parts(self._tables(name))]
        found = []
        for part in self.raw_parts():
            within = [other for other in others if other.last <= part.last]
            others = [other for other in others if other.last > part.last]
            found.append((part, sum(_size(each) for each in (part, *within))))
        return found

    def remove_through(self, last: int) -> None:
        """Removes the parts of all commits up to `last`, raw and derived."""
        for directory in (*(self._tables(name) for name in TABLES), self._raw):
            for part in list_parts(directory):
                if part.last <= last:
                    remove_within([part])
                    part.path.unlink(missing_ok=True)

    # Exports

    def read_exports(self) -> dict[str, Export]:
        """How far each backend has been sent the tables, by name. A file that is damaged counts as none."""
        found = {}
        for path in sorted((self.path / "exports").glob("*.json")):
            try:
                found[path.stem] = _checked(Export(**json.loads(path.read_text("utf-8"))))
            except (OSError, ValueError, TypeError, RecursionError):
                continue
        return found

    def write_export(self, name: str, export: Export) -> None:
        """Replaces what is known of one backend. Raises OSError."""
        directory = self.path / "exports"
        directory.mkdir(mode=0o700, exist_ok=True)
        replace(directory / f"{name}.json", json.dumps(asdict(export), indent=1).encode("utf-8"))


_COMMITS = b"stagetrace.commits"
_ATTEMPTS = 5


_TYPES: dict[str, type] = {"int": int, "str": str, "bool": bool, "list": list, "dict": dict}
_Checked = TypeVar("_Checked")


def _checked(made: _Checked) -> _Checked:
    """A dataclass whose fields came from a file. Raises TypeError where one is not of its type."""
    for each in fields(made):  # type: ignore[arg-type]
        value = getattr(made, each.name)
        wanted = _TYPES.get(str(each.type).partition("[")[0])
        if wanted is not None and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
            raise TypeError(f"{each.name} is {value!r:.40}")
        if each.type == "dict[str, int]" and not all(type(count) is int for count in value.values()):
            raise TypeError(f"{each.name} has something that is no number")
        if each.type == "list[str]" and not all(isinstance(word, str) for word in value):
            raise TypeError(f"{each.name} has something that is no text")
        if each.type == "list[dict[str, str]]" and not all(isinstance(one, dict) for one in value):
            raise TypeError(f"{each.name} has something that is no object")
    return made


def _commit(data: dict[str, Any]) -> Commit:
    """A commit from its JSON. Raises TypeError, KeyError, ValueError or AttributeError where it is none."""
    rings = {}
    for ring, mark in data["rings"].items():
        control, detail = mark["cursors"]
        losses = [_checked(Losses(**losses)) for losses in mark["losses"]]
        rings[ring] = RingMark([int(control), int(detail)], losses)
    batches = [_checked(BatchMark(**batch)) for batch in data["batches"]]
    if any(batch.control < 0 or batch.detail < 0 for batch in batches):
        raise ValueError("a batch has fewer than no records")
    return _checked(Commit(**{**data, "batches": batches, "rings": rings}))


def _chosen(name: str, columns: list[str] | None) -> pa.Schema:
    """A table's schema, or that of some of its columns."""
    schema = TABLES[name]
    return schema if columns is None else pa.schema([schema.field(column) for column in columns])


def _size(part: Part) -> int:
    try:
        return part.path.stat().st_size
    except FileNotFoundError:
        return 0


def _since(parts: list[Part], committed_ns: int) -> list[Part]:
    """The newest part and those that were committed since then (wall clock)."""
    if not parts:
        return []
    first = len(parts) - 1
    while first and parts[first - 1].path.stat().st_mtime_ns >= committed_ns:  # a long session has many
        first -= 1
    return parts[first:]


def replace(path: Path, data: bytes) -> None:
    """Writes a file so that readers see the old or the new one, whole. Raises OSError, and leaves the old one then."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def new_session_path(root: str | os.PathLike[str] = DEFAULT_ROOT) -> Path:
    """Makes a fresh directory under `root`: the local time, with a number where two begin in the same second.

    Raises OSError.
    """
    stem = time.strftime("%Y%m%d-%H%M%S")
    Path(root).mkdir(mode=0o700, parents=True, exist_ok=True)
    number = 1
    while True:
        path = Path(root) / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            number += 1
        else:
            return path
