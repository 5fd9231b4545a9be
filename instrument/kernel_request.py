"""The request for a kernel window, which `stagetrace ctl kernel` leaves in the session for a running server's ranks.

A window is a folder `kernel/<number>` there. Each rank that takes part marks its begin with `<pid>.begun`, and leaves
`<pid>.trace.json` (Chrome's format, from torch.profiler) and, last, `<pid>.json`, what it says of the window.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

KERNEL_DIRECTORY = "kernel"
STEP_RANGE = "stagetrace.step"  # the range that a rank opens and closes at the begin of each step, to tie two clocks
_REQUEST = "request.json"
MOST_STEPS, MOST_SECONDS, MOST_MEGABYTES = 1000, 600, 65_536


@dataclass(frozen=True)
class KernelRequest:
    """A window of `steps` steps of each rank, which ends early after `seconds`, or when memory grew by `megabytes`."""

    number: int
    steps: int
    seconds: float
    megabytes: int

    def __post_init__(self) -> None:
        for name, most in (("steps", MOST_STEPS), ("seconds", MOST_SECONDS), ("megabytes", MOST_MEGABYTES)):
            if not 0 < getattr(self, name) <= most:
                raise ValueError(f"a window has 1 to {most:,} {name}")
        if self.number <= 0:
            raise ValueError("windows are counted from 1")

    def folder(self, session: Path) -> Path:
        """Where what the ranks leave is."""
        return session / KERNEL_DIRECTORY / str(self.number)

    def write(self, session: Path) -> None:
        """Leaves the request in the session, whole at once. Raises OSError."""
        self.folder(session).mkdir(parents=True, exist_ok=True)
        write_whole(session / KERNEL_DIRECTORY / _REQUEST, json.dumps(asdict(self)))


def read_request(session: Path) -> KernelRequest | None:
    """The request that is there now; None for none, or for one that cannot be used."""
    try:
        data = json.loads((session / KERNEL_DIRECTORY / _REQUEST).read_text("utf-8"))
        return KernelRequest(int(data["number"]), int(data["steps"]), float(data["seconds"]), int(data["megabytes"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def withdraw(session: Path) -> None:
    """Takes the request back."""
    (session / KERNEL_DIRECTORY / _REQUEST).unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """The file has all of the text, or is not there. Raises OSError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, "utf-8")
    part.replace(path)
