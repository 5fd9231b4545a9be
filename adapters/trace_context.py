"""A request's trace context: from its HTTP headers, from what the engine was given, or from around the call."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.ids import request_span_id, request_trace_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stagetrace.instrument.recorder import Recorder


def of_headers(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The traceparent and tracestate of ASGI headers (pairs of bytes), on a line each; empty without a traceparent."""
    found = {name: value for name, value in headers if name in (b"traceparent", b"tracestate")}
    if b"traceparent" not in found:
        return ""
    return b"\n".join((found[b"traceparent"], found.get(b"tracestate", b""))).decode("latin-1")


def of_mapping(headers: Mapping[str, str] | None) -> str:
    """The same of the headers that a request to an engine can carry, in any case."""
    found = {name.lower(): value for name, value in (headers or {}).items()}
    return f"{found['traceparent']}\n{found.get('tracestate', '')}" if "traceparent" in found else ""


def of_surroundings() -> str:
    """The same where a request came by a call: of the OpenTelemetry span that is current there, if the caller uses
    OpenTelemetry, else of the variables TRACEPARENT and TRACESTATE.
    """
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is not None:
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
            return f"{parent}\n{context.trace_state.to_header()}"
    parent = os.environ.get("TRACEPARENT", "")
    return f"{parent}\n{os.environ.get('TRACESTATE', '')}" if parent else ""


def of_our_own(recorder: Recorder, request: int, root: int) -> dict[str, str]:
    """Headers that name our span of a request (its handle) as the parent; `root`: the handle that its trace has its id
    from. vLLM's own span of a request that came without a context is then in the same trace as ours.
    """
    trace, span = request_trace_id(recorder.key, root), request_span_id(recorder.key, request)
    return {"traceparent": f"00-{trace.hex()}-{span.hex()}-01"}
