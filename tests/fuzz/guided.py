"""One target in a process of its own, for campaign.py.

guided.py TARGET [libFuzzer's arguments]      under libFuzzer, guided by the coverage of our code, until an input fails
guided.py TARGET --plain DIRECTORY ...        every file of some directories, without instrumentation
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

MISSING = 3  # exit status when atheris is not installed; libFuzzer has 70 to 77


def main() -> int:
    logging.disable(logging.CRITICAL)  # warnings of millions of damaged files say nothing
    target, *arguments = sys.argv[1:]
    if arguments and arguments[0] == "--plain":
        from fuzz.targets import TARGETS

        for directory in arguments[1:]:
            for path in sorted(Path(directory).iterdir()):
                TARGETS[target](path.read_bytes())
        return 0
    try:
        import atheris
    except ImportError:
        return MISSING
    with atheris.instrument_imports(include=["stagetrace", "fuzz"]):
        from fuzz.targets import TARGETS
    atheris.Setup([sys.argv[0], *arguments], TARGETS[target])
    atheris.Fuzz()  # ends the process
    return 0


if __name__ == "__main__":
    sys.exit(main())
