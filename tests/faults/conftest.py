"""What the tests with a real engine need: its environment, the tiny model, and the server's log beside a failure."""

from __future__ import annotations

from engines.conftest import engine_python, model, pytest_runtest_makereport

__all__ = ["engine_python", "model", "pytest_runtest_makereport"]
