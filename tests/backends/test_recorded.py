"""The kept sessions of real engines: of today's format, whole, of no machine, and such as engines write."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from backends.recorded.keep import ENGINES, HERE, HOST, Old, differences, rebuilt, vocabulary
from quickstart.servers import ENGINES as SERVERS

from stagetrace.instrument.stages import BY_ID, BY_NAME, Level

if TYPE_CHECKING:
    from stagetrace.exporters.session import Session

MOST_BYTES = 300_000


def test_it_is_whole(recording: Session) -> None:
    manifest = recording.read_manifest()
    assert manifest.complete and not any(manifest.counts.values())
    assert not any(process.errors for process in manifest.processes)
    assert sum(loss.lost for loss in manifest.losses) == 0
    tables = {name: recording.read_table(name).to_pandas() for name in ("requests", "states", "segments", "experts")}
    assert {"finished", "aborted", "error"} <= set(tables["requests"]["status"])
    assert {0, 1} == set(tables["requests"]["trace_flags"]), "a caller that samples, and one that does not"
    assert BY_NAME["prefill_chunk"].id in set(tables["states"]["stage"])
    layers = {stage.id for stage in map(BY_ID.get, tables["segments"]["stage"].unique()) if stage.level == Level.LAYER}
    assert {BY_NAME[name].id for name in ("attention", "moe_route", "expert_compute")} <= layers
    assert tables["experts"]["layer"].nunique() == 4


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_small_and_names_no_machine(engine: str) -> None:
    files = [path for path in (HERE / engine).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    manifest = json.loads((HERE / engine / "manifest.json").read_text())
    assert {manifest["host"], *(process["host"] for process in manifest["processes"])} == {HOST}
    assert not re.findall(r'"[^"]*/(?:home|root|tmp|usr|opt|work)/[^"]*"', json.dumps(manifest))
    words = b"".join(path.read_bytes() for path in files)
    assert not re.findall(rb"/(?:home|root|tmp|usr|opt|work)/", words)


# When it is old


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    shutil.copytree(HERE / "vllm", tmp_path / "kept" / "vllm")
    return tmp_path / "kept"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_was_added_since_is_no_difference() -> None:
    then = vocabulary([BY_NAME["forward"].id])
    then["step"].pop()
    then["stages"][str(BY_NAME["forward"].id)].pop()
    assert differences(then) == []


def test_other_numbers_are_named_with_what_to_do(kept: Path, tmp_path: Path) -> None:
    path = kept / "vllm" / "vocabulary.json"
    whole = json.loads(path.read_text())
    forward = str(BY_NAME["forward"].id)
    others: list[tuple[dict[str, Any], str]] = [
        ({"records": 0}, "records: 0, today"),
        ({"step": ["prefill_tokens", *whole["step"]]}, "step: .*, today"),
        ({"stages": {**whole["stages"], forward: ["forward", "width"]}}, f"stage {forward}: .*width"),
        ({"stages": {**whole["stages"], "9999": ["gone"]}}, "stage 9999: .*gone"),
    ]
    for number, (other, says) in enumerate(others):
        change(path, **(whole | other))
        with pytest.raises(Old, match=f"{says}.*make recordings"):
            rebuilt("vllm", tmp_path / str(number), kept)


def test_a_session_that_cannot_be_read_is_old(kept: Path, tmp_path: Path) -> None:
    manifest = kept / "vllm" / "manifest.json"
    change(manifest, version=1)
    with pytest.raises(Old, match=r"another version of stagetrace.*make recordings"):
        rebuilt("vllm", tmp_path / "one", kept)
    shutil.copy(HERE / "vllm" / "manifest.json", manifest)
    part = next((kept / "vllm" / "raw").iterdir())
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(Old, match=f"{part.name}.*make recordings"):
        rebuilt("vllm", tmp_path / "two", kept)


@pytest.mark.matrix
@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_of_today_writes_such_a_session(engine: str, tmp_path: Path) -> None:
    """The program runs, and what it records has every stage that the kept session has, but for those of chance."""
    assert SERVERS[engine].python.exists(), "this test needs the engines: make engines-env"
    command = [sys.executable, "-m", "backends.recorded.record", "--engine", engine, "--into", tmp_path]
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        command,
        env=SERVERS[engine].environment() | {"PYTHONPATH": f"{tests}:{tests.parent / 'examples'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    words, kept = (
        {BY_ID[int(number)].name for number in json.loads((folder / engine / "vocabulary.json").read_text())["stages"]}
        for folder in (tmp_path, HERE)
    )
    assert kept - words <= {"gc_pause", "idle", "emit"}
    rebuilt(engine, tmp_path / "again", tmp_path)
