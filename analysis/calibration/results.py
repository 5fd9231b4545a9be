"""A calibration: what was measured on one device, and the file that it is kept in."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

VERSION = 1  # of the file
BUSY_PROCESSORS = 0.15  # that other programs took, from which on a calibration is marked as busy
BUSY_DRIFT = 0.15  # by which the rounds' best times differ, in the middle of all cases


class CalibrationError(Exception):
    """A calibration that cannot be made or read; the message says what to do."""


@dataclass(frozen=True)
class Row:
    """One component at one size. Times are of one call, in seconds, over all samples of all rounds."""

    component: str
    op: str
    arithmetic: str
    kernel: str
    size: str
    bytes: int
    operations: int
    ranks: int
    shape: dict[str, int]
    samples: int
    best_s: float
    median_s: float
    q1_s: float
    q3_s: float
    rounds_s: list[float]  # the best of each round

    @property
    def name(self) -> tuple[str, str, str, str, str, int]:
        """What tells it from every other row."""
        return self.component, self.op, self.arithmetic, self.kernel, self.size, self.ranks

    @property
    def bytes_per_s(self) -> float:
        """At the best time: what the device can do."""
        return self.bytes / self.best_s

    @property
    def operations_per_s(self) -> float:
        """At the best time."""
        return self.operations / self.best_s

    @property
    def spread(self) -> float:
        """How far the rounds' best times lie apart, as a share of the best: what repeats is within it."""
        return max(self.rounds_s) / self.best_s - 1


@dataclass
class Calibration:
    """All rows of a device, and under which conditions they were measured."""

    device: dict[str, Any]  # name, device, threads, torch, ...: measure.device_of
    rows: list[Row]
    skipped: dict[str, str] = field(default_factory=dict)  # name of a case -> why
    other_processors: float | None = None  # that other programs took meanwhile, on average; None: not known
    quick: bool = False
    made_ns: int = 0  # wall

    @property
    def name(self) -> str:
        """The device's name."""
        return str(self.device.get("name", ""))

    @property
    def threads(self) -> int | None:
        """Of the host, where the device is a processor; else None, as they do not matter then."""
        return int(self.device.get("threads", 0)) if self.device.get("device") == "cpu" else None

    @property
    def drift(self) -> float:
        """By how much the rounds' best times differ, in the middle of all rows.

        Without collectives, as far as there are others: how soon the system wakes their processes differs by as much
        as 100 % on a quiet machine.
        """
        alone = [row for row in self.rows if row.ranks == 1] or self.rows
        spreads = sorted(row.spread for row in alone)
        return spreads[len(spreads) // 2] if spreads else 0.0

    @property
    def busy(self) -> str:
        """How it shows that the machine was not quiet; empty when it was."""
        signs = []
        if self.other_processors is not None and self.other_processors > BUSY_PROCESSORS:
            signs.append(f"other programs took {self.other_processors:.1f} processors")
        if self.drift > BUSY_DRIFT:
            signs.append(f"the rounds differ by {self.drift:.0%}")
        return " and ".join(signs)

    @property
    def source(self) -> str:
        """As a source of ceilings."""
        made = datetime.fromtimestamp(self.made_ns / 1e9, UTC).date().isoformat()
        threads = f", {self.threads} thread{'s' * (self.threads != 1)}" if self.threads else ""
        return f"measured by stagetrace calibrate on {self.name}{threads}, {made}"


def file_name(name: str, threads: int | None) -> str:
    """Of a device's calibration."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "device"
    return f"{words}{f'-{threads}-threads' if threads else ''}.json"


def directory() -> Path:
    """Where calibrations are kept: of the user, as the XDG Base Directory Specification names it."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return Path(data) / "stagetrace" / "calibrations"


def save(calibration: Calibration, path: Path) -> None:
    """Writes the file whole, or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps({"version": VERSION, **asdict(calibration)}, indent=1) + "\n", "utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load(path: Path) -> Calibration:
    """Reads a calibration. Raises CalibrationError."""
    again = "Make it again with `stagetrace calibrate`."
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} is no calibration: it is not JSON ({error}). {again}") from error
    if not isinstance(data, dict) or data.pop("version", None) != VERSION:
        raise CalibrationError(f"{path} is no calibration of this version of stagetrace. {again}")
    try:
        rows = [_checked(Row(**row)) for row in data.pop("rows")]
        found = Calibration(rows=rows, **data)
        if not isinstance(found.device, dict) or not isinstance(found.skipped, dict):
            raise TypeError("device and skipped are objects")
        int(found.device.get("threads", 0)), datetime.fromtimestamp(found.made_ns / 1e9, UTC)
        return found
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, OSError) as error:
        raise CalibrationError(f"{path} is damaged ({type(error).__name__}: {error}). {again}") from error


def _checked(row: Row) -> Row:
    texts = (row.component, row.op, row.arithmetic, row.kernel, row.size)
    if not all(isinstance(text, str) for text in texts) or not isinstance(row.shape, dict):
        raise TypeError("a row's names are text, its shape an object")
    times = (row.best_s, row.median_s, row.q1_s, row.q3_s, *row.rounds_s)
    if not row.rounds_s or not all(math.isfinite(time) and time > 0 for time in times):
        raise ValueError("a time is not above 0")
    if min(row.bytes, row.operations) < 0 or row.ranks < 1:
        raise ValueError("a count is negative")
    return row


def find(name: str, threads: int | None) -> Path | None:
    """The calibration of a device that is kept here; None when there is none."""
    path = directory() / file_name(name, threads)
    return path if path.is_file() else None


@dataclass(frozen=True)
class Change:
    """A row that two calibrations have, with best times that differ by more than both spreads."""

    row: Row
    before: Row

    @property
    def ratio(self) -> float:
        """Of the rates, now over before."""
        return self.before.best_s / self.row.best_s


def by_chance(now: Calibration, before: Calibration) -> float:
    """How many rows that both have differ so by chance where nothing changed.

    They do only if all rounds of one were faster than all of the other, which of n and m rounds alike in all happens
    to 2 of the (n + m)! / (n! m!) orders that they can be in: 1 of 126 with five rounds each, 1 of 10 with three.
    """
    known = {row.name: len(row.rounds_s) for row in before.rows}
    pairs = [(len(row.rounds_s), known[row.name]) for row in now.rows if row.name in known]
    return sum(2 / math.comb(n + m, n) for n, m in pairs)


def changes(now: Calibration, before: Calibration) -> tuple[list[Change], int]:
    """What differs by more than the spread of either, the largest first; and how many rows both have."""
    known = {row.name: row for row in before.rows}
    pairs = [Change(row, known[row.name]) for row in now.rows if row.name in known]
    beyond = [pair for pair in pairs if max(pair.ratio, 1 / pair.ratio) - 1 > max(pair.row.spread, pair.before.spread)]
    return sorted(beyond, key=lambda pair: -abs(math.log(pair.ratio))), len(pairs)
