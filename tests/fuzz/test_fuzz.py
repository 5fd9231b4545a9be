"""The short form of the fuzzing: every input that is kept, then some thousand more from a fixed seed.

The long form is coverage-guided: `make fuzz-long` (campaign.py).
"""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fuzz.targets import TARGETS
from fuzz.work import clean_up
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
KEPT = sorted(path for path in (HERE / "corpus").glob("*/*") if path.parent.name in TARGETS)
EXAMPLES = {
    "ring": 400,
    "stream": 500,
    "experts": 200,
    "text": 150,
    "trace_context": 2_000,
    "session_files": 60,
    "session_tables": 40,
    "session_taken_up": 40,
}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)  # warnings of thousands of damaged files say nothing
    yield
    logging.disable(logging.NOTSET)
    clean_up()


def test_every_target_has_a_corpus() -> None:
    assert {path.parent.name for path in KEPT} == {*TARGETS}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kept", KEPT, ids=lambda path: f"{path.parent.name}-{path.name[:24]}")
def test_kept(kept: Path) -> None:
    TARGETS[kept.parent.name](kept.read_bytes())


@pytest.mark.timeout(120)
@pytest.mark.parametrize("target", TARGETS)
def test_short(target: str) -> None:
    """Inputs of any bytes, and kept ones with others put in, behind or in their place."""
    seeds = st.sampled_from([path.read_bytes() for path in KEPT if path.parent.name == target])
    altered = st.tuples(seeds, st.integers(0, 60), st.binary(max_size=24), st.integers(0, 24)).map(
        lambda drawn: drawn[0][: drawn[1]] + drawn[2] + drawn[0][drawn[1] + drawn[3] :]
    )

    @given(st.one_of(altered, st.binary(max_size=200)))
    @settings(
        max_examples=EXAMPLES[target],
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=[*HealthCheck],
    )
    def holds(data: bytes) -> None:
        TARGETS[target](data)

    holds()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="atheris has builds for x86-64 alone")
def test_the_long_form_runs() -> None:
    """The coverage-guided run, cut short, of the fastest target: it is instrumented and its table has its numbers."""
    command = [sys.executable, str(HERE / "campaign.py"), "--inputs", "800", "trace_context", "ring"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    head, *rows, last = [line.split() for line in done.stdout.splitlines()]
    assert head == ["target", "inputs", "crashes", "edges", "seconds", "peak", "MiB"]
    assert {row[0]: int(row[3]) > 20 for row in rows} == {"trace_context": True, "ring": True}
    assert int(last[1]) >= 700
    assert last[2] == "0"
