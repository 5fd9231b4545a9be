"""The start-up table: what each process did until it was ready, and that it is in no other table."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from unit.sessions import PROCESS, THREAD, SessionBuilder

from stagetrace.analysis.report import as_dict, print_summary, summarise
from stagetrace.analysis.start_up import Piece

WORKER = PROCESS + 1


def started(path: Path) -> SessionBuilder:
    build = SessionBuilder(path)
    build.process(role="engine_core")
    build.process(WORKER, role="worker", info={"engine": "vllm", "rank": 1, "world_size": 2, "data_parallel": 1})
    for process, parts in (
        (PROCESS, (("startup", 0, 1_000, 300), ("imports", 0, 400, 400), ("start_workers", 500, 800, 300))),
        (
            WORKER,
            (
                *(("startup", 510, 790, 20), ("imports", 510, 600, 90), ("model_load", 610, 780, 130)),
                *(("build_model", 620, 650, 30), ("gc_pause", 700, 710, 10)),
            ),
        ),
    ):
        for stage, begin, end, own in parts:
            build.segment(stage, begin, end, process=process, thread=THREAD, self_ns=own)
    build.segment("gc_pause", 1_200, 1_250, process=PROCESS, thread=THREAD, self_ns=50)
    build.request(1, 2_000, arrival_ns=1_100)
    build.write()
    return build


def test_each_process_adds_up(tmp_path: Path) -> None:
    core, worker = summarise(started(tmp_path / "session").session).start_up
    assert (core.process, core.total_ns) == ("engine_core", 1_000)
    assert core.pieces == [
        *(Piece("imports", 1, 400, 400), Piece("start_workers", 1, 300, 300), Piece("unattributed", 1, 300, 300)),
    ]
    assert (worker.process, worker.total_ns) == ("worker, rank 1", 280)
    assert [piece.stage for piece in worker.pieces] == [
        *("imports", "model_load", "build_model", "gc_pause", "unattributed"),
    ]
    for each in (core, worker):
        assert sum(piece.self_ns for piece in each.pieces) == each.total_ns


def test_it_is_shown_once(tmp_path: Path) -> None:
    summary = summarise(started(tmp_path / "session").session)
    assert {row.stage for row in summary.stages.outside} <= {"gc_pause"}
    assert sum(row.count for row in summary.stages.outside) <= 1
    assert [each["process"] for each in as_dict(summary)["start_up"]] == ["engine_core", "worker, rank 1"]
    console = Console(width=200, record=True)
    print_summary(summary, console)
    text = console.export_text()
    assert "Start-up, each process from its start until it was ready" in text
    assert "start_workers" in text


def test_a_session_without_start_up_has_no_table(tmp_path: Path) -> None:
    build = SessionBuilder(tmp_path / "session")
    build.process()
    build.request(1, 2_000, arrival_ns=1_100)
    build.write()
    assert summarise(build.session).start_up == []
