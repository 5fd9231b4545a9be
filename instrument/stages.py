"""The vocabulary: one closed table of everything that stagetrace times, and the only place where a stage is named.

Records carry a stage's id; span names, Parquet values, metric labels, report labels and docs/stages.md come from this
table. An id is never reused. A stage's attributes are, in order, the words a0, a1, ... of its record.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

MAX_ATTRIBUTES = 8


class Level(IntEnum):
    """How much is recorded; every level includes those below it."""

    OFF = 0
    REQUEST = 1
    STEP = 2
    LAYER = 3
    KERNEL = 4


class Kind(StrEnum):
    """What a stage is to the accounting."""

    SEGMENT = "segment"  # a synchronous call on one timeline; segments of a timeline nest or follow
    ENVELOPE = "envelope"  # holds segments or states together; envelopes may overlap one another
    STATE = "state"  # what a request is in; a request is in one at a time
    OCCASION = "occasion"  # a segment that belongs to no step: now and then, or a gap


class Timeline(StrEnum):
    """The thread or device stream that a stage's time is taken on."""

    SCHEDULER = "scheduler"
    RANK = "rank"
    DEVICE = "device"
    FRONT_END = "front end"
    REQUEST = "request"
    ANY = "any"


class Unit(StrEnum):
    """Units of attributes; integers all, so that records and sums are exact."""

    COUNT = "1"
    TOKENS = "tokens"
    BYTES = "bytes"
    NANOSECONDS = "ns"
    PPM = "1e-6"
    ENUM = "enum"
    HANDLE = "handle"  # of a name that a text record tells


class IdleReason(IntEnum):
    """Why a timeline stood still."""

    NO_WORK = 1
    WAITING_FOR_DEVICE = 2
    WAITING_FOR_RANK = 3
    HOST_BOUND = 4
    WAITING_FOR_SCHEDULER = 5

    @property
    def text(self) -> str:
        """The reason in words."""
        return self.name.lower().replace("_", " ")


class QueueCause(IntEnum):
    """What a request in the queue waits for, where the engine says."""

    UNKNOWN = 0
    GRAMMAR = 1
    TURN = 2  # the next time that the scheduler chooses a batch
    KV_SPACE = 3  # it did not fit into the KV cache, or one ahead of it did not
    BATCH_FULL = 4  # as many requests were running as may
    TOKEN_BUDGET = 5  # the step had as many tokens as it may
    LORA_LIMIT = 6  # as many LoRA adapters were in use as may
    REMOTE_KV = 7  # a connector could not say yet what it has
    PAUSED = 8  # the engine takes nobody in: it is asleep, or its weights are replaced

    @property
    def text(self) -> str:
        """The cause in words."""
        return {
            QueueCause.UNKNOWN: "unknown",
            QueueCause.GRAMMAR: "its grammar",
            QueueCause.TURN: "its turn",
            QueueCause.KV_SPACE: "room in the KV cache",
            QueueCause.BATCH_FULL: "a place in the batch",
            QueueCause.TOKEN_BUDGET: "the token budget of a step",
            QueueCause.LORA_LIMIT: "a place among the LoRA adapters",
            QueueCause.REMOTE_KV: "word of remote KV",
            QueueCause.PAUSED: "the engine, which is paused",
        }[self]


# Causes that a request has its time by, beside its grammar; the others make up the rest of the queue.
QUEUE_CAUSES = (
    *(QueueCause.KV_SPACE, QueueCause.BATCH_FULL, QueueCause.TOKEN_BUDGET),
    *(QueueCause.LORA_LIMIT, QueueCause.REMOTE_KV, QueueCause.PAUSED),
)


class GraphMode(IntEnum):
    """How a step's forward pass ran, where the engine says."""

    UNKNOWN = 0
    NONE = 1
    PIECEWISE = 2
    FULL = 3


class AttentionKind(IntEnum):
    """What a layer's attention looks at."""

    FULL = 1
    SLIDING = 2
    MLA = 3
    LINEAR = 4
    MAMBA = 5
    CROSS = 6

    @property
    def text(self) -> str:
        """The kind in words."""
        return "MLA" if self is AttentionKind.MLA else self.name.lower()


class Collective(IntEnum):
    """Operations of a group of ranks."""

    ALL_REDUCE = 1
    ALL_GATHER = 2
    REDUCE_SCATTER = 3
    ALL_TO_ALL = 4
    BROADCAST = 5
    SEND = 6
    RECEIVE = 7
    GATHER = 8
    DISPATCH = 9  # of tokens to the ranks of their experts
    COMBINE = 10  # of the experts' results
    BARRIER = 11

    @property
    def text(self) -> str:
        """The operation's name."""
        return self.name.lower()


@dataclass(frozen=True)
class Attribute:
    """One integer that a record carries beside its times."""

    name: str
    unit: Unit
    means: str
    choices: type[IdleReason] | type[AttentionKind] | type[Collective] | type[QueueCause] | None = None

    def text(self, value: int) -> str | None:
        """What a value stands for in words; None where it is a number, or one of a newer vocabulary."""
        if self.choices is None or value not in [*self.choices]:
            return None
        return self.choices(value).text


def _one_of(
    name: str, choices: type[IdleReason] | type[AttentionKind] | type[Collective] | type[QueueCause]
) -> Attribute:
    return Attribute(name, Unit.ENUM, ", ".join(f"{each.value} {each.text}" for each in choices), choices)


@dataclass(frozen=True)
class Stage:
    """One row of the vocabulary. `inside` names the possible parents, nearest first."""

    id: int
    name: str
    kind: Kind
    timeline: Timeline
    level: Level
    means: str
    does_not_mean: str
    inside: tuple[str, ...] = ()
    attributes: tuple[Attribute, ...] = ()


_ROWS = Attribute("rows", Unit.COUNT, "positions that logits are computed for")
_RANK = Attribute("rank", Unit.COUNT, "global rank of the worker")
_TOKENS = Attribute("tokens", Unit.TOKENS, "tokens that the call worked on")
# A layer's: what the tensor that it is given has, padding included where the engine pads the batch.
_LAYER_TOKENS = Attribute("tokens", Unit.TOKENS, "tokens that the call worked on, with the engine's padding")
_LAYER = Attribute("layer", Unit.COUNT, "index of the transformer layer, from 0")
_BYTES = Attribute("bytes", Unit.BYTES, "size of the tensor on this rank")
_LAUNCH_DELAY = Attribute(
    "launch_delay", Unit.NANOSECONDS, "from when the host began to launch it until the device began it"
)
_CLOCK_ERROR = Attribute(
    "clock_error", Unit.NANOSECONDS, "by how much its times can be off the host's clock, in one direction or the other"
)
_REQUESTS = Attribute("requests", Unit.COUNT, "requests that the call worked on")
_PROMPT = Attribute("prompt_tokens", Unit.TOKENS, "tokens in the prompt")
_OUTPUT = Attribute("output_tokens", Unit.TOKENS, "tokens generated so far")
_CACHED = Attribute("cached_tokens", Unit.TOKENS, "prompt tokens whose KV was found in a cache")

STAGES: tuple[Stage, ...] = (
    # Envelopes
    Stage(
        1,
        "step",
        Kind.ENVELOPE,
        Timeline.SCHEDULER,
        Level.STEP,
        "from the start of schedule to the end of update of the same scheduler output, over all ranks",
        "device time, nor the period between steps: with several steps in flight steps overlap",
    ),
    Stage(
        2,
        "rank_step",
        Kind.ENVELOPE,
        Timeline.RANK,
        Level.STEP,
        "one rank's part of a step, from receiving the batch to handing the result back",
        "time in which the rank was busy: it may wait in it for other ranks or for the scheduler. It can end after its"
        " step, where the engine waits for one rank's output alone",
        ("step",),
        (_RANK, Attribute("tokens", Unit.TOKENS, "tokens scheduled in the step")),
    ),
    Stage(
        3,
        "request",
        Kind.ENVELOPE,
        Timeline.REQUEST,
        Level.REQUEST,
        "from the request's arrival in the front end to the last byte handed to the socket",
        "the time that the client saw: the network and the client's own reading are outside",
        ("parent_request",),
    ),
    Stage(
        4,
        "parent_request",
        Kind.ENVELOPE,
        Timeline.REQUEST,
        Level.REQUEST,
        "one request for several answers (n > 1), each of which is a request of its own: from the first arrival to the"
        " last end of these",
        "a request to the engine: counts, tokens and latencies are those of its answers",
    ),
    # States of a request
    Stage(
        10,
        "request_tokenize",
        Kind.STATE,
        Timeline.REQUEST,
        Level.REQUEST,
        "arrival in the front end until the request is ready to be sent to the engine: template, tokenizer, validation",
        "reading the HTTP body, which is over when a request arrives",
        ("request",),
        (
            _PROMPT,
            Attribute("max_tokens", Unit.TOKENS, "most tokens that the request may generate, 0 if unbounded"),
            Attribute("by_http", Unit.COUNT, "1 when it came by HTTP, so that its last byte is seen, 0 otherwise"),
            Attribute(
                "priority", Unit.COUNT, "as the request asked for; what a higher number means is the engine's rule"
            ),
        ),
    ),
    Stage(
        11,
        "request_dispatch",
        Kind.STATE,
        Timeline.REQUEST,
        Level.REQUEST,
        "sent by the front end until the scheduler took it in",
        "network alone: serialising, the socket and the engine's wait until its current step is over are in it",
        ("request",),
        (
            _PROMPT,
            Attribute(
                "before_arrival",
                Unit.NANOSECONDS,
                "from the head of its HTTP request until it arrived: the body read, JSON, validation; 0 without HTTP",
            ),
        ),
    ),
    Stage(
        12,
        "queue",
        Kind.STATE,
        Timeline.REQUEST,
        Level.REQUEST,
        "in the scheduler's waiting queue until first scheduled; in parts around its grammar and a transfer of KV",
        "time in the front end before, or waiting again after a preemption; the cause is what most of the part is owed"
        " to, as the engine has it after each step: what held back the first of those that wait",
        ("request",),
        (
            _PROMPT,
            _one_of("cause", QueueCause),
        ),
    ),
    Stage(
        13,
        "prefill",
        Kind.STATE,
        Timeline.REQUEST,
        Level.REQUEST,
        "first scheduled until the engine had the first token; after a preemption, until the lost context is rebuilt",
        "time computing this prompt: other requests' work in the same and in interleaved steps is in it",
        ("request",),
        (
            _CACHED,
            Attribute("resumed", Unit.COUNT, "1 when the context is rebuilt after a preemption"),
            Attribute("external_tokens", Unit.TOKENS, "of the cached tokens those that came from outside this engine"),
        ),
    ),
    Stage(
        14,
        "decode",
        Kind.STATE,
        Timeline.REQUEST,
        Level.REQUEST,
        "the engine had the first token until it had the last",
        "time computing this request: the steps are shared, and prefill of others may be in them",
        ("request",),
        (_OUTPUT,),
    ),
    Stage(
        15,
        "preempted",
        Kind.STATE,
        Timeline.REQUEST,
        Level.REQUEST,
        "thrown out of the running batch until scheduled again",
        "all that a preemption costs: the prefill that follows rebuilds the lost context",
        ("request",),
        (_OUTPUT,),
    ),
    Stage(
        16,
        "kv_transfer",
        Kind.STATE,
        Timeline.REQUEST,
        Level.REQUEST,
        "waiting for KV blocks from another instance or a store, until the engine knows that they are there",
        "bytes on the wire alone; a connector that loads within a step, whose time is kv_load",
        ("request",),
        (Attribute("external_tokens", Unit.TOKENS, "tokens whose KV is fetched"),),
    ),
    Stage(
        17,
        "output",
        Kind.STATE,
        Timeline.REQUEST,
        Level.REQUEST,
        "the engine had the last token until the last byte was handed to the socket",
        "time on the network",
        ("request",),
        (_OUTPUT,),
    ),
    Stage(
        18,
        "prefill_chunk",
        Kind.STATE,
        Timeline.REQUEST,
        Level.STEP,
        "the part of a request's prefill that one step computed, as long as that step",
        "time for this chunk alone: the step is shared with the rest of its batch",
        ("prefill",),
        (
            Attribute("tokens", Unit.TOKENS, "q: tokens of the request in this step"),
            Attribute("context", Unit.TOKENS, "kv: the request's context after this step"),
            Attribute("last", Unit.COUNT, "1 for the chunk that completes the prefill"),
            _CACHED,
        ),
    ),
    # Scheduler timeline
    Stage(
        30,
        "schedule",
        Kind.SEGMENT,
        Timeline.SCHEDULER,
        Level.STEP,
        "choosing the batch: the engine's scheduler call",
        "waiting for work",
        ("step",),
    ),
    Stage(
        31,
        "execute",
        Kind.SEGMENT,
        Timeline.SCHEDULER,
        Level.STEP,
        "handing the step to the workers until update, as far as no other segment covers it: the scheduler waits",
        "device time; where worker and scheduler share a thread the rank's segments are inside it",
        ("step",),
    ),
    Stage(
        32,
        "update",
        Kind.SEGMENT,
        Timeline.SCHEDULER,
        Level.STEP,
        "taking the step's tokens in: stop checks, freeing, building outputs",
        "detokenizing, which the front end does",
        ("step",),
    ),
    Stage(
        33,
        "grammar",
        Kind.SEGMENT,
        Timeline.SCHEDULER,
        Level.STEP,
        "structured output: filling the bitmask of allowed tokens",
        "compiling a grammar, which is queue time of its request",
        ("execute", "step"),
    ),
    Stage(
        34,
        "dp_sync",
        Kind.SEGMENT,
        Timeline.SCHEDULER,
        Level.STEP,
        "agreeing with the other data-parallel ranks on the next step",
        "moving activations",
        ("between", "step"),
    ),
    Stage(
        35,
        "emit",
        Kind.SEGMENT,
        Timeline.SCHEDULER,
        Level.STEP,
        "sending outputs to the front end",
        "the front end's own work",
        ("between", "update"),
    ),
    Stage(
        36,
        "between",
        Kind.OCCASION,
        Timeline.SCHEDULER,
        Level.STEP,
        "loop work of the scheduler that belongs to no step: taking requests in, aborts, outputs, empty schedules",
        "idle time: the wait for requests is idle",
    ),
    # Rank timeline
    Stage(
        50,
        "prepare",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.STEP,
        "building the inputs of the forward pass from the batch",
        "device time on a GPU: the host's clock",
        ("rank_step", "execute"),
        (_RANK,),
    ),
    Stage(
        51,
        "forward",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.STEP,
        "the model's forward pass, logits included",
        "device time on a GPU: there the host only launches it",
        ("rank_step", "execute"),
        (_RANK, _TOKENS),
    ),
    Stage(
        52,
        "sample",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.STEP,
        "choosing the tokens from the logits",
        "device time on a GPU",
        ("rank_step", "execute"),
        (_RANK,),
    ),
    Stage(
        53,
        "bookkeep",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.STEP,
        "bringing the sampled tokens to the host and into the batch's state",
        "the scheduler's own bookkeeping, which is update; a wait for the device shows up here",
        ("rank_step", "execute"),
        (_RANK,),
    ),
    Stage(
        54,
        "draft",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.STEP,
        "proposing speculative tokens",
        "verifying them",
        ("return", "sample", "rank_step", "execute"),
        (_RANK,),
    ),
    Stage(
        55,
        "verify",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.STEP,
        "accepting or rejecting speculative tokens",
        "the forward pass over them",
        ("sample", "rank_step"),
        (_RANK,),
    ),
    Stage(
        56,
        "return",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.STEP,
        "building the result and handing it back",
        "its way to the scheduler's process",
        ("rank_step", "execute"),
        (_RANK,),
    ),
    *(
        Stage(
            number,
            name,
            Kind.SEGMENT,
            Timeline.DEVICE,
            Level.STEP,
            f"{what}, on the device: from when its stream came to what `{launches}` launched first until it was done"
            " with the last of it",
            "time in which kernels ran: where the host launches them slower than they run, the gaps are in it",
            inside,
            (_RANK, _LAUNCH_DELAY, _CLOCK_ERROR),
        )
        for number, name, launches, what, inside in (
            (57, "device_forward", "forward", "the forward pass", ()),
            (58, "device_sample", "sample", "sampling", ()),
            (59, "device_draft", "draft", "proposing speculative tokens", ("device_sample",)),
        )
    ),
    *(
        Stage(
            number,
            f"device_{place}",
            Kind.SEGMENT,
            Timeline.DEVICE,
            Level.LAYER,
            f"{what}, on the device, in graphs as well: between the marks before and after it",
            "layers without marks; kernels that the compiler fused with what is outside",
            inside,
            (_LAYER, _RANK, _CLOCK_ERROR),
        )
        for number, place, what, inside in (
            (60, "attention", "one layer's attention", ("device_forward",)),
            (61, "mlp", "one layer's dense feed-forward block", ("device_forward",)),
            (
                62,
                "moe",
                "one layer's experts, from their routing to their combine",
                ("device_mlp", "device_forward"),
            ),
            (
                63,
                "collective",
                "one operation of a group of ranks, in the layer of the attention before it (-1: before the first)",
                ("device_moe", "device_mlp", "device_forward"),
            ),
        )
    ),
    # Front-end timeline
    Stage(
        70,
        "tokenize",
        Kind.SEGMENT,
        Timeline.FRONT_END,
        Level.STEP,
        "one call of the tokenizer",
        "waiting for a free tokenizer thread",
    ),
    Stage(
        71,
        "dispatch",
        Kind.SEGMENT,
        Timeline.FRONT_END,
        Level.STEP,
        "handing a request to the engine or to a data-parallel rank",
        "its way there",
    ),
    Stage(
        72,
        "detokenize",
        Kind.SEGMENT,
        Timeline.FRONT_END,
        Level.STEP,
        "turning one batch of new tokens into text and waking the requests' streams",
        "writing to sockets",
        (),
        (_REQUESTS,),
    ),
    # Layer level, inside forward
    Stage(
        90,
        "embed",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.LAYER,
        "token embedding",
        "device time on a GPU",
        ("prepare", "forward"),
        (_LAYER_TOKENS,),
    ),
    Stage(
        91,
        "attention",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.LAYER,
        "one layer's attention, of the kind that the attribute says",
        "the projections around it",
        ("forward",),
        (
            _LAYER,
            _one_of("kind", AttentionKind),
            _LAYER_TOKENS,
        ),
    ),
    Stage(
        92,
        "mlp",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.LAYER,
        "one layer's dense feed-forward block, with the collective at its end",
        "experts",
        ("forward",),
        (_LAYER, _LAYER_TOKENS),
    ),
    Stage(
        93,
        "moe_route",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.LAYER,
        "choosing the experts of every token",
        "the router's matrix product where the engine fuses it elsewhere",
        ("expert_compute", "forward"),
        (_LAYER, _LAYER_TOKENS),
    ),
    Stage(
        94,
        "expert_dispatch",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.LAYER,
        "sending tokens to the ranks of their experts",
        "the experts' computation",
        ("expert_compute", "forward"),
        (_LAYER, _LAYER_TOKENS, _BYTES),
    ),
    Stage(
        95,
        "expert_compute",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.LAYER,
        "the routed experts' matrix products; with the routing where one kernel does both",
        "shared experts",
        ("forward",),
        (_LAYER, _LAYER_TOKENS),
    ),
    Stage(
        96,
        "expert_combine",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.LAYER,
        "bringing the experts' results back and adding them up",
        "the tensor-parallel all_reduce after it",
        ("expert_compute", "forward"),
        (_LAYER, _LAYER_TOKENS, _BYTES),
    ),
    Stage(
        97,
        "shared_experts",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.LAYER,
        "the experts that every token passes",
        "routed experts",
        ("expert_combine", "forward"),
        (_LAYER, _LAYER_TOKENS),
    ),
    Stage(
        98,
        "logits",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.LAYER,
        "the last projection, onto the vocabulary",
        "sampling",
        ("sample", "forward"),
        (_ROWS,),
    ),
    Stage(
        99,
        "encode",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.LAYER,
        "a multimodal encoder",
        "fetching or decoding the image, sound or video",
        ("prepare", "forward"),
        (Attribute("inputs", Unit.COUNT, "images, sounds or videos"),),
    ),
    Stage(
        100,
        "collective",
        Kind.SEGMENT,
        Timeline.RANK,
        Level.LAYER,
        "one operation of a group of ranks; what it is made of is not counted again",
        "bytes moving alone: the wait for the last rank to arrive is in it; on a GPU the host only launches it",
        (
            *("expert_dispatch", "expert_combine", "shared_experts", "mlp", "embed", "logits", "encode"),
            *("forward", "sample", "prepare", "bookkeep", "rank_step", "execute"),
        ),
        (
            _one_of("op", Collective),
            Attribute("group", Unit.HANDLE, "the group of ranks, by name"),
            Attribute("bytes", Unit.BYTES, "size of what this rank gives; of what it gets where it only receives"),
            Attribute("algorithm", Unit.HANDLE, "what carried it out, by name; 0 where that is not known"),
            Attribute(
                "sequence",
                Unit.COUNT,
                "number of this operation in its group since the start, the same on every rank; 0 between two ranks",
            ),
        ),
    ),
    # Now and then
    Stage(
        120,
        "model_load",
        Kind.OCCASION,
        Timeline.RANK,
        Level.REQUEST,
        "loading the weights",
        "compiling or capturing",
    ),
    Stage(
        121,
        "compile",
        Kind.OCCASION,
        Timeline.RANK,
        Level.REQUEST,
        "compiling a graph",
        "running it",
    ),
    Stage(
        122,
        "graph_capture",
        Kind.OCCASION,
        Timeline.RANK,
        Level.REQUEST,
        "capturing device graphs",
        "replaying them",
    ),
    Stage(
        123,
        "eplb_rebalance",
        Kind.OCCASION,
        Timeline.RANK,
        Level.REQUEST,
        "moving experts between ranks to balance their load",
        "the counting of the load",
    ),
    Stage(
        124,
        "kv_load",
        Kind.OCCASION,
        Timeline.RANK,
        Level.STEP,
        "a connector's call that loads KV blocks, or begins to; at layer level also each layer's wait for its own",
        "the whole of a transfer, which can go on beside steps; KV found in the device's own cache",
        ("prepare", "forward", "sample", "return", "rank_step", "execute", "idle"),
    ),
    Stage(
        125,
        "kv_store",
        Kind.OCCASION,
        Timeline.RANK,
        Level.STEP,
        "a connector's call that waits until KV blocks are stored; at layer level also the storing of each layer's",
        "the whole of a transfer, which can go on beside steps; writing KV in attention",
        ("prepare", "forward", "sample", "return", "rank_step", "execute", "idle"),
    ),
    Stage(
        126,
        "weight_update",
        Kind.OCCASION,
        Timeline.RANK,
        Level.REQUEST,
        "replacing weights in a running engine",
        "the first load",
    ),
    Stage(
        127,
        "sleep",
        Kind.OCCASION,
        Timeline.RANK,
        Level.REQUEST,
        "the engine was put to sleep until it was woken",
        "idle time",
    ),
    Stage(
        128,
        "gc_pause",
        Kind.OCCASION,
        Timeline.ANY,
        Level.STEP,
        "one collection of Python's cyclic garbage collector, in which the process's threads stand still",
        "reference counting",
        (),
        (
            Attribute("generation", Unit.COUNT, "generation collected, 0 to 2"),
            Attribute("collected", Unit.COUNT, "objects freed"),
        ),
    ),
    Stage(
        129,
        "idle",
        Kind.OCCASION,
        Timeline.ANY,
        Level.STEP,
        "a gap on a timeline, with its reason",
        "a fault: most often there was no work",
        ("rank_step",),
        (_one_of("reason", IdleReason),),
    ),
    Stage(
        130,
        "grammar_compile",
        Kind.OCCASION,
        Timeline.ANY,
        Level.STEP,
        "compiling the grammar of one request, on a thread of its own",
        "time that the scheduler spends",
    ),
    Stage(
        131,
        "dummy_run",
        Kind.OCCASION,
        Timeline.RANK,
        Level.STEP,
        "a step without requests, because other data-parallel ranks have some",
        "work for a request",
        (),
        (_RANK,),
    ),
    # Start-up
    *(
        Stage(number, name, Kind.OCCASION, timeline, Level.REQUEST, means, does_not_mean)
        for number, name, timeline, means, does_not_mean in (
            (
                *(132, "startup", Timeline.ANY, "from the process's start until its part of the engine is ready"),
                "the server: it answers when all processes are ready, and its front end has bound its socket",
            ),
            (
                *(133, "imports", Timeline.ANY, "from the process's start until the engine begins to build itself"),
                "imports alone: Python's start, arguments, configuration, and waiting for a forking parent are in it",
            ),
            (
                *(134, "start_workers", Timeline.SCHEDULER, "starting the workers until their models are loaded"),
                "the scheduler's own work: it waits",
            ),
            (
                *(135, "set_up_kv_cache", Timeline.SCHEDULER, "having the workers profile, allocate and warm up"),
                "the scheduler's own work: it waits",
            ),
            (
                *(136, "init_device", Timeline.RANK, "setting up the device, process groups and the model runner"),
                "loading the model",
            ),
            (
                *(137, "build_model", Timeline.RANK, "making the model's modules and their empty weights"),
                "reading weights",
            ),
            (
                *(138, "load_weights", Timeline.RANK, "reading the weights into the model"),
                "downloading alone: reading, converting and sharding are in it",
            ),
            (
                *(139, "profile_memory", Timeline.RANK, "finding out how much memory is left for the KV cache"),
                "a measurement of the load: it runs the model on made-up input, and compiles it if that is its turn",
            ),
            (
                *(140, "allocate_kv_cache", Timeline.RANK, "allocating the KV cache and what attention needs with it"),
                "filling it",
            ),
            (
                *(141, "warm_up", Timeline.RANK, "running the model on made-up input until it is fast"),
                "steps of requests",
            ),
        )
    ),
)

BY_NAME: dict[str, Stage] = {stage.name: stage for stage in STAGES}
BY_ID: dict[int, Stage] = {stage.id: stage for stage in STAGES}

# What is in the batch, known when a step is scheduled: the words of a step's begin record, in order.
# q: tokens of a request in this step; kv: its context after this step. Sums run over the requests of the phase.
STEP_COMPOSITION: tuple[Attribute, ...] = (
    Attribute("prefill_requests", Unit.COUNT, "requests with a prefill chunk in the step"),
    Attribute("decode_requests", Unit.COUNT, "requests in decode in the step"),
    Attribute("prefill_tokens", Unit.TOKENS, "sum of q over prefill"),
    Attribute("prefill_context", Unit.TOKENS, "sum of kv over prefill"),
    Attribute("prefill_q_q", Unit.COUNT, "sum of q squared over prefill"),
    Attribute("prefill_q_kv", Unit.COUNT, "sum of q times kv over prefill"),
    Attribute("decode_tokens", Unit.TOKENS, "sum of q over decode"),
    Attribute("decode_context", Unit.TOKENS, "sum of kv over decode"),
    Attribute("decode_q_q", Unit.COUNT, "sum of q squared over decode"),
    Attribute("decode_q_kv", Unit.COUNT, "sum of q times kv over decode"),
    Attribute("cached_tokens", Unit.TOKENS, "prompt tokens found in a cache, of the requests that joined in this step"),
    Attribute("waiting", Unit.COUNT, "requests in the waiting queue after scheduling"),
    Attribute("running", Unit.COUNT, "requests in the running batch after scheduling"),
    Attribute("kv_usage", Unit.PPM, "share of the KV cache's blocks in use after scheduling"),
    Attribute("preempted", Unit.COUNT, "requests preempted while scheduling"),
    Attribute("draft_tokens", Unit.TOKENS, "speculative tokens to verify in the step"),
)

# What came of a step, where the engine says: further words of a step's end record, in order; 0 for unknown. A record
# without them is of a step that gave each request (but those in the middle of a prefill) one token.
STEP_RESULT: tuple[Attribute, ...] = (
    Attribute("accepted_tokens", Unit.TOKENS, "speculative tokens that were accepted in the step"),
    Attribute("received_tokens", Unit.TOKENS, "tokens that the step's requests received, where it verified drafts"),
    Attribute("padded_tokens", Unit.TOKENS, "tokens that the forward pass ran on, padding included"),
    Attribute("graph_mode", Unit.ENUM, ", ".join(f"{mode.value} {mode.name.lower()}" for mode in GraphMode)),
)


class Phase(StrEnum):
    """What kind of work a step did."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


def phase(prefill_tokens: int, decode_tokens: int) -> Phase:
    """The kind of a step, by what was scheduled in it."""
    if prefill_tokens and decode_tokens:
        return Phase.MIXED
    return Phase.PREFILL if prefill_tokens else Phase.DECODE


class Finish(IntEnum):
    """Why a request ended; the word that its last records carry."""

    UNKNOWN = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3
    ERROR = 4
    REPETITION = 5
