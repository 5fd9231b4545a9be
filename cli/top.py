"""`stagetrace top`: a live view of a running session, or one look at it."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from .options import SessionArgument, seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.live import Live

    from stagetrace.exporters.session import Session

_SLICE_S = 0.25  # how long a key, or a new size of the terminal, waits at most


def top(
    session: SessionArgument = None,
    window: Annotated[str, typer.Option(help="What the numbers are of: the last 10s, 1m, ...")] = "10s",
    interval: Annotated[str, typer.Option(help="How often to look.")] = "2s",
    once: Annotated[bool, typer.Option("--once", help="Print what is there now and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: one JSON object.")] = False,
) -> None:
    """Watch a running session: requests, tokens, latencies, steps, stages, KV usage, losses. Ends with q or Ctrl-C."""
    window_s, interval_s = seconds(window), seconds(interval)
    if as_json and not once:
        _fail("--json goes with --once")
    # Imported here: pandas takes longer to import than most commands to run.
    from rich.console import Console

    from stagetrace.analysis.top import look, plain_lines, to_json
    from stagetrace.exporters.session import Session, SessionError

    console = Console(highlight=False)
    try:
        watched = Session.newest() if session is None else Session.open(session)
        if once:
            shown = look(watched, window_s, time.time_ns())
            typer.echo(to_json(shown) if as_json else plain_lines(shown, console.width, console.encoding))
            return
    except SessionError as error:
        _fail(str(error))
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        _fail("the output is no terminal that can show a live view: add --once, or --once --json for a program")
    _watch(watched, window_s, interval_s, console)


def _watch(session: Session, window_s: float, interval_s: float, console: Console) -> None:
    """Shows the session until it is told to stop."""
    from rich.live import Live

    from stagetrace.analysis.top import Screen, look
    from stagetrace.exporters.session import SessionError

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the terminal is put back
    try:
        with _keys(), Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                try:
                    content = Screen(look(session, window_s, time.time_ns()))
                except SessionError as error:  # may pass: a new collector derives the tables again
                    content = Screen(str(error))
                live.update(content, refresh=True)
                if _told_to_end(interval_s, live):
                    return
    except KeyboardInterrupt:
        return


@contextmanager
def _keys() -> Iterator[None]:
    """Lets single keys through as they are typed, where a terminal is typed on."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _told_to_end(wait_s: float, live: Live) -> bool:
    """Waits, and draws anew when the terminal's size changes. Whether q was typed meanwhile."""
    deadline = time.monotonic() + wait_s
    size = live.console.size
    while (left := deadline - time.monotonic()) > 0:
        part = min(left, _SLICE_S)
        if not sys.stdin.isatty():
            time.sleep(part)
        elif select.select([sys.stdin], [], [], part)[0]:
            typed = os.read(sys.stdin.fileno(), 64)
            if not typed or b"q" in typed.lower():  # nothing: the terminal is gone
                return True
        if live.console.size != size:
            size = live.console.size
            live.refresh()
    return False


def _fail(message: str) -> NoReturn:
    typer.echo(f"stagetrace top: {message}", err=True)
    raise typer.Exit(2)
