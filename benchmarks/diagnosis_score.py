"""How often `stagetrace diagnose` names the cause: sessions of real engines, with causes put there on purpose and none.

    .venv/bin/python benchmarks/diagnosis_score.py [--json] [--seed N] [--only CAUSE ...] [--rounds N] [--keep DIR]
    .venv/bin/python benchmarks/diagnosis_score.py --score DIR [--json]          sessions that were kept, once more

Each session has a server of its own, a load of random lengths and arrivals, and a cause of random size (on_purpose/).
A session counts as right when its first finding names the cause (of a mixture: one of them), a clean one when it has
none. The engines' environments have to be there (`make engines-env`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from engines.recording import record
from engines.server import environment
from on_purpose.load import send
from on_purpose.plan import INJECTED, WIDE, WIDE_MODEL, Planned, at_rate
from on_purpose.plans import PLANS
from quickstart.servers import MODEL_SCRIPT, VLLM, StartError
from rich.console import Console

from stagetrace.analysis.diagnosis.diagnose import diagnose
from stagetrace.analysis.show import Grid, print_parts
from stagetrace.exporters.session import Session, SessionError

CASE = "case.json"  # beside a session: what was put there
STAGETRACE = (sys.executable, "-m", "stagetrace.cli.main")
CALIBRATION = "calibration.json"
WEIGHTS = "model.safetensors"  # of a model, written last
NONE = "nothing"
AT_CAPACITY = 128  # requests at once: as many as an overloaded engine's batch may have
WRITTEN_S = 6.0  # after the end of a load until all of its requests are in the tables
console = Console()


@dataclass(frozen=True)
class Case:
    """A session with what was put there."""

    path: Path
    cause: str
    right: tuple[str, ...]
    said: str
    seed: int
    last_s: float | None = None  # it is the end of the session that was put there
    all_of: tuple[str, ...] = ()  # of a mixture: causes that are all to be named


@dataclass(frozen=True)
class Scored:
    """What the diagnosis said of a case."""

    case: Case
    found: tuple[str, ...]  # causes that stand out, the most recoverable first

    @property
    def first(self) -> str:
        """The first finding, or NONE."""
        return self.found[0] if self.found else NONE

    @property
    def is_right(self) -> bool:
        """Whether the first finding names the cause; of a clean session, whether there is none."""
        return self.first in self.case.right if self.case.right else not self.found

    @property
    def names_all(self) -> bool:
        """Of a mixture: whether all that was put there is among the findings."""
        return {*self.case.all_of} <= {*self.found}


# Recording


def build(models: Path, kind: str) -> Path:
    """One of the models, built once."""
    path = models / kind
    if kind == WIDE:
        command = [str(WIDE_MODEL), str(build(models, "dense")), str(path)]
    else:
        command = [str(MODEL_SCRIPT), str(path), *(["--dense"] if kind == "dense" else [])]
    if kind != WIDE or not (path / WEIGHTS).is_file():
        subprocess.run([str(VLLM.python), *command], env=environment(), check=True, capture_output=True)
    return path


def calibrated(models: Path) -> Path:
    """What this machine can do with one thread, measured once: what the roofs are told by."""
    path = models / CALIBRATION
    if not path.is_file():
        measured = ["--threads", "1", "--quick", "--only", "memory", "--only", "gemm", "--only", "attention"]
        command = ["calibrate", "--python", str(VLLM.python), "--out", str(path), *measured]
        subprocess.run([*STAGETRACE, *command], env=environment(), check=True, capture_output=True)
    return path


def record_case(plan: Planned, models: Path, directory: Path, seed: int) -> None:
    """Records one session, and one for every further load, beside it. Raises StartError, ValueError when requests fail.

    The further ones are copies of the session as it is after their load, which is its end.
    """
    directory.mkdir(parents=True)
    kind = plan.model
    model = build(models, kind)
    variables = {**plan.variables, "INJECTED": json.dumps(plan.injected)}
    if plan.injected:
        variables["PYTHONPATH"] = os.pathsep.join([str(INJECTED), *filter(None, [variables.get("PYTHONPATH")])])
    run = ("--level", plan.level, "--no-report")
    with record(model, directory, *plan.arguments, env=variables, run=run, engine=plan.engine) as recording:
        port = int(recording.server.root_url.rpartition(":")[2])
        for number, (asks, width) in enumerate(plan.more, 1):
            began = time.monotonic()
            put(replace(plan, asks=asks, width=width), port, seed + number)
            time.sleep(WRITTEN_S)
            beside = directory.with_name(f"{directory.name}-{number}")
            shutil.rmtree(beside, ignore_errors=True)
            shutil.copytree(recording.path, beside / "session")
            write_case(replace(plan, asks=asks, width=width), beside, seed, time.monotonic() - began)
        if plan.times_capacity is not None:
            asks = at_rate(plan.asks, plan.times_capacity * capacity(plan, port, seed))
            plan = replace(plan, asks=asks)
        alone = not plan.more and plan.times_capacity is None
        began = time.monotonic()
        put(plan, port, seed)
        lasted = None if alone else time.monotonic() - began + WRITTEN_S
    if plan.model == WIDE:
        shutil.copy(calibrated(models), directory / CALIBRATION)
    write_case(plan, directory, seed, lasted)


def capacity(plan: Planned, port: int, seed: int) -> float:
    """Requests a second that the server can finish, of the plan's, with its batch as full as it may be."""
    began = time.monotonic()
    put(replace(plan, width=AT_CAPACITY), port, seed + 1)
    found = len(plan.asks) / (time.monotonic() - began)
    time.sleep(WRITTEN_S)
    return found


def put(plan: Planned, port: int, seed: int) -> None:
    """Puts the load on the server. Raises ValueError when many requests fail."""
    wrong = asyncio.run(send(plan.asks, plan.width, port, seed))
    if len(wrong) > len(plan.asks) // 10:
        raise ValueError(f"{len(wrong)} of {len(plan.asks)} requests failed: {wrong[0]}")


def write_case(plan: Planned, directory: Path, seed: int, last_s: float | None) -> None:
    """Says beside a session what was put there."""
    case = {"cause": plan.cause, "right": plan.right, "said": plan.said, "seed": seed, "last_s": last_s}
    (directory / CASE).write_text(json.dumps(case | {"all_of": plan.all_of}))


def read_case(directory: Path) -> Case:
    """A case that was kept."""
    said = json.loads((directory / CASE).read_text())
    all_of = tuple(said.get("all_of", ()))
    return Case(directory, said["cause"], tuple(said["right"]), said["said"], said["seed"], said.get("last_s"), all_of)


def plans(seed: int, rounds: int, only: list[str]) -> list[tuple[str, Planned]]:
    """The servers to record of a seed, by the name of their folder: `rounds` of each kind."""
    names = [name for name in PLANS if name in only or not only]
    chosen = []
    for number in range(rounds):
        for name in names:
            key = f"{name}-{seed}-{number}"
            chosen.append((key, PLANS[name](random.Random(key))))
    return chosen


# Scoring


def score(case: Case) -> Scored:
    """What the diagnosis says of a session. This machine's own calibration is left out: no run depends on it.

    Where the speed of light is what matters the machine was calibrated with the session.
    """
    calibration = case.path / CALIBRATION
    found = diagnose(
        Session.open(case.path / "session"), case.last_s, calibration=calibration if calibration.is_file() else None
    )
    return Scored(case, tuple(finding.cause.id for finding in found.findings))


def figures(scored: list[Scored]) -> dict[str, Any]:
    """Precision and recall by cause, and what the goals are about."""
    with_cause = [one for one in scored if one.case.right]
    clean = [one for one in scored if not one.case.right]
    mixtures = [one for one in with_cause if one.case.all_of]
    names = sorted({name for one in with_cause for name in one.case.right} | {one.first for one in scored} - {NONE})
    by_cause = {}
    for name in names:
        there = [one for one in with_cause if name in one.case.right and not one.case.all_of]
        named = [one for one in scored if one.first == name]
        right = [one for one in named if name in one.case.right]
        by_cause[name] = {
            "sessions": len(there),
            "precision": len(right) / len(named) if named else None,
            "recall": sum(one.first == name for one in there) / len(there) if there else None,
        }
    return {
        "sessions": len(scored),
        "with_cause": len(with_cause),
        "first_is_right": sum(one.is_right for one in with_cause) / len(with_cause) if with_cause else None,
        "mixtures": len(mixtures),
        "mixtures_first_is_right": sum(one.is_right for one in mixtures) / len(mixtures) if mixtures else None,
        "mixtures_all_named": sum(one.names_all for one in mixtures) / len(mixtures) if mixtures else None,
        "clean": len(clean),
        "clean_with_findings": sum(not one.is_right for one in clean) / len(clean) if clean else None,
        "by_cause": by_cause,
        "confusion": confusion(scored),
        "wrong": [
            {"session": str(one.case.path), "put": one.case.said, "found": list(one.found)}
            for one in scored
            if not (one.is_right and one.names_all)
        ],
    }


def confusion(scored: list[Scored]) -> dict[str, dict[str, int]]:
    """What was put there -> what the first finding was -> how often."""
    found: dict[str, dict[str, int]] = {}
    for one in scored:
        row = found.setdefault(one.case.cause, {})
        row[one.first] = row.get(one.first, 0) + 1
    return found


def show(found: dict[str, Any]) -> None:
    """Prints the tables."""

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.0%}"

    rows = [
        [name, str(row["sessions"]), percent(row["precision"]), percent(row["recall"])]
        for name, row in found["by_cause"].items()
    ]
    firsts = sorted({first for row in found["confusion"].values() for first in row})
    table = [[cause, *(str(row.get(first, 0) or ".") for first in firsts)] for cause, row in found["confusion"].items()]
    wrong = [[each["put"], ", ".join(each["found"]) or NONE] for each in found["wrong"]]
    parts: list[Any] = [
        Grid("First finding, by cause", ("cause", "sessions", "precision", "recall"), rows),
        Grid("What was put there (row) and what the first finding was (column)", ("", *firsts), table),
    ]
    if wrong:
        parts.append(Grid("Not right, or not all of a mixture", ("put there", "found"), wrong, text=True))
    parts.append(
        f"{found['sessions']} sessions. First finding right in {percent(found['first_is_right'])} of"
        f" {found['with_cause']} with a cause (goal: 90 %); findings in {percent(found['clean_with_findings'])} of"
        f" {found['clean']} clean ones (goal: at most 5 %)."
    )
    if found["mixtures"]:
        parts.append(
            f"Of these {found['mixtures']} are mixtures of two causes: the first finding is one of them in"
            f" {percent(found['mixtures_first_is_right'])}, both are among the findings in"
            f" {percent(found['mixtures_all_named'])}."
        )
    print_parts(parts, console)


def main() -> int:
    parser = argparse.ArgumentParser(description="Score the diagnosis on sessions with known causes.")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is left to chance (1)")
    parser.add_argument(
        "--rounds", type=int, default=1, help="servers of each kind (1): a session each; a clean one gives two or four"
    )
    parser.add_argument("--only", choices=sorted(PLANS), nargs="+", default=[], help="these sessions alone")
    parser.add_argument("--keep", type=Path, help="keep the sessions here; those that are there are not recorded again")
    parser.add_argument("--score", type=Path, help="score the sessions that were kept here, without any engine")
    parser.add_argument("--json", action="store_true", help="one JSON object in the last line as well")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if arguments.score is not None and not arguments.score.is_dir():
        parser.error(f"{arguments.score} is no directory: name the one that --keep was given")
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.score is None:
            place = arguments.keep or Path(temporary)
            place = place.resolve()
            failed = record_all(plans(arguments.seed, arguments.rounds, arguments.only), place, arguments.seed)
        else:
            place = arguments.score
        cases = [read_case(path.parent) for path in sorted(place.glob(f"*/{CASE}"))]
        if arguments.only:
            cases = [case for case in cases if case.path.name.partition("-")[0] in arguments.only]
        if not cases:
            print("diagnosis_score: there is no session to score", file=sys.stderr)
            return 2
        found = figures([score(case) for case in cases]) | {"failed": failed}
    show(found)
    if arguments.json:
        print(json.dumps(found))
    return 1 if failed else 0


def record_all(planned: list[tuple[str, Planned]], place: Path, seed: int) -> int:
    """Records what is not there yet; how many could not be."""
    failed = 0
    models = place / "models"
    models.mkdir(parents=True, exist_ok=True)
    for key, plan in planned:
        directory = place / key
        if (directory / CASE).is_file():
            continue
        shutil.rmtree(directory, ignore_errors=True)
        began = time.monotonic()
        try:
            record_case(plan, models, directory, seed)
        except (StartError, ValueError, AssertionError, SessionError) as error:
            failed += 1
            print(f"diagnosis_score: {key} ({plan.said}): {error}", file=sys.stderr)
            continue
        print(f"diagnosis_score: {key}: {plan.said}; {time.monotonic() - began:.0f} s", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
