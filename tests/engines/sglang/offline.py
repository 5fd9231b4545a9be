"""Run by the engine's Python: SGLang's Engine class, without a server; prints what it generated, as JSON."""

import json
import sys

import sglang


def main() -> None:
    model, traceparent = sys.argv[1:]
    engine = sglang.Engine(model_path=model, device="cpu", max_total_tokens=16384, log_level="warning")
    try:
        params = [{"temperature": 0, "max_new_tokens": count, "ignore_eos": True} for count in (5, 9, 1)]
        answers = engine.generate(["a prompt", "another, longer prompt " * 8, "third"], params)
        answers.append(engine.generate("alone", params[0], external_trace_header={"traceparent": traceparent}))
    finally:
        engine.shutdown()
    print(json.dumps([answer["meta_info"] for answer in answers], default=str))


if __name__ == "__main__":
    main()
