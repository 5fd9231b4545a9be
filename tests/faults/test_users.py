"""Engine and collector as different users: a group makes it work, root sees all, and else it is explained."""

from __future__ import annotations

import io
import logging
import os
import shutil
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.compute  # noqa: F401  # now: another user may not be able to read where Python is installed
import pytest
from unit.rings import FORWARD

from stagetrace.exporters.collector import Collector
from stagetrace.exporters.session import Session
from stagetrace.instrument import sharing
from stagetrace.instrument.identity import claim_identity, read_identity
from stagetrace.instrument.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ENGINE, COLLECTOR, GROUP = 65_521, 65_522, 65_523  # nobody has these
RECORDS = 100

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can be several users")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that every user may enter; the session can be made in it, and the rings."""
    for name in (sharing.VARIABLE, "STAGETRACE_RING_DIR", "STAGETRACE_SESSION"):
        monkeypatch.delenv(name, raising=False)
    path = Path(tempfile.mkdtemp(prefix="stagetrace-users-"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


def as_user(user: int, do: Callable[[], str], groups: tuple[int, ...] = ()) -> str:
    """What a function returns in a child that is another user; an exception's traceback if there was one."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups(groups)
            os.setgid(user)
            os.setuid(user)
            os.umask(0o077)
            said = do()
        except BaseException:
            said = traceback.format_exc()
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


def records(session: Path) -> Callable[[], str]:
    """An engine that records; what it logs."""

    def do() -> str:
        os.environ["STAGETRACE_SESSION"] = str(session)
        log = io.StringIO()
        logging.getLogger("stagetrace").addHandler(logging.StreamHandler(log))
        recorder = Recorder()
        if recorder.open("engine_core", {}):
            for number in range(1, RECORDS + 1):
                recorder.segment(FORWARD, number, number + 1, 0, 0)
        return log.getvalue()

    return do


def collects(session: Path) -> Callable[[], str]:
    """A collector that takes what is there; how many segments it has."""

    def do() -> str:
        opened = Session(session, claim_identity(session))
        collector = Collector(opened)
        for _ in range(3):
            collector.poll()
        assert collector.finish()
        return str(opened.read_table("segments").num_rows)

    return do


def test_a_group_of_both_is_enough_whoever_comes_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sharing.VARIABLE, str(GROUP))
    for first in ("engine", "collector"):
        session = place / first
        monkeypatch.setenv("STAGETRACE_RING_DIR", str(place / f"rings of {first}"))
        if first == "collector":
            assert as_user(COLLECTOR, collects(session), (GROUP,)) == "0"
        assert as_user(ENGINE, records(session), (GROUP,)) == ""
        assert as_user(COLLECTOR, collects(session), (GROUP,)) == str(RECORDS)
        assert session.stat().st_mode & 0o7777 == 0o2770
        assert not list((place / f"rings of {first}").rglob("*.ring"))
        assert "Permission denied" in as_user(COLLECTOR + 10, collects(session)), "others stay out"


def test_a_collector_that_is_root_needs_no_group(place: Path) -> None:
    session = place / "session"
    root = Path(f"/dev/shm/stagetrace-{ENGINE}")
    try:
        assert as_user(ENGINE, records(session)) == ""
        assert list(root.rglob("*.ring"))
        assert collects(session)() == str(RECORDS)
        identity = read_identity(session)
        assert identity is not None and not (root / identity.session).exists()
    finally:
        shutil.rmtree(root)


def test_without_a_group_an_engine_says_what_to_do(place: Path) -> None:
    session = place / "session"
    assert as_user(COLLECTOR, collects(session)) == "0"
    said = as_user(ENGINE, records(session))
    assert "records nothing in this process" in said
    assert "belongs to another user" in said and "STAGETRACE_GROUP" in said


def test_rings_that_another_user_put_in_place_are_not_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = place / "session"
    monkeypatch.setenv("STAGETRACE_RING_DIR", str(place / "rings"))
    assert as_user(ENGINE, lambda: claim_identity(session).session) == read_identity(session).session  # type: ignore[union-attr]
    (place / "rings").mkdir()
    (place / "rings").chmod(0o777)
    (place / "rings" / read_identity(session).session).mkdir(mode=0o700)  # type: ignore[union-attr]
    said = as_user(ENGINE, records(session))
    assert "STAGETRACE_RING_DIR" in said and "records nothing" in said


@pytest.mark.parametrize("name", ["no-such-group", "99999999999", "9" * 5000])
def test_a_group_that_is_not_there_is_named(place: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(sharing.VARIABLE, name)
    monkeypatch.setenv("STAGETRACE_RING_DIR", str(place / "rings"))
    said = as_user(ENGINE, records(place / "session"))
    assert f"there is no group {name}" in said
    assert (place / "session").stat().st_mode & 0o7777 == 0o700
