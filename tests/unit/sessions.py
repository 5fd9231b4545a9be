"""Builds small synthetic sessions on disk, through the session's own writer, for tests of what reads sessions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from stagetrace.exporters.session import TABLES, Losses, Manifest, Process, Session
from stagetrace.instrument.identity import claim_identity
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from pathlib import Path

INSTANCE = 2**62 + 1  # not exact as a float: a table that goes through one loses its steps
PROCESS = 2**62 + 3
THREAD = 70


class SessionBuilder:
    """Collects rows and writes them. What a test does not name is null, or zero or empty where null is not allowed."""

    def __init__(self, path: Path, **manifest: Any):
        self.session = Session(path, claim_identity(path))
        self.manifest = Manifest(
            **{
                "session": self.session.identity.session,
                "host": "host-a",
                "started_ns": time.time_ns(),
                "complete": True,
                "anchors": [(0, 1_000_000_000)],
                **manifest,
            }
        )
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
        self.sequence = 0

    def process(self, key: int = PROCESS, role: str = "engine_core", **values: Any) -> Process:
        """Adds an instrumented process; `values` are fields of Process, `info` among them."""
        info = {"engine": "vllm", "engine_version": "0.32.0", "model": "tiny"}
        process = Process(**{"key": key, "ring": f"{role}-1-1.ring", "role": role, "pid": 1, "host": "host-a"} | {
            "started_ns": 0, "info": info, **values
        })  # fmt: skip
        self.manifest.processes.append(process)
        return process

    def losses(self, **values: Any) -> None:
        """Adds a ring's losses."""
        self.manifest.losses.append(Losses(**{"process": PROCESS, "ring": "detail", **values}))

    def row(self, table: str, **values: Any) -> None:
        """Adds a row of any table."""
        unknown = set(values) - set(TABLES[table].names)
        if unknown:
            raise TypeError(f"{table} has no column {', '.join(sorted(unknown))}")
        self.rows[table].append({field.name: values.get(field.name, _default(field)) for field in TABLES[table]})

    def request(self, handle: int, end_ns: int, **values: Any) -> None:
        """Adds a request, finished unless its status is named."""
        defaults = {"trace_id": f"{handle:032x}", "trace_flags": 1, "status": "finished", "finish": "stop"}
        self.row("requests", **{**defaults, "handle": handle, "end_ns": end_ns, **values})

    def step(self, step: int, begin_ns: int, end_ns: int, phase: str = "decode", **values: Any) -> None:
        """Adds a step, complete unless its status is named."""
        defaults = {"instance": INSTANCE, "process": PROCESS, "thread": THREAD, "status": "complete"}
        times = {"begin_ns": begin_ns, "scheduled_ns": begin_ns, "end_ns": end_ns}
        self.row("steps", **{**defaults, **times, "step": step, "phase": phase, **values})

    def segment(self, stage: str, begin_ns: int, end_ns: int, step: int | None = None, /, **values: Any) -> int:
        """Adds a segment, rank_step or occasion; nothing is in it unless `self_ns` is named. Returns its sequence."""
        self.sequence += 1
        defaults = {
            "process": PROCESS,
            "thread": THREAD,
            "sequence": self.sequence,
            "self_ns": end_ns - begin_ns,
            "instance": None if step is None else INSTANCE,
            "partial": False,
        }
        placed = {"stage": BY_NAME[stage].id, "begin_ns": begin_ns, "end_ns": end_ns, "step": step}
        self.row("segments", **{**defaults, **placed, **values})
        return self.sequence

    def interval(self, step: int, interval_ns: int, tokens: int, phase: str = "decode") -> None:
        """Adds an inter-token interval that `tokens` requests had."""
        self.row("intervals", instance=INSTANCE, step=step, phase=phase, interval_ns=interval_ns, tokens=tokens)

    def write(self) -> Session:
        """Writes manifest and tables, each table in two parts where it has the rows for it."""
        for name, rows in self.rows.items():
            for number, part in enumerate((rows[:1], rows[1:]), 1):
                self.session.write_table(name, pa.Table.from_pylist(part, schema=TABLES[name]), number)
        self.session.write_manifest(self.manifest)
        return self.session


def _default(field: pa.Field) -> Any:
    if field.nullable:
        return None
    if pa.types.is_string(field.type):
        return ""
    return False if pa.types.is_boolean(field.type) else 0
