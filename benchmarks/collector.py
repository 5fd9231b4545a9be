"""What the collector can take, and what it costs: records a second to Parquet, its share of a core, spans a second.

    .venv/bin/python benchmarks/collector.py [--json] [--quick]

An engine on paper (synthetic.py) writes what the hooks on vLLM write at step level, through real recorders and rings.
Rates are of this process's CPU time, all of its threads together, so that they are those of one core.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
import psutil
import rings
from synthetic import Engine

from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.exporters.collector import COMMIT_SLOTS, batch_marks, raw_table
from stagetrace.exporters.discover import process_key
from stagetrace.exporters.drain import RingReader
from stagetrace.exporters.otel_settings import Destination
from stagetrace.exporters.otlp import OtlpSink
from stagetrace.exporters.session import Commit, Manifest, Session
from stagetrace.exporters.span_sink import batches as batches_of
from stagetrace.instrument.identity import claim_identity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stagetrace.exporters.drain import Batch

GOALS = {"records_per_s": 300_000.0, "cpu_pct_at_200_steps": 5.0, "otlp_spans_per_s": 30_000.0}
OUTPUT_TOKENS = 256
POLL_SLOTS = 15_000  # what the rings bring in one poll at 300,000 records a second
RECORDS, QUICK_RECORDS = 400_000, 20_000
ROUNDS, QUICK_ROUNDS = 5, 1
STEPS_PER_SECOND = 200.0
SECONDS, QUICK_SECONDS = 20.0, 3.0
SETTLING_S = 2.5  # imports, and the first commits
SPANS_OF_RECORDS = 60_000

RECEIVER = """
import sys
sys.path.append(sys.argv[1])
from backends.receiver import GrpcReceiver
with GrpcReceiver() as receiver:
    print(receiver.port, flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Case:
    """An engine's size."""

    batch: int
    workers: int

    @property
    def name(self) -> str:
        """For the table and the figures."""
        return f"batch {self.batch}, {self.workers} worker{'s' if self.workers > 1 else ''}"


CASES = (Case(32, 1), Case(32, 4), Case(256, 1), Case(256, 4))


@dataclass(frozen=True)
class Stream:
    """What polls of all rings brought, by commit."""

    commits: list[tuple[int, list[Batch]]]  # the engine's clock at the commit, ns; what was polled since the last
    steps: int
    key: bytes

    @property
    def slots(self) -> int:
        """All slots; a step's begin has two, a longer text more."""
        return sum(len(batch) for _, batches in self.commits for batch in batches)


def stream(case: Case, slots: int) -> Stream:
    """About so many slots of an engine at a steady load, read from its rings as the collector reads them."""
    with rings.armed() as directory:
        engine = Engine(case.batch, case.workers, OUTPUT_TOKENS)
        key = claim_identity(directory / "session").key
        paths = [recorder.ring.path for recorder in engine.recorders if recorder.ring is not None]
        readers = [RingReader(path, process_key(path.name)) for path in paths]
        in_a_step = 8 + 6 * case.workers + 17 * case.batch // OUTPUT_TOKENS
        commits: list[tuple[int, list[Batch]]] = []
        batches: list[Batch] = []
        while sum(map(len, batches)) + sum(len(batch) for _, found in commits for batch in found) < slots:
            for _ in range(POLL_SLOTS // in_a_step):
                engine.run_step()
            for reader in (*readers, *readers):  # a slot is taken at the second poll that finds it
                batch = reader.poll()
                reader.committed()
                if len(batch):
                    batches.append(batch)
            if sum(map(len, batches)) >= COMMIT_SLOTS:
                commits.append((engine.now, batches))
                batches = []
        if batches:
            commits.append((engine.now, batches))
        for reader in readers:
            assert sum(area.losses.lost for area in reader.areas) == 0
            reader.close()
        for recorder in engine.recorders:
            recorder.after_fork_in_child()  # lets go of the ring
    return Stream(commits, engine.step, key)


# From slots to Parquet


def to_parquet(found: Stream, directory: Path, assembled: bool) -> float:
    """Commits a stream as the collector does, with its tables or the raw part alone; CPU time in s."""
    session = Session(directory, claim_identity(directory))
    assembler = Assembler(found.key)
    begin = time.process_time()
    for number, (now, batches) in enumerate(found.commits, 1):
        session.write_raw(raw_table(batches), Commit(number, now, now, batches=batch_marks(batches)))
        if assembled:
            for batch in batches:
                assembler.add(batch)
            for name, table in assembler.take(now).items():
                session.write_table(name, table, number)
    took = time.process_time() - begin
    if assembled:
        complete = session.read_table("steps").num_rows
        if not found.steps - 200 <= complete <= found.steps:
            raise RuntimeError(f"{complete} of {found.steps} steps are in the session: what is measured does not work")
    return took


def size(directory: Path) -> int:
    """Bytes of the files under a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def rates(case: Case, slots: int, count: int) -> dict[str, Any]:
    """Slots a second with and without assembly, and bytes a slot."""
    found = stream(case, slots)
    number = itertools.count()
    sizes: dict[bool, int] = {}
    with tempfile.TemporaryDirectory(prefix="stagetrace-benchmark-") as directory:

        def run(assembled: bool) -> float:
            path = Path(directory) / f"session-{next(number)}"
            path.mkdir()
            took = to_parquet(found, path, assembled)
            sizes[assembled] = size(path)
            shutil.rmtree(path)
            return found.slots / took

        values = measure.rounds({"assembled": lambda: run(True), "raw": lambda: run(False)}, count)
    return {
        "records_per_s": measure.spread(values["assembled"]),
        "records_per_s_raw": measure.spread(values["raw"]),
        "us_per_step": 1e6 * found.slots / found.steps / float(measure.spread(values["assembled"]).median),
        "slots": found.slots,
        "steps": found.steps,
        "bytes_per_record": sizes[True] / found.slots,
        "bytes_per_record_raw": sizes[False] / found.slots,
    }


# A collector at work


def at_work(case: Case, seconds: float) -> dict[str, float]:
    """A collector's share of a core, in percent, while a process beside it records at 200 steps a second."""
    with rings.armed() as directory:
        session = directory / "session"
        with open(directory / "log", "wb") as log:
            collector = subprocess.Popen([sys.executable, "-m", "stagetrace.cli.main", "collect", session], stderr=log)
        try:
            program = Path(__file__).with_name("synthetic.py")
            sizes = ["--batch", str(case.batch), "--workers", str(case.workers), "--output-tokens", str(OUTPUT_TOKENS)]
            rate = ["--steps-per-second", str(STEPS_PER_SECOND), "--seconds", str(seconds + 2 * SETTLING_S)]
            writer = subprocess.Popen([sys.executable, program, *sizes, *rate], stdout=subprocess.PIPE)
            try:
                process = psutil.Process(collector.pid)
                while not (session / "raw" / "part-00000001.parquet").exists():
                    if collector.poll() is not None or writer.poll() is not None:
                        raise RuntimeError((directory / "log").read_text() or "a process ended early")
                    time.sleep(0.05)
                time.sleep(SETTLING_S)
                before, begin = sum(process.cpu_times()[:2]), time.monotonic()
                time.sleep(seconds)
                used, wall = sum(process.cpu_times()[:2]) - before, time.monotonic() - begin
                peak = _peak_rss(collector.pid)
            finally:
                writer.kill()
                writer.communicate()
        finally:
            collector.terminate()
            collector.wait()
        steps = Session.open(session).read_table("steps").num_rows
        if steps < STEPS_PER_SECOND * seconds / 2:
            raise RuntimeError(f"only {steps} steps are in the session: {(directory / 'log').read_text()}")
        return {"cpu_pct_at_200_steps": 100 * used / wall, "peak_rss_mb": peak / 1e6}


def _peak_rss(pid: int) -> int:
    """The most memory that a process had resident, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not say how much memory a process had")


# Spans


@contextmanager
def receiver() -> Iterator[int]:
    """The port of an OTLP receiver by gRPC, in a process of its own."""
    tests = Path(__file__).resolve().parent.parent / "tests"
    process = subprocess.Popen(
        [sys.executable, "-c", RECEIVER, tests], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.communicate()


def spans_per_s(case: Case, slots: int, count: int) -> measure.Spread:
    """Spans a second of CPU time: slots to tables, spans with their links, bytes, and a receiver that takes them."""
    found = stream(case, slots)
    manifest = Manifest(session="benchmark", host="host", anchors=[(0, time.time_ns())])

    def run() -> float:
        sink = OtlpSink.to(Destination(f"http://127.0.0.1:{port}", "grpc", "60"), found.key, timeout_s=60)
        assembler = Assembler(found.key)
        sent = 0
        begin = time.process_time()
        for now, polled in found.commits:
            for batch in polled:
                assembler.add(batch)
            for spans in batches_of(sink.spans(assembler.take(now), manifest).spans):
                if not sink.send(spans):
                    raise RuntimeError(f"the receiver did not take a batch of spans: {sink.why}")
                sent += len(spans)
        took = time.process_time() - begin
        sink.shutdown()
        return sent / took

    with receiver() as port:
        values = measure.rounds({"spans": run}, count)["spans"]
    return measure.spread(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser)
    options = parser.parse_args()
    machine = measure.machine()
    count = QUICK_ROUNDS if options.quick else ROUNDS
    out = measure.console()
    out.print(measure.machine_line(machine))
    slots = QUICK_RECORDS if options.quick else RECORDS
    cases = CASES[:1] if options.quick else CASES
    found = {case: rates(case, slots, count) for case in cases}
    rows = [
        [
            case.name,
            measure.figure(values["records_per_s"]),
            measure.figure(values["records_per_s_raw"]),
            measure.figure(values["us_per_step"]),
            measure.figure(values["bytes_per_record"]),
            measure.figure(values["bytes_per_record_raw"]),
        ]
        for case, values in found.items()
    ]
    columns = ["records a second, one core", "with assembly (quartiles)", "raw part alone", "us a step", "bytes", "raw"]
    out.print(measure.table("From slots in memory to Parquet", columns, rows))
    work = {case: at_work(case, QUICK_SECONDS if options.quick else SECONDS) for case in cases}
    spans = spans_per_s(CASES[0], min(slots, SPANS_OF_RECORDS), count)
    rows = [
        [case.name, measure.figure(values["cpu_pct_at_200_steps"]), measure.figure(values["peak_rss_mb"])]
        for case, values in work.items()
    ]
    columns = ["", "% of a core", "most memory, MB"]
    out.print(measure.table(f"\nA collector at {STEPS_PER_SECOND:g} steps a second", columns, rows))
    slowest = min((values["records_per_s"] for values in found.values()), key=lambda one: one.median)
    busiest = max(values["cpu_pct_at_200_steps"] for values in work.values())
    met = "met" if slowest.median >= GOALS["records_per_s"] else "MISSED"
    rows = [
        ["records_per_s, the slowest case", measure.figure(slowest), f"{met} (goal: at least 300,000)"],
        ["cpu_pct_at_200_steps, the busiest case", measure.figure(busiest),
         measure.met(busiest, GOALS["cpu_pct_at_200_steps"])],
        ["otlp_spans_per_s", measure.figure(spans),
         f"{'met' if spans.median >= GOALS['otlp_spans_per_s'] else 'MISSED'} (goal: at least 30,000)"],
    ]  # fmt: skip
    out.print(measure.table("\nGoals", ["", "median (quartiles)", ""], rows))
    if options.json:
        measure.print_json(
            {
                "benchmark": "collector",
                "machine": machine,
                "rounds": count,
                "records_per_s": slowest.median,
                "records_per_s_iqr": slowest.json(),
                "records_per_s_raw": min(values["records_per_s_raw"].median for values in found.values()),
                "cpu_pct_at_200_steps": busiest,
                "peak_rss_mb": max(values["peak_rss_mb"] for values in work.values()),
                "otlp_spans_per_s": spans.median,
                "otlp_spans_per_s_iqr": spans.json(),
                "cases": {
                    case.name: {
                        **{key: value.median if isinstance(value, measure.Spread) else value
                           for key, value in values.items()},
                        **work[case],
                    }
                    for case, values in found.items()
                },
            }
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
