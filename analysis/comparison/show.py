"""How a comparison is shown: tables for a terminal or a pipe, or one JSON object."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..show import MISSING, Grid, Part, duration_text, number_text, plain, print_parts, share_text
from .compare import Compared, Found, Judged, Result
from .conditions import Of, Verdict
from .metrics import Group, Metric, Unit
from .resampling import LEVEL

if TYPE_CHECKING:
    from rich.console import Console

    from .sample import Side

JSON_VERSION = 1
_FEW_REQUESTS = 20  # of a side
_ENGINES = (
    "The engines divide a step differently, so no stage is called better or worse: vLLM's scheduler waits in `execute`"
    " for ranks in processes of their own, SGLang's ranks work inside it, and what one does in a stage the other may do"
    " in another. A stage that only one side has is none of the other's, or not recorded there: it is not 0."
)


def exit_status(result: Result, undecided_fails: bool) -> int:
    """1 where a condition holds, or is undecided and that is to fail; else 0."""
    failing = {Verdict.HOLDS, Verdict.UNDECIDED} if undecided_fails else {Verdict.HOLDS}
    return int(any(each.verdict in failing for each in result.judged))


# JSON


def to_json(result: Result, status: int) -> str:
    """The comparison as one JSON object; its keys are documented in docs/comparison.md."""
    return json.dumps(as_dict(result, status), indent=1)


def as_dict(result: Result, status: int) -> dict[str, Any]:
    """What to_json writes."""
    return {
        "version": JSON_VERSION,
        "a": _side(result.a),
        "b": _side(result.b),
        "same": result.same,
        "load_differences": [vars(each) for each in result.loads],
        "load_same": result.alike,
        "findings": len(result.findings),
        "tested": result.tested,
        "metrics": [_metric(each) for each in result.metrics],
        "conditions": [_condition(each) for each in result.judged],
        "exit_status": status,
    }


def _side(side: Side) -> list[dict[str, Any]]:
    return [
        {
            "path": each.path,
            "id": each.session,
            "last_s": each.window,
            "measured": each.measured,
            "steps": each.steps,
            "blocks": each.blocks,
            "arrivals_per_s": each.load.arrivals_per_s,
            "concurrency": each.load.concurrency,
            "settings": each.load.settings,
        }
        for each in side.samples
    ]


def _metric(each: Compared) -> dict[str, Any]:
    names = ("a", "b", "difference", "low", "high", "change", "change_low", "change_high", "effect", "p", "p_adjusted")
    return {
        "metric": each.metric.name,
        "unit": each.metric.unit.value,
        **{name: getattr(each, name) for name in names},
        "smallest": each.smallest,
        "found": each.found.name.lower(),
        "better": each.better,
    }


def _condition(each: Judged) -> dict[str, Any]:
    return {
        "condition": each.condition.text,
        "metric": each.condition.metric.name,
        "of": each.condition.of.value,
        "operator": each.condition.operator,
        "limit": each.condition.value,
        "value": each.value,
        "low": each.low,
        "high": each.high,
        "verdict": each.verdict.value,
        "why": each.why,
    }


# Tables


def print_comparison(result: Result, console: Console, undecided_fails: bool) -> None:
    """Prints the comparison."""
    print_parts(parts(result, undecided_fails), console)


def parts(result: Result, undecided_fails: bool) -> list[Part]:
    """What is shown, in order. All strings are safe to show."""
    shown: list[Part] = [_header(result)]
    if result.same:
        shown.append("A and B are the same: there is no difference to be found.")
    elif result.loads:
        rows = [[plain(each.what), plain(each.a), plain(each.b), each.means] for each in result.loads]
        shown.append(Grid("What is not the same about the loads", ("", "A", "B", "so"), rows, text=True))
        if result.alike:
            shown.append(f"The same about them: {', '.join(result.alike)}.")
    else:
        shown.append("The loads look the same: lengths, arrivals, concurrency, model, engine, level and settings.")
    if not result.same:
        shown += [table for group in Group if (table := _table(result, group)) is not None]
        if result.engines_differ:
            shown.append(_ENGINES)
    shown.append(_summary(result))
    if result.judged:
        shown.append(_conditions(result, undecided_fails))
    return shown


def _header(result: Result) -> Grid:
    rows = []
    for name, side in (("A", result.a), ("B", result.b)):
        for each in side.samples:
            said = each.load.settings
            engine = f"{said.get('engine', '')} {said.get('engine_version', '')}".strip()
            window = "" if each.window is None else f", the last {duration_text(each.window * 1e9)}"
            size = f"{each.measured} requests, {each.steps} steps"
            model = plain(said.get("model", MISSING))
            rows.append((name, f"{plain(each.path)}{window}", plain(engine) or MISSING, model, size))
    return Grid("stagetrace compare", ("", "session", "engine", "model", ""), rows, text=True)


def _table(result: Result, group: Group) -> Grid | None:
    rows = [_row(each) for each in result.metrics if each.metric.group is group]
    if not rows:
        return None
    columns = ("metric", "A", "B", "change", f"{LEVEL:.0%} interval", "effect", "could show", "")
    return Grid(group.value, columns, rows)


def _row(each: Compared) -> list[str]:
    verdict = {Found.NONE: "", Found.FEW: "too few data"}.get(each.found, each.found.value)
    if each.better is not None:
        verdict += ", better" if each.better else ", worse"
    interval = MISSING
    if each.change_low is not None and each.change_high is not None:
        interval = f"{_percent(each.change_low)} to {_percent(each.change_high)}"
    elif each.low is not None and each.high is not None:
        interval = f"{value_text(each.low, each.metric)} to {value_text(each.high, each.metric)}"
    smallest = value_text(each.smallest, each.metric)
    if each.smallest is not None and each.a:
        smallest = share_text(each.smallest / abs(each.a))
    return [
        each.metric.name,
        value_text(each.a, each.metric),
        value_text(each.b, each.metric),
        _percent(each.change),
        interval,
        MISSING if each.effect is None else f"{each.effect:+.2f}",
        smallest,
        verdict,
    ]


def value_text(value: float | None, metric: Metric) -> str:
    """A metric's value with its unit."""
    if value is None:
        return MISSING
    if metric.unit is Unit.TIME:
        return f"-{duration_text(-value)}" if value < 0 else duration_text(value)
    return share_text(value) if metric.unit is Unit.SHARE else number_text(value)


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{share:+.1%}"


def _summary(result: Result) -> str:
    found = len(result.findings)
    if result.same:
        return "No differences."
    if not result.tested:
        return "Too few data: each side needs at least five requests that ended, spread over its time."
    said = f"{found} of {result.tested} metrics differ" if found else f"None of {result.tested} metrics differs"
    said += (
        " so that these data can show it. All are tested at once: Holm's correction keeps the chance of any false"
        f" finding at {1 - LEVEL:.0%}. `could show` is the smallest change that would have been found four times in"
        " five; intervals are of single metrics. Blocks of time are drawn, as neighbouring requests share steps."
    )
    if len(result.a.samples) == 1 or len(result.b.samples) == 1:
        said += (
            " With one session on a side, what differs from one start of the server to the next is not in it: record"
            " several (--also-a, --also-b) where that matters."
        )
    fewest = min(sum(each.measured for each in side.samples) for side in (result.a, result.b))
    if fewest < _FEW_REQUESTS:
        said += f" {fewest} requests are few: p95 and p99 of them are close to the largest."
    return said


def _conditions(result: Result, undecided_fails: bool) -> Grid:
    rows = []
    for each in result.judged:
        interval = each.why or MISSING
        if each.low is not None and each.high is not None:
            interval = f"{_of(each, each.low)} to {_of(each, each.high)}"
        rows.append([plain(each.condition.text), each.verdict.value, _of(each, each.value), interval])
    rule = "fails (--undecided fail)" if undecided_fails else "passes (--undecided pass)"
    title = f"Conditions; one that holds fails, one that is undecided {rule}"
    return Grid(title, ("--fail-on", "", "observed", "interval, of all conditions together 95 %"), rows, text=True)


def _of(each: Judged, value: float | None) -> str:
    if each.condition.of is Of.CHANGE:
        return _percent(value)
    shown = value_text(value, each.condition.metric)
    return f"+{shown}" if each.condition.of is Of.DIFFERENCE and value is not None and value > 0 else shown
