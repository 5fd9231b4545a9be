"""Whether a collector can run for weeks: an engine on paper at 1,000 steps a second, and what its collector holds.

    .venv/bin/python benchmarks/soak.py [--minutes 60] [--steps-per-second 1000] [--directory DIR] [--json] [--quick]

synthetic.py records at level step, with requests that come and go; a real `stagetrace collect` takes it. Watched are
resident memory, descriptors and threads of both, and the session's size and files. What a commit needs comes and goes,
so memory is the least of each interval, which grows with a leak as every other figure of it would; the most is shown.
A figure is flat when the trend over the second half of the time, with its 95 % interval, changes it by less than 1 %,
a count by less than one. At the end every step that was recorded must be in the session or among the losses. The exit
status is 1 when something grows or a step is unaccounted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
import psutil

from stagetrace.exporters.session import Session

MINUTES, QUICK_MINUTES = 60.0, 20 / 60
STEPS_PER_SECOND = 1_000.0
SAMPLES = 240
LOOKS = 10  # at the memory, in each of them
ROWS = 12  # of the table over time
FLAT_SHARE, FLAT_COUNT = 0.01, 1.0  # of the mean, over the second half; of a count of things
PATIENCE_S = 120.0
GIB_PER_HOUR = 6  # of disk, at most, at 1,000 steps a second
COUNTED = ("rss", "descriptors", "threads")
SHOWN = ("rss", "most", "descriptors", "threads")
_FLAT, _GROWS, _FALLS, _UNKNOWN = "flat", "GROWS", "falls", "not resolved: run longer"


@dataclass(frozen=True)
class Trend:
    """A figure's straight line over the second half of the time, by an hour, with its 95 % interval."""

    per_hour: float
    low: float
    high: float
    verdict: str


def trend(seconds: measure.Values, values: measure.Values, tolerance: float | None = None) -> Trend:
    """The least-squares slope of the second half of a series, in units an hour.

    It is flat when it changes the value by less than `tolerance`, by default by less than FLAT_SHARE of the mean. Its
    standard error counts the samples that are independent, n (1 - r) / (1 + r) for a lag-1 autocorrelation r of the
    residuals (Santer et al. 2000, J. Geophys. Res. 105, 7337, eq. 6).
    """
    half = len(seconds) // 2
    at, found = seconds[half:] / 3600, values[half:]
    if len(at) < 4:
        return Trend(np.nan, -np.inf, np.inf, _UNKNOWN)
    centred = at - at.mean()
    slope = float((centred * found).sum() / (centred**2).sum())
    residuals = found - found.mean() - slope * centred
    square = float((residuals**2).sum())
    again = float((residuals[1:] * residuals[:-1]).sum()) / square if square else 0.0
    independent = len(at) * (1 - max(0.0, again)) / (1 + max(0.0, again))
    error = np.sqrt(square / max(independent - 2, 1) / (centred**2).sum())
    low, high = slope - 1.96 * error, slope + 1.96 * error
    span, most = float(at[-1] - at[0]), FLAT_SHARE * abs(float(found.mean())) if tolerance is None else tolerance
    if max(abs(low), abs(high)) * span <= most:
        verdict = _FLAT
    elif low > 0 and slope * span > most:
        verdict = _GROWS
    elif high < 0:
        verdict = _FALLS
    else:
        verdict = _UNKNOWN
    return Trend(slope, float(low), float(high), verdict)


def look(name: str, process: psutil.Process) -> dict[str, float]:
    """What a process holds at this moment, but its memory."""
    with process.oneshot():
        held = {
            "descriptors": process.num_fds(),
            "threads": process.num_threads(),
            "cpu_s": sum(process.cpu_times()[:2]),
        }
    return {f"{name}_{what}": float(value) for what, value in held.items()}


def on_disk(directory: Path) -> dict[str, float]:
    """Size and number of a session's files."""
    sizes = []
    for path in directory.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # a part that was just renamed, or rotated away
            continue
    return {"session_mib": sum(sizes) / 2**20, "session_files": float(len(sizes))}


def watch(session: Path, processes: dict[str, subprocess.Popen[bytes]], seconds: float) -> dict[str, measure.Values]:
    """Samples until the time is over. Raises RuntimeError when a process ends before."""
    watched = {name: psutil.Process(process.pid) for name, process in processes.items()}
    begin = time.monotonic()
    samples: list[dict[str, float]] = []
    for number in range(SAMPLES):
        memory: dict[str, list[float]] = {name: [] for name in watched}
        for glance in range(1, LOOKS + 1):
            time.sleep(max(0.0, begin + (number + glance / LOOKS) * seconds / SAMPLES - time.monotonic()))
            for name, process in processes.items():
                if process.poll() is not None:
                    raise RuntimeError(f"the {name} ended early, with exit status {process.returncode}")
                memory[name].append(watched[name].memory_info().rss / 2**20)
        sample = {"seconds": time.monotonic() - begin, **on_disk(session)}
        for name, one in watched.items():
            sample |= look(name, one) | {f"{name}_rss": min(memory[name]), f"{name}_most": max(memory[name])}
        samples.append(sample)
    return {name: np.array([sample[name] for sample in samples]) for name in samples[0]}


def soak(directory: Path, seconds: float, steps_per_second: float) -> tuple[dict[str, measure.Values], dict[str, Any]]:
    """The samples of a run, and what is in its session: steps, losses by reason. Raises RuntimeError."""
    session = directory / "session"
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="stagetrace-soak-") as rings:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("STAGETRACE_", "OTEL_"))}
        environment = {**kept, "STAGETRACE_RING_DIR": rings, "STAGETRACE_SESSION": str(session)}
        command = [sys.executable, "-m", "stagetrace.cli.main", "collect", str(session)]
        program = str(Path(__file__).with_name("synthetic.py"))
        rate = ["--steps-per-second", str(steps_per_second), "--seconds", str(1e7)]
        with open(directory / "collector.log", "wb") as log:
            collector = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        writer = subprocess.Popen([sys.executable, program, *rate], env=environment)
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not list(session.glob("raw/**/*.parquet")):
                if time.monotonic() > deadline or collector.poll() is not None or writer.poll() is not None:
                    raise RuntimeError(f"nothing was recorded: {(directory / 'collector.log').read_text()[-2000:]}")
                time.sleep(0.1)
            samples = watch(session, {"collector": collector, "writer": writer}, seconds)
            writer.kill()
            writer.wait()
            told = time.monotonic()
            collector.send_signal(signal.SIGTERM)
            try:
                status = collector.wait(PATIENCE_S)
            except subprocess.TimeoutExpired as error:
                log_text = (directory / "collector.log").read_text("utf-8", "replace")
                raise RuntimeError(f"the collector did not end in {PATIENCE_S:.0f} s: {log_text[-2000:]}") from error
            ending = time.monotonic() - told
        finally:
            for process in (writer, collector):
                process.kill()
                process.wait()
        left = [path.name for path in Path(rings).rglob("*.ring")]
    if status or left:
        raise RuntimeError(f"the collector ended with status {status} and left {left}: {directory / 'collector.log'}")
    return samples, {"flush_s": ending, **account(Session.open(session))}


def account(session: Session) -> dict[str, Any]:
    """What is in a session that has ended: every step from the first to the last is there, or its slots were lost."""
    manifest = session.read_manifest()
    lost = {
        reason: sum(getattr(losses, reason) for losses in manifest.losses)
        for reason in ("overwritten", "dropped", "torn", "unfinished", "corrupt")
    }
    table = session.read_table("steps", ["step", "begin_ns"])
    numbers, begins = table["step"].to_numpy(), table["begin_ns"].to_numpy()
    return {
        "steps": len(numbers),
        "steps_per_s": len(numbers) * 1e9 / float(np.ptp(begins)),
        "steps_missing": int(np.ptp(numbers)) + 1 - len(np.unique(numbers)),
        "steps_twice": len(numbers) - len(np.unique(numbers)),
        "slots_read": sum(losses.read for losses in manifest.losses),
        "lost": lost,
        "accounting_conflicts": manifest.counts.get("accounting_conflict", 0),
    }


def tables(samples: dict[str, measure.Values], trends: dict[str, Trend]) -> list[Any]:
    """The table over time and the one of the trends."""
    at = np.unique(np.linspace(0, len(samples["seconds"]) - 1, ROWS).round().astype(int))
    whats = {"rss": "MiB", "most": "most", "descriptors": "fds", "threads": "threads"}
    held = [("collector", what) for what in SHOWN] + [("writer", what) for what in COUNTED]
    columns = ["minute", *(f"{who} {whats[what]}" for who, what in held)]
    shown = ["seconds", *(f"{who}_{what}" for who, what in held)]
    rows = [
        [
            f"{samples['seconds'][row] / 60:.1f}",
            *(f"{samples[name][row]:.{1 if name.endswith(('rss', 'most')) else 0}f}" for name in shown[1:]),
            f"{samples['session_mib'][row]:.1f}",
            f"{samples['session_files'][row]:.0f}",
        ]
        for row in at
    ]
    over_time = measure.table("What they hold", [*columns, "session MiB", "files"], rows)
    rows = [
        [
            name.replace("_", " "),
            "{:+.2f} ({:+.2f} to {:+.2f})".format(
                *(round(value, 2) + 0.0 for value in (one.per_hour, one.low, one.high))
            ),
            one.verdict,
        ]
        for name, one in trends.items()
    ]
    return [over_time, measure.table("\nTrend of the second half, by an hour (95 % interval)", ["", "", ""], rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"how long ({MINUTES:g})")
    parser.add_argument("--steps-per-second", type=float, default=STEPS_PER_SECOND, help=f"({STEPS_PER_SECOND:g})")
    parser.add_argument("--directory", type=Path, help="where the session is kept meanwhile; it is removed at the end")
    options = parser.parse_args()
    seconds = 60 * (QUICK_MINUTES if options.quick else options.minutes)
    if seconds <= 0 or options.steps_per_second <= 0:
        parser.error("--minutes and --steps-per-second are to be above 0")
    machine = measure.machine()
    out = measure.console()
    out.print(measure.machine_line(machine))
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="stagetrace-soak-") as name:
        needed = GIB_PER_HOUR * seconds / 3600 * options.steps_per_second / STEPS_PER_SECOND
        if shutil.disk_usage(name).free < needed * 2**30:
            print(f"soak.py: {name} may need {needed:.1f} GiB: name a --directory that has it", file=sys.stderr)
            return 2
        try:
            samples, found = soak(Path(name), seconds, options.steps_per_second)
        except RuntimeError as error:
            print(f"soak.py: {error}", file=sys.stderr)
            return 2
    held = [f"{who}_{what}" for who in ("collector", "writer") for what in COUNTED]
    trends = {
        name: trend(samples["seconds"], samples[name], None if name.endswith("rss") else FLAT_COUNT) for name in held
    }
    for made in tables(samples, trends):
        out.print(made)
    growth = trend(samples["seconds"], samples["session_mib"])
    wall = samples["seconds"][-1] - samples["seconds"][0]
    cpu = {who: 100 * float(np.ptp(samples[f"{who}_cpu_s"])) / float(wall) for who in ("collector", "writer")}
    out.print(f"\nsession: {growth.per_hour:,.0f} MiB an hour; {found['steps']:,} steps, {found['slots_read']:,} slots")
    out.print(f"of a core: collector {cpu['collector']:.1f} %, writer {cpu['writer']:.1f} %")
    out.print(f"lost: {', '.join(f'{count} {why}' for why, count in found['lost'].items())}")
    unaccounted = found["steps_twice"] > 0 or (found["steps_missing"] > 0 and not sum(found["lost"].values()))
    out.print(f"end: the collector wrote what it held within {found['flush_s']:.1f} s")
    out.print(f"steps missing: {found['steps_missing']}, twice: {found['steps_twice']}")
    if options.json:
        measure.print_json(
            {
                "benchmark": "soak",
                "machine": machine,
                "minutes": seconds / 60,
                **found,
                "cpu_pct": cpu,
                "session_mib_per_hour": growth.per_hour,
                "last": {name: values[-1] for name, values in samples.items()},
                "per_hour": {name: [one.per_hour, one.low, one.high] for name, one in trends.items()},
                "verdict": {name: one.verdict for name, one in trends.items()},
            }
        )
    grows = any(one.verdict == _GROWS for one in trends.values())
    return int(unaccounted or (grows and not options.quick))  # it grows for some seconds until it is warm


if __name__ == "__main__":
    sys.exit(main())
