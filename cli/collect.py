"""stagetrace collect: the collector of one session, until it is told to stop."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from stagetrace.instrument.identity import claim_identity


def collect(
    directory: Annotated[Path, typer.Argument(help="The session's directory; made if it is not there.")],
    command: Annotated[list[str] | None, typer.Argument(help="The command that is recorded, for the manifest.")] = None,
    level: Annotated[
        str, typer.Option(help="The level that the engines were started with, for the manifest.")
    ] = "step",
    beside: Annotated[bool, typer.Option("--beside", hidden=True, help="Started by `stagetrace run`.")] = False,
) -> None:
    """Collects from the engines that have STAGETRACE_SESSION=DIRECTORY, until SIGTERM or Ctrl-C."""
    # Imported here: pyarrow and the OpenTelemetry SDK take longer to import than most commands to run.
    from stagetrace.exporters.background import stop_at_signal, stop_when_told
    from stagetrace.exporters.collector import Collector
    from stagetrace.exporters.otlp import OtlpSink
    from stagetrace.exporters.session import Session, SessionError

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        session = Session(directory, claim_identity(directory))
        sink = OtlpSink.from_environment(os.environ, session.identity.key)
        collector = Collector(session, command or (), level, sink)
    except (OSError, SessionError) as error:
        typer.echo(f"stagetrace collect: cannot use {directory} as a session: {error}", err=True)
        raise typer.Exit(2) from error
    collector.run(stop_when_told(collector.alive) if beside else stop_at_signal())
