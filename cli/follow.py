"""stagetrace follow: the export process of a collector; hidden, since `stagetrace collect` and `run` start it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from stagetrace.exporters.session import Session

PATIENCE_S = 1.0  # after the end of the session; less than the collector has (exporters/export_process.py)


def follow(
    session: Annotated[Path, typer.Argument(help="The session's directory.")],
    scrape: Annotated[bool, typer.Option("--scrape", help="Serve its metrics to Prometheus instead.")] = False,
) -> None:
    """Sends a session that is being recorded to where the OTEL_* variables say."""
    # Imported here: the OpenTelemetry SDK takes longer to import than most commands to run.
    from stagetrace.analysis.step_light import with_light
    from stagetrace.exporters.background import Orders
    from stagetrace.exporters.follow import follow_session
    from stagetrace.exporters.otel_settings import destination
    from stagetrace.exporters.sampling import rules_of
    from stagetrace.exporters.session import Session, SessionError
    from stagetrace.exporters.span_sink import BadSettings

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    orders = Orders()

    def told() -> bool:
        orders.look()
        return orders.orphaned or orders.overdue(PATIENCE_S)

    wanted = destination(os.environ)
    try:
        if scrape:
            raise typer.Exit(_scrape(Session.open(session), lambda: told() or orders.overdue(0)))
        counts = destination(os.environ, "metrics")
        opened = Session.open(session)
        rules = rules_of(os.environ)
        status = follow_session(opened, wanted, counts, told, with_light(opened), rules) if wanted else 2
    except (SessionError, BadSettings, ValueError) as error:
        logging.error("%s", error)
        status = 2
    raise typer.Exit(status)


def _scrape(session: Session, told: Callable[[], bool]) -> int:
    """Serves until told; the exit status. Raises SessionError and ValueError."""
    from stagetrace.analysis.step_light import with_light
    from stagetrace.exporters.otel_settings import scrape_address
    from stagetrace.exporters.prometheus import serve

    where = scrape_address(os.environ)
    if where is None:
        return 2
    try:
        serve(session, where, told, with_light(session))
    except OSError as error:
        logging.error("nothing can be scraped at %s:%d: %s; OTEL_EXPORTER_PROMETHEUS_PORT sets another", *where, error)
        return 2
    return 0
