"""stagetrace ctl: switches what a running server records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from stagetrace.instrument.stages import Level

if TYPE_CHECKING:
    from stagetrace.exporters.session import Session

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


@ctl.command()
def kernel(
    steps: Annotated[int, typer.Option(min=1, max=1000, help="How many steps of each rank to profile.")] = 20,
    session: SessionOption = None,
    seconds: Annotated[float, typer.Option(help="End the window after this time, whatever was seen.")] = 30,
    megabytes: Annotated[int, typer.Option(help="End it when a rank's memory grew by this much.")] = 2000,
    wait: Annotated[float, typer.Option(help="How many seconds to wait for a first step.")] = 60,
) -> None:
    """Profile some steps of a server that goes on serving, and say which kernels each stage's time goes to.

    torch.profiler runs in every rank for the window's steps, which are slower for it; the engine waits while it starts
    and while its trace is written, and that time is shown. Ctrl-C closes the window: what was profiled until then is
    kept. Exit status: 0, 1 when nothing was profiled, 2 when the session cannot be used, 130 after Ctrl-C.
    """
    # Imported here: pyarrow takes longer to import than most commands to run.
    from stagetrace.exporters.kernel_window import WindowFailed, WindowInterrupted, open_window
    from stagetrace.exporters.session import Session, SessionError

    try:
        opened = Session.newest() if session is None else Session.open(session)
        number, said = open_window(
            opened, steps, seconds, megabytes, wait, lambda words: typer.echo(f"stagetrace: {words}", err=True)
        )
    except WindowInterrupted as error:
        _fail(str(error), 130)
    except WindowFailed as error:
        _fail(str(error), 1)
    except (SessionError, OSError, ValueError) as error:
        _fail(str(error))
    for rank in said:
        typer.echo(
            f"rank {rank.rank} (pid {rank.pid}): {rank.steps} steps, ended by {rank.ended};"
            f" the engine waited {rank.held_ns / 1e6:.0f} ms for the profiler"
        )
    _show_kernels(opened, number)


def _show_kernels(session: Session, number: int) -> None:
    from rich.console import Console

    from stagetrace.analysis.kernels import summarise_kernels
    from stagetrace.analysis.show_kernels import print_kernels
    from stagetrace.exporters.session import SessionError

    try:
        print_kernels(summarise_kernels(session, number), Console())
    except SessionError as error:
        _fail(f"{error}. The window's traces are in {session.kernel_window(number)}", 1)


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


def _fail(message: str, status: int = 2) -> NoReturn:
    typer.echo(f"stagetrace ctl: {message}", err=True)
    raise typer.Exit(status)
