"""The diagnosis of a real server: nothing stands out of a light load, and of a heavy one its batch's cap does."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from engines.recording import Recording, record
from quickstart.load import run_load

from stagetrace.analysis.diagnosis.diagnose import Diagnosis, diagnose

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

CAP, LIGHT, HEAVY = 3, 2, 12
PATIENCE_S = 20.0


def load_on(recording: Recording, width: int, requests: int, seed: int) -> None:
    server = recording.server
    results = asyncio.run(run_load(server.base_url, server.model, requests=requests, seed=seed, concurrency=(width,)))
    assert [result.error for result in results] == [None] * requests


def with_requests(recording: Recording, count: int, last_s: float | None = None) -> Diagnosis:
    """The diagnosis once so many requests are in the tables: one is written at the second commit after its end."""
    until = time.monotonic() + PATIENCE_S
    while True:
        found = diagnose(recording.session, last_s)
        if found.requests >= count or time.monotonic() > until:
            return found
        time.sleep(0.5)


def test_a_light_load_has_no_finding_and_a_heavy_one_its_cause(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("diagnosis")
    arguments = ("--enforce-eager", "--max-num-seqs", str(CAP))
    with record(model, directory, *arguments, run=("--no-report",)) as recording:
        load_on(recording, LIGHT, 24, seed=11)
        light = with_requests(recording, 24)
        between = time.monotonic()
        load_on(recording, HEAVY, 36, seed=12)
        lasted = time.monotonic() - between
    assert light.requests == 24
    assert not light.findings, light.findings
    assert light.answer.startswith("nothing stands out")
    heavy = diagnose(recording.session, lasted)
    first = heavy.findings[0]
    assert first.cause.id == "batch_cap", heavy.findings
    assert first.seen.share.low > 0.5 and 0 < first.seen.recoverable_ns <= first.seen.measured_ns
    known = set(recording.frames()["requests"]["trace_id"])
    assert first.seen.examples and {example.trace_id for example in first.seen.examples} <= known
    assert all(each.share is not None and each.share > 0.9 for each in heavy.attributed.values())
