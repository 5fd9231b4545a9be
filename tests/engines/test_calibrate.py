"""Tests of `stagetrace calibrate` with a real torch on this machine's processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stagetrace.analysis.calibration.ceilings import ceilings_of

if TYPE_CHECKING:
    from engines.conftest import Calibrated


def test_every_component_that_was_asked_for_is_measured(calibrated: Calibrated):
    found, said, path = calibrated.found, calibrated.said, calibrated.path
    assert {row.component for row in found.rows} == {"memory", "gemm", "experts", "collective"}
    assert {row.op for row in found.rows if row.component == "memory"} == {"read", "write", "copy"}
    operations = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"}
    assert {row.op for row in found.rows if row.component == "collective"} == operations
    assert {row.arithmetic for row in found.rows if row.component == "gemm"} >= {"fp32", "bf16", "int8"}
    assert found.threads == 1 and found.name and found.other_processors is not None
    assert any("fp8" in name for name in found.skipped)
    assert str(path) in said and "Left out: " in said
    assert path.with_suffix(".svg").read_text().count("</svg>") == 1


def test_the_ceilings_are_those_of_a_processor(calibrated: Calibrated):
    # Bounds that any processor of this century keeps, whatever else runs.
    ceilings = ceilings_of(calibrated.found)
    assert 1e9 < ceilings.peaks["fp32"] < 1e13
    assert ceilings.bandwidth is not None and 1e8 < ceilings.bandwidth < 1e12
    assert ceilings.bandwidths[0][1] >= ceilings.bandwidth
    assert ceilings.link is not None and 1e6 < ceilings.link < 1e11
