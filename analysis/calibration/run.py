"""Runs the program that measures in the environment that has torch, and takes in what it says."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from .measure import MODULE, Asked
from .results import Calibration, CalibrationError, Row

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_S = 3600.0
_LAST_WORDS = 12


def calibrate(python: str, asked: Asked, progress: Callable[[str, int, int], None]) -> Calibration:
    """Measures; `progress` is told what is being measured, how many cases are done, and of how many.

    Raises CalibrationError when `python` cannot be run, has no torch, or sees no such device.
    """
    found = Calibration({}, [], quick=asked.quick, made_ns=time.time_ns())
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                [python, "-P", "-m", MODULE, json.dumps(asdict(asked))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        except OSError as error:
            raise CalibrationError(
                f"cannot run {python}: {error.strerror}. Name a Python that has torch: --python ENVIRONMENT/bin/python"
            ) from error
        overdue = threading.Timer(PATIENCE_S, process.kill)
        overdue.start()
        complete = False
        try:
            assert process.stdout is not None
            for line in process.stdout:
                complete = _take(json.loads(line), found, progress) or complete
            ended = process.wait()
        finally:
            overdue.cancel()
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        if not complete or not found.rows:
            raise CalibrationError(_failure(python, ended, errors))
    return found


def _take(said: dict[str, Any], found: Calibration, progress: Callable[[str, int, int], None]) -> bool:
    """Takes in one line. Whether it was the last."""
    if "unusable" in said:
        raise CalibrationError(f"{said['unusable']}. Name another with --device, or another Python with --python")
    if "device" in said:
        found.device = said["device"]
    elif "doing" in said:
        progress(said["doing"], said["done"], said["of"])
    elif "row" in said:
        found.rows.append(Row(**said["row"]))
    elif "skipped" in said:
        found.skipped[said["skipped"]] = said["why"]
    elif "end" in said:
        found.other_processors = said["end"]["other_processors"]
        return True
    return False


def _failure(python: str, ended: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    words = errors.read().decode("utf-8", "replace").splitlines()[-_LAST_WORDS:]
    if words and "No module named 'torch'" in words[-1]:
        return f"{python} has no torch: name a Python that has, as that of the engine: --python ENVIRONMENT/bin/python"
    if words and "No module named" in words[-1] and "stagetrace" in words[-1]:
        return f"{python} has no stagetrace, or an older one: install it there ({python} -m pip install --no-deps ...)"
    how = f"was ended by a signal ({signal.strsignal(-ended)})" if ended < 0 else f"ended with exit status {ended}"
    said = "\n".join(["; the last that it said:", *words]) if words else " and said nothing"
    return f"the measurement with {python} {how}{said}"
