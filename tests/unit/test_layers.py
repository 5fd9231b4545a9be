"""Tests of the layer level's analysis: small sessions whose numbers were worked out by hand."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from unit.sessions import INSTANCE, SessionBuilder

from stagetrace.adapters.rank import ranges
from stagetrace.analysis.layers import Layers, imbalance, numbers
from stagetrace.analysis.report import as_dict, print_summary, summarise
from stagetrace.instrument.stages import AttentionKind, Collective

if TYPE_CHECKING:
    from pathlib import Path

    from stagetrace.exporters.session import Session

WORKERS = (11, 12)
TP, SHM = 1001, 1002  # handles


def worker(builder: SessionBuilder, key: int, **info: Any) -> None:
    told = {
        "visible": ["attention", "moe_route"],
        "not_visible_under_compile": [],
        "names": {str(TP): "tp:0 (ranks 0-1)", str(SHM): "shared memory"},
        "world_size": 2,
        "data_parallel": 1,
    }
    builder.process(key, role="worker", info=told | info)


def layers_of(session: Session) -> Layers:
    return summarise(session).layers


def shown(session: Session) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_summary(summarise(session), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """Two ranks, two steps and one that is not complete; a layer of each kind of attention, collectives, experts."""
    builder = SessionBuilder(tmp_path / "s", level="layer")
    for key in WORKERS:
        worker(builder, key)
    builder.step(1, 0, 1000)
    builder.step(2, 1000, 2000)
    builder.step(3, 2000, 3000, status="incomplete")
    for number, key in enumerate(WORKERS):
        for step in (1, 2, 3):
            at = 1000 * (step - 1)
            place = {"process": key, "thread": key}
            builder.segment("rank_step", at, at + 900, step, a0=number, self_ns=100, **place)
            builder.segment("forward", at + 100, at + 900, step, a0=number, self_ns=400, **place)
            builder.segment("attention", at + 100, at + 200, step, a0=0, a1=AttentionKind.FULL, a2=5, **place)
            builder.segment("attention", at + 200, at + 240, step, a0=1, a1=AttentionKind.SLIDING, a2=5, **place)
            builder.segment("attention", at + 240, at + 300, step, a0=2, a1=AttentionKind.SLIDING, a2=5, **place)
            # The second rank comes 30 ns later; both leave together.
            words = {"a0": Collective.ALL_REDUCE, "a1": TP, "a2": 4096, "a3": SHM, "a4": step}
            builder.segment("collective", at + 400 + 30 * number, at + 600, step, **words, **place)
    for step, counts in ((1, [6, 2, 0, 0]), (2, [0, 2, 6, 0])):
        builder.row("experts", process=11, instance=INSTANCE, step=step, rank=0, layer=4, tokens=4, counts=counts)
    builder.row("experts", process=11, instance=INSTANCE, step=3, rank=0, layer=4, tokens=4, counts=[0, 0, 0, 8])
    return builder.write()


def test_stages_by_kind(session: Session):
    found = {(row.stage, row.kind): row for row in layers_of(session).stages}
    assert {*found} == {("attention", "full"), ("attention", "sliding"), ("collective", None)}
    full, sliding = found["attention", "full"], found["attention", "sliding"]
    assert (full.count, full.layers, full.self_ns, full.slowest_layer) == (4, 1, 400, None)
    assert full.share == 400 / (4 * 800)
    assert (sliding.count, sliding.layers, sliding.self_ns) == (8, 2, 400)
    assert (sliding.slowest_layer, sliding.slowest_ns, sliding.duration.p50) == (2, 60.0, 50.0)
    assert found["collective", None].layers is None


def test_steps_whose_layers_were_not_recorded_or_in_part_are_left_out(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s", level="layer")
    worker(builder, WORKERS[0])
    place = {"process": WORKERS[0], "thread": WORKERS[0]}
    for step, forward in ((1, 100), (2, 5_000), (3, 7_000)):
        builder.step(step, 10_000 * step, 10_000 * step + 9_000)
        builder.segment("forward", 10_000 * step, 10_000 * step + forward, step, self_ns=forward, **place)
    builder.segment("attention", 10_000, 10_040, 1, a0=0, a1=AttentionKind.FULL, a2=5, **place)
    builder.segment("attention", 20_000, 20_900, 2, a0=0, a1=AttentionKind.FULL, a2=5, partial=True, **place)
    for step in (1, 2):
        row = {"process": WORKERS[0], "instance": INSTANCE, "step": step, "rank": 0, "layer": 0, "tokens": step}
        builder.row("experts", **row, counts=[step, 0])
    found = layers_of(builder.write())
    (attention,) = found.stages
    assert (attention.count, attention.self_ns, attention.share) == (1, 40, 0.4)
    assert [load.tokens for load in found.experts] == [1]


def test_collectives_wait_for_the_last_rank(session: Session):
    (row,) = layers_of(session).collectives
    assert (row.op, row.group, row.algorithm, row.ranks) == ("all_reduce", "tp:0 (ranks 0-1)", "shared memory", 2)
    assert (row.count, row.bytes, row.total_ns, row.compared) == (4, 4 * 4096, 2 * (200 + 170), 4)
    assert (row.waiting_ns, row.moving_ns) == (2 * 30, 2 * (170 + 170))
    assert row.bytes_per_s == 4 * 4096 * 1e9 / 680


def test_operations_of_other_instances_and_between_two_ranks_are_not_compared(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s", level="layer")
    names = {"1": "tp:0 (ranks 0)", "2": "ep:0 (ranks 0-1)", "3": "pp:0 (ranks 0-1)"}
    for number, key in enumerate(WORKERS):
        worker(builder, key, names=names)
        place = {"process": key, "thread": key, "instance": INSTANCE + number}
        builder.step(1, 0, 1000, instance=INSTANCE + number)
        for group, sequence in ((1, 7), (2, 7), (3, 0)):
            words = {"a0": Collective.ALL_REDUCE, "a1": group, "a2": 1, "a3": 0, "a4": sequence}
            builder.segment("collective", 100 + 50 * number, 200, 1, **words, **place)
    found = {row.group.partition(":")[0]: row for row in layers_of(builder.write()).collectives}
    assert found["ep"].waiting_ns == 50 and found["ep"].compared == 2
    assert found["tp"].waiting_ns is None and found["pp"].waiting_ns is None
    assert found["tp"].algorithm is None and found["tp"].bytes_per_s is None


def test_experts(session: Session):
    (load,) = layers_of(session).experts
    assert (load.layer, load.experts, load.tokens, load.idle) == (4, 4, 16, 1)
    assert load.hot == [(0, 6 / 16), (2, 6 / 16), (1, 4 / 16)]
    assert load.imbalance == 6 / 4 and load.imbalance_per_step == 6 / 2
    assert load.rank_imbalance_per_step is None


def test_experts_by_rank(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s", level="layer")
    for rank, (key, local) in enumerate(zip(WORKERS, ("0-1", "2-3"), strict=True)):
        worker(builder, key, expert_parallel_size=2, expert_parallel_rank=rank, local_experts=local)
        row = {"process": key, "instance": INSTANCE, "step": 1, "rank": rank, "layer": 0, "tokens": 4}
        builder.row("experts", **row, counts=[3, 3, 2, 0])
    builder.step(1, 0, 1000)
    (load,) = layers_of(builder.write()).experts
    assert load.tokens == 16, "the ranks' tokens add up"
    assert load.rank_imbalance_per_step == 12 / 8


def test_what_a_compiler_hides_is_said(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s", level="layer")
    hidden = ["embed", "moe_route", "expert_compute", "collective"]
    worker(builder, 11, visible=["attention"], not_visible_under_compile=hidden)
    builder.step(1, 0, 1000)
    place = {"process": 11, "thread": 11}
    builder.segment("rank_step", 0, 900, 1, a0=0, **place)
    builder.segment("attention", 100, 200, 1, a0=0, a1=1, a2=5, **place)
    session = builder.write()
    found = layers_of(session)
    assert {*found.not_visible} == {*hidden}
    assert "mlp" in found.not_in_model and "logits" not in found.not_in_model
    text = shown(session)
    assert "Not visible under compile: embed, moe_route, expert_compute, collective" in text
    (line,) = [line for line in text.splitlines() if line.startswith("No rows:")]
    assert "logits" in line and "embed" not in line and "mlp" not in line


def test_the_report_shows_all_of_it(session: Session):
    text = shown(session)
    for words in ("Inside forward", "sliding", "Collectives", "tp:0 (ranks 0-1)", "Tokens by expert", "0 (37.5%)"):
        assert words in text
    json.dumps(as_dict(summarise(session)))
    assert "Not visible" not in text


def test_below_the_level_there_is_nothing(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s")
    builder.step(1, 0, 1000)
    session = builder.write()
    assert layers_of(session).is_empty
    assert "Inside forward" not in shown(session)


@given(st.sets(st.integers(0, 300)))
def test_ranges_there_and_back(members: set[int]):
    assert numbers(ranges(members)) == sorted(members)


@pytest.mark.parametrize("text", [None, 5, "", "x", "1-", "-1", "3-x", "0-99999999", "0-3,," + "9" * 40, [1]])
def test_what_names_no_numbers(text: object):
    assert numbers(text) == []


@given(st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=5))
def test_imbalance_is_the_weighted_mean_of_the_steps(rows: list[list[int]]):
    busy = [row for row in rows if sum(row)]
    expected = sum(max(row) / (sum(row) / 3) * sum(row) for row in busy) / sum(map(sum, busy)) if busy else 1
    assert imbalance(np.array(rows)) == pytest.approx(expected)
    assert 1 <= imbalance(np.array(rows)) <= 3.0001
