"""What is fuzzed: one function per parser of outside input, from any bytes.

Each returns, or an AssertionError says what went wrong; the errors that a parser documents are contained in it, every
other exception is a finding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fuzz.assembled import experts, stream, text
from fuzz.headers import trace_context
from fuzz.rings import ring
from fuzz.stored import session_files, session_tables, session_taken_up

if TYPE_CHECKING:
    from collections.abc import Callable

TARGETS: dict[str, Callable[[bytes], None]] = {
    "ring": ring,
    "stream": stream,
    "experts": experts,
    "text": text,
    "trace_context": trace_context,
    "session_files": session_files,
    "session_tables": session_tables,
    "session_taken_up": session_taken_up,
}
