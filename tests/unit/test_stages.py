"""Tests of the vocabulary's invariants, and that its page is the one that it gives."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stagetrace.instrument.stages import (
    BY_ID,
    BY_NAME,
    MAX_ATTRIBUTES,
    STAGES,
    STEP_COMPOSITION,
    Kind,
    Level,
    Phase,
    Stage,
    Timeline,
    Unit,
    phase,
)

GENERATE = Path(__file__).parents[2] / "docs" / "generate.py"


def test_ids_and_names_are_unique():
    assert len(BY_ID) == len(BY_NAME) == len(STAGES)
    assert len({attribute.name for attribute in STEP_COMPOSITION}) == len(STEP_COMPOSITION)


def test_ids_fit_their_column():
    assert all(0 < stage.id < 2**15 for stage in STAGES)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_stage_is_whole(stage: Stage):
    assert stage.name.replace("_", "").isalpha() and stage.name == stage.name.lower()
    assert stage.means.strip() and stage.does_not_mean.strip()
    assert stage.level > Level.OFF
    assert len(stage.attributes) <= MAX_ATTRIBUTES
    assert len({attribute.name for attribute in stage.attributes}) == len(stage.attributes)
    assert all(attribute.means.strip() and isinstance(attribute.unit, Unit) for attribute in stage.attributes)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_parents_exist_and_can_hold_it(stage: Stage):
    for name in stage.inside:
        parent = BY_NAME[name]
        assert parent.level <= stage.level, "a parent is recorded wherever its child is"
        assert name != stage.name
        if stage.kind is Kind.STATE:
            assert parent.timeline is Timeline.REQUEST
        if stage.kind is Kind.SEGMENT:
            assert parent.timeline is not Timeline.REQUEST


def test_every_chain_of_parents_ends():
    for stage in STAGES:
        seen, front = set(), {stage.name}
        while front:
            seen |= front
            front = {parent for name in front for parent in BY_NAME[name].inside}
            assert stage.name not in front


@pytest.mark.parametrize(
    ("prefill", "decode", "kind"),
    [(5, 0, Phase.PREFILL), (0, 5, Phase.DECODE), (5, 5, Phase.MIXED), (0, 0, Phase.DECODE)],
)
def test_phase(prefill: int, decode: int, kind: Phase):
    assert phase(prefill, decode) is kind


def test_page_is_current():
    done = subprocess.run([sys.executable, GENERATE, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_check_finds_a_stale_page(tmp_path: Path):
    copy = tmp_path / "generate.py"
    shutil.copy(GENERATE, copy)
    changes = {
        "comparison.md": ("| `tpot_p95` | ns | lower |", "| `tpot_p95` | ns | higher |"),
        "stages.md": ("`emit`", "`emits`"),
        "speed-of-light.md": ("989.5", "1979"),
        "compatibility.md": ("| lost |", "| yes |"),
        "diagnosis.md": ("never a promise", "a promise"),
    }
    for name, change in changes.items():
        for page in GENERATE.parent.glob("*.md"):
            shutil.copy(page, tmp_path / page.name)
        assert subprocess.run([sys.executable, copy, "--check"], check=False).returncode == 0
        current = (tmp_path / name).read_text("utf-8")
        assert change[0] in current
        for stale in (None, current.replace(*change)):
            (tmp_path / name).unlink(missing_ok=True)
            if stale is not None:
                (tmp_path / name).write_text(stale, encoding="utf-8")
            done = subprocess.run([sys.executable, copy, "--check"], capture_output=True, text=True, check=False)
            assert done.returncode == 1
            assert f"{name} is stale" in done.stderr and done.stderr.count("is stale") == 1


def test_page_names_everything():
    spec = importlib.util.spec_from_file_location("generate", GENERATE)
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    rows = [line for line in generate.stages_page().splitlines() if line.startswith("| ")]
    for stage in STAGES:
        (row,) = [row for row in rows if row.startswith(f"| {stage.id} | `{stage.name}` |")]
        assert stage.means in row and stage.does_not_mean in row
        for attribute in stage.attributes:
            assert f"`{attribute.name}` (`{attribute.unit.value}`): {attribute.means}" in row
    for attribute in STEP_COMPOSITION:
        assert f"| `{attribute.name}` | `{attribute.unit.value}` | {attribute.means} |" in rows
