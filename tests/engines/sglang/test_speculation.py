"""Speculation on a real SGLang: drafts by n-grams; its kernels for the CPU are stand-ins of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines.recording import record
from engines.sglang.generate import generate, generate_together
from quickstart.servers import SGLANG

from stagetrace.instrument.ids import handle
from stagetrace.instrument.stages import BY_NAME

MENDS = Path(__file__).with_name("mends")
VERIFIED = 4  # tokens of a request in a decode step: its last one and three drafts
ARGUMENTS = (
    *("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(VERIFIED)),
    *("--disable-radix-cache", "--skip-server-warmup"),
    *("--dtype", "float32"),  # in bfloat16 a step that verifies drafts may choose another of two close tokens
)
# The second time the n-grams of the first one's answer are known.
ALONE = [(f"alone-{n}", "where does the time go " * 8, 40) for n in range(2)]
TOGETHER = [(f"together-{n}", f"request number {n} " * (5 + 10 * n), 20 + n) for n in range(4)]


@pytest.mark.matrix
def test_drafts_by_step_and_by_request(model: Path, engine_python: Path, tmp_path: Path) -> None:
    assert engine_python
    with record(model, tmp_path, *ARGUMENTS, engine=SGLANG, env={"PYTHONPATH": str(MENDS)}) as recording:
        answers = [generate(recording.server, *request) for request in ALONE]
        answers += generate_together(recording.server, TOGETHER)
    assert answers[0].tokens == answers[1].tokens, "drafts change no output"
    frames, manifest = recording.frames(), recording.manifest
    assert manifest.counts["accounting_conflict"] == 0
    assert not any(process.errors for process in manifest.processes)
    requests = frames["requests"].set_index("handle")
    for answer in answers:
        row, meta = requests.loc[handle(recording.session.identity.key, answer.id)], answer.meta
        assert row["output_tokens"] == meta["completion_tokens"]
        assert row["draft_tokens"] == meta["spec_num_proposed_drafts"] > 0
        assert row["accepted_tokens"] == meta["spec_num_correct_drafts"]
    assert requests["accepted_tokens"].sum() > 0
    steps = frames["steps"].sort_values("step")
    assert set(steps["status"]) == {"complete"}
    decode = steps[steps["decode_requests"] > 0]
    assert (decode["decode_tokens"] == VERIFIED * decode["decode_requests"]).all()
    assert (decode["draft_tokens"] == (VERIFIED - 1) * decode["decode_requests"]).all()
    assert (decode["decode_q_kv"] == VERIFIED * decode["decode_context"]).all()
    assert decode["accepted_tokens"].sum() == requests["accepted_tokens"].sum()
    assert steps["output_tokens"].sum() == requests["output_tokens"].sum()
    # Of the first request, alone: its context is its prompt, what it has so far, and the drafts.
    first = requests.loc[handle(recording.session.identity.key, ALONE[0][0])]
    mine = steps[steps["end_ns"] <= requests.loc[handle(recording.session.identity.key, ALONE[1][0]), "arrival_ns"]]
    before = mine["output_tokens"].cumsum().shift(1)[1:]
    assert (mine["decode_context"][1:] == first["prompt_tokens"] + before + VERIFIED - 1).all()
    segments = frames["segments"]
    for stage in ("verify", "forward"):
        rows = segments[segments["stage"] == BY_NAME[stage].id]
        expected = decode if stage == "verify" else steps
        assert sorted(rows["step"]) == sorted(expected["step"])
        assert set(rows["parent_stage"]) == {BY_NAME["rank_step"].id}
