"""A KV connector for tests: vLLM's own ExampleConnector, which can also load beside the steps, as remote stores do.

A request asks for that with `kv_transfer_params: {"beside": true}`; another that is to be fetched is loaded in the step
that needs it. With `{"undecided": n}` the connector says n times that it does not know yet what it has; with
`{"lost": true}` it says that it has what the worker then cannot load, and vLLM ends the request with an error.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import (
    ExampleConnector,
    ExampleConnectorMetadata,
    ReqMeta,
)

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

SLOW_S = 0.05  # of a load beside the steps


@dataclass
class Metadata(ExampleConnectorMetadata):
    """What the worker is to do, with the loads that are beside the steps."""

    beside: dict[str, ReqMeta] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)  # blocks that cannot be loaded


class StoreConnector(ExampleConnector):
    """On both sides: in the scheduler, and in the worker."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._beside: dict[str, ReqMeta] = {}  # to be given to the worker
        self._lost: set[int] = set()  # to be given to the worker; there: to be told
        self._asked: dict[str, int] = {}
        self._loading: dict[str, Future[None]] = {}  # in the worker
        self._threads = ThreadPoolExecutor(2)

    # In the scheduler

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        wanted = request.kv_transfer_params or {}
        asked = self._asked[request.request_id] = self._asked.get(request.request_id, 0) + 1
        if asked <= int(wanted.get("undecided", 0)):
            return None, False
        tokens, _ = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return max(tokens or 0, 0), bool(wanted.get("beside"))

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        wanted = request.kv_transfer_params or {}
        if num_external_tokens and wanted.get("lost"):
            self._lost.update(blocks.get_block_ids()[0])
        if num_external_tokens and wanted.get("beside"):
            self._beside[request.request_id] = ReqMeta.make_meta(
                list(request.prompt_token_ids or []), blocks.get_block_ids()[0], self._block_size, False, []
            )
        else:
            super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Metadata:
        made = super().build_connector_meta(scheduler_output)
        beside, self._beside = self._beside, {}
        lost, self._lost = self._lost, set()
        return Metadata(made.requests, beside, lost)

    # In the worker

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata: Any = self._get_connector_metadata()
        for name, request in metadata.beside.items():
            self._loading[name] = self._threads.submit(self._load, forward_context.no_compile_layers, request)
        self._lost = metadata.lost
        super().start_load_kv(forward_context, **kwargs)

    def _load(self, layers: dict[str, Any], request: ReqMeta) -> None:
        time.sleep(SLOW_S)
        blocks, offsets = request.slot_mapping // self._block_size, request.slot_mapping % self._block_size
        for name, layer in layers.items():
            cache = getattr(layer, "kv_cache", None)
            if cache is not None:
                path = self._generate_filename_debug(name, request.token_ids, [])
                cache[blocks, :, offsets] = load_file(path)["kv_cache"]

    def get_block_ids_with_load_errors(self) -> set[int]:
        lost, self._lost = self._lost, set()
        return lost

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        over = {name for name, loading in self._loading.items() if loading.done()}
        for name in over:
            self._loading.pop(name).result()
        return None, over or None
