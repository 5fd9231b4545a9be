"""Whether the advice works: a cause put there on purpose, the flag that the diagnosis suggests, and the load again.

    .venv/bin/python benchmarks/advice.py [--json] [--seed N] [--only CAUSE ...] [--keep DIR]

Of each cause it records a session, takes the flag that `stagetrace diagnose` names first, records the same load with
it, and shows what was predicted at most beside what was gained. Both sessions are kept with --keep, so that
`stagetrace compare` can look at them in full.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from diagnosis_score import CASE, record_case
from on_purpose import PLANS
from rich.console import Console

from stagetrace.analysis.diagnosis.diagnose import diagnose
from stagetrace.analysis.show import Grid, duration_text, print_parts, share_text
from stagetrace.exporters.session import Session

if TYPE_CHECKING:
    from on_purpose import Planned

WITH_ADVICE = [name for name, plan in PLANS.items() if plan(random.Random(0)).advised is not None]
SHOWN = ("ttft_mean", "tpot_p95", "e2e_mean")


@dataclass(frozen=True)
class Gain:
    """What a cause's advice was said to give, and gave; shares are of the mean request's time before."""

    cause: str
    found: str | None  # the first finding
    flag: str  # that it suggests first
    predicted_at_most: float | None
    before_ns: float  # of a request, mean
    after_ns: float
    still_found: bool
    compared: dict[str, Any]  # what `stagetrace compare` says of some metrics

    @property
    def gained(self) -> float:
        """Of the mean request's time, below 0 for a loss."""
        return 1 - self.after_ns / self.before_ns


def one(name: str, seed: int, place: Path) -> Gain:
    """Records a cause and its mended twin, unless they are there, and compares them."""
    key = f"{name}-{seed}-0"
    plan = PLANS[name](random.Random(key))
    assert plan.advised is not None
    paths = [place / key, place / f"{key}-advised"]
    for each, path in zip((plan, replace(plan, arguments=plan.advised)), paths, strict=True):
        record_once(each, path, seed)
    before, after = (diagnose(Session.open(path / "session")) for path in paths)
    first = before.findings[0] if before.findings else None
    tries = first.cause.next.get(before.engine, ()) if first else ()
    return Gain(
        cause=name,
        found=first.cause.id if first else None,
        flag=tries[0].flag if tries else "",
        predicted_at_most=first.recoverable_share if first else None,
        before_ns=before.request_time_ns / max(before.requests, 1),
        after_ns=after.request_time_ns / max(after.requests, 1),
        still_found=any(first is not None and each.cause.id == first.cause.id for each in after.findings),
        compared=compared(paths[0] / "session", paths[1] / "session"),
    )


def record_once(plan: Planned, path: Path, seed: int) -> None:
    """Records a session unless it was kept."""
    if not (path / CASE).is_file():
        (path.parent / "models").mkdir(parents=True, exist_ok=True)
        record_case(plan, path.parent / "models", path, seed)


def compared(before: Path, after: Path) -> dict[str, Any]:
    """What `stagetrace compare` says of SHOWN."""
    command = [sys.executable, "-m", "stagetrace.cli.main", "compare", str(before), str(after), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip()[-300:]}
    return {row["metric"]: row for row in json.loads(done.stdout).get("metrics", []) if row.get("metric") in SHOWN}


def show(gains: list[Gain]) -> None:
    """Prints the table."""
    rows = [
        [
            each.cause,
            each.found or "nothing",
            each.flag,
            share_text(each.predicted_at_most),
            share_text(each.gained),
            duration_text(each.before_ns),
            duration_text(each.after_ns),
            "still there" if each.still_found else "gone",
        ]
        for each in gains
    ]
    columns = ("put there", "first finding", "flag", "predicted at most", "gained", "a request", "then", "finding")
    print_parts([Grid("The first advice, taken (shares are of the mean request's time)", columns, rows)], Console())


def main() -> int:
    parser = argparse.ArgumentParser(description="Take the diagnosis's first advice and measure what it gives.")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is left to chance (1)")
    parser.add_argument("--only", choices=WITH_ADVICE, nargs="+", default=WITH_ADVICE, help="these causes alone")
    parser.add_argument("--keep", type=Path, help="keep the sessions here; those that are there are not recorded again")
    parser.add_argument("--json", action="store_true", help="one JSON object in the last line as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = (arguments.keep or Path(temporary)).resolve()
        gains = [one(name, arguments.seed, place) for name in arguments.only]
    show(gains)
    if arguments.json:
        print(json.dumps({each.cause: asdict(each) | {"gained": each.gained} for each in gains}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
