"""Tests of what is read from marks: every step's own times, or a count of why not, whatever was overwritten."""

from __future__ import annotations

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagetrace.instrument.device_marks import WORDS, Marked, MarkReader, MarkSpan

MARKED = [Marked("moe", 0), Marked("moe", 1), Marked("collective", 1)]


def test_a_row_as_the_kernel_writes_it():
    reader = MarkReader(MARKED)
    row = [100, 7, 1, 150, 7, 1, 150, 7, 1, 180, 7, 1, 160, 7, 1, 170, 7, 1]
    assert reader.read(7, row) == [MarkSpan(MARKED[0], 100, 150), MarkSpan(MARKED[1], 150, 180),
                                   MarkSpan(MARKED[2], 160, 170)]  # fmt: skip
    assert astuple(reader.counts) == (1, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ([100, 6, 1, 150, 6, 1], "absent"),
        ([0, 0, 0, 0, 0, 0], "absent"),
        ([100, 7, 1, 90, 6, 1], "halves"),
        ([90, 6, 1, 150, 7, 1], "halves"),
        ([900, 71, 1, 150, 7, 1], "overwritten"),
        ([100, 7, 1, 950, 71, 1], "overwritten"),
        ([150, 7, 1, 100, 7, 1], "backwards"),
    ],
)
def test_what_is_not_a_span_of_the_step_is_counted(words: list[int], count: str):
    reader = MarkReader(MARKED[:1])
    assert len(reader.read(1, [10, 1, 1, 20, 1, 1])) == 1
    assert reader.read(7, words) == []
    assert getattr(reader.counts, count) == 1 and sum(astuple(reader.counts)) == 3


def test_what_no_step_has_passed_is_not_missing():
    reader = MarkReader(MARKED)
    assert reader.read(1, [0] * reader.words) == [] and sum(astuple(reader.counts)) == 1


def test_a_row_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="5 words; 3 pairs of marks have 18"):
        MarkReader(MARKED).read(1, [0] * 5)


class Device:
    """A ring as the kernel keeps it, in Python."""

    def __init__(self, depth: int):
        self.depth = depth
        self.ring = [[0] * (2 * WORDS * len(MARKED)) for _ in range(depth)]
        self.time = 0

    def mark(self, step: int, index: int) -> int:
        self.time += 1
        row, at = self.ring[step % self.depth], WORDS * index
        row[at : at + WORDS] = [self.time, step, row[at + 2] + 1 if row[at + 1] == step else 1]
        return self.time


marks = st.lists(st.integers(0, 2 * len(MARKED) - 1), max_size=12)


@given(st.integers(1, 4), st.lists(st.tuples(marks, st.integers(0, 6)), max_size=12))
def test_whatever_is_passed_and_whenever_it_is_read(depth: int, steps: list[tuple[list[int], int]]):
    """Each step passes some marks; its row is read up to six steps later, when others may have its place."""
    device, reader = Device(depth), MarkReader(MARKED)
    passed: dict[int, dict[int, list[int]]] = {}
    due: dict[int, list[int]] = {}
    known: set[Marked] = set()  # had a span in some step
    for step, (indices, later) in enumerate(steps, 1):
        passed[step] = {}
        for index in indices:
            passed[step].setdefault(index, []).append(device.mark(step, index))
        due.setdefault(step + later, []).append(step)
        for read in due.pop(step, []):
            before = astuple(reader.counts)
            spans = {span.marked: span for span in reader.read(read, device.ring[read % depth])}
            for i, marked in enumerate(MARKED):
                span = spans.get(marked)
                overwritten = any(
                    index in passed[other] for index in (2 * i, 2 * i + 1)
                    for other in range(read + depth, step + 1, depth)
                )  # fmt: skip
                begin, end = (passed[read].get(index, []) for index in (2 * i, 2 * i + 1))
                if span is not None:
                    assert not overwritten and (span.begin, span.end) == (begin[-1], end[-1])
                else:
                    assert overwritten or not begin or not end or end[-1] < begin[-1]
            gained = [after - was for was, after in zip(before, astuple(reader.counts), strict=True)]
            assert gained[0] == 1
            rows, absent, lost, halves, _, backwards = gained
            known |= spans.keys()
            never = sum(marked not in known for marked in MARKED)
            told = len(spans) + absent + lost + halves + backwards
            assert len(MARKED) - never <= told <= len(MARKED) and rows == 1
