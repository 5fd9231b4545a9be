"""stagetrace collect: the collector of one session, until it is told to stop."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from stagetrace.instrument.identity import claim_identity

from .options import KeepOption, checked_keep


def collect(
    directory: Annotated[Path, typer.Argument(help="The session's directory; made if it is not there.")],
    command: Annotated[list[str] | None, typer.Argument(help="The command that is recorded, for the manifest.")] = None,
    level: Annotated[
        str, typer.Option(help="The level that the engines were started with, for the manifest.")
    ] = "step",
    keep: KeepOption = None,
    beside: Annotated[bool, typer.Option("--beside", hidden=True, help="Started by `stagetrace run`.")] = False,
) -> None:
    """Collects from the engines that have STAGETRACE_SESSION=DIRECTORY, until SIGTERM or Ctrl-C.

    Engines start and stop as they like, before and after it. Exit status: 0, 1 when something could not be written, 2
    when DIRECTORY cannot be used.
    """
    if beside:  # `run` holds signals back, which is inherited; before a library starts threads
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # Imported here: pyarrow takes longer to import than most commands to run.
    from stagetrace.exporters.background import stop_at_signal, stop_when_told
    from stagetrace.exporters.collector import Collector
    from stagetrace.exporters.export_process import ExportProcess, ExportProcesses
    from stagetrace.exporters.orphans import sweep
    from stagetrace.exporters.otel_settings import destination, scrape_address
    from stagetrace.exporters.retention import parse_keep
    from stagetrace.exporters.session import Session, SessionError

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    bounds = parse_keep(checked_keep(keep))
    told = None if beside else stop_at_signal()
    try:
        session = Session(directory, claim_identity(directory))
        collector = Collector(session, command or (), level, bounds)
        exports = [ExportProcess(session)] if destination(os.environ) is not None else []
        if scrape_address(os.environ) is not None:
            exports.append(ExportProcess(session, "--scrape"))
        if exports:
            collector.export = ExportProcesses(*exports)
    except ValueError as error:
        typer.echo(f"stagetrace collect: {error}", err=True)
        raise typer.Exit(2) from error
    except (OSError, SessionError) as error:
        typer.echo(f"stagetrace collect: cannot use {directory} as a session: {error}", err=True)
        raise typer.Exit(2) from error
    sweep(session.identity.session)
    if not collector.run(told or stop_when_told(collector.alive)):
        raise typer.Exit(1)
