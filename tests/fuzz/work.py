"""What the targets share: a directory to write into, and ways to alter bytes."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fuzz.script import Script

DIRECTORY = Path(tempfile.mkdtemp(prefix="stagetrace-fuzz-"))


def clean_up() -> None:
    """Removes the directory."""
    shutil.rmtree(DIRECTORY, ignore_errors=True)


def put(image: bytearray, at: int, data: bytes) -> None:
    image[at : at + len(data)] = data[: max(0, len(image) - at)]


def replace_value(script: Script, content: bytearray) -> None:
    """Puts another JSON value in the place of one, or of a name."""
    values = [*re.finditer(rb'(?=("[^"]*"|\b-?\d+|true|false|null|\[[^\[\]]*\]|\{[^{}]*\}))', content)]
    if not values:
        return
    others = (b"null", b"true", b"-1", b"1e400", b"NaN", b'""', b"[]", b"{}", b"[[1]]", b'{"a": {}}', b'"\\ud800"')
    place = values[script.below(len(values))]
    content[place.start(1) : place.end(1)] = script.one_of((*others, str(script.number()).encode()))
