"""The collector: rings in, session and sinks out. It never waits for an engine, and no engine waits for it.

Every poll drains the rings into memory; every commit first writes the raw records with all cursors, then gives the
control rings' slots back, then writes what could be derived, the manifest, and exports.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from .assemble import Assembler
from .discover import Discovery
from .drain import CONTROL, DETAIL, SLOT, Batch, RingReader
from .session import RAW_SCHEMA, Manifest, Process, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .otlp import OtlpSink

log = logging.getLogger(__name__)

POLL_S = 0.05
COMMIT_S = 2.0
COMMIT_SLOTS = 50_000
ANCHOR_S = 10.0
NICE = 10


class Collector:
    """Collects one session until it is told to stop. Raises SessionError or OSError when the session is unusable."""

    def __init__(
        self, session: Session, command: Sequence[str] = (), level: str = "step", sink: OtlpSink | None = None
    ):
        self.session = session
        self.sink = sink
        self.discovery = Discovery(session.identity.session)
        self.assembler = Assembler(session.identity.key)
        self.readers: list[RingReader] = []
        self._batches: list[Batch] = []
        self._slots = 0
        self._part = 0
        self._cursors: dict[str, list[int]] = {}
        self._last_anchor = 0.0
        self.manifest = Manifest(session=session.identity.session, command=list(command), level=level)
        self._resume()
        self.manifest.host = os.uname().nodename
        self.manifest.started_ns = self.manifest.started_ns or time.time_ns()

    def _resume(self) -> None:
        """Takes up a session that a collector before this one left: its raw records are the truth, the rest follows."""
        parts = self.session.raw_parts()
        if not parts:
            return
        self.manifest = self.session.read_manifest()
        self.manifest.complete = False
        self.session.clear_tables()
        for part in parts:
            table, self._cursors = self.session.read_raw(part)
            self._part += 1
            for batch in batches_of(table):
                self.assembler.add(batch)
            self._write_tables(self.assembler.take(0))
        log.info("resumed %s with %d parts", self.session.path, len(parts))

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Collects until `should_stop`, then drains once more and closes the session."""
        try:
            os.nice(NICE)
        except OSError:
            log.info("could not lower the collector's priority")
        next_commit = time.monotonic() + COMMIT_S
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
                reader.resume(known, [loss for loss in self.manifest.losses if loss.process == reader.key])
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
        self._part += 1
        raw = raw_table(batches)
        if raw.num_rows:
            self._cursors |= {reader.path.name: reader.cursors for reader in self.readers}
            self.session.write_raw(raw, self._cursors, self._part)
        for reader in self.readers:
            reader.committed()
        for batch in batches:
            self.assembler.add(batch)
        if finishing:
            tables = self.assembler.finish("open" if self.alive() else "lost")
        else:
            tables = self.assembler.take(time.monotonic_ns())
        self._write_tables(tables)
        self._describe()
        if self.sink is not None:
            self._export(self.sink, tables)
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

    def _write_tables(self, tables: dict[str, pa.Table]) -> None:
        for name, table in tables.items():
            self.session.write_table(name, table, self._part)

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
    slots = np.concatenate([slots for _, _, slots in pieces])
    lengths = [len(slots) for _, _, slots in pieces]
    binary = pa.FixedSizeBinaryArray.from_buffers(pa.binary(128), len(slots), [None, pa.py_buffer(slots.tobytes())])
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
