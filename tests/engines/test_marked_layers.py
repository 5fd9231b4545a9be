"""Event pairs and marks in the hooks of real engines, on a device that is the host (device/sitecustomize.py)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from engines.layered import AT_LAYER, LAYERS
from engines.recording import complete, record
from quickstart.servers import SGLANG, VLLM, Engine

from stagetrace.instrument.device_marks import MARK_LAYERS, MARKS
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    import pandas as pd

DEVICE = str(Path(__file__).with_name("device"))
MARKED = {"PYTHONPATH": DEVICE, "TRITON_INTERPRET": "1", MARKS: "attention,moe,collective", MARK_LAYERS: "2"}
ENDS = [0, LAYERS - 1]  # the layers that have marks
ARGUMENTS = {"vllm": ("--enforce-eager",), "sglang": ("--skip-server-warmup", "--disable-overlap-schedule")}


def of_stage(segments: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows of a stage."""
    return segments[segments["stage"] == BY_NAME[name].id]


def in_step(rows: pd.DataFrame) -> dict[tuple[int, int, int], list[dict[str, Any]]]:
    """Rows by process, instance and step, in the order of their begins."""
    found: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for row in rows.sort_values("begin_ns").to_dict("records"):
        found.setdefault((row["process"], row["instance"], row["step"]), []).append(row)
    return found


@pytest.mark.parametrize(
    ("engine", "ranks"),
    [(VLLM, 1), *(pytest.param(*each, marks=pytest.mark.matrix) for each in ((SGLANG, 1), (VLLM, 2)))],
    ids=["vllm", "sglang", "vllm, two ranks"],
)
def test_marks_are_around_the_layers_that_were_chosen(engine: Engine, ranks: int, model: Path, tmp_path: Path) -> None:
    """Each step's pair has its layers in it, and each of these the host's own time of the same call."""
    arguments, env = ARGUMENTS[engine.name], {**MARKED}
    if ranks > 1:
        arguments += ("--tensor-parallel-size", str(ranks))
        env["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    with record(model, tmp_path, *arguments, env=env, run=AT_LAYER, engine=engine) as recording:
        for number in range(3):
            answer = complete(recording.server, prompt=f"question {number}", max_tokens=8, temperature=0)
            assert answer["choices"]
    manifest, segments = recording.manifest, recording.frames()["segments"]
    assert manifest.counts["accounting_conflict"] == 0
    assert not any(process.errors for process in manifest.processes)
    said = [process.info["marks"] for process in manifest.processes if "marks" in process.info]
    collectives = ["collective"] if ranks > 1 else []
    for marks in said:
        assert (marks["by"], marks["layers"], marks["errors"]) == ("marks", ENDS, 0)
        assert marks["stages"] == ["attention", "moe", *collectives]
        assert marks["unplaced"] == marks["absent"] == marks["halves"] == marks["repeated"] == marks["backwards"] == 0
    assert len(said) == ranks

    passes = in_step(of_stage(segments, "device_forward"))
    assert len(passes) >= 3 * 8 * ranks and all(len(rows) == 1 for rows in passes.values())
    host = of_stage(segments, "attention")
    for stage in ("attention", "moe", *collectives):
        marked = in_step(of_stage(segments, f"device_{stage}"))
        assert marked.keys() == passes.keys()
        layers = [0, 0] if stage == "collective" else ENDS
        for key, rows in marked.items():
            assert [row["a0"] for row in rows] == layers, "the first layer's two; of the last none say where they end"
            assert all(row["parent_stage"] == BY_NAME["device_forward"].id for row in rows)
            assert all(row["parent"] == passes[key][0]["sequence"] for row in rows)
    inside = in_step(host[host["a0"].isin(ENDS)])
    for key, rows in in_step(of_stage(segments, "device_attention")).items():
        for mine, hosts in zip(rows, inside[key], strict=True):
            assert mine["begin_ns"] - mine["a2"] <= hosts["begin_ns"] <= hosts["end_ns"] <= mine["end_ns"] + mine["a2"]
