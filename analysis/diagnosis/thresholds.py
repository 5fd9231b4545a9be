"""From what size on a cause is a finding: one table, each number with its reason.

A share is that of the cause in its phase's time; the lower end of its confidence interval has to reach it, and of few
events whose time is counted and not sampled (stalls behind prefill, compiling) the share itself. They were fixed on
sessions of benchmarks/diagnosis_score.py, each before the seeds were scored that docs/performance.md reports.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Threshold:
    """One number; `reason` says why it is not another."""

    name: str
    value: float
    unit: str
    reason: str


THRESHOLDS: tuple[Threshold, ...] = (
    Threshold("requests", 8, "requests", "with fewer no interval says anything: not enough data"),
    Threshold("steps", 20, "steps", "the same for what is looked for in steps"),
    Threshold("worth", 0.02, "of all request time", "what could be recovered; less is not worth an experiment"),
    Threshold("queue_share", 0.25, "of TTFT", "a short queue keeps the batch full: it is the price of throughput"),
    Threshold(
        "backlog_growth", 1.2, "times", "of each quarter of arrivals to the one before: 1 is a load that levels off"
    ),
    Threshold("backlog", 8, "requests", "a backlog of a few comes and goes with any arrivals"),
    Threshold("backlog_left", 0.5, "of the last quarter's", "as the arrivals end: a backlog that is gone was a burst"),
    Threshold("busy", 0.9, "of the time", "an engine that pauses has capacity left"),
    Threshold(
        "smaller_batches", 0.1, "of decode steps", "fewer of a smaller batch do not tell what a larger one would cost"
    ),
    Threshold(
        "larger_batch_gain", 0.15, "of tokens per second", "what twice the batch must give for the cap to matter"
    ),
    Threshold("fixed_share", 0.25, "of a step", "where a full step's fixed cost is less, a larger budget gains little"),
    Threshold("budget_share", 0.15, "of TTFT or TPOT", "as a share that a user would notice"),
    Threshold("kv_share", 0.1, "of TTFT or TPOT", "preemptions are to be rare: what is computed again is lost"),
    Threshold(
        "kept", 3.0, "times", "between how long the cache keeps things at quiet and at busy times, to compare them"
    ),
    Threshold("cache_loss", 0.3, "of the cached share", "how much less must be found at busy times; less is chance"),
    Threshold("again_share", 0.1, "of TTFT or TPOT", "as a share that a user would notice"),
    Threshold("stall", 2.0, "steps of decode", "what a token must wait longer than usual to be held up by prefill"),
    Threshold("stall_share", 0.25, "of TPOT", "well served prompts of all lengths take a tenth to a sixth"),
    Threshold("stalling_prompts", 3, "prompts", "that make up half of it: of one or two it was bad luck, and no rule"),
    Threshold("at_roof", 0.6, "of the memory's bandwidth", "what well tuned kernels reach in decode"),
    Threshold("far_below", 0.2, "of the speed of light", "well kept engines are above it, with their host's part"),
    Threshold("far_share", 0.25, "of TTFT or TPOT", "time beyond that; half of a phase is not to be argued about"),
    Threshold("long_enough", 500_000, "ns", "a shorter step, at the speed of light, is launching and not kernels"),
    Threshold("schedule_share", 0.15, "of step time", "usual is 3 to 5 %, of tiny models and steps as well"),
    Threshold("schedule_usual", 0.05, "of step time", "what remains when it is mended"),
    Threshold("prepare_share", 0.35, "of step time", "usual is up to 20 % of a tiny model's steps on a processor"),
    Threshold("prepare_usual", 0.15, "of step time", "what remains when it is mended"),
    Threshold("sampling_share", 0.15, "of step time", "usual is 2 to 5 %"),
    Threshold("sampling_usual", 0.03, "of step time", "what remains when it is mended"),
    Threshold("gc_share", 0.05, "of step time", "usual is under 1 %: engines freeze what lives long"),
    Threshold("grammar_share", 0.1, "of TTFT or TPOT", "a compiled grammar costs microseconds a step"),
    Threshold("tokenize_share", 0.35, "of TTFT", "usual is 5 to 20 % of a tiny model's, whose prefill is short"),
    Threshold("tokenize_usual", 0.1, "of TTFT", "what remains when it is mended"),
    Threshold(
        "late_as_well", 0.25, "of tokenizing", "a quick front end hands on in 1 to 3 ms; a busy one is late with all"
    ),
    Threshold("late_share", 0.15, "of TTFT or end-to-end latency", "usual is under 5 %: handing a token on is short"),
    Threshold(
        "detokenize_busy", 0.5, "of a thread's time, or of a token's lateness", "more than half: not the rest of it"
    ),
    Threshold("client_share", 0.1, "of end-to-end latency", "usual is under 1 %: bytes go into the socket's buffer"),
    Threshold(
        "unsent", 65_536, "bytes", "a stream's last chunks, and what is under way on a long line, are less than 64 KiB"
    ),
    Threshold("waiting_share", 0.1, "of TTFT or TPOT", "for one rank beyond that for another, which is a few percent"),
    Threshold("one_rank", 0.65, "of the waiting", "chance makes each of two ranks the last half of the time"),
    Threshold(
        "collective_share",
        0.35,
        "of TTFT or TPOT",
        "tensor parallelism within a node costs 10 to 25 %, two ranks on a processor 26 to 32 %",
    ),
    Threshold("dispatch_share", 0.3, "of TTFT or TPOT", "expert parallelism with overlap costs 10 to 25 %"),
    Threshold(
        "imbalance",
        1.9,
        "most over mean",
        "trained routers are at 1.1 to 1.5 over many tokens, random ones at 1.6 to 1.9",
    ),
    Threshold(
        "tokens_per_expert", 200, "tokens in a layer", "with fewer, a handful of repeated prompts is uneven by itself"
    ),
    Threshold("padding", 0.25, "of the tokens that were run", "usual capture sizes leave up to 20 %"),
    Threshold("graph_miss_share", 0.1, "of TPOT", "as a share that a user would notice"),
    Threshold("compile_share", 0.05, "of TTFT or TPOT", "it should not happen at all; less is not felt"),
    Threshold("draft_share", 0.05, "of TPOT", "as a share that a user would notice"),
)
_VALUES = {each.name: each.value for each in THRESHOLDS}


def limit(name: str) -> float:
    """A threshold by its name."""
    return _VALUES[name]
