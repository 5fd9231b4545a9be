"""`stagetrace top` in a terminal, as somebody sees it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
from typing import TYPE_CHECKING

from unit.commands import STAGETRACE, Commands, wait_for

if TYPE_CHECKING:
    from pathlib import Path

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """The command in a terminal of so many rows and columns."""

    def __init__(self, commands: Commands, *arguments: str | Path, rows: int = 24, columns: int = 80):
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.settings = termios.tcgetattr(theirs)
        commands.environment = {**commands.environment, "TERM": "xterm"}
        for size in ("COLUMNS", "LINES"):  # else these stand for the terminal's
            commands.environment.pop(size, None)
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
        self.process = commands.start(
            sys.executable, "-c", TAKES_THE_TERMINAL, STAGETRACE, "top", *arguments, **streams
        )
        self.theirs = theirs
        self.output = ""

    def shows(self, text: str) -> bool:
        """Reads on; whether the text has come."""
        while select.select([self.ours], [], [], 0)[0]:
            self.output += os.read(self.ours, 65536).decode("utf-8", "replace")
        return text in self.output

    def screen(self) -> str:
        """The lines that it drew last."""
        self.shows("")
        return _CONTROL.sub("", self.output.rsplit("\x1b[H", 1)[-1]).replace("\r\n", "\n")

    def ended(self) -> int:
        """Its exit status; the terminal is as it was before."""
        wait_for(lambda: self.shows("\0") or self.process.poll() is not None)
        self.shows("")
        assert termios.tcgetattr(self.theirs) == self.settings
        assert self.output.count("\x1b[?1049h") == self.output.count("\x1b[?1049l") == 1
        assert self.output.rindex("\x1b[?1049l") > self.output.rindex("stagetrace top")
        return int(self.process.returncode)


TAKES_THE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
