"""Makes a session's manifest again from its raw records, when the one that was there is damaged or gone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .discover import process_key
from .session import Losses, Manifest, Process

if TYPE_CHECKING:
    from .assembly.assemble import Assembler
    from .session import Commit, RingMark, Session


@dataclass
class Restored:
    """What the commits say about a session beside their records, gathered in their order.

    Not in them, and so not known any more: the command, the level that was asked for, contained errors by hook, and
    what a ring lost of which no mark is left (a ring that was gone before the end of its block of commits).
    """

    marks: dict[str, RingMark] = field(default_factory=dict)  # the last of each ring, by file name
    last_commit: dict[int, int] = field(default_factory=dict)  # of each process
    ended: set[int] = field(default_factory=set)
    read: dict[tuple[int, str], int] = field(default_factory=dict)  # slots, by process and ring
    manifest: Manifest = field(default_factory=Manifest)

    def add(self, commit: Commit) -> None:
        """Takes in one commit."""
        if not self.manifest.started_ns:
            self.manifest.started_ns = self.manifest.rotated_ns = commit.wall_ns
            self.manifest.rotated = commit.number - 1
        self.manifest.note_clocks(commit.taken_ns, commit.wall_ns)
        self.marks |= commit.rings
        for batch in commit.batches:
            self.last_commit[batch.process] = commit.number
            for ring, slots in (("control", batch.control), ("detail", batch.detail)):
                self.read[batch.process, ring] = self.read.get((batch.process, ring), 0) + slots
            if batch.ended:
                self.ended.add(batch.process)

    def finish(self, session: Session, assembler: Assembler) -> Manifest:
        """The manifest, with what the processes said of themselves."""
        manifest = self.manifest
        manifest.session = session.identity.session
        if not manifest.rotated:
            manifest.rotated_ns = 0
        names = {process_key(name): name for name in self.marks}
        for key in sorted({*self.last_commit, *names}, key=lambda key: self.last_commit.get(key, 0)):
            info = assembler.info.get(key, {})
            ring = names.get(key, "")
            role, pid, started = ([*ring.removesuffix(".ring").rsplit("-", 2), "", "", ""])[:3]
            manifest.processes.append(
                Process(
                    key,
                    ring,
                    str(info.get("role") or role),
                    int(pid) if pid.isdecimal() else 0,
                    "",
                    int(started) if started.isdecimal() else 0,
                    ended=key in self.ended,
                    last_commit=self.last_commit.get(key, 0),
                    info=info,
                    hooks=list(assembler.hooks.get(key, {}).values()),
                )
            )
            if ring:
                manifest.losses += self.marks[ring].losses
            else:
                manifest.losses += [
                    Losses(process, name, read=read) for (process, name), read in self.read.items() if process == key
                ]
        manifest.counts["manifest_restored"] = 1
        return manifest
