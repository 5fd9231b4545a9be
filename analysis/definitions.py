"""What every number of a report or a comparison means: one table, for `--explain` and for docs/numbers.md.

Stages, and what is in a step's batch, are defined in instrument/stages.py and found here as well.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from stagetrace.instrument.stages import BY_NAME, STEP_COMPOSITION, STEP_RESULT, Kind


@dataclass(frozen=True)
class Definition:
    """One number: its unit, what it means, how it is made, and what it is not."""

    name: str
    section: str
    unit: str
    means: str
    formula: str
    does_not_mean: str


def _section(section: str, *rows: tuple[str, str, str, str, str]) -> list[Definition]:
    return [Definition(name, section, unit, means, formula, never) for name, unit, means, formula, never in rows]


REQUESTS, LATENCIES, PARTS, STEPS, STAGES = "Requests", "Latencies", "Parts of a latency", "Steps", "Stages"
LAYERS, LIGHT, HEALTH, COMPARISON = "Inside forward", "Speed of light", "Losses and health", "Comparison"
DISTRIBUTIONS, STORY = "Distributions", "One request"
SESSION, DEVICE = "Session", "Devices"

DEFINITIONS: tuple[Definition, ...] = (
    *_section(
        SESSION,
        (
            "version",
            "1",
            "version of the JSON object",
            "raised by a change that breaks readers",
            "stagetrace's version",
        ),
        (
            "processes",
            "1",
            "instrumented processes",
            "those that opened a ring",
            "processes of the engine without hooks",
        ),
        (
            "duration_ns",
            "ns",
            "length of the session by the wall clock",
            "manifest's last update - the collector's start",
            "the time under load: see rates",
        ),
        ("last_s", "s", "the window that was asked for", "--last", "the time that the session covers"),
    ),
    *_section(
        DISTRIBUTIONS,
        (
            "count",
            "1",
            "how many values there are",
            "number of values that are known",
            "the number of requests or steps",
        ),
        ("mean", "as its values", "arithmetic mean", "sum / count", "a typical value: a few long ones move it"),
        (
            "p50",
            "as its values",
            "median",
            "linear interpolation between the two nearest values (numpy `linear`)",
            "the mean",
        ),
        (
            "p95",
            "as its values",
            "95 % of the values are at most this",
            "linear interpolation between the two nearest values (numpy `linear`)",
            "exact with few values: of 20 it is close to the largest",
        ),
        (
            "p99",
            "as its values",
            "99 % of the values are at most this",
            "linear interpolation between the two nearest values (numpy `linear`)",
            "exact with few values: of 100 it is close to the largest",
        ),
    ),
    *_section(
        REQUESTS,
        (
            "by_status",
            "1",
            "requests by how they ended: finished, aborted (by the client), error, lost (open when its process"
            " died), open (when the session ended or was read)",
            "count by `status`",
            "why generation stopped",
        ),
        (
            "finished",
            "1",
            "requests that ended by themselves",
            "count by status",
            "requests with a stop string: see finish",
        ),
        ("aborted", "1", "requests whose client went away or asked for it", "count by status", "errors"),
        (
            "error",
            "1",
            "requests that the engine could not go on with",
            "count by status",
            "errors of stagetrace's own",
        ),
        (
            "open",
            "1",
            "requests that had not ended when the session ended or was read",
            "count by status",
            "lost requests",
        ),
        (
            "partial",
            "1",
            "requests whose beginning was not recorded, or during which recording was switched",
            "count, of any status",
            "requests that were cut off by an error",
        ),
        (
            "measured",
            "1",
            "requests that latencies are taken over",
            "all but lost, open and partial ones",
            "finished requests alone: aborted and failed ones are in it",
        ),
        (
            "prompt_tokens",
            "tokens",
            "tokens in prompts, cached ones included",
            "sum over all requests, whatever their status, as far as recorded",
            "tokens that were computed",
        ),
        (
            "output_tokens",
            "tokens",
            "tokens that were generated",
            "sum over all requests; of steps: what their requests received",
            "draft tokens that were rejected",
        ),
        (
            "cached_tokens",
            "tokens",
            "prompt tokens whose KV was found in a cache",
            "sum over all requests; of a step: those of the requests that joined in it",
            "output tokens",
        ),
        (
            "preemptions",
            "1",
            "times that a running request was thrown out of the batch",
            "sum over all requests",
            "requests that were preempted: one can be several times",
        ),
        (
            "span_ns",
            "ns",
            "what rates are over",
            "first arrival (or first time known) to last end, of all requests",
            "the session's duration",
        ),
        (
            "requests_per_s",
            "1/s",
            "finished requests a second",
            "finished requests / span",
            "the rate that the server could sustain",
        ),
        (
            "output_tokens_per_s",
            "tokens/s",
            "output tokens a second",
            "output tokens of all requests / span",
            "decode speed of one request: see tpot",
        ),
        (
            "total_tokens_per_s",
            "tokens/s",
            "prompt and output tokens a second",
            "(prompt + output tokens of all requests) / span",
            "computed tokens: cached ones count",
        ),
    ),
    *_section(
        LATENCIES,
        (
            "ttft",
            "ns",
            "time to first token: from arrival in the front end until the front end had the first token",
            "first_output_ns - arrival_ns",
            "what the client saw: see ttft_client. Without streaming SGLang hands the front end blocks of tokens,"
            " and its own metric counts until the scheduler had the first one (`first_token_ns`)",
        ),
        (
            "ttft_client",
            "ns",
            "from the head of the HTTP request until the first bytes of the answer were handed to the client's socket",
            "first_sent_ns - received_ns",
            "the first token of what is not streamed: there it is the whole answer. No value for what did not come"
            " by HTTP; the network is outside",
        ),
        (
            "e2e",
            "ns",
            "from arrival until the front end had the last token and saw that the request is over",
            "last_output_ns - arrival_ns",
            "what the client saw: see e2e_client",
        ),
        (
            "e2e_client",
            "ns",
            "from the head of the HTTP request until the last byte was handed to the client's socket",
            "last_sent_ns - received_ns",
            "time on the network, or the client's reading",
        ),
        (
            "tpot",
            "ns",
            "time per output token after the first, of requests with two or more",
            "(last_token_ns - first_token_ns) / (output tokens - 1)",
            "inter-token latency: it weighs every request the same, itl every token",
        ),
        (
            "itl",
            "ns",
            "inter-token latency: every interval between two tokens of a request, as the engine had them",
            "step end - end of the step that gave the request its token before; intervals whose step is not"
            " complete are left out",
            "one interval a token where a step gave several (accepted drafts): those came at once",
        ),
        (
            "itl_decode",
            "ns",
            "inter-token latency of intervals that a step with decode alone ended",
            "see itl",
            "time of decode alone: a prefill step before it can be in the interval",
        ),
        (
            "itl_mixed",
            "ns",
            "inter-token latency of intervals that a step with prefill and decode ended",
            "see itl",
            "the cost of prefill alone: see interference",
        ),
        (
            "itl_prefill",
            "ns",
            "inter-token latency of intervals that a step with prefill alone ended (the second token of engines"
            " that give it there)",
            "see itl",
            "time to first token",
        ),
        (
            "output",
            "ns",
            "time in the state output: last token until the last byte was handed to the socket",
            "sum of the state over a request, over the requests that were in it",
            "time on the network",
        ),
    ),
    *_section(
        PARTS,
        (
            "tokenize",
            "ns",
            "arrival until ready for the engine: template, tokenizer, validation",
            "time in the state; parts of a latency add up to it exactly",
            "reading the HTTP body",
        ),
        (
            "dispatch",
            "ns",
            "sent by the front end until the scheduler took it in",
            "time in the state",
            "network alone: the engine's wait until its current step is over is in it",
        ),
        (
            "queue_next_step",
            "ns",
            "in the queue until the scheduler's next look at it",
            "queued until the end of the next `schedule`; where the engine records causes, what no other cause has",
            "a full engine: nobody could have taken it in earlier",
        ),
        (
            "queue_grammar",
            "ns",
            "in the queue for its grammar to be compiled",
            "queue states whose cause the engine gives",
            "filling bitmasks, which is `grammar`",
        ),
        (
            "queue_kv_space",
            "ns",
            "left in the queue by steps without room in the KV cache",
            "as the engine recorded it, else from schedule to schedule of steps that preempted, or whose KV usage"
            " and a typical prompt are 95 % or more",
            "exact where the engine does not record it (vLLM does): then it is told from the step's record",
        ),
        (
            "queue_batch_full",
            "ns",
            "left in the queue by steps with as many requests as allowed",
            "as the engine recorded it, else from schedule to schedule of steps with running >= max_num_seqs",
            "a full KV cache",
        ),
        (
            "queue_token_budget",
            "ns",
            "left in the queue by steps with as many tokens as allowed",
            "as the engine recorded it, else from schedule to schedule of steps whose tokens reach"
            " max_num_batched_tokens (SGLang: chunked_prefill_size)",
            "the batch's number of requests",
        ),
        (
            "queue_lora_limit",
            "ns",
            "left in the queue as so many LoRA adapters were in use as may",
            "as the engine recorded it",
            "loading an adapter",
        ),
        (
            "queue_remote_kv",
            "ns",
            "left in the queue as a connector could not say yet what it has",
            "as the engine recorded it",
            "the transfer: see kv_transfer",
        ),
        (
            "queue_paused",
            "ns",
            "left in the queue as the engine takes nobody in: asleep, or its weights are replaced",
            "as the engine recorded it",
            "a full engine",
        ),
        (
            "queue_other",
            "ns",
            "left in the queue for no reason that the records tell",
            "the rest of the queue state",
            "nothing: priorities, LoRA limits, and limits that were not recorded are here",
        ),
        (
            "prefill_own",
            "ns",
            "steps' time for the request's own prompt",
            "of each step with a chunk of it, what prefill takes of the step, by its share of the step's prefill"
            " tokens",
            "a measurement of this chunk alone: tokens of one step are taken to cost the same",
        ),
        (
            "prefill_others",
            "ns",
            "steps' time for others while the request was in prefill",
            "time in steps while in prefill - prefill_own",
            "waiting in the queue",
        ),
        (
            "prefill_between",
            "ns",
            "no step under way while the request was in prefill",
            "gaps between steps",
            "idle time of the device alone",
        ),
        (
            "prefill_unknown",
            "ns",
            "in prefill while steps were not recorded",
            "at level request, or numbers are missing",
            "lost time",
        ),
        (
            "decode_own",
            "ns",
            "in decode, in what steps take for decode",
            "decode steps, and of mixed steps as much as the median decode step with as many requests in decode takes",
            "computing this request alone: the whole batch shares the step",
        ),
        (
            "interference",
            "ns",
            "in decode, in what other requests' prefill takes",
            "mixed steps beyond the median decode step with as many requests in decode, and prefill steps",
            "exact for a single step: contexts that grow are not told apart. 0 where no decode step was recorded",
        ),
        (
            "decode_between",
            "ns",
            "no step under way while the request was in decode: the host's gap",
            "gaps between the end of a step and the begin of the next",
            "gaps inside steps: see execute and idle",
        ),
        (
            "decode_unknown",
            "ns",
            "in decode while steps were not recorded",
            "at level request, or numbers are missing",
            "lost time",
        ),
        (
            "preempted",
            "ns",
            "thrown out of the batch until scheduled again; of a step: how many were",
            "time in the state",
            "all that a preemption costs: see recompute",
        ),
        (
            "recompute",
            "ns",
            "rebuilding the context after a preemption",
            "prefill states that resume",
            "the first prefill",
        ),
        (
            "kv_transfer",
            "ns",
            "waiting for KV blocks from another instance or a store",
            "time in the state",
            "bytes on the wire alone",
        ),
        (
            "delivery",
            "ns",
            "the engine had the token until the front end had it",
            "first_output_ns - first_token_ns; of e2e: last_output_ns - last_token_ns",
            "writing to the socket",
        ),
        ("not_recorded", "ns", "in no state that was recorded", "latency - all other parts", "unattributed of a step"),
        (
            "least_ns",
            "ns",
            "the least value of the group; of speed of light: the least time that the work would take",
            "minimum; least times summed over the steps",
            "the fastest request of all",
        ),
        ("most_ns", "ns", "the greatest value of the group", "maximum", "the slowest request of all"),
        (
            "mean_ns",
            "ns",
            "mean of the group's values: what its parts add up to; of a distribution its mean",
            "sum / count",
            "the percentile itself, which lies within the group",
        ),
        (
            "parts",
            "ns",
            "where the time of a group of requests went: those around a percentile, not the percentile of each part",
            "means over the group: requests whose rank is within 2.5 % (p99: 1 %) of all on each side of the"
            " percentile, at least two on each side; itl: intervals likewise",
            "medians: they would not add up",
        ),
    ),
    *_section(
        STEPS,
        (
            "complete",
            "1",
            "steps whose end was recorded and all of whose ranks reported",
            "count by status",
            "steps without an error",
        ),
        ("ranks_missing", "1", "steps that a rank did not report within 5 s", "count by status", "ranks that died"),
        (
            "total_ns",
            "ns",
            "sum of durations",
            "sum over steps, segments or rank_steps",
            "time that passed: steps can overlap, ranks run side by side",
        ),
        ("tokens_mean", "tokens", "tokens scheduled in a step", "mean of prefill and decode tokens", "tokens received"),
        (
            "requests_mean",
            "1",
            "requests in a step's batch",
            "mean of prefill and decode requests",
            "concurrency of clients",
        ),
        ("membership_unknown", "1", "steps of which a change of the batch was lost", "count", "steps that were lost"),
        ("duration", "ns", "from begin to end, with what is inside", "end - begin", "self time"),
        ("step_decode", "ns", "duration of a complete step with decode alone", "end - begin", "device time"),
        ("step_mixed", "ns", "duration of a complete step with prefill and decode", "end - begin", "device time"),
        ("step_prefill", "ns", "duration of a complete step with prefill alone", "end - begin", "device time"),
        ("kv_usage_mean", "share", "KV cache in use", "mean over complete steps after scheduling", "the peak"),
        (
            "waiting_mean",
            "1",
            "requests in the scheduler's queue",
            "mean over complete steps after scheduling",
            "requests in the front end",
        ),
        (
            "batch_mean",
            "1",
            "requests in a complete step's batch",
            "mean of prefill and decode requests",
            "what max_num_seqs allows",
        ),
        ("decode_batch_mean", "1", "requests in decode in a complete step", "mean", "what max_num_seqs allows"),
    ),
    *_section(
        STAGES,
        (
            "self_ns",
            "ns",
            "a stage's time without that of the stages directly inside it",
            "duration - children, summed",
            "how long its calls took: see duration",
        ),
        (
            "share",
            "share",
            "self time over all self times and unattributed of the timeline; of experts: of tokens; of speed of"
            " light: least time over the time that it took",
            "0 to 1; shares of a table add up to 1",
            "a share of time that passed where threads or steps overlap",
        ),
        (
            "unattributed",
            "ns",
            "time that no stage covers",
            "envelope - self times of what is directly inside",
            "idle time: work without a hook is in it",
        ),
        ("threads", "1", "threads on the timeline", "count", "threads of the process"),
        (
            "envelope_ns",
            "ns",
            "time of the envelopes (steps, rank_steps) or observed time",
            "sum of durations",
            "what shares are of: see accounted_ns",
        ),
        (
            "accounted_ns",
            "ns",
            "what shares are of",
            "self times and unattributed together",
            "the envelopes' time where these overlap",
        ),
        (
            "inside_ns",
            "ns",
            "of the time outside steps what interrupted a stage of a table above",
            "durations on a timeline above",
            "more time: it is in total_ns",
        ),
        ("segments_left_out", "1", "segments of steps that are not complete", "count", "segments that were lost"),
        (
            "stage_per_step",
            "ns",
            "self time of a stage for each complete step, all ranks together",
            "sum of self times / complete steps",
            "the duration of one call",
        ),
    ),
    *_section(
        LAYERS,
        ("layer", "1", "index of the transformer layer, from 0", "as recorded", "a count"),
        ("layers", "1", "how many layers have the stage", "count", "the model's layers, where kinds differ"),
        (
            "slowest_layer",
            "1",
            "the layer with the longest mean duration",
            "arg max of means",
            "the longest single call",
        ),
        ("slowest_ns", "ns", "that layer's mean duration", "mean", "the longest single call"),
        ("ranks", "1", "ranks that were recorded", "processes with a segment", "the group's size"),
        (
            "bytes",
            "B",
            "bytes that ranks gave (got, where they only receive); of speed of light: weights and cache that had to"
            " move",
            "sum over segments or steps",
            "bytes on the wire: algorithms send more",
        ),
        ("compared", "1", "segments whose operation was recorded on another rank as well", "count", "all segments"),
        (
            "waiting_ns",
            "ns",
            "in collectives until the last of the recorded ranks had come",
            "min(last begin - own begin, duration), of compared segments",
            "bytes moving; ranks of other hosts are not compared",
        ),
        (
            "moving_ns",
            "ns",
            "in collectives after the last of the recorded ranks had come",
            "duration - waiting",
            "device time on a GPU, where the host only launches",
        ),
        (
            "bytes_per_s",
            "B/s",
            "bytes over the time after the last rank had come; of speed of light: over the whole time",
            "bytes / moving_ns; bytes / time_ns",
            "the link's bandwidth: see of link",
        ),
        ("experts", "1", "the layer's experts", "logical ones, before balancing places copies", "experts of this rank"),
        (
            "tokens",
            "tokens",
            "tokens sent to experts: one counts for each expert that it was sent to",
            "sum over experts and steps",
            "tokens of the batch; padding does not count",
        ),
        (
            "imbalance",
            "1",
            "busiest expert's tokens over the mean",
            "of the sums over all steps: 1 is even",
            "what a step waits for: see imbalance_per_step",
        ),
        (
            "imbalance_per_step",
            "1",
            "busiest expert's tokens over the mean of all, in single steps",
            "weighted by the steps' tokens: 1 is even",
            "a bad router: a small batch is uneven in every step",
        ),
        (
            "rank_imbalance_per_step",
            "1",
            "the same of expert-parallel ranks: what the others wait for",
            "weighted by the steps' tokens",
            "time: tokens are counted",
        ),
        ("hot", "1", "experts with the most tokens and their share", "pairs of expert and share", "time"),
        ("idle", "1", "experts without a token", "count of them; the stage `idle` is a gap on a timeline", "idle time"),
    ),
    *_section(
        LIGHT,
        ("steps", "1", "steps that the work is summed over", "complete steps", "all steps"),
        (
            "operations",
            "FLOP",
            "operations that the result needs",
            "docs/speed-of-light.md",
            "operations that were run",
        ),
        (
            "bus_bytes",
            "B",
            "bytes of collectives on the busiest link, in one direction",
            "docs/speed-of-light.md",
            "bytes of the tensors",
        ),
        (
            "time_ns",
            "ns",
            "time that the work took",
            "of a kind of step: own times of its steps; of a stage: self time on one rank",
            "durations where steps overlap",
        ),
        (
            "operations_per_s",
            "FLOP/s",
            "operations over the time that they took",
            "operations / time_ns",
            "the device's rate while it computed: the host's part of the time is in it",
        ),
        (
            "mfu",
            "share",
            "model FLOPs utilisation",
            "least time by operations alone / time",
            "the busy share of the device",
        ),
        ("mbu", "share", "model bandwidth utilisation", "least time by bytes alone / time", "bytes that were moved"),
        (
            "link_share",
            "share",
            "of the link's bandwidth",
            "least time by link bytes alone / time",
            "bytes that were moved",
        ),
        (
            "begin_ns",
            "ns",
            "when a window, a state or a chunk begins",
            "of windows monotonic, of one request since its arrival",
            "wall time",
        ),
        (
            "host_ns",
            "ns",
            "of a gap: time in which no rank was in the model's work or a collective",
            "own time of steps less the other parts and the least time; mean over ranks",
            "the host's work that the device hides",
        ),
        (
            "launch_ns",
            "ns",
            "of a gap: time in which the host was in the model's calls and the device stood still",
            "mean over ranks; null without records of the device's own clock",
            "all of launching: what the device's work hides is not in it",
        ),
        (
            "communication_ns",
            "ns",
            "of a gap: time in collectives after the last recorded rank had come",
            "mean over ranks; less the least time in steps that the link bounds; null where it cannot be told",
            "waiting for a rank, which is imbalance",
        ),
        (
            "imbalance_ns",
            "ns",
            "of a gap: time in collectives until the last recorded rank had come",
            "mean over ranks; null where it cannot be told",
            "uneven experts alone",
        ),
        (
            "kernel_ns",
            "ns",
            "of a gap: time in the model's own work beyond the least time",
            "mean over ranks; with it the parts that are null",
            "products alone: norms, activation functions and sampling are in it",
        ),
        (
            "untold_ns",
            "ns",
            "of a gap: steps of which no rank was recorded",
            "their own time less their least time",
            "idle time",
        ),
        ("width_ns", "ns", "width of a window of time", "a round number, for at most twelve windows", "time in steps"),
        (
            "busy",
            "share",
            "steps' own time over the window's width",
            "above 1 with several engines, or where a step began in the window before",
            "the busy share of the device",
        ),
        (
            "ttft_ns",
            "ns",
            "median TTFT of finished requests, until the engine had the first token",
            "first_token_ns - arrival_ns",
            "ttft, which ends in the front end",
        ),
        ("tpot_ns", "ns", "median TPOT of finished requests", "see tpot", "itl"),
        (
            "least_ttft_ns",
            "ns",
            "TTFT at the speed of light with the device alone",
            "median of one step with the prompt",
            "a goal under load",
        ),
        (
            "least_tpot_ns",
            "ns",
            "TPOT at the speed of light with the device alone",
            "median of a step with one token, halfway through the output",
            "a goal under load",
        ),
    ),
    *_section(
        DEVICE,
        (
            "observed_ns",
            "ns",
            "of a device: from the begin of its first stage to the end of its last",
            "last end - first begin",
            "the session's length",
        ),
        (
            "busy_ns",
            "ns",
            "of a device: in one of its stages, on any of its streams",
            "union of device_forward, device_sample and device_draft, and what is in them",
            "time in which kernels ran: where the host launches them slower than they run, the gaps are in it",
        ),
        (
            "still",
            "ns",
            "of a device: in none of its stages, by what its rank's host was in just then",
            "observed_ns - busy_ns, each nanosecond under the first reason that holds",
            "time that could be saved: without work there is nothing to do",
        ),
        (
            "pauses",
            "ns",
            "of a device: single times between two of its stages",
            "next begin - end",
            "time without work",
        ),
        (
            "launch_delay",
            "ns",
            "from when the host began to launch a forward pass until the device began it",
            "begin of device_forward - the host's time before its first event was launched",
            "what launching costs: behind earlier work it is the time in which that hides it",
        ),
        (
            "clock_error",
            "ns",
            "by how much times of a device can be off the host's clock, in one direction or the other",
            "half of what is between the bounds of the clocks' offset, plus what drift adds",
            "an error of durations, which are of one clock",
        ),
        ("clock_error_most_ns", "ns", "the largest of these", "maximum", "a typical one"),
        ("skipped", "1", "pairs of events that were left out, since too many were under way", "count", "steps"),
        (
            "contradictions",
            "1",
            "observations of a device's clock that the drift which is assumed does not explain",
            "count; each begins the estimate anew",
            "wrong durations",
        ),
        ("marked_layers", "1", "indices of the layers that have marks", "as the rank says", "the model's layers"),
        (
            "marks_per_step",
            "1",
            "marks that a step passes at most, each a kernel of one thread",
            "two for each place, two around the pass, two with nothing between",
            "what they cost: see performance.md",
        ),
        (
            "empty_ns",
            "ns",
            "of marks: what two of them with nothing between take, which is taken off every span, half at either end",
            "the shortest so far in any step; null until one took at most 3 us: nothing is taken off till then",
            "all that launching takes: a stage's first kernel can begin later than a mark would",
        ),
        (
            "passed_steps",
            "1",
            "steps that passed a stage's marks",
            "steps with a span of it",
            "steps that were recorded: in others nobody read the marks, or a graph without them ran",
        ),
        (
            "share_of_forward",
            "share",
            "of marks: a stage's spans over the forward pass on the device",
            "sum of its spans / sum of device_forward, of the same steps",
            "the stage's share of the model: only layers with marks count",
        ),
        (
            "estimated_share",
            "share",
            "the same if all layers that have the stage took as long as those with marks, on average",
            "share of forward * the model's layers with the stage / those with marks",
            "a measurement: layers can be unlike. Null without the model, with pipeline stages, of collectives",
        ),
        (
            "not_told",
            "1",
            "what marks did not tell, by reason",
            "counts since the start, see below; a reason with 0 is left out",
            "wrong times: what is told is as it was",
        ),
        ("absent", "1", "spans whose marks a step did not pass, and others had", "count", "a fault: graphs differ"),
        ("halves", "1", "spans of which a step passed one mark alone", "count", "half a time"),
        ("repeated", "1", "spans that a step passed more than once", "count; the last time is told", "spans missing"),
        ("backwards", "1", "spans that end before they begin: another order of marks", "count", "negative times"),
        ("unplaced", "1", "steps whose marks were read, but whose event pair was not", "count", "spans"),
        (
            "errors",
            "1",
            "of marks: exceptions of stagetrace's own, contained",
            "count; after a few the rank does without marks",
            "errors of the engine",
        ),
    ),
    *_section(
        HEALTH,
        (
            "slots_read",
            "1",
            "slots of the rings that the collector read",
            "count",
            "records: a long one has several slots",
        ),
        ("read", "1", "slots of one ring that were read", "count", "records"),
        ("slots", "1", "size of a ring", "slots", "slots in use"),
        ("lost", "1", "what of a ring did not reach the session", "sum over the reasons but read", "spans"),
        (
            "overwritten",
            "1",
            "slots of the detail ring overwritten before they were read; of marks: spans, by a later step's marks",
            "count",
            "records of requests",
        ),
        ("dropped", "1", "records that the control ring had no room for", "count", "slots"),
        ("torn", "1", "slots whose two sequence numbers differ", "count", "damaged memory"),
        (
            "unfinished",
            "1",
            "slots taken but not written when the process died, or for too long",
            "count",
            "slots lost by the collector",
        ),
        (
            "corrupt",
            "1",
            "slots with an impossible type, length or range",
            "count",
            "all altered bytes: others are not detected",
        ),
        (
            "given_up",
            "1",
            "slots that were read and could not be written: the disk was full",
            "count",
            "overwritten slots",
        ),
        (
            "incomplete",
            "1",
            "records of several slots of which a part is missing; of steps: open when the process died",
            "count",
            "partial, which a switch of the level cuts",
        ),
        ("accounting_conflict", "1", "segments that crossed the one they are in, and were cut", "count", "lost time"),
        ("accounting_conflicts", "1", "segments that crossed the one they are in, and were cut", "count", "lost time"),
        (
            "contained_errors",
            "1",
            "exceptions in stagetrace's own hooks, by hook",
            "count",
            "errors that the engine saw",
        ),
        ("counts", "1", "the collector's own counters", "count", "losses"),
        ("sent", "1", "spans that a backend confirmed", "each once, unless a process died", "spans that it keeps"),
        ("refused", "1", "spans that a backend would not take while it took others", "count", "spans that wait"),
        (
            "left_out",
            "1",
            "rows that become no spans, by reason; of marks: steps for which no buffer was free",
            "count",
            "losses of the rings",
        ),
        (
            "waiting",
            "1",
            "of exports: commits that wait for the backend; of a step: requests in the waiting queue",
            "count",
            "time",
        ),
        ("rotated_ns", "ns", "until when (wall clock) --keep removed what was recorded", "0 for nothing", "a duration"),
    ),
    *_section(
        STORY,
        (
            "rank_share",
            "share",
            "measured requests of the session with a smaller value",
            "count of smaller ones / measured requests",
            "a share of time",
        ),
        (
            "others",
            "1",
            "other requests in the steps that a request took part in",
            "mean over these steps of requests - 1",
            "concurrency of clients",
        ),
        (
            "others_prefill_tokens",
            "tokens",
            "prefill tokens of other requests in the steps that a request took part in",
            "sum of the steps' prefill tokens - its own",
            "time: see interference",
        ),
        (
            "longest_ns",
            "ns",
            "longest interval between two steps' ends while a request was in a state",
            "maximum",
            "a fault: steps with much prefill are long",
        ),
    ),
    *_section(
        COMPARISON,
        ("change", "share", "difference over A's value", "(B - A) / A", "better or worse: see verdict"),
        ("difference", "as its values", "B's value - A's value", "B - A", "a change that is certain: see its interval"),
        (
            "low",
            "as its values",
            "lower end of the difference's interval",
            "bootstrap over blocks of time, 95 %",
            "the least that is possible",
        ),
        (
            "high",
            "as its values",
            "upper end of the difference's interval",
            "bootstrap over blocks of time, 95 %",
            "the most that is possible",
        ),
        (
            "effect",
            "1",
            "Cliff's delta: how far the values of B lie above those of A",
            "P(B > A) - P(B < A) of two values drawn at random: 0 alike, 1 all of B above",
            "how large the change is",
        ),
        (
            "p",
            "1",
            "how often two sessions without a difference show one as large",
            "the larger of a permutation test over blocks and the bootstrap's tail",
            "the chance that there is no difference",
        ),
        (
            "p_adjusted",
            "1",
            "p after Holm's correction for all metrics that were compared",
            "Holm, 1979: step-down",
            "a p-value of a single metric",
        ),
        (
            "smallest",
            "as its values",
            "smallest difference that these data would have shown, four times in five",
            "(z(1 - 0.025 / metrics) + z(0.8)) x the bootstrap's standard error",
            "a bound on the difference that is there",
        ),
        (
            "cached_share",
            "share",
            "prompt tokens whose KV was found in a cache",
            "cached / prompt tokens",
            "hits: requests with a hit",
        ),
        ("a", "as its values", "A's value", "of all sessions of the side", "a baseline: A is what B is compared with"),
        ("b", "as its values", "B's value", "of all sessions of the side", "the better one"),
        (
            "change_low",
            "share",
            "lower end of the change's interval",
            "as low, over A's value drawn with it",
            "certain",
        ),
        (
            "change_high",
            "share",
            "upper end of the change's interval",
            "as high, over A's value drawn with it",
            "certain",
        ),
        (
            "blocks",
            "1",
            "blocks of time that the session is cut into",
            "as many requests in each, at most 20",
            "requests",
        ),
        (
            "arrivals_per_s",
            "1/s",
            "requests that arrived a second",
            "between the first and the last arrival",
            "a setting: a client that waits for answers sends more to a faster server",
        ),
        (
            "concurrency",
            "1",
            "requests in flight",
            "sum of lives / time from the first arrival to the last end",
            "the batch: requests that wait are in it",
        ),
        (
            "findings",
            "1",
            "metrics with a difference",
            "p_adjusted below 0.05, interval without 0, change of --least or more",
            "causes: one cause changes many",
        ),
        (
            "tested",
            "1",
            "metrics with a p",
            "what Holm's correction is over",
            "all metrics: some are on one side alone",
        ),
        (
            "exit_status",
            "1",
            "0: no condition holds; 1: one does",
            "2 for what cannot be read or understood, without JSON",
            "findings: without --fail-on it is 0",
        ),
        (
            "limit",
            "as its values",
            "the condition's number",
            "a share of a change in %, else in the metric's unit",
            "what was observed",
        ),
        (
            "value",
            "as its values",
            "what was observed of a condition",
            "the change, the difference, or B's value",
            "A's value",
        ),
        (
            "preemptions_per_request",
            "1",
            "preemptions a request",
            "preemptions / measured requests",
            "requests that were preempted",
        ),
        (
            "unattributed_share",
            "share",
            "step time that no stage covers",
            "unattributed / durations of complete steps",
            "idle time",
        ),
    ),
)

BY_KEY = {each.name: each for each in DEFINITIONS}
STATISTICS = ("count", "mean", "p50", "p95", "p99")
_SUFFIX = re.compile(rf"_({'|'.join(STATISTICS)})(_ns)?$")


class UnknownName(ValueError):
    """A name that is not defined; the message says which names are like it."""


def explain(name: str) -> list[Definition]:
    """What is defined under a name, and the statistic in it. Raises UnknownName.

    Takes names as reports, comparisons and `--fail-on` show them, and keys of the JSON objects, with dots or without.
    """
    wanted = name.strip().rpartition(".")[2].replace(" ", "_").lower()
    found = _defined(wanted)
    cut = _SUFFIX.search(wanted)
    if not found and cut:
        found = _defined(wanted[: cut.start()])
        found += [BY_KEY[cut[1]]] if found else []
    if not found:
        alike = difflib.get_close_matches(wanted, names(), 5, 0.5)
        hint = f"did you mean {', '.join(alike)}?" if alike else "`--explain list` names all"
        raise UnknownName(f"{name!r} is not a number that is known here: {hint}")
    return found


def names() -> list[str]:
    """Every name that is defined, in the order of the sections, then stages and what is in a step's batch."""
    batch = [attribute.name for attribute in (*STEP_COMPOSITION, *STEP_RESULT)]
    return list(dict.fromkeys([*BY_KEY, *BY_NAME, *batch]))


def _defined(name: str) -> list[Definition]:
    for candidate in (
        name,
        name.removesuffix("_ns"),
        f"{name}_ns",
        name.removeprefix("stage_"),
        name.removeprefix("part_"),
    ):
        found = [BY_KEY[candidate]] if candidate in BY_KEY else []
        found += [_of_stage(candidate)] if candidate in BY_NAME else []
        if found:
            return found
    return [
        Definition(name, STEPS, attribute.unit.value, attribute.means, "as the step's record says", "a time")
        for attribute in (*STEP_COMPOSITION, *STEP_RESULT)
        if attribute.name == name
    ]


def _of_stage(name: str) -> Definition:
    stage = BY_NAME[name]
    how = "time in the state" if stage.kind is Kind.STATE else "end - begin; self time: without what is inside"
    return Definition(name, STAGES, "ns", stage.means, how, stage.does_not_mean)


def text(found: Definition) -> str:
    """A definition in lines, for a terminal."""
    return "\n".join(
        [
            f"{found.name} ({found.section})",
            f"  unit           {found.unit}",
            f"  means          {found.means}",
            f"  how            {found.formula}",
            f"  does not mean  {found.does_not_mean}",
        ]
    )


def explained(name: str) -> str:
    """What `--explain NAME` prints; for `list` every name. Raises UnknownName."""
    if name.strip().lower() == "list":
        return "\n".join(names())
    return "\n\n".join(text(each) for each in explain(name))
