"""Sessions that cannot be exported: each is told with what to do, for every destination, and nothing goes out half."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from backends.receiver import GrpcReceiver
from typer.testing import CliRunner

from stagetrace.cli.main import app
from stagetrace.exporters.rebuild import rebuild_tables
from stagetrace.exporters.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def cut_table(path: Path) -> None:
    part = max((path / "tables" / "segments").iterdir())
    part.write_bytes(part.read_bytes()[:-50])


def cut_manifest(path: Path) -> None:
    manifest = path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:500])


def remove_tables(path: Path) -> None:
    shutil.rmtree(path / "tables")


def remove_identity(path: Path) -> None:
    (path / "session.json").unlink()


def remove_all(path: Path) -> None:
    for name in ("tables", "raw"):
        shutil.rmtree(path / name)
    (path / "manifest.json").unlink()


DAMAGES: dict[Callable[[Path], None], str] = {
    cut_table: "tables/segments is damaged",
    cut_manifest: "manifest.json is not JSON",
    remove_tables: "has records and no tables",
    remove_identity: "is not a stagetrace session",
    remove_all: "has no records yet",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
def test_what_is_wrong_with_a_session_is_told(
    recordings: dict[str, Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    path, output = tmp_path / "session", tmp_path / "file"
    shutil.copytree(recordings["vllm"].path, path)
    shutil.rmtree(path / "exports", ignore_errors=True)
    damage(path)
    mendable = damage in (cut_table, cut_manifest, remove_tables)
    with GrpcReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        for to in ("otlp", "perfetto", "chrome", "clickhouse", *(["prometheus"] if damage is cut_table else [])):
            url = "http://127.0.0.1:1/default"
            arguments = ["export", str(path), "--to", to, "-o", str(output), "--url", url, "--listen", "127.0.0.1:0"]
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code in (1, 2), (to, done.output)
            assert DAMAGES[damage] in done.stderr, (to, done.stderr)
            assert (f"`stagetrace rebuild {path}`" in done.stderr) == mendable
            assert done.stderr.count(DAMAGES[damage]) == 1 and "Traceback" not in done.output
            assert not output.exists() and not list(tmp_path.glob("*.partial"))
        if mendable:  # nothing was lost
            rebuild_tables(Session.open(path), lambda *_: None)
            receiver.requests.clear()
            done = CliRunner().invoke(app, ["export", str(path), "--again"])
            assert done.exit_code == 0, done.output
            assert f"{len(receiver.received())} spans sent" in done.stdout
            assert len({item.id for item in receiver.received()}) > 1000
