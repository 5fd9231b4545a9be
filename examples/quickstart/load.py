"""A real load on an OpenAI-compatible server: streaming chat requests of mixed lengths at rising concurrency.

    .venv/bin/python examples/quickstart/load.py --base-url http://127.0.0.1:8000/v1 --model tiny

The requests depend on the seed alone, so two servers can be given the same load. `run_load` is the same as a library.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from openai import AsyncOpenAI
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

CONCURRENCY = (1, 4, 16)
REQUESTS = 84
SEED = 7
TIMEOUT_S = 120.0
WORDS = (
    *("queue", "schedule", "prefill", "decode", "attention", "expert", "dispatch", "combine", "collective"),
    *("sampling", "host", "gap", "token", "batch", "request", "cache", "prefix", "chunk", "layer", "router"),
    *("rank", "stream", "latency", "throughput", "bandwidth", "memory", "kernel", "graph", "step", "time"),
)


@dataclass(frozen=True)
class Request:
    """One chat request to send."""

    messages: tuple[dict[str, str], ...]
    max_tokens: int


@dataclass(frozen=True)
class Result:
    """What the client saw of one request. Times are seconds; the counts are the server's own `usage`."""

    concurrency: int
    id: str
    started_s: float  # of time.monotonic()
    first_token_s: float | None  # from the start to the first chunk with text
    last_token_s: float | None  # from the start to the last chunk with text
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    text: str
    error: str | None = None

    @property
    def per_token_s(self) -> float | None:
        """Time per output token after the first; None when there was no second one."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Summary:
    """Figures of many results; percentiles in seconds, NaN where there is nothing to take them of."""

    requests: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    span_s: float  # first start to last end
    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p50_s: float
    tpot_p95_s: float

    def __str__(self) -> str:
        failed = f" ({self.failed} FAILED)" if self.failed else ""
        return (
            f"{self.requests} requests{failed}, {self.prompt_tokens} prompt + {self.output_tokens} output tokens"
            f" in {self.span_s:.1f} s, TTFT p50 {_ms(self.ttft_p50_s)} p95 {_ms(self.ttft_p95_s)},"
            f" TPOT p50 {_ms(self.tpot_p50_s)} p95 {_ms(self.tpot_p95_s)}"
        )


def plan(requests: int, seed: int) -> list[Request]:
    """The requests of a load: prompts from a line to a few pages, a third of them behind one shared system prompt."""
    chance = random.Random(seed)
    shared = {"role": "system", "content": _words(chance, 120)}
    planned = []
    for _ in range(requests):
        # Log-normal, as prompts are: most are short and a few are many times longer.
        length = min(700, max(8, round(chance.lognormvariate(4.2, 1.1))))
        output = min(160, max(8, round(chance.lognormvariate(3.9, 0.6))))
        question = {"role": "user", "content": _words(chance, length)}
        messages = (shared, question) if chance.random() < 1 / 3 else (question,)
        planned.append(Request(messages, output))
    return planned


def phases(requests: int, concurrency: Sequence[int]) -> list[tuple[int, int]]:
    """The load's phases, as (requests at once, requests): each has twice those of the one before.

    Where there are too few requests for every phase, those with none are left out.
    """
    weights = [2**number for number in range(len(concurrency))]
    counts = [requests * weight // sum(weights) for weight in weights]
    counts[-1] += requests - sum(counts)
    return [(width, count) for width, count in zip(concurrency, counts, strict=True) if count]


async def run_load(
    base_url: str,
    model: str,
    *,
    requests: int = REQUESTS,
    seed: int = SEED,
    concurrency: Sequence[int] = CONCURRENCY,
    progress: Callable[[Result], None] = lambda _: None,
    phase_ended: Callable[[list[Result]], None] = lambda _: None,
) -> list[Result]:
    """Sends the planned load, phase after phase, and returns what was seen of every request, in order of the plan.

    A request that fails is a Result with an `error`, never an exception. `base_url` ends in /v1.
    """
    planned = iter(plan(requests, seed))
    results: list[Result] = []
    # No retries: a failure is to be seen, not repeated.
    async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
        for width, count in phases(requests, concurrency):
            gate = asyncio.Semaphore(width)

            async def one(request: Request, width: int = width, gate: asyncio.Semaphore = gate) -> Result:
                async with gate:
                    result = replace(await send(client, model, request), concurrency=width)
                progress(result)
                return result

            phase = await asyncio.gather(*(one(next(planned)) for _ in range(count)))
            phase_ended(phase)
            results += phase
    return results


async def send(client: AsyncOpenAI, model: str, request: Request) -> Result:
    """Streams one request, greedily and to its full length, and returns what was seen of it."""
    started = time.monotonic()
    first = last = None
    answer = ""
    text: list[str] = []
    prompt_tokens = output_tokens = 0
    error = None
    messages: Any = request.messages
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=request.max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async with stream:
            async for chunk in stream:
                answer = chunk.id
                if chunk.choices and chunk.choices[0].delta.content:
                    last = time.monotonic() - started
                    first = last if first is None else first
                    text.append(chunk.choices[0].delta.content)
                if chunk.usage is not None:
                    prompt_tokens, output_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        if not output_tokens:
            error = "the stream ended without usage"
    except Exception as raised:  # of the client, or of what is below it in the middle of a stream
        error = f"{type(raised).__name__}: {raised}"
    return Result(
        concurrency=1,
        id=answer,
        started_s=started,
        first_token_s=first,
        last_token_s=last,
        duration_s=time.monotonic() - started,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        text="".join(text),
        error=error,
    )


def summarize(results: Sequence[Result]) -> Summary:
    """The figures of some results; those that failed are counted and left out of everything else."""
    good = [result for result in results if result.error is None]
    begin = min((result.started_s for result in results), default=0.0)
    end = max((result.started_s + result.duration_s for result in results), default=0.0)
    first = [result.first_token_s for result in good if result.first_token_s is not None]
    each = [result.per_token_s for result in good if result.per_token_s is not None]
    return Summary(
        requests=len(results),
        failed=len(results) - len(good),
        prompt_tokens=sum(result.prompt_tokens for result in good),
        output_tokens=sum(result.output_tokens for result in good),
        span_s=end - begin,
        ttft_p50_s=_percentile(first, 50),
        ttft_p95_s=_percentile(first, 95),
        tpot_p50_s=_percentile(each, 50),
        tpot_p95_s=_percentile(each, 95),
    )


def show_load(
    base_url: str,
    model: str,
    *,
    requests: int = REQUESTS,
    seed: int = SEED,
    concurrency: Sequence[int] = CONCURRENCY,
    console: Console | None = None,
) -> list[Result]:
    """Runs the load with its progress on the console, a line of figures per phase and a last one for all of it."""
    console = console or Console()
    columns = (TextColumn("load: {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks = {
            width: progress.add_task(f"{width:>2} at once", total=count, start=False)
            for width, count in phases(requests, concurrency)
        }

        def ended(result: Result) -> None:
            if result.error:
                console.print(f"load: a request failed: {result.error}", style="red", markup=False, soft_wrap=True)
            progress.start_task(tasks[result.concurrency])
            progress.advance(tasks[result.concurrency])

        def phase_ended(results: list[Result]) -> None:
            line = f"load: {results[0].concurrency:>2} at once: {summarize(results)}"
            console.print(line, highlight=False, soft_wrap=True)

        results = asyncio.run(
            run_load(
                base_url,
                model,
                requests=requests,
                seed=seed,
                concurrency=concurrency,
                progress=ended,
                phase_ended=phase_ended,
            )
        )
    console.print(f"load: as the client saw it: {summarize(results)}", style="bold", highlight=False, soft_wrap=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Put a load on an OpenAI-compatible server and print what it saw.")
    parser.add_argument("--base-url", required=True, help="of the server, with /v1, as in http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, help="the name under which the server has the model")
    parser.add_argument("--requests", type=_positive, default=REQUESTS, help=f"in all phases together ({REQUESTS})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the prompts and lengths ({SEED})")
    parser.add_argument(
        "--concurrency",
        type=_positive,
        nargs="+",
        default=list(CONCURRENCY),
        help="requests at once, phase by phase, rising (1 4 16)",
    )
    arguments = parser.parse_args()
    if sorted(set(arguments.concurrency)) != arguments.concurrency:
        parser.error("--concurrency must rise from phase to phase")
    results = show_load(
        arguments.base_url,
        arguments.model,
        requests=arguments.requests,
        seed=arguments.seed,
        concurrency=arguments.concurrency,
    )
    return 1 if any(result.error for result in results) else 0


def _words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choices(WORDS, k=count))


def _percentile(values: Iterable[float], percent: float) -> float:
    held = list(values)
    return float(np.percentile(held, percent)) if held else float("nan")


def _ms(seconds: float) -> str:
    return "none" if np.isnan(seconds) else f"{seconds * 1e3:.1f} ms"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
