"""stagetrace export: sends a recorded session to a trace backend, from where an earlier export stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from stagetrace.exporters.follow import Follower


def export(
    session: Annotated[
        Path | None, typer.Argument(help="A session's directory. Default: the newest under ./stagetrace-sessions.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Send everything, also what the backend has confirmed; ids are the same.")
    ] = False,
) -> None:
    """Send a session's spans to OTEL_EXPORTER_OTLP_ENDPOINT, from where the last export to it stopped.

    Waits for a backend that does not answer, until Ctrl-C; the next call goes on from there. Exit status: 0 when
    the backend has everything, 1 when not, 2 when nothing can be sent.
    """
    # Imported here: the OpenTelemetry SDK takes longer to import than most commands to run.
    import logging

    from rich.console import Console

    from stagetrace.analysis.step_light import with_light
    from stagetrace.exporters.background import stop_at_signal
    from stagetrace.exporters.follow import Follower, Taken
    from stagetrace.exporters.otel_settings import destination
    from stagetrace.exporters.otlp import BadSettings, OtlpSink
    from stagetrace.exporters.session import Session, SessionError

    logging.basicConfig(level=logging.WARNING, format="stagetrace export: %(message)s")
    wanted = destination(os.environ)
    if wanted is None:
        _fail("set OTEL_EXPORTER_OTLP_ENDPOINT to where the spans should go, http://127.0.0.1:4317 for example")
    try:
        opened = Session.newest() if session is None else Session.open(session)
        follower = Follower(opened, OtlpSink.to(wanted, opened.identity.key), wanted, enrich=with_light(opened))
    except (SessionError, BadSettings, Taken, OSError) as error:
        _fail(str(error))
    told = stop_at_signal()
    console = Console(stderr=True)
    try:
        if again:
            follower.restart()
        follower.remember()
        with console.status(f"exporting to {wanted.target}") as status:

            def progress(now: Follower) -> None:
                waits = f"; {now.state.trouble}" if now.state.trouble else ""
                status.update(f"{now.state.sent} spans sent, {now.waiting} commits to go{waits}")

            follower.follow(lambda: told() or _at_end(follower), progress)
    except (SessionError, OSError) as error:
        _fail(str(error))
    finally:
        follower.close()
    state = follower.state
    refused = f", {state.refused} refused" if state.refused else ""
    typer.echo(f"{state.sent} spans sent to {state.target}{refused}; {follower.waiting} commits wait")
    raise typer.Exit(int(bool(follower.waiting or state.refused)))


def _at_end(follower: Follower) -> bool:
    """Whether all that a session has at present was sent; a collector may still be adding to it."""
    return follower.manifest.derived > 0 and not follower.manifest.complete and follower.waiting == 0


def _fail(message: str) -> NoReturn:
    typer.echo(f"stagetrace export: {message}", err=True)
    raise typer.Exit(2)
