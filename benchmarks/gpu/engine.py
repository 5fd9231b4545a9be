"""Device time of a real vLLM on a GPU against torch.profiler's, and what arming it costs a decode step.

    python benchmarks/gpu/engine.py [--json] [--quick] [--models dense,moe] [--modes eager,graphs,compiled]
                                    [--marks attention,moe] [--mark-layers N] [--keep DIR]

For each model and mode two engines run at once, one of them under `stagetrace run`, the other as it is. Both decode the
same batches in turn; then the recorded one decodes under the profiler, and what stagetrace recorded of the device in
these steps is laid beside the kernels that ran. The models have random weights and need no download. With --marks it
records at level layer, and what marks tell of single layers, in graphs as well, is compared too.

It needs a CUDA or HIP device and a Python that has vLLM and stagetrace's dependencies; where stagetrace itself is not
installed, the checkout that this lies in is lent. Exit status 1: an engine failed or nothing could be compared;
2: there is no such device, or something is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from contextlib import ExitStack, contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from figures import (
    Agreement,
    Compared,
    Misfit,
    Quartiles,
    Span,
    agreement,
    compared,
    kernels_of,
    microseconds,
    quartiles,
    steps_of,
    stretches,
    table,
)
from served import BEGINS, ENDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

CHECKOUT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
WIDTH, PROMPT = 16, 64  # requests at once; tokens of each prompt
TOKENS, PROFILED = 128, 32  # of each request, in a round; under the profiler
ROUNDS = 12
START_S, END_S = 300.0, 60.0  # for an engine to start and for an answer; to end
STAGES = ("device_forward", "device_sample")
NEEDED = ("vllm", "torch", "pyarrow", "pandas", "typer", "rich", "opentelemetry.sdk", "grpc", "requests")
NO_GPU = (
    "{why}. What to do: run it where there is a CUDA or HIP device, with a Python that has vLLM for it and stagetrace's"
    " dependencies (pip install of the checkout brings those): python benchmarks/gpu/engine.py."
)
_ATTENTION = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": _ATTENTION
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 16,
        "intermediate_size": 6144,
    },
    "moe": _ATTENTION
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 12,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
_SIZES = [1, 2, 4, 8, 16]
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {  # full ones of decode, without the compiler
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": _SIZES}
    },
    "compiled": {"compilation_config": {"cudagraph_capture_sizes": _SIZES}},  # else as vLLM has it by default
}
SETTINGS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "max_num_seqs": WIDTH,
    "max_num_batched_tokens": 2048,
    "enable_prefix_caching": False,
    "gpu_memory_utilization": 0.4,  # two run at once
    "kv_cache_memory_bytes": 2 << 30,
    "worker_extension_cls": "served.Profiled",
}


class Failed(Exception):
    """It cannot be measured; the message says why."""


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="few rounds: whether it runs, no figures to keep")
    parser.add_argument("--models", default=",".join(MODELS), help="which models, with commas between")
    parser.add_argument("--modes", default=",".join(MODES), help="how vLLM runs them, with commas between")
    parser.add_argument("--marks", default="", help="marks around these parts of layers; recorded at level layer then")
    parser.add_argument("--mark-layers", type=int, default=4, help="in so many layers")
    parser.add_argument("--settings", default="{}", help="further arguments of vllm.LLM, as a JSON object")
    parser.add_argument("--keep", type=Path, help="keep sessions, logs and profiles in this new directory")
    options = parser.parse_args()
    chosen = []
    for name, known in (("models", MODELS), ("modes", MODES)):
        values = getattr(options, name).split(",")
        if not set(values) <= set(known):
            parser.error(f"--{name} takes some of {','.join(known)}, not {getattr(options, name)}")
        chosen.append(values)
    try:
        further = json.loads(options.settings)
    except ValueError as error:
        parser.error(f"--settings: {error}")
    if not isinstance(further, dict):
        parser.error("--settings takes a JSON object")
    why = missing()
    if why:
        print(NO_GPU.format(why=why), file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the engines are to end with it
    with ExitStack() as closing:
        folder = options.keep or Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="stagetrace-gpu-")))
        folder.mkdir(parents=True, exist_ok=True)
        lent = lend(Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="stagetrace-lent-"))))
        marks = ("--level", "layer", "--marks", options.marks, "--mark-layers", str(options.mark_layers))
        run = marks if options.marks else ()
        found = measure(*chosen, further, ROUNDS // 4 if options.quick else ROUNDS, folder.resolve(), lent, run)
        show(found)
        if options.json:
            print(json.dumps(found))
    return 1 if found["failed"] or not all(each["compared"] for each in found["runs"]) else 0


def missing() -> str:
    """What this machine or Python lacks; empty: nothing. The device is asked for in another process.

    An engine that is forked from one that uses the device could not use it.
    """
    for name in NEEDED:
        try:
            there = find_spec(name) is not None
        except ImportError:
            there = False
        if not there:
            return f"This Python has no {name}"
    ask = "import torch; print(torch.cuda.is_available())"
    asked = subprocess.run([sys.executable, "-c", ask], check=False, capture_output=True)
    return "" if asked.stdout.strip().endswith(b"True") else "PyTorch finds no GPU here"


def lend(folder: Path) -> str:
    """Makes the checkout's packages importable, and its plugin known, where stagetrace is not installed.

    What processes are to have in their PYTHONPATH for it; empty where it is installed.
    """
    if any(entry.name == "stagetrace" for entry in metadata.entry_points(group="vllm.general_plugins")):
        return ""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))
    (folder / "stagetrace").mkdir()
    for package, source in project["tool"]["setuptools"]["package-dir"].items():
        if package.count(".") == 1:
            (folder / package.replace(".", "/")).symlink_to(CHECKOUT / source)
    said = folder / f"stagetrace-{project['project']['version']}.dist-info"
    said.mkdir()
    (said / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: stagetrace\nVersion: {project['project']['version']}\n"
    )
    points = project["project"]["entry-points"]
    (said / "entry_points.txt").write_text(
        "".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in each.items()) for group, each in points.items())
    )
    sys.path.insert(0, str(folder))
    return str(folder)


# Engines


class Engine:
    """An engine in processes of its own; `ask` it for what served.Served can do."""

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: dict[str, Any],
        lent: str,
        session: Path | None = None,
        run: Sequence[str] = (),
    ):
        """`run` are options of `stagetrace run`, for one that is recorded into a session."""
        self._log = folder / f"{name}.log"
        self._file: Any = None
        address = Path(tempfile.mkdtemp(prefix="stagetrace-ask-")) / "socket"  # a socket's path has to be short
        self._folder = address.parent
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(address))
        self._listener.listen(1)
        self._listener.settimeout(1.0)
        command = [sys.executable, str(HERE / "served.py"), str(address), json.dumps(settings)]
        if session is not None:
            command = [*_STAGETRACE, "run", "--no-report", "--session", str(session), *run, "--", *command]
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (lent, str(HERE), os.environ.get("PYTHONPATH")))),
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def ready(self) -> dict[str, Any]:
        """Waits until it is; what runs there. Raises Failed."""
        until = time.monotonic() + START_S
        while self._file is None:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                if self._process.poll() is not None or time.monotonic() > until:
                    raise Failed(f"an engine did not start; the end of its log:\n{self._tail()}") from None
            else:
                connection.settimeout(START_S)
                self._file = connection.makefile("rw", encoding="utf-8")
        return self._answer()

    def ask(self, what: str, **values: Any) -> dict[str, Any]:
        """What it answers. Raises Failed."""
        self._file.write(json.dumps({"ask": what, **values}) + "\n")
        self._file.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._file.readline()
        except TimeoutError:
            line = ""
        found = json.loads(line) if line else {"error": "no answer"}
        if "error" in found:
            why = str(found["error"]).strip()
            raise Failed(f"{why.splitlines()[-1]}\n{why}\nThe end of the engine's log:\n{self._tail()}")
        return dict(found)

    def _tail(self) -> str:
        return "\n".join(self._log.read_text("utf-8", "replace").splitlines()[-60:])

    def close(self) -> None:
        """Ends it: when nobody asks any more it ends by itself, and its collector after it."""
        if self._file is not None:
            self._file.close()
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number is not None:
                os.killpg(self._process.pid, number)
            try:
                self._process.wait(END_S if self._file is not None else 5.0)
                return
            except subprocess.TimeoutExpired:
                continue


_STAGETRACE = (sys.executable, "-m", "stagetrace.cli.main")


@contextmanager
def engines(
    folder: Path, settings: dict[str, Any], session: Path, lent: str, run: Sequence[str]
) -> Iterator[tuple[Engine, Engine]]:
    """One as it is, and one that is recorded, both still starting; ended on leaving."""
    with ExitStack() as closing:
        started = []
        for name, recorded in (("plain", None), ("recorded", session)):
            started.append(Engine(folder, name, settings, lent, recorded, run))
            closing.callback(started[-1].close)
        yield started[0], started[1]


# Measurements


def measure(
    models: Sequence[str],
    modes: Sequence[str],
    further: dict[str, Any],
    rounds: int,
    folder: Path,
    lent: str,
    run: Sequence[str],
) -> dict[str, Any]:
    """Everything, as one object."""
    found: dict[str, Any] = {"runs": [], "failed": {}}
    for model in models:
        described = folder / model
        described.mkdir(exist_ok=True)
        (described / "config.json").write_text(json.dumps(MODELS[model]))
        for mode in modes:
            place = folder / f"{model}-{mode}"
            place.mkdir()
            print(f"{model}, {mode} ...", file=sys.stderr, flush=True)
            settings = SETTINGS | MODES[mode] | {"model": str(described)} | further
            try:
                found["runs"].append({"model": model, "mode": mode} | one(place, settings, rounds, lent, run))
            except Failed as error:
                found["failed"][f"{model}, {mode}"] = str(error)
                print(error, file=sys.stderr, flush=True)
            (folder / "found.json").write_text(json.dumps(found))  # so far: one that is stopped has something to show
    return found


def one(folder: Path, settings: dict[str, Any], rounds: int, lent: str, run: Sequence[str]) -> dict[str, Any]:
    """One model in one mode. Raises Failed."""
    session, profile = folder / "session", folder / "profile.json"
    load = {"width": WIDTH, "prompt": PROMPT}
    with engines(folder, settings, session, lent, run) as (plain, recorded):
        info = [engine.ready() for engine in (plain, recorded)][1]
        for engine in (plain, recorded, plain, recorded):  # a kernel is compiled when it is first needed
            engine.ask("generate", **load, tokens=TOKENS)
        took: dict[str, list[float]] = {"plain": [], "recorded": []}
        for number in range(rounds):
            both = [("plain", plain), ("recorded", recorded)]
            for name, engine in both[:: -1 if number % 2 else 1]:
                took[name].append(engine.ask("generate", **load, tokens=TOKENS)["seconds"] / TOKENS)
        profiled = recorded.ask("profile", **load, tokens=PROFILED, path=str(profile))
        device = recorded.ask("device")
    ratios = [100 * (have / lack - 1) for have, lack in zip(took["recorded"], took["plain"], strict=True)]
    return {
        "info": info,
        "step_ns": vars(quartiles([1e9 * each for each in took["plain"]])),
        "cost_pct": vars(quartiles(ratios)),
        "profiled": profiled,
        "device": device,
    } | beside(session, profile, profiled["offset_ns"])


def beside(session: Path, profile: Path, offset: int) -> dict[str, Any]:
    """What was recorded of the device beside the profile, and what the session says of it. Raises Failed."""
    from stagetrace.analysis.load import load
    from stagetrace.analysis.report import summarise
    from stagetrace.analysis.show_device import device_dict
    from stagetrace.exporters.session import Session, SessionError
    from stagetrace.instrument.stages import BY_NAME

    trace = json.loads(profile.read_text("utf-8"))
    kernels = stretches(trace, BEGINS, ENDS)
    columns = {
        "segments": ["stage", "begin_ns", "end_ns", "step", "a0", "a2"],
        "steps": ["instance", "step", "prefill_tokens", "decode_tokens"],
        "experts": ["instance", "step", "layer", "counts"],
    }
    try:
        recorded = Session.open(session)
        frames = load(recorded, columns=columns)
        segments, summary = frames["segments"], summarise(recorded)
    except SessionError as error:
        raise Failed(f"what was recorded cannot be read: {error}") from error
    stages = {}
    for stage in STAGES:
        rows = segments[segments["stage"] == BY_NAME[stage].id]
        spans = {
            int(step): Span(int(begin), int(end), int(error))
            for step, begin, end, error in zip(rows["step"], rows["begin_ns"], rows["end_ns"], rows["a2"], strict=True)
        }
        theirs = {step: each for (name, step), each in kernels.items() if name == stage}
        if spans.keys() & theirs.keys():
            found = compared(spans, theirs, offset)
            stages[stage] = vars(found) | {name: vars(getattr(found, name)) for name in ("length", "ahead", "behind")}
            stages[stage] |= {"spans": len(spans), "profiled": len(theirs)}
    said = [info for process in recorded.read_manifest().processes if (info := process.info.get("marks"))]
    profiled = sorted(step for stage, step in kernels if stage == STAGES[0])
    return {
        "compared": stages,
        "report": [device_dict(each, summary.names) for each in summary.device],
        "marks": said,
        "layers": marked_beside(said[0], kernels_of(trace), segments, profiled) if said else {},
        "experts": experts_right(frames["steps"], frames["experts"]),
    }


def marked_beside(
    said: dict[str, Any], kernels: Sequence[Any], segments: pd.DataFrame, profiled: Sequence[int]
) -> dict[str, Any]:
    """What marks told of layers beside the kernels between them, by stage; why not, where that cannot be said."""
    from stagetrace.instrument.stages import BY_NAME

    if said.get("by") != "marks":
        return {"why": said.get("why")}
    marked = [(stage, layer) for layer in said["layers"] for stage in said["stages"]]
    order = [0, *range(2, 2 * (len(marked) + 2)), 1]  # the pass, the empty span in front of the first, the others
    try:
        steps = steps_of(kernels, order)
    except Misfit as error:
        return {"why": str(error)}
    if len(steps) != len(profiled):
        return {"why": f"{len(steps)} steps have marks in the profile, {len(profiled)} were profiled"}
    found: dict[str, list[tuple[int, int]]] = {}
    for stage in said["stages"]:
        rows = segments[segments["stage"] == BY_NAME[f"device_{stage}"].id]
        times = zip(rows["step"], rows["a0"], rows["end_ns"] - rows["begin_ns"], strict=True)
        spans = {(int(step), int(layer)): int(lasted) for step, layer, lasted in times}
        for step, between in zip(profiled, steps, strict=True):
            for number, (of, layer) in enumerate(marked, 2):
                if of == stage and (step, layer) in spans:
                    lasted = between[number].last - between[number].first
                    found.setdefault(stage, []).append((spans[step, layer], lasted))
    return {
        stage: vars(agreement(pairs)) | {"kernels_ns": sorted(theirs for _, theirs in pairs)[len(pairs) // 2]}
        for stage, pairs in found.items()
    }


def experts_right(steps: pd.DataFrame, experts: pd.DataFrame) -> dict[str, int]:
    """In how many layers of steps every token was counted for as many experts as the model has it sent to."""
    if not len(experts):
        return {"right": 0, "of": 0}
    both = experts.merge(steps, on=["instance", "step"])
    counted = [int(sum(row)) for row in both["counts"]]
    wanted = (both["prefill_tokens"] + both["decode_tokens"]) * MODELS["moe"]["num_experts_per_tok"]
    return {"right": sum(a == b for a, b in zip(counted, wanted, strict=True)), "of": len(both)}


# What is shown


def show(found: dict[str, Any]) -> None:
    """Tables, and what failed."""
    for each in found["runs"][:1]:
        info = each["info"]
        print(f"vLLM {info['vllm']}, PyTorch {info['torch']}, batches of {WIDTH}\n")
    rows = []
    for each in found["runs"]:
        for stage, said in each["compared"].items():
            about = Compared(
                Agreement(**said["length"]),
                Quartiles(**said["ahead"]),
                Quartiles(**said["behind"]),
                said["outside"],
                said["busy"],
            )
            rows.append(
                [
                    f"{each['model']}, {each['mode']}",
                    stage,
                    str(about.length.count),
                    microseconds(about.length.median_ns),
                    microseconds(about.length.worst_ns),
                    share(about.length.within),
                    spread(about.ahead),
                    spread(about.behind),
                    str(about.outside),
                    share(about.busy),
                ]
            )
    columns = ("run", "span", "steps", "off by, median us", "most us", "within 2 us or 2 %", "begins before us")
    print(table((*columns, "ends after us", "outside", "kernels run"), rows), end="\n\n")
    show_layers(found["runs"])
    rows = [
        [
            f"{each['model']}, {each['mode']}",
            f"V{each['info']['runner']}",
            each["info"]["graphs"],
            "yes" if each["info"]["overlapped"] else "no",
            spread(Quartiles(**each["step_ns"])),
            "{median:.2f} ({low:.2f} to {high:.2f})".format(**each["cost_pct"]),
        ]
        for each in found["runs"]
    ]
    print(table(("run", "runner", "graphs", "steps overlap", "a step us", "armed costs %"), rows), end="\n\n")
    for each in found["runs"]:
        for said in each["report"]:
            observed = said["observed_ns"] or 1
            still = ", ".join(f"{100 * one['total_ns'] / observed:.1f} % {one['reason']}" for one in said["still"])
            print(
                f"{each['model']}, {each['mode']}: busy {100 * said['busy_ns'] / observed:.1f} %, still {still}; launch"
                f" delay p50 {microseconds(said['launch_delay']['p50_ns'])} us, clock error p50"
                f" {microseconds(said['clock_error']['p50_ns'])} us, most {microseconds(said['clock_error_most_ns'])}"
                f" us, {said['contradictions']} contradictions, {said['skipped']} left out, {each['device']}"
            )
    for name, why in found["failed"].items():
        print(f"{name}: failed: {why.splitlines()[0]}")


def show_layers(runs: Sequence[dict[str, Any]]) -> None:
    """What marks told, and tokens by expert, where layers were recorded."""
    rows = []
    for each in runs:
        name = f"{each['model']}, {each['mode']}"
        for said in each["marks"]:
            print(f"{name}: marks: {said}")
        if why := each["layers"].get("why"):
            print(f"{name}: marks are not compared: {why}")
            continue
        for stage, said in each["layers"].items():
            about = Agreement(**{key: value for key, value in said.items() if key != "kernels_ns"})
            cells = (about.median_ns, about.worst_ns)
            kernels = microseconds(said["kernels_ns"])
            rows.append([name, stage, str(about.count), kernels, *map(microseconds, cells), share(about.within)])
        if each["experts"]["of"]:
            print(f"{name}: tokens by expert right in {each['experts']['right']} of {each['experts']['of']} layers")
    columns = ("run", "marks around", "spans", "kernels us", "off by, median us", "most us", "within 2 us or 2 %")
    if rows:
        print("\n" + table(columns, rows), end="\n\n")


def share(value: float | None) -> str:
    """As a percentage."""
    return "-" if value is None else f"{100 * value:.0f} %"


def spread(values: Quartiles) -> str:
    """A median and its quartiles, in microseconds."""
    return f"{microseconds(values.median)} ({microseconds(values.low)} to {microseconds(values.high)})"


if __name__ == "__main__":
    sys.exit(main())
