"""The start of an engine's process: what waits for the ring, and that parts which share one are within one start-up."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from unit.rings import opened, read_all

from stagetrace.adapters import startup
from stagetrace.adapters.sglang import startup as sglang
from stagetrace.adapters.sglang.nodes import shared_token
from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.instrument.recorder import Recorder, now
from stagetrace.instrument.stages import BY_ID

if TYPE_CHECKING:
    from pathlib import Path

FRONT_END, CORE, WORKER = "front end", "engine core", "worker"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not begun."""
    for name, value in (("pid", 0), ("begin", 0), ("part", ""), ("waiting", [])):
        monkeypatch.setattr(startup._Start, name, value)


def test_the_start_of_this_process_is_known() -> None:
    age_ns = now() - startup.process_started_ns()
    assert 0 < age_ns < 3600 * 10**9
    with open(f"/proc/{os.getpid()}/stat", "rb") as file:
        assert int(file.read().rpartition(b")")[2].split()[19]) > 0


def test_what_happens_before_the_ring_waits_for_it(tmp_path: Path) -> None:
    closed = Recorder()
    startup.begun(closed, WORKER, now())
    startup.write(closed, startup._IMPORTS, 5, 7)
    assert len(startup._Start.waiting) == 2
    with opened(tmp_path) as (recorder, reader):
        startup.flush(recorder)
        assert startup._Start.waiting == []
        startup.ready(recorder, WORKER)
        startup.ready(recorder, WORKER)
        names = segments(reader)
    assert names == ["imports", "imports", "startup"]


def test_parts_that_share_a_process_are_within_one_start_up(tmp_path: Path) -> None:
    """The offline class with its engine in the same process: it begins first and is ready last."""
    with opened(tmp_path) as (recorder, reader):
        startup.begun(recorder, FRONT_END, now())
        startup.begun(recorder, CORE, now())
        startup.begun(recorder, WORKER, now())
        for part in (WORKER, CORE):
            startup.ready(recorder, part)
        assert startup._Start.begin
        startup.ready(recorder, FRONT_END)
        assert not startup._Start.begin
        assert segments(reader) == ["imports", "startup"]
        # A second engine in the process has a start-up, and no imports.
        time.sleep(0.001)
        startup.begun(recorder, FRONT_END, now())
        startup.ready(recorder, FRONT_END)
        assert segments(reader) == ["startup"]


def segments(reader: object) -> list[str]:
    """The stages of what was recorded since the last look."""
    assembler = Assembler(b"key")
    assembler.add(read_all(reader))  # type: ignore[arg-type]
    rows = assembler.finish()["segments"].to_pylist()
    assert assembler.counts["accounting_conflict"] == 0
    return sorted(BY_ID[row["stage"]].name for row in rows)


# SGLang


def hook_of(recorder: Recorder) -> Any:
    return SimpleNamespace(recorder=recorder)


def test_reading_weights_is_what_follows_the_making_of_the_modules(tmp_path: Path) -> None:
    with opened(tmp_path) as (recorder, reader):
        building, loading = sglang.build_model(hook_of(recorder)).after, sglang.weights_loaded(hook_of(recorder)).after
        assert building is not None and loading is not None
        loading(5)  # a loader of its own makes no modules
        assert segments(reader) == []
        building(10, 20)
        loading(50)
        loading(60)  # has nothing before it
        assert segments(reader) == ["build_model", "load_weights"]


@pytest.mark.parametrize("runner", ["decode_cuda_graph_runner", "prefill_cuda_graph_runner", "eager_runner"])
def test_a_capture_is_recorded_where_something_was_captured(runner: str, tmp_path: Path) -> None:
    with opened(tmp_path) as (recorder, reader):
        after = sglang.captured(hook_of(recorder)).after
        assert after is not None
        after(SimpleNamespace(**{runner: object()}), 10, 20)
        assert segments(reader) == ([] if runner == "eager_runner" else ["graph_capture"])


class TokenizerManager:
    pass


class TokenizerWorker(TokenizerManager):
    pass


@pytest.mark.parametrize(
    ("role", "manager", "ready"),
    [
        ("front_end", TokenizerManager(), False),  # the schedulers are waited for
        ("front_end", TokenizerWorker(), True),
        ("detokenizer", object(), True),
    ],
)
def test_who_waits_for_the_schedulers(role: str, manager: object, ready: bool, tmp_path: Path) -> None:
    with opened(tmp_path) as (recorder, reader):
        startup.begun(recorder, role, now())
        sglang.built(hook_of(recorder), role, manager)
        assert segments(reader) == (["imports", "startup"] if ready else ["imports"])


@pytest.mark.parametrize("nodes", [None, 1, 2])
def test_several_nodes_share_a_word(nodes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, bytes] = {}

    def compare_set(key: str, expected: str, desired: str) -> bytes:
        assert expected == ""
        return kept.setdefault(key, desired.encode())

    store = SimpleNamespace(compare_set=compare_set)
    torch = SimpleNamespace(
        distributed=SimpleNamespace(distributed_c10d=SimpleNamespace(_get_default_store=lambda: store))
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    words = {shared_token(SimpleNamespace(nnodes=nodes)) for _ in range(3)}
    assert len(words) == 1 and (words == {""}) == (nodes != 2)


def test_without_a_store_each_node_is_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    assert shared_token(SimpleNamespace(nnodes=2)) == ""
