"""File systems of a size, for tests of what happens when one is full. Only root may mount one."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def mounted(directory: Path, size: str) -> Iterator[None]:
    """A tmpfs of that size on a directory that exists, unmounted at the end."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "stagetrace-test", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)
