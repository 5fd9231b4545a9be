"""A directory that is not a session, is from another version, or is cut off at any byte: every command says what is
wrong and what to do, with exit status 2 and no traceback.
"""

from __future__ import annotations

import json
import shutil
import signal
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner
from unit.commands import PATIENCE_S, STAGETRACE, Commands, commands_in, wait_for

from stagetrace.cli.main import app
from stagetrace.exporters.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SHOW = {"report": ["report"], "top": ["top", "--once"], "doctor": ["doctor"]}
ALL = {**SHOW, "ctl": ["ctl", "level", "off", "--session"], "collect": ["collect"]}
RUNNER = CliRunner()


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with commands_in(tmp_path) as commands:
        yield commands


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session as a collector left it."""
    directory = tmp_path_factory.mktemp("whole")
    with commands_in(directory) as commands:
        path = directory / "session"
        collector = commands.collect(path)
        recording = commands.recording("--requests", "3", session=path)
        assert recording.wait(PATIENCE_S) == 0
        session = Session.open(path) if path.exists() else None
        wait_for(lambda: session is not None and session.read_table("requests").num_rows == 3)
        collector.send_signal(signal.SIGTERM)
        assert collector.wait(PATIENCE_S) == 0
    return path


@pytest.fixture
def session(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "session")


def _nothing(path: Path) -> None:
    pass


def _a_file(path: Path) -> None:
    path.write_text("text\n")


def _empty(path: Path) -> None:
    path.mkdir()


def _another_program(path: Path) -> None:
    path.mkdir()
    (path / "session.json").write_text('{"name": "of somebody else"}\n')


NO_SESSIONS: dict[str, Callable[[Path], None]] = {
    "is not there": _nothing,
    "a file": _a_file,
    "an empty directory": _empty,
    "a session.json of another program": _another_program,
}


MADE_BY_COLLECT = ("is not there", "an empty directory")


@pytest.mark.parametrize(
    ("command", "what"),
    [(command, what) for command in ALL for what in NO_SESSIONS if command != "collect" or what not in MADE_BY_COLLECT],
)
def test_what_is_no_session(commands: Commands, command: str, what: str) -> None:
    path = commands.directory / "here"
    NO_SESSIONS[what](path)
    process = commands.start(STAGETRACE, *ALL[command], path)
    out, err = process.communicate(timeout=PATIENCE_S)
    said = err.decode()
    assert process.returncode == 2, said
    assert str(path) in said
    assert "Traceback" not in said
    assert any(remedy in said for remedy in ("Name the directory", "name another", "cannot use")), said
    assert out == b""


def invoke(command: str, path: Path) -> str:
    """What a command says of a session that it refuses, in this process: it has many to refuse."""
    result = RUNNER.invoke(app, [*ALL[command], str(path)])
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    assert str(path) in result.output.replace("\n", "")
    return result.output


@pytest.mark.parametrize("command", SHOW)
def test_a_session_of_another_version(session: Path, command: str) -> None:
    manifest = json.loads((session / "manifest.json").read_text())
    for version in (0, manifest["version"] + 1, "2"):
        (session / "manifest.json").write_text(json.dumps({**manifest, "version": version}))
        said = invoke(command, session)
        assert "another version" in said
        assert str(version) in said


@pytest.mark.parametrize("command", SHOW)
@pytest.mark.parametrize("name", ["session.json", "manifest.json"])
def test_a_file_that_is_cut_off_at_any_byte(session: Path, command: str, name: str) -> None:
    content = (session / name).read_bytes()
    for length in range(0, len(content.rstrip()), 1 if len(content) < 300 else 29):
        (session / name).write_bytes(content[:length])
        assert name in invoke(command, session)


@pytest.mark.parametrize("command", ["report", "top"])
def test_a_table_that_is_cut_off_at_any_byte(session: Path, command: str) -> None:
    (part,) = (session / "tables" / "requests").glob("*.parquet")
    content = part.read_bytes()
    for length in (0, 1, 4, 8, 100, len(content) // 2, len(content) - 8, len(content) - 1):
        part.write_bytes(content[:length])
        said = invoke(command, session)
        assert "tables/requests" in said.replace("\n", "")
        assert "damaged" in said.replace("\n", " ")


def test_a_level_is_switched_in_a_session_whose_manifest_is_damaged(session: Path) -> None:
    """To switch recording off must not hang on what cannot be read."""
    (session / "manifest.json").write_text("{")
    result = RUNNER.invoke(app, ["ctl", "disarm", "--session", str(session)])
    assert result.exit_code == 0, result.output
    assert (session / "level").read_text() == "off\n"


@pytest.mark.parametrize("name", ["session.json", "manifest.json"])
def test_collect_refuses_what_it_cannot_go_on_with(commands: Commands, session: Path, name: str) -> None:
    content = (session / name).read_bytes()
    before = {path.name for path in session.rglob("*")}
    processes = []
    for number, length in enumerate((0, 1, len(content) // 2, len(content.rstrip()) - 1)):
        path = shutil.copytree(session, commands.directory / str(number))
        (path / name).write_bytes(content[:length])
        processes.append((path, commands.start(STAGETRACE, "collect", path)))
    for path, process in processes:
        _, err = process.communicate(timeout=PATIENCE_S)
        said = err.decode()
        assert process.returncode == 2, said
        assert f"cannot use {path}" in said
        assert name in said
        assert "Traceback" not in said
        assert {one.name for one in path.rglob("*")} == before  # nothing of it was touched
