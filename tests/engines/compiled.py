"""Run by the engine's Python: a compiled model in one process, what it generates, and how often it was compiled.

    compiled.py MODEL [ARGUMENTS, as JSON]

Prints JSON: `outputs`, for each prompt the tokens and the logarithms of their probabilities, exactly; `counts`, vLLM's
own of graphs and of what it compiled, saved and loaded; `dynamo`, the graph breaks and recompilations of PyTorch's.
"""

import json
import sys

from torch._dynamo.utils import counters
from vllm import LLM, SamplingParams
from vllm.compilation.counter import compilation_counter

PROMPTS = ["a prompt", "another, longer prompt " * 8, "third"]


def main() -> None:
    arguments = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    llm = LLM(model=sys.argv[1], max_model_len=1024, distributed_executor_backend="uni", **arguments)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=5)
    outputs = []
    for done in (output.outputs[0] for output in llm.generate(PROMPTS, params, use_tqdm=False)):
        chances = [{str(token): one.logprob.hex() for token, one in each.items()} for each in done.logprobs]
        outputs.append([list(done.token_ids), chances])
    dynamo = {name: dict(counters[name]) for name in ("graph_break", "recompiles", "stats")}
    print(json.dumps({"outputs": outputs, "counts": vars(compilation_counter), "dynamo": dynamo}))


if __name__ == "__main__":
    main()
