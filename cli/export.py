"""stagetrace export: sends a recorded session to a trace backend, or writes it for a viewer of timelines."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from stagetrace.exporters.follow import Follower, Target
    from stagetrace.exporters.session import Session
    from stagetrace.exporters.span_sink import SpanSink


class To(StrEnum):
    """Where a session can go."""

    OTLP = "otlp"
    PERFETTO = "perfetto"
    CHROME = "chrome"
    PROMETHEUS = "prometheus"
    CLICKHOUSE = "clickhouse"


def export(
    session: Annotated[
        Path | None, typer.Argument(help="A session's directory. Default: the newest under ./stagetrace-sessions.")
    ] = None,
    to: Annotated[
        To,
        typer.Option(
            help="otlp: to OTEL_EXPORTER_OTLP_ENDPOINT. perfetto: a file for ui.perfetto.dev. chrome: a JSON file for"
            " speedscope or chrome://tracing. prometheus: serve the metrics for a scrape, until Ctrl-C."
            " clickhouse: rows of otel_traces at --url."
        ),
    ] = To.OTLP,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write. Default: the session's name, in this directory."),
    ] = None,
    listen: Annotated[
        str, typer.Option(help="prometheus: HOST:PORT to be scraped at. Nothing but loopback unless you say so.")
    ] = "127.0.0.1:9464",
    url: Annotated[
        str,
        typer.Option(
            envvar="STAGETRACE_CLICKHOUSE_URL",
            help="clickhouse: the server's HTTP interface, http://[USER:PASSWORD@]HOST:8123/DATABASE.",
        ),
    ] = "",
    again: Annotated[
        bool,
        typer.Option("--again", help="otlp: send everything, also what the backend has confirmed; ids are the same."),
    ] = False,
    sample: Annotated[
        str | None,
        typer.Option(
            help="otlp: a share (0.05) of requests and steps, and all that are slow, failed, preempted or among the"
            " first; or your own rules (docs/exporting.md). Default: STAGETRACE_SAMPLE, else everything."
        ),
    ] = None,
    patience: Annotated[
        float,
        typer.Option(min=0, help="otlp: give up when the backend has taken nothing for so many seconds. 0: never."),
    ] = 60.0,
) -> None:
    """Send a session's spans to a backend, from where the last export to it stopped, or write them to a file.

    What a backend has not taken waits in the session: the next call goes on from there. Exit status: 0 when all is
    there, 1 when not, 2 when nothing can be sent.
    """
    # Imported here: the OpenTelemetry SDK takes longer to import than most commands to run.
    import logging

    from rich.console import Console

    from stagetrace.exporters.otel_settings import destination
    from stagetrace.exporters.otlp import OtlpSink
    from stagetrace.exporters.sampling import rules_of
    from stagetrace.exporters.session import Session, SessionError
    from stagetrace.exporters.span_sink import BadSettings

    logging.basicConfig(level=logging.WARNING, format="stagetrace export: %(message)s")
    console = Console(stderr=True)
    wanted = destination(os.environ)
    try:
        rules = rules_of({**os.environ, **({} if sample is None else {"STAGETRACE_SAMPLE": sample})})
    except ValueError as error:
        _fail(str(error))
    if to is To.OTLP and wanted is None:
        _fail("set OTEL_EXPORTER_OTLP_ENDPOINT to where the spans should go, http://127.0.0.1:4317 for example")
    try:
        opened = Session.newest() if session is None else Session.open(session)
        if to is not To.PROMETHEUS:  # it may wait for the first records
            opened.check_tables()
    except SessionError as error:
        _fail(str(error))
    try:
        if to is To.OTLP and wanted is not None:
            _send(opened, OtlpSink.to(wanted, opened.identity.key, rules=rules), wanted, again, patience, console)
        elif to is To.CLICKHOUSE:
            from stagetrace.exporters.clickhouse import ClickHouseSink, Server

            server = Server(url)
            _send(opened, ClickHouseSink(server, opened.identity.key, rules=rules), server, again, patience, console)
    except BadSettings as error:
        _fail(str(error))
    if to is To.PROMETHEUS:
        _serve(opened, listen)
    elif to not in (To.OTLP, To.CLICKHOUSE):
        _write(opened, to, output, console)


def _send(session: Session, sink: SpanSink, wanted: Target, again: bool, patience_s: float, console: Console) -> None:
    import time

    from stagetrace.analysis.step_light import with_light
    from stagetrace.exporters.background import stop_at_signal
    from stagetrace.exporters.follow import Follower, Taken
    from stagetrace.exporters.session import SessionError

    try:
        follower = Follower(session, sink, wanted, enrich=with_light(session))
    except (SessionError, Taken, OSError) as error:
        _fail(str(error))
    told = stop_at_signal(interrupted=True)
    why = ""
    try:
        if again:
            follower.restart()
        follower.remember()
        before = follower.state.sent
        moved_s, moved_to = time.monotonic(), before

        def over() -> bool:
            nonlocal why, moved_s, moved_to
            state = follower.state
            if state.sent != moved_to:
                moved_s, moved_to = time.monotonic(), state.sent
            if state.trouble and state.sent == before and follower.sink.hopeless:
                usual = "it will not without a change: check the endpoint, its protocol, and the credentials"
                why = follower.sink.remedy or usual
            elif state.trouble and patience_s and time.monotonic() - moved_s > patience_s:
                why = f"it has taken nothing for {patience_s:g} s (--patience)"
            return bool(why) or told() or _at_end(follower)

        with console.status(f"exporting to {wanted.target}") as status:

            def progress(now: Follower) -> None:
                waits = f"; {now.state.trouble}" if now.state.trouble else ""
                status.update(f"{now.state.sent} spans sent, {now.waiting} commits to go{waits}")

            follower.follow(over, progress)
    except (SessionError, OSError) as error:
        _fail(str(error))
    finally:
        follower.close()
    state = follower.state
    if why:
        typer.echo(f"stagetrace export: {state.target} does not take the spans: {why} ({state.trouble})", err=True)
    removed = {name: count for name, count in state.left_out.items() if name.endswith("_sampled_out") and count}
    if removed:
        typer.echo("sampled out: " + ", ".join(f"{n} {name.split('_')[0]}" for name, n in sorted(removed.items())))
    refused = f", {state.refused} refused" if state.refused else ""
    typer.echo(f"{state.sent} spans sent to {state.target}{refused}; {follower.waiting} commits wait")
    raise typer.Exit(int(bool(why or follower.waiting or state.refused)))


def _serve(session: Session, listen: str) -> None:
    from stagetrace.analysis.step_light import with_light
    from stagetrace.exporters.background import stop_at_signal
    from stagetrace.exporters.prometheus import serve
    from stagetrace.exporters.session import SessionError

    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        _fail(f"--listen {listen} is not HOST:PORT, 127.0.0.1:9464 for example")

    def ready(port: int) -> None:
        typer.echo(f"metrics of {session.path} at http://{host}:{port}/metrics")

    try:
        serve(session, (host.strip("[]"), int(port)), stop_at_signal(), with_light(session), ready)
    except OSError as error:
        _fail(f"nothing can be scraped at {listen}: {error}; --listen takes another HOST:PORT")
    except SessionError as error:
        _fail(str(error))


def _write(session: Session, to: To, output: Path | None, console: Console) -> None:
    from stagetrace.exporters.background import stop_at_signal
    from stagetrace.exporters.session import SessionError
    from stagetrace.exporters.trace_file import FORMATS, write_trace

    encoder, ending = FORMATS[to]
    path = output or Path(session.path.resolve().name + ending)
    told = stop_at_signal(interrupted=True)
    try:
        with console.status(f"writing {path}") as status:

            def progress(count: int, done: int, of: int) -> bool:
                status.update(f"{path}: {count} events, {done} of {of} commits")
                return told()

            count, left_out = write_trace(session, path, encoder(), progress)
    except (SessionError, OSError) as error:
        typer.echo(f"stagetrace export: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{count} events written to {path}")
    for reason, number in sorted(left_out.items()):
        typer.echo(f"left out: {number} {reason.replace('_', ' ')}")


def _at_end(follower: Follower) -> bool:
    """Whether all that a session has at present was sent; a collector may still be adding to it."""
    return follower.manifest.derived > 0 and not follower.manifest.complete and follower.waiting == 0


def _fail(message: str) -> NoReturn:
    typer.echo(f"stagetrace export: {message}", err=True)
    raise typer.Exit(2)
