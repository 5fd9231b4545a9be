"""Run by the engine's Python: vLLM's offline LLM class; prints what it generated, as JSON."""

import json
import sys

from vllm import LLM, SamplingParams


def main() -> None:
    llm = LLM(model=sys.argv[1], enforce_eager=True, max_model_len=1024, distributed_executor_backend="uni")
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (5, 9, 1)]
    outputs = llm.generate(["a prompt", "another, longer prompt " * 8, "third"], params, use_tqdm=False)
    found = [{"prompt": len(output.prompt_token_ids), "output": len(output.outputs[0].token_ids)} for output in outputs]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
