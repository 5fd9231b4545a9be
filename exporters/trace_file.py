"""Writes a session's timeline to a file, in Perfetto's or Chrome's format: by commits, so that memory does not grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .chrome import ChromeEncoder
from .parts import END
from .perfetto import PerfettoEncoder
from .session import TABLES, SessionError
from .timeline import Drawn, Timelines

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from .session import Session
    from .timeline import Item

_TABLES = [name for name in TABLES if name not in ("intervals", "experts")]
_BUFFER = 1 << 20  # bytes


class Encoder(Protocol):
    """What a format needs to be written."""

    def begin(self, anchors: Iterable[tuple[int, int]]) -> bytes:
        """The head of a trace; `anchors` are pairs of monotonic and wall nanoseconds."""

    def item(self, item: Item) -> bytes:
        """One item."""

    def end(self) -> bytes:
        """What follows the last item."""


# By the word after --to: the encoder, and what a file's name ends with.
FORMATS: dict[str, tuple[type[Encoder], str]] = {
    "perfetto": (PerfettoEncoder, ".pftrace"),
    "chrome": (ChromeEncoder, ".trace.json"),
}


def write_trace(
    session: Session, path: Path, encoder: Encoder, progress: Callable[[int, int, int], bool]
) -> tuple[int, Counter[str]]:
    """Writes what the session has at present to `path`, which is replaced when all is written.

    `progress` is told how many events are written and how many commits of how many are read; it stops by returning
    True. Returns how many events there are, and what became none, by reason. Raises SessionError and OSError; what
    was at `path` is unchanged then.
    """
    manifest = session.read_manifest()
    if not manifest.anchors:
        raise SessionError(f"{session.path} has no records yet: nothing can be drawn")
    numbers = [*range(manifest.rotated + 1, manifest.derived + 1), *([END] if manifest.complete else [])]
    timelines = Timelines()
    count = 0
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb", buffering=_BUFFER) as file:
            file.write(encoder.begin(manifest.anchors))
            for done, number in enumerate(numbers):
                if progress(count, done, len(numbers)):
                    raise SessionError(f"stopped after {done} of {len(numbers)} commits; {path} was not written")
                tables = {name: session.read_table(name, numbers=(number, number)) for name in _TABLES}
                for item in timelines.add(tables, manifest):
                    count += isinstance(item, Drawn)
                    file.write(encoder.item(item))
            file.write(encoder.end())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count, +timelines.left_out
