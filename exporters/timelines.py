"""Exact accounting on one timeline: segments nest or follow; each gets its parent and its self time. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Segment:
    """One segment with its place on its timeline. Times in ns."""

    sequence: int
    stage: int
    thread: int
    begin: int
    end: int
    instance: int
    step: int
    attributes: tuple[int, ...]
    covered: int = 0  # time of the segments directly inside
    parent: Segment | None = None

    @property
    def self_ns(self) -> int:
        """Its time less that of the segments directly inside it."""
        return self.end - self.begin - self.covered


def nest(segments: list[Segment]) -> int:
    """Gives every segment of one timeline its parent, in place; returns how many had to be cut.

    A segment that crosses the end of the one it began in is cut there. Of two with the same times the one recorded
    later is the outer one, since a segment is recorded at its end.
    """
    conflicts = 0
    stack: list[Segment] = []
    segments.sort(key=lambda segment: (segment.begin, -segment.end, -segment.sequence))
    for segment in segments:
        while stack and stack[-1].end <= segment.begin:
            stack.pop()
        if stack:
            parent = stack[-1]
            if segment.end > parent.end:
                conflicts += 1
                segment.end = parent.end
            segment.parent = parent
            parent.covered += segment.end - segment.begin
        stack.append(segment)
    return conflicts


def overlap(segments: list[tuple[int, int]], begin: int, end: int) -> int:
    """How much of [begin, end) intervals cover together, in ns; where two overlap it counts once."""
    covered, reached = 0, begin
    for start, stop in sorted(segments):
        covered += max(0, min(end, stop) - max(reached, start))
        reached = max(reached, stop)
    return covered
