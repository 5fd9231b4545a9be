"""Tests that configs are described as published figures say, and that whatever is in a config, nothing is raised."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.configs import (
    ALL,
    DEEPSEEK_V3,
    GEMMA2_27B,
    GPT_OSS_20B,
    GPT_OSS_120B,
    KIMI_K2,
    LLAMA_405B,
    MIXTRAL_8X7B,
    QWEN3_235B,
    QWEN3_NEXT_80B,
    QWEN25_72B,
)

from stagetrace.analysis.architecture import Attention, Dense, Experts, LatentAttention, Recurrent
from stagetrace.analysis.batch import Batch
from stagetrace.analysis.model_config import ConfigError, describe, load_model
from stagetrace.analysis.operations import step_work

# Total and active parameters, to the digits that are published, and whether the active ones have the input embedding.
# Llama: The Llama 3 Herd of Models, 2024. Qwen2.5: Qwen2.5 Technical Report, 2024, table 1. Mixtral of Experts: its
# announcement, 2023. Qwen3 Technical Report, 2025. DeepSeek-V3 Technical Report, 2024. Kimi K2: model card, 2025 (its
# technical report says 1.04T, 1.3 % more than the config gives). gpt-oss-120b & gpt-oss-20b Model Card, 2025, table 1,
# which says that the embedding is not active. Qwen3-Next-80B-A3B: model card, 2025. Gemma 2, 2024, table 2.
PUBLISHED: list[tuple[dict[str, Any], str, str | None, bool]] = [
    (LLAMA_405B, "405e9", None, False),
    (QWEN25_72B, "72.7e9", None, False),
    (MIXTRAL_8X7B, "46.7e9", "12.9e9", True),
    (QWEN3_235B, "235e9", "22e9", False),
    (DEEPSEEK_V3, "671e9", "37e9", False),
    (KIMI_K2, "1e12", "32e9", False),
    (GPT_OSS_120B, "116.83e9", "5.13e9", False),
    (GPT_OSS_20B, "20.91e9", "3.61e9", False),
    (QWEN3_NEXT_80B, "80e9", None, False),
    (GEMMA2_27B, "27227718144", None, False),
]
# Bytes of KV cache a token, bf16: Insights into DeepSeek-V3, 2025, table 1 (70.272 KB, 327.680 KB, 516.096 KB).
PUBLISHED_CACHE = [(DEEPSEEK_V3, 70_272), (QWEN25_72B, 327_680), (LLAMA_405B, 516_096)]


def agrees(value: float, published: str) -> bool:
    """Within 1 %, or the same when rounded to as many digits as were published."""
    digits = len(published.partition("e")[0].replace(".", ""))
    return (
        math.isclose(value, float(published), rel_tol=0.01)
        or f"{value:.{digits - 1}e}" == f"{float(published):.{digits - 1}e}"
    )


@pytest.mark.parametrize(("config", "total", "active", "embedding"), PUBLISHED)
def test_parameters_are_those_published(config: dict[str, Any], total: str, active: str | None, embedding: bool):
    found = describe(config).parameters()
    assert agrees(found.total, total), found
    assert active is None or agrees(found.active + embedding * found.embedding, active), found


def test_operations_are_those_published():
    """Insights into DeepSeek-V3, 2025, table 2: 250 GFLOPs a token to train at 4,096 tokens, causal attention counted
    once. Backward is twice forward, and every token has logits.
    """
    model, tokens = describe(DEEPSEEK_V3), 4096
    assert model.head is not None
    others = 2 * model.head.inputs * model.head.outputs * (tokens - 1)  # serving has the last token's alone
    forward = float(step_work(model, Batch.of_requests([(tokens, tokens)])).operations()) + others
    assert 3 * forward / tokens == pytest.approx(250e9, rel=0.01)


def test_checkpoint_is_as_large_as_published():
    """gpt-oss Model Card, 2025, table 1: 60.8 and 12.8 GiB; DeepSeek-V3's model card: 685B with the MTP layer."""
    for config, size in ((GPT_OSS_120B, 60.8), (GPT_OSS_20B, 12.8)):
        model = describe(config)
        work = step_work(model, Batch.of_requests(decode=[(1, 1)], distinct_experts=1e9))
        read = sum(float(each.weights) for each in work.works if each.stage != "embed")
        assert read + 2 * model.parameters().embedding == pytest.approx(size * 2**30, rel=0.01)
    found = describe(DEEPSEEK_V3).parameters()
    own = found.embedding + found.head  # the checkpoint repeats them for the layer
    assert found.total + found.draft + own == pytest.approx(685e9, rel=0.01)


@pytest.mark.parametrize(("config", "published"), PUBLISHED_CACHE)
def test_cache_is_that_published(config: dict[str, Any], published: int):
    assert describe(config).kv_bytes_per_token() == published


@pytest.mark.parametrize("name", ALL)
def test_nothing_of_the_large_models_is_left_out(name: str):
    assert describe(ALL[name]).not_understood == ()


def kinds(config: dict[str, Any]) -> Counter[str]:
    """How many layers of each sort a config has."""
    found: Counter[str] = Counter()
    for layer in describe(config).layers:
        for mixer in layer.mixers:
            window = isinstance(mixer, Attention) and mixer.window
            found[mixer.kind if isinstance(mixer, Recurrent) else "sliding" if window else type(mixer).__name__] += 1
        found[type(layer.feed_forward).__name__] += 1
    return found


def test_layers_are_of_their_kinds():
    assert kinds(LLAMA_405B) == {"Attention": 126, "Dense": 126}
    assert kinds(DEEPSEEK_V3) == {"LatentAttention": 61, "Dense": 3, "Experts": 58}
    assert kinds(GPT_OSS_120B) == {"sliding": 18, "Attention": 18, "Experts": 36}
    assert kinds(QWEN3_NEXT_80B) == {"linear": 36, "Attention": 12, "Experts": 48}
    assert kinds(GEMMA2_27B) == {"sliding": 23, "Attention": 23, "Dense": 46}
    gemma3 = GEMMA2_27B | {"model_type": "gemma3_text", "num_hidden_layers": 62, "sliding_window_pattern": 6}
    assert kinds(gemma3) == {"sliding": 52, "Attention": 10, "Dense": 62}
    assert kinds(MIXTRAL_8X7B | {"model_type": "mistral", "sliding_window": 4096})["sliding"] == 32
    assert kinds(QWEN25_72B | {"sliding_window": 4096, "use_sliding_window": False})["Attention"] == 80
    windowed = QWEN25_72B | {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 70}
    assert kinds(windowed)["sliding"] == 10


def test_jamba_and_nemotron_are_read_as_their_checkpoints_say():
    jamba = MIXTRAL_8X7B | {
        "model_type": "jamba",
        "num_experts": 16,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 256,
        "vocab_size": 65536,
    }
    del jamba["num_local_experts"]
    assert kinds(jamba) == {"mamba": 28, "Attention": 4, "Dense": 16, "Experts": 16}
    # Jamba: A Hybrid Transformer-Mamba Language Model, 2024: 52B, 12B active.
    assert agrees(describe(jamba).parameters().total, "52e9") and agrees(describe(jamba).parameters().active, "12e9")
    nemotron = {
        "model_type": "nemotron_h",
        "hidden_size": 4096,
        "intermediate_size": 21504,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        "num_hidden_layers": 52,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
        "vocab_size": 131072,
        "torch_dtype": "bfloat16",
    }
    assert kinds(nemotron) == {"mamba": 24, "Attention": 4, "Dense": 24, "NoneType": 28}
    # Nemotron-H: A Family of Accurate and Efficient Hybrid Mamba-Transformer Models, 2025: 8B.
    assert agrees(describe(nemotron).parameters().total, "8e9")


def test_multi_token_prediction_is_apart():
    model = describe(DEEPSEEK_V3)
    (layer,) = model.draft_layers
    assert isinstance(layer.feed_forward, Experts) and isinstance(layer.mixers[0], LatentAttention)
    assert model.draft_projection is not None and model.draft_projection.inputs == 2 * 7168
    assert describe(DEEPSEEK_V3 | {"num_nextn_predict_layers": 0}).parameters().draft == 0


def test_tied_embeddings_are_counted_once():
    apart = describe(QWEN25_72B).parameters()
    tied = describe(QWEN25_72B | {"tie_word_embeddings": True}).parameters()
    assert apart.total - tied.total == apart.embedding and tied.head == 0
    assert tied.active == apart.active  # the output projection is multiplied all the same


def test_text_part_of_a_multimodal_config_is_read():
    whole = {"model_type": "gemma3", "text_config": GEMMA2_27B, "vision_config": {"hidden_size": 1152}}
    model = describe(whole)
    assert model.layers == describe(GEMMA2_27B).layers
    assert model.not_understood == ("vision_config: the encoder of what is not text is not counted.",)


# Bad input


def test_missing_fields_are_named_and_the_rest_is_computed():
    for field, named in (
        ("hidden_size", "hidden_size is missing"),
        ("vocab_size", "vocab_size is missing"),
        ("num_hidden_layers", "num_hidden_layers is missing"),
        ("num_attention_heads", "num_attention_heads is missing"),
        ("intermediate_size", "intermediate_size is missing"),
        ("model_type", "the config has no model_type"),
        ("torch_dtype", "the config names no dtype"),
    ):
        config = {key: value for key, value in LLAMA_405B.items() if key != field} | {"head_dim": 128}
        model = describe(config)
        assert any(sentence.startswith(named) for sentence in model.not_understood), model.not_understood
    no_width = describe({key: value for key, value in LLAMA_405B.items() if key != "hidden_size"} | {"head_dim": 128})
    assert no_width.kv_bytes_per_token() == 516_096
    assert (
        step_work(no_width, Batch.of_requests(decode=[(1, 1000)])).operations("attention") == 4 * 128 * 128 * 126 * 1000
    )


def test_unknown_values_are_named():
    model = describe(LLAMA_405B | {"model_type": "not-yet", "torch_dtype": "float3", "num_experts": "many", "wings": 2})
    said = " ".join(model.not_understood)
    assert "the model_type 'not-yet' is not known" in said
    assert "the dtype 'float3' is not known" in said
    assert "num_experts is 'many', not a number that fits" in said
    assert "fields that were not read: wings." in said
    assert model.parameters().total == describe(LLAMA_405B).parameters().total
    assert "KV cache's dtype 'int3'" in " ".join(describe(LLAMA_405B, kv_cache_dtype="int3").not_understood)


def test_kinds_of_layers_that_are_not_understood_are_named():
    config = LLAMA_405B | {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "conv", "linear_attention", "sliding_attention"],
    }
    model = describe(config)
    assert [bool(layer.mixers) for layer in model.layers] == [True, False, False, True]
    assert all(isinstance(layer.feed_forward, Dense) for layer in model.layers)
    said = " ".join(model.not_understood)
    assert "layers of the kind 'conv' are not understood" in said
    assert "linear attention other than the gated delta rule is not understood" in said
    assert "the size of their window is missing" in said


def test_a_file_that_is_no_object_is_said(tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_405B))
    assert load_model(file) == describe(LLAMA_405B)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        load_model(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_model(file)
    with pytest.raises(ConfigError, match=r"No such file or directory.*nowhere"):
        load_model(tmp_path / "nowhere")


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        ["mxfp4", "gptq", "awq", "fp8", "compressed-tensors", "modelopt", "quark", "bitsandbytes", "NVFP4"]
    )
    | st.sampled_from(["linear_attention", "mamba", "moe", "full_attention", "sliding_attention", "M-*E", "re:[", "*"])
)
NESTED_KEYS = [
    "bits",
    "group_size",
    "weight_block_size",
    "config_groups",
    "weights",
    "num_bits",
    "type",
    "ignore",
    "dynamic",
]
NESTED_KEYS += [
    "quant_method",
    "quant_algo",
    "kv_cache_scheme",
    "input_activations",
    "targets",
    "global_quant_config",
    "weight",
]
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(NESTED_KEYS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = sorted({key for config in ALL.values() for key in config})
FIELDS += ["text_config", "layers_block_type", "hybrid_override_pattern", "attn_layer_period", "sliding_window_pattern"]
FIELDS += ["mamba_d_state", "mamba_n_heads", "mamba_d_head", "mlp_layer_types", "moe_layers", "attention_chunk_size"]
FIELDS += ["expert_layer_period", "index_topk", "index_n_heads", "index_head_dim", "moe_latent_size", "mlp_only_layers"]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([{}, *ALL.values()]),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
    st.lists(st.sampled_from(FIELDS), max_size=3),
    st.text(max_size=8),
)
def test_no_json_object_raises(base: dict[str, Any], changed: dict[str, Any], dropped: list[str], cache: str):
    config = {key: value for key, value in {**base, **changed}.items() if key not in dropped}
    config = json.loads(json.dumps(config))
    model = describe(config, kv_cache_dtype=cache)
    assert all(sentence.endswith(".") for sentence in model.not_understood)
    work = step_work(model, Batch.of_requests([(7, 7), (3, 90)], [(1, 400)]), draft_tokens=2)
    for each in work.works:
        for value in (each.operations, each.bytes, each.activations):
            assert math.isfinite(float(value)) and value >= 0
    assert model.parameters().total >= 0 and math.isfinite(model.kv_bytes_per_token())
