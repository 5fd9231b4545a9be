"""Several answers to one request: their rows come together, and their spans are under one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from unit.rings import opened, read_all
from unit.test_spans import source

from stagetrace.exporters.assembly.assemble import REQUEST_PATIENCE_NS, Assembler
from stagetrace.exporters.spans import spans_of
from stagetrace.instrument.ids import request_span_id
from stagetrace.instrument.records import Event, RecordType, header_word
from stagetrace.instrument.stages import BY_NAME, Finish

if TYPE_CHECKING:
    from pathlib import Path

    from stagetrace.instrument.recorder import Recorder

PARENT = 70
TOKENIZE, PREFILL = (header_word(RecordType.STATE, BY_NAME[name].id) for name in ("request_tokenize", "prefill"))
CHILD, FINISHED, LAST_OUTPUT, LAST_SENT = (
    header_word(RecordType.EVENT, event) for event in (Event.CHILD, Event.FINISHED, Event.LAST_OUTPUT, Event.LAST_SENT)
)


def arrive(recorder: Recorder, child: int, children: int) -> None:
    recorder.state(TOKENIZE, 100 + child, child + 1, 0, 0, 40, 8, 1)
    recorder.state(CHILD, 110, child + 1, 0, 0, PARENT, child, children)
    recorder.state(PREFILL, 120, child + 1, 9, 1)


def end(recorder: Recorder, child: int, at: int) -> None:
    recorder.state(FINISHED, at, child + 1, 9, 0, Finish.LENGTH, 5 + child, 40)
    recorder.state(LAST_OUTPUT, at + 5, child + 1, 0, 0, Finish.LENGTH, 5 + child, 40)


def send(recorder: Recorder, children: int, at: int) -> None:
    for child in range(children):
        recorder.state(LAST_SENT, at, child + 1)


def test_rows_of_children_come_together(tmp_path: Path) -> None:
    """Without a stream the whole answer is sent at the end; a long sister keeps one that is complete waiting."""
    with opened(tmp_path) as (recorder, reader):
        assembler = Assembler(b"key")
        for child in range(2):
            arrive(recorder, child, 2)
        end(recorder, 0, 1_000)
        assembler.add(read_all(reader))
        for now in (2_000, 3_000, 3_000 + REQUEST_PATIENCE_NS):
            assert not assembler.take(now)["requests"].num_rows
        later = 5_000 + REQUEST_PATIENCE_NS
        end(recorder, 1, later)
        send(recorder, 2, later + 50)
        assembler.add(read_all(reader))
        assert not assembler.take(later + 60)["requests"].num_rows, "records may be on their way through another ring"
        tables = assembler.take(later + 70)
    rows = tables["requests"].to_pylist()
    assert [(row["parent"], row["child"], row["output_tokens"]) for row in rows] == [(PARENT, 0, 5), (PARENT, 1, 6)]
    spans = spans_of(tables, source()).spans
    (parent,) = [span for span in spans if span.name == "parent_request"]
    children = [span for span in spans if span.name == "request"]
    assert parent.parent is None
    assert parent.context.span_id == request_span_id(source().key, PARENT)
    assert [child.parent.span_id for child in children if child.parent] == [parent.context.span_id] * 2
    assert parent.attributes is not None
    assert parent.attributes["gen_ai.usage.output_tokens"] == 11
    assert (parent.start_time, parent.end_time) == (100, later + 50)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_child_whose_sister_is_not_known_is_closed_alone(tmp_path: Path, lost: int) -> None:
    """Its records were dropped: nothing is waited for. The parent's span comes with the first child alone."""
    with opened(tmp_path) as (recorder, reader):
        assembler = Assembler(b"key")
        arrive(recorder, 1 - lost, 2)
        end(recorder, 1 - lost, 1_000)
        recorder.state(LAST_SENT, 1_100, 2 - lost)
        assembler.add(read_all(reader))
        assembler.take(2_000)
        tables = assembler.take(3_000)
    assert tables["requests"].num_rows == 1
    assert len([span for span in spans_of(tables, source()).spans if span.name == "parent_request"]) == lost
