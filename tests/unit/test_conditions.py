"""Tests of the conditions of `--fail-on`: what they mean, what is refused, and when one holds."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagetrace.analysis.comparison.conditions import Condition, ConditionError, Of, Verdict, parse
from stagetrace.analysis.comparison.metrics import METRICS, Unit

OPERATORS = (">", ">=", "<", "<=")
UNITS = {"ns": 1, "us": 1e3, "\u00b5s": 1e3, "ms": 1e6, "s": 1e9}


@pytest.mark.parametrize(
    ("text", "of", "value"),
    [
        ("tpot_p95 > +5%", Of.CHANGE, 0.05),
        ("tpot_p95>+5%", Of.CHANGE, 0.05),
        ("  requests_per_s  <  -3.5 % ", Of.CHANGE, -0.035),
        ("ttft_p99 >= 500ms", Of.VALUE, 5e8),
        ("ttft_p99 > +10ms", Of.DIFFERENCE, 1e7),
        ("itl_p50 <= 20 \u00b5s", Of.VALUE, 2e4),
        ("stage_forward > +.5us", Of.DIFFERENCE, 500),
        ("cached_share < 40%", Of.VALUE, 0.4),
        ("cached_share < -2pp", Of.DIFFERENCE, -0.02),
        ("cached_share < -2%", Of.CHANGE, -0.02),
        ("requests_per_s < 12", Of.VALUE, 12),
        ("preemptions_per_request > +0.5", Of.DIFFERENCE, 0.5),
        ("part_interference > +10%", Of.CHANGE, 0.1),
    ],
)
def test_what_a_condition_means(text: str, of: Of, value: float):
    condition = parse(text)
    assert (condition.of, condition.text) == (of, " ".join(text.split()))
    assert condition.value == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a condition: write METRIC"),
        ("tpot_p95", "is not a condition"),
        ("tpot_p95 > ", "is not a condition"),
        ("tpot_p95 = +5%", "is not a condition"),
        ("tpot_p95 == +5%", "is not a condition"),
        ("tpot_p95 => +5%", "is not a condition"),
        ("tpot_p95 > +5% and ttft_p95 > +5%", "is not a condition"),
        ("tpot_p95 > +-5%", "is not a condition"),
        ("tpot_p95 > 1e9ms", "'e9ms'|is not a condition"),
        ("tpot_p95 > nan", "is not a condition"),
        ("tpot_p95 > inf%", "is not a condition"),
        ("tpot_p95 > 5,5ms", "is not a condition"),
        ("tpot_p95 > \u0665ms", "is not a condition"),
        ("tpot_p95 > 5%", "write \\+5% or -5%"),
        ("tpot_p95 > 5", "is a time: write ns, us, ms or s"),
        ("tpot_p95 > 5 minutes", "is a time"),
        ("tpot_p95 > +5pp", "is a time"),
        ("requests_per_s > 5ms", "is a rate per second: write it without a unit"),
        ("batch_mean > 5ms", "is a number: write it without a unit"),
        ("cached_share > 5", "is a share"),
        ("cached_share > 5pp", "is a share"),
        ("tpott_p95 > +5%", "'tpott_p95' is not a metric: did you mean tpot_p95"),
        ("tpot > +5%", "there are tpot_mean, tpot_p50, tpot_p95, tpot_p99"),
        ("forward > +5%", "there are stage_forward"),
        ("zzz > +5%", "is not a metric .such as ttft_p95"),
        ("tpot_p95 > +5%\x1b[2J", r"\\x1b"),
        ("x" * 5000 + " > +5%", "is not a condition"),
    ],
)
def test_what_cannot_be_parsed_is_refused_with_a_word_on_what_can(text: str, said: str):
    with pytest.raises(ConditionError) as raised:
        parse(text)
    assert re.search(said, str(raised.value)), raised.value
    assert "\x1b" not in str(raised.value) and len(str(raised.value)) < 1000


@st.composite
def conditions(draw: st.DrawFn) -> tuple[str, str, str, float]:
    metric = draw(st.sampled_from(METRICS))
    operator = draw(st.sampled_from(OPERATORS))
    number = draw(st.decimals(0, 10**6, places=draw(st.integers(0, 3))))
    sign = draw(st.sampled_from(["", "+", "-"]))
    times = {**UNITS} if metric.unit is Unit.TIME else {}
    shares = ({"%": 0.01, "pp": 0.01} if sign else {"%": 0.01}) if metric.unit is Unit.SHARE else {}
    plain = {"": 1.0} if metric.unit in (Unit.RATE, Unit.COUNT) else {}
    relative = {"%": 0.01} if sign else {}
    unit, size = draw(st.sampled_from(sorted({**times, **shares, **plain, **relative}.items())))
    space = draw(st.sampled_from(["", " ", "  "]))
    value = float(number) * size * (-1 if sign == "-" else 1)
    return f"{metric.name}{space}{operator}{space}{sign}{number}{space}{unit}", metric.name, operator, value


@given(conditions())
def test_every_condition_of_the_grammar_is_understood(written: tuple[str, str, str, float]):
    text, metric, operator, value = written
    condition = parse(text)
    assert (condition.metric.name, condition.operator) == (metric, operator)
    assert condition.value == pytest.approx(value)


@given(
    st.text(max_size=60) | st.from_regex(r"(tpot_p95|ttft_mean|x) ?[<>=]{1,3} ?[+\-0-9.%a-z ]{0,12}", fullmatch=True)
)
def test_no_text_gives_anything_but_a_condition_or_its_error(text: str):
    try:
        assert isinstance(parse(text), Condition)
    except ConditionError:
        pass


@given(st.sampled_from(OPERATORS), st.floats(-2, 2), st.floats(0, 2), st.floats(-2, 2))
def test_a_condition_holds_where_all_of_the_interval_fulfils_it(operator: str, low: float, width: float, limit: float):
    metric = METRICS[0]
    condition = Condition("", metric, operator, Of.CHANGE, limit)
    high = low + width
    inside = [low + width * share for share in (0, 0.25, 0.5, 0.75, 1)]
    inside[-1] = high
    verdict = condition.judge(low, high)
    if verdict is Verdict.HOLDS:
        assert all(condition.beyond(value) for value in inside)
    elif verdict is Verdict.DOES_NOT:
        assert not any(condition.beyond(value) for value in inside)
    else:
        assert condition.beyond(low) != condition.beyond(high)
