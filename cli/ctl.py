"""stagetrace ctl: switches what a running server records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from stagetrace.instrument.stages import Level

ctl = typer.Typer(
    name="ctl", help="Switch what a running server records, at once; the server is not restarted.", no_args_is_help=True
)
SessionOption = Annotated[
    Path | None,
    typer.Option("--session", help="The session's directory. Default: the newest under ./stagetrace-sessions."),
]


@ctl.command()
def level(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(one.name.lower() for one in Level)}.")],
    session: SessionOption = None,
) -> None:
    """Record at this level from now on."""
    if name.upper() not in Level.__members__:
        _fail(f"there is no level {name!r}: choose one of {', '.join(one.name.lower() for one in Level)}")
    _switch(session, Level[name.upper()])


@ctl.command()
def arm(session: SessionOption = None) -> None:
    """Record again, at level step."""
    _switch(session, Level.STEP)


@ctl.command()
def disarm(session: SessionOption = None) -> None:
    """Record nothing; the hooks stay in place and cost next to nothing."""
    _switch(session, Level.OFF)


def _switch(path: Path | None, to: Level) -> None:
    # Imported here: pyarrow takes longer to import than most commands to run.
    from stagetrace.exporters.control import set_level
    from stagetrace.exporters.session import Session, SessionError

    try:
        session = Session.newest() if path is None else Session.open(path)
        switched = set_level(session, to)
    except (SessionError, OSError) as error:
        _fail(str(error))
    for process in switched:
        typer.echo(f"{process.role} (pid {process.pid}): {process.before.name.lower()} -> {process.after.name.lower()}")
        if process.beyond:
            typer.echo(
                f"  it was started with hooks up to {process.maximum.name.lower()} only:"
                f" restart it with `stagetrace run --max-level {to.name.lower()}` to record more",
                err=True,
            )
    if not switched:
        typer.echo(
            f"no process of {session.path} is running; those that start with this session will record at"
            f" level {to.name.lower()}",
            err=True,
        )


def _fail(message: str) -> NoReturn:
    typer.echo(f"stagetrace ctl: {message}", err=True)
    raise typer.Exit(2)
