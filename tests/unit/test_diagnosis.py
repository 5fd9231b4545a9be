"""The diagnosis on simulated sessions: each cause there and not there, bounds that always hold, and what is printed."""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner
from unit.sessions import INSTANCE, PROCESS, SessionBuilder
from unit.simulated import MS, Engine, simulate

from stagetrace.analysis.diagnosis.causes import CAUSES, Phase
from stagetrace.analysis.diagnosis.diagnose import CHECKS, Diagnosis, diagnose, of_facts
from stagetrace.analysis.diagnosis.facts import STAGES, Covered, Facts, columns, line
from stagetrace.analysis.diagnosis.finding import Missing, Seen
from stagetrace.analysis.diagnosis.prefill import _kept, _of_prefill, _prompts_of_half
from stagetrace.analysis.diagnosis.shares import share_of
from stagetrace.analysis.diagnosis.show import next_experiments, parts, to_json
from stagetrace.analysis.diagnosis.thresholds import THRESHOLDS, limit
from stagetrace.analysis.load import load
from stagetrace.analysis.show import Grid
from stagetrace.cli.main import app
from stagetrace.instrument.ids import step_trace_id
from stagetrace.instrument.stages import BY_NAME, Level

if TYPE_CHECKING:
    from collections.abc import Callable


def said(found: Diagnosis) -> list[str]:
    return [finding.cause.id for finding in found.findings]


def of(path: Path, engine: Engine) -> Diagnosis:
    return diagnose(simulate(path, engine))


def facts_of(path: Path, engine: Engine) -> Facts:
    session = simulate(path, engine)
    frames = load(session, None, columns(session.read_manifest()), STAGES)
    return Facts.of(frames.manifest, session.identity.key, frames.tables)


# The table


def test_every_cause_has_a_check_and_advice_for_both_engines() -> None:
    assert {*CHECKS} == {cause.id for cause in CAUSES} and len(CHECKS) == len(CAUSES)
    for cause in CAUSES:
        assert {*cause.next} == {"vllm", "sglang"}, cause.id
        assert all(cause.next.values()) and cause.phases
        assert all(each.flag.startswith("--") or not each.flag for tries in cause.next.values() for each in tries)


def test_thresholds_have_reasons_and_names_of_their_own() -> None:
    assert len({each.name for each in THRESHOLDS}) == len(THRESHOLDS)
    assert all(each.reason and each.unit for each in THRESHOLDS)


# Each cause, there and not there. Of every pair the second differs in what makes the cause alone.


def padded(_number: int, decoding: int) -> dict[str, Any]:
    return {"graph_mode": "full", "padded_tokens": 4 * max(decoding, 1)}


def well_padded(_number: int, decoding: int) -> dict[str, Any]:
    return {"graph_mode": "full", "padded_tokens": decoding + 1 if decoding > 6 else decoding}


def some_without(number: int, _: int) -> dict[str, Any]:
    return {"graph_mode": "none" if number % 2 else "full"}


def drafts(accepted: float) -> Any:
    def columns(_number: int, decoding: int) -> dict[str, Any]:
        return {"draft_tokens": 3 * decoding, "accepted_tokens": round(accepted * 3 * decoding), "output_tokens": None}

    return columns


def rare_drafts(number: int, decoding: int) -> dict[str, Any]:
    """A proposer that mostly finds nothing to propose."""
    return drafts(0.05)(number, decoding) if number % 3 == 0 else {"draft_tokens": 0, "accepted_tokens": 0}


CASES: dict[str, tuple[Engine, Engine]] = {
    "arrival_above_capacity": (
        Engine(requests=200, width=None, rate=20, fixed=2, per_token=1.0, output=40, cap=256),
        Engine(requests=150, width=None, rate=8, fixed=2, per_token=0.1, output=20, cap=256),
    ),
    "batch_cap": (Engine(width=12, cap=3), Engine(width=12, cap=12)),
    "token_budget": (
        Engine(width=6, prompt=400, output=10, budget=32),
        Engine(width=6, prompt=400, output=10, budget=2048),
    ),
    "kv_exhausted": (
        Engine(requests=60, width=12, prompt=60, output=80, kv_tokens=500),
        Engine(requests=60, width=12, prompt=60, output=80),
    ),
    "prefill_delays_decode": (
        Engine(requests=160, width=8, prompt=lambda chance: 1500 if chance.random() < 0.5 else 20, output=25),
        Engine(requests=80, width=8, prompt=30, output=25),
    ),
    "host_schedule": (Engine(stages={"schedule": 3.0}), Engine(stages={"execute": 3.0})),
    "host_prepare": (Engine(stages={"prepare": 6.0}), Engine(fixed=10.0)),
    "host_sampling": (Engine(stages={"sample": 3.0}), Engine(fixed=7.0)),
    "gc_pauses": (
        Engine(extra=lambda step: {"gc_pause": 20.0} if step % 10 == 0 else {}),
        Engine(extra=lambda step: {"gc_pause": 1.0} if step % 100 == 0 else {}),
    ),
    "grammar": (Engine(grammar=200.0), Engine(grammar=0.5)),
    "tokenize": (Engine(tokenize=60.0), Engine(tokenize=1.0)),
    "front_end": (Engine(late=150.0), Engine(late=1.0)),
    "detokenize": (Engine(late=150.0, detokenize=4.5), Engine(late=1.0, detokenize=0.1)),
    "slow_client": (Engine(client=400.0), Engine(client=2.0)),
    "straggler_rank": (
        Engine(ranks=2, late_rank=4.0, level="layer", info={"tensor_parallel": 2}),
        Engine(ranks=2, late_rank=0.1, level="layer", info={"tensor_parallel": 2}),
    ),
    "collective_share": (
        Engine(ranks=2, collective=8.0, level="layer", info={"tensor_parallel": 2}),
        Engine(ranks=2, collective=0.3, level="layer", info={"tensor_parallel": 2}),
    ),
    "expert_imbalance": (
        Engine(level="layer", experts=(5, 5, 1, 1, 1, 1, 1, 1)),
        Engine(level="layer", experts=(1,) * 8),
    ),
    "graph_padding": (
        Engine(step_columns=padded, per_token=1.0, fixed=1.0, rate=6, width=None, requests=80),
        Engine(step_columns=well_padded, per_token=1.0, fixed=1.0, rate=6, width=None, requests=80),
    ),
    "graph_miss": (
        Engine(step_columns=some_without, extra=lambda step: {"prepare": 4.0} if step % 2 else {}),
        Engine(step_columns=some_without),
    ),
    "compile_in_window": (
        Engine(occasions=(("compile", 1_200.0, 1_500.0),)),
        Engine(occasions=(("compile", 100.0, 900.0),)),
    ),
    "speculation_does_not_pay": (
        Engine(step_columns=drafts(0.05), stages={"draft": 4.0}),
        Engine(step_columns=drafts(0.8), stages={"draft": 1.0}),
    ),
}


def test_a_client_behind_a_large_buffer_is_slow(tmp_path: Path) -> None:
    """What the socket still has at the end takes the client as long as its share of the answer says."""
    found = of(tmp_path / "slow", Engine(unsent=0.75))
    assert said(found) == ["slow_client"]
    seen = found.findings[0].seen
    left, takes = (seen.evidence[place].value for place in (3, 4))
    assert left == 150_000
    requests = facts_of(tmp_path / "again", Engine(unsent=0.75)).requests
    during = (requests["last_sent_ns"] - requests["first_sent_ns"]).to_numpy(float)
    assert takes == pytest.approx(float(np.median(3 * during)))
    assert said(of(tmp_path / "little", Engine(unsent=0.3))) == []  # less than what may be under way


def test_tokens_that_are_late_together_are_counted_once(tmp_path: Path) -> None:
    """The engine has the last token before the front end has handed the first one on."""
    found = of(tmp_path / "s", Engine(late=1000.0))
    assert said(found) == ["front_end"]
    seen = found.findings[0].seen
    requests = facts_of(tmp_path / "again", Engine(late=1000.0)).requests
    kept = (requests["last_output_ns"] - requests["first_token_ns"]).sum()
    assert seen.measured_ns == pytest.approx(kept, rel=0.01) and kept < found.request_time_ns


def test_a_detokenizer_of_its_own_is_told_from_the_front_end(tmp_path: Path) -> None:
    """As SGLang's: a process beside the front end, which hands on what that one gave."""
    for late, each, cause in ((40.0, 1.0, "front_end"), (40.0, 30.0, "detokenize"), (150.0, 4.5, "detokenize")):
        facts = facts_of(tmp_path / f"{late}-{each}", Engine(late=late, detokenize=each))
        own = facts.segments["stage"] == BY_NAME["detokenize"].id
        handed_on = facts.segments[own].assign(process=PROCESS + 9, self_ns=0.05 * MS)
        with_front_end = replace(facts, segments=pd.concat([facts.segments, handed_on]))
        assert said(of_facts(with_front_end)) == [cause]


@pytest.mark.parametrize("cause", CASES)
def test_a_cause_that_is_there_comes_first(cause: str, tmp_path: Path) -> None:
    found = of(tmp_path / "s", CASES[cause][0])
    assert said(found)[:1] == [cause]
    seen = found.findings[0].seen
    assert seen.evidence and 0 < seen.share.low <= seen.share.value <= seen.share.high <= 1
    assert found.findings[0].cause.phases.count(seen.phase) == 1
    assert found.answer == ""


@pytest.mark.parametrize("cause", CASES)
def test_a_cause_that_is_not_there_is_not_found(cause: str, tmp_path: Path) -> None:
    found = of(tmp_path / "s", CASES[cause][1])
    assert said(found) == []
    assert found.answer.startswith("nothing stands out")


@pytest.mark.parametrize(("took", "there"), [(4.0, ["speculation_does_not_pay"]), (0.05, [])])
def test_drafting_that_mostly_finds_nothing_has_taken_its_time(took: float, there: list[str], tmp_path: Path) -> None:
    found = of(tmp_path / "s", Engine(step_columns=rare_drafts, stages={"draft": took}))
    assert said(found) == there
    if there:
        seen = found.findings[0].seen
        assert seen.evidence[1].value == pytest.approx(1 / 3, abs=0.05)
        assert seen.measured_ns == pytest.approx(4.0 / 8.5 * found.attributed[Phase.TPOT].total_ns, rel=0.2)


# Those that need more than the simulated engine tells


def two_rates(tmp_path: Path, capacity: int) -> Facts:
    """A few requests at a time and then many, of 1000 tokens and 10 more."""
    arrivals = Engine(requests=60, width=None, rate=lambda number: 2.0 if number < 30 else 15.0, prompt=1000, output=10)
    return facts_of(tmp_path / "s", replace(arrivals, info={"kv_cache_tokens": capacity}))


def test_prefix_cache_thrashed(tmp_path: Path) -> None:
    facts = two_rates(tmp_path, 12_000)
    busy = np.arange(60) >= 30
    lost, kept = (facts.requests.assign(cached_tokens=np.where(busy, there, 750)) for there in (50, 700))
    answers = [CHECKS["prefix_cache_thrashed"](replace(facts, requests=each)) for each in (lost, kept)]
    assert [isinstance(each, Seen) and each.stands_out for each in answers] == [True, False]
    assert isinstance(answers[0], Seen)
    told = [each.value for each in answers[0].evidence]
    assert told[1] > 0.6 and told[3] < 0.15 and told[2] > 3 * told[4], "it kept things for longer at quiet times"


def test_a_cache_that_was_never_full_is_not_thrashed(tmp_path: Path) -> None:
    facts = two_rates(tmp_path, 1_000_000)
    lost = facts.requests.assign(cached_tokens=np.where(np.arange(60) >= 30, 0, 750))
    assert CHECKS["prefix_cache_thrashed"](replace(facts, requests=lost)) is None
    unknown = facts_of(tmp_path / "unknown", Engine())
    assert isinstance(CHECKS["prefix_cache_thrashed"](unknown), Missing)


@pytest.mark.parametrize("capacity", [10_000, 25_000])
def test_what_the_cache_keeps_is_what_fits(capacity: int, tmp_path: Path) -> None:
    facts = two_rates(tmp_path, capacity)
    found, (scheduled,) = _kept(facts, capacity), facts.request("scheduled_ns")
    ends, computed = facts.step("end_ns"), np.cumsum(facts.tokens)
    span = ends[-1] - facts.step("begin_ns")[0]
    for kept, at in zip(found, scheduled, strict=True):
        since = (ends > at - kept) & (ends <= at)
        if kept < span:
            assert computed[since][-1] - computed[since][0] == pytest.approx(capacity, abs=2 * facts.tokens.max())
        else:
            assert computed[ends <= at][-1:].sum() < capacity


def test_prefix_cache_off(tmp_path: Path) -> None:
    engine = Engine(info={"prefix_caching": False}, prompt=400, output=lambda chance: chance.randint(10, 60))
    off = facts_of(tmp_path / "off", engine)
    siblings = off.requests.assign(parent=off.requests["handle"] // 4)
    answer = CHECKS["prefix_cache_off"](replace(off, requests=siblings))
    assert isinstance(answer, Seen) and answer.stands_out
    again, tokens, share, took = (each.value for each in answer.evidence)
    assert tokens == 400 * again and share == pytest.approx(again / len(siblings))
    prefill = _of_prefill(off)
    assert took == pytest.approx(share * float(prefill.sum()), rel=0.1)
    # Whoever waits for such a step waits for it: those in prefill, in the queue and in decode.
    waited = float((prefill * (off.starting + off.decoding)).sum())
    assert answer.measured_ns == pytest.approx(share * waited, rel=0.15)
    # What a prompt costs again is the cache's: the rest is what prefill delays decode by.
    delays = [CHECKS["prefill_delays_decode"](each) for each in (off, replace(off, requests=siblings))]
    assert all(isinstance(each, Seen) for each in delays)
    whole, rest = (each.measured_ns for each in delays if isinstance(each, Seen))
    assert rest == pytest.approx((1 - share) * whole, rel=0.2) and whole > 0
    alone = CHECKS["prefix_cache_off"](off)
    assert isinstance(alone, Seen) and not alone.stands_out
    assert CHECKS["prefix_cache_off"](facts_of(tmp_path / "on", Engine())) is None


def light(facts: Facts, share: float, ns: float = 0.0) -> Facts:
    """The same steps, at so much of the speed of light, which is all for memory."""
    least = facts.own * share + ns
    return replace(facts, least_ns=least, memory_ns=least)


@pytest.mark.parametrize(
    ("cause", "share", "there"),
    [
        ("decode_at_roof", 0.8, True),
        ("decode_at_roof", 0.4, False),
        ("decode_far_below_roof", 0.1, True),
        ("decode_far_below_roof", 0.3, False),
        ("decode_far_below_roof", 0.01, False),  # 0.05 ms at the speed of light: that is launching
        ("prefill_inefficient", 0.05, True),
        ("prefill_inefficient", 0.5, False),
    ],
)
def test_roofs(cause: str, share: float, there: bool, tmp_path: Path) -> None:
    facts = light(facts_of(tmp_path / "s", Engine(fixed=12, prompt=600)), share)
    answer = CHECKS[cause](facts)
    assert isinstance(answer, Seen) and answer.stands_out is there
    if cause == "decode_at_roof":
        assert answer.recoverable_ns == 0


def test_without_ceilings_roofs_are_said_to_be_missing(tmp_path: Path) -> None:
    found = of(tmp_path / "s", Engine())
    assert {"prefill_inefficient", "decode_at_roof", "decode_far_below_roof"} <= {*found.missing}


def test_a_text_that_goes_to_one_expert_is_no_uneven_router(tmp_path: Path) -> None:
    """The same sum over all steps, spread over them or of a few in a row: there the next session may be even."""
    facts = facts_of(tmp_path / "s", Engine(requests=60, level="layer", experts=(1,) * 8))

    def uneven(of_step: Callable[[int], float]) -> Diagnosis:
        """With a part of each step's tokens sent to expert 3, and the rest evenly."""
        rows = [
            [tokens * (1 - of_step(step)) / 8 + (tokens * of_step(step) if expert == 3 else 0) for expert in range(8)]
            for step, tokens in zip(facts.place(facts.experts), 8000 * facts.experts["tokens"], strict=True)
        ]
        counts = [[round(each) for each in row] for row in rows]
        return of_facts(replace(facts, experts=facts.experts.assign(counts=counts)))

    number = len(facts.steps)
    always = uneven(lambda _: 0.18)
    assert said(always) == ["expert_imbalance"]
    text = uneven(lambda step: 1.0 if 0.4 < step / number < 0.58 else 0.0)
    assert said(text) == []
    value, low = (each.value for each in text.quiet["expert_imbalance"].evidence[:2])
    assert low < limit("imbalance") < value


def test_dispatch_and_combine(tmp_path: Path) -> None:
    info = {"expert_parallel": True}
    facts = facts_of(tmp_path / "s", Engine(level="layer", info=info, stages={"expert_dispatch": 3.0}))
    answer = CHECKS["dispatch_combine_share"](facts)
    assert isinstance(answer, Seen) and answer.stands_out
    little = facts_of(tmp_path / "t", Engine(level="layer", info=info, stages={"expert_dispatch": 0.2}))
    answer = CHECKS["dispatch_combine_share"](little)
    assert isinstance(answer, Seen) and not answer.stands_out


def test_what_the_level_lacks_is_said_with_the_level_to_record_at(tmp_path: Path) -> None:
    facts = facts_of(tmp_path / "s", Engine(ranks=2, late_rank=4.0, info={"tensor_parallel": 2}))
    is_collective = facts.segments["stage"] == BY_NAME["collective"].id
    found = of_facts(replace(facts, segments=facts.segments[~is_collective]))
    for cause in ("straggler_rank", "collective_share"):
        assert found.missing[cause].level is Level.LAYER
    (row,) = [part for part in parts(found) if isinstance(part, Grid) and part.title.startswith("Could not")]
    assert any("--level layer" in cells[1] for cells in row.rows)


def test_engine_that_says_why_requests_wait_is_believed(tmp_path: Path) -> None:
    facts = facts_of(tmp_path / "s", Engine(width=12, cap=3))
    queue = facts.requests["queue_ns"]
    told = facts.requests.assign(kv_space_ns=queue, batch_full_ns=None, token_budget_ns=None)
    found = of_facts(replace(facts, requests=told))
    assert said(found)[:1] == ["kv_exhausted"] and "batch_cap" not in said(found)


def test_sglang_is_told_by_its_own_settings(tmp_path: Path) -> None:
    info = {"engine": "sglang", "max_num_batched_tokens": None, "chunked_prefill_size": 32, "block_size": 1}
    found = of(tmp_path / "s", Engine(width=6, prompt=400, output=10, budget=32, info=info))
    assert said(found)[:1] == ["token_budget"]
    flags = [flag for flag, _ in next_experiments(found.findings[0].cause, found.engine)]
    assert "--chunked-prefill-size N" in flags and "--max-num-batched-tokens N" not in flags


def test_decode_that_waits_for_many_chunks_waits_for_a_larger_budget(tmp_path: Path) -> None:
    """Where prefill goes first, decode waits for every chunk of others: what a larger budget saves is no prefill's."""
    sglang = {"engine": "sglang", "max_num_batched_tokens": None, "block_size": 1}

    def serving(chunk: int, prefill_first: bool = True) -> Diagnosis:
        info = {**sglang, "chunked_prefill_size": chunk}
        engine = Engine(width=8, prompt=400, per_token=0.2, budget=chunk, prefill_first=prefill_first, info=info)
        return of(tmp_path / f"{chunk}-{prefill_first}", engine)

    small, large = serving(32), serving(512)
    assert said(small) == ["token_budget", "prefill_delays_decode"]
    assert said(large) == ["prefill_delays_decode"]
    budget, prefill = (each.seen for each in small.findings)
    # With one chunk for each prompt what is left is its tokens' own time and one step's fixed cost.
    assert small.request_time_ns - large.request_time_ns == pytest.approx(budget.recoverable_ns, rel=0.1)
    assert large.findings[0].seen.measured_ns == pytest.approx(prefill.measured_ns, rel=0.1)
    # Where steps have both, decode takes its token from every chunk, and waits for no step more.
    mixed = serving(32, prefill_first=False)
    assert said(mixed) == ["token_budget"]
    assert [each.value for each in mixed.findings[0].seen.evidence if "in decode" in each.what] == [0.0]


def computed_ahead(facts: Facts) -> Facts:
    """The same as in SGLang on a processor: the next step is computed before a step's tokens are given."""
    steps, rows = facts.steps, facts.intervals
    ends = steps["end_ns"].to_numpy()
    later = np.append(ends[1:], ends[-1])
    place = facts.place(rows)
    before = np.searchsorted(ends, ends[place] - rows["interval_ns"].to_numpy())
    times = np.where(before < place, later[place] - later[before], 0)
    return replace(facts, steps=steps.assign(end_ns=later), intervals=rows.assign(interval_ns=times))


def test_results_that_wait_for_the_next_forward_pass(tmp_path: Path) -> None:
    prompts = itertools.cycle([20] * 3 + [1900])
    info = {"engine": "sglang", "device": "cpu"}
    for cause, engine in (
        (
            "prefill_delays_decode",
            Engine(
                requests=80,
                width=5,
                output=lambda chance: chance.randint(20, 60),
                prompt=lambda _: next(prompts),
                prefill_first=True,
                info=info,
            ),
        ),
        ("gc_pauses", Engine(extra=lambda step: {"gc_pause": 20.0} if step % 10 == 0 else {}, info=info)),
    ):
        facts = facts_of(tmp_path / cause, engine)
        plain, ahead = of_facts(facts), of_facts(computed_ahead(facts))
        for found in (plain, ahead):
            assert said(found) == [cause]
            assert found.attributed[Phase.TPOT].share == pytest.approx(1.0, abs=0.03)
        one, other = (found.findings[0].seen for found in (plain, ahead))
        assert other.share.value == pytest.approx(one.share.value, rel=0.07)
    # On a device the results of a step wait for nothing but its own forward pass.
    there = facts_of(tmp_path / "device", replace(engine, info=info | {"device": "cuda"}))
    assert (computed_ahead(there).done == computed_ahead(there).step("end_ns")).all()
    assert (computed_ahead(facts).done < computed_ahead(facts).step("end_ns")).sum() > 100


def test_work_that_the_step_before_hides_holds_up_nobody(tmp_path: Path) -> None:
    """As with async scheduling: the scheduler works while the step before runs, and still waits for it afterwards."""
    facts = facts_of(tmp_path / "s", Engine(stages={"schedule": 3.0}))
    assert said(of_facts(facts)) == ["host_schedule"]
    overlapping = facts.steps.assign(begin_ns=facts.steps["begin_ns"] - 4 * MS)
    assert said(of_facts(replace(facts, steps=overlapping))) == []


def long_prompts(every: int, tokens: int) -> Engine:
    """Requests that come by themselves; of so many one is long, and holds the one or two others up for long."""
    prompts = itertools.cycle([20] * (every - 1) + [tokens])
    return Engine(
        requests=100, width=None, rate=6, output=60, budget=200_000, prompt=lambda _: next(prompts), per_token=0.05
    )


def test_few_long_stalls_are_counted_and_not_estimated(tmp_path: Path) -> None:
    found = of(tmp_path / "s", long_prompts(11, 16_000))
    assert said(found) == ["prefill_delays_decode"]
    seen = found.findings[0].seen
    assert seen.share.low < limit("stall_share") < seen.share.value
    half, tokens = (each.value for each in seen.evidence[:2])
    assert 3 <= half < 9  # of nine long prompts
    assert tokens < 30


def test_one_unlucky_prompt_is_no_finding(tmp_path: Path) -> None:
    found = of(tmp_path / "s", long_prompts(50, 100_000))
    assert said(found) == []
    seen = found.quiet["prefill_delays_decode"]
    assert seen.share.value > limit("stall_share") and seen.evidence[0].value == 1


def test_prompts_of_half_are_divided_by_length_and_by_engine(tmp_path: Path) -> None:
    facts = facts_of(tmp_path / "s", Engine(requests=12, width=3))
    none = np.zeros(0)
    assert _prompts_of_half(facts, facts.own, none.astype(np.int32), none, none) == 0
    ends = facts.step("end_ns")
    all_of_it = np.array([len(ends) - 1], dtype=np.int32), ends[-1:] - ends[:1] + facts.own[:1], np.ones(1)
    many = _prompts_of_half(facts, facts.own, *all_of_it)
    assert 4 <= many <= 6  # all of them are alike
    one = facts.requests.assign(prompt_tokens=np.where(np.arange(12) == 5, 10**9, 1))
    first = replace(facts, requests=one)
    only = np.where((ends > one["scheduled_ns"].iloc[5]) & (ends <= one["first_token_ns"].iloc[5]), facts.own, 0.0)
    assert _prompts_of_half(first, only, *all_of_it) == 1
    elsewhere = replace(facts, requests=facts.requests.assign(instance=INSTANCE + 1))
    assert _prompts_of_half(elsewhere, facts.own, *all_of_it) == 0


def test_a_burst_that_is_over_is_not_more_than_the_engine_can_serve(tmp_path: Path) -> None:
    prompts = iter([20] * 100 + [1300] * 25 + [20] * 35)
    burst = Engine(
        requests=160, width=None, rate=20, output=20, fixed=2, budget=8192, cap=256, prompt=lambda _: next(prompts)
    )
    found = of(tmp_path / "s", burst)
    assert "arrival_above_capacity" not in said(found)
    later, late, at_the_end = (each.value for each in found.quiet["arrival_above_capacity"].evidence[1:4])
    assert late > 2 * later and at_the_end < 0.5 * late


def test_waiting_for_a_batch_that_is_large_enough_is_more_than_the_engine_can_serve(tmp_path: Path) -> None:
    """A level load: requests wait for a place, and twice the places would give hardly more tokens."""
    dear = Engine(requests=60, width=24, cap=8, prompt=5, output=lambda chance: chance.randint(5, 90), per_token=2.0)
    found = of(tmp_path / "s", replace(dear, fixed=0.5))
    assert said(found) == ["arrival_above_capacity"]
    evidence = found.findings[0].seen.evidence
    assert evidence[2].value < 1.2 * evidence[1].value, "it does not grow"
    assert said(of(tmp_path / "t", replace(dear, fixed=20.0, per_token=0.05))) == ["batch_cap"]


def test_waiting_that_others_cause_as_well_is_chance(tmp_path: Path) -> None:
    facts = facts_of(tmp_path / "s", Engine(ranks=2, late_rank=4.0, level="layer", info={"tensor_parallel": 2}))
    rows = facts.segments
    collective = rows["stage"] == BY_NAME["collective"].id
    one, other = rows["process"][collective].unique()
    swapped = np.where(rows["process"] == one, other, one)
    process = np.where(collective & (rows["step"] % 4 == 0), swapped, rows["process"])
    mixed = replace(facts, segments=rows.assign(process=process))
    alone, both = (CHECKS["straggler_rank"](each) for each in (facts, mixed))
    assert isinstance(alone, Seen) and isinstance(both, Seen)
    blame = both.evidence[1].value
    assert blame == pytest.approx(0.75, abs=0.02)
    assert both.measured_ns == pytest.approx((2 * blame - 1) * alone.measured_ns, rel=0.05)


# Little, nothing, several


@pytest.mark.parametrize("requests", [1, 7])
def test_too_few_requests_are_not_enough_data(requests: int, tmp_path: Path) -> None:
    found = of(tmp_path / "s", Engine(requests=requests, tokenize=500.0))
    assert not found.findings and found.answer.startswith("not enough data")


def test_empty_session(tmp_path: Path) -> None:
    found = diagnose(SessionBuilder(tmp_path / "s").write())
    assert (found.requests, found.steps, found.findings) == (0, 0, ())
    assert found.answer.startswith("not enough data")
    json.loads(to_json(found))


def test_level_request_has_no_steps(tmp_path: Path) -> None:
    facts = facts_of(tmp_path / "s", Engine(tokenize=80.0))
    nothing = {name: getattr(facts, name).iloc[:0] for name in ("steps", "segments", "intervals", "experts")}
    found = of_facts(replace(facts, **nothing))
    assert said(found) == ["tokenize"]
    assert {"host_schedule", "batch_cap", "prefill_delays_decode"} <= {*found.missing}


def test_two_causes_are_ranked_by_what_could_be_recovered(tmp_path: Path) -> None:
    found = of(tmp_path / "s", Engine(width=12, cap=3, stages={"schedule": 2.0}))
    assert {*said(found)} == {"batch_cap", "host_schedule"}
    times = [finding.seen.recoverable_ns for finding in found.findings]
    assert times == sorted(times, reverse=True)


# What always holds

SIZES = st.fixed_dictionaries(
    {
        "requests": st.integers(8, 30),
        "width": st.none() | st.integers(1, 12),
        "rate": st.floats(1, 50),
        "prompt": st.integers(1, 500),
        "output": st.integers(1, 40),
        "cap": st.integers(1, 16),
        "budget": st.integers(16, 600),
        "kv_tokens": st.integers(600, 3000),
        "tokenize": st.floats(0.01, 100),
        "late": st.floats(0.01, 100),
        "detokenize": st.floats(0, 5),
        "client": st.floats(0.01, 300),
        "unsent": st.floats(0, 1),
        "grammar": st.floats(0, 50),
        "fixed": st.floats(0.1, 20),
        "per_token": st.floats(0, 0.5),
        "stages": st.fixed_dictionaries({name: st.floats(0, 10) for name in ("schedule", "prepare", "sample")}),
        "seed": st.integers(0, 9),
    }
)


@settings(max_examples=12, deadline=None)
@given(SIZES)
def test_bounds(sizes: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        facts = facts_of(Path(directory) / "s", Engine(**sizes))
    found = of_facts(facts)
    seen = {**found.quiet, **{finding.cause.id: finding.seen for finding in found.findings}}
    for name, each in seen.items():
        assert 0 <= each.share.low <= each.share.value <= each.share.high <= 1, name
        assert 0 <= each.recoverable_ns <= each.measured_ns * (1 + 1e-9), name
        assert all(np.isfinite(one.value) for one in each.evidence), name
        assert all(0 <= one.value <= 1 for one in each.evidence if one.unit == "share"), name
        assert all(one.ns > 0 and len(one.trace_id) == 32 for one in each.examples), name
    assert all(0 <= finding.recoverable_share <= 1 for finding in found.findings)
    assert all(each.share is None or 0 <= each.share <= 1 for each in found.attributed.values())
    assert len(found.quiet) + len(found.findings) + len(found.absent) + len(found.missing) == len(CAUSES)


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1)), max_size=300))
def test_share_lies_in_its_interval(rows: list[tuple[float, float]]) -> None:
    whole = np.array([row[0] for row in rows])
    found = share_of(whole * np.array([row[1] for row in rows]), whole)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found == share_of(whole * np.array([row[1] for row in rows]), whole), "the same data gives the same interval"


def test_interval_of_what_varies_is_wider() -> None:
    whole = np.ones(200)
    even, uneven = share_of(np.full(200, 0.3), whole), share_of(np.arange(200) % 10 < 3, whole)
    assert even.high - even.low < 1e-9 < uneven.high - uneven.low
    assert uneven.low < 0.3 < uneven.high


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=40), st.integers(0, 900), st.integers(0, 900)
)
def test_covered_is_the_overlap(spans: list[tuple[int, int]], one: int, other: int) -> None:
    begins, lengths, at = [], [], 0
    for gap, length in spans:
        begins.append(at + gap)
        lengths.append(length)
        at += gap + length
    begin, end = min(one, other), max(one, other)
    expected = sum(max(min(b + n, end) - max(b, begin), 0) for b, n in zip(begins, lengths, strict=True))
    nobody = np.zeros(len(begins), dtype=np.int64)
    values = np.array(lengths, dtype=np.float64)
    covered = Covered(nobody, np.array(begins, dtype=np.float64), values, values)
    one_span = (np.zeros(1, dtype=np.int64), np.array([float(begin)]), np.array([float(end)]))
    assert covered.within(*one_span)[0] == pytest.approx(expected, abs=1e-6)


def test_line() -> None:
    x = np.arange(1.0, 101.0)
    assert line(x, 5 + 2 * x) == pytest.approx((5, 2))
    assert line(x, 100 - x)[1] == 0, "no slope below 0"
    assert line(x, 3 * x - 50)[0] == 0, "no intercept below 0"
    assert line(np.ones(5), np.full(5, 7.0)) == pytest.approx((7, 0))
    assert line(np.array([]), np.array([])) == (0, 0)


# The command


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["diagnose", *arguments])


def test_text(tmp_path: Path) -> None:
    session = simulate(tmp_path / "s", Engine(width=12, cap=3))
    done = command(str(session.path))
    assert done.exit_code == 0, done.output
    for words in (
        "batch_cap",
        "--max-num-seqs N",
        "recoverable at most",
        "95 % interval",
        "request-",
        "It does not mean",
    ):
        assert words in done.output, words
    assert "\x1b" not in done.output
    assert "Looked at; does not stand out" not in done.output
    assert "Looked at; does not stand out" in command(str(session.path), "--all").output


def test_json(tmp_path: Path) -> None:
    session = simulate(tmp_path / "s", Engine(width=12, cap=3))
    found = json.loads(command(str(session.path), "--json").output)
    first = found["findings"][0]
    assert first["cause"] == "batch_cap" and first["phase"] == "TTFT"
    assert 0 <= first["recoverable_ns"] <= first["measured_ns"] <= found["request_time_ns"]
    assert {each["kind"] for each in first["examples"]} == {"request"}
    known = {row["trace_id"] for row in load(session)["requests"][["trace_id"]].to_dict("records")}
    assert {each["trace_id"] for each in first["examples"]} <= known
    documented = (Path(__file__).parents[2] / "docs" / "diagnosis.md").read_text()
    for key in (*found, *first, *found["session"]):
        assert f"`{key}`" in documented, key


def test_examples_of_steps_have_the_ids_of_their_spans(tmp_path: Path) -> None:
    session = simulate(tmp_path / "s", Engine(stages={"schedule": 3.0}))
    example = diagnose(session).findings[0].seen.examples[0]
    assert example.kind == "step"
    assert example.trace_id == step_trace_id(session.identity.key, INSTANCE, int(example.name)).hex()


def test_window(tmp_path: Path) -> None:
    session = simulate(tmp_path / "s", Engine(requests=100))
    assert 0 < diagnose(session, 2.0).requests < diagnose(session).requests == 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere"], "is not a stagetrace session"),
        (["{session}", "--last", "soon"], "is not a length of time"),
        (["{session}", "--model-config", "/nowhere"], "/nowhere"),
        (["{session}", "--calibration", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input(arguments: list[str], words: str, tmp_path: Path) -> None:
    session = simulate(tmp_path / "s", Engine(requests=8))
    done = command(*(each.format(session=session.path) for each in arguments))
    assert done.exit_code == 2
    assert words in done.output and "Traceback" not in done.output


def test_names_from_outside_are_shown_plainly(tmp_path: Path) -> None:
    facts = facts_of(tmp_path / "s", Engine(width=12, cap=3))
    evil = facts.requests.assign(external_id="\x1b[2J")
    shown = str(parts(of_facts(replace(facts, requests=evil))))
    assert "\\x1b" in shown and "\x1b" not in shown


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("batch_cap", "--max-num-seqs"),
        ("queue_share", "reason:"),
        ("recoverable_ns", "at most"),
        ("ttft", "first token"),
        ("list", "kv_exhausted"),
    ],
)
def test_explain(name: str, words: str) -> None:
    done = command("--explain", name)
    assert done.exit_code == 0 and words in done.output


def test_explain_of_nothing_known() -> None:
    done = command("--explain", "batch_cup")
    assert done.exit_code == 2 and "did you mean batch_cap" in done.output
