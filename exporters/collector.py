"""The collector: rings in, session out. It never waits for an engine, and no engine waits for it.

Every poll drains the rings into memory; every commit first writes the raw records with all cursors, then gives the
control rings' slots back, then writes what follows from them. What a commit's tables hold depends on the commits up to
it alone, so a collector that takes up a session where another one died replays them and goes on. When the disk takes
nothing, what was drained is held, and beyond a bound the newest detail is given up, and counted.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections import deque
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import numpy as np
import pyarrow as pa

from stagetrace.instrument.identity import FILE

from .assembly.assemble import Assembler
from .control import read_switches
from .discover import Discovery
from .drain import CONTROL, DETAIL, SLOT, Batch, RingReader
from .memory import give_back
from .model_files import config_path
from .parts import END
from .retention import Keep, last_to_remove
from .session import (
    FATES,
    RAW_SCHEMA,
    BatchMark,
    Commit,
    Losses,
    Manifest,
    Process,
    RingMark,
    Session,
    SessionError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from .export_process import ExportProcess, ExportProcesses
    from .parts import Part

log = logging.getLogger(__name__)

POLL_S = 0.2
COMMIT_S = 2.0
COMMIT_SLOTS = 50_000
HOLD_SLOTS = 512 * 1024  # of detail, 64 MiB: what is held while the disk takes nothing
REPLAY_SLOTS = 20_000_000  # at most, when a session is taken up; what began before them is as if it was not recorded
TEND_S = 30.0  # between looks at the session's size
NICE = 10
LONGEST_CONFIG = 4 << 20  # bytes of a model's config.json
_BYTES = np.dtype((np.void, SLOT.itemsize))

Tables = dict[str, pa.Table]


@dataclass
class Owed:
    """What is yet to be written of a commit: its raw records if they are none, then its tables."""

    commit: Commit | None
    number: int
    tables: Tables


class Collector:
    """Collects one session until it is told to stop. Raises SessionError or OSError when the session is unusable."""

    def __init__(
        self,
        session: Session,
        command: Sequence[str] = (),
        level: str = "step",
        keep: Keep | None = None,
        export: ExportProcess | ExportProcesses | None = None,
    ):
        self.session = session
        self.keep = keep or Keep()
        self.export = export
        self._held = hold(session)
        self.discovery = Discovery(session.identity.session)
        self.assembler = Assembler(session.identity.key)
        self.readers: list[RingReader] = []
        self._batches: deque[Batch] = deque()  # drained, not written
        self._slots = 0  # in them
        self._owed: Owed | None = None
        self._number = 0  # of the last commit
        self._last_commit: dict[int, int] = {}  # of each process
        self._marks: dict[str, RingMark] = {}  # of rings that an earlier collector read
        self._writes_fail = False
        self._model = ""  # whose config.json was looked for
        self._next_tend = self._next_give_back = 0.0
        self.manifest = Manifest(session=session.identity.session, command=list(command), level=level)
        self._resume()
        self.manifest.host = os.uname().nodename
        self.manifest.started_ns = self.manifest.started_ns or time.time_ns()

    # An earlier collector's session

    def _resume(self) -> None:
        """Takes up a session that a collector before this one left: its raw records are the truth, the rest follows."""
        before = self.session.read_manifest()
        if before.started_ns:
            self.manifest = before
            self.manifest.complete = False
        self.session.remove_tables(END)
        parts = self._readable_parts()
        self._number = max(self._number, self.manifest.derived)
        if parts:
            newest = self.session.read_commits(parts[-1])[-1]
            self._marks = newest.rings
            self._replay(self._last_slots(parts))
            log.info("took up %s after commit %d", self.session.path, self._number)
        in_place = {path.name for path in self.discovery.paths()}
        for name, mark in self._marks.items():
            if name not in in_place:  # nothing more will come of it
                self._batches.append(Batch(mark.losses[0].process, ended=True))
        for process in self.manifest.processes:
            process.ended = process.ended or process.ring not in in_place

    def _readable_parts(self) -> list[Part]:
        """The parts of raw records; those that are damaged are set aside, named and counted.

        Behind the last one that is whole, rings are read again as far as they reach: those tables will come again.
        """
        readable: list[Part] = []
        for part in self.session.raw_parts():
            self._number = max(self._number, part.last)
            try:
                self.session.read_commits(part)
                readable.append(part)
            except SessionError as error:
                log.error("%s: its records are lost; it is kept as %s", error, self.session.set_aside(part).name)
                self._count("parts_damaged")
        if self._number > (last := readable[-1].last if readable else 0):
            self.session.remove_tables(last + 1)
        return readable

    def _last_slots(self, parts: list[Part]) -> list[Part]:
        """The newest parts that together have no more than REPLAY_SLOTS, and what came before them made known."""
        slots, first = 0, len(parts)
        while first and slots <= REPLAY_SLOTS:
            first -= 1
            slots += sum(commit.slots for commit in self.session.read_commits(parts[first]))
        commits = self.session.read_commits(parts[first])
        if commits[0].number > 1:
            self.assembler.counts.update(commits[0].counts)
            for process in self.manifest.processes:
                self.assembler.introduce(process.key, process.info, process.hooks)
        return parts[first:]

    def _replay(self, parts: list[Part]) -> None:
        switches = read_switches(self.session)
        for part in parts:
            try:
                for commit, table in self.session.read_raw(part):
                    self.assembler.switches = switches[: commit.switches]
                    tables = self._derive(batches_of(commit, table), commit.taken_ns)
                    if commit.number > self.manifest.derived:
                        self._write_tables(tables, commit.number)
                    self.manifest.derived = max(self.manifest.derived, commit.number)
            except SessionError as error:
                log.error("%s: what was in it is left out", error)
                self._count("parts_damaged")
            self.poll()  # the rings fill meanwhile

    # Collecting

    def run(self, should_stop: Callable[[], bool]) -> bool:
        """Collects until `should_stop`, then drains once more and closes the session. Whether all was written."""
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
                self._tend()
                next_commit = time.monotonic() + COMMIT_S
            time.sleep(POLL_S)
        return self.finish()

    def alive(self) -> bool:
        """Whether a process that writes one of the rings lives."""
        return any(not reader.ended for reader in self.readers)

    def poll(self) -> None:
        """Drains every ring once."""
        for reader in self.discovery.look():
            if (mark := self._marks.get(reader.path.name)) is not None:
                reader.resume(mark.cursors, mark.losses)
            self.readers.append(reader)
            log.info("ring of %s, pid %d: %s", reader.role, reader.pid, reader.path)
        for reader in self.readers:
            if reader.ended:
                continue
            batch = reader.poll()
            if len(batch) or batch.ended or batch.gap:
                self._batches.append(batch)
                self._slots += len(batch)

    def commit(self) -> bool:
        """Writes what was drained: raw records, tables, manifest. Whether nothing is left to be written."""
        self._note_clocks()
        written = self._pay() and self._commit_batches() and self._pay()
        if written and self._writes_fail:
            log.warning("%s can be written again", self.session.path)
        self._writes_fail = not written
        if not written:
            self._give_up_newest()
        self._write_manifest()
        if written:
            self._remove_dead_rings()
        return written

    def _commit_batches(self) -> bool:
        """Writes the raw records; what follows from them is owed then."""
        switches = read_switches(self.session)
        now_ns = time.monotonic_ns()
        batches = list(self._batches)
        commit = Commit(
            self._number + 1,
            now_ns,
            time.time_ns(),
            len(switches),
            batch_marks(batches),
            {
                reader.path.name: RingMark(reader.cursors, [area.losses for area in reader.areas])
                for reader in self.readers
            },
            dict(self.assembler.counts),
        )
        if batches and not self._attempt(lambda: self.session.write_raw(raw_table(batches), commit)):
            return False
        for reader in self.readers:
            reader.committed()
        self._batches.clear()
        self._slots = 0
        self.assembler.switches = switches
        tables = self._derive(batches, now_ns)
        # Time alone can make rows final; they need a commit of their own, so that they follow from the commits.
        late = not batches and any(table.num_rows for table in tables.values())
        if batches or late:
            self._number += 1
            self._last_commit |= {batch.process: self._number for batch in batches}
            self._owed = Owed(commit if late else None, self._number, tables)
        return True

    def _derive(self, batches: Iterable[Batch], now_ns: int) -> Tables:
        """The tables that follow; a batch that the assembly fails at stays in the raw records alone, and is counted."""
        for batch in batches:
            try:
                self.assembler.add(batch)
            except Exception:
                self._failed(f"{len(batch)} records of process {batch.process}")
        try:
            return self.assembler.take(now_ns)
        except Exception:
            self._failed("a commit")
            return {}

    def _failed(self, what: str) -> None:
        if not self.manifest.counts.get("assembly_errors"):
            log.exception("%s could not be assembled; the raw records have them", what)
        self._count("assembly_errors")

    def _pay(self) -> bool:
        """Writes what is owed. Whether that was possible."""
        owed = self._owed
        if owed is None:
            return True
        commit = owed.commit
        if commit is not None:
            if not self._attempt(lambda: self.session.write_raw(RAW_SCHEMA.empty_table(), commit)):
                return False
            owed.commit = None
        if not self._attempt(lambda: self._write_tables(owed.tables, owed.number)):
            return False
        self.manifest.derived = max(self.manifest.derived, owed.number)
        self._owed = None
        return True

    def _write_tables(self, tables: Tables, number: int) -> None:
        for name, table in tables.items():
            self.session.write_table(name, table, number)

    def _attempt(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except (OSError, pa.ArrowException) as error:
            if not self._writes_fail:
                log.error(
                    "cannot write to %s: %s. Free some space, or make it writable; until then records are held,"
                    " %d slots of detail at most",
                    self.session.path,
                    error,
                    HOLD_SLOTS,
                )
            return False
        return True

    def _give_up_newest(self) -> None:
        """Keeps memory within its bound: of what is held, the newest detail goes first. Control stays in its ring."""
        excess = sum(len(batch.detail) for batch in self._batches) - HOLD_SLOTS
        losses = {reader.key: reader.areas[DETAIL].losses for reader in self.readers}
        for batch in reversed(self._batches):
            if excess <= 0:
                break
            count = min(len(batch.detail), excess)
            if not count:
                continue
            batch.detail = batch.detail[: len(batch.detail) - count].copy()
            excess -= count
            losses[batch.process].read -= count
            losses[batch.process].given_up += count
        self._batches = deque(batch for batch in self._batches if len(batch) or batch.ended or batch.gap)
        self._slots = 0  # so that the next attempt waits for its time

    def finish(self) -> bool:
        """The last drain: twice, since a slot is taken only when an earlier poll saw it. Whether all was written."""
        self.poll()
        self.poll()
        written = self.commit()
        if written:
            written = self._attempt(
                lambda: self._write_tables(self.assembler.finish("open" if self.alive() else "lost"), END)
            )
            self.manifest.complete = written
            self._write_manifest()
        if not written:
            held = sum(map(len, self._batches))
            log.error("%s cannot be written: %d slots of it stay in the rings", self.session.path, held)
        if self.export is not None:
            self.export.stop()
        for reader in self.readers:
            reader.close()
        self.discovery.tidy()
        self._held.close()
        return written

    # What goes with it

    def _note_clocks(self) -> None:
        before = time.monotonic_ns()
        wall = time.time_ns()
        self.manifest.note_clocks((before + time.monotonic_ns()) // 2, wall)

    def _tend(self) -> None:
        """Keeps the session within its bounds, and the export going."""
        if self.export is not None:
            self.export.tend()
        now = time.monotonic()
        if now >= self._next_give_back:
            self._next_give_back = now + COMMIT_S
            give_back()
        if now < self._next_tend:
            return
        self._next_tend = now + TEND_S
        try:
            self.session.merge(self.manifest.derived)
            self._rotate()
        except (OSError, SessionError, pa.ArrowException) as error:
            log.error("the parts of %s could not be merged or removed: %s", self.session.path, error)

    def _rotate(self) -> None:
        if self.keep == Keep():
            return
        sizes = self.session.sizes()
        now_s = time.time()
        ages = [now_s - part.path.stat().st_mtime for part, _ in sizes]
        last = last_to_remove(sizes, ages, self.keep)
        if not last:
            return
        for part, _ in sizes:
            if part.last <= last:
                commits = self.session.read_commits(part)
                self._count("slots_rotated", sum(commit.slots for commit in commits))
                self.manifest.rotated_ns = max(commit.wall_ns for commit in commits)
        self.manifest.rotated = last
        self._forget_processes(last)
        self._write_manifest()  # first: what is missing must not be taken for damage
        self.session.remove_through(last)
        log.info("removed the commits up to %d, to keep the session within its bounds", last)

    def _forget_processes(self, last: int) -> None:
        """Lets go of dead processes of which nothing is kept; what they lost still counts, as process 0's."""
        manifest = self.manifest
        gone = {process.key for process in manifest.processes if process.ended and 0 < process.last_commit <= last}
        if not gone:
            return
        manifest.processes = [process for process in manifest.processes if process.key not in gone]
        kept = [loss for loss in manifest.losses if loss.process not in gone]
        for loss in manifest.losses:
            if loss.process not in gone:
                continue
            total = next((each for each in kept if (each.process, each.ring) == (0, loss.ring)), None)
            if total is None:
                kept.append(total := Losses(0, loss.ring))
            for name in FATES:
                setattr(total, name, getattr(total, name) + getattr(loss, name))
        manifest.losses = kept
        since = [at for at, (_, wall_ns) in enumerate(manifest.anchors) if wall_ns <= manifest.rotated_ns]
        del manifest.anchors[: since[-1] if since else 0]

    def _count(self, name: str, count: int = 1) -> None:
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
            self._keep_model_config(str(info.get("model_path", "")))
            names = self.assembler.hook_names.get(reader.key, {})
            process.errors = {names.get(index, str(index)): count for index, count in reader.errors.items()}
            process.ended = reader.ended
            process.last_commit = self._last_commit.get(reader.key, process.last_commit)
            for area in reader.areas:
                losses[reader.key, area.losses.ring] = area.losses
        manifest.losses = list(losses.values())
        manifest.counts.update(self.assembler.counts)

    def _keep_model_config(self, model: str) -> None:
        """Keeps the model's config.json with the session, once: reports may be made where the model is not."""
        if not model or self._model == model:
            return
        self._model = model
        try:
            with open(config_path(model), "rb") as file:
                content = file.read(LONGEST_CONFIG + 1)
            if len(content) <= LONGEST_CONFIG:
                self.session.keep_model_config(content)
        except OSError as error:
            log.info("the config.json of %s is not kept with the session: %s", model, error)

    def _write_manifest(self) -> None:
        self._describe()
        self._attempt(lambda: self.session.write_manifest(self.manifest))

    def _remove_dead_rings(self) -> None:
        """Lets go of the rings of dead processes, whose last records are in the session."""
        for reader in [reader for reader in self.readers if reader.ended]:
            self.discovery.remove(reader.path)
            reader.close()
            self.readers.remove(reader)


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


def batch_marks(batches: Iterable[Batch]) -> list[BatchMark]:
    """What a commit says of its batches, in their order."""
    return [
        BatchMark(each.process, len(each.control), len(each.detail), each.gap, each.gap_end, each.ended)
        for each in batches
    ]


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


def batches_of(commit: Commit, table: pa.Table) -> Iterator[Batch]:
    """The batches of a commit, from its raw records (session.RAW_SCHEMA)."""
    column = table["slot"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks else pa.array([], pa.binary(128))
    data = column.buffers()[1]
    slots = np.frombuffer(data, SLOT, len(column), column.offset * SLOT.itemsize) if len(column) else np.empty(0, SLOT)
    at = 0
    for mark in commit.batches:
        middle, end = at + mark.control, at + mark.control + mark.detail
        yield Batch(mark.process, slots[at:middle], slots[middle:end], mark.gap, mark.gap_end, mark.ended)
        at = end
