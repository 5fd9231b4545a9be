"""Tests of one request's story: finding it by an id, what it was in, with whom, and how that compares."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner
from unit.sessions import INSTANCE, SessionBuilder
from unit.test_latency_parts import MS, state, step, told

from stagetrace.analysis.show_story import as_dict, tell
from stagetrace.analysis.story import NoSuchRequest, find_request
from stagetrace.cli.main import app

if TYPE_CHECKING:
    from pathlib import Path


def several(path: Path) -> SessionBuilder:
    builder = told(path)
    for number, name in ((2, "cmpl-aa1"), (3, "cmpl-aa2"), (4, "cmpl-b\x1b[2J")):
        builder.request(number, 500 * MS, request_id=f"{name}-0", external_id=name, trace_id=f"{number:032x}",
                        arrival_ns=490 * MS, first_output_ns=495 * MS)  # fmt: skip
    return builder


@pytest.mark.parametrize(
    ("wanted", "row"), [("slow", 0), ("cmpl-aa1", 1), ("cmpl-aa2-0", 2), ("cmpl-b", 3), (f"{3:032x}", 2), (" sl ", 0)]
)
def test_found_by_any_id_or_how_one_begins(tmp_path: Path, wanted: str, row: int):
    from stagetrace.analysis.load import load

    assert find_request(load(several(tmp_path / "s").write())["requests"], wanted) == row


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("cmpl-aa", "'cmpl-aa' could be 2 requests: cmpl-aa1-0, cmpl-aa2-0. Write more of the id"),
        ("zzz", "no request of the 4 in this session has an id that is 'zzz' or begins with it"),
        ("  ", "an empty id names no request"),
        ("cmpl", r"cmpl-b\x1b[2J-0"),
    ],
)
def test_an_id_that_is_not_one_request_is_an_error_that_helps(tmp_path: Path, wanted: str, said: str):
    session = several(tmp_path / "s").write()
    with pytest.raises(NoSuchRequest) as raised:
        tell(session, wanted)
    assert said in str(raised.value)
    ran = CliRunner().invoke(app, ["report", str(session.path), "--request", wanted])
    assert ran.exit_code == 2 and said in ran.output and "\x1b" not in ran.output


def test_states_company_and_parts(tmp_path: Path):
    builder = several(tmp_path / "s")
    builder.row("members", handle=1, instance=INSTANCE, first_step=4, last_step=6)
    story = tell(builder.write(), "slow")
    assert [passage.state for passage in story.passages] == ["tokenize", "dispatch", "queue", "prefill", "decode"]
    assert [passage.begin_ns for passage in story.passages] == [0, 1 * MS, 3 * MS, 28 * MS, 68 * MS]
    queue, prefill, decode = story.passages[2:]
    assert queue.parts == {"queue_next_step": 5 * MS, "queue_batch_full": 20 * MS} and queue.company is None
    assert prefill.company is not None and (prefill.company.steps, prefill.company.others) == (1, 1.0)
    (chunk,) = prefill.chunks
    assert (chunk.tokens, chunk.others, chunk.others_prefill_tokens, chunk.duration_ns) == (10, 1, 30, 40 * MS)
    assert decode.company is not None and decode.company.by_phase == {"decode": 1, "mixed": 1}
    assert (decode.company.others_prefill_tokens, decode.company.longest_ns) == (10, 20 * MS)
    ttft = next(each for each in story.standings if each.latency == "ttft")
    assert (ttft.value_ns, ttft.rank_share) == (69 * MS, 0.75) and sum(ttft.parts.values()) == ttft.value_ns
    assert story.facts["first_token_ns"] == 68 * MS


def test_a_preemption_says_what_made_it_and_a_gap_is_shown(tmp_path: Path):
    builder = told(tmp_path / "s")
    builder.rows["states"][-1]["end_ns"] = 80 * MS
    state(builder, 1, "preempted", 82, 99, a0=2)
    step(builder, 7, 82, 99, "decode", kv_usage=990_000, running=3, waiting=2, preempted=1)
    builder.rows["steps"][-1]["scheduled_ns"] = 83 * MS
    gap, preempted = tell(builder.write(), "slow").passages[-2:]
    assert (gap.state, gap.duration_ns) == ("not recorded", 2 * MS)
    assert preempted.notes == {
        "output_tokens": 2, "kv_usage_ppm": 990_000, "running": 3, "waiting": 2, "preempted_with_it": 1,
        "reason": "no room in the KV cache",
    }  # fmt: skip


def test_shown_and_as_json(tmp_path: Path):
    session = several(tmp_path / "s").write()
    shown = CliRunner().invoke(app, ["report", str(session.path), "--request", "slow"])
    assert shown.exit_code == 0 and "queue_batch_full" in shown.output and "slower than" in shown.output
    read = json.loads(CliRunner().invoke(app, ["report", str(session.path), "--request", "slow", "--json"]).output)
    assert read == json.loads(json.dumps(as_dict(tell(session, "slow")))) and read["request_id"] == "slow"


def test_a_request_without_times_or_steps(tmp_path: Path):
    builder = SessionBuilder(tmp_path / "s")
    builder.request(1, 7, request_id="bare", status="lost", finish="unknown")
    session = builder.write()
    story = tell(session, "bare")
    assert (story.passages, story.standings, story.measured) == ([], [], 0)
    assert CliRunner().invoke(app, ["report", str(session.path), "--request", "bare"]).exit_code == 0
