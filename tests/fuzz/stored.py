"""Fuzzed: a session's files, as report, top and doctor read them, and as collect and rebuild go on with them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from fuzz import material
from fuzz.script import Script
from fuzz.work import DIRECTORY, put, replace_value
from unit.rings import environment

from stagetrace.analysis.doctor import session_parts, session_view
from stagetrace.analysis.report import summarise
from stagetrace.analysis.report import to_json as report_json
from stagetrace.analysis.top import look, plain_lines
from stagetrace.analysis.top import to_json as top_json
from stagetrace.exporters.collector import Collector
from stagetrace.exporters.control import read_switches
from stagetrace.exporters.rebuild import rebuild_tables
from stagetrace.exporters.session import Session, SessionError
from stagetrace.instrument.levels import session_level
from stagetrace.instrument.stages import Level

if TYPE_CHECKING:
    from pathlib import Path

_SMALL = ("session.json", "manifest.json", "switches.jsonl", "level")


def session_files(data: bytes) -> None:
    """session.json, manifest.json, the switches and the level: cut, altered, exchanged, or anything at all."""
    _altered_session(Script(data), _SMALL)


def session_tables(data: bytes) -> None:
    """The Parquet parts of raw records and tables: cut at any byte, altered, exchanged, or anything at all."""
    names = [name for name in material.session_files() if name.endswith(".parquet")]
    _altered_session(Script(data), names)


def session_taken_up(data: bytes) -> None:
    """Any of the files: a collector goes on with the session, or its tables are derived again."""
    path = DIRECTORY / "taken-up"
    shutil.rmtree(path, ignore_errors=True)
    script = Script(data)
    _alter(script, path, [*material.session_files()])
    again = script.flag()
    try:
        session = Session.open(path)
        with environment(STAGETRACE_RING_DIR=str(DIRECTORY / "rings")):
            if again:
                rebuild_tables(session, lambda done, total: None)
            else:
                assert Collector(session, ["serve"]).finish()
    except SessionError as error:
        assert str(path) in str(error)
        return
    assert session.read_manifest().complete
    if again:
        show_report(session)
    else:  # a damaged table stays what it is: to rebuild is for the user to say
        _show(session, 0)


def _altered_session(script: Script, names: tuple[str, ...] | list[str]) -> None:
    path = DIRECTORY / "session"
    _alter(script, path, names)
    try:
        session = Session.open(path)
    except SessionError as error:
        assert str(path) in str(error)
        return
    _show(session, script.below(4))
    assert session_level(path) in Level
    for switch in read_switches(session):
        assert switch.before in Level


def _alter(script: Script, path: Path, names: tuple[str, ...] | list[str]) -> None:
    """The session at a path, with one or two of some of its files altered."""
    for name, content in material.session_files().items():
        if (path / name).is_file() and name not in names:
            continue
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    for _ in range(1 + script.below(2)):
        name = script.one_of(names)
        content = bytearray((path / name).read_bytes()) if (path / name).is_file() else bytearray()
        deed = script.below(7)
        if deed == 0:
            del content[script.below(len(content) + 1) :]
        elif deed == 1:
            put(content, script.below(len(content) + 1), script.take(1 + script.below(16)))
        elif deed == 2:
            at = script.below(len(content) + 1)
            content[at:at] = script.take(1 + script.below(16))
        elif deed == 3:
            content[:] = script.rest()
        elif deed == 4:
            content[:] = material.session_files()[script.one_of([*material.session_files()])]
        elif deed == 5:
            replace_value(script, content)
        else:
            (path / name).unlink(missing_ok=True)
            continue
        (path / name).write_bytes(content)


def _show(session: Session, how: int) -> None:
    """One of the ways to show a session; what cannot be read is a SessionError that names the session."""
    try:
        (show_report, _last, _top, show_doctor)[how](session)
    except SessionError as error:
        assert str(session.path) in str(error)


def show_report(session: Session) -> None:
    json.loads(report_json(summarise(session)))


def _last(session: Session) -> None:
    summarise(session, 0.05)


def _top(session: Session) -> None:
    shown = look(session, 10.0, 1_800_000_000 * 10**9)
    json.loads(top_json(shown))
    plain_lines(shown, 100, "utf-8")


def show_doctor(session: Session) -> None:
    view = session_view(session, {})
    json.dumps(view)
    session_parts(view)
