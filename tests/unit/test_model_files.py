"""Tests that a model's config.json is found where engines find their models, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagetrace.exporters.model_files import config_path


def snapshot(cache: Path, revision: str, name: str = "models--org--model") -> Path:
    directory = cache / name / "snapshots" / revision
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory / "config.json"


def test_a_directory_and_a_file(tmp_path: Path):
    assert config_path(tmp_path) == tmp_path / "config.json"
    file = tmp_path / "other.json"
    file.write_text("{}")
    assert config_path(file) == file
    assert config_path(str(tmp_path / "gone")) == tmp_path / "gone"


@pytest.mark.parametrize(
    ("variable", "below"),
    [("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_a_name_of_the_hub_in_its_cache(tmp_path: Path, variable: str, below: str):
    environ = {variable: str(tmp_path)}
    assert config_path("org/model", environ) == Path("org/model")
    only = snapshot(tmp_path / below, "aaa")
    assert config_path("org/model", environ) == only
    main = snapshot(tmp_path / below, "bbb")
    assert config_path("org/model", environ) == Path("org/model")  # one of two, and nothing says which
    refs = tmp_path / below / "models--org--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("bbb\n")
    assert config_path("org/model", environ) == main
    (refs / "main").write_text("../../../../etc")
    assert config_path("org/model", environ) == Path("org/model")


def test_what_is_no_name_of_the_hub_is_not_looked_up(tmp_path: Path):
    snapshot(tmp_path, "aaa", "models--..--..--x")
    for name in ("../../x", "a/b/c", "s3://bucket/x", "/nowhere/x", "a\0b"):
        assert config_path(name, {"HF_HUB_CACHE": str(tmp_path)}) == Path(name)
