"""Tests of the comparison of two engines' sessions: what is beside what, and what is said when there is nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from quickstart import compare
from unit.sessions import SessionBuilder

from stagetrace.analysis.report import Summary, summarise

MS = 1_000_000
PROGRAM = Path(compare.__file__)


def recorded(path: Path, engine: str, forward_ns: int, tokenize_ns: int | None = None) -> Summary:
    """A session with two requests of ten tokens each and four decode steps."""
    build = SessionBuilder(path)
    build.process(info={"engine": engine, "engine_version": "1.0", "model": "tiny"})
    for handle in (1, 2):
        build.request(
            handle,
            100 * MS,
            prompt_tokens=5,
            output_tokens=10,
            arrival_ns=0,
            first_output_ns=10 * MS,
            last_output_ns=90 * MS,
            tokenize_ns=tokenize_ns,
        )
    for step in range(1, 5):
        begin = step * 20 * MS
        build.step(step, begin, begin + 2 * forward_ns, decode_tokens=2, decode_requests=2)
        build.segment("execute", begin, begin + 2 * forward_ns, step, self_ns=forward_ns)
        build.segment("forward", begin, begin + forward_ns, step)
    return summarise(build.write())


def test_every_number_is_beside_the_other_engines(tmp_path: Path) -> None:
    one = recorded(tmp_path / "a", "vllm", 4 * MS, tokenize_ns=2 * MS)
    other = recorded(tmp_path / "b", "sglang", 6 * MS)
    ran, median, _, steps, stages = compare.comparison(one, other)
    assert list(ran.columns) == ["", "vllm 1.0", "sglang 1.0"]
    assert ["output tokens", "20", "20"] in ran.rows
    assert ["ttft", "10.0 ms", "10.0 ms", "1.00"] in median.rows
    assert ["tokenize", "2.00 ms", "-", "-"] in median.rows
    assert "queue" not in [row[0] for row in median.rows]
    assert ["decode steps", "8.00 ms", "12.0 ms", "1.50"] in steps.rows
    assert ["tokens in a decode step", "2.00", "2.00", ""] in steps.rows
    assert stages.rows == [
        ["execute", "800 µs", "1.20 ms", "1.50"],  # 4 steps of 4 ms over 20 tokens
        ["forward", "800 µs", "1.20 ms", "1.50"],
    ]


def test_the_newest_session_of_each_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LookupError, match="run the quickstart with each"):
        compare.newest_of_each_engine()
    for name, engine in (("1", "vllm"), ("2", "sglang"), ("3", "vllm")):
        recorded(compare.SESSIONS / name, engine, MS)
    SessionBuilder(compare.SESSIONS / "4").write()  # of a server that nobody used
    (compare.SESSIONS / "5").mkdir()
    found = compare.newest_of_each_engine()
    assert [(compare.engine_of(one), Path(one.path).name) for one in found] == [("vllm", "3"), ("sglang", "2")]


def test_the_program(tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(PROGRAM), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    missing = run()
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "stagetrace-sessions" in missing.stderr
    assert run("one").returncode == 2
    assert run("none", "of them").returncode == 1
    for name, engine in (("a", "vllm"), ("b", "sglang")):
        recorded(tmp_path / name, engine, MS)
    done = run(tmp_path / "a", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert "second / first" in done.stdout
