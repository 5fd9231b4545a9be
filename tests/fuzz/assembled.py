"""Fuzzed: streams of records, and the texts in them, through decoding and assembly to the tables."""

from __future__ import annotations

import json

import numpy as np
from fuzz import material
from fuzz.script import Script
from fuzz.stored import show_doctor, show_report
from fuzz.work import DIRECTORY, replace_value

from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.exporters.control import Switch
from stagetrace.exporters.drain import SLOT, Batch, Slots
from stagetrace.exporters.session import TABLES, Manifest, Process, Session
from stagetrace.instrument import records
from stagetrace.instrument.records import RecordType, Text, header_word
from stagetrace.instrument.stages import BY_ID, Kind, Level

_MOST_ROUNDS = 12


def stream(data: bytes) -> None:
    """Slots of records in any order, altered, of several processes: through decoding and assembly to the tables."""
    _assemble(Script(data), material.slots())


def experts(data: bytes) -> None:
    """The same of a process that recorded names and counts of experts."""
    _assemble(Script(data), material.slots_with_experts())


def _assemble(script: Script, recorded: tuple[Slots, Slots]) -> None:
    assembler = Assembler(material.IDENTITY.key)
    control, detail = (found.copy() for found in recorded)
    given = segments = 0
    rows = dict.fromkeys(TABLES, 0)

    def count(tables: dict[str, object]) -> None:
        for name, table in tables.items():
            assert table.schema == TABLES[name], name  # type: ignore[attr-defined]
            rows[name] += table.num_rows  # type: ignore[attr-defined]

    for _ in range(_MOST_ROUNDS):
        if not script.more:
            break
        pieces = []
        for found in (control, detail):
            begin = script.below(len(found))
            piece = found[begin : begin + script.below(len(found) + 1)].copy()
            for _ in range(script.below(4)):
                _alter_records(script, piece)
            pieces.append(piece)
        batch = Batch(1 + script.below(3), *pieces)
        batch.gap, batch.ended = script.below(4) == 3, script.below(8) == 7
        batch.gap_end = script.number() >> 2 if batch.gap else 0
        if script.below(4) == 3:
            begin_ns = script.number() >> 1
            levels = (script.one_of([*Level]), script.one_of([*Level]))
            assembler.switches = [*assembler.switches, Switch(begin_ns, begin_ns + script.below(256), *levels)]
        assembler.add(batch)
        given += len(batch)
        segments += _valid_segments(batch.detail)
        if script.flag():
            count(assembler.take(script.number() >> 1))
    count(assembler.finish(script.one_of(("open", "lost"))))
    assert rows["experts"] <= given
    assert rows["segments"] == segments, f"{segments} segments were recorded, {rows['segments']} are in the table"
    assert assembler.counts["corrupt"] + assembler.counts["incomplete"] <= given


def _valid_segments(detail: Slots) -> int:
    """How many of the slots are segments, by the definition of the format (docs/format.md)."""
    found = 0
    for header, words in zip(detail["header"].tolist(), detail["words"].tolist(), strict=True):
        type_, part, parts, stage = header & 255, header >> 8 & 255, header >> 16 & 255, header >> 32 & 0xFFFF
        known = stage in BY_ID and BY_ID[stage].kind is not Kind.STATE
        found += (type_, part, parts) == (RecordType.SEGMENT, 0, 1) and known and 0 <= words[1] <= words[2]
    return found


def _alter_records(script: Script, piece: Slots) -> None:
    """Alters one slot of some: a word, its type and stage, its place, or its number."""
    if not len(piece):
        return
    index, deed = script.below(len(piece)), script.below(6)
    if deed == 0:
        piece["words"][index, script.below(records.SLOT_WORDS)] = script.signed()
    elif deed == 1:
        piece["header"][index] = script.number()
    elif deed == 2:
        parts = script.one_of((1, 2, 3, 255))
        type_, stage = script.one_of([*RecordType]), script.one_of([*BY_ID, 0, 0xFFFF])
        piece["header"][index] = header_word(type_, stage, script.below(parts), parts)
    elif deed == 3:
        other = script.below(len(piece))
        piece[[index, other]] = piece[[other, index]]
    elif deed == 4:
        piece["first"][index] = piece["last"][index] = script.number() >> 2
    else:
        other = script.below(len(piece))
        piece["header"][index], piece["words"][index] = piece["header"][other], piece["words"][other]


def text(data: bytes) -> None:
    """Text records of every kind with any content, into the tables and the manifest and out of it again."""
    script = Script(data)
    kind, handle = script.one_of([*Text, 9]), script.signed() if script.flag() else 5
    content = script.rest() if script.flag() else _json_text(script, kind)
    control, _ = material.slots()
    written = _text_slots(handle, kind, content, 1)
    assembler = Assembler(material.IDENTITY.key)
    assembler.add(Batch(1, np.concatenate([written, material.with_numbers(control, len(written) + 1)])))
    tables = assembler.finish("open")
    assert {name: table.schema for name, table in tables.items()} == TABLES
    process = Process(1, "worker-1-1.ring", "worker", 1, "host", 0)
    process.info = assembler.info.get(1, {})
    process.role = str(process.info.get("role", "worker"))
    process.hooks = [*assembler.hooks.get(1, {}).values()]
    process.errors = dict.fromkeys(assembler.hook_names.get(1, {}).values(), 1)
    path = DIRECTORY / "described"
    path.mkdir(exist_ok=True)
    session = Session(path, material.IDENTITY)
    session.write_manifest(Manifest(processes=[process], session=material.IDENTITY.session))
    manifest = session.read_manifest()
    assert manifest.processes[0].hooks == process.hooks
    for name, table in tables.items():
        session.write_table(name, table, 1)
    show_doctor(session)
    if len(content) % 16 == 0:  # it takes long
        show_report(session)


def _json_text(script: Script, kind: int) -> bytes:
    """What a process says of itself or of a hook, with other values in the places of some."""
    process = {"role": "worker", "engine": "e", "engine_version": "1", "model": "m", "instance": 9, "world_size": 2}
    hook = {"name": "m:C.f", "status": "missing", "why": "w", "gives": "g", "index": 1}
    content = bytearray(json.dumps(hook if kind == Text.HOOK else process).encode())
    for _ in range(script.below(4)):
        replace_value(script, content)
    if script.below(8) == 7:
        depth = script.below(8_000)
        content[:] = b"[" * depth + b"]" * script.below(8_000)
    return bytes(content)


def _text_slots(handle: int, kind: int, content: bytes, first: int) -> Slots:
    """The slots of a text record whose length is right and whose content is any."""
    content = content[: records.MAX_TEXT]
    words = [handle, kind, len(content), *np.frombuffer(content + bytes(-len(content) % 8), "<i8").tolist()]
    parts = -(-len(words) // records.PART_WORDS)
    words += [0] * (parts * records.PART_WORDS - len(words))
    found = np.zeros(parts, SLOT)
    for part in range(parts):
        found["header"][part] = header_word(RecordType.TEXT, 0, part, parts)
        found["words"][part] = [first, *words[part * records.PART_WORDS : (part + 1) * records.PART_WORDS]]
    return material.with_numbers(found, first)
