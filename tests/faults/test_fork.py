"""Forks while recording: a child never writes into its parent's ring, holds its lock, or ends its recording."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from unit.commands import wait_for
from unit.rings import FORWARD, output_of, python, read_all, reader_of, ring_paths

if TYPE_CHECKING:
    from pathlib import Path

    from stagetrace.exporters.drain import Batch

RECORDS, FORKS = 30_000, 12
CHILD_MARK, EXECUTED_MARK = 1_000_000, 2_000_000

# A thread records without a pause while the main thread forks; what the children do is the argument.
PARENT = f"""
import os, subprocess, sys, threading, time
from stagetrace.instrument.recorder import RECORDER
from stagetrace.instrument.stages import BY_NAME

def record(first, count):
    for number in range(first, first + count):
        RECORDER.segment({FORWARD}, number, number, 1, 1)

assert RECORDER.open("engine_core", {{}})
thread = threading.Thread(target=record, args=(0, {RECORDS}))
thread.start()
children = []
for number in range({FORKS}):
    child = os.fork()
    if not child:
        try:
            exec(sys.argv[1])
        finally:
            os._exit(0)
    children.append(child)
thread.join()
"""
WAIT = "\nassert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)\n"
EXECUTED = f"""
from stagetrace.instrument.recorder import RECORDER
assert RECORDER.open("worker", {{}})
for number in range({EXECUTED_MARK}, {EXECUTED_MARK} + 100):
    RECORDER.segment({FORWARD}, number, number, 1, 1)
"""
DEEDS = {
    "records on as it did": f"record({CHILD_MARK}, 500)",
    "opens a ring of its own": f"RECORDER.open('worker', {{}}); record({CHILD_MARK}, 100)",
    "execs": f"os.execv(sys.executable, [sys.executable, '-c', {EXECUTED!r}])",
    "is killed": f"record({CHILD_MARK}, 100); os.kill(os.getpid(), 9)",
}


def begins(batch: Batch) -> list[int]:
    return batch.detail["words"][:, 1].tolist()


@pytest.mark.parametrize("deed", DEEDS)
def test_a_parents_ring_has_its_own_records_and_no_others(tmp_path: Path, deed: str) -> None:
    wait = WAIT.replace("[0] * len(children)", "[9] * len(children)") if deed == "is killed" else WAIT
    output_of(python(PARENT + wait, tmp_path, DEEDS[deed]))
    batches = {path: read_all(reader_of(path)) for path in ring_paths(tmp_path)}
    roles = [path.name.split("-")[0] for path in batches]
    own = FORKS if deed in ("opens a ring of its own", "execs") else 0
    assert sorted(roles) == ["engine_core", *["worker"] * own]
    for path, batch in batches.items():
        if path.name.startswith("engine_core"):
            assert begins(batch) == [*range(RECORDS)]
        else:
            first = EXECUTED_MARK if deed == "execs" else CHILD_MARK
            assert begins(batch) == [*range(first, first + 100)]
        assert batch.ended


def test_a_parents_death_is_seen_although_its_children_live(tmp_path: Path) -> None:
    """The lock that says that a process lives is not held by what it forked or executed."""
    deeds = "os.execvp('sleep', ['sleep', '60']) if number % 2 else time.sleep(60)"
    tell = "\nprint(*children, flush=True)\ntime.sleep(60)\n"
    process = python(PARENT + tell, tmp_path, deeds)
    assert process.stdout is not None
    children = [int(word) for word in process.stdout.readline().split()]
    try:
        assert len(children) == FORKS
        (path,) = ring_paths(tmp_path)
        reader = reader_of(path)
        assert reader.alive()
        process.kill()
        process.wait()
        wait_for(lambda: not reader.alive())  # a child lets go of the lock when it first runs
        batch = reader.poll()
        assert batch.ended
        assert begins(batch) == [*range(RECORDS)]
        for child in children:
            os.kill(child, 0)  # it lives
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        process.communicate()
