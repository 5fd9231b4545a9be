"""stagetrace run: a server under recording, and where its time went when it ends."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from stagetrace.instrument.device_marks import DEFAULT_LAYERS, MARK_LAYERS, MARKS, PLACES
from stagetrace.instrument.identity import claim_identity
from stagetrace.instrument.stages import Level

from .options import KeepOption, checked_keep

if TYPE_CHECKING:
    from collections.abc import Iterator

LEVELS = [level.name.lower() for level in Level]


def run(
    command: Annotated[list[str], typer.Argument(help="The server's command, after `--`.", show_default=False)],
    session: Annotated[
        Path | None, typer.Option(help="Where to record; by default a new directory in ./stagetrace-sessions.")
    ] = None,
    level: Annotated[str, typer.Option(help=f"How much to record: {', '.join(LEVELS)}.")] = "step",
    max_level: Annotated[
        str | None,
        typer.Option(help="Install hooks up to this level, for `stagetrace ctl`; by default --level or step."),
    ] = None,
    marks: Annotated[
        str,
        typer.Option(
            help=f"On a GPU, time these parts of layers on the device, inside graphs as well: {', '.join(PLACES)}, with"
            " commas. Read from level layer on.",
            envvar=MARKS,
            show_default=False,
        ),
    ] = "",
    mark_layers: Annotated[
        int | None,
        typer.Option(
            help="In how many layers --marks are put, spread evenly from the first to the last.",
            envvar=MARK_LAYERS,
            show_default=str(DEFAULT_LAYERS),
        ),
    ] = None,
    keep: KeepOption = None,
    log: Annotated[Path | None, typer.Option(help="Send the command's output to this file.")] = None,
    report: Annotated[bool, typer.Option(help="Print where the time went when the command has ended.")] = True,
) -> None:
    """Runs COMMAND with its engine recorded: same terminal, same signals, same exit status.

    Example: stagetrace run -- python -m vllm.entrypoints.openai.api_server --model M
    """
    from stagetrace.exporters.foreground import CannotStart, end_as, hold_signals, run_in_foreground

    mask = hold_signals()  # first, since pyarrow starts threads
    # Imported here: pyarrow takes longer to import than most commands to run.
    from stagetrace.exporters.arm import armed_environment, parse_marks
    from stagetrace.exporters.background import Background
    from stagetrace.exporters.session import DEFAULT_ROOT, Session, SessionError, new_session_path

    for name in (level, max_level or level):
        if name not in LEVELS:
            _fail(f"there is no level {name!r}: choose one of {', '.join(LEVELS)}", 2)
    try:
        chosen = parse_marks(marks, mark_layers)
    except ValueError as error:
        _fail(str(error), 2)
    kept = checked_keep(keep)
    if session is not None and (session / "session.json").exists():
        _fail(f"{session} holds a session already: name a new directory, or leave --session out", 2)
    with ExitStack() as closing:
        try:
            output = closing.enter_context(open(log, "wb")) if log else None
        except OSError as error:
            _fail(f"cannot write {log}: {error.strerror}", 2)
        try:
            path = session or new_session_path()
            recording = Session(path, claim_identity(path))
        except OSError as error:
            _fail(f"cannot record into {session or Path(DEFAULT_ROOT)}: {error}", 2)
        environment, notes = armed_environment(os.environ, path, level, max_level, chosen)
        if mark_layers is not None and not chosen.places:
            notes.append(f"there are no marks to put into layers: name some with --marks {','.join(PLACES)}")
        for note in (*notes, f"recording into {path}"):
            _say(note)
        collector = Background(recording, ["--level", level, "--keep", kept], command, _say)
        try:
            status = run_in_foreground(
                command, environment, output, mask=mask, started=collector.started, tend=collector.tend
            )
        except CannotStart as error:
            collector.stop(wait_longer=False)
            _fail(f"cannot start the command: {error}", error.status)
        trouble = collector.stop(wait_longer=report)
    if trouble:
        _say(trouble)
    if report:
        # Imported here: the command need not wait for pandas.
        from rich.console import Console

        from stagetrace.analysis.report import print_summary, summarise

        try:
            with _terminal_may_be_gone():
                print_summary(summarise(recording), Console())
        except SessionError as error:
            _say(str(error))
    with _terminal_may_be_gone():
        typer.echo(f"session: {path}")
    raise typer.Exit(end_as(status))


@contextmanager
def _terminal_may_be_gone() -> Iterator[None]:
    """After a hangup nothing can be printed any longer: the command's exit status is ours all the same."""
    try:
        yield
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # else what they hold fails once more when Python ends
            os.dup2(null, stream.fileno())
        os.close(null)


def _say(message: str) -> None:
    with _terminal_may_be_gone():
        typer.echo(f"stagetrace: {message}", err=True)


def _fail(message: str, status: int) -> NoReturn:
    typer.echo(f"stagetrace run: {message}", err=True)
    raise typer.Exit(status)
