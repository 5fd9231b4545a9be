"""Tests of `stagetrace calibrate` with a real torch on this machine's processor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stagetrace.analysis.calibration.ceilings import ceilings_of
from stagetrace.analysis.calibration.results import Calibration, load

STAGETRACE = [sys.executable, "-m", "stagetrace.cli.main"]


@pytest.fixture(scope="module")
def calibrated(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Calibration, str, Path]:
    """What a quick calibration with one thread and two ranks gave, what it printed, and where it is."""
    path = tmp_path_factory.mktemp("calibration") / "c.json"
    components = [word for name in ("memory", "gemm", "experts", "collective") for word in ("--only", name)]
    command = [*STAGETRACE, "calibrate", "--python", str(engine_python), "--quick", "--threads", "1", "--ranks", "2"]
    command += ["--out", str(path), "--plot", str(path.with_suffix(".svg")), *components]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert found.returncode == 0, found.stderr
    return load(path), found.stdout, path


def test_every_component_that_was_asked_for_is_measured(calibrated: tuple[Calibration, str, Path]):
    found, said, path = calibrated
    assert {row.component for row in found.rows} == {"memory", "gemm", "experts", "collective"}
    assert {row.op for row in found.rows if row.component == "memory"} == {"read", "write", "copy"}
    operations = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"}
    assert {row.op for row in found.rows if row.component == "collective"} == operations
    assert {row.arithmetic for row in found.rows if row.component == "gemm"} >= {"fp32", "bf16", "int8"}
    assert found.threads == 1 and found.name and found.other_processors is not None
    assert any("fp8" in name for name in found.skipped)
    assert str(path) in said and "Left out: " in said
    assert path.with_suffix(".svg").read_text().count("</svg>") == 1


def test_the_ceilings_are_those_of_a_processor(calibrated: tuple[Calibration, str, Path]):
    # Bounds that any processor of this century keeps, whatever else runs.
    ceilings = ceilings_of(calibrated[0])
    assert 1e9 < ceilings.peaks["fp32"] < 1e13
    assert ceilings.bandwidth is not None and 1e8 < ceilings.bandwidth < 1e12
    assert ceilings.bandwidths[0][1] >= ceilings.bandwidth
    assert ceilings.link is not None and 1e6 < ceilings.link < 1e11
