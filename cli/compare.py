"""`stagetrace compare`: two sessions, what differs between them, and whether chance could have made it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .options import say_meaning, seconds


class Undecided(StrEnum):
    """What a condition counts as whose interval has its value inside."""

    PASS = "pass"
    FAIL = "fail"


def compare(
    a: Annotated[Path | None, typer.Argument(help="The session to compare with.", show_default=False)] = None,
    b: Annotated[Path | None, typer.Argument(help="The session that is compared.", show_default=False)] = None,
    also_a: Annotated[
        list[Path] | None, typer.Option(help="A further session of A's load; several may be named.", show_default=False)
    ] = None,
    also_b: Annotated[
        list[Path] | None, typer.Option(help="A further session of B's load; several may be named.", show_default=False)
    ] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            help="A condition that makes the exit status 1 when it holds: 'tpot_p95 > +5%' (a change from A to B),"
            " 'ttft_p99 > 500ms' (B's value), 'requests_per_s < -3%'. Several may be named.",
            show_default=False,
        ),
    ] = None,
    undecided: Annotated[
        Undecided, typer.Option(help="What a condition counts as that these data can neither show nor rule out.")
    ] = Undecided.PASS,
    last: Annotated[
        str | None, typer.Option(help="Only what ended in the last part of each session, as 90s, 10m or 2h.")
    ] = None,
    least: Annotated[
        float, typer.Option(help="Changes of fewer percent are called none, however certain.", min=0.0, max=100.0)
    ] = 1.0,
    explain: Annotated[
        str | None,
        typer.Option(help="What a number means, its unit and how it is made; `list` for all names. Needs no session."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Compare two sessions: every metric and stage, with intervals, effect sizes, and conditions for CI.

    Exit status: 0 when no condition holds, 1 when one does, 2 when something cannot be read or understood.
    """
    if explain is not None:
        say_meaning(explain, "compare")
        return
    last_s = None if last is None else seconds(last)
    if a is None or b is None:
        typer.echo("stagetrace compare: name two sessions, A and B: `stagetrace compare A B`", err=True)
        raise typer.Exit(2)
    # Imported here: pandas takes longer to import than most commands to run.
    from rich.console import Console

    from stagetrace.analysis.comparison.compare import ComparisonError
    from stagetrace.analysis.comparison.compare import compare as compared
    from stagetrace.analysis.comparison.conditions import ConditionError, parse
    from stagetrace.analysis.comparison.sample import Side, sample
    from stagetrace.analysis.comparison.show import exit_status, print_comparison, to_json
    from stagetrace.exporters.session import Session, SessionError

    try:
        conditions = [parse(each) for each in fail_on or ()]
        side_a = Side([sample(Session.open(path), last_s) for path in (a, *(also_a or ()))])
        side_b = Side([sample(Session.open(path), last_s) for path in (b, *(also_b or ()))])
        result = compared(side_a, side_b, conditions, least / 100)
    except (SessionError, ConditionError, ComparisonError) as error:
        typer.echo(f"stagetrace compare: {error}", err=True)
        raise typer.Exit(2) from None
    status = exit_status(result, undecided is Undecided.FAIL)
    if as_json:
        typer.echo(to_json(result, status))
    else:
        print_comparison(result, Console(), undecided is Undecided.FAIL)
    raise typer.Exit(status)
