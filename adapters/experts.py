"""How many tokens each layer sends to each expert, for every engine: counted without waiting for the device.

On the CPU a layer's choice is counted at once. On a device it is added to a buffer there, with operations that a stream
can capture into a graph as well; after a step the buffer is copied without waiting, and written when the copy is there.
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
        self._hook = hook
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
        width = width_for(chosen.numel())
        counts = self._bincount(chosen.reshape(-1), minlength=self._experts).tolist()
        self._hook.recorder.experts(
            rank.instance, step, rank.rank, layer, chosen.shape[0], packed(counts, width), width
        )


class DeviceCounts:
    """Counts of choices that lie in a device's memory: int32 (layers, experts), for the step that runs.

    No operation here waits for the device. Not tried on one yet.
    """

    def __init__(self, hook: Hook, rank: RankStep, layers: Sequence[int], experts: int, device: Any):
        torch = sys.modules["torch"]
        self._torch = torch
        self._hook = hook
        self._rank = rank
        self._rows = {layer: row for row, layer in enumerate(layers)}
        self._experts = experts
        # The last column counts the tokens; what is no expert's number is counted as nobody's.
        self._counts = torch.zeros(len(layers), experts + 1, dtype=torch.int32, device=device)
        self._free = [torch.zeros(self._counts.shape, dtype=torch.int32, pin_memory=True) for _ in range(_MOST_COPIES)]
        self._copies: deque[tuple[int, int, Any, Any]] = deque()  # instance, step, buffer, event
        self.left_out = 0  # steps for which no buffer was free

    def count(self, layer: int, chosen: Any, padding: Any) -> None:
        """Adds a layer's choices, on the stream that runs; into a graph, where that is captured."""
        torch, row = self._torch, self._counts[self._rows[layer]]
        flat = chosen.reshape(-1).long()
        there = (flat >= 0) & (flat < self._experts)
        if padding is None:
            row[self._experts] += chosen.shape[0]
        else:
            real = ~padding
            there &= real.repeat_interleave(chosen.shape[1], output_size=flat.shape[0])
            row[self._experts : self._experts + 1].add_(real.sum(dtype=torch.int32))
        # Out of range would be an error on the device, which ends the engine.
        row.scatter_add_(0, flat.clamp(0, self._experts - 1), there.to(torch.int32))

    def begin(self) -> None:
        """A step begins: what dummy runs have added is forgotten, and what has been copied meanwhile is written."""
        self.write()
        self._counts.zero_()

    def end(self) -> None:
        """The step has been launched: its counts are copied as soon as the device has them."""
        rank = self._rank
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
            for layer, row in self._rows.items():
                *counts, tokens = buffer[row].tolist()
                if tokens:
                    width = width_for(max(counts))
                    record = packed(counts, width)
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
