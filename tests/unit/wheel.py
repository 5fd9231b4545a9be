"""Builds stagetrace's wheel from a copy of what it is made of, and clean environments to install it into."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]


def project() -> dict[str, Any]:
    """pyproject.toml, read."""
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))


def build_wheel(directory: Path) -> Path:
    """The wheel, built in `directory` as anybody builds it: in isolation, with the build system that is declared."""
    source = directory / "source"
    source.mkdir(parents=True)
    for file in ("pyproject.toml", project()["project"]["readme"]):
        shutil.copy(CHECKOUT / file, source)
    for folder in project()["tool"]["setuptools"]["package-dir"].values():
        shutil.copytree(CHECKOUT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command(sys.executable, "-m", "build", "--wheel", "--outdir", directory, source)
    (wheel,) = directory.glob("*.whl")
    return wheel


def make_environment(directory: Path) -> Path:
    """A virtual environment with nothing in it, pip neither; its Python."""
    venv.create(directory, with_pip=False, symlinks=True)
    return directory / "bin" / "python"


def install(python: Path, wheel: Path) -> None:
    """Installs the wheel without its dependencies, as into a server's environment."""
    command(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)


def site_packages(python: Path) -> Path:
    """Where that environment keeps its packages."""
    (found,) = python.parents[1].glob("lib/python*/site-packages")
    return found


def command(*arguments: str | Path, env: dict[str, str] | None = None) -> str:
    """What a command printed; an AssertionError with all of its output when it failed."""
    done = subprocess.run(
        [str(argument) for argument in arguments],
        env=clean_variables() if env is None else env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
    return done.stdout


def clean_variables() -> dict[str, str]:
    """This process's environment without what arms an engine or leads Python elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("STAGETRACE_", "PYTHON"))}
