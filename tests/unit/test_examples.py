"""The examples: files that are well formed and name what is there, commands that exist, and a notebook that runs.

What they start (Jaeger, the Collector, Tempo, Grafana, a cluster) is not to be had in the tests.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from backends.recorded.keep import rebuilt

from stagetrace.exporters.sampling import rules_of

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(path for ending in ("*.yaml", "*.yml") for path in EXAMPLES.rglob(ending))


def documents(path: Path) -> list[Any]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each is not None]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_a_file_is_well_formed(path: Path) -> None:
    assert documents(path)


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("compose.yaml")), ids=lambda path: path.parent.name)
def test_services_mount_files_that_are_there_and_listen_on_loopback(path: Path) -> None:
    (compose,) = documents(path)
    for name, service in compose["services"].items():
        assert ":" in service["image"].rpartition("/")[2], f"{name}: no version"
        for volume in service.get("volumes", ()):
            assert (path.parent / volume.split(":")[0]).resolve().exists(), volume
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name} listens beyond loopback"
        for other in service.get("depends_on", ()):
            assert other in compose["services"]


def test_the_collectors_pipelines_are_of_what_is_configured() -> None:
    (config,) = documents(EXAMPLES / "collector" / "collector.yaml")
    (compose,) = documents(EXAMPLES / "collector" / "compose.yaml")
    used: dict[str, set[str]] = {"receivers": set(), "processors": set(), "exporters": set()}
    for pipeline in config["service"]["pipelines"].values():
        for kind, names in pipeline.items():
            used[kind] |= set(names)
    assert used == {kind: set(config[kind]) for kind in used}
    hosts = {config["exporters"]["otlp/tempo"]["endpoint"].split(":")[0], "clickhouse"}
    assert hosts <= set(compose["services"])
    assert config["exporters"]["clickhouse"]["traces_table_name"] == "otel_traces"


# Kubernetes


def deployments() -> list[Any]:
    paths = sorted((EXAMPLES / "kubernetes").glob("*.yaml"))
    return [each for path in paths for each in documents(path) if each["kind"] == "Deployment"]


@pytest.mark.parametrize("deployment", deployments(), ids=lambda each: each["metadata"]["name"])
def test_containers_mount_what_is_there_and_share_session_and_rings(deployment: Any) -> None:
    spec = deployment["spec"]["template"]["spec"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    volumes = {volume["name"] for volume in spec["volumes"]}
    rings, mounts = set(), []
    for container in spec["containers"]:
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounted) <= volumes
        mounts.append(mounted)
        variables = {each["name"]: each.get("value") for each in container["env"]}
        rings.add(variables.get("STAGETRACE_RING_DIR"))
        rules_of({name: value for name, value in variables.items() if value})
        if "STAGETRACE_SESSION" in variables:
            collector = spec["containers"][1]["command"]
            assert collector[:3] == ["stagetrace", "collect", variables["STAGETRACE_SESSION"]]
    assert len(rings) == 1, "engine and collector look for rings in one place"
    if len(mounts) > 1:
        for name in ("session", "rings"):
            assert mounts[0][name] == mounts[1][name]


# Commands


def commands() -> list[tuple[str, tuple[str, ...]]]:
    """Each stagetrace command that an example or the page on exporting shows, with its options."""
    found = set()
    pages = [*EXAMPLES.rglob("*.md"), *EXAMPLES.rglob("*.yaml"), EXAMPLES.parent / "docs" / "exporting.md"]
    for page in pages:
        text = re.sub(r"[\[\],\"]", " ", page.read_text())
        for line in re.findall(r"stagetrace +(?:run|collect|export)[^\n`#|]*", text):
            words = line.partition(" -- ")[0].split()
            found.add((words[1], tuple(sorted(word for word in words if word.startswith("--") and word != "--"))))
    return sorted(found)


@pytest.mark.parametrize(("command", "options"), commands(), ids=str)
def test_a_command_has_the_options_that_are_shown(command: str, options: tuple[str, ...]) -> None:
    from typer.main import get_command

    from stagetrace.cli.main import app

    known = {name for each in get_command(app).commands[command].params for name in each.opts}  # type: ignore[attr-defined]
    assert set(options) <= known


# The notebook


def test_the_notebook_runs(tmp_path: Path) -> None:
    session = rebuilt("vllm", tmp_path)
    notebook = json.loads((EXAMPLES / "notebook" / "where_the_time_goes.ipynb").read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6 and not any(cell["outputs"] for cell in cells), "kept without outputs"
    program = tmp_path / "notebook.py"
    program.write_text("\n".join("".join(cell["source"]) for cell in cells))
    environment = {**os.environ, "STAGETRACE_NOTEBOOK_SESSION": str(session.path), "MPLBACKEND": "Agg"}
    command = [sys.executable, "-W", "error::FutureWarning", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "stages:" in done.stdout
