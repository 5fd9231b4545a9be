"""A process dies, by SIGKILL too: every record in its ring is read, and what was open in it is closed as lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from unit.decoded import decoded, decoded_batch
from unit.rings import FORWARD, output_of, python, read_all, reader_of, ring_paths

from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.exporters.assembly.long_records import Parts
from stagetrace.instrument.identity import read_identity
from stagetrace.instrument.records import RecordType
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from stagetrace.exporters.drain import RingReader

RECORDING = Path(__file__).parents[1] / "unit" / "recording.py"

WRITE = f"""
import os, sys, time
from stagetrace.instrument.recorder import RECORDER
assert RECORDER.open("engine_core", {{}})
for i in range(int(sys.argv[1])):
    RECORDER.segment({FORWARD}, i, i, 1, 1)
    RECORDER.snapshot(1, i, range(30)) if i % 100 == 0 else None
print("written", flush=True)
exec(sys.argv[2])
"""
WRITE_ON = f"""
import sys
from stagetrace.instrument.recorder import RECORDER
from stagetrace.instrument.records import HEAD, TAILS
assert RECORDER.open("engine_core", {{}})
print("open", flush=True)
i = 0
while True:
    RECORDER.put(HEAD.pack({FORWARD}, i), i, i, TAILS[8].pack(1, 1, i, i, i, i, i, i, i, i))
    RECORDER.step_begin(i, i, 1, i, [i] * 16)
    i += 1
"""
WAYS = {
    "killed": ("sys.stdin.readline()", -signal.SIGKILL),
    "aborted": ("os.abort()", -signal.SIGABRT),
    "a fault in memory": ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
    "left at once": ("os._exit(3)", 3),
    "an exception": ("raise RuntimeError", 1),
    "its end": ("", 0),
}


def only_reader(directory: Path) -> RingReader:
    (path,) = ring_paths(directory)
    return reader_of(path)


@pytest.mark.parametrize("way", WAYS)
def test_every_record_in_the_ring_of_a_dead_process_is_read(tmp_path: Path, way: str):
    code, rc = WAYS[way]
    process = python(WRITE, tmp_path, "2000", code)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    if rc == -signal.SIGKILL:
        assert only_reader(tmp_path).alive()
        process.kill()
    output_of(process, rc)
    reader = only_reader(tmp_path)
    assert not reader.alive()
    batch = reader.poll()
    assert batch.ended
    found = decoded_batch(batch)
    assert [row[3] for row in found.segments] == [*range(2_000)]
    assert [words[1] for _, type_, _, words in found.controls if type_ == RecordType.SNAPSHOT] == [
        *range(0, 2_000, 100)
    ]
    assert [area.losses.lost for area in reader.areas] == [0, 0]
    assert len(reader.poll()) == 0


def test_what_was_overwritten_before_a_death_is_counted_exactly(tmp_path: Path):
    process = python(WRITE, tmp_path, "150000", "sys.stdin.readline()")
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate()
    reader = only_reader(tmp_path)
    slots = len(reader.areas[1].slots)
    batch = reader.poll()
    assert [int(number) - 1 for number in batch.detail["first"]] == [*range(150_000 - slots, 150_000)]
    assert reader.areas[1].losses.overwritten == 150_000 - slots


@pytest.mark.parametrize("seed", range(6))
def test_a_death_in_the_middle_of_writing_costs_at_most_the_record_it_was_in(tmp_path: Path, seed: int):
    process = python(WRITE_ON, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    reader = only_reader(tmp_path)
    pieces = []
    for _ in range(2):  # not more: polls that follow one another closely would give up on a writer that is not running
        time.sleep(random.Random(seed).uniform(0.001, 0.03))
        pieces.append(reader.poll().detail)
    process.kill()
    process.wait(timeout=60)
    last = reader.poll()
    assert last.ended
    pieces.append(last.detail)
    process.communicate()
    losses = reader.areas[1].losses
    assert losses.torn + losses.unfinished <= 1
    assert losses.corrupt == 0
    numbers = [int(number) for piece in pieces for number in piece["first"]]
    assert numbers == sorted(set(numbers))
    assert losses.read == len(numbers)
    assert losses.read + losses.overwritten + losses.torn + losses.unfinished == reader.areas[1].cursor
    parts = Parts(), Parts()
    for piece in pieces:
        found = decoded(detail=piece, parts=parts)
        assert found.corrupt == 0
        for _, _, _, begin, end, *rest in found.segments:  # the content is that of its own write, whole
            assert end == begin
            assert rest == [1, 1, *[begin] * 8]
        for _, _, words in found.steps:
            assert {*words[5:]} == {words[1]}


def dead_engine(directory: Path, *arguments: str) -> RingReader:
    """The ring of an engine that recorded requests and killed itself."""
    session, rings = directory / "session", directory / "rings"
    settings = {"STAGETRACE_SESSION": str(session), "STAGETRACE_RING_DIR": str(rings)}
    process = subprocess.run(
        [sys.executable, str(RECORDING), *arguments, "--die"],
        env={**os.environ, **settings},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    return only_reader(directory)


def assembled(directory: Path, reader: RingReader) -> dict[str, list[dict[str, Any]]]:
    identity = read_identity(directory / "session")
    assert identity is not None
    assembler = Assembler(identity.key)
    batch = read_all(reader)
    assert batch.ended
    assembler.add(batch)
    tables = assembler.finish("open")
    assert assembler.counts["accounting_conflict"] == 0
    return {name: table.to_pylist() for name, table in tables.items()}


def test_open_requests_are_lost_and_the_open_step_is_incomplete(tmp_path: Path):
    reader = dead_engine(tmp_path, "--requests", "3", "--open", "1")
    rows = assembled(tmp_path, reader)
    assert [row["status"] for row in rows["requests"]] == ["finished"] * 3 + ["lost"]
    lost = rows["requests"][-1]
    states = [
        row for row in rows["states"] if row["handle"] == lost["handle"] and row["stage"] != BY_NAME["prefill_chunk"].id
    ]
    assert lost["finish"] == "unknown"
    assert lost["last_output_ns"] is None
    assert lost["end_ns"] == max(row["end_ns"] for row in states)
    assert states[-1]["stage"] == BY_NAME["decode"].id
    statuses = [row["status"] for row in sorted(rows["steps"], key=lambda row: row["step"])]
    assert statuses == ["complete"] * (len(statuses) - 1) + ["incomplete"]
    assert len(statuses) > 3
    assert all(row["end_ns"] >= row["scheduled_ns"] for row in rows["steps"])


def test_a_death_between_steps_leaves_no_step_open(tmp_path: Path):
    reader = dead_engine(tmp_path, "--requests", "2")
    rows = assembled(tmp_path, reader)
    assert {row["status"] for row in rows["steps"]} == {"complete"}
    assert {row["status"] for row in rows["requests"]} == {"finished"}


def test_a_ring_survives_several_readers_of_a_dead_process(tmp_path: Path):
    """A collector that dies right after the engine has lost nothing: the next one reads the same."""
    dead_engine(tmp_path, "--requests", "5", "--open", "2")
    first, second = only_reader(tmp_path), only_reader(tmp_path)
    one, other = read_all(first), read_all(second)
    assert one.control.tobytes() == other.control.tobytes()
    assert one.detail.tobytes() == other.detail.tobytes()
    assert len(one) > 50
