"""Derives the tables of a session again from its raw records, commit by commit, as its collector did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .assembly.assemble import Assembler
from .collector import batches_of, hold
from .control import read_switches
from .parts import END
from .restore import Restored
from .session import Manifest, ManifestDamaged, Session, SessionError

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa


@dataclass
class Rebuilt:
    """What became of a session's tables."""

    commits: int = 0
    slots: int = 0
    rows: int = 0
    damaged: list[str] = field(default_factory=list)  # parts of raw records that could not be read, and why
    restored: str = ""  # why the manifest was made again from the raw records; empty when it was not


def rebuild_tables(session: Session, progress: Callable[[int, int], None]) -> Rebuilt:
    """Replaces the tables, part by part; `progress` is told commits done and in all.

    What a session's bounds removed (`--keep`) stays removed: requests that began there are partial now. A manifest that
    is damaged is kept as manifest.json.damaged and made again. Raises SessionError when a collector has the session,
    OSError when it cannot be written.
    """
    with hold(session):
        result = Rebuilt()
        parts = session.raw_parts()
        try:
            manifest = session.read_manifest()
            if not manifest.started_ns and parts:
                result.restored = "there was no manifest.json"
        except ManifestDamaged as error:
            if not parts:
                raise SessionError(f"{session.path} has no records, and its manifest.json is damaged") from error
            manifest = Manifest()
            result.restored = f"it was damaged, and is kept as {session.set_manifest_aside().name}"
        if not manifest.started_ns and not parts:
            raise SessionError(f"{session.path} has no records")
        restored = Restored()
        assembler = Assembler(session.identity.key)
        switches = read_switches(session)
        total = parts[-1].last if parts else 0
        seen_ns = 0 if result.restored else manifest.updated_ns  # until when it was recorded: rebuilding adds nothing
        if parts and parts[0].first > 1:
            for process in manifest.processes:
                assembler.introduce(process.key, process.info, process.hooks)
        with session.new_tables() as fresh:

            def write(tables: dict[str, pa.Table], number: int) -> None:
                for name, table in tables.items():
                    fresh.write_table(name, table, number)
                    result.rows += table.num_rows

            for part in parts:
                try:
                    for commit, table in session.read_raw(part):
                        restored.add(commit)
                        assembler.switches = switches[: commit.switches]
                        for batch in batches_of(commit, table):
                            assembler.add(batch)
                        write(assembler.take(commit.taken_ns), commit.number)
                        seen_ns = max(seen_ns, commit.wall_ns)
                        result.commits += 1
                        result.slots += commit.slots
                        progress(commit.number, total)
                except SessionError as error:
                    result.damaged.append(str(error))
            if result.restored:
                manifest = restored.finish(session, assembler)
            write(assembler.finish("lost" if all(each.ended for each in manifest.processes) else "open"), END)
        session.merge(total)
        manifest.counts.update(assembler.counts)
        manifest.derived = max(manifest.derived, total)
        manifest.complete = True
        session.write_manifest(manifest, seen_ns)
    return result
