"""The diagnosis of a real server: nothing stands out of a light load, and of a heavy one its batch's cap does."""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from engines.conftest import python_of
from engines.recording import Recording, record
from quickstart.load import run_load
from quickstart.servers import ENGINES

from stagetrace.analysis.diagnosis.causes import CAUSES
from stagetrace.analysis.diagnosis.diagnose import Diagnosis, diagnose

if TYPE_CHECKING:
    from collections.abc import Iterable

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


@pytest.mark.parametrize("engine", ENGINES)
def test_every_flag_that_is_advised_is_one_of_the_engines(engine: str) -> None:
    """As its sources have it: vLLM names its flags, SGLang makes them of the fields of its arguments."""
    where = f"import importlib.util as u; print(u.find_spec({engine!r}).submodule_search_locations[0])"
    done = subprocess.run([python_of(ENGINES[engine]), "-c", where], capture_output=True, text=True, check=True)
    root = Path(done.stdout.strip())
    if engine == "vllm":
        known = flags_in(r'"(--[a-z0-9-]+)"', [root / "engine" / "arg_utils.py", *root.glob("entrypoints/**/*.py")])
        known |= {
            "--" + name.replace("_", "-")
            for name in flags_in(r"(?m)^    (\w+):", root.glob("entrypoints/**/*args*.py"))
        }
    else:
        fields = flags_in(r"(?m)^    (\w+)\s*:", root.glob("srt/*args*.py")) | flags_in(
            r"(?m)^    (\w+)\s*:", root.glob("srt/arg*/**/*.py")
        )
        known = {"--" + name.replace("_", "-") for name in fields}
    advised = {each.flag.split(" ")[0].split(".")[0] for cause in CAUSES for each in cause.next[engine] if each.flag}
    assert advised - known == set()


def flags_in(pattern: str, files: Iterable[Path]) -> set[str]:
    return {word for file in files for word in re.findall(pattern, file.read_text("utf-8", "replace"))}
