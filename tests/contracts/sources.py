"""The sources of the releases in tests/environments/releases.txt: their .py files, without the gigabytes around them.

pip says where a release's wheel lies (it knows the index, nothing here does), and single files are read out of it by
requests for ranges of bytes: a few hundred kB of a wheel of 300 MB. Where the index answers no such request, the wheel
is loaded whole, to disk, and only its .py files are kept. What was read lies in the user's cache, under the wheel's
hash, which the lock names: a wheel that is another one is an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "environments" / "releases.txt"
LINE = re.compile(r"(?P<name>[a-z][a-z0-9-]*)==(?P<version>\S+) --hash=sha256:(?P<sha256>[0-9a-f]{64})")
# Wheels of one platform, so that every machine reads the same files.
PLATFORMS = ("any", *(f"manylinux_2_{minor}_x86_64" for minor in range(39, 16, -1)), "manylinux2014_x86_64")
TIMEOUT_S = 60.0
_BUFFER = 256 * 1024


class CannotFetch(Exception):
    """A release's sources cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Release:
    """A release of an engine, or of what an engine brings along."""

    name: str
    version: str
    sha256: str  # of its wheel

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def locked(path: Path = LOCK) -> list[Release]:
    """The releases of the lock. Raises ValueError for a line that is none."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            match = LINE.fullmatch(line)
            if match is None:
                raise ValueError(f"{path}: {line!r} is not NAME==VERSION --hash=sha256:HASH")
            found.append(Release(**match.groupdict()))
    return found


class Wheel:
    """The files of a release, from the cache or else from the index."""

    def __init__(self, release: Release):
        self.release = release
        self.cache = cache() / f"{release.name}-{release.version}-{release.sha256[:16]}"

    def read(self, path: str) -> str | None:
        """A file's text; None if the release has none there. Raises CannotFetch."""
        kept = self.cache / path
        try:
            if path not in self._members:
                return None
            if not kept.is_file():
                _keep(kept, self._archive.read(path))
        except (OSError, zipfile.BadZipFile) as error:
            raise CannotFetch(f"cannot read the wheel of {self.release}: {error}. {_WHAT_TO_DO}") from error
        return kept.read_text("utf-8")

    @cached_property
    def _members(self) -> set[str]:
        """The names of its .py files."""
        kept = self.cache / "members.txt"
        if not kept.is_file():
            try:
                names = _python_files(self._archive)
            except NoRanges:
                names = self._keep_all()
            _keep(kept, "\n".join(names).encode())
        return set(kept.read_text("utf-8").split("\n"))

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(io.BufferedReader(Remote(locate(self.release)), _BUFFER))

    def _keep_all(self) -> list[str]:
        """Loads the whole wheel and keeps its .py files; their names."""
        with tempfile.TemporaryFile() as file, urllib.request.urlopen(locate(self.release), timeout=TIMEOUT_S) as wheel:
            shutil.copyfileobj(wheel, file)
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.release.sha256:
                raise CannotFetch(f"the wheel of {self.release} came with sha256 {found}, which is not {LOCK.name}'s")
            archive = zipfile.ZipFile(file)
            for name in _python_files(archive):
                _keep(self.cache / name, archive.read(name))
            return _python_files(archive)


def _python_files(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in archive.namelist() if name.endswith(".py")]


_WHAT_TO_DO = "What to do: run it where pip reaches an index that has the release (pip's own settings name it)"


def cache() -> Path:
    """Where sources are kept, as tests/environments/make.py keeps environments."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("STAGETRACE_ENVIRONMENTS") or os.path.join(base, "stagetrace")) / "sources"


def locate(release: Release) -> str:
    """The URL of the release's wheel. Raises CannotFetch, also when the index has another wheel than the lock."""
    url, sha256 = ask_pip(release.name, release.version)
    if sha256 != release.sha256:
        raise CannotFetch(f"the index has another wheel of {release} (sha256 {sha256}) than {LOCK.name} says")
    return url


def ask_pip(name: str, version: str) -> tuple[str, str]:
    """The URL and the hash of a release's wheel, by a dry run that loads its metadata alone. Raises CannotFetch."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", str(report)]
        command += ["--no-deps", "--ignore-installed", "--only-binary", ":all:", "--python-version", "3.11"]
        done = subprocess.run(
            [*command, *platforms, "--target", directory, f"{name}==={version}"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode or not report.is_file():
            said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
            raise CannotFetch(f"pip does not find {name} {version} ({said[0]}). {_WHAT_TO_DO}")
        (found,) = json.loads(report.read_text("utf-8"))["install"]
    info = found["download_info"]
    return info["url"], info.get("archive_info", {}).get("hashes", {}).get("sha256", "")


class NoRanges(Exception):
    """A server that does not answer requests for a range."""


class Remote(io.RawIOBase):
    """A file behind a URL, read in ranges. Raises NoRanges when made for one that cannot be."""

    def __init__(self, url: str):
        self._url = url
        self._at = 0
        request = urllib.request.Request(url, headers={"Range": "bytes=0-0"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            size = re.fullmatch(r"bytes 0-0/(\d+)", answer.headers.get("Content-Range") or "")
            if size is None:
                raise NoRanges
            self._size = int(size[1])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        last = min(self._at + len(buffer), self._size) - 1
        if last < self._at:
            return 0
        request = urllib.request.Request(self._url, headers={"Range": f"bytes={self._at}-{last}"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            data = answer.read()
        if len(data) != last - self._at + 1:
            raise OSError(f"{len(data)} bytes came of {last - self._at + 1}")
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _keep(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(data)
    part.replace(path)
