"""Run by the engine's Python: which experts a model chooses, by transformers.

Takes the model's directory; on standard input JSON, a list of sequences of token ids. Prints JSON: for every sequence,
every layer and every position the numbers of the experts.
"""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def chosen(model: Any, tokens: list[int]) -> list[list[list[int]]]:
    """The experts of one sequence."""
    logits = model(torch.tensor([tokens]), output_router_logits=True).router_logits
    return [of_layer.topk(model.config.num_experts_per_tok, dim=-1).indices.tolist() for of_layer in logits]


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    with torch.inference_mode():
        print(json.dumps([chosen(model, tokens) for tokens in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
