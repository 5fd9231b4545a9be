"""A real vLLM recorded at level layer, and what holds of every such recording of either engine."""

from __future__ import annotations

import asyncio
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engines.recording import STAGETRACE, Recording, ask, record
from engines.server import environment
from quickstart.load import Request, Result, run_load

from stagetrace.analysis.load import load
from stagetrace.exporters.session import Session
from stagetrace.instrument.stages import BY_ID, BY_NAME, Level

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from stagetrace.analysis.load import Frames

LAYERS, EXPERTS, TOP_K, HIDDEN, TYPE_BYTES = 4, 8, 2, 256, 2  # of the tiny model (examples/quickstart/model.py)
AT_LAYER = ("--level", "layer", "--no-report")
QUESTIONS = [Request(({"role": "user", "content": f"question {number}"},), max_tokens=12) for number in range(4)]


@dataclass
class Recorded:
    """What the tests look at."""

    recording: Recording
    frames: Frames
    results: list[Result]

    def segments(self, stage: str) -> pd.DataFrame:
        """The segments of a stage."""
        segments = self.frames["segments"]
        return segments[segments["stage"] == BY_NAME[stage].id]


def recorded(model: Path, directory: Path, *arguments: str, requests: int = 12, **env: str) -> Recorded:
    """A server at level layer, asked the questions one by one and then under load."""
    with record(model, directory, *arguments, env=env, run=AT_LAYER) as recording:
        server = recording.server
        results = ask(server, *QUESTIONS)
        results += asyncio.run(run_load(server.base_url, server.model, requests=requests, seed=5, concurrency=(4,)))
    assert [result.error for result in results] == [None] * len(results)
    return Recorded(recording, recording.frames(), results)


def assert_whole(one: Recorded) -> None:
    """Nothing was lost, cut or failed, and every step is complete."""
    manifest = one.recording.manifest
    assert manifest.counts["accounting_conflict"] == 0
    assert sum(losses.lost for losses in manifest.losses) == 0
    assert not any(process.errors for process in manifest.processes)
    assert not [hook for process in manifest.processes for hook in process.hooks if hook["status"] in ("out", "error")]
    assert set(one.frames["steps"]["status"]) == {"complete"}


def assert_nested(one: Recorded) -> None:
    """Every segment of a layer is in a step, and inside forward or inside another of a layer."""
    segments = one.frames["segments"]
    level = segments["stage"].map(lambda stage: BY_ID[stage].level)
    layers = segments[level == Level.LAYER]
    assert layers["step"].notna().all()
    parents = segments.set_index(["process", "sequence"])["stage"]
    found = {int(parents[key]) for key in zip(layers["process"], layers["parent"], strict=True)}
    outer = {stage for stage in found if BY_ID[stage].level != Level.LAYER}
    assert outer == {BY_NAME["forward"].id}
    forward = one.segments("forward")
    inside = segments[segments["parent_stage"] == BY_NAME["forward"].id]  # of the garbage collector, too
    spent = (inside["end_ns"] - inside["begin_ns"]).sum()
    assert spent + forward["self_ns"].sum() == (forward["end_ns"] - forward["begin_ns"]).sum()


def by_step(rows: pd.DataFrame) -> pd.Series[int]:
    return rows.groupby(["instance", "step"]).size()


def scheduled(one: Recorded) -> pd.Series[int]:
    """Tokens by step."""
    steps = one.frames["steps"].set_index(["instance", "step"])
    return steps["prefill_tokens"] + steps["decode_tokens"]


def profiled(
    engine_python: Path,
    model: Path,
    directory: Path,
    arguments: Mapping[str, object],
    names: Sequence[str],
    **env: str,
) -> dict[str, float]:
    """The time of segments over that of the profiler's ranges around the same calls, as many and each over 1 ms.

    What vLLM's routers returned is what was counted, layer by layer. `names` are stages, or `rank` for all of a rank's
    step but sampling; `arguments` are those of vLLM's LLM.
    """
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "STAGETRACE_RING_DIR": str(directory / "rings")}
    command = [*STAGETRACE, "run", *AT_LAYER, "--session", str(directory / "session"), "--", str(engine_python)]
    script = str(Path(__file__).with_name("profiled.py"))
    done = subprocess.run(
        [*command, script, str(model), json.dumps(arguments)],
        env=environment({**own, **env}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    ranges, frames = said["ranges"], load(Session.open(directory / "session"))
    counts = frames["experts"].sort_values(["step", "layer"])["counts"]
    assert [[*map(int, row)] for row in counts] == said["chosen"] and len(said["chosen"]) >= 3 * LAYERS
    segments = frames["segments"]
    duration = segments["end_ns"] - segments["begin_ns"]
    ratios = {}
    for name in names:
        stages = ("prepare", "forward") if name == "rank" else (name,)
        mine = segments["stage"].isin([BY_NAME[stage].id for stage in stages])
        count, microseconds = ranges[name]
        assert mine.sum() == count * len(stages)
        assert microseconds / count > 1000, f"a {name} is too short to be compared: {microseconds / count} µs"
        ratios[name] = float(duration[mine].sum() / 1e3 / microseconds)
    print(ratios)
    return ratios
