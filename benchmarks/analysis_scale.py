"""How long the analysis of a large session takes, and how much memory: seconds and peak RSS by number of records.

    .venv/bin/python benchmarks/analysis_scale.py [--json] [--quick] [--records N ...] [--keep DIR]

An engine on paper (synthetic.py) is recorded and assembled as the collector does it. A larger session is that one again
and again, each time later: new steps, new requests, the same lengths of everything. What is measured is the command as
users run it, in a process of its own, from its start to its end. A record is a slot of a ring.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from collector import OUTPUT_TOKENS, Case, Stream, stream

from stagetrace.analysis import load
from stagetrace.cli.main import app
from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.exporters.session import TABLES, Manifest, Process, Session
from stagetrace.instrument.identity import claim_identity
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

GOAL_RECORDS, GOAL_SECONDS, GOAL_MB = 10_000_000, 20.0, 2_000.0
MOST_PER_RECORD = 1.5  # times the cost of a record in the session before the last: more is not linear
RECORDS = (1_000_000, 5_000_000, 10_000_000)
QUICK_RECORDS = (30_000, 90_000)
CASE = Case(32, 1)
ONE_SLOTS = 500_000  # of the session that larger ones are made of
COMMANDS = ("report", "diagnose")
# So that speed of light and gap are computed as well: a model, and a device that is in the table of data sheets.
DEVICE = {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3", "model_path": "none", "dtype": "bfloat16"}
CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_TIMES = ("begin_ns", "scheduled_ns", "end_ns")
_HANDLE_STEP = 7_919


@dataclass(frozen=True)
class Measured:
    """One command on one session."""

    seconds: float  # wall
    cpu_seconds: float
    peak_rss_mb: float


def tables_of(found: Stream) -> dict[str, pa.Table]:
    """All tables of a stream at once."""
    assembler = Assembler(found.key)
    for _, batches in found.commits:
        for batch in batches:
            assembler.add(batch)
    return assembler.finish()


def write(found: Stream, records: int, path: Path, layers: int = 0) -> int:
    """A session of about so many records at `path`, made of a stream again and again; how many it has.

    With `layers`, as level layer records it: an attention and an expert_compute for each in every forward.
    """
    tables = {name: table for name, table in tables_of(found).items() if name in TABLES}
    slots = found.slots
    if layers:
        before = tables["segments"].num_rows
        tables["segments"] = with_layers(tables["segments"], layers)
        slots += tables["segments"].num_rows - before
    session = Session(path, claim_identity(path))
    times = max(1, round(records / slots))
    ends = [int(pc.max(tables[name]["end_ns"]).as_py()) for name in ("segments", "steps", "requests")]
    span = max(ends) - int(pc.min(tables["segments"]["begin_ns"]).as_py()) + 1_000_000
    steps = int(pc.max(tables["steps"]["step"]).as_py())
    sequences = int(pc.max(tables["segments"]["sequence"]).as_py()) + 1
    for number in range(times):
        for name, table in tables.items():
            session.write_table(name, later(table, number, span, steps, sequences), number + 1)
    session.keep_model_config(json.dumps(CONFIG).encode())
    session.write_manifest(manifest(session, tables, times * slots, layers))
    return times * slots


def with_layers(segments: pa.Table, layers: int) -> pa.Table:
    """Segments, and in each forward pass one after another an attention and an expert_compute for every layer."""
    frame = load.frame(segments, segments.schema)
    forwards = frame[frame["stage"] == BY_NAME["forward"].id]
    rest = frame.drop(forwards.index)
    inside = forwards.loc[forwards.index.repeat(2 * layers)].copy()
    place = np.tile(np.arange(2 * layers), len(forwards))
    length = (inside["end_ns"] - inside["begin_ns"]) // (2 * layers)
    inside["begin_ns"] += place * length
    inside["end_ns"] = inside["begin_ns"] + length
    inside["self_ns"] = length
    inside["parent"], inside["parent_stage"] = inside["sequence"], inside["stage"]
    inside["sequence"] = frame["sequence"].max() + 1 + np.arange(len(inside))
    attention, experts = (BY_NAME[name].id for name in ("attention", "expert_compute"))
    inside["stage"] = np.where(place % 2, experts, attention)
    inside["a0"], inside["a1"], inside["a2"] = place // 2, np.where(place % 2, CASE.batch, 1), CASE.batch
    taken = forwards.assign(self_ns=(forwards["end_ns"] - forwards["begin_ns"]) % (2 * layers))
    found = pd.concat([rest, taken, inside]).sort_values("end_ns", kind="stable")
    return pa.Table.from_pandas(found, schema=segments.schema, preserve_index=False)


def later(table: pa.Table, number: int, span: int, steps: int, sequences: int) -> pa.Table:
    """A table as it would be `number` sessions later."""
    shifts = {"sequence": sequences, "parent": sequences, "handle": _HANDLE_STEP}
    shifts |= dict.fromkeys(("step", "first_step", "last_step"), steps)
    columns = []
    for field in table.schema:
        column = table[field.name]
        if field.name in _TIMES or (field.name.endswith("_ns") and field.name in _ABSOLUTE):
            column = pc.add(column, number * span)
        elif field.name in shifts:
            column = pc.add(column, number * shifts[field.name])
        elif field.name in ("request_id", "external_id", "trace_id"):
            column = pc.binary_join_element_wise(column, f"{number:04x}", "")
        columns.append(column)
    return pa.table(columns, schema=table.schema)


_ABSOLUTE = {
    *("arrival_ns", "dispatched_ns", "queued_ns", "scheduled_ns", "first_token_ns", "first_output_ns"),
    *("first_sent_ns", "last_token_ns", "last_output_ns", "last_sent_ns", "begin_ns", "end_ns"),
}


def manifest(session: Session, tables: dict[str, pa.Table], slots: int, layers: int) -> Manifest:
    """What the collector would say of the session."""
    instance = int(tables["steps"]["instance"][0].as_py())
    core = int(tables["steps"]["process"][0].as_py())
    info = {"engine": "synthetic", "engine_version": "1", "model": "none", "max_num_seqs": CASE.batch, **DEVICE}
    keys = [int(key) for key in np.unique(tables["segments"]["process"].to_numpy())]
    roles = {key: "engine_core" if key == core else "worker" for key in keys}
    processes = [
        Process(key, f"{role}.ring", role, 1, "host", 0, True, 1, {**info, "instance": instance})
        for key, role in roles.items()
    ]
    now = time.time_ns()
    return Manifest(
        session=session.identity.session,
        host="host",
        level="layer" if layers else "step",
        started_ns=now - slots,
        complete=True,
        anchors=[(0, now)],
        processes=processes,
    )


# A process's peak counts the memory of the one that forked it, so a small one does.
_STARTER = """
import json, os, subprocess, sys, time
begin = time.monotonic()
process = subprocess.Popen(sys.argv[2:], stdout=open(sys.argv[1], "wb"))
_, status, usage = os.wait4(process.pid, 0)
took = time.monotonic() - begin
cpu = usage.ru_utime + usage.ru_stime
print(json.dumps([os.waitstatus_to_exitcode(status), took, cpu, usage.ru_maxrss * 1024 / 1e6]))
"""


def started(words: Sequence[str]) -> tuple[Measured, bytes]:
    """A command's time and memory, and what it printed. Raises RuntimeError when it fails."""
    with tempfile.NamedTemporaryFile() as out:
        starter = [sys.executable, "-S", "-c", _STARTER, out.name, *words]
        done = subprocess.run(starter, stdout=subprocess.PIPE, check=True)
        status, *figures = json.loads(done.stdout)
        said = out.read()
    if status or not said:
        raise RuntimeError(f"`{' '.join(words)}` ended with status {status}")
    return Measured(*figures), said


def measured(command: str, path: Path) -> Measured:
    """The same of a command that prints a JSON object of a session."""
    words = [sys.executable, "-m", "stagetrace.cli.main", command, str(path), "--json"]
    found, said = started(words)
    if not json.loads(said):
        raise RuntimeError(f"`{' '.join(words)}` found nothing")
    return found


def run(
    records: Sequence[int], rounds: int, commands: Sequence[str], keep: Path | None, layers: int = 0
) -> dict[str, Any]:
    """All commands on sessions of so many records."""
    found: dict[str, dict[int, Measured]] = {command: {} for command in commands}
    one = stream(CASE, min(ONE_SLOTS, *records))
    with tempfile.TemporaryDirectory(prefix="stagetrace-benchmark-") as directory:
        for wanted in records:
            path = (keep or Path(directory)) / f"{wanted}"
            path.mkdir(parents=True)
            count = write(one, wanted, path, layers)
            for command in commands:
                tries = [measured(command, path) for _ in range(rounds)]
                found[command][count] = min(tries, key=lambda each: each.seconds)
    return results(found)


def results(found: dict[str, dict[int, Measured]]) -> dict[str, Any]:
    """The JSON object: of the slowest command by number of records, and each command on its own."""
    counts = list(next(iter(found.values())))
    figures = {
        command: {name: {str(count): round(getattr(each, name), 3) for count, each in own.items()}
                  for name in ("seconds", "cpu_seconds", "peak_rss_mb")}
        for command, own in found.items()
    }  # fmt: skip
    slowest = {
        name: {str(count): max(own[name][str(count)] for own in figures.values()) for count in counts}
        for name in ("seconds", "peak_rss_mb")
    }
    return {
        **slowest,
        "commands": figures,
        "goals": {"records": GOAL_RECORDS, "seconds": GOAL_SECONDS, "peak_rss_mb": GOAL_MB},
        "met": met(found),
        "output_tokens": OUTPUT_TOKENS,
        "batch": CASE.batch,
        "machine": measure.machine(),
    }


def met(found: dict[str, dict[int, Measured]]) -> bool | None:
    """Whether the goals are met, and time grows no faster than the records; None where the session was no so large."""
    largest = max(max(own) for own in found.values())
    if largest < GOAL_RECORDS * 0.95:
        return None
    for own in found.values():
        counts = sorted(own)
        if own[counts[-1]].seconds > GOAL_SECONDS or own[counts[-1]].peak_rss_mb > GOAL_MB:
            return False
        each = [own[count].seconds / count for count in counts]
        if len(each) > 1 and each[-1] > MOST_PER_RECORD * each[-2]:
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--quick", action="store_true", help="small sessions, to see that it works")
    parser.add_argument("--records", type=int, nargs="+", help="how many records the sessions have")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command, of which the fastest counts")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, help="default: those that there are")
    parser.add_argument(
        "--layers", type=int, default=0, help="layers of the model, recorded at level layer (default: step)"
    )
    parser.add_argument("--keep", type=Path, help="a directory for the sessions, which stay there")
    options = parser.parse_args()
    there = {each.name or getattr(each.callback, "__name__", "") for each in app.registered_commands}
    commands = options.commands or [command for command in COMMANDS if command in there]
    records = options.records or (QUICK_RECORDS if options.quick else RECORDS)
    found = run(sorted(records), 1 if options.quick else options.rounds, commands, options.keep, options.layers)
    rows = [
        (command, f"{int(count):,}", *(f"{own[name][count]:.1f}" for name in ("seconds", "cpu_seconds", "peak_rss_mb")))
        for command, own in found["commands"].items()
        for count in own["seconds"]
    ]
    console = measure.console()
    console.print(measure.machine_line(found["machine"]))
    columns = ("command", "records", "seconds", "CPU seconds", "peak RSS MB")
    console.print(measure.table("Analysis of large sessions", columns, rows))
    said = {None: "not asked of sessions of this size", True: "met", False: "missed"}[found["met"]]
    console.print(f"Goal: {GOAL_RECORDS:,} records in {GOAL_SECONDS:g} s and {GOAL_MB:g} MB, linear: {said}.")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
