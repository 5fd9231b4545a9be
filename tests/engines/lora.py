"""Run by the engine's Python: makes tiny LoRA adapters for a model, each in a folder of its own.

lora.py MODEL FOLDER...
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK, TARGETS = 4, ("q_proj", "v_proj")


def main() -> None:
    config = json.loads((Path(sys.argv[1]) / "config.json").read_text("utf-8"))
    width, head = config["hidden_size"], config["head_dim"]
    outputs = {"q_proj": config["num_attention_heads"] * head, "v_proj": config["num_key_value_heads"] * head}
    for number, folder in enumerate(map(Path, sys.argv[2:])):
        random = torch.Generator().manual_seed(number)
        weights = {}
        for layer in range(config["num_hidden_layers"]):
            for target in TARGETS:
                name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
                weights[f"{name}.lora_A.weight"] = torch.randn(RANK, width, generator=random).to(torch.bfloat16)
                weights[f"{name}.lora_B.weight"] = torch.randn(outputs[target], RANK, generator=random).to(
                    torch.bfloat16
                )
        folder.mkdir(parents=True)
        save_file(weights, folder / "adapter_model.safetensors")
        described = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [*TARGETS], "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(described), "utf-8")


if __name__ == "__main__":
    main()
