"""Makes a model of one of the tiny ones whose weights are many times a processor's caches: 290 MB, dense.

    <python of an engine> benchmarks/on_purpose/wide_model.py TINY DIRECTORY

Steps of decode then take their time for moving weights, as those of real models do.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 3072,
    "initializer_range": 0.05,  # as wide for these sizes as the tiny ones' is for theirs: greedy decoding wanders
}


def main() -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny, directory = map(Path, sys.argv[1:])
    shutil.copytree(tiny, directory, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(tiny)
    config.update(SHAPE)
    config.layer_types = [config.layer_types[0]] * config.num_hidden_layers
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
