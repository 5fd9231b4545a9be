"""Run by the engine's Python: counts of experts with its PyTorch, on the CPU, against a plain count; prints JSON.

The device's way runs here too, with an event that is done at once in place of a device's.
"""

from __future__ import annotations

import json
import types
from typing import Any

import torch

from stagetrace.adapters.experts import DeviceCounts, HostCounts

EXPERTS = 40
written: list[tuple[Any, ...]] = []
hook: Any = types.SimpleNamespace(recorder=types.SimpleNamespace(experts=lambda *words: written.append(words)))
rank: Any = types.SimpleNamespace(rank=3, instance=7, step=1)


class Done:
    """An event that is reached at once."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True


torch.cuda.Event = Done
torch.manual_seed(1)
found = []
for tokens, per_token, dtype in (
    (1, 2, torch.int32),
    (9, 8, torch.int64),
    (700, 8, torch.int32),
    (300, 2, torch.int32),
):
    for padded in (False, True):
        for holes in (False, True):
            chosen = torch.stack([torch.randperm(EXPERTS)[:per_token] for _ in range(tokens)]).to(dtype)
            if holes:
                chosen[0, 0] = -1
            padding = torch.arange(tokens) >= tokens - tokens // 3 if padded else None
            real = chosen if padding is None else chosen[~padding]
            plain = [int((real == expert).sum()) for expert in range(EXPERTS)]
            written.clear()
            HostCounts(hook, rank, EXPERTS).count(5, chosen, padding)
            on_host = written.copy()
            written.clear()
            device = DeviceCounts(hook, rank, [4, 5], EXPERTS, torch.device("cpu"))
            device.count(4, chosen, padding)  # a dummy run's
            device.begin()
            for layer in (4, 5):
                device.count(layer, chosen, padding)
            device.end()
            device.begin()
            counted = [
                [
                    *words[:5],
                    [
                        int.from_bytes(words[5][at : at + words[6]], "little")
                        for at in range(0, len(words[5]), words[6])
                    ],
                ]
                for words in (*on_host, *written)
            ]
            found.append({"plain": plain, "tokens": len(real), "holes": holes, "counted": counted})
            assert torch.equal(chosen, chosen.clone()) and not device.left_out
rank.step = 0
written.clear()
HostCounts(hook, rank, EXPERTS).count(5, chosen, None)
device.end()
device.write()
assert not written
rank.step = 1
for _ in range(10):
    device.end()
assert device.left_out == 2
print(json.dumps(found))
