"""What a session is planned as: its engine, its load, and what is put there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quickstart.servers import VLLM, Engine

INJECTED = Path(__file__).resolve().parent / "injected"
WIDE_MODEL = INJECTED.with_name("wide_model.py")
WIDE = "wide"  # the model that it makes
EAGER = "--enforce-eager"


@dataclass(frozen=True)
class Ask:
    """One request of a load. Lengths are of words, about three tokens each."""

    at_s: float  # when it is sent: since the begin, or in a closed load after a place is free
    words: int
    tokens: int
    shared: int = 0  # of its words, the beginning that others have too
    schema: int | None = None  # structured output, of a schema of that number
    logprobs: int = 0
    reads_s: float = 0.0  # a slow client: it waits so long after every piece that it reads
    answers: int = 1  # to the one prompt
    temperature: float = 0.0


@dataclass(frozen=True)
class Planned:
    """One session to record."""

    cause: str  # what was put there; "clean" for nothing
    right: tuple[str, ...]  # causes of the diagnosis that name it
    asks: tuple[Ask, ...]
    width: int | None  # so many at once, one after the other; None: each at its time
    arguments: tuple[str, ...] = ()
    injected: dict[str, dict[str, Any]] = field(default_factory=dict)  # by kind, how much: injected/sitecustomize.py
    variables: dict[str, str] = field(default_factory=dict)
    level: str = "step"
    model: str = "moe"  # moe, dense, wide
    engine: Engine = VLLM
    advised: tuple[str, ...] | None = None  # the arguments once the first advice is taken
    more: tuple[tuple[tuple[Ask, ...], int | None], ...] = ()  # further loads on the same server, a session each
    all_of: tuple[str, ...] = ()  # of a mixture: causes that are all to be among the findings
    times_capacity: float | None = None  # requests arrive so many times as fast as this machine's engine serves them

    @property
    def said(self) -> str:
        """What was put there and how much, in a line."""
        sizes = " ".join(
            [
                *(word for word in self.arguments if word != EAGER),
                *(f"{kind}({', '.join(f'{k}={v}' for k, v in of.items())})" for kind, of in self.injected.items()),
            ]
        )
        load = self.width or (f"{self.times_capacity} times capacity" if self.times_capacity else "open")
        return f"{self.cause} on {self.engine.name}: {sizes or '-'}; {len(self.asks)} requests, {load}"


def asks_of(
    chance: random.Random,
    count: int,
    words: tuple[int, int],
    tokens: tuple[int, int],
    rate: float | None = None,
    **more: Any,
) -> tuple[Ask, ...]:
    """Requests of random lengths, in a row or, with a rate in requests a second, as a Poisson process."""
    now, asks = 0.0, []
    for _ in range(count):
        now += chance.expovariate(rate) if rate else 0.0
        asks.append(Ask(now, chance.randint(*words), chance.randint(*tokens), **more))
    return tuple(asks)


def ordinary(chance: random.Random) -> tuple[tuple[Ask, ...], int | None]:
    """A load that the engine serves well: a few at once, or arrivals that it keeps up with."""
    if chance.random() < 0.5:
        width = chance.randint(2, 5)
        return asks_of(chance, 14 * width, (15, 90), (25, 60)), width
    rate = chance.uniform(1.5, 3.5)
    return asks_of(chance, 32, (15, 90), (25, 60), rate), None


def long_among_short(chance: random.Random, talks: int, rates: tuple[float, float]) -> tuple[Ask, ...]:
    """Short prompts with long answers, so many in 14 s, and long prompts at a rate between two, per second."""
    seconds = 14
    talk = asks_of(chance, talks, (10, 30), (80, 140), talks / seconds)
    rate = chance.uniform(*rates)
    long = asks_of(chance, int(rate * seconds), (700, 1300), (2, 4), rate)
    return tuple(sorted((*talk, *long), key=lambda ask: ask.at_s))


def at_rate(asks: Sequence[Ask], rate: float) -> tuple[Ask, ...]:
    """The same requests, closer together or further apart: so many a second."""
    scale = len(asks) / asks[-1].at_s / rate
    return tuple(replace(ask, at_s=ask.at_s * scale) for ask in asks)
