"""How a model is spread over ranks, and what the ranks exchange."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .batch import Numbers

# Bytes on the busiest link over bytes of the operation, for n ranks: "Performance reported by NCCL tests", nccl-tests,
# doc/PERFORMANCE.md, NVIDIA, 2024. The operation's bytes are those of the largest buffer: what is reduced, what all
# ranks gather together, what one rank sends to all.
BUS_FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "send": lambda n: 1.0,
}


class Exchange(StrEnum):
    """How tokens come to experts on the ranks of other data-parallel ranks."""

    ALL_GATHER = "all_gather"  # every rank gets all tokens; results by reduce_scatter (vLLM's allgather_reducescatter)
    ALL_TO_ALL = "all_to_all"  # a token goes once to each rank that has an expert of its (DeepEP, high throughput)


@dataclass(frozen=True)
class Sharding:
    """Ranks that share the model. A step's sums are those of one data-parallel rank."""

    tensor: int = 1  # share heads, dense feed-forward blocks and the vocabulary
    pipeline: int = 1
    data: int = 1
    expert: int = 1  # over which the experts are spread, each whole or shared by expert_tensor ranks
    expert_tensor: int = 1
    exchange: Exchange = Exchange.ALL_GATHER

    def __post_init__(self) -> None:
        """Raises ValueError for a number of ranks below 1."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, int) and not isinstance(value, str) and value < 1:
                raise ValueError(f"{each.name} is {value}: a number of ranks is 1 or more")

    @classmethod
    def vllm(
        cls,
        tensor: int = 1,
        pipeline: int = 1,
        data: int = 1,
        expert_parallel: bool = False,
        exchange: Exchange = Exchange.ALL_GATHER,
    ) -> Sharding:
        """As vLLM shares: experts over all tensor x data ranks, whole with --enable-expert-parallel, else each of them.

        vLLM's documentation, "Expert Parallel Deployment", 2025.
        """
        ranks = tensor * data
        experts = (ranks, 1) if expert_parallel else (1, ranks)
        return cls(tensor, pipeline, data, *experts, exchange)

    @classmethod
    def sglang(
        cls,
        tensor: int = 1,
        pipeline: int = 1,
        attention_data: int = 1,
        expert: int = 1,
        exchange: Exchange = Exchange.ALL_GATHER,
    ) -> Sharding:
        """As SGLang shares: `tensor` ranks of a replica, of which DP attention makes groups with requests of their own.

        Heads are shared within such a group, experts over all `tensor` ranks: whole over `expert` of them (--ep-size),
        each shared by the rest. Dense feed-forward blocks are taken to be shared within a group as well
        (--moe-dense-tp-size). SGLang's documentation, "Server arguments" and "DP attention", 2026. Raises ValueError
        where one does not divide.
        """
        if tensor % attention_data or tensor % expert:
            raise ValueError(f"{tensor} ranks cannot be divided by {attention_data} and by {expert}")
        return cls(tensor // attention_data, pipeline, attention_data, expert, tensor // expert, exchange)

    def layers(self, count: int, stage: int) -> tuple[int, int]:
        """The first layer of a pipeline stage and the one after its last, as vLLM divides (get_pp_indices).

        What is left over goes to the stages before the last, one each. Raises ValueError for a stage that is not there.
        """
        if not 0 <= stage < self.pipeline:
            raise ValueError(f"pipeline stage {stage} of {self.pipeline}")
        parts = [count // self.pipeline] * self.pipeline
        for back in range(2, count % self.pipeline + 2):
            parts[-back] += 1
        return sum(parts[:stage]), sum(parts[: stage + 1])


def distinct_ranks(experts: int, per_token: int, ranks: int) -> float:
    """Ranks that a token's experts are on, on average: `per_token` different ones, each choice as likely as any other.

    A rank has experts / ranks of them: none is chosen with probability C(experts - own, k) / C(experts, k).
    """
    own = experts / ranks
    none = prod(max(experts - own - i, 0.0) / (experts - i) for i in range(min(per_token, experts)))
    return ranks * (1 - none)


@dataclass(frozen=True, eq=False)
class Collective:
    """A collective operation as a rank takes part in it: `times` in a step, each of `bytes`."""

    stage: str  # of the vocabulary
    part: str
    op: str  # a key of BUS_FACTORS
    ranks: int
    bytes: Numbers  # as nccl-tests counts them
    times: int

    @property
    def bus_bytes(self) -> Numbers:
        """Bytes on the busiest link in the whole step, one direction: over its bandwidth, the least time."""
        return self.bytes * (self.times * BUS_FACTORS[self.op](self.ranks))
