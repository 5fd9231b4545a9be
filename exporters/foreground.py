"""Runs a command in the foreground, unchanged: its terminal, its signals, its exit status."""

from __future__ import annotations

import os
import signal
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PASSED_ON = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
}
_WAITED = _PASSED_ON | {signal.SIGCHLD}
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


class CannotStart(Exception):
    """The command could not be started; `status` is what a shell would exit with (126, 127)."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def hold_signals() -> set[signal.Signals]:
    """Blocks what run_in_foreground passes on; returns the mask of before.

    To be called before a library starts threads, which inherit it: a signal to the process is taken by any thread that
    does not block it, and would end the process instead of reaching the command.
    """
    return {signal.Signals(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)}


def run_in_foreground(
    command: list[str],
    environment: Mapping[str, str],
    output: IO[bytes] | None = None,
    *,
    mask: set[signal.Signals] | None = None,
    started: Callable[[int], None] = lambda pid: None,
    tend: Callable[[], None] = lambda: None,
) -> int:
    """Runs `command` to its end; returns its exit status, or minus the number of the signal that ended it.

    Signals that are sent to this process go to the command. Those of the terminal (Ctrl-C) do not: the command is in
    the same process group and has them already, but for a hangup, of which the kernel tells the session's leader alone.
    `output` takes its stdout and stderr. `mask`: what hold_signals() gave, where it was called before. `started` is
    told the command's process; `tend` is called about once a second while it runs. Raises CannotStart.
    """
    held = hold_signals()
    before = held if mask is None else mask
    try:
        if signal.sigpending() & _PASSED_ON - {signal.SIGCONT}:  # it came before there was a command: it is ours
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
        try:
            pid = os.posix_spawnp(
                command[0],
                command,
                environment,
                file_actions=_redirect(output),
                setsigmask=before,
                setsigdef=_IGNORED_BY_PYTHON,
            )
        except FileNotFoundError as error:
            raise CannotStart(f"{command[0]}: no such command", 127) from error
        except OSError as error:
            raise CannotStart(f"{command[0]}: {error.strerror}", 126) from error
        started(pid)
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            info = signal.sigtimedwait(_WAITED, 1.0)
            tend()
            if info is None or info.si_signo == signal.SIGCHLD:
                continue
            by_kernel = info.si_code > 0  # the terminal's; what `kill` sends has a code of 0 or less
            to_us_alone = info.si_signo == signal.SIGHUP and os.getsid(0) == os.getpid()
            if not by_kernel or to_us_alone:
                os.kill(pid, info.si_signo)
        return os.waitstatus_to_exitcode(ended[1])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _redirect(output: IO[bytes] | None) -> list[tuple[int, int, int]]:
    return [(os.POSIX_SPAWN_DUP2, output.fileno(), stream) for stream in (1, 2)] if output else []


def end_as(returncode: int) -> int:
    """The exit status for a command's return code; ends this process by the same signal where one ended the command."""
    if returncode < 0:
        if -returncode != signal.SIGKILL:  # whose action cannot be set
            signal.signal(-returncode, signal.SIG_DFL)
        signal.raise_signal(-returncode)
        return 128 - returncode
    return returncode
