"""`stagetrace report`: where the time of a session went."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import CalibrationOption, LastOption, ModelConfigOption, SessionArgument, say_meaning, seconds


def report(
    session: SessionArgument = None,
    last: LastOption = None,
    model_config: ModelConfigOption = None,
    calibration: CalibrationOption = None,
    request: Annotated[
        str | None,
        typer.Option(
            help="One request's story instead: its request id, the client's id, its trace id, or how one begins."
        ),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(help="What a number means, its unit and how it is made; `list` for all names. Needs no session."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Show where the time of a session went: requests, steps, stages, and what is missing."""
    if explain is not None:
        say_meaning(explain, "report")
        return
    last_s = None if last is None else seconds(last)
    # Imported here: pandas takes longer to import than most commands to run.
    from rich.console import Console

    from stagetrace.analysis import show_story
    from stagetrace.analysis.calibration.results import CalibrationError
    from stagetrace.analysis.model_config import ConfigError
    from stagetrace.analysis.report import print_summary, summarise, to_json
    from stagetrace.analysis.story import NoSuchRequest
    from stagetrace.exporters.session import Session, SessionError

    try:
        opened = Session.newest() if session is None else Session.open(session)
        if request is not None:
            told = show_story.tell(opened, request, last_s)
            if as_json:
                typer.echo(show_story.to_json(told))
            else:
                show_story.print_story(told, Console())
            return
        summary = summarise(opened, last_s, model_config, calibration)
    except (SessionError, ConfigError, CalibrationError, NoSuchRequest) as error:
        typer.echo(f"stagetrace report: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(to_json(summary))
    else:
        print_summary(summary, Console())
