"""Options that several commands share, and what makes of their texts what the commands need."""

from __future__ import annotations

from typing import Annotated

import typer

from stagetrace.exporters.retention import DEFAULT, parse_keep

KeepOption = Annotated[
    str | None,
    typer.Option(
        help="How much of the session is kept, the newest: an age (24h), a size (10GB), both (24h,10GB), or all.",
        show_default=DEFAULT,
        envvar="STAGETRACE_KEEP",
    ),
]


def checked_keep(text: str | None) -> str:
    """The bound that was asked for, or the default. Raises typer.BadParameter."""
    try:
        parse_keep(text or DEFAULT)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--keep") from None
    return text or DEFAULT


def say_meaning(name: str, command: str) -> None:
    """Prints what a number means. Raises typer.Exit with status 2 for one that is not known."""
    from stagetrace.analysis.definitions import UnknownName, explained

    try:
        typer.echo(explained(name))
    except UnknownName as error:
        typer.echo(f"stagetrace {command}: {error}", err=True)
        raise typer.Exit(2) from None
