"""What every engine test needs: the engine's environment, the tiny model, and the server's log beside a failure."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from engines.server import LIVE, environment
from quickstart.vllm_server import ENGINE_PYTHON, MODEL_SCRIPT, tail

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """The Python that has vLLM. Without it the engine tests fail: nothing else stands in for an engine."""
    if not ENGINE_PYTHON.is_file():
        pytest.fail(f"{ENGINE_PYTHON} is missing: run `make engines-env`, or `make test`, which does it", pytrace=False)
    return ENGINE_PYTHON


@pytest.fixture(scope="session")
def model(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mixture of Experts, built once per test run; the servers' logs lie beside it."""
    directory = tmp_path_factory.mktemp("vllm") / "model-moe"
    built = subprocess.run(
        [engine_python, MODEL_SCRIPT, directory], env=environment(), capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the log of every running server to a failure's report (a server of a fixture outlives the test)."""
    report = yield
    if report.failed:
        for server in LIVE:
            report.sections.append((f"the end of {server.log}", tail(server.log, 80)))
    return report
