"""Fuzzed: a caller's trace headers."""

from __future__ import annotations

import re

from fuzz.script import Script

from stagetrace.exporters.assembly.trace_context import parse_trace_context

_HEX = {name: re.compile(f"(?!0+$)[0-9a-f]{{{size}}}") for name, size in (("trace_id", 32), ("parent_span_id", 16))}


def trace_context(data: bytes) -> None:
    """A caller's trace headers: a context whose fields are valid, or none."""
    script = Script(data)
    if script.flag():  # a valid one with something else in its place
        valid = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\nvendor=1"
        at = script.below(len(valid) + 1)
        header = valid[:at] + script.take(script.below(8)).decode("latin-1") + valid[at + script.below(4) :]
    else:
        header = script.rest().decode(script.one_of(("utf-8", "latin-1")), "replace")
    found = parse_trace_context(header)
    if found is None:
        return
    for name, pattern in _HEX.items():
        assert pattern.fullmatch(getattr(found, name)), name
    assert 0 <= found.flags <= 255
    assert found.state is None or (0 < len(found.state) <= 512 and found.state.isascii() and found.state.isprintable())
