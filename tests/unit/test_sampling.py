"""Sampling: the rules, what a caller chose, the weights that restore counts; pure. Live and later: tests/backends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from backends.tables import KEY, MS, Builder
from hypothesis import given, settings
from hypothesis import strategies as st

from stagetrace.exporters.sampling import Picked, Rules, Sampler, Slow, rules_of
from stagetrace.exporters.spans import Clock, Source, rows_of, spans_of_rows

INSTANCE = 7


def commit(requests: int, *, at: int = 0, latency_ms: float = 10, **columns: Any) -> Builder:
    """So many requests one after the other, each in a step of its own, of 10 ms."""
    build = Builder()
    for number in range(at, at + requests):
        begin = number * 20 * MS
        end = begin + round(latency_ms * MS)
        handle = build.request(
            f"r{number}", instance=INSTANCE, arrival_ns=begin, last_output_ns=end, end_ns=end, **columns
        )
        build.state("decode", handle, begin, end, step=number, instance=INSTANCE)
        build.add("members", handle=handle, instance=INSTANCE, first_step=number, last_step=number)
        build.step(INSTANCE, number, begin, end, decode_tokens=1)
        build.segment("forward", 12, begin, end, of=(INSTANCE, number, "decode"))
    return build


def picked(sampler: Sampler, build: Builder) -> Picked:
    rows = rows_of(build.tables())
    found = sampler.pick(rows)
    for name in found.rows:
        assert len(found.rows[name]) + found.left_out[f"{name}_sampled_out"] == len(rows[name])
    return found


def names(found: Picked) -> list[str]:
    return [row["request_id"] for row in found.rows["requests"]]


@pytest.mark.parametrize(
    ("environ", "rules"),
    [
        ({}, Rules()),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, Rules(by_caller=False)),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, Rules(0.0, by_caller=False)),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}, Rules(0.25, by_caller=False)),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"}, Rules(0.5)),
        ({"STAGETRACE_SAMPLE": "rate=0.1,error"}, Rules(0.1, error=True)),
        ({"STAGETRACE_SAMPLE": "rate=0, e2e>2s ,ttft>p99.5,tpot>50ms"},
         Rules(0, (Slow("e2e", None, 2e9), Slow("ttft", 99.5), Slow("tpot", None, 5e7)))),
        ({"STAGETRACE_SAMPLE": "0.05"},
         Rules(0.05, (Slow("e2e", 99), Slow("ttft", 99)), error=True, preempted=True, first=10)),
        ({"STAGETRACE_SAMPLE": "preempted,first=3", "OTEL_TRACES_SAMPLER": "parentbased_always_off"},
         Rules(0, preempted=True, first=3)),
    ],
)  # fmt: skip
def test_rules_of_variables(environ: dict[str, str], rules: Rules) -> None:
    assert rules_of(environ) == rules


@pytest.mark.parametrize("text", ["1.5", "-1", "rate=", "rate=x", "slow", "e2e>", "e2e>p100", "foo>1s", "first=x", ","])
def test_a_mistake_is_told_with_what_is_possible(text: str) -> None:
    with pytest.raises(ValueError, match="STAGETRACE_SAMPLE"):
        rules_of({"STAGETRACE_SAMPLE": text})
    with pytest.raises(ValueError, match="jaeger"):
        rules_of({"OTEL_TRACES_SAMPLER": "jaeger_remote"})
    with pytest.raises(ValueError, match="ARG"):
        rules_of({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"})


@pytest.mark.parametrize(
    ("rules", "columns", "reason"),
    [
        (Rules(0, error=True), {"status": "error"}, "error"),
        (Rules(0, error=True), {"status": "lost"}, "error"),
        (Rules(0, error=True), {"status": "aborted"}, None),
        (Rules(0, preempted=True), {"preemptions": 1}, "preempted"),
        (Rules(0, first=1), {}, "first"),
        (Rules(0, (Slow("e2e", None, 5 * MS),)), {}, "slow e2e"),
        (Rules(0, (Slow("e2e", None, 10 * MS),)), {}, None),
        (Rules(0, (Slow("ttft", None, 1 * MS),)), {"first_output_ns": 2 * MS}, "slow ttft"),
        (Rules(0, (Slow("ttft", None, 1 * MS),)), {}, None),
        (Rules(0), {"parent_span_id": "00f067aa0ba902b7"}, "caller"),
        (Rules(0, by_caller=False), {"parent_span_id": "00f067aa0ba902b7"}, None),
        (Rules(0, error=True), {"status": "error", "parent_span_id": "00f067aa0ba902b7", "trace_flags": 0}, None),
        (Rules(1, by_caller=False), {"parent_span_id": "00f067aa0ba902b7", "trace_flags": 0}, "rate"),
    ],
)
def test_a_rule_keeps_a_request_and_its_step(rules: Rules, columns: dict[str, Any], reason: str | None) -> None:
    found = picked(Sampler(rules, KEY), commit(1, **columns))
    assert [row["sampling_reason"] for row in found.rows["requests"]] == ([reason] if reason else [])
    assert all(row["trace_flags"] & 1 for row in found.rows["requests"])
    tail = reason not in (None, "caller")
    for name in ("steps", "segments"):
        assert len(found.rows[name]) == tail
    assert not found.wanted


def test_a_percentile_is_of_those_before_and_needs_some() -> None:
    sampler = Sampler(Rules(0, (Slow("e2e", 99),)), KEY)
    assert not names(picked(sampler, commit(99))) and not names(picked(sampler, commit(1, at=99, latency_ms=99)))
    assert names(picked(sampler, commit(1, at=100, latency_ms=50))) == ["r100"]
    assert not names(picked(sampler, commit(1, at=101, latency_ms=10)))


def test_the_first_are_counted_for_each_engine() -> None:
    sampler = Sampler(Rules(0, first=2), KEY)
    assert names(picked(sampler, commit(1))) == ["r0"]
    assert names(picked(sampler, commit(5, at=1))) == ["r1"]
    assert not names(picked(sampler, commit(5, at=6)))


def test_answers_to_one_request_stay_together() -> None:
    build = Builder()
    for child, status in enumerate(("finished", "error")):
        build.request(f"r{child}", parent=5, child=child, children=2, status=status, trace_id="ff" * 16, end_ns=9)
    assert names(picked(Sampler(Rules(0, error=True), KEY), build)) == ["r0", "r1"]


def test_steps_of_a_kept_request_are_wanted_from_before_and_kept_afterwards() -> None:
    sampler = Sampler(Rules(0, error=True), KEY)
    picked(sampler, commit(4))
    build = Builder()
    handle = build.request("late", status="error", end_ns=100 * MS)
    build.add("members", handle=handle, instance=INSTANCE, first_step=2, last_step=5)
    for step in (4,):
        build.step(INSTANCE, step, step * MS, (step + 1) * MS, decode_tokens=1)
    found = picked(sampler, build)
    assert found.wanted == {(INSTANCE, 2), (INSTANCE, 3)}
    assert [row["step"] for row in found.rows["steps"]] == [4]
    later = picked(sampler, commit(3, at=5))
    assert [row["step"] for row in later.rows["steps"]] == [5]
    earlier = sampler.of_steps(rows_of(commit(4).tables()), {*found.wanted})
    assert [row["step"] for row in earlier["steps"]] == [row["step"] for row in earlier["segments"]] == [2, 3]


@settings(deadline=None, max_examples=20)
@given(st.floats(0.05, 0.95), st.integers(0, 10**6))
def test_weights_restore_counts(rate: float, at: int) -> None:
    count = 400
    sampler = Sampler(Rules(rate, error=True), KEY)
    found = picked(sampler, commit(count, at=at))
    wrong = picked(sampler, commit(50, at=at + count, status="error"))
    for one, total in ((found, count), (wrong, 50)):
        for name in ("requests", "steps"):
            weights = [row["sampling_weight"] for row in one.rows[name]]
            exact = name == "requests" and one is wrong
            spread = 0 if exact else 6 * (total * (1 - rate) / rate) ** 0.5
            assert abs(sum(weights) - total) <= spread + 1e-6
    assert len(wrong.rows["steps"]) == 50, "and every step of theirs is there"


def test_what_is_kept_does_not_depend_on_the_commits() -> None:
    whole = picked(Sampler(Rules(0.3), KEY), commit(60))
    parts = Sampler(Rules(0.3), KEY)
    split = [picked(parts, commit(20, at=at)) for at in (0, 20, 40)]
    for name in ("requests", "states", "steps"):
        assert list(whole.rows[name]) == [row for one in split for row in one.rows[name]]
    assert len(whole.rows["segments"]) == sum(len(one.rows["segments"]) for one in split) > 0


def test_spans_say_why_they_are_here_and_for_how_many_they_stand() -> None:
    rows = picked(Sampler(Rules(0.5, error=True), KEY), commit(40)).rows
    spans = spans_of_rows(rows, Source(KEY, Clock([(0, 0)]))).spans
    said = Counter((span.name, *(span.attributes.get(f"stagetrace.sampling.{name}") for name in ("reason", "weight")))
                   for span in spans)  # fmt: skip
    assert said == {
        ("request", "rate", 2.0): len(rows["requests"]),
        ("decode", None, None): len(rows["requests"]),
        ("step decode", "rate", 2.0): len(rows["steps"]),
        ("forward decode", None, None): len(rows["steps"]),
    }
