"""Tests of session.json: whoever comes first makes it, and everybody has the same identity."""

from __future__ import annotations

import json
import stat
import time
from typing import TYPE_CHECKING

import pytest
from unit.rings import output_of, python

from stagetrace.instrument import identity
from stagetrace.instrument.identity import claim_identity, read_identity

if TYPE_CHECKING:
    from pathlib import Path

CLAIM = """
import sys, time
from pathlib import Path
from stagetrace.instrument.identity import claim_identity
print("ready", flush=True)
while time.time() < float(sys.argv[1]):
    pass
found = claim_identity(Path(sys.argv[2]))
print(found.session, found.key.hex())
"""


def test_the_first_claim_makes_it_and_later_ones_find_it(tmp_path: Path):
    first = claim_identity(tmp_path / "new" / "session")
    assert claim_identity(tmp_path / "new" / "session") == first == read_identity(tmp_path / "new" / "session")
    assert len(first.key) == 16
    assert len(bytes.fromhex(first.session)) == 16


def test_two_sessions_have_different_identities(tmp_path: Path):
    one, other = claim_identity(tmp_path / "one"), claim_identity(tmp_path / "other")
    assert one.session != other.session
    assert one.key != other.key


def test_directory_and_key_are_private(tmp_path: Path):
    claim_identity(tmp_path / "session")
    assert stat.S_IMODE((tmp_path / "session").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "session" / identity.FILE).stat().st_mode) == 0o600


def test_processes_that_claim_at_once_agree(tmp_path: Path):
    at = time.time() + 1.0
    claims = [python(CLAIM, tmp_path, str(at), str(tmp_path / "session")) for _ in range(6)]
    found = {output_of(claim).splitlines()[1] for claim in claims}
    mine = claim_identity(tmp_path / "session")
    assert found == {f"{mine.session} {mine.key.hex()}"}


def test_a_file_that_is_written_late_is_waited_for(tmp_path: Path):
    """The first comer makes the file and then writes it; who comes in between waits."""
    (tmp_path / identity.FILE).touch()
    waiting = python(CLAIM, tmp_path, "0", str(tmp_path))
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "ready\n"
    (tmp_path / identity.FILE).write_text(json.dumps({"id": "ab", "key": "cd"}), "utf-8")
    assert output_of(waiting) == "ab cd\n"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"id": "ab"}',
        '{"id": "ab", "key": "no hex"}',
        "\x00\xff",
        "null",
        '{"id": "../up", "key": "cd"}',
        '{"id": "", "key": "cd"}',
        "[" * 9_000,
    ],
)
def test_an_unreadable_file_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str):
    monkeypatch.setattr(identity, "_PATIENCE_S", 0.02)
    (tmp_path / identity.FILE).write_text(content, "latin-1")
    assert read_identity(tmp_path) is None
    with pytest.raises(OSError, match="remove the directory or name another"):
        claim_identity(tmp_path)
    assert (tmp_path / identity.FILE).read_text("latin-1") == content, "somebody else's file was overwritten"


def test_where_no_directory_can_be_made_it_is_an_os_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        claim_identity(tmp_path / "file" / "session")
