"""The causes of slowness that are looked for, as one table: what each means and does not, and what to try next.

Text and docs/diagnosis.md come from here. `next` names the engines' own flags; a flag is one of the engine's release
that the tests run (tests/unit/test_diagnosis.py holds every one against the engine's own list).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from stagetrace.instrument.stages import Level

if TYPE_CHECKING:
    from collections.abc import Mapping


class Phase(StrEnum):
    """What of a request's time a cause is a part of."""

    TTFT = "TTFT"  # arrival until the front end had the first token
    TPOT = "TPOT"  # the time between tokens, from the first to the last
    E2E = "end-to-end latency"  # arrival until the last byte was handed to the socket
    THROUGHPUT = "throughput"  # all the time of requests, because the engine gives all that it can

    @property
    def means(self) -> str:
        """In words."""
        return {
            Phase.TTFT: "from arrival until the front end had the first token",
            Phase.TPOT: "from the first token to the last, as the engine had them",
            Phase.E2E: "from arrival until the last byte was handed to the client's socket",
            Phase.THROUGHPUT: "all the time of requests: the engine gives all that it can, and all of them share it",
        }[self]


@dataclass(frozen=True)
class Try:
    """An experiment: a flag of the engine (with a value, or a place for one; empty: no flag does it), and why."""

    flag: str
    why: str


@dataclass(frozen=True)
class Cause:
    """One row of the table."""

    id: str
    title: str
    means: str
    does_not_mean: str
    phases: tuple[Phase, ...]
    next: Mapping[str, tuple[Try, ...]] = field(default_factory=dict)  # by engine: vllm, sglang
    level: Level = Level.STEP  # to record at, for the evidence


_MORE_REPLICAS = "send fewer requests to this engine: more replicas, or a limit on what is let in"

CAUSES: tuple[Cause, ...] = (
    # Who waits, and for what
    Cause(
        "arrival_above_capacity",
        "requests arrive faster than the engine can serve them",
        "it is busy all the while, and the number of requests in it grows as long as they arrive, or they wait for a"
        " place in a full batch that would give hardly more tokens if it were larger",
        "that a larger batch would not help: where the batch is full and steps do not get longer with it, that is"
        " batch_cap",
        (Phase.THROUGHPUT,),
        {
            "vllm": (
                Try("--data-parallel-size N", "more replicas behind one address, where there are devices for them"),
                Try("", _MORE_REPLICAS),
            ),
            "sglang": (
                Try("--dp-size N", "more replicas behind one address, where there are devices for them"),
                Try("", _MORE_REPLICAS),
            ),
        },
    ),
    Cause(
        "batch_cap",
        "the batch is as large as it may be",
        "requests wait in the queue while as many are running as the engine's setting allows",
        "that the device is full: where steps get longer in proportion to the batch, a larger one gains little",
        (Phase.TTFT,),
        {
            "vllm": (Try("--max-num-seqs N", "let more requests run at once; watch TPOT and the KV cache"),),
            "sglang": (Try("--max-running-requests N", "let more requests run at once; watch TPOT and the KV cache"),),
        },
    ),
    Cause(
        "token_budget",
        "the token budget of a step is too small for the prompts",
        "prompts are cut into chunks, or wait, because a step has as many tokens as it may; each more step costs what"
        " a step costs whatever is in it",
        "that prompts are long: a large budget has to be used up as well, but then a step's fixed cost is small beside",
        (Phase.TTFT, Phase.TPOT),
        {
            "vllm": (Try("--max-num-batched-tokens N", "fewer, larger chunks; decode waits longer for each of them"),),
            "sglang": (
                Try(
                    "--chunked-prefill-size N",
                    "fewer, larger chunks; decode waits for all of a prompt's, and with --enable-mixed-chunk longer for"
                    " each",
                ),
                Try("--max-prefill-tokens N", "the same bound for prompts of several requests together"),
            ),
        },
    ),
    Cause(
        "kv_exhausted",
        "the KV cache is full",
        "requests wait for blocks of the KV cache, or were thrown out of the batch for others and computed again",
        "that a high usage is bad: a full cache without waiting or preemption is well used",
        (Phase.TTFT, Phase.TPOT),
        {
            "vllm": (
                Try(
                    "--gpu-memory-utilization 0.95",
                    "more blocks (on the CPU: VLLM_CPU_KVCACHE_SPACE; a bound such as"
                    " --num-gpu-blocks-override or --kv-cache-memory-bytes goes first)",
                ),
                Try("--num-gpu-blocks-override", "leave this flag out, where it is set: it bounds the blocks"),
                Try("--kv-cache-dtype fp8", "twice the blocks, if the model bears it"),
                Try("--max-num-seqs N", "fewer at once, so that none is thrown out"),
            ),
            "sglang": (
                Try("--mem-fraction-static 0.9", "more tokens in the pool (a --max-total-tokens goes first)"),
                Try("--kv-cache-dtype fp8_e4m3", "twice the tokens, if the model bears it"),
                Try("--schedule-conservativeness 1.3", "take in fewer at once, so that none is retracted"),
            ),
        },
    ),
    # Prefill
    Cause(
        "prefix_cache_thrashed",
        "the prefix cache loses what would be used again",
        "prompts find less of their beginning in the cache while many new tokens push out what is in it than while few"
        " do",
        "that a larger cache would find them for certain: other prompts, which share less, may come at busy times; and"
        " where they find nothing at any time it is not recorded whether they share beginnings, as no token is",
        (Phase.TTFT, Phase.TPOT),
        {
            "vllm": (
                Try("--gpu-memory-utilization 0.95", "more blocks to keep prefixes in"),
                Try("--kv-offloading-size GIB", "keep evicted blocks in the host's memory"),
            ),
            "sglang": (
                Try("--mem-fraction-static 0.9", "more room to keep prefixes in"),
                Try("--enable-hierarchical-cache", "keep evicted prefixes in the host's memory"),
                Try("--schedule-policy lpm", "serve requests with the longest cached prefix first"),
            ),
        },
    ),
    Cause(
        "prefix_cache_off",
        "prompts are computed several times and the prefix cache is off",
        "several answers to one prompt (n > 1) each computed it; those that decode meanwhile wait for that as well",
        "that other requests share beginnings: that is not recorded, as no token is",
        (Phase.TTFT, Phase.TPOT),
        {
            "vllm": (Try("--enable-prefix-caching", "compute what requests share once"),),
            "sglang": (Try("--disable-radix-cache", "leave this flag out: it turns the cache off"),),
        },
    ),
    Cause(
        "prefill_inefficient",
        "prefill is far from what the device can do",
        "steps with prefill take many times longer than their operations and bytes at the speed of light",
        "a bad kernel by itself: small chunks, quantisation without fast kernels, or the host may be behind it",
        (Phase.TTFT,),
        {
            "vllm": (
                Try("--max-num-batched-tokens N", "larger chunks use the device better"),
                Try("--performance-mode throughput", "settings that favour large shapes"),
            ),
            "sglang": (Try("--chunked-prefill-size N", "larger chunks use the device better"),),
        },
    ),
    Cause(
        "prefill_delays_decode",
        "prefill of other requests holds up decode",
        "requests in decode waited for steps with prefill that took several times a step of decode",
        "that smaller chunks make the sum smaller: they spread it, so that the slow tokens get faster; prefill has to"
        " be done anyway, here or on another engine",
        (Phase.TPOT,),
        {
            "vllm": (
                Try("--max-num-batched-tokens N", "smaller chunks: no token waits for more than so much prefill"),
                Try("--long-prefill-token-threshold N", "cut long prompts alone into smaller chunks"),
                Try("--kv-transfer-config JSON", "prefill on another engine (disaggregated prefill)"),
            ),
            "sglang": (
                Try("--enable-mixed-chunk", "decode goes on in the steps that have prefill"),
                Try(
                    "--chunked-prefill-size N",
                    "with that, smaller chunks: no token waits for more than so much prefill (without it, the chunks"
                    " of a prompt follow one another)",
                ),
                Try("--disaggregation-mode prefill", "prefill on another engine"),
            ),
        },
    ),
    # Against the speed of light
    Cause(
        "decode_at_roof",
        "decode is at the memory's roof",
        "steps of decode take little longer than moving their weights and KV cache at the memory's bandwidth",
        "a fault: it is as fast as this model, precision and device can be with these batches",
        (Phase.TPOT,),
        {
            "vllm": (
                Try("--quantization fp8", "fewer bytes of weights"),
                Try("--kv-cache-dtype fp8", "fewer bytes of KV cache"),
                Try("--tensor-parallel-size N", "each device moves a part"),
                Try("--speculative-config JSON", "several tokens for the same bytes"),
            ),
            "sglang": (
                Try("--quantization fp8", "fewer bytes of weights"),
                Try("--kv-cache-dtype fp8_e4m3", "fewer bytes of KV cache"),
                Try("--tp-size N", "each device moves a part"),
                Try("--speculative-algorithm NAME", "several tokens for the same bytes"),
            ),
        },
    ),
    Cause(
        "decode_far_below_roof",
        "decode is far from what the device can do",
        "steps of decode take many times longer than their operations and bytes at the speed of light, though these are"
        " long enough for launches not to matter",
        "a bad kernel by itself: what else was found, such as a host-bound stage, may be behind it",
        (Phase.TPOT,),
        {
            "vllm": (
                Try("--async-scheduling", "the host prepares a step while the device runs the one before"),
                Try("--max-cudagraph-capture-size N", "graphs for the batches that occur (and no --enforce-eager)"),
            ),
            "sglang": (
                Try("--cuda-graph-max-bs-decode N", "graphs for the batches that occur (and no --disable-cuda-graph)"),
                Try("--enable-torch-compile", "fused kernels for small batches"),
            ),
        },
    ),
    # The host
    Cause(
        "host_schedule",
        "the scheduler's own work holds the steps up",
        "choosing batches, taking tokens in and sending them on (schedule, update, emit, between) take much of the"
        " steps' time",
        "waiting for the workers, which is execute",
        (Phase.TPOT, Phase.TTFT),
        {
            "vllm": (
                Try("--async-scheduling", "schedule a step while the one before runs"),
                Try("--data-parallel-size N", "several schedulers, each with fewer requests"),
                Try("--stream-interval N", "hand on several tokens at a time"),
            ),
            "sglang": (
                Try("--disable-overlap-schedule", "leave this flag out: overlap hides the scheduler's work"),
                Try("--dp-size N", "several schedulers, each with fewer requests"),
            ),
        },
    ),
    Cause(
        "host_prepare",
        "building the inputs of the forward pass holds the steps up",
        "the worker's prepare takes much of the steps' time",
        "copying to the device, which it only launches there",
        (Phase.TPOT, Phase.TTFT),
        {
            "vllm": (
                Try("--async-scheduling", "build a step's inputs while the device runs the one before"),
                Try("", "VLLM_USE_V2_MODEL_RUNNER=1: the newer model runner builds them on the device"),
            ),
            "sglang": (Try("--disable-overlap-schedule", "leave this flag out: overlap hides this work"),),
        },
    ),
    Cause(
        "host_sampling",
        "sampling holds the steps up",
        "choosing tokens from the logits takes much of the steps' time",
        "computing the logits, where the engine does so in the forward pass",
        (Phase.TPOT, Phase.TTFT),
        {
            "vllm": (Try("", "ask for less of each token: logprobs, penalties, top_k and min_p cost a pass each"),),
            "sglang": (
                Try("--sampling-backend flashinfer", "sample in one kernel"),
                Try("", "ask for less of each token: logprobs, penalties, top_k and min_p cost a pass each"),
            ),
        },
    ),
    Cause(
        "gc_pauses",
        "Python's garbage collector stops the engine",
        "collections in the processes that make steps take much of the steps' time",
        "memory running out: they come with many live Python objects",
        (Phase.TPOT, Phase.TTFT),
        {
            "vllm": (Try("", "find what keeps so many objects alive: `stagetrace report` says which process pauses"),),
            "sglang": (Try("--gc-threshold 50000 50 50", "collect less often"),),
        },
    ),
    Cause(
        "grammar",
        "structured output is slow",
        "requests wait for their grammar to be compiled, or steps for the bitmask of allowed tokens",
        "the extra tokens that a schema makes the model write",
        (Phase.TTFT, Phase.TPOT),
        {
            "vllm": (
                Try("--structured-outputs-config.backend NAME", "another backend (xgrammar, guidance, outlines)"),
                Try("", "send the same schema again rather than new ones: compiled grammars are kept"),
            ),
            "sglang": (
                Try("--grammar-backend NAME", "another backend (xgrammar, llguidance, outlines)"),
                Try("", "send the same schema again rather than new ones: compiled grammars are kept"),
            ),
        },
    ),
    # The front end
    Cause(
        "tokenize",
        "tokenizing and templating take much of the time to the first token",
        "requests are long in the front end before they are sent to the engine, while it is quick to hand tokens on",
        "a busy front end: where tokens are late as well, that is front_end",
        (Phase.TTFT,),
        {
            "vllm": (
                Try("--renderer-num-workers N", "more threads for templates and tokenizers"),
                Try("--api-server-count N", "more front ends"),
                Try("--tokenizer-mode auto", "the fast tokenizer, if there is one"),
            ),
            "sglang": (
                Try("--tokenizer-worker-num N", "more processes that tokenize"),
                Try("--tokenizer-mode auto", "the fast tokenizer, if there is one"),
            ),
        },
        Level.REQUEST,
    ),
    Cause(
        "front_end",
        "the API server is saturated",
        "tokens that the engine had, or requests that it could have taken, waited for the front end",
        "a slow client: there the front end is quick and only bytes wait",
        (Phase.TTFT, Phase.E2E),
        {
            "vllm": (
                Try("--api-server-count N", "more front ends"),
                Try("--stream-interval N", "fewer, larger chunks for each stream"),
                Try("", "leave middleware out, and give the front end a processor of its own"),
            ),
            "sglang": (
                Try("--tokenizer-worker-num N", "more front ends"),
                Try("--stream-interval N", "fewer, larger chunks for each stream"),
            ),
        },
        Level.REQUEST,
    ),
    Cause(
        "detokenize",
        "detokenizing holds the front end up",
        "tokens are late in the front end, and most of its time is detokenizing",
        "the front end's other work, such as writing to sockets: that is front_end",
        (Phase.TTFT, Phase.E2E),
        {
            "vllm": (
                Try("--api-server-count N", "more front ends, which detokenize"),
                Try("--stream-interval N", "fewer, larger chunks for each stream"),
            ),
            "sglang": (
                Try("--detokenizer-worker-num N", "more processes that detokenize"),
                Try("--stream-interval N", "fewer, larger chunks for each stream"),
            ),
        },
    ),
    Cause(
        "slow_client",
        "clients read their answers slowly",
        "the front end had a request's last token long before the last byte could be handed to the socket, or much of"
        " the answer was still in the socket's buffer then: how long the client takes for that is estimated from the"
        " rate at which it took the rest, and comes after the request's own end",
        "whether the client or the network is slow; and a client that reads slowly what its own kernel has is not seen",
        (Phase.E2E,),
        {
            "vllm": (
                Try("--stream-interval N", "fewer bytes: fewer, larger chunks for each stream"),
                Try("", "ask for fewer bytes (logprobs), and put a proxy that buffers before the server"),
            ),
            "sglang": (
                Try("--stream-interval N", "fewer bytes: fewer, larger chunks for each stream"),
                Try("", "ask for fewer bytes (logprobs), and put a proxy that buffers before the server"),
            ),
        },
        Level.REQUEST,
    ),
    # Several ranks, experts
    Cause(
        "straggler_rank",
        "one rank keeps the others waiting",
        "of the operations of a group most of the waiting is for one and the same rank; what counts is how much more it"
        " is than for another",
        "slow links: moving bytes is collective_share",
        (Phase.TPOT, Phase.TTFT),
        {
            "vllm": (Try("", "look at that rank's host: pinning, other processes, clocks, temperature, its slot"),),
            "sglang": (Try("", "look at that rank's host: pinning, other processes, clocks, temperature, its slot"),),
        },
        Level.LAYER,
    ),
    Cause(
        "collective_share",
        "collectives take much of the forward pass",
        "operations of groups of ranks take much of the forward pass after the last rank has come",
        "waiting for a late rank: that is straggler_rank",
        (Phase.TPOT, Phase.TTFT),
        {
            "vllm": (
                Try("--tensor-parallel-size N", "fewer ranks to a replica, and more replicas"),
                Try("--enable-dbo", "overlap them with computing (with expert parallelism)"),
            ),
            "sglang": (
                Try("--tp-size N", "fewer ranks to a replica, and more replicas"),
                Try("--enable-two-batch-overlap", "overlap them with computing"),
            ),
        },
        Level.LAYER,
    ),
    Cause(
        "expert_imbalance",
        "tokens are spread unevenly over the experts",
        "over all steps some experts get far more tokens than the mean, beyond what chance does to small batches",
        "lost time by itself: it costs where experts are on different ranks, which then wait for the busiest",
        (Phase.TPOT, Phase.TTFT),
        {
            "vllm": (
                Try(
                    "--enable-eplb", "move and copy experts so that ranks get the same (with --enable-expert-parallel)"
                ),
            ),
            "sglang": (Try("--enable-eplb", "move and copy experts so that ranks get the same (with --ep-size)"),),
        },
        Level.LAYER,
    ),
    Cause(
        "dispatch_combine_share",
        "sending tokens to experts and back takes much of the forward pass",
        "expert_dispatch and expert_combine take much of the forward pass",
        "computing the experts",
        (Phase.TPOT, Phase.TTFT),
        {
            "vllm": (
                Try("--all2all-backend NAME", "another way to exchange tokens (deepep_low_latency for decode)"),
                Try("--enable-dbo", "overlap it with computing"),
            ),
            "sglang": (
                Try("--moe-a2a-backend NAME", "another way to exchange tokens (deepep)"),
                Try("--enable-two-batch-overlap", "overlap it with computing"),
            ),
        },
        Level.LAYER,
    ),
    # Graphs, compiling, speculation
    Cause(
        "graph_padding",
        "graphs are captured for larger batches than there are",
        "the forward pass runs on many more tokens than were scheduled",
        "that padding costs as much as tokens: where decode is bound by the weights it is nearly free",
        (Phase.TPOT,),
        {
            "vllm": (Try("--cudagraph-capture-sizes N N ...", "graphs for the batches that occur"),),
            "sglang": (Try("--cuda-graph-bs-decode N N ...", "graphs for the batches that occur"),),
        },
    ),
    Cause(
        "graph_miss",
        "steps of decode run without a graph",
        "some steps of decode were launched operation by operation and took longer than those that replay a graph",
        "prefill without graphs, which is long enough for launches not to matter",
        (Phase.TPOT,),
        {
            "vllm": (Try("--max-cudagraph-capture-size N", "graphs up to the batches that occur"),),
            "sglang": (Try("--cuda-graph-max-bs-decode N", "graphs up to the batches that occur"),),
        },
    ),
    Cause(
        "compile_in_window",
        "the engine compiled or captured while it was serving",
        "compile or graph_capture happened after the start-up, and steps waited for it",
        "what was compiled before the engine was ready, which the report shows as start-up",
        (Phase.TTFT, Phase.TPOT),
        {
            "vllm": (
                Try("--compilation-config JSON", "compile_sizes and dynamic shapes that cover what is served"),
                Try("", "warm the server up with the shapes that it will serve, before traffic"),
            ),
            "sglang": (Try("", "warm the server up with the shapes that it will serve, before traffic"),),
        },
    ),
    Cause(
        "speculation_does_not_pay",
        "speculative decoding does not pay",
        "drafting takes more of a step than the accepted tokens save, even if verifying were free",
        "that it never pays: acceptance depends on the text and the temperature, its worth on the batch",
        (Phase.TPOT,),
        {
            "vllm": (Try("--speculative-config JSON", "fewer num_speculative_tokens, another method, or none"),),
            "sglang": (
                Try("--speculative-num-draft-tokens N", "fewer draft tokens"),
                Try("--speculative-num-steps N", "shorter drafts, or no speculation"),
            ),
        },
    ),
)
BY_ID = {cause.id: cause for cause in CAUSES}
