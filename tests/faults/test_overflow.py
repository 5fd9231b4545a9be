"""A collector that stands still while a process records on: what is lost is counted exactly, over several laps."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import pytest
from faults.accounts import books
from unit.commands import PATIENCE_S, Commands, commands_in, said, wait_for
from unit.rings import DECODE, FORWARD

from stagetrace.exporters.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SEGMENTS, STATES = 700_000, 40_000  # ten laps of the detail ring; more than twice what the control ring holds
WRITES = f"""
import sys
from stagetrace.instrument.recorder import RECORDER
assert RECORDER.open(sys.argv[1], {{}})
print("open", flush=True)
for word in sys.stdin:
    first, last, states = map(int, word.split())
    accepted = 0
    for number in range(first, last):
        RECORDER.segment({FORWARD}, number, number, 1, 1)
    for number in range(states):
        accepted += RECORDER.state({DECODE}, number, 5)
    print(accepted, flush=True)
"""


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with commands_in(tmp_path) as commands:
        yield commands


def test_what_a_stopped_collector_loses_is_counted_exactly(commands: Commands) -> None:
    path = commands.directory / "session"
    collector = commands.collect(path)
    writer = commands.start(sys.executable, "-c", WRITES, "worker", session=path, stdin=-1)
    assert said(writer) == "open"
    accepted = 0

    def write(first: int, last: int, states: int) -> None:
        nonlocal accepted
        assert writer.stdin is not None
        writer.stdin.write(f"{first} {last} {states}\n".encode())
        writer.stdin.flush()
        accepted += int(said(writer))

    write(0, 1_000, 100)
    session = Session.open(path)
    wait_for(lambda: sum(losses.read for losses in session.read_manifest().losses) == 1_000 + 100 + 1)
    collector.send_signal(signal.SIGSTOP)
    write(1_000, SEGMENTS, STATES)
    collector.send_signal(signal.SIGCONT)
    wait_for(lambda: sum(losses.read for losses in session.read_manifest().losses) > 30_000)
    write(SEGMENTS, SEGMENTS + 1_000, 100)
    assert writer.stdin is not None
    writer.stdin.close()
    writer.stdin = None  # or its end is looked for again
    assert writer.wait(PATIENCE_S) == 0
    wait_for(lambda: not commands.ring_files())
    collector.terminate()
    assert collector.wait(PATIENCE_S) == 0

    held = books(session)
    control, detail = held["worker", "control"], held["worker", "detail"]
    assert detail.written == SEGMENTS + 2 * 1_000 - 1_000
    assert detail.overwritten == detail.written - detail.read > 8 * 65_536
    kept = set(detail.numbers.tolist())
    assert kept >= {*range(1, 1_001), *range(SEGMENTS + 1, detail.written + 1)}  # before and after nothing is missing
    assert (control.overwritten, control.other, detail.other) == (0, 0, 0)
    assert control.read == control.written == accepted + 1  # what the process is comes first
    assert control.dropped == STATES + 200 - accepted > STATES // 2
