"""Hooks in the scheduler: steps, what is in them, and the states that requests take in it.

Every rank runs a scheduler of its own, and all of one replica come to the same schedule. So the first rank alone writes
what the scheduler does; the others write their part of each step (worker.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stagetrace.instrument.around import Around

from . import extract

if TYPE_CHECKING:
    from stagetrace.instrument.hooks import Hook


def opens_recorder(hook: Hook) -> Around:
    """Scheduler.__init__: this process is a rank, and its groups are ready; the first rank is the engine core too."""

    def after(self: Any, server_args: Any, port_args: Any) -> None:
        from sglang.srt.runtime_context import get_parallel
        from sglang.version import __version__

        parallel = get_parallel()
        dp_rank = int(parallel.dp_rank or 0)
        instance = extract.instance_of(port_args, dp_rank)
        rank = int(parallel.pp_rank * parallel.tp_size + parallel.tp_rank)
        info = extract.process_info(server_args, self.model_config, parallel, __version__)
        info["data_parallel_rank"] = dp_rank
        if is_first(parallel):
            hook.recorder.open("engine_core", {**info, "instance": instance})
        hook.recorder.open("worker", {**info, "rank": rank})

    return Around(after=after)


def is_first(parallel: Any) -> bool:
    """Whether this rank is the one that receives the requests of its data-parallel rank."""
    return not (parallel.pp_rank or parallel.attn_tp_rank or parallel.attn_cp_rank)
