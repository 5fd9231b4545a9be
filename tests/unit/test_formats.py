"""Tests that quantization configs, as the common tools write them, give the bytes of the tensors that they store."""

from __future__ import annotations

from typing import Any

import pytest
from unit.configs import LLAMA_405B, QWEN3_235B

from stagetrace.analysis.architecture import Experts
from stagetrace.analysis.formats import BF16, FP8, Format, dtype, matches, quantisation
from stagetrace.analysis.model_config import describe

LINEAR = "model.layers.3.self_attn.q_proj"
OUTPUTS, INPUTS = 4096, 8192


def compressed(**scheme: Any) -> dict[str, Any]:
    inputs = scheme.pop("inputs", None)
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


# Bits a weight with all that is stored beside it, and the arithmetic of products.
CASES: dict[str, tuple[dict[str, Any], float, str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, 4 + 20 / 128, "bf16"),
    "gptq in order": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
        4 + 20 / 128 + 32 / OUTPUTS,
        "bf16",
    ),
    "gptq by output": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8 + 24 / INPUTS, "bf16"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, 4 + 20 / 64, "bf16"),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2, "fp8"),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, 8 + 32 / (OUTPUTS * INPUTS), "fp8"),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, 8 + 32 / INPUTS, "fp8"),
    "w4a16": (
        compressed(num_bits=4, type="int", strategy="group", group_size=128, symmetric=True),
        4 + 16 / 128,
        "bf16",
    ),
    "w8a8 int": (
        compressed(num_bits=8, type="int", strategy="channel", symmetric=True, inputs={"num_bits": 8, "type": "int"}),
        8 + 16 / INPUTS,
        "int8",
    ),
    "w8a8 float": (
        compressed(num_bits=8, type="float", strategy="channel", inputs={"num_bits": 8, "type": "float"}),
        8 + 32 / INPUTS,
        "fp8",
    ),
    "w4a8": (
        compressed(num_bits=4, type="int", strategy="group", group_size=128, inputs={"num_bits": 8, "type": "float"}),
        4 + 16 / 128,
        "fp8",
    ),
    "nvfp4": (
        compressed(num_bits=4, type="float", strategy="tensor_group", group_size=16, inputs={"num_bits": 4}),
        4.5,
        "fp4",
    ),
    "nvfp4 weights": (compressed(num_bits=4, type="float", strategy="tensor_group", group_size=16), 4.5, "bf16"),
    "mxfp4": (compressed(num_bits=4, type="float", strategy="group", group_size=32), 4.25, "bf16"),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8 + 32 / (OUTPUTS * INPUTS), "fp8"),
    "modelopt nvfp4": ({"quant_method": "modelopt_fp4", "quant_algo": "NVFP4", "group_size": 16}, 4.5, "fp4"),
    "modelopt's file": ({"producer": {}, "quantization": {"quant_algo": "NVFP4"}}, 4.5, "fp4"),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        4.5,
        "bf16",
    ),
    "quark": (
        {
            "quant_method": "quark",
            "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}, "input_tensors": {"dtype": "fp4"}},
        },
        4.25,
        "fp4",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_methods(name: str):
    config, bits, arithmetic = CASES[name]
    read = quantisation(config, BF16)
    form = read.format_of(LINEAR, BF16)
    assert read.not_understood == ()
    assert form.bytes(OUTPUTS, INPUTS) * 8 / (OUTPUTS * INPUTS) == pytest.approx(bits, rel=1e-12)
    assert form.arithmetic == arithmetic


def test_what_is_not_quantised_is_plain():
    config = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.3.self_attn", "lm_head"]}
    read = quantisation(config, BF16)
    assert read.format_of(LINEAR, BF16) is BF16
    assert read.format_of("model.layers.13.self_attn.q_proj", BF16).name == "fp8"
    assert read.format_of("lm_head", BF16, head=True) is BF16
    listed = compressed(num_bits=4, type="int", group_size=128) | {"ignore": ["re:.*self_attn.*"]}
    assert quantisation(listed, BF16).format_of(LINEAR, BF16) is BF16
    assert quantisation(listed, BF16).format_of("lm_head", BF16, head=True).name == "int4"  # not in its list
    mixed = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {LINEAR: {"quant_algo": "FP8"}, "model.layers.3.mlp.up_proj": {"quant_algo": "NVFP4"}},
    }
    assert [
        quantisation(mixed, BF16).format_of(name, BF16).name for name in (LINEAR, "model.layers.3.mlp.up_proj", "x")
    ] == [
        "fp8",
        "nvfp4",
        "bf16",
    ]


@pytest.mark.parametrize(
    ("pattern", "module", "found"),
    [
        ("lm_head", "lm_head", True),
        ("mlp.gate", "model.layers.0.mlp.gate", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("re:.*gate$", "model.layers.0.mlp.gate", True),
        ("re:[", "model.layers.0.mlp.gate", False),
        ("model.layers.*.self_attn", "model.layers.7.self_attn.q_proj", True),
        ("model.layers.1*", "model.layers.2.mlp.up_proj", False),
        ("", "lm_head", False),
    ],
)
def test_patterns(pattern: str, module: str, found: bool):
    assert matches(pattern, module) is found


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "magic"}, "the quantisation method 'magic' is not known"),
        ({}, "quantization_config names no quant_method"),
        (7, "quantization_config is not an object"),
        ({"quant_method": "gptq", "bits": "four", "group_size": 128}, "the weights' bits are 'four': counted as 4."),
        ({"quant_method": "gptq", "bits": 4}, "group_size is None"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size is [128]"),
        ({"quant_method": "compressed-tensors"}, "has no config_groups"),
        (compressed(num_bits=3, type="float"), "weights of 3 bits of type 'float': not known."),
        ({"quant_method": "modelopt", "quant_algo": "FP3"}, "quant_algo 'FP3' is not known"),
        ({"quant_method": "quark", "global_quant_config": {}}, "Quark's weights of dtype '' are not known"),
    ],
)
def test_what_is_not_understood_is_named(config: object, said: str):
    read = quantisation(config, BF16)
    assert said in " ".join(read.not_understood)
    assert isinstance(read.format_of(LINEAR, BF16), Format)


def test_dtypes():
    assert dtype("torch.bfloat16") is BF16 and dtype("fp8_e4m3") is FP8
    assert dtype("float7") is None and dtype(None) is None and dtype(["bf16"]) is None


def test_cache_follows_the_checkpoint_unless_told():
    scheme = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    config = LLAMA_405B | {"quantization_config": compressed(num_bits=8, type="float") | scheme}
    assert describe(config).kv_cache is FP8
    assert describe(config, kv_cache_dtype="bfloat16").kv_cache is BF16
    modelopt = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    assert describe(LLAMA_405B | {"quantization_config": modelopt}).kv_cache is FP8


def test_routers_norms_and_embeddings_stay_plain():
    model = describe(QWEN3_235B | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    block = model.layers[0].feed_forward
    assert isinstance(block, Experts) and block.router is not None and block.router.format is BF16
    assert model.head is not None and model.head.format is BF16
