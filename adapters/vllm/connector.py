"""Hooks on KV connectors, which fetch KV from elsewhere and keep it there: of each class, so on the objects.

The scheduler's connector says which requests wait for KV that is fetched beside the steps; a worker's carries it out.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from stagetrace.instrument.around import Around
from stagetrace.instrument.records import RecordType, header_word
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Callable

    from stagetrace.instrument.hooks import Hook

    from ..rank import RankStep

_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"
_STATE = "vllm.distributed.kv_transfer.kv_transfer_state"
MATCHED, ALLOCATED = f"{_BASE}.get_num_new_matched_tokens", f"{_BASE}.update_state_after_alloc"
CALLS = {
    f"{_BASE}.start_load_kv": "kv_load",
    f"{_BASE}.wait_for_save": "kv_store",
}
LAYER_CALLS = {
    f"{_BASE}.wait_for_layer_load": "kv_load",
    f"{_BASE}.save_kv_layer": "kv_store",
}


def on_connector(_: Hook) -> Around:
    """Of a function that is hooked on objects, by `follow` or `attach`."""
    return Around()


def follow(hook: Hook, scheduler: Any, begins: Callable[[Any, int], None]) -> bool:
    """Hooks a scheduler's connector; whether it has one. `begins` is told of each request, and for how many tokens."""
    connector = getattr(scheduler, "connector", None)
    matched = ""  # the last request for which it has something that it fetches beside the steps

    def match(request: Any, result: Any) -> None:
        nonlocal matched
        tokens, beside = result
        matched = request.request_id if tokens and beside else ""

    def allocate(request: Any, num_external_tokens: int) -> None:
        if num_external_tokens and request.request_id == matched:
            begins(request, int(num_external_tokens))

    for target, after in ((MATCHED, match), (ALLOCATED, allocate)):
        _put_on(hook.others[target], connector, after)
    return connector is not None


def attach(hook: Hook, rank: RankStep) -> None:
    """Hooks this worker's connector, if it has one."""
    connector = getattr(sys.modules.get(_STATE), "_KV_CONNECTOR_AGENT", None)
    for target, stage in {**CALLS, **LAYER_CALLS}.items():
        _put_on(hook.others[target], connector, _timed(hook, rank, stage))


def _put_on(hook: Hook, connector: Any, after: Callable[..., None]) -> None:
    if connector is not None:
        hook.on(connector, hook.point.target.rpartition(".")[2], Around(after=after))
    hook.told_objects()


def _timed(hook: Hook, rank: RankStep, stage: str) -> Callable[..., None]:
    segment = hook.recorder.segment
    header = header_word(RecordType.SEGMENT, BY_NAME[stage].id)

    def after(begin: int, end: int) -> None:
        step = rank.step
        segment(header, begin, end, rank.instance if step else 0, step)

    return after
