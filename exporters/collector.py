"""The collector: rings in, session and sinks out. It never waits for an engine, and no engine waits for it.

Every poll drains the rings into memory; every commit first writes the raw records with all cursors, then gives the
control rings' slots back, then writes what could be derived, the manifest, and exports.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections import Counter
from typing import IO, TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stagetrace.instrument.identity import FILE

from .assemble import Assembler
from .control import read_switches
from .discover import Discovery
from .drain import CONTROL, DETAIL, RING_NAMES, SLOT, Batch, RingReader
from .session import RAW_SCHEMA, TABLES, Losses, Manifest, Process, Session, SessionError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .otlp import OtlpSink

log = logging.getLogger(__name__)

POLL_S = 0.05
COMMIT_S = 2.0
COMMIT_SLOTS = 50_000
ANCHOR_S = 10.0
NICE = 10
_BYTES = np.dtype((np.void, SLOT.itemsize))


class Collector:
    """Collects one session until it is told to stop. Raises SessionError or OSError when the session is unusable."""

    def __init__(
        self, session: Session, command: Sequence[str] = (), level: str = "step", sink: OtlpSink | None = None
    ):
        self.session = session
        self.sink = sink
        self._held = hold(session)
        self.discovery = Discovery(session.identity.session)
        self.assembler = Assembler(session.identity.key)
        self.readers: list[RingReader] = []
        self._batches: list[Batch] = []
        self._slots = 0
        self._raw_parts = 0  # written so far; so are the derived ones
        self._table_parts = 0
        self._cursors: dict[str, list[int]] = {}
        self._read: Counter[tuple[int, int]] = Counter()  # process, ring -> slots in the parts of an earlier collector
        self._unexported = {name: schema.empty_table() for name, schema in TABLES.items()}
        self._last_anchor = 0.0
        self.manifest = Manifest(session=session.identity.session, command=list(command), level=level)
        self._resume()
        self.manifest.host = os.uname().nodename
        self.manifest.started_ns = self.manifest.started_ns or time.time_ns()

    def _resume(self) -> None:
        """Takes up a session that a collector before this one left: its raw records are the truth, the rest follows."""
        before = self.session.read_manifest()
        if before.started_ns:
            self.manifest = before
            self.manifest.complete = False
        parts = self.session.raw_parts()
        if not parts:
            return
        self.session.clear_tables()
        self.assembler.switches = read_switches(self.session)
        for part in parts:
            table, self._cursors = self.session.read_raw(part)
            self._raw_parts += 1
            if self._raw_parts > 1:
                self._derive_again()
                self._keep_for_open_requests()
            for batch in batches_of(table):
                self._read[batch.process, CONTROL] += len(batch.control)
                self._read[batch.process, DETAIL] += len(batch.detail)
                self.assembler.add(batch)
        for process in self.manifest.processes:
            if not (self.discovery.directory / process.ring).exists():  # nothing more will come of it
                process.ended = True
                self.assembler.add(Batch(process.key, ended=True))
        self._derive_again()
        log.info("resumed %s with %d parts", self.session.path, len(parts))

    def _derive_again(self) -> None:
        """Writes tables of an earlier collector's records; what that one may have died over is to be exported too."""
        tables = self.assembler.take(0)
        self._write_tables(tables)
        if self.sink is not None:
            for name, table in tables.items():
                self._unexported[name] = pa.concat_tables([self._unexported[name], table])

    def _keep_for_open_requests(self) -> None:
        """Of what was exported, keeps what the sink lacks when a request is over: its states and steps until then."""
        still_open = pa.array([*self.assembler.requests], pa.int64())
        for name, table in self._unexported.items():
            inner = name in ("states", "members")
            self._unexported[name] = table.filter(pc.is_in(table["handle"], still_open)) if inner else table.slice(0, 0)

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Collects until `should_stop`, then drains once more and closes the session."""
        try:
            os.nice(NICE)
        except OSError:
            log.info("could not lower the collector's priority")
        next_commit = time.monotonic() + COMMIT_S
        self.poll()
        self.commit()
        while not should_stop():
            self.poll()
            if time.monotonic() >= next_commit or self._slots >= COMMIT_SLOTS:
                self.commit()
                next_commit = time.monotonic() + COMMIT_S
            time.sleep(POLL_S)
        self.finish()

    def alive(self) -> bool:
        """Whether a process that writes one of the rings lives."""
        return any(not reader.ended for reader in self.readers)

    def poll(self) -> None:
        """Drains every ring once."""
        for reader in self.discovery.look():
            known = self._cursors.get(reader.path.name)
            if known is not None:
                reader.resume(known, self._losses_at(known, reader.key))
            self.readers.append(reader)
            log.info("ring of %s, pid %d: %s", reader.role, reader.pid, reader.path)
        for reader in self.readers:
            if reader.ended:
                continue
            batch = reader.poll()
            if len(batch) or batch.ended or batch.gap:
                self._batches.append(batch)
                self._slots += len(batch)

    def commit(self, finishing: bool = False) -> None:
        """Writes what was drained: raw records, tables, manifest; then exports. `finishing` closes what is open."""
        now = time.monotonic()
        if now - self._last_anchor >= ANCHOR_S or finishing:
            self.manifest.anchors.append((time.monotonic_ns(), time.time_ns()))
            self._last_anchor = now
        batches, self._batches, self._slots = self._batches, [], 0
        raw = raw_table(batches)
        if raw.num_rows:
            self._raw_parts += 1
            self._cursors |= {reader.path.name: reader.cursors for reader in self.readers}
            self.session.write_raw(raw, self._cursors, self._raw_parts)
        for reader in self.readers:
            reader.committed()
        self.assembler.switches = read_switches(self.session)
        for batch in batches:
            self.assembler.add(batch)
        if finishing:
            tables = self.assembler.finish("open" if self.alive() else "lost")
        else:
            tables = self.assembler.take(time.monotonic_ns())
        self._write_tables(tables)
        self._describe()
        if self.sink is not None:
            # A collector before this one may have died over the last of its parts, and of no other.
            late = {name: pa.concat_tables([self._unexported[name], table]) for name, table in tables.items()}
            self._export(self.sink, late)
            self._unexported = {name: schema.empty_table() for name, schema in TABLES.items()}
        self.manifest.complete = finishing
        self.session.write_manifest(self.manifest)
        self._remove_dead_rings()

    def finish(self) -> None:
        """The last drain: twice, since a slot is taken only when an earlier poll saw it."""
        self.poll()
        self.poll()
        self.commit(finishing=True)
        if self.sink is not None:
            self.sink.shutdown()
        for reader in self.readers:
            reader.close()
        self.discovery.tidy()
        self._held.close()

    def _losses_at(self, cursors: list[int], process: int) -> list[Losses]:
        """What is known of a process's losses at these cursors; the manifest may be older or newer than they are."""
        losses = {loss.ring: loss for loss in self.manifest.losses if loss.process == process}
        for ring, (name, cursor) in enumerate(zip(RING_NAMES, cursors, strict=True)):
            loss = losses.setdefault(name, Losses(process, name))
            loss.read = self._read[process, ring]
            loss.overwritten = max(0, cursor - loss.read - loss.torn - loss.unfinished)
        return list(losses.values())

    def _write_tables(self, tables: dict[str, pa.Table]) -> None:
        self._table_parts += 1
        for name, table in tables.items():
            self.session.write_table(name, table, self._table_parts)

    def _export(self, sink: OtlpSink, tables: dict[str, pa.Table]) -> None:
        result = sink.export(tables, self.manifest)
        left_out = {f"not_exported_{reason}": count for reason, count in result.left_out.items()}
        for name, count in {"spans_exported": result.sent, "spans_failed": result.failed, **left_out}.items():
            self.manifest.counts[name] = self.manifest.counts.get(name, 0) + count

    def _describe(self) -> None:
        """Brings the manifest up to what the rings and the assembly know."""
        manifest = self.manifest
        known = {process.key: process for process in manifest.processes}
        losses = {(loss.process, loss.ring): loss for loss in manifest.losses}
        for reader in self.readers:
            process = known.get(reader.key)
            if process is None:
                process = Process(reader.key, reader.path.name, reader.role, reader.pid, reader.host, reader.started_ns)
                manifest.processes.append(process)
            info = self.assembler.info.get(reader.key, {})
            process.role = str(info.get("role", process.role))
            process.info = info
            process.hooks = list(self.assembler.hooks.get(reader.key, {}).values())
            names = self.assembler.hook_names.get(reader.key, {})
            process.errors = {names.get(index, str(index)): count for index, count in reader.errors.items()}
            process.ended = reader.ended
            for area in reader.areas:
                losses[reader.key, area.losses.ring] = area.losses
        manifest.losses = list(losses.values())
        manifest.counts.update(self.assembler.counts)

    def _remove_dead_rings(self) -> None:
        for reader in self.readers:
            if reader.ended:
                self.discovery.remove(reader.path)


def hold(session: Session) -> IO[bytes]:
    """Takes the session for one collector, as long as the file stays open.

    Raises SessionError when another has it, since each would write over the other's parts.
    """
    held = open(session.path / FILE, "rb")  # noqa: SIM115
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise SessionError("another collector has it: leave it to that one, or end that one first") from None
    except OSError as error:
        log.warning("%s cannot be locked against a second collector: %s", session.path, error)
    return held


def raw_table(batches: Sequence[Batch]) -> pa.Table:
    """Batches as rows of session.RAW_SCHEMA, in their order."""
    pieces = [
        (batch.process, ring, slots)
        for batch in batches
        for ring, slots in ((CONTROL, batch.control), (DETAIL, batch.detail))
        if len(slots)
    ]
    if not pieces:
        return RAW_SCHEMA.empty_table()
    slots = np.concatenate([slots.view(_BYTES) for _, _, slots in pieces])  # faster than field by field
    lengths = [len(slots) for _, _, slots in pieces]
    binary = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(128), len(slots), [None, pa.py_buffer(slots.view(np.uint8))]
    )
    return pa.Table.from_arrays(
        [
            pa.array(np.repeat([process for process, _, _ in pieces], lengths), pa.int64()),
            pa.array(np.repeat([ring for _, ring, _ in pieces], lengths), pa.int8()),
            binary,
        ],
        schema=RAW_SCHEMA,
    )


def batches_of(table: pa.Table) -> list[Batch]:
    """The batches that a part of raw records holds, one a process."""
    process = table["process"].to_numpy()
    ring = table["ring"].to_numpy()
    column = table["slot"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks else pa.array([], pa.binary(128))
    data = column.buffers()[1]
    slots = np.frombuffer(data, SLOT, len(column), column.offset * SLOT.itemsize) if len(column) else np.empty(0, SLOT)
    return [
        Batch(int(key), slots[(process == key) & (ring == CONTROL)], slots[(process == key) & (ring == DETAIL)])
        for key in dict.fromkeys(process.tolist())
    ]
