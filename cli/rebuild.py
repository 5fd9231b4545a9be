"""stagetrace rebuild: derives a session's tables again from its raw records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def rebuild(
    session: Annotated[
        Path | None, typer.Argument(help="A session's directory. Default: the newest under ./stagetrace-sessions.")
    ] = None,
) -> None:
    """Derive steps, requests and segments again from the raw records, after an update of stagetrace for example.

    A manifest.json that is damaged is made again as well; the command and the errors of hooks that it named are then
    not known any more. Needs a session that no collector has at present. Exit status: 0, 1 when a part of the raw
    records is damaged (it is named and left out), 2 when nothing could be done.
    """
    # Imported here: pyarrow takes longer to import than most commands to run.
    from rich.progress import Progress

    from stagetrace.exporters.rebuild import rebuild_tables
    from stagetrace.exporters.session import Session, SessionError

    try:
        opened = Session.newest() if session is None else Session.open(session)
        with Progress(transient=True) as bar:
            task = bar.add_task("deriving the tables", total=None)
            result = rebuild_tables(opened, lambda done, total: bar.update(task, completed=done, total=total))
    except (SessionError, OSError) as error:
        typer.echo(f"stagetrace rebuild: {error}", err=True)
        raise typer.Exit(2) from None
    for damage in result.damaged:
        typer.echo(f"stagetrace rebuild: {damage}: left out", err=True)
    if result.restored:
        typer.echo(f"stagetrace rebuild: made manifest.json from the raw records: {result.restored}", err=True)
    typer.echo(f"{opened.path}: {result.rows} rows from {result.slots} records in {result.commits} commits")
    raise typer.Exit(int(bool(result.damaged)))
