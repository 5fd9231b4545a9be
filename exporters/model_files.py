"""Where a model's config.json lies on this machine: a file, a directory, or the Hugging Face cache."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def config_path(model: str | os.PathLike[str], environ: Mapping[str, str] = os.environ) -> Path:
    """The config.json of a model as an engine's --model names it; nothing is downloaded and it may not be there.

    A name of the hub is looked up in its cache: the snapshot that refs/main names, else the only one there is
    (huggingface_hub's documentation, "Understand caching", 2026). Which revision was served is not known.
    """
    path = Path(model)
    if path.is_dir():
        return path / "config.json"
    name = os.fspath(model)
    if path.exists() or not _HUB_NAME.fullmatch(name):
        return path
    repository = _cache(environ) / ("models--" + name.replace("/", "--"))
    try:
        revision = (repository / "refs" / "main").read_text("utf-8").strip()
        found = repository / "snapshots" / Path(revision).name / "config.json"
        if found.is_file():
            return found
    except (OSError, ValueError):
        pass
    snapshots = sorted(repository.glob("snapshots/*/config.json"))
    return snapshots[0] if len(snapshots) == 1 else path


def _cache(environ: Mapping[str, str]) -> Path:
    """The hub's cache, by the variables that huggingface_hub reads."""
    given = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    if given:
        return Path(given)
    home = environ.get("HF_HOME")
    if not home:
        home = os.path.join(environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface")
    return Path(home) / "hub"
