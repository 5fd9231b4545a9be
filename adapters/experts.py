"""How many tokens each layer sends to each expert, for every engine: counted without waiting for the device.

On the CPU a layer's choice is counted at once. On a device it is added to a buffer there, with operations that a stream
can capture into a graph as well; after a step the buffer is copied without waiting, and written when the copy is there.
It has been run on NVIDIA devices, in graphs too (docs/performance.md).
PyTorch is the engine's: it is imported by the time that anything here runs.
"""

from __future__ import annotations

import sys
from array import array
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stagetrace.instrument.hooks import Hook

    from .rank import RankStep

_FEW = 64  # choices that are counted one by one
_MOST_COPIES = 8  # of the buffer on their way; where there are more, a step's counts are left out
_CODES = {1: "B", 2: "H", 4: "I"}


def width_for(most: int) -> int:
    """Bytes that hold a count which is at most so large: 1, 2 or 4. Pure."""
    return 1 if most < 1 << 8 else 2 if most < 1 << 16 else 4


def packed(counts: Sequence[int], width: int) -> bytes:
    """Counts as a record has them. Pure."""
    return array(_CODES[width], counts).tobytes()


class HostCounts:
    """Counts of choices that lie in the CPU's memory."""

    def __init__(self, hook: Hook, rank: RankStep, experts: int):
        self._write = hook.recorder.experts
        self._rank = rank
        self._experts = experts
        self._bincount = sys.modules["torch"].bincount

    def count(self, layer: int, chosen: Any, padding: Any) -> None:
        """Writes a layer's counts: `chosen` (tokens, experts per token); `padding`: which tokens are none, or None."""
        rank = self._rank
        step = rank.step
        if not step:
            return
        if padding is not None:
            chosen = chosen[~padding]
        most = chosen.numel()
        if most <= _FEW:  # an operation of PyTorch's costs more
            counts = [0] * self._experts
            for of_token in chosen.tolist():
                for expert in of_token:
                    if expert >= 0:
                        counts[expert] += 1
        else:
            flat = chosen.reshape(-1)
            try:
                found = self._bincount(flat, minlength=self._experts)
            except RuntimeError:  # a negative number: a choice that is none
                found = self._bincount(flat[flat >= 0], minlength=self._experts)
            counts = found.tolist()
        width = width_for(most)
        self._write(rank.instance, step, rank.rank, layer, chosen.shape[0], packed(counts, width), width)


class DeviceCounts:
    """Counts of choices that lie in a device's memory: int32 (layers, 1 + experts), for the step that runs.

    Column 0 takes what is no expert's number: out of range would be an error on the device, which ends the engine.
    No operation here waits for the device.
    """

    def __init__(self, hook: Hook, rank: RankStep, layers: Sequence[int], experts: int, device: Any):
        torch = sys.modules["torch"]
        self._torch = torch
        self._hook = hook
        self._rank = rank
        self._layers = [*layers]
        self._experts = experts
        self._counts = torch.zeros(len(layers), 1 + experts, dtype=torch.int32, device=device)
        self._rows = dict(zip(layers, self._counts, strict=True))
        self._per_token = 1
        # How much a choice counts: 1, or 0 in a token that is padding; made by the first layer for those behind it.
        self._weights: tuple[Any, Any, int] | None = None
        pinned = str(getattr(device, "type", device)) != "cpu"
        self._free = [
            torch.zeros(self._counts.shape, dtype=torch.int32, pin_memory=pinned) for _ in range(_MOST_COPIES)
        ]
        self._copies: deque[tuple[int, int, Any, Any]] = deque()  # instance, step, buffer, event
        self.left_out = 0  # steps for which no buffer was free

    def count(self, layer: int, chosen: Any, padding: Any) -> None:
        """Adds a layer's choices, on the stream that runs; into a graph, where that is captured."""
        tokens, self._per_token = chosen.shape
        index = chosen.clamp(-1, self._experts - 1).reshape(-1).add_(1)
        if index.dtype not in (self._torch.int32, self._torch.int64):
            index = index.to(self._torch.int64)
        self._rows[layer].index_add_(0, index, self._weights_of(layer, tokens, padding))

    def _weights_of(self, layer: int, tokens: int, padding: Any) -> Any:
        known = self._weights
        if known is not None and known[0] is padding and known[2] == tokens and layer != self._layers[0]:
            return known[1]
        torch = self._torch
        if padding is None:
            weights = torch.ones(tokens * self._per_token, dtype=torch.int32, device=self._counts.device)
        else:
            weights = (~padding).to(torch.int32)[:, None].expand(tokens, self._per_token).reshape(-1)
        self._weights = (padding, weights, tokens)
        return weights

    def begin(self) -> None:
        """A step begins: what dummy runs have added is forgotten, and what has been copied meanwhile is written."""
        self.write()
        self._counts.zero_()

    def end(self) -> None:
        """The step has been launched: its counts are copied as soon as the device has them."""
        rank = self._rank
        self._weights = None
        if not rank.step:
            return
        if not self._free:
            self.left_out += 1
            return
        buffer = self._free.pop()
        buffer.copy_(self._counts, non_blocking=True)
        event = self._torch.cuda.Event()
        event.record()
        self._copies.append((rank.instance, rank.step, buffer, event))

    def write(self) -> None:
        """Writes the counts of steps whose copy is there."""
        while self._copies and self._copies[0][3].query():
            instance, step, buffer, _ = self._copies.popleft()
            for layer, (_, *counts) in zip(self._layers, buffer.tolist(), strict=True):
                chosen = sum(counts)
                if chosen:
                    width = width_for(max(counts))
                    tokens, record = chosen // self._per_token, packed(counts, width)
                    self._hook.recorder.experts(instance, step, self._rank.rank, layer, tokens, record, width)
            self._free.append(buffer)


def chained(
    hook: Hook,
    layer: int,
    counts: HostCounts | DeviceCounts,
    padding_of: Callable[[int], Any],
    previous: Callable[[Any], Any] | None,
) -> Callable[[Any], Any]:
    """A callback for the experts that a layer has chosen, which counts them and calls the one that was there before.

    `padding_of` gives, for so many tokens, which of them are none (a tensor), or None. An error of ours is the hook's.
    """
    torch = sys.modules["torch"]
    compiling = torch.compiler.is_compiling
    on_device = isinstance(counts, DeviceCounts)
    capturing = torch.cuda.is_current_stream_capturing
    recorder = hook.recorder

    def captured(chosen: Any) -> Any:
        # A graph that is captured below the level is replayed at it: counting must be in it.
        if not compiling() and (recorder.level[0] >= hook.threshold or (on_device and capturing())):
            try:
                counts.count(layer, chosen, padding_of(chosen.shape[0]))
            except Exception:
                hook.failed()
        return None if previous is None else previous(chosen)

    return captured


def contained(hook: Hook, function: Callable[[], None]) -> Callable[[], None]:
    """The function, for a place that is another hook's: its errors are this hook's, and it stops with this hook."""
    recorder = hook.recorder

    def called() -> None:
        if recorder.level[0] >= hook.threshold:
            try:
                function()
            except Exception:
                hook.failed()

    return called
