"""Level layer on a real vLLM that compiles its model.

With the mends of mends/mending.py the build for the CPU compiles as on CUDA: the MoE and the collectives are
operators that no compiler looks into, and what the hooks are on is called inside them. Without the mends it has the
compiler look into all but the attention.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from backends.receiver import GrpcReceiver
from engines.layered import (
    AT_LAYER,
    HIDDEN,
    LAYERS,
    TOP_K,
    TYPE_BYTES,
    Recorded,
    assert_nested,
    assert_whole,
    by_step,
    profiled,
    recorded,
    scheduled,
)
from engines.recording import STAGETRACE
from engines.server import environment

from stagetrace.analysis.load import load
from stagetrace.analysis.report import summarise
from stagetrace.exporters.session import Session, names_of
from stagetrace.instrument.stages import BY_NAME, Collective

if TYPE_CHECKING:
    from stagetrace.analysis.load import Frames

SCRIPT = Path(__file__).with_name("compiled.py")
OPAQUE = {"MENDS_OPAQUE": "1", "PYTHONPATH": str(Path(__file__).with_name("mends"))}
MOE = ("moe_route", "expert_dispatch", "expert_compute", "expert_combine")
WITH_LAYER = ("attention", *MOE, "shared_experts")
FAILED_TO_HASH = "Failed to read file"  # vLLM's words when a traced function is in no file that it could hash


def sharing(model: Path, path: Path, **config: object) -> Path:
    """The tiny model with experts that all tokens share, whose weights vLLM makes up: the same every time."""
    shutil.copytree(model, path, ignore=shutil.ignore_patterns("*.safetensors"))
    file = path / "config.json"
    own = {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "shared_expert_intermediate_size": 512}
    found = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**found, "num_experts": found["num_local_experts"], **own, **config}), "utf-8")
    return path


@pytest.fixture(scope="module")
def shared_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharing(model, tmp_path_factory.mktemp("shared") / "model")


@dataclass
class Ran:
    """An engine that has run in one process, armed or not."""

    outputs: list[Any]  # tokens, and the logarithms of their probabilities to the last bit
    counts: dict[str, int]  # vLLM's own, of graphs and artifacts
    dynamo: dict[str, dict[str, int]]
    session: Path
    code: dict[str, bytes]  # what was in vLLM's cache right after

    def frames(self) -> Frames:
        return load(Session.open(self.session))


def run(engine_python: Path, model: Path, directory: Path, cache: Path, armed: bool, **env: str) -> Ran:
    """Generates with a model that is compiled, or found compiled in vLLM's `cache`; `armed` at level layer."""
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CACHE_ROOT": str(cache)}
    rings = {"STAGETRACE_RING_DIR": str(directory / "rings")}
    session = directory / "session"
    wrapper = [*STAGETRACE, "run", *AT_LAYER, "--session", str(session), "--"] if armed else []
    command = [*wrapper, str(engine_python), str(SCRIPT), str(model), '{"load_format": "dummy"}']
    done = subprocess.run(
        command, env=environment({**own, **rings, **env}), capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert FAILED_TO_HASH not in done.stdout + done.stderr
    said = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"outputs"')))
    return Ran(said["outputs"], said["counts"], said["dynamo"], session, compiled_code(cache))


def compiled_code(cache: Path) -> dict[str, bytes]:
    """What vLLM has compiled: graphs, and the code that was made of them, by path; the path has the compile key.

    Without what PyTorch compiles to try the processor's instructions, in the cache that it happens to have at the time.
    """
    root = cache / "torch_compile_cache"
    files = (path for path in root.rglob("*") if path.suffix in (".py", ".cpp", ".json"))
    code = {str(path.relative_to(root)): path.read_bytes() for path in files}
    return {path: text for path, text in code.items() if b"_chk_kernel" not in text}


# Opaque, as on CUDA: armed and unarmed by turns


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compile-cache")


@pytest.fixture(scope="module")
def armed(shared_model: Path, engine_python: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Armed, and nothing was compiled before."""
    return run(engine_python, shared_model, tmp_path_factory.mktemp("armed"), cache, True, **OPAQUE)


def test_a_compiled_model_is_seen_layer_by_layer(armed: Ran) -> None:
    session = Session.open(armed.session)
    manifest, frames = session.read_manifest(), armed.frames()
    assert manifest.counts["accounting_conflict"] == 0 and not any(each.errors for each in manifest.processes)
    steps, segments = frames["steps"], frames["segments"]
    assert set(steps["status"]) == {"complete"} and len(steps) >= 6
    tokens = (steps["prefill_tokens"] + steps["decode_tokens"]).to_numpy()
    for stage in WITH_LAYER:
        rows = segments[segments["stage"] == BY_NAME[stage].id]
        assert (rows.groupby("step")["a0"].agg(tuple) == tuple(range(LAYERS))).all(), stage
        place = [attribute.name for attribute in BY_NAME[stage].attributes].index("tokens")
        assert (rows.groupby("step")[f"a{place}"].first().to_numpy() == tokens).all(), stage
        assert set(rows["parent_stage"]) == {BY_NAME["forward"].id}, stage
    experts = frames["experts"]
    assert len(experts) == LAYERS * len(steps)
    assert [sum(counts) for counts in experts["counts"]] == (TOP_K * experts["tokens"]).to_list()
    assert summarise(session).layers.not_visible == ["embed"]


def test_the_hooks_are_in_no_graph(armed: Ran) -> None:
    """One graph, cut at the attention of each layer, and never compiled again."""
    assert not armed.dynamo["graph_break"] and not armed.dynamo["recompiles"]
    assert armed.counts["num_graphs_seen"] == armed.counts["num_aot_compiles"] == 1
    assert armed.counts["num_piecewise_graphs_seen"] == 2 * LAYERS + 1


def test_unarmed_takes_what_armed_has_compiled(
    armed: Ran, shared_model: Path, engine_python: Path, cache: Path, tmp_path: Path
) -> None:
    unarmed = run(engine_python, shared_model, tmp_path, cache, False, **OPAQUE)
    assert unarmed.counts["num_aot_artifacts_loaded"] == 1
    assert unarmed.counts["num_aot_compiles"] == unarmed.counts["num_backend_compilations"] == 0
    assert unarmed.outputs == armed.outputs, "not the same to the last bit"
    # Beside the model a process may compile small functions of PyTorch's or vLLM's that were not compiled before.
    assert armed.code.items() <= unarmed.code.items(), "what was there is not as it was"


@pytest.mark.matrix
def test_armed_takes_what_unarmed_has_compiled_and_compiles_the_same(
    armed: Ran, shared_model: Path, engine_python: Path, tmp_path: Path
) -> None:
    """Compiled in caches of their own: the same keys, and the same code byte for byte."""
    cold = run(engine_python, shared_model, tmp_path, tmp_path / "cache", False, **OPAQUE)
    assert cold.counts == armed.counts and cold.dynamo == armed.dynamo
    assert cold.outputs == armed.outputs
    assert cold.code == armed.code
    assert any(path.endswith("computation_graph.py") for path in cold.code)
    assert any(path.endswith("cache_key_factors.json") for path in cold.code)
    warm = run(engine_python, shared_model, tmp_path, tmp_path / "cache", True, **OPAQUE)
    assert warm.counts["num_aot_artifacts_loaded"] == 1 and warm.counts["num_aot_compiles"] == 0
    assert warm.outputs == armed.outputs
    frames = warm.frames()
    for stage in WITH_LAYER:
        rows = frames["segments"]["stage"] == BY_NAME[stage].id
        assert rows.sum() == LAYERS * len(frames["steps"]), f"{stage} in code that was compiled without hooks"


@pytest.mark.matrix
def test_agrees_with_ranges_of_torch_profiler(model: Path, engine_python: Path, tmp_path: Path) -> None:
    """As test_layers.py has it of a model that runs eagerly, in stages that take more than 1 ms."""
    wide = sharing(
        model, tmp_path / "model", num_experts=128, num_experts_per_tok=8, shared_expert_intermediate_size=2048
    )
    env = {**OPAQUE, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    names = ("attention", "moe_route", "expert_compute", "shared_experts", "rank")
    ratios = profiled(engine_python, wide, tmp_path, {"load_format": "dummy"}, names, **env)
    assert all(abs(ratio - 1) < 0.05 for ratio in ratios.values()), ratios


@pytest.fixture(scope="module")
def parallel(shared_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    directory = tmp_path_factory.mktemp("compiled-tp")
    env = {**OPAQUE, "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CACHE_ROOT": str(directory / "cache")}
    arguments = ("--tensor-parallel-size", "2", "--load-format", "dummy")
    return recorded(shared_model, directory, *arguments, requests=6, **env)


@pytest.mark.matrix
def test_collectives_of_a_compiled_model(parallel: Recorded) -> None:
    """An all_reduce after the embedding and two in every layer, and an all_gather of the logits, on each rank."""
    assert_whole(parallel)
    assert_nested(parallel)
    for stage in WITH_LAYER:
        assert (by_step(parallel.segments(stage)) == 2 * LAYERS).all(), stage
    rows = parallel.segments("collective")
    counted = rows.groupby(["process", "instance", "step", "a0"]).size().unstack("a0")
    assert len(counted) == 2 * len(parallel.frames["steps"])
    assert (counted[Collective.ALL_REDUCE] == 1 + 2 * LAYERS).all() and (counted[Collective.ALL_GATHER] == 1).all()
    names = names_of(parallel.recording.manifest.processes)
    assert {(names[row.a1], names[row.a3]) for row in rows.itertuples()} == {("tp:0 (ranks 0-1)", "shared memory")}
    reduced = rows[rows["a0"] == Collective.ALL_REDUCE]
    tokens = scheduled(parallel).loc[list(zip(reduced["instance"], reduced["step"], strict=True))].to_numpy()
    assert (reduced["a2"].to_numpy() == tokens * HIDDEN * TYPE_BYTES).all()
    layers = summarise(parallel.recording.session).layers
    assert layers.not_visible == ["embed"]
    assert all(row.compared == row.count for row in layers.collectives), "the ranks' numbers are the same"


@pytest.mark.matrix
def test_experts_of_other_ranks_in_a_compiled_model(model: Path, tmp_path: Path) -> None:
    """Every token is dispatched and combined in every layer, inside the operator of the MoE."""
    env = {**OPAQUE, "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    spread = recorded(model, tmp_path, "--data-parallel-size", "2", "--enable-expert-parallel", requests=6, **env)
    assert_whole(spread)
    for stage in ("attention", *MOE):
        counts = by_step(spread.segments(stage))
        assert (counts == LAYERS).all() and len(counts) == len(spread.frames["steps"]), stage
    collectives = spread.segments("collective")
    for op, stage in ((Collective.DISPATCH, "expert_dispatch"), (Collective.COMBINE, "expert_combine")):
        rows = collectives[collectives["a0"] == op]
        assert (by_step(rows) == LAYERS).all() and set(rows["parent_stage"]) == {BY_NAME[stage].id}
    assert Collective.ALL_GATHER not in set(collectives["a0"]), "what a dispatch is made of is not counted again"
    assert summarise(spread.recording.session).layers.not_visible == ["embed"]


def test_being_added_to_the_plugins_changes_no_compile_key(engine_python: Path, tmp_path: Path) -> None:
    """VLLM_PLUGINS is a part of vLLM's key; where it leaves stagetrace out, `stagetrace run` adds it."""
    env = environment({"VLLM_PLUGINS": "lora_filesystem_resolver", "STAGETRACE_RING_DIR": str(tmp_path / "rings")})
    said = []
    for wrapper in ([], [*STAGETRACE, "run", *AT_LAYER, "--session", str(tmp_path / "session"), "--"]):
        done = subprocess.run(
            [*wrapper, str(engine_python), str(SCRIPT.with_name("compile_factors.py"))],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))
    unarmed, armed = said
    assert unarmed["session"] is None and armed["session"]
    assert armed["factors"] == unarmed["factors"]
    assert armed["factors"]["VLLM_PLUGINS"] == ["lora_filesystem_resolver"]


# Where the compiler looks into the MoE


@pytest.fixture(scope="module")
def inlined(shared_model: Path, engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    directory = tmp_path_factory.mktemp("inlined")
    return run(engine_python, shared_model, directory, directory / "cache", True)


@pytest.mark.matrix  # what is inlined on a processor alone; what reports say of it: tests/unit/test_layers.py
def test_what_is_inlined_is_said_to_be_not_visible(inlined: Ran) -> None:
    """By the report, by doctor, and by the spans of the forward passes; attention is seen all the same."""
    hidden = ["embed", *MOE, "shared_experts"]
    frames = inlined.frames()
    segments, steps = frames["segments"], len(frames["steps"])
    seen = {name: int((segments["stage"] == BY_NAME[name].id).sum()) for name in (*hidden, "attention", "logits")}
    assert seen == {**dict.fromkeys(hidden, 0), "attention": LAYERS * steps, "logits": steps}
    assert not len(frames["experts"])
    assert summarise(Session.open(inlined.session)).layers.not_visible == hidden

    report = json.loads(stagetrace("report", str(inlined.session), "--json"))
    assert report["layers"]["not_visible_under_compile"] == hidden
    assert f"Not visible under compile: {', '.join(hidden)}." in stagetrace("report", str(inlined.session))
    (process,) = json.loads(stagetrace("doctor", str(inlined.session), "--json"))["processes"]
    assert sorted(process["not_visible_under_compile"]) == sorted(hidden)
    assert "Not visible under compile" in stagetrace("doctor", str(inlined.session))

    with GrpcReceiver() as receiver:
        to = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_EXPORTER_OTLP_INSECURE": "true"}
        stagetrace("export", str(inlined.session), **to)
        spans = receiver.received()
    said = {span.span.name: span.attributes.get("stagetrace.not_visible_under_compile") for span in spans}
    assert {name: sorted(stages) for name, stages in said.items() if stages} == {
        name: sorted(hidden) for name in said if name.startswith("forward ")
    }
    assert any(said.values())


def stagetrace(*arguments: str, **env: str) -> str:
    """What a command of stagetrace prints."""
    done = subprocess.run(
        [*STAGETRACE, *arguments], env=environment(env), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
