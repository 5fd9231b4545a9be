"""Whether the advice works: a cause put there on purpose, a flag that the diagnosis suggests, and the load again.

    .venv/bin/python benchmarks/advice.py [--json] [--seed N] [--only CAUSE ...] [--keep DIR]

Of each cause it records a session, and the same load with the one setting changed that mends it (on_purpose/:
advised). It checks that the diagnosis's first finding names the cause and suggests that flag, and shows what was
predicted at most beside what `stagetrace compare` finds. 1 is returned where the flag is not among what the finding
suggests, or no gain can be shown. Both sessions are kept with --keep, to look at them in full.
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
from on_purpose.plans import PLANS
from rich.console import Console

from stagetrace.analysis.diagnosis.diagnose import diagnose
from stagetrace.analysis.show import Grid, print_parts, share_text
from stagetrace.exporters.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from on_purpose.plan import Planned

WITH_ADVICE = [name for name, plan in PLANS.items() if plan(random.Random(0)).advised is not None]
SHOWN = ("e2e_mean", "ttft_mean", "itl_mean", "itl_p99", "itl_mixed_mean")


@dataclass(frozen=True)
class Gain:
    """What a cause's advice was said to give, and gave; shares are of the mean request's time before."""

    cause: str
    found: str | None  # the first finding
    names_it: bool  # whether that is the cause that was put there
    before: str  # the setting as it was put there
    taken: str  # as it was changed
    place: int | None  # of the flag among what the finding suggests, from 1 on; None: it does not
    predicted_at_most: float | None
    still_found: bool
    compared: dict[str, Any]  # by metric, what `stagetrace compare` says

    @property
    def works(self) -> bool:
        """Whether the advice was given, and a gain was shown: of the whole request's time or of the cause's phase."""
        better = any(row["better"] for row in self.compared.values())
        return self.names_it and self.place is not None and better


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
    flag, was, then = changed(plan.arguments, plan.advised)
    return Gain(
        cause=f"{plan.cause} ({plan.engine.name})",
        found=first.cause.id if first else None,
        names_it=first is not None and first.cause.id in plan.right,
        before=f"{flag} {was}" if was else f"no {flag}",
        taken=f"{flag} {then}" if then else f"no {flag}",
        place=next((number for number, each in enumerate(tries, 1) if each.flag.split(" ")[0] == flag), None),
        predicted_at_most=first.recoverable_share if first else None,
        still_found=any(each.cause.id in plan.right for each in after.findings),
        compared=compared(paths[0] / "session", paths[1] / "session"),
    )


def changed(before: Sequence[str], after: Sequence[str]) -> tuple[str, str, str]:
    """The one flag that differs, with its values before and after; empty where it is left out."""
    one, other = settings(before), settings(after)
    (flag,) = {name for name in {**one, **other} if one.get(name) != other.get(name)}
    return flag, one.get(flag, ""), other.get(flag, "")


def settings(arguments: Sequence[str]) -> dict[str, str]:
    """An engine's arguments: values by flag, empty for a flag that stands alone."""
    found: dict[str, str] = {}
    flag = ""
    for word in arguments:
        if word.startswith("--"):
            flag = word
            found[flag] = ""
        else:
            found[flag] = word
    return found


def record_once(plan: Planned, path: Path, seed: int) -> None:
    """Records a session unless it was kept."""
    if not (path / CASE).is_file():
        (path.parent / "models").mkdir(parents=True, exist_ok=True)
        record_case(plan, path.parent / "models", path, seed)


def compared(before: Path, after: Path) -> dict[str, Any]:
    """What `stagetrace compare` says of SHOWN. Raises CalledProcessError when it fails."""
    command = [sys.executable, "-m", "stagetrace.cli.main", "compare", str(before), str(after), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {row["metric"]: row for row in json.loads(done.stdout)["metrics"] if row["metric"] in SHOWN}


def change(row: dict[str, Any] | None) -> str:
    """A metric's change with its interval; in brackets where no difference can be shown."""
    if row is None or row["change"] is None:
        return "-"
    text = f"{row['change']:+.0%}"
    if row["change_low"] is not None:
        text += f" ({row['change_low']:+.0%} to {row['change_high']:+.0%})"
    return text if row["better"] is not None else f"[{text}]"


def show(gains: list[Gain]) -> None:
    """Prints the table."""
    rows = [
        [
            each.cause,
            each.found or "nothing",
            each.before,
            each.taken,
            "not suggested" if each.place is None else f"{each.place}.",
            share_text(each.predicted_at_most),
            *(change(each.compared.get(metric)) for metric in SHOWN),
            "still there" if each.still_found else "gone",
        ]
        for each in gains
    ]
    columns = ("put there", "first finding", "with", "advice taken", "suggested", "recoverable at most")
    print_parts(
        [
            Grid("The advice, taken", (*columns, *SHOWN, "finding"), rows, text=True),
            "What is recoverable is a share of all requests' time (e2e_mean); a metric's change is that of `stagetrace"
            " compare`, with its 95 % interval, and in brackets where these data show no difference.",
        ],
        Console(width=None if sys.stdout.isatty() else 280),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Take the diagnosis's advice and measure what it gives.")
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
        print(json.dumps({each.cause: asdict(each) | {"works": each.works} for each in gains}))
    return 0 if all(each.works for each in gains) else 1


if __name__ == "__main__":
    sys.exit(main())
