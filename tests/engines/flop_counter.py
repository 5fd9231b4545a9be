"""Counts operations, parameters and bytes of transformers' own models with torch's FlopCounterMode; prints JSON.

Runs in the engine's Python, which has torch and transformers. Random weights, small shapes; nothing is downloaded. What
transformers computes otherwise than engines do is counted apart, as the equations of the papers in plain torch.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "max_position_embeddings": 512,
}
MLA = {
    "head_dim": None,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
}
SPARSE = {
    **MLA,
    "n_routed_experts": 16,
    "moe_intermediate_size": 96,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "num_key_value_heads": 8,
    "index_topk": 16,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 40,
}
QWEN_EXPERTS = {
    "num_experts": 8,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 96,
    "num_experts_per_tok": 2,
}
WINDOW = 24
ALTERNATING = ["sliding_attention", "full_attention"] * 2
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "layer_types": ALTERNATING},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ALTERNATING},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 160},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 96, "num_experts_per_tok": 3},
    "deepseek_v3": {
        **MLA,
        "n_routed_experts": 16,
        "moe_intermediate_size": 96,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "num_key_value_heads": 8,
    },
    "deepseek_v2": {
        **MLA,
        "q_lora_rank": None,
        "n_routed_experts": 16,
        "moe_intermediate_size": 96,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 8,
    },
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "head_dim": None},
    "olmo2": {"head_dim": None},
    "phi": {"head_dim": None},
    "phi3": {"head_dim": None, "pad_token_id": 0},
    "gemma": {},
    "glm4": {"attention_bias": True, "pad_token_id": 0},
    "granite": {"head_dim": None},
    "granitemoe": {"head_dim": None, "num_local_experts": 8, "num_experts_per_tok": 2},
    "ministral": {"sliding_window": WINDOW, "layer_types": ALTERNATING},
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "olmo3": {"head_dim": None, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    "phimoe": {"head_dim": None, "num_local_experts": 8, "attention_bias": True, "lm_head_bias": True},
    "smollm3": {"head_dim": None, "pad_token_id": 0},
    "bamba": {
        "head_dim": None,
        "attn_layer_indices": [1],
        "mamba_n_heads": 16,
        "mamba_d_head": 32,
        "mamba_d_state": 32,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 32,
    },
    "deepseek_v32": SPARSE,
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 384, "interleave_moe_layer_step": 2},
    "glm4_moe": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 96,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "qwen3_next": DELTA | QWEN_EXPERTS,
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA | QWEN_EXPERTS,
    "seed_oss": {"num_hidden_layers": 2},
    "glm4_moe_lite": {
        **MLA,
        "n_routed_experts": 8,
        "moe_intermediate_size": 96,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "glm_moe_dsa": SPARSE,
    "jamba": {
        "head_dim": None,
        "num_experts": 4,
        "mamba_dt_rank": 16,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "use_mamba_kernels": False,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "ssm_state_size": 32,
        "n_groups": 2,
        "chunk_size": 32,
        "n_routed_experts": 8,
        "moe_intermediate_size": 96,
        "moe_shared_expert_intermediate_size": 112,
        "num_hidden_layers": None,
    },
}
SHAPES = [(1, 64), (3, 32), (2, 128)]  # requests, prompt tokens of each


def main() -> None:
    torch.set_num_threads(1)  # the shapes are small: more threads only wait for one another
    models = {kind: count(kind, MODELS[kind]) for kind in sys.argv[1:] or MODELS}
    equations = {"delta_rule": delta_rule(), "state_space": state_space(), "absorbed": absorbed()}
    print(json.dumps({"models": models, "equations": equations}))


@torch.no_grad()
def count(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in {**SMALL, **fields}.items() if value is not None or key == "q_lora_rank"}
    config = AutoConfig.for_model(kind, **settings)
    config.dtype = torch.bfloat16
    config._is_quantized = False  # that it is there makes Jamba call its dt_proj as a module, which is counted as such
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.bfloat16
    ).eval()
    runs = []
    for requests, prompt in SHAPES:
        tokens = torch.randint(3, config.vocab_size, (requests, prompt))
        with FlopCounterMode(display=False) as prefill:
            output = model(tokens, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        held = sum(
            each.nbytes
            for layer in cache.layers
            for name in ("keys", "values")
            if torch.is_tensor(each := getattr(layer, name, None))
        )
        runs.append(run("prefill", requests, prompt, prompt, prefill, held))
        with FlopCounterMode(display=False) as decode:
            model(tokens[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        runs.append(run("decode", requests, 1, prompt + 1, decode, None))
    tensors = {each.data_ptr(): each for each in model.parameters()}.values()
    written = config.to_dict()
    written.pop("dtype", None)
    return {
        "config": json.loads(json.dumps(written, default=str)) | {"dtype": "bfloat16"},
        "parameters": sum(each.numel() for each in tensors),
        "corrections": sum(each.numel() for name, each in model.named_buffers() if "correction" in name),
        "bytes": sum(each.nbytes for each in tensors),
        "embedding_bytes": model.get_input_embeddings().weight.nbytes,
        "runs": runs,
    }


def run(phase: str, requests: int, q: int, kv: int, counter: FlopCounterMode, cache: int | None) -> dict[str, Any]:
    modules = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    return {
        "phase": phase,
        "requests": requests,
        "q": q,
        "kv": kv,
        "operations": counter.get_total_flops(),
        "recurrence": recurrence(modules),
        "cache_bytes": cache,
    }


def recurrence(modules: dict[str, int]) -> int:
    """What recurrent mixers count besides their matrices: the convolution and transformers' own recurrence."""
    mixers = [name for name in modules if name.rpartition(".")[2] in ("linear_attn", "mamba")]
    mixers += [name for name in modules if name.endswith(".mixer") and f"{name}.in_proj" in modules]
    children = (
        "in_proj_qkvz",
        "in_proj_ba",
        "in_proj_qkv",
        "in_proj_z",
        "in_proj_b",
        "in_proj_a",
        "in_proj",
        "x_proj",
        "dt_proj",
        "out_proj",
    )
    return sum(modules[name] - sum(modules.get(f"{name}.{child}", 0) for child in children) for name in mixers)


def delta_rule() -> dict[str, int]:
    """One token of one head of the gated delta rule: Gated Delta Networks, 2024, equation 10."""
    keys, values = 32, 40
    state, key, query, value = (
        torch.randn(values, keys),
        torch.randn(keys, 1),
        torch.randn(keys, 1),
        torch.randn(values, 1),
    )
    with FlopCounterMode(display=False) as counter:
        state = 0.9 * state
        state = state + (value - state @ key) @ key.T
        state @ query
    return {"state": keys * values, "operations": counter.get_total_flops()}


def state_space() -> dict[str, int]:
    """One token of one head of a selective state space: Mamba-2, 2024, equation 1."""
    size, width = 32, 48
    state, b, c, x = torch.randn(size, width), torch.randn(size, 1), torch.randn(size, 1), torch.randn(1, width)
    with FlopCounterMode(display=False) as counter:
        state = 0.9 * state + b @ x
        c.T @ state
    return {"state": size * width, "operations": counter.get_total_flops()}


def absorbed() -> dict[str, int]:
    """One decode token of one layer over 100 tokens of context, absorbed: DeepSeek-V2, 2024, section 2.1.2."""
    heads, latent, rope, nope, value, context = 8, 64, 16, 32, 24, 100
    query, query_rope = torch.randn(heads, 1, nope), torch.randn(heads, 1, rope)
    key_weights, value_weights = torch.randn(heads, nope, latent), torch.randn(heads, latent, value)
    latents, keys_rope = torch.randn(context, latent), torch.randn(context, rope)
    with FlopCounterMode(display=False) as counter:
        scores = torch.cat([query @ key_weights, query_rope], -1) @ torch.cat([latents, keys_rope], -1).T
        (torch.softmax(scores, -1) @ latents) @ value_weights
    return {"context": context, "operations": counter.get_total_flops()}


if __name__ == "__main__":
    main()
