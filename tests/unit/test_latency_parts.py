"""Tests of where latencies went: what an engine did at a time, why requests waited, and the slow ones among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.sessions import INSTANCE, SessionBuilder

from stagetrace.analysis.activity import Doing, Pieces, activity
from stagetrace.analysis.latency_parts import COLUMNS, LatencyParts, latency_parts, parts_frame
from stagetrace.analysis.load import load
from stagetrace.analysis.queueing import Wait, step_causes

if TYPE_CHECKING:
    from pathlib import Path

    from stagetrace.exporters.session import Session

MS = 1_000_000
LIMITS = {"instance": INSTANCE, "max_num_seqs": 4, "max_num_batched_tokens": 100}


def found(session: Session) -> dict[str, LatencyParts]:
    frames = load(session, None, COLUMNS)
    tables = (frames[name] for name in ("requests", "states", "steps", "intervals"))
    return {each.latency: each for each in latency_parts(*tables, frames.manifest.processes)}


def of(parts: LatencyParts, group: str = "mean") -> dict[str, float]:
    (chosen,) = (each for each in parts.groups if each.of == group)
    assert sum(chosen.parts.values()) == pytest.approx(chosen.mean_ns, abs=len(chosen.parts))
    return chosen.parts


def state(builder: SessionBuilder, handle: int, name: str, begin: float, end: float, **values: int) -> None:
    from stagetrace.instrument.stages import BY_NAME

    times = {"begin_ns": round(begin * MS), "end_ns": round(end * MS)}
    builder.row("states", handle=handle, stage=BY_NAME[name].id, instance=INSTANCE, **times, **values)


def step(builder: SessionBuilder, number: int, begin: float, end: float, phase: str, **values: int) -> None:
    builder.step(number, round(begin * MS), round(end * MS), phase, **values)


def told(path: Path) -> SessionBuilder:
    """One request that waits for a full batch, prefills beside another, decodes beside other prefill."""
    builder = SessionBuilder(path)
    builder.process(info=LIMITS)
    full = {"running": 4, "waiting": 1}
    for number, at in enumerate((0, 10, 20)):  # decode steps of 8 ms with four requests
        step(builder, number + 1, at, at + 8, "decode", decode_requests=4, decode_tokens=4, **full)
    step(builder, 4, 30, 70, "prefill", prefill_requests=2, prefill_tokens=40, running=2)
    step(builder, 5, 70, 90, "mixed", decode_requests=4, decode_tokens=4, prefill_requests=1, prefill_tokens=10)
    step(builder, 6, 92, 100, "decode", decode_requests=4, decode_tokens=4)
    builder.request(
        1,
        101 * MS,
        request_id="slow",
        instance=INSTANCE,
        arrival_ns=2 * MS,
        first_token_ns=70 * MS,
        first_output_ns=71 * MS,
        last_token_ns=100 * MS,
        last_output_ns=101 * MS,
        prompt_tokens=10,
        output_tokens=3,
    )
    state(builder, 1, "request_tokenize", 2, 3)
    state(builder, 1, "request_dispatch", 3, 5)
    state(builder, 1, "queue", 5, 30)
    state(builder, 1, "prefill", 30, 70, a1=0)
    state(builder, 1, "prefill_chunk", 30, 70, step=4, a0=10)
    state(builder, 1, "decode", 70, 100)
    builder.interval(5, 20 * MS, 1, "mixed")
    builder.interval(6, 10 * MS, 1, "decode")
    return builder


def test_every_part_of_one_request(tmp_path: Path):
    parts = found(told(tmp_path / "s").write())
    assert of(parts["ttft"]) == {
        "tokenize": 1 * MS,
        "dispatch": 2 * MS,
        "queue_next_step": 5 * MS,  # until the schedule at 10
        "queue_batch_full": 20 * MS,
        "prefill_own": 10 * MS,  # a quarter of the step's prefill tokens
        "prefill_others": 30 * MS,
        "delivery": 1 * MS,
    }
    assert of(parts["tpot"]) == {"decode_own": 8 * MS, "interference": 6 * MS, "decode_between": 1 * MS}
    assert of(parts["e2e"]) == {
        **of(parts["ttft"]),
        **{name: 2 * amount for name, amount in of(parts["tpot"]).items()},
    }
    assert of(parts["itl"]) == {"decode_own": 8 * MS, "interference": 6 * MS, "decode_between": 1 * MS}


def test_groups_are_the_requests_around_a_percentile_and_name_them(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s")
    for number in range(200):
        long = number >= 190  # these wait in the queue, the others tokenize
        begin, ready = number * 1_000 * MS, number * 1_000 * MS + (200 if long else 10) * MS
        builder.request(number + 1, ready, request_id=f"r{number}", arrival_ns=begin, first_output_ns=ready,
                        first_token_ns=ready, last_output_ns=ready, instance=INSTANCE)  # fmt: skip
        state(builder, number + 1, "queue" if long else "request_tokenize", begin / MS, ready / MS)
    (ttft, e2e) = (found(builder.write())[name] for name in ("ttft", "e2e"))
    assert [group.count for group in ttft.groups] == [200, 10, 10, 4]
    assert of(ttft, "p50") == {"tokenize": 10 * MS} and of(ttft, "p99") == {"queue_other": 200 * MS}
    assert set(ttft.groups[-1].examples) <= {f"r{number}" for number in range(190, 200)}
    assert ttft.groups == e2e.groups


def test_what_is_not_measured_or_not_recorded(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s")
    times = {"arrival_ns": 0, "first_token_ns": 5, "first_output_ns": 7, "last_token_ns": 5, "last_output_ns": 9}
    builder.request(1, 9, output_tokens=1, **times)  # no state, no step
    builder.request(2, 9, status="lost", **times)
    builder.request(3, 9, partial=True, **times)
    builder.request(4, 9, **times)
    builder.request(4, 9, **times)  # whose states cannot be told from those of the other
    parts = found(builder.write())
    assert {name: each.groups[0].count for name, each in parts.items()} == {"ttft": 1, "e2e": 1}
    assert of(parts["ttft"]) == {"delivery": 2, "not_recorded": 5}


def test_without_steps_prefill_and_decode_are_not_told_apart(tmp_path: Path):
    builder = told(tmp_path / "s")
    builder.rows["steps"] = []
    builder.rows["intervals"] = []
    parts = found(builder.write())
    assert of(parts["ttft"])["prefill_unknown"] == 40 * MS and of(parts["ttft"])["queue_other"] == 25 * MS
    assert of(parts["tpot"]) == {"decode_unknown": 15 * MS} and "itl" not in parts


def test_preemption_and_what_it_costs(tmp_path: Path):
    builder = told(tmp_path / "s")
    for row in builder.rows["states"][-1:]:
        row["end_ns"] = 90 * MS
    state(builder, 1, "preempted", 90, 92)
    state(builder, 1, "prefill", 92, 100, a1=1)
    assert of(found(builder.write())["tpot"]) == {
        "decode_own": 4 * MS, "interference": 6 * MS, "preempted": 1 * MS, "recompute": 4 * MS,
    }  # fmt: skip


def test_causes_that_the_engine_recorded_take_the_place_of_what_steps_tell(tmp_path: Path):
    builder = told(tmp_path / "s")
    builder.rows["requests"][0] |= {"grammar_ns": 2 * MS, "kv_space_ns": 15 * MS, "lora_limit_ns": 1 * MS}
    queued = {name: each for name, each in of(found(builder.write())["ttft"]).items() if name.startswith("queue")}
    assert queued == {
        "queue_next_step": 7 * MS, "queue_grammar": 2 * MS, "queue_kv_space": 15 * MS, "queue_lora_limit": 1 * MS,
    }  # fmt: skip


def test_frame_has_a_row_for_each_request_and_latency(tmp_path: Path):
    frames = load(told(tmp_path / "s").write(), None, COLUMNS)
    frame = parts_frame(frames["requests"], frames["states"], frames["steps"], frames.manifest.processes)
    assert frame["latency"].tolist() == ["ttft", "tpot", "e2e"]
    assert frame.set_index("latency")["interference"].to_dict() == {"ttft": 0, "tpot": 6 * MS, "e2e": 12 * MS}


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({}, Wait.OTHER),
        ({"running": 4}, Wait.BATCH_FULL),
        ({"prefill_tokens": 90, "decode_tokens": 10}, Wait.TOKEN_BUDGET),
        ({"kv_usage": 960_000}, Wait.KV_SPACE),
        ({"kv_usage": 800_000, "decode_context": 800}, Wait.KV_SPACE),  # a prompt of 200 needs a fifth
        ({"kv_usage": 500_000, "decode_context": 500}, Wait.OTHER),
        ({"running": 4, "preempted": 1}, Wait.KV_SPACE),
    ],
)
def test_why_a_step_took_no_other_request_in(tmp_path: Path, values: dict[str, int], cause: Wait):
    builder = SessionBuilder(tmp_path / "s")
    builder.step(1, 0, 10, **values)
    steps = load(builder.write(), None, COLUMNS)["steps"]
    for budget in ("max_num_batched_tokens", "chunked_prefill_size"):  # vLLM's, and SGLang's with mixed chunks
        assert step_causes(steps, {"max_num_seqs": 4, budget: 100}, 200).tolist() == [cause]


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 3)), min_size=1, max_size=30),
    st.lists(st.tuples(st.integers(-100, 2000), st.integers(0, 500)), min_size=1, max_size=20),
)
@settings(deadline=None)
def test_a_split_adds_up_and_is_what_each_nanosecond_is_in(
    lengths: list[tuple[int, int]], asked: list[tuple[int, int]]
):
    bounds = np.concatenate([[0], np.cumsum([length for length, _ in lengths])])
    pieces = Pieces.of(bounds, np.array([kind for _, kind in lengths], np.int8), 4, 3)
    begin = np.array([at for at, _ in asked])
    end = begin + [length for _, length in asked]
    split = pieces.within(begin, end)
    kind_at = [kind for length, kind in lengths for _ in range(length)]
    for number, (low, high) in enumerate(zip(begin, end, strict=True)):
        kinds = [kind_at[at] if 0 <= at < len(kind_at) else 3 for at in range(low, high)]
        assert split[:, number].tolist() == [kinds.count(kind) for kind in range(4)]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60), st.sampled_from(["prefill", "decode", "mixed"])),
                min_size=1, max_size=20), st.data())  # fmt: skip
@settings(deadline=None)
def test_steps_that_overlap_partition_time(steps: list[tuple[int, int, str]], data: st.DataObject):
    import pandas as pd

    rows, end = [], 0
    for number, (early, length, phase) in enumerate(steps):
        end += length
        rows.append((1, number, phase, max(end - length - early, 0), end, number % 3, 7))
    names = ["instance", "step", "phase", "begin_ns", "end_ns", "decode_requests", "prefill_tokens"]
    (own,) = activity(pd.DataFrame(rows, columns=names)).values()
    begin = data.draw(st.integers(0, end))
    split = own.pieces.within(np.array([begin]), np.array([end]))[:, 0]
    assert split.min() >= 0 and split.sum() == end - begin and not split[Doing.UNKNOWN]
    assert (own.beyond_decode <= own.own).all() and own.find(own.numbers).tolist() == [*range(len(steps))]
    assert own.find(np.array([10**6, -5])).tolist() == [-1, -1]
