"""Options that several commands share, and what makes of their texts what the commands need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from stagetrace.exporters.retention import DEFAULT, parse_keep

_LONGEST_S = 1e9  # 32 years
_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

SessionArgument = Annotated[
    Path | None, typer.Argument(help="A session's directory. Default: the newest under ./stagetrace-sessions.")
]
LastOption = Annotated[
    str | None, typer.Option(help="Only what ended in the last part of the session, as 90s, 10m or 2h.")
]
ModelConfigOption = Annotated[
    Path | None,
    typer.Option(help="The model's config.json or its directory, for the speed of light. Default: as recorded."),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(help="A file of `stagetrace calibrate`, to compare with. Default: that of the recorded device."),
]
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


def seconds(text: str) -> float:
    """A length of time such as 90, 90s, 10m, 1.5h or 2d, in seconds. Raises typer.BadParameter."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip(), re.ASCII)
    if found is None or not 0 < float(found[1]) * _UNITS_S[found[2]] <= _LONGEST_S:
        raise typer.BadParameter(f"{text!r} is not a length of time: write it as 90s, 10m, 1.5h or 2d")
    return float(found[1]) * _UNITS_S[found[2]]


def say_meaning(name: str, command: str) -> None:
    """Prints what a number means. Raises typer.Exit with status 2 for one that is not known."""
    from stagetrace.analysis.definitions import UnknownName, explained

    try:
        typer.echo(explained(name))
    except UnknownName as error:
        typer.echo(f"stagetrace {command}: {error}", err=True)
        raise typer.Exit(2) from None
