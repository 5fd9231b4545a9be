"""Run by the engine's Python: vLLM computes prompts of made-up tokens, one at a time, with made-up weights.

ENGINE_PYTHON benchmarks/prefill_load.py MODEL_DIRECTORY TOKENS [TOKENS ...]
"""

import random
import sys

from vllm import LLM, SamplingParams


def main() -> None:
    directory, lengths = sys.argv[1], [int(word) for word in sys.argv[2:]]
    llm = LLM(
        model=directory,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,  # so that stages can be seen
        enable_prefix_caching=False,
        max_model_len=max(lengths) + 8,
        max_num_batched_tokens=max(lengths) + 8,
    )
    chance = random.Random(1)
    once = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    for length in lengths:
        tokens = [chance.randrange(10, 1000) for _ in range(length)]
        llm.generate([{"prompt_token_ids": tokens}], once, use_tqdm=False)


if __name__ == "__main__":
    main()
