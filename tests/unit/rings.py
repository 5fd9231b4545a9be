"""Real rings for tests: recorders with small rings in a directory of the test's, readers on them, and processes."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from stagetrace.exporters.discover import process_key
from stagetrace.exporters.drain import SLOT, Batch, RingReader, Slots
from stagetrace.instrument import records, ring
from stagetrace.instrument.identity import read_identity
from stagetrace.instrument.recorder import Recorder
from stagetrace.instrument.records import RecordType, header_word
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SLOTS = 1024  # of either ring, unless a test says otherwise
MARGIN = 64  # control slots that a recorder keeps free
FORWARD = header_word(RecordType.SEGMENT, BY_NAME["forward"].id)
DECODE = header_word(RecordType.STATE, BY_NAME["decode"].id)


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Sets variables (None: unset) and puts back what was. Unlike monkeypatch it can be used inside hypothesis."""
    before = {name: os.environ.get(name) for name in values}

    def put(settings: dict[str, str | None]) -> None:
        for name, value in settings.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


def variables(directory: Path) -> dict[str, str]:
    """What arms a process of a test."""
    return {"STAGETRACE_SESSION": str(directory / "session"), "STAGETRACE_RING_DIR": str(directory / "rings")}


def ring_paths(directory: Path) -> list[Path]:
    """The rings of a test's processes, oldest first."""
    identity = read_identity(directory / "session")
    assert identity is not None, "no process claimed the session"
    found = (directory / "rings" / identity.session).glob("*.ring")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def reader_of(path: Path) -> RingReader:
    """A reader, with the key that the collector would give it."""
    return RingReader(path, process_key(path.name))


@contextmanager
def sized(control: int = SLOTS, detail: int = SLOTS) -> Iterator[None]:
    """Rings that are made inside have these sizes."""
    before = ring.CONTROL_SLOTS, ring.DETAIL_SLOTS
    ring.CONTROL_SLOTS, ring.DETAIL_SLOTS = control, detail
    try:
        yield
    finally:
        ring.CONTROL_SLOTS, ring.DETAIL_SLOTS = before


@contextmanager
def opened(
    directory: Path, control: int = SLOTS, detail: int = SLOTS, role: str = "engine_core", **info: Any
) -> Iterator[tuple[Recorder, RingReader]]:
    """A recorder that is open and a reader on its ring; the record of what the process is was written already."""
    recorder = Recorder()
    with environment(STAGETRACE_LEVEL=None, **variables(directory)), sized(control, detail):
        assert recorder.open(role, info)
    assert recorder.ring is not None
    reader = reader_of(recorder.ring.path)
    try:
        yield recorder, reader
    finally:
        if not reader.ended:
            die(recorder)
        reader.close()


def die(recorder: Recorder) -> None:
    """Lets go of a recorder's ring and of its lock, as the death of its process does."""
    recorder.after_fork_in_child()


def read_all(reader: RingReader, commit: bool = True) -> Batch:
    """Everything that is in the rings now, as one batch; enough polls to give up on slots that are never written."""
    batches = []
    for _ in range(6):
        batches.append(reader.poll())
        if commit:
            reader.committed()
    whole = Batch(reader.key, ended=batches[-1].ended)
    whole.control = np.concatenate([batch.control for batch in batches])
    whole.detail = np.concatenate([batch.detail for batch in batches])
    whole.gap = any(batch.gap for batch in batches)
    whole.gap_end = batches[-1].gap_end
    return whole


def forge(path: Path, area: str, index: int, **words: int) -> None:
    """Alters words (first, header, last) of one slot of a ring file in place."""
    memory = np.memmap(path, np.uint8, "r+")
    control = int.from_bytes(memory[16:20].tobytes(), "little")
    detail = int.from_bytes(memory[20:24].tobytes(), "little")
    offset = records.HEADER_SIZE + (0 if area == "control" else control * records.SLOT_SIZE)
    slots: Slots = np.ndarray(control if area == "control" else detail, SLOT, memory, offset)
    for name, value in words.items():
        slots[name][index] = value
    memory.flush()


def python(code: str, directory: Path, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    """A process that runs `code`, armed; its output is captured."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **variables(directory), **settings},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str], rc: int = 0) -> str:
    """A process's standard output once it has ended as expected."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == rc, f"exit status {process.returncode}\n{out}\n{err}"
    return out
