"""How long the timeline of a large session takes to write, and whether memory stays flat: by number of records.

    .venv/bin/python benchmarks/timeline_scale.py [--json] [--quick] [--records N ...] [--formats perfetto chrome]

An engine on paper (synthetic.py) is recorded and assembled commit by commit as the collector does it, and again and
again later, as in analysis_scale.py, up to the number of records. What is measured is `stagetrace export --to ...` as
users run it, in a process of its own. A record is a slot of a ring.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
import pyarrow as pa
import pyarrow.compute as pc
from analysis_scale import CASE, Measured, later, manifest, started
from collector import stream

from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.exporters.session import TABLES, Session
from stagetrace.exporters.trace_file import FORMATS
from stagetrace.instrument.identity import claim_identity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collector import Stream

RECORDS, QUICK_RECORDS = (1_000_000, 3_000_000, 10_000_000), (60_000, 120_000)
ONE_SLOTS, QUICK_SLOTS = 250_000, 30_000  # of the session that larger ones are made of
MOST_GROWTH = 1.1  # times the memory of the session before the last, which has more steps than are remembered


def commits(found: Stream) -> list[dict[str, pa.Table]]:
    """The tables of each commit."""
    assembler = Assembler(found.key)
    tables = []
    for now, batches in found.commits:
        for batch in batches:
            assembler.add(batch)
        tables.append(assembler.take(now))
    last = assembler.finish()
    tables[-1] = {name: pa.concat_tables([table, last[name]]) for name, table in tables[-1].items()}
    return tables


def write(found: Stream, records: int, path: Path) -> int:
    """A session of about so many records at `path`; how many it has."""
    session = Session(path, claim_identity(path))
    one = commits(found)
    whole = {name: pa.concat_tables([tables[name] for tables in one]) for name in TABLES}
    ends = [int(pc.max(whole[name]["end_ns"]).as_py()) for name in ("segments", "steps", "requests")]
    span = max(ends) - int(pc.min(whole["segments"]["begin_ns"]).as_py()) + 1_000_000
    steps = int(pc.max(whole["steps"]["step"]).as_py())
    sequences = int(pc.max(whole["segments"]["sequence"]).as_py()) + 1
    times = max(1, round(records / found.slots))
    for number in range(times):
        for at, tables in enumerate(one, 1):
            for name in TABLES:
                session.write_table(name, later(tables[name], number, span, steps, sequences), number * len(one) + at)
    said = manifest(session, whole, times * found.slots, 0)
    said.derived = times * len(one)
    session.write_manifest(said)
    session.merge(said.derived)
    return times * found.slots


def measured(path: Path, form: str) -> tuple[Measured, dict[str, int]]:
    """One format of one session: time and memory, and how many events and bytes it has. Raises RuntimeError."""
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:
        words = [sys.executable, "-m", "stagetrace.cli.main", "export", str(path), "--to", form, "-o", file.name]
        figures, said = started(words)
        events = re.search(rb"(\d+) events written", said)
        if events is None or b"left out" in said:
            raise RuntimeError(f"`{' '.join(words)}` said {said.decode()}")
        return figures, {"events": int(events[1]), "bytes": Path(file.name).stat().st_size}


def flat(peaks: Sequence[float]) -> bool:
    """Whether the largest session took no more memory than the one before."""
    return len(peaks) < 2 or peaks[-1] <= MOST_GROWTH * peaks[-2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--quick", action="store_true", help="small sessions, to see that it works")
    parser.add_argument("--records", type=int, nargs="+", help="how many records the sessions have")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--directory", type=Path, help="where sessions and files are put; default: the temporary one")
    options = parser.parse_args()
    records = sorted(options.records or (QUICK_RECORDS if options.quick else RECORDS))
    one = stream(CASE, QUICK_SLOTS if options.quick else ONE_SLOTS)
    found: dict[str, dict[str, dict[str, Any]]] = {form: {} for form in options.formats}
    rows = []
    for wanted in records:
        with tempfile.TemporaryDirectory(prefix="stagetrace-benchmark-", dir=options.directory) as directory:
            path = Path(directory) / "session"
            count = write(one, wanted, path)
            for form in options.formats:
                figures, made = measured(path, form)
                found[form][str(count)] = {**vars(figures), **made}
                rows.append(
                    (form, f"{count:,}", f"{made['events']:,}", f"{figures.seconds:.1f}", f"{figures.cpu_seconds:.1f}",
                     f"{figures.peak_rss_mb:.0f}", f"{made['bytes'] / 1e6:.0f}")
                )  # fmt: skip
    machine = measure.machine()
    console = measure.console()
    console.print(measure.machine_line(machine))
    columns = ("format", "records", "events", "seconds", "CPU seconds", "peak RSS MB", "file MB")
    console.print(measure.table("Timelines of large sessions", columns, sorted(rows, key=lambda row: row[0])))
    is_flat = all(flat([each["peak_rss_mb"] for each in of.values()]) for of in found.values())
    console.print(
        f"Goal: no more memory for more records (within {MOST_GROWTH - 1:.0%}): {'met' if is_flat else 'missed'}."
    )
    if options.json:
        measure.print_json({"formats": found, "flat": is_flat, "machine": machine})


if __name__ == "__main__":
    main()
