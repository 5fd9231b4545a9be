"""What is corrupted: rings, record streams and sessions as the real recorder and collector write them.

Everything in them is the same in every run, but for the ids of threads: the corpus goes on meaning what it meant.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
from unit.rings import die, environment, read_all, reader_of, sized, variables

from stagetrace.exporters.collector import Collector
from stagetrace.exporters.control import set_level
from stagetrace.exporters.drain import SLOT, Slots
from stagetrace.exporters.session import Session
from stagetrace.instrument import ring
from stagetrace.instrument.identity import FILE, Identity
from stagetrace.instrument.recorder import Recorder
from stagetrace.instrument.records import Change, Event, RecordType, Text, header_word
from stagetrace.instrument.stages import BY_NAME, STEP_COMPOSITION, Finish, Level

IDENTITY = Identity("0f" * 16, bytes(range(16)))
CONTROL_SLOTS, DETAIL_SLOTS = 256, 128  # small, so that an edit often meets something
INSTANCE = 77
_MS = 1_000_000


def claimed(directory: Path) -> Path:
    """The path of a session that exists, with the identity that all of this material has."""
    path = directory / "session"
    path.mkdir(parents=True)
    (path / FILE).write_text(json.dumps({"id": IDENTITY.session, "key": IDENTITY.key.hex(), "version": 1}) + "\n")
    return path


def record(recorder: Recorder, requests: int) -> None:
    """Writes requests, one after the other, with steps of one request each, every stage's record and a hook's."""
    hook = {"name": "m:C.f", "status": "installed", "why": "", "gives": "steps", "index": 0}
    recorder.text(0, Text.HOOK, json.dumps(hook))
    step = 0
    for number in range(requests):
        at = (1 + number * 100) * _MS
        handle = recorder.handle(f"request {number}")
        recorder.text(handle, Text.REQUEST_ID, f"request {number}")
        recorder.text(handle, Text.EXTERNAL_ID, f"cmpl-{number}")
        recorder.text(handle, Text.TRACE_CONTEXT, f"00-{number + 1:032x}-{number + 1:016x}-01\nvendor={number}")
        for stage, words in (
            ("request_tokenize", (40, 5, 0)),
            ("request_dispatch", (40,)),
            ("queue", (40,)),
            ("prefill", (0, 0)),
        ):
            recorder.state(header_word(RecordType.STATE, BY_NAME[stage].id), at, handle, INSTANCE, step, *words)
            at += _MS
        recorder.member(header_word(RecordType.MEMBER, Change.CHUNK), handle, 40, 40, INSTANCE, step + 1, 1, 0)
        for token in range(3):
            step += 1
            if step % 4 == 1:
                recorder.snapshot(INSTANCE, step, [handle])
            composition = dict.fromkeys((attribute.name for attribute in STEP_COMPOSITION), 0)
            composition["decode_tokens" if token else "prefill_tokens"] = 1 if token else 40
            recorder.step_begin(at, at + 1000, INSTANCE, step, [*composition.values()])
            for stage, begin, end in (
                ("schedule", 0, 1_000),
                ("forward", 2_000, 7_000),
                ("rank_step", 1_500, 8_000),
                ("execute", 1_000, 9_000),
                ("update", 9_000, 10_000),
            ):
                header = header_word(RecordType.SEGMENT, BY_NAME[stage].id)
                recorder.segment(header, at + begin, at + end, INSTANCE, step, 0, 1)
            recorder.step_end(at + 10_000, INSTANCE, step)
            at += _MS
            if not token:
                recorder.state(header_word(RecordType.STATE, BY_NAME["decode"].id), at, handle, INSTANCE, step, 1)
        recorder.member(header_word(RecordType.MEMBER, Change.LEAVE), handle, 0, 0, INSTANCE, step + 1)
        for event in (Event.FINISHED, Event.FIRST_OUTPUT, Event.FIRST_SENT, Event.LAST_OUTPUT, Event.LAST_SENT):
            recorder.state(header_word(RecordType.EVENT, event), at, handle, INSTANCE, step, Finish.LENGTH, 3, 40, 0)
            at += _MS
        recorder.segment(header_word(RecordType.SEGMENT, BY_NAME["gc_pause"].id), at, at + 5, 0, 0, 2)


def _open(directory: Path, role: str = "engine_core") -> Recorder:
    claimed(directory) if not (directory / "session").exists() else None
    recorder = Recorder()
    smallest, ring._SMALLEST = ring._SMALLEST, 1
    try:
        with environment(STAGETRACE_LEVEL=None, **variables(directory)), sized(CONTROL_SLOTS, DETAIL_SLOTS):
            info = {"engine": "none", "engine_version": "1", "model": "none", "instance": INSTANCE, "world_size": 1}
            assert recorder.open(role, info)
    finally:
        ring._SMALLEST = smallest
    return recorder


@functools.cache
def ring_images() -> tuple[bytes, ...]:
    """Ring files of dead processes: empty but for its first record, part full, and several laps."""
    images = []
    for requests in (0, 2, 12):
        with tempfile.TemporaryDirectory() as name:
            recorder = _open(Path(name))
            assert recorder.ring is not None
            record(recorder, requests)
            path = recorder.ring.path
            die(recorder)
            images.append(path.read_bytes())
    return tuple(images)


@functools.cache
def slots() -> tuple[Slots, Slots]:
    """All slots of a process that recorded a few requests: control, detail."""
    with tempfile.TemporaryDirectory() as name:
        recorder = _open(Path(name))
        assert recorder.ring is not None
        record(recorder, 4)
        reader = reader_of(recorder.ring.path)
        die(recorder)
        batch = read_all(reader)
        assert reader.areas[0].losses.lost == reader.areas[1].losses.lost == 0
        control, detail = batch.control.copy(), batch.detail.copy()
        del batch
        reader.close()
    assert control.dtype == detail.dtype == SLOT
    return control, detail


@functools.cache
def slots_with_experts() -> tuple[Slots, Slots]:
    """All slots of a process that recorded names, and one step whose layers have few experts and many."""
    with tempfile.TemporaryDirectory() as name:
        recorder = _open(Path(name))
        assert recorder.ring is not None
        recorder.text(recorder.handle("tp:0"), Text.NAME, "tp:0")
        record(recorder, 1)
        for layer, (count, width) in enumerate(((8, 1), (60, 2), (60, 2), (40, 4), (300, 1))):
            counts = b"".join(expert.to_bytes(width, "little") for expert in [expert % 200 for expert in range(count)])
            recorder.experts(INSTANCE, 1, 0, layer, 40, counts, width)
        reader = reader_of(recorder.ring.path)
        die(recorder)
        batch = read_all(reader)
        control, detail = batch.control.copy(), batch.detail.copy()
        del batch
        reader.close()
    return control, detail


@functools.cache
def session_files() -> dict[str, bytes]:
    """A session by file: collected in two commits, switched once, ended; raw records and every table among them."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        path = claimed(directory)
        recorder = _open(directory)
        with environment(**variables(directory)):
            session = Session(path, IDENTITY)
            collector = Collector(session, ["serve"])
            record(recorder, 2)
            for _ in range(4):
                collector.poll()
            collector.commit()
            set_level(session, Level.REQUEST)
            set_level(session, Level.STEP)
            recorder.state(header_word(RecordType.STATE, BY_NAME["queue"].id), _MS, 5, INSTANCE, 0, 40)
            die(recorder)
            collector.finish()
        return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def with_numbers(found: Slots, first: int) -> Slots:
    """A copy of slots with sequence numbers that follow one another from `first` on."""
    copy = found.copy()
    copy["first"] = copy["last"] = np.arange(first, first + len(copy), dtype=np.uint64)
    return copy
