"""Run by the engine's Python: requests of vLLM's own classes put into its OutputProcessor, as its front ends do.

Prints as JSON, by request, the traceparent that vLLM's own tracing gets.
"""

import json
import os
import time
from typing import Any

from opentelemetry.sdk.trace import TracerProvider
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.plugins import load_general_plugins
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest

CALLER = "00-8bf92f3577b34da6a3ce929d0e0e4736-40f067aa0ba902b7-01"


def request(name: str, n: int = 1, **values: Any) -> EngineCoreRequest:
    params = SamplingParams(max_tokens=3, n=n)
    made = EngineCoreRequest(name, [1, 2, 3], None, params, None, time.time(), None, None, None, **values)
    made.external_req_id = f"{name}-outside"
    return made


def main() -> None:
    load_general_plugins()
    given = {}

    def add(to: OutputProcessor, one: EngineCoreRequest, *more: Any) -> None:
        to.add_request(one, None, *more)
        given[one.request_id] = (one.trace_headers or {}).get("traceparent")

    plain, traced = (OutputProcessor(None, log_stats=False, tracing_enabled=enabled) for enabled in (False, True))
    add(plain, request("alone", priority=-3))
    with_lora = request("lora")
    with_lora.lora_request = LoRARequest("an adapter", 1, "/somewhere")
    add(plain, with_lora)
    add(plain, request("given", trace_headers={"traceparent": CALLER, "tracestate": "vendor=1"}))
    with TracerProvider().get_tracer("caller").start_as_current_span("caller") as span:
        add(plain, request("in a span"))
        add(traced, request("in a span, traced"))
        context = span.get_span_context()
        given["the span"] = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
    add(traced, request("alone, traced"))
    add(traced, request("given, traced", trace_headers={"traceparent": CALLER}))
    family = request("several", n=2)
    parent = ParentRequest(family)
    for index in range(2):
        child = request(parent.get_child_info(index)[0])
        child.external_req_id = family.external_req_id
        add(traced, child, parent, index)
    os.environ["TRACEPARENT"], os.environ["TRACESTATE"] = CALLER, "vendor=2"
    add(plain, request("of a job"))
    print(json.dumps(given))


if __name__ == "__main__":
    main()
