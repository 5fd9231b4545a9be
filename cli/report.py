"""`stagetrace report`: where the time of a session went."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from .options import say_meaning

_LONGEST_S = 1e9  # 32 years
_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str) -> float:
    """A length of time such as 90, 90s, 10m, 1.5h or 2d, in seconds. Raises typer.BadParameter."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip(), re.ASCII)
    if found is None or not 0 < float(found[1]) * _UNITS_S[found[2]] <= _LONGEST_S:
        raise typer.BadParameter(f"{text!r} is not a length of time: write it as 90s, 10m, 1.5h or 2d")
    return float(found[1]) * _UNITS_S[found[2]]


def report(
    session: Annotated[
        Path | None, typer.Argument(help="A session's directory. Default: the newest under ./stagetrace-sessions.")
    ] = None,
    last: Annotated[
        str | None, typer.Option(help="Only what ended in the last part of the session, as 90s, 10m or 2h.")
    ] = None,
    model_config: Annotated[
        Path | None,
        typer.Option(help="The model's config.json or its directory, for the speed of light. Default: as recorded."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="A file of `stagetrace calibrate`, to compare with. Default: that of the recorded device."),
    ] = None,
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
