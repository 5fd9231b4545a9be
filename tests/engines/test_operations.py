"""Tests that operations and bytes are those that torch counts of transformers' own models.

Eager attention in transformers computes the whole square of a prefill, masks or not; the comparison gives the count the
same square, and so with the other things that transformers computes and throws away (as_transformers_computes). What
recurrent layers do is compared apart: transformers computes it in chunks or element by element, which FlopCounterMode
sees in part or not at all.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines.server import environment

from stagetrace.analysis.architecture import LatentAttention, Layer, Model, Recurrent, cache_entry
from stagetrace.analysis.batch import Batch, Sums
from stagetrace.analysis.formats import BF16
from stagetrace.analysis.model_config import FAMILIES, describe
from stagetrace.analysis.operations import Latent, step_work

SCRIPT = Path(__file__).with_name("flop_counter.py")
KINDS = [
    "bamba",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "granite",
    "granitemoe",
    "jamba",
    "llama",
    "llama4_text",
    "minimax_m2",
    "ministral",
    "mistral",
    "mixtral",
    "nemotron_h",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
]
SPARSE = ("deepseek_v32", "glm_moe_dsa")
NONE = Sums(*[np.asarray(0.0)] * 5)
EVERY_EXPERT = np.asarray(1e9)  # capped at how many there are


@pytest.fixture(scope="module")
def counted(engine_python: Path) -> dict[str, Any]:
    done = subprocess.run(
        [engine_python, SCRIPT], env=environment(), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def square(requests: int, q: int, kv: int) -> Sums:
    """Sums whose pairs of tokens are q x kv a request, without a causal mask: sum of q squared as if q were 1."""
    sums = (requests, requests * q, requests * kv, requests * q, requests * q * kv)
    return Sums(*(np.asarray(float(each)) for each in sums))


def batch(run: dict[str, Any]) -> Batch:
    sums = square(run["requests"], run["q"], run["kv"])
    return Batch(sums, NONE, EVERY_EXPERT) if run["phase"] == "prefill" else Batch(NONE, sums, EVERY_EXPERT)


def unwindowed(config: dict[str, Any]) -> dict[str, Any]:
    """The config with all attention full: so does transformers' eager attention compute a prefill."""
    full = {"sliding_window": None}
    if {"sliding_attention", "chunked_attention"} & set(config.get("layer_types") or []):
        full["layer_types"] = ["full_attention"] * len(config["layer_types"])
    return config | full


def as_transformers_computes(kind: str, config: dict[str, Any], phase: str) -> Model:
    """The model with what transformers' eager code does beyond what the result needs."""
    if kind == "llama4_text":  # every expert for every token
        config = config | {"num_experts_per_tok": config["num_local_experts"]}
    if kind in SPARSE:  # sparse attention as a mask; the indexer is added
        config = config | {"index_topk": None}
    return describe(unwindowed(config) if phase == "prefill" else config)


def indexer(config: dict[str, Any], run: dict[str, Any]) -> float:
    """Operations of an indexer: its projections and its scores."""
    sparse, dense = (step_work(describe(each), batch(run)) for each in (config, config | {"index_topk": None}))
    scores = sum(float(each.operations) for each in sparse.works if each.part.startswith("indexer"))
    return scores + float(sparse.operations("forward") - dense.operations("forward"))


def test_every_architecture_is_compared(counted: dict[str, Any]):
    assert sorted(counted["models"]) == KINDS
    assert set(FAMILIES) - set(KINDS) == {"kimi_k2"}  # which is DeepSeek-V3's code


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_of_the_counter(counted: dict[str, Any], kind: str):
    config = counted["models"][kind]["config"]
    assert len(counted["models"][kind]["runs"]) == 6
    for run in counted["models"][kind]["runs"]:
        model = as_transformers_computes(kind, config, run["phase"])
        work = step_work(model, batch(run), prefill_form=Latent.EXPANDED, decode_form=Latent.EXPANDED)
        ours = sum(float(each.operations) for each in work.works if "recurrence" not in each.part)
        if kind in SPARSE:
            ours += indexer(config, run)
        theirs = run["operations"] - run["recurrence"]
        assert ours == theirs, (kind, run)
        assert (run["recurrence"] > 0) == any("recurrence" in each.part for each in work.works)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_bytes_are_those_of_the_tensors(counted: dict[str, Any], kind: str):
    found = counted["models"][kind]
    model = describe(found["config"])
    assert model.parameters().total == found["parameters"] + found["corrections"]  # which transformers keeps as buffers
    assert not [each for each in model.not_understood if "not understood" in each or "cannot be counted" in each]
    work = step_work(model, batch(found["runs"][0]))
    read = sum(float(each.weights) for each in work.works if each.stage != "embed")
    whole = read + (0 if model.tied else found["embedding_bytes"])
    assert whole == pytest.approx(found["bytes"] + 2 * found["corrections"], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_cache_is_that_of_the_tensors(counted: dict[str, Any], kind: str):
    """Of attention without windows: transformers' sliding layers keep what the next token needs, engines what fits."""
    found = counted["models"][kind]
    model = describe(unwindowed(found["config"]))
    windowed = "sliding_window" in found["config"] and describe(found["config"]).layers != model.layers
    for run in found["runs"]:
        if run["phase"] == "prefill":
            tokens = run["requests"] * run["q"]
            written = tokens * model.kv_bytes_per_token()
            work = step_work(model, batch(run))
            attention = [each for each in work.works if "attention, " in each.part]
            assert sum(float(each.cache_written) for each in attention) == written
            assert (run["cache_bytes"] < written) if windowed else (run["cache_bytes"] == written)


def test_recurrences_are_those_of_the_equations(counted: dict[str, Any]):
    for name, kind in (("delta_rule", "qwen3_next"), ("state_space", "nemotron_h"), ("state_space", "jamba")):
        model = describe(counted["models"][kind]["config"])
        mixer = next(each for layer in model.layers for each in layer.mixers if isinstance(each, Recurrent))
        equation = counted["equations"][name]
        assert equation["operations"] == 2 * mixer.products * equation["state"]
        only = Model(kind, None, None, (Layer((mixer,)),), model.activations, model.kv_cache, None, False)
        for q in (1, 5):
            work = step_work(only, Batch.of_requests(decode=[(q, 9)] * 3))
            convolution = 2 * mixer.channels * mixer.kernel
            assert work.operations("attention") == 3 * q * (
                2 * mixer.products * mixer.state * mixer.units + convolution
            )


def test_absorbed_attention_is_that_of_the_equations(counted: dict[str, Any]):
    model = describe(counted["models"]["deepseek_v3"]["config"])
    (mixer,) = {each for layer in model.layers for each in layer.mixers}
    assert isinstance(mixer, LatentAttention)
    only = Model("", None, None, (Layer((mixer,)),), model.activations, model.kv_cache, None, False)
    equation = counted["equations"]["absorbed"]
    work = step_work(only, Batch.of_requests(decode=[(1, equation["context"])]))
    assert work.operations("attention") == equation["operations"]
    assert sum(float(each.cache_read) for each in work.works) == equation["context"] * cache_entry(mixer, BF16)
