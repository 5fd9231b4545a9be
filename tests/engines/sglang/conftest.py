"""What the tests of SGLang need beside what every engine test does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from engines.conftest import python_of
from quickstart.servers import SGLANG

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """The Python that has SGLang."""
    return python_of(SGLANG)
