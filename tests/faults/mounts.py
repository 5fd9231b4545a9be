"""File systems of a size, for tests of what happens when one is full. Only root may mount one."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def mounted(directory: Path, size: str) -> Iterator[Path]:
    """A new directory with a file system of its own with so little room; its content is gone afterwards."""
    directory.mkdir()
    options = f"size={size},mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "stagetrace-test", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)
