"""The coverage-guided run: atheris (libFuzzer) on every target, each in processes of its own, and a table at the end.

    .venv/bin/python tests/fuzz/campaign.py [--inputs N] [--seed N] [TARGET ...]

What makes a target fail is kept in tests/fuzz/corpus/TARGET/ and replayed by `make fuzz` from then on. The exit status
is 1 when something failed. The peak of memory is that of a process without instrumentation which is given every input
that reached something new: atheris 3.0 never lets go of the results of comparisons that it has seen, whole arrays among
them, which is also why a target is fuzzed in slices.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from guided import MISSING

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
# Of 100 inputs each target gets so many: to open and show a session takes a hundred times as long as the others.
SHARES = {
    "ring": 30,
    "stream": 20,
    "experts": 5,
    "text": 4,
    "trace_context": 34,
    "session_files": 3,
    "session_tables": 2,
    "session_taken_up": 2,
}
INPUTS = 110_000
SLICE = 5_000  # inputs to a process
LONGEST = 2_048  # bytes of an input
HANG_S = 30
MOST_MIB = 2_048


@dataclass
class Outcome:
    """What became of one target."""

    target: str
    inputs: int = 0
    edges: int = 0  # of our code that were reached
    crashes: list[Path] = field(default_factory=list)
    seconds: float = 0.0
    peak_mib: float = 0.0
    status: int = 0
    log: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(SHARES)}; all without one")
    parser.add_argument("--inputs", type=int, default=INPUTS, help=f"for all targets together ({INPUTS})")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers (1)")
    options = parser.parse_args()
    if unknown := {*options.targets} - {*SHARES}:
        parser.error(f"no such target: {', '.join(sorted(unknown))}; choose of {', '.join(SHARES)}")
    targets = options.targets or [*SHARES]
    scale = options.inputs / sum(SHARES[target] for target in targets)
    outcomes = []
    print(f"{'target':16}{'inputs':>9}{'crashes':>9}{'edges':>7}{'seconds':>9}{'peak MiB':>10}", flush=True)
    for target in targets:
        outcome = run(target, max(1, round(SHARES[target] * scale)), options.seed)
        if outcome.status == MISSING:
            print("atheris is not installed: it has builds for x86-64 alone; `make fuzz` needs none", file=sys.stderr)
            return 2
        show(outcome)
        outcomes.append(outcome)
    crashes = sum(len(outcome.crashes) for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    print(f"{'all':16}{sum(outcome.inputs for outcome in outcomes):9}{crashes:9}{'':7}{seconds:9.1f}")
    return int(any(outcome.status for outcome in outcomes))


def show(outcome: Outcome) -> None:
    print(
        f"{outcome.target:16}{outcome.inputs:9}{len(outcome.crashes):9}{outcome.edges:7}"
        f"{outcome.seconds:9.1f}{outcome.peak_mib:10.0f}",
        flush=True,
    )
    if outcome.status:
        print(outcome.log)
    for crash in outcome.crashes:
        print(f"  kept as {crash.relative_to(HERE.parent.parent)}")


def run(target: str, inputs: int, seed: int) -> Outcome:
    """Fuzzes one target, slice by slice, until the first input that fails; then replays what was found."""
    outcome = Outcome(target)
    kept = CORPUS / target
    kept.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory) / "found"
        found.mkdir()
        while outcome.inputs < inputs and not outcome.status:
            count = min(SLICE, inputs - outcome.inputs)
            arguments = [
                *(f"-runs={count}", f"-seed={seed}", f"-max_len={LONGEST}", f"-timeout={HANG_S}"),
                f"-report_slow_units={HANG_S}",
                *("-len_control=0", "-reload=0", f"-rss_limit_mb={MOST_MIB}", f"-artifact_prefix={kept}/"),
            ]
            outcome.status, text, _ = child(directory, target, *arguments, str(found), str(kept))
            outcome.log = "\n".join(text.splitlines()[-40:])
            if outcome.status == MISSING:
                return outcome
            outcome.inputs += max((int(number) for number in re.findall(r"^#(\d+)", text, re.MULTILINE)), default=0)
            outcome.edges = max([outcome.edges, *(int(number) for number in re.findall(r"cov: (\d+)", text))])
            outcome.crashes = [Path(path) for path in re.findall(r"Test unit written to (\S+)", text)]
            seed += 1
        if not outcome.status:
            outcome.status, outcome.log, outcome.peak_mib = child(directory, target, "--plain", str(found))
    outcome.seconds = time.monotonic() - started
    return outcome


def child(directory: str, *arguments: str) -> tuple[int, str, float]:
    """Runs guided.py; its exit status, what it wrote, and its peak of resident memory in MiB."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "TMPDIR": directory}
    command = [sys.executable, str(HERE / "guided.py"), *arguments]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        return process.returncode, log.read(), usage.ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
