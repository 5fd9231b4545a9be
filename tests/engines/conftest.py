"""What every engine test needs: the engine's environment, the tiny model, and the server's log beside a failure."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from engines.server import LIVE, environment
from quickstart.servers import MODEL_SCRIPT, VLLM, Engine, tail

from stagetrace.analysis.calibration.results import Calibration, load

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path


def python_of(engine: Engine) -> Path:
    """The Python that has the engine. Without it the engine tests fail: nothing else stands in for an engine."""
    if not engine.python.is_file():
        pytest.fail(f"{engine.python} is missing: run `make engines-env`, or `make test`, which does it", pytrace=False)
    return engine.python


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """The Python that has vLLM."""
    return python_of(VLLM)


@pytest.fixture(scope="session")
def model(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mixture of Experts, built once per test run for both engines; the servers' logs lie beside it."""
    directory = tmp_path_factory.mktemp("models") / "model-moe"
    built = subprocess.run(
        [engine_python, MODEL_SCRIPT, directory], env=environment(), capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


@dataclass(frozen=True)
class Calibrated:
    """What a quick calibration with one thread and two ranks gave, what it printed, and where it is."""

    found: Calibration
    said: str
    path: Path


@pytest.fixture(scope="session")
def calibrated(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    """A calibration of this machine's processor, made once per test run."""
    path = tmp_path_factory.mktemp("calibration") / "c.json"
    components = [word for name in ("memory", "gemm", "experts", "collective") for word in ("--only", name)]
    command = [sys.executable, "-m", "stagetrace.cli.main", "calibrate", "--python", str(engine_python), "--quick"]
    command += ["--threads", "1", "--ranks", "2", "--out", str(path), "--plot", str(path.with_suffix(".svg"))]
    found = subprocess.run([*command, *components], capture_output=True, text=True, check=False, timeout=500)
    assert found.returncode == 0, found.stderr
    return Calibrated(load(path), found.stdout, path)


@pytest.fixture(scope="session")
def dense_model(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny dense model: vLLM's data parallelism has no all-to-all for experts on the CPU."""
    directory = tmp_path_factory.mktemp("vllm-dense") / "model-dense"
    built = subprocess.run(
        [engine_python, MODEL_SCRIPT, directory, "--dense"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
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
