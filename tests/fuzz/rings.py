"""Fuzzed: ring files."""

from __future__ import annotations

import fcntl
import os

import numpy as np
from fuzz import material
from fuzz.script import Script
from fuzz.work import DIRECTORY, put

from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.exporters.drain import SLOT, Batch, NotARing, RingReader
from stagetrace.instrument import records
from stagetrace.instrument.stages import Level

_HEADER_FIELDS = (0, 8, 12, 16, 20, 24, 32, 40, 48, 52, 84, 116, records.LEVEL_OFFSET, records.EPOCH_OFFSET)
_HEADER_WORDS = (records.CONTROL_READ_OFFSET, records.CONTROL_DROPPED_OFFSET, records.CONTROL_DROPPED_OFFSET + 8)
_MOST_ROUNDS = 12


def ring(data: bytes) -> None:
    """A ring file with any alteration, also between polls, of a process that lives or is dead, read to its end."""
    script = Script(data)
    image = bytearray(script.one_of(material.ring_images()))
    _alter_header(script, image)
    _alter_slots(script, image, script.below(8))
    size = script.one_of((len(image), len(image), len(image), script.below(len(image) + 256)))
    path = DIRECTORY / "worker-1-1.ring"
    path.write_bytes(bytes(image[:size]).ljust(size, b"\0"))
    with open(path, "r+b", buffering=0) as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        try:
            reader = RingReader(path, 1)
        except NotARing:
            return
        try:
            _read_to_the_end(script, reader, writer.fileno(), image)
        finally:
            reader.close()


def _read_to_the_end(script: Script, reader: RingReader, file: int, image: bytearray) -> None:
    assembler = Assembler(material.IDENTITY.key)
    taken = {"control": 0, "detail": 0}
    resumed = False
    for _ in range(_MOST_ROUNDS):
        deed = script.below(8)
        if deed == 0 or not script.more:
            break
        if deed in (1, 2):
            _alter_slots(script, image, 1 + script.below(3))
            os.pwrite(file, image, 0)
        elif deed == 3:
            _alter_header(script, image)
            os.pwrite(file, image[records.LEVEL_OFFSET : records.HEADER_SIZE], records.LEVEL_OFFSET)
        elif deed == 4:
            reader.committed()
        elif deed == 5 and not resumed:
            resumed = True
            reader.resume(reader.cursors, [area.losses for area in reader.areas])
        elif deed == 6:
            os.ftruncate(file, script.below(len(image)))
        _poll(reader, assembler, taken)
    fcntl.flock(file, fcntl.LOCK_UN)
    batch = _poll(reader, assembler, taken)
    assert batch.ended and reader.ended
    assert len(_poll(reader, assembler, taken)) == 0, "a dead process's ring had more to read"
    assembler.finish("lost")


def _poll(reader: RingReader, assembler: Assembler, taken: dict[str, int]) -> Batch:
    before = reader.cursors
    batch = reader.poll()
    assert all(new >= old for new, old in zip(reader.cursors, before, strict=True))
    for area, found in zip(reader.areas, (batch.control, batch.detail), strict=True):
        losses = area.losses
        taken[losses.ring] += len(found)
        assert found.dtype == SLOT
        assert len(found) <= len(area.slots), "one poll brought more than the ring holds"
        assert losses.read == taken[losses.ring]
        fates = losses.read + losses.overwritten + losses.torn + losses.unfinished + losses.corrupt
        assert fates == area.cursor, "a slot number has no fate, or two"
        assert (np.diff(found["first"].astype(np.int64)) > 0).all(), "a slot was read twice"
    assert reader.level in Level
    assert all(0 <= index < records.MAX_HOOKS and count > 0 for index, count in reader.errors.items())
    assembler.add(batch)
    assembler.take(1 << 40)
    return batch


def _alter_header(script: Script, image: bytearray) -> None:
    for _ in range(script.below(4)):
        if script.flag():
            put(image, script.one_of(_HEADER_WORDS), script.number().to_bytes(8, "little"))
        else:
            put(image, script.one_of(_HEADER_FIELDS), script.number().to_bytes(8, "little")[: 1 + script.below(8)])


def _alter_slots(script: Script, image: bytearray, count: int) -> None:
    """Alters slots in place: a recorder's next ones, either number of one, its header word, or any byte."""
    slots = (len(image) - records.HEADER_SIZE) // records.SLOT_SIZE
    for _ in range(count):
        index = script.below(slots)
        at = records.HEADER_SIZE + index * records.SLOT_SIZE
        deed = script.below(6)
        if deed == 0:  # a lap later, as a recorder goes on
            for place in range(index, min(index + 1 + script.below(40), slots)):
                where = records.HEADER_SIZE + place * records.SLOT_SIZE
                lap = material.CONTROL_SLOTS if place < material.CONTROL_SLOTS else material.DETAIL_SLOTS
                number = int.from_bytes(image[where : where + 8], "little") + lap & (1 << 64) - 1
                put(image, where, number.to_bytes(8, "little"))
                put(image, where + 120, number.to_bytes(8, "little"))
        elif deed == 1:
            put(image, at, script.number().to_bytes(8, "little"))
        elif deed == 2:
            put(image, at + 120, script.number().to_bytes(8, "little"))
        elif deed == 3:
            number = script.number().to_bytes(8, "little")
            put(image, at, number)
            put(image, at + 120, number)
        elif deed == 4:
            put(image, at + 8, script.number().to_bytes(8, "little"))
        else:
            put(image, at + script.below(128), script.take(1 + script.below(16)))
