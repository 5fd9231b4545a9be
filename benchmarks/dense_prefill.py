"""How near a prefill that is all matrix products comes to what calibrate measured, and where the rest goes.

    .venv/bin/python benchmarks/dense_prefill.py [--json] [--quick] [--python ENGINE_PYTHON] [--calibration FILE]

It calibrates this machine's processor with one thread, has vLLM compute prompts of a dense model that is larger than
the quickstart's (made-up weights, nothing is downloaded) under `stagetrace run --level layer`, and prints what each
stage reaches of its ceiling, what it lacks as a share of the step, and what the gap is made of.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples" / "quickstart"))

import measure
import servers

from stagetrace.analysis.load import load
from stagetrace.analysis.show import duration_text, rate_text, share_text
from stagetrace.analysis.speed_of_light import MEASURED, SpeedOfLight, speed_of_light
from stagetrace.exporters.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stagetrace.analysis.speed_of_light import Done

STAGETRACE = (sys.executable, "-m", "stagetrace.cli.main")
COMPONENTS = ("memory", "gemm", "attention")
WARM_UP = 1  # prompts that are not measured: first uses of kernels and memory
# Layers of Qwen3-1.7B's shape (its config.json, Qwen, 2025), few of them and a small vocabulary, so that a step takes
# seconds and not minutes.
MODEL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 4,
    "vocab_size": 1024,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "hidden_act": "silu",
    "attention_bias": False,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}
LENGTHS, QUICK_LENGTHS = (2048, 2048, 2048, 2048, 2048, 2048, 1024, 1024, 1024), (512, 512)


class Failed(Exception):
    """It cannot be measured; the message says why."""


def run(command: Sequence[str], **env: str) -> None:
    """Raises Failed with the end of what it said."""
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command[:4])} ... failed:\n{(done.stdout + done.stderr)[-3000:]}")


def calibrated(python: str, directory: Path, quick: bool) -> Path:
    """A calibration with one thread."""
    path = directory / "calibration.json"
    only = [word for name in COMPONENTS for word in ("--only", name)]
    command = [*STAGETRACE, "calibrate", "--python", python, "--threads", "1", "--out", str(path), *only]
    run([*command, *(["--quick"] if quick else [])])
    return path


def recorded(python: str, directory: Path, lengths: Sequence[int]) -> Session:
    """The prompts, under `stagetrace run`."""
    model, session = directory / "model", directory / "session"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    command = [*STAGETRACE, "run", "--no-report", "--level", "layer", "--session", str(session), "--", python]
    program = Path(__file__).with_name("prefill_load.py")
    one = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    run([*command, str(program), str(model), *map(str, lengths)], **{**servers.VLLM.environment(), **one})
    return Session.open(session)


def lights_of(session: Session, calibration: Path) -> list[SpeedOfLight]:
    """Of the measured prompts' steps, each by itself, the one nearest to its ceiling first."""
    frames = load(session)
    steps = frames["steps"].sort_values("begin_ns").iloc[WARM_UP:]
    if set(steps["phase"]) != {"prefill"} or set(steps["status"]) != {"complete"}:
        raise Failed(f"steps are not complete prefills: {steps[['phase', 'status']].value_counts().to_dict()}")
    rest = (frames["segments"], frames["requests"], frames["experts"])
    kept = session.model_config
    lights = [
        speed_of_light(frames.manifest, steps.iloc[[number]], *rest, kept, None, calibration)
        for number in range(len(steps))
    ]
    return sorted(lights, key=lambda light: -(light.phases["prefill"].share(MEASURED) or 0.0))


def figures_of(lights: Sequence[SpeedOfLight]) -> dict[str, Any]:
    """What is printed, as numbers: of the best step, what else ran being in the others."""
    light = lights[0]
    step = light.phases["prefill"]
    assert step.time_ns and step.gap
    stages = {name: done for name, done in light.stages.items() if done.time_ns}
    return {
        "steps": len(lights),
        "of_light_by_step": [light.phases["prefill"].share(MEASURED) for light in lights],
        "step_ms": step.time_ns / step.count / 1e6,
        "operations_per_s": step.operations_per_s,
        "of_light": step.share(MEASURED),
        "mfu": step.mfu(MEASURED),
        "mbu": step.mbu(MEASURED),
        "stages": {
            name: {
                "of_step": (done.time_ns or 0) / step.time_ns,
                "of_light": done.share(MEASURED),
                "lacks_of_step": lacks(done) / step.time_ns,
                "operations_per_s": done.operations_per_s,
            }
            for name, done in stages.items()
        },
        "gap_of_step": step.gap.total_ns / step.time_ns,
        "gap": {name: None if ns is None else ns / step.time_ns for name, ns in step.gap.parts.items()},
        "peaks": light.ceilings[MEASURED].peaks,
        "notes": list(light.notes),
    }


def lacks(done: Done) -> float:
    """What a stage took beyond its least time, ns."""
    return (done.time_ns or 0) - (done.roofs[MEASURED].whole_ns or 0.0)


def show(lights: Sequence[SpeedOfLight], figures: dict[str, Any]) -> None:
    """Prints the tables."""
    console = measure.console()
    light = lights[0]
    step = light.phases["prefill"]
    assert step.time_ns and step.gap
    rows = [
        [
            name,
            duration_text((done.time_ns or 0) / done.count),
            share_text((done.time_ns or 0) / step.time_ns),
            rate_text(done.operations_per_s, "/s"),
            share_text(done.mfu(MEASURED)),
            share_text(done.mbu(MEASURED)),
            share_text(done.share(MEASURED)),
            share_text(lacks(done) / step.time_ns),
        ]
        for name, done in [("the whole step", step), *light.stages.items()]
        if done.time_ns
    ]
    columns = ("stage", "time/step", "of the step", "operations", "MFU", "MBU", "of ceiling", "lacks, of the step")
    every = ", ".join(share_text(share) for share in figures["of_light_by_step"])
    console.print(f"{len(lights)} prompts; of their ceilings: {every}. The first of these:")
    console.print(f"ceilings: {light.ceilings[MEASURED].source}")
    console.print(measure.table("a prefill by stage", columns, rows))
    parts = [[name, "not told" if share is None else share_text(share)] for name, share in figures["gap"].items()]
    console.print(f"the gap, {share_text(figures['gap_of_step'])} of the step, is made of")
    console.print(measure.table("", ("part", "of the step"), parts))
    for note in light.notes:
        console.print(note)


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measure.add_options(parser)
    parser.add_argument("--python", default=str(servers.VLLM.python), help="the Python that has vLLM and torch")
    parser.add_argument("--calibration", type=Path, help="a calibration of this processor with one thread, to take")
    given = parser.parse_args()
    about = measure.machine()
    with tempfile.TemporaryDirectory(prefix="stagetrace-prefill-") as name:
        directory = Path(name)
        try:
            calibration = given.calibration or calibrated(given.python, directory, given.quick)
            session = recorded(given.python, directory, QUICK_LENGTHS if given.quick else LENGTHS)
            lights = lights_of(session, calibration)
        except Failed as error:
            print(error, file=sys.stderr)
            return 1
    figures = figures_of(lights)
    print(measure.machine_line(about))
    show(lights, figures)
    if given.json:
        measure.print_json({**about, **figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
