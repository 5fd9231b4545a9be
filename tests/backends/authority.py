"""A certificate authority for tests: certificates of 127.0.0.1 and of clients, made by openssl."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")


class Authority:
    """Signs certificates; its own is the file `certificate`."""

    def __init__(self, directory: Path):
        directory.mkdir()
        self._directory = directory
        self.certificate, self._key = self._files("authority")
        _openssl("req", "-x509", *_KEY, "-subj", "/CN=authority", "-keyout", self._key, "-out", self.certificate)

    def _files(self, name: str) -> tuple[Path, Path]:
        return self._directory / f"{name}.pem", self._directory / f"{name}.key"

    def sign(self, name: str, valid_for: str) -> tuple[Path, Path]:
        """A certificate and its key; `valid_for` is its subjectAltName, IP:127.0.0.1 for example."""
        certificate, key = self._files(name)
        signed_by = ("-CA", self.certificate, "-CAkey", self._key, "-addext", f"subjectAltName={valid_for}")
        _openssl("req", "-x509", *_KEY, "-subj", f"/CN={name}", "-keyout", key, "-out", certificate, *signed_by)
        return certificate, key


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
