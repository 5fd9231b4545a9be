"""Tests of `stagetrace compare`: what is found between sessions, what their loads were, conditions, exit statuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from unit.sessions import INSTANCE, SessionBuilder
from unit.test_definitions import number_keys

from stagetrace.analysis.comparison.compare import ComparisonError, Found, Result, compare
from stagetrace.analysis.comparison.metrics import METRICS
from stagetrace.analysis.comparison.sample import Side, sample
from stagetrace.analysis.comparison.show import as_dict, parts
from stagetrace.analysis.definitions import explain
from stagetrace.cli.main import app
from stagetrace.exporters.session import Session
from stagetrace.instrument.stages import BY_NAME

MS = 1_000_000
PAGE = Path(__file__).parents[2] / "docs" / "comparison.md"


def recorded(path: Path, seed: int, slower: float = 1.0, count: int = 60, **load: Any) -> Session:
    """A session of an engine on paper: one request a 100 ms, a step with its prefill, ten with its decode."""
    chance = random.Random(seed)
    builder = SessionBuilder(path)
    builder.process(info={"engine": load.pop("engine", "vllm"), "model": "tiny", "max_num_seqs": 8})
    prompt = load.pop("prompt", 100)
    every = round(load.pop("every_ms", 100) * MS)
    assert not load
    for number in range(count):
        at = arrival = number * every
        ready = at + round(chance.uniform(4, 6) * MS * slower)
        builder.step(11 * number, at, ready, "prefill", prefill_requests=1, prefill_tokens=int(prompt), running=1)
        builder.segment("execute", at, ready, 11 * number)
        at = first = ready
        for token in range(10):
            end = at + round(chance.uniform(0.9, 1.1) * MS * slower)
            step = 11 * number + token + 1
            builder.step(step, at, end, "decode", decode_requests=1, decode_tokens=1, running=1, kv_usage=10_000)
            builder.segment("execute", at, end, step)
            builder.interval(step, end - at, 1)
            at = end
        for name, begin, end in (("prefill", arrival, first), ("decode", first, at)):
            builder.row(
                "states", handle=number + 1, stage=BY_NAME[name].id, begin_ns=begin, end_ns=end, instance=INSTANCE
            )
        builder.request(
            number + 1, at, request_id=f"r{number}", instance=INSTANCE, arrival_ns=arrival, first_token_ns=first,
            first_output_ns=first, last_token_ns=at, last_output_ns=at, output_tokens=11, cached_tokens=0,
            prompt_tokens=round(prompt * chance.uniform(0.9, 1.1)), prefill_ns=first - arrival, decode_ns=at - first,
        )  # fmt: skip
    return builder.write()


def sides(*sessions: Session) -> list[Side]:
    return [Side([sample(session)]) for session in sessions]


def found(result: Result) -> dict[str, Found]:
    return {each.metric.name: each.found for each in result.metrics}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, Session, Session]:
    """Twice the same load, and once an engine that is a tenth slower."""
    path = tmp_path_factory.mktemp("sessions")
    return recorded(path / "a", 1), recorded(path / "again", 2), recorded(path / "slower", 3, 1.1)


def invoke(*words: object) -> tuple[int, str]:
    ran = CliRunner().invoke(app, ["compare", *map(str, words)])
    return ran.exit_code, ran.output


def test_what_is_slower_is_found_and_the_rest_is_not(three: tuple[Session, Session, Session]):
    result = compare(*sides(three[0], three[2]))
    higher = {name for name, each in found(result).items() if each is Found.HIGHER}
    assert {"ttft_mean", "e2e_p50", "tpot_mean", "tpot_p95", "itl_mean", "step_decode_mean", "stage_execute"} <= higher
    assert {"part_decode_own", "part_prefill_others"} <= higher and not {"requests_per_s", "cached_share"} & higher
    tpot = next(each for each in result.metrics if each.metric.name == "tpot_mean")
    assert tpot.change_low is not None and tpot.change_high is not None and tpot.change_low < 0.1 < tpot.change_high
    assert tpot.better is False and tpot.effect is not None and tpot.effect > 0.8
    assert result.loads == []


def test_the_same_load_twice_shows_nothing(three: tuple[Session, Session, Session]):
    result = compare(*sides(*three[:2]))
    assert result.findings == [] and result.loads == [] and result.tested > 20
    assert all(each.smallest is not None for each in result.metrics if each.found is Found.NONE)


def test_sessions_of_the_same_load_seldom_show_anything(tmp_path: Path):
    many = [Side([sample(recorded(tmp_path / str(seed), seed, count=30))]) for seed in range(12)]
    pairs = [(a, b) for a in range(12) for b in range(a)]
    shown = [compare(many[a], many[b]).findings for a, b in random.Random(0).sample(pairs, 20)]
    assert sum(map(bool, shown)) <= 2, [[each.metric.name for each in findings] for findings in shown]


def test_a_session_beside_itself_shows_nothing_at_all(three: tuple[Session, Session, Session]):
    result = compare(*sides(three[0], three[0]))
    assert result.same and result.findings == [] and result.loads == []
    for each in result.metrics:
        assert each.difference == 0 and (each.low, each.high, each.p) == (0, 0, 1), each.metric.name
        assert not each.change and each.found is Found.NONE
    path = three[0].path
    status, said = invoke(
        path, path, "--fail-on", "tpot_p95 > +0%", "--fail-on", "tpot_p95 < +0%", "--undecided", "fail"
    )
    assert status == 0 and "No differences." in said


def test_another_engine_divides_a_step_in_its_own_way(three: tuple[Session, Session, Session], tmp_path: Path):
    result = compare(*sides(three[0], recorded(tmp_path / "s", 4, 1.1, engine="sglang")))
    assert [each.what for each in result.loads] == ["engine"] and result.engines_differ
    lengths = ["prompt tokens of a request", "output tokens of a request"]
    assert result.alike == ["model", "level", "host", *lengths, "arrivals per s", "concurrency"]
    by_name = {each.metric.name: each for each in result.metrics}
    assert (by_name["stage_execute"].found, by_name["stage_execute"].better) == (Found.HIGHER, None)
    assert by_name["tpot_mean"].better is False
    said = "".join(map(str, parts(result, False)))
    assert "The same about them: model, level, host" in said and "no stage is called better or worse" in said
    assert "no stage is called" not in "".join(map(str, parts(compare(*sides(three[0], three[2])), False)))
    assert as_dict(result, 0)["load_same"] == result.alike


@pytest.mark.parametrize(
    ("words", "status", "verdict"),
    [
        (["tpot_mean > +5%"], 1, "holds"),
        (["tpot_mean > +50%"], 0, "does not hold"),
        (["tpot_mean > +10%"], 0, "undecided"),
        (["tpot_mean > +10%", "--undecided", "fail"], 1, "undecided"),
        (["tpot_mean > 1ms"], 1, "holds"),
        (["tpot_mean < 1ms"], 0, "does not hold"),
        (["tpot_mean > +50us"], 1, "holds"),
        (["requests_per_s < -3%"], 0, "does not hold"),
        (["cached_share < -2%"], 0, "does not hold"),
        (["tpot_mean > +50%", "--fail-on", "ttft_p95 > 1s", "--fail-on", "tpot_p50 > +1%"], 1, "holds"),
    ],
)
def test_conditions_decide_the_exit_status(
    three: tuple[Session, Session, Session], words: list[str], status: int, verdict: str
):
    ended, said = invoke(three[0].path, three[2].path, "--fail-on", *words)
    assert (ended, verdict in said) == (status, True), said
    ended, said = invoke(three[0].path, three[2].path, "--fail-on", *words, "--json")
    assert json.loads(said)["exit_status"] == ended == status
    assert verdict in {each["verdict"] for each in json.loads(said)["conditions"]}


def test_what_cannot_be_read_or_understood_is_status_2(three: tuple[Session, Session, Session], tmp_path: Path):
    a, b = three[0].path, three[2].path
    empty = SessionBuilder(tmp_path / "empty").write().path
    for words, said in (
        ((a,), "name two sessions"),
        ((), "name two sessions"),
        ((a, tmp_path / "none"), "none"),
        ((a, empty), "has no request that ended"),
        ((a, b, "--fail-on", "tpot > 5"), "is not a metric; there are tpot_mean"),
        ((a, b, "--fail-on", ""), "is not a condition"),
        ((a, b, "--fail-on", "ttft_client_p95 > +5%"), "ttft_client_p95 has no value in A and in B"),
        ((a, b, "--also-a", a), "named twice on one side"),
        ((a, b, "--also-a", b), "is on both sides"),
        ((a, b, "--last", "soon"), "is not a length of time"),
        ((a, b, "--undecided", "maybe"), "maybe"),
    ):
        status, output = invoke(*words)
        assert status == 2 and said in output and "Traceback" not in output, (words, output)


def test_other_loads_are_recognised(three: tuple[Session, Session, Session], tmp_path: Path):
    for name, change, what in (
        ("longer", {"prompt": 200}, {"prompt tokens of a request"}),
        ("often", {"every_ms": 50}, {"arrivals per s", "concurrency"}),
        ("engine", {"engine": "sglang"}, {"engine"}),
    ):
        other = recorded(tmp_path / name, 4, **change)
        assert {each.what for each in compare(*sides(three[0], other)).loads} == what, name
    assert "each engine divides its work differently" in invoke(three[0].path, tmp_path / "engine")[1]


def test_several_sessions_of_a_side_are_taken_together(three: tuple[Session, Session, Session], tmp_path: Path):
    more = recorded(tmp_path / "more", 5, 1.1).path
    status, said = invoke(three[0].path, three[2].path, "--also-a", three[1].path, "--also-b", more, "--json")
    read = json.loads(said)
    assert status == 0 and [len(read[side]) for side in "ab"] == [2, 2]
    tpot = next(each for each in read["metrics"] if each["metric"] == "tpot_mean")
    assert tpot["found"] == "higher" and tpot["change"] == pytest.approx(0.1, abs=0.02)


def test_what_one_side_alone_has_is_said_and_few_values_say_nothing(
    three: tuple[Session, Session, Session], tmp_path: Path
):
    few = recorded(tmp_path / "few", 1, count=3)
    assert set(found(compare(*sides(three[0], few))).values()) == {Found.FEW}
    builder = SessionBuilder(tmp_path / "steps")
    for number in range(30):
        builder.step(number, number * MS, (number + 1) * MS)
    result = compare(*sides(builder.write(), three[0]))
    assert found(result)["ttft_mean"] is Found.ONLY_B and found(result)["step_decode_mean"] is not Found.ONLY_B
    with pytest.raises(ComparisonError):
        compare(*sides(SessionBuilder(tmp_path / "empty").write(), three[0]))


def test_a_window_is_compared(three: tuple[Session, Session, Session]):
    status, said = invoke(three[0].path, three[1].path, "--last", "3s", "--json")
    read = json.loads(said)
    assert status == 0 and 25 <= read["a"][0]["measured"] <= 32 and read["a"][0]["last_s"] == 3


def test_every_number_is_defined_and_every_key_is_documented(three: tuple[Session, Session, Session]):
    read = as_dict(compare(*sides(three[0], three[2])), 0)
    page = PAGE.read_text("utf-8")
    for key in number_keys(read):
        assert explain(key), key
    for key in {*read, *read["metrics"][0], *read["a"][0]} - {"a", "b"}:
        assert f"`{key}`" in page, key
    for metric in METRICS:
        assert explain(metric.name) and f"`{metric.name}`" in page, metric.name


def test_explain_is_one_flag_away():
    status, said = invoke("--explain", "part_interference")
    assert status == 0 and "other requests' prefill" in said
    assert invoke("--explain", "p_adjusted")[0] == 0 and invoke("--explain", "nonsense")[0] == 2
