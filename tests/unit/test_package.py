"""Tests of the packaging: every package is declared and mapped, and the wheel is whole without anything else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from unit.wheel import (
    CHECKOUT,
    build_wheel,
    clean_variables,
    command,
    install,
    make_environment,
    project,
    site_packages,
)

SETUPTOOLS = project()["tool"]["setuptools"]
BUILT = {"build", "dist", "stagetrace-sessions", "environments"}  # the last has stand-ins for engines' packages


def source_folder(package: str, root: Path = CHECKOUT) -> Path:
    """Where pyproject.toml says that a package's source lies: its own mapping, or its parent's."""
    mapped = SETUPTOOLS["package-dir"]
    if package in mapped:
        return root / mapped[package]
    parent, _, name = package.rpartition(".")
    assert parent, f"{package} is not mapped to a folder"
    return source_folder(parent, root) / name


def folders_with_python() -> set[Path]:
    """Every folder in the checkout that is a package by its __init__.py, hidden and built ones left out."""
    found = set()
    for folder, names, files in os.walk(CHECKOUT):
        names[:] = [name for name in names if not name.startswith(".") and name not in BUILT | {"__pycache__"}]
        if "__init__.py" in files:
            found.add(Path(folder))
    return found


def test_every_package_is_declared_and_mapped():
    declared = SETUPTOOLS["packages"]
    assert len(declared) == len(set(declared))
    assert {source_folder(package) for package in declared} == folders_with_python()


def test_no_module_lies_in_a_folder_that_is_no_package():
    packages = folders_with_python()
    for top in SETUPTOOLS["package-dir"].values():
        for module in (CHECKOUT / top).rglob("*.py"):
            assert module.parent in packages, f"{module} is in no package: __init__.py is missing"


def test_checkout_has_no_package_at_its_root():
    # A root __init__.py beside the mapped folders breaks `python` started in the checkout.
    assert not (CHECKOUT / "__init__.py").exists()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a clean environment that has the wheel and nothing else."""
    directory = tmp_path_factory.mktemp("package")
    python = make_environment(directory / "venv")
    assert not [*site_packages(python).iterdir()]
    install(python, build_wheel(directory / "wheel"))
    return python


def test_wheel_takes_no_other_name_than_its_own(installed: Path):
    found = sorted(entry.name for entry in site_packages(installed).iterdir())
    name, version = project()["project"]["name"], project()["project"]["version"]
    assert found == [name, f"{name}-{version}.dist-info"]


def test_wheel_has_every_module_and_types(installed: Path):
    built_from = installed.parents[2] / "wheel" / "source"
    for package in SETUPTOOLS["packages"]:
        source, target = source_folder(package, built_from), site_packages(installed) / Path(*package.split("."))
        wanted = {file.name for file in source.glob("*.py")}
        if package in SETUPTOOLS["package-dir"]:
            wanted.add("py.typed")
        assert wanted == {file.name for file in target.iterdir() if file.is_file()}, package


def test_entry_points(installed: Path):
    source = """
import json
from importlib.metadata import distribution
print(json.dumps([[each.group, each.name, each.value] for each in distribution("stagetrace").entry_points]))
"""
    found = {tuple(each) for each in json.loads(command(installed, "-I", "-c", source))}
    declared = project()["project"]
    assert found == {
        *(("console_scripts", *script) for script in declared["scripts"].items()),
        *((group, *point) for group, points in declared["entry-points"].items() for point in points.items()),
    }
    assert os.access(installed.with_name("stagetrace"), os.X_OK)


def test_plugin_is_found_and_called_where_nothing_else_is_installed(installed: Path, tmp_path: Path):
    # What an engine does with its entry points; armed, so that all that a hook needs is imported.
    source = """
import sys
from importlib.metadata import entry_points
(point,) = entry_points(group="vllm.general_plugins", name="stagetrace")
point.load()()
import stagetrace.instrument.recorder
from stagetrace.adapters.installing import install
hooks = install("stagetrace.adapters.vllm").hooks
print([type(finder).__name__ for finder in sys.meta_path].count("Hooks"), {hook.status for hook in hooks})
"""
    session = {**clean_variables(), "STAGETRACE_SESSION": str(tmp_path / "session")}
    assert command(installed, "-I", "-c", source, env=session).strip() in (
        "1 {'waiting', 'left out'}",
        "1 {'left out', 'waiting'}",
    )


def test_command_is_the_console_script_of_the_wheel(installed: Path):
    # Its dependencies are not here: it gets as far as the first of them, through stagetrace's own modules.
    source = "import stagetrace.cli.main"
    with pytest.raises(AssertionError, match="No module named 'typer'"):
        command(installed, "-I", "-c", source)
