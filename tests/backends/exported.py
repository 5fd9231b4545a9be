"""Exports a whole session through the follower, as `stagetrace export` does, and keeps the spans that were sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stagetrace.exporters.follow import Follower, Target
from stagetrace.exporters.otel_settings import destination
from stagetrace.exporters.otlp import OtlpSink

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stagetrace.exporters.session import Session
    from stagetrace.exporters.span_sink import SpanSink
    from stagetrace.exporters.spans import Span


def export(session: Session, sink: SpanSink, wanted: Target) -> list[Span]:
    """Sends everything, also what was sent before; an AssertionError when not all of it was taken."""
    spans: list[Span] = []
    send = sink.send

    def keep(batch: Sequence[Span]) -> bool:
        taken = send(batch)
        if taken:
            spans.extend(batch)
        return taken

    sink.send = keep  # type: ignore[method-assign]
    follower = Follower(session, sink, wanted)
    follower.restart()
    follower.follow(lambda: bool(follower.state.trouble))
    follower.close()
    assert follower.done and not follower.state.refused, follower.state
    assert len(spans) == follower.state.sent > 0
    return spans


def export_otlp(session: Session, environ: Mapping[str, str], **more: Any) -> list[Span]:
    """The same by OTLP to where the variables say."""
    wanted = destination(environ)
    assert wanted is not None
    return export(session, OtlpSink.to(wanted, session.identity.key, **more), wanted)
