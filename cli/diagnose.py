"""`stagetrace diagnose`: why a session was slow, and what to try next."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import CalibrationOption, LastOption, ModelConfigOption, SessionArgument, seconds


def diagnose(
    session: SessionArgument = None,
    last: LastOption = None,
    model_config: ModelConfigOption = None,
    calibration: CalibrationOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also the causes that were looked at and do not stand out.")
    ] = False,
    explain: Annotated[
        str | None,
        typer.Option(help="What a cause, a threshold or a number means; `list` for all names. Needs no session."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Name the causes of slowness in a session, with evidence, what could be recovered, and what to try next.

    Findings are ranked by the request time that could be recovered at most. docs/diagnosis.md has every cause and
    threshold. Exit status: 0, whatever is found; 2 when the session cannot be read.
    """
    if explain is not None:
        from stagetrace.analysis.definitions import UnknownName
        from stagetrace.analysis.diagnosis.explain import explained

        try:
            typer.echo(explained(explain))
        except UnknownName as error:
            typer.echo(f"stagetrace diagnose: {error}", err=True)
            raise typer.Exit(2) from None
        return
    last_s = None if last is None else seconds(last)
    # Imported here: pandas takes longer to import than most commands to run.
    from rich.console import Console

    from stagetrace.analysis.calibration.results import CalibrationError
    from stagetrace.analysis.diagnosis.diagnose import diagnose as look
    from stagetrace.analysis.diagnosis.show import parts, to_json
    from stagetrace.analysis.model_config import ConfigError
    from stagetrace.analysis.show import print_parts
    from stagetrace.exporters.session import Session, SessionError

    try:
        opened = Session.newest() if session is None else Session.open(session)
        found = look(opened, last_s, model_config, calibration)
    except (SessionError, ConfigError, CalibrationError) as error:
        typer.echo(f"stagetrace diagnose: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(to_json(found))
    else:
        print_parts(parts(found, everything), Console())
