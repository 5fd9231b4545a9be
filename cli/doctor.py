"""`stagetrace doctor`: can the engines here be recorded, and what did the processes of a session say."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console


def doctor(
    session: Annotated[
        Path | None, typer.Argument(help="A session's directory: show what its processes said.", show_default=False)
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Inspect the environment of this interpreter instead of the command's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Show whether the engines of an environment can be recorded: every hook point, plugins, and room for rings.

    Nothing is patched and no engine is started: the engine's modules are imported, in a process of its own.

    With SESSION: hooks, contained errors, rings and losses of that session's processes.

    Exit status:
    0 all hook points can be used;
    1 something is missing, does not match or keeps stagetrace out;
    2 there is no engine (in a session: no process), or it cannot be inspected.
    """
    # Imported here: pandas takes longer to import than most commands to run.
    from rich.console import Console

    from stagetrace.analysis.doctor import (
        environment_parts,
        environment_view,
        session_parts,
        session_view,
    )
    from stagetrace.analysis.show import print_parts
    from stagetrace.exporters.doctor import excluding_variables, rings_on_disk
    from stagetrace.exporters.session import Session, SessionError

    if session is None:
        found, trouble = _inspected(python or sys.executable, Console(stderr=True))
        view = environment_view(found, trouble, os.environ, excluding_variables(os.environ))
        parts = environment_parts
    else:
        if python is not None:
            raise typer.BadParameter("--python inspects an environment: leave out SESSION, or --python")
        try:
            opened = Session.open(session)
            view = session_view(opened, rings_on_disk(opened.identity.session))
        except SessionError as error:
            typer.echo(f"stagetrace doctor: {error}", err=True)
            raise typer.Exit(2) from None
        parts = session_parts
    if as_json:
        typer.echo(json.dumps(view, indent=1))
    else:
        print_parts(parts(view), Console())
    raise typer.Exit(view["status"])


def _inspected(python: str, console: Console) -> tuple[dict[str, Any] | None, str | None]:
    """What an environment has, or why that is not known. Meanwhile the terminal shows what is imported."""
    from rich.text import Text

    from stagetrace.adapters.inspect import CannotInspect, inspect_environment

    with ExitStack() as closing:
        progress: Callable[[str], None] = lambda _: None  # noqa: E731
        doing = f"importing the engine's modules with {python}"
        if console.is_terminal:
            status = closing.enter_context(console.status(Text(doing)))
            progress = lambda module: status.update(Text(f"{doing}: {module}"))  # noqa: E731
        else:
            typer.echo(f"stagetrace doctor: {doing}", err=True)
        try:
            return inspect_environment(python, progress), None
        except CannotInspect as error:
            return None, str(error)
