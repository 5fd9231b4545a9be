"""Reading single files of a wheel over HTTP: in ranges, whole where a server has none, and never another wheel."""

from __future__ import annotations

import hashlib
import io
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from contracts import sources
from contracts.sources import CannotFetch, Release, Wheel, locate, locked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILES = {"engine/__init__.py": "", "engine/work.py": "def work(): 'ä'\n", "engine/kernel.so": "x" * 3_000_000}


class Index(ThreadingHTTPServer):
    """A server with one wheel."""

    def __init__(self, ranges: bool):
        super().__init__(("127.0.0.1", 0), Answer)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, text in FILES.items():
                archive.writestr(name, text)
        self.wheel, self.ranges, self.sent = buffer.getvalue(), ranges, 0
        self.release = Release("engine", "1.0", hashlib.sha256(self.wheel).hexdigest())
        self.url = f"http://127.0.0.1:{self.server_port}/engine.whl"


class Answer(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        data, asked = self.server.wheel, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if asked and self.server.ranges:
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        try:
            self.wfile.write(data)
            self.server.sent += len(data)
        except ConnectionError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=[True, False], ids=["ranges", "whole"])
def index(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Index]:
    monkeypatch.setenv("STAGETRACE_ENVIRONMENTS", str(tmp_path / "cache"))
    with Index(request.param) as server:
        monkeypatch.setattr(sources, "ask_pip", lambda name, version: (server.url, server.release.sha256))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_files_are_read_and_kept(index: Index):
    wheel = Wheel(index.release)
    assert [wheel.read(name) for name in ("engine/work.py", "engine/__init__.py", "engine/gone.py")] == [
        FILES["engine/work.py"],
        "",
        None,
    ]
    assert {path.name for path in wheel.cache.rglob("*") if path.is_file()} == {"__init__.py", "work.py", "members.txt"}
    if index.ranges:
        assert index.sent < len(index.wheel) / 2
    before = index.sent
    assert Wheel(index.release).read("engine/work.py") == FILES["engine/work.py"]
    assert Wheel(index.release).read("engine/gone.py") is None
    assert index.sent == before, "what is in the cache was loaded again"


def test_another_wheel_is_refused(index: Index):
    other = Release("engine", "1.0", "0" * 64)
    with pytest.raises(CannotFetch, match=r"another wheel of engine 1\.0"):
        Wheel(other).read("engine/work.py")
    assert not Wheel(other).cache.exists()


def test_a_whole_wheel_that_is_not_what_the_index_said_is_refused(index: Index):
    index.ranges = False
    index.wheel += b"more"
    with pytest.raises(CannotFetch, match=r"which is not releases\.txt's"):
        Wheel(index.release).read("engine/work.py")
    assert not Wheel(index.release).cache.exists()


def test_what_is_no_wheel_is_said(index: Index):
    index.wheel = b"<html>" * 100_000
    index.ranges = True
    with pytest.raises(CannotFetch, match=r"cannot read the wheel of engine 1\.0"):
        Wheel(index.release).read("engine/work.py")


def test_a_server_that_is_gone_is_said(index: Index, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "ask_pip", lambda *_: ("http://127.0.0.1:1/x.whl", index.release.sha256))
    with pytest.raises(CannotFetch, match="What to do: run it where pip reaches an index"):
        Wheel(index.release).read("engine/work.py")


def test_pip_without_an_index_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(CannotFetch, match=r"pip does not find vllm 0\.33\.0 .* What to do: run it where pip reaches"):
        locate(next(release for release in locked() if str(release) == "vllm 0.33.0"))


@pytest.mark.parametrize("line", ["vllm==1", "vllm>=1 --hash=sha256:" + "0" * 64, "vllm==1 --hash=sha256:0"])
def test_a_line_of_the_lock_that_is_none(tmp_path: Path, line: str):
    (tmp_path / "lock").write_text(f"# more\n\n{line}\n")
    with pytest.raises(ValueError, match="is not NAME==VERSION --hash=sha256:HASH"):
        locked(tmp_path / "lock")
