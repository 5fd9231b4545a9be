"""Times on a GPU by event pairs and by marks against torch.profiler's, and what each of them costs there.

    python benchmarks/gpu/device_time.py [--json] [--quick] [--layers 4,16,64]
    torchrun --nproc-per-node 2 benchmarks/gpu/device_time.py      # with collectives

It needs a CUDA or HIP device, and a Python that has PyTorch and Triton; neither an engine nor stagetrace need be
installed: the pairs and marks are those of the checkout that it lies in. Exit status 2: there is no such device.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
import types
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from figures import Agreement, Kernel, Misfit, agreement, cost, microseconds, steps_of, table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CHECKOUT = Path(__file__).resolve().parents[2]
MODES = ("eager", "compiled", "piecewise graphs", "full graph")
AHEAD, BEHIND = "host ahead", "host in step"
STEPS, ROUNDS, RUNS = 20, 15, 20  # profiled; of each alternative; in a round
AHEAD_CYCLES = 60_000_000  # for which a device is kept busy so that the host gets ahead of it: 30 ms or so
CALLS = 500  # of each, for the host's cost
NO_GPU = (
    "{why}. What to do: run it where there is a CUDA or HIP device, with a Python that has PyTorch and Triton for it"
    " (an engine's has both): copy the checkout there, and `python benchmarks/gpu/device_time.py`."
)


def main() -> int:
    """Measures and prints. Exit status: 1 where something waits for the device, or the profile is not understood."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="few rounds: whether it runs, no figures to keep")
    parser.add_argument("--layers", default="4,16,64", help="layer counts at which costs are measured")
    options = parser.parse_args()
    why = missing()
    if why:
        print(NO_GPU.format(why=why), file=sys.stderr)
        return 2
    borrow_stagetrace()
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # one knows nothing of an operator's layout
    try:
        counts = [int(each) for each in options.layers.split(",")]
    except ValueError:
        parser.error(f"--layers takes numbers with commas between, not {options.layers}")
    found = measure(counts, options.quick, device())
    if int(os.environ.get("RANK", "0")) == 0:
        show(found)
        if options.json:
            print(json.dumps(found))
    return 1 if found["waits"] or found["misfits"] else 0


def missing() -> str:
    """What this machine or Python lacks; empty: nothing."""
    for name in ("torch", "triton"):
        try:
            __import__(name)
        except ImportError:
            return f"This Python has no {name}"
    import torch

    return "" if torch.cuda.is_available() else "PyTorch finds no GPU here"


def borrow_stagetrace() -> None:
    """Makes the checkout's packages importable where stagetrace is not installed."""
    try:
        import stagetrace.instrument.device_pairs  # noqa: F401
    except ImportError:
        package = types.ModuleType("stagetrace")
        package.__path__ = [str(CHECKOUT)]
        sys.modules["stagetrace"] = package


# Runs of the model


class Timed(NamedTuple):
    """The marks and pairs of this process, and what the pairs wrote."""

    marks: Any
    pairs: Any
    written: list[tuple[int, int, int, int]]  # step, begin, end (host ns), clock error
    order: list[int]  # of the marks in a step


def timed(layers: int, device: Any, several: bool, event: Callable[[], Any], source: Any) -> Timed:
    """Marks around each stage of each layer and around the whole, and a pool of pairs."""
    from stagetrace.adapters.marks import Marks
    from stagetrace.instrument.device_marks import EMPTY, FORWARD, Marked
    from stagetrace.instrument.device_pairs import DevicePairs
    from stagetrace.instrument.records import TAILS

    stages = ("attention", "collective", "moe") if several else ("attention", "moe")
    marked = [FORWARD, EMPTY, *(Marked(stage, layer) for layer in range(layers) for stage in stages)]
    written: list[tuple[int, int, int, int]] = []

    def put(head: bytes, begin: int, end: int, tail: bytes) -> None:
        _, step, _, _, error = TAILS[3].unpack(tail)
        written.append((step, begin, end, error))

    inner = [mark for number in range(1, len(marked)) for mark in (2 * number, 2 * number + 1)]
    return Timed(Marks(marked, device, event), DevicePairs(source, put), written, [0, *inner, 1])


def mark_stages(marks: Any | None) -> None:
    """Has marks launched around every stage of what runs, or is captured, from now on; None: no longer."""
    from block import Around

    if marks is None:
        Around.before = Around.after = staticmethod(lambda stage, layer: None)
        return
    places = {(marked.stage, marked.layer): 2 * number for number, marked in enumerate(marks.reader.marked)}
    first, empty = 4, 2

    def before(stage: str, layer: int) -> None:
        if places[stage, layer] == first:
            marks.mark(empty)
            marks.mark(empty + 1)
        marks.mark(places[stage, layer])

    Around.before = staticmethod(before)
    Around.after = staticmethod(lambda stage, layer: marks.mark(places[stage, layer] + 1))


def runner(mode: str, model: Any, x: Any) -> Callable[[], Any]:
    """What runs the model's forward pass in a mode, warm. Graphs capture what is around the stages just now."""
    import torch

    if mode == "eager":
        run: Callable[[], Any] = lambda: model(x)  # noqa: E731
    elif mode == "compiled":
        compiled = torch.compile(model, fullgraph=True)
        run = lambda: compiled(x)  # noqa: E731
    elif mode == "full graph":
        run = captured(lambda: model(x))[0].replay
    else:
        run = pieces(model, x)
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    return run


def captured(function: Callable[[], Any]) -> tuple[Any, Any]:
    """A graph of what a function launches, and what it returned, which a replay writes anew."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def pieces(model: Any, x: Any) -> Callable[[], Any]:
    """Graphs of everything but attention, which is launched between them, as engines do."""
    from block import attend

    steps: list[tuple[Any, Any, Any, Any, Any, Any, int]] = []
    for layer in model.layers:
        before, (q, k, v) = captured(lambda layer=layer, x=x: layer.before_attention(x))
        attended = attend(q, k, v, layer.layer).clone()
        after, x = captured(lambda layer=layer, x=x, attended=attended: layer.after_attention(x, attended))
        steps.append((before, q, k, v, attended, after, layer.layer))

    def run() -> Any:
        for before, q, k, v, attended, after, layer in steps:
            before.replay()
            attended.copy_(attend(q, k, v, layer))
            after.replay()
        return x

    return run


def step(number: int, run: Callable[[], Any], timed: Timed) -> None:
    """One step, marked and timed as an engine's would be. Nothing in it waits."""
    from stagetrace.instrument.device_pairs import FORWARD

    marks, pairs = timed.marks, timed.pairs
    marks.begin_step(number)
    pairs.step_begins()
    pairs.begin(FORWARD)
    marks.mark(0)
    run()
    marks.mark(1)
    pairs.end(FORWARD, 1, number, 0)
    marks.end_step(number)


# Measurements


def device() -> Any:
    """The device of this rank, which is the current one from now on."""
    import torch

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def measure(counts: Sequence[int], quick: bool, device: Any) -> dict[str, Any]:
    """Everything, as one object."""
    import torch
    import torch.distributed as dist
    from block import Model, Size

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        dist.init_process_group("nccl")
    where = {"device": device, "dtype": torch.bfloat16}
    steps, rounds = (5, 3) if quick else (STEPS, ROUNDS)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "accuracy": {},
        "experts": {},
        "misfits": {},  # of modes: why their profile is not understood
        "costs": [],
        "waits": False,
    }
    with torch.inference_mode():
        size = Size()
        x = torch.randn(size.tokens, size.hidden, **where)
        model = Model(size, **where)
        for mode in MODES:
            for ahead in (True, False):
                regime = f"{mode}, {AHEAD if ahead else BEHIND}"
                try:
                    found["accuracy"][regime] = accuracy(mode, model, x, steps, several, device, ahead)
                except Misfit as error:
                    found["misfits"][regime] = str(error)
        for mode in MODES:
            found["experts"][mode] = experts_counted(mode, model, x, steps, device)
        found["waits"] = waits(model, x, several, device)
        found["host_ns"] = host_ns(several, device)
        for layers in counts:
            model = Model(Size(layers=layers), **where)
            found["costs"] += [costs(mode, model, x, rounds, several, device) for mode in ("eager", "full graph")]
    if several:
        dist.destroy_process_group()
    return found


def sources() -> tuple[Callable[[], Any], Any]:
    """Events as the product makes them."""
    from stagetrace.adapters.device_time import CudaEvents

    events = CudaEvents()
    return events.event, events


def accuracy(mode: str, model: Any, x: Any, steps: int, several: bool, device: Any, ahead: bool) -> dict[str, Any]:
    """Spans of marks and pairs beside the profiler's times of the same steps.

    `ahead`: all of a step is launched before the device comes to it, as where it is the device that takes long. Else
    the device waits for what the host launches, also between a mark and the kernel behind it.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    found = timed(len(model.layers), device, several, *sources())
    mark_stages(found.marks)
    run = runner(mode, model, x)
    offset = time.time_ns() - time.monotonic_ns()
    spans: dict[int, list[Any]] = {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for number in range(1, steps + 1):
            if ahead:
                torch.cuda._sleep(AHEAD_CYCLES)
            step(number, run, found)
            torch.cuda.synchronize()
            found.pairs.poll()
            spans |= dict(found.marks.read())
    mark_stages(None)
    kernels = [
        Kernel(event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    return compared(kernels, spans, found, offset)


def compared(kernels: Sequence[Kernel], spans: dict[int, list[Any]], found: Timed, offset: int) -> dict[str, Any]:
    """The measurements of some steps, numbered from 1, as agreements. `offset`: wall less monotonic time, in ns."""
    from stagetrace.instrument.device_marks import EMPTY, FORWARD, MOST_EMPTY_NS, trimmed

    truth = steps_of(kernels, found.order)
    empties = [span.end - span.begin for row in spans.values() for span in row if span.marked == EMPTY]
    empty = min(empties, default=MOST_EMPTY_NS + 1)
    if len(truth) != len(spans):
        raise Misfit(f"{len(truth)} steps in the profile, {len(spans)} were run")
    pairs = {number: (begin, end, error) for number, begin, end, error in found.written}
    by_stage: dict[str, list[tuple[int, int]]] = {}
    whole, apart = [], []
    for number, of_step in enumerate(truth, 1):
        for at, marked in enumerate(found.marks.reader.marked):
            for span in spans.get(number, []):
                if span.marked == marked != EMPTY:
                    taken = empty if marked != FORWARD and empty <= MOST_EMPTY_NS else 0
                    begin, end = trimmed(span.begin, span.end, taken)
                    durations = (end - begin, of_step[at].last - of_step[at].first)
                    by_stage.setdefault(marked.stage, []).append(durations)
        if number in pairs:
            begin, end, _ = pairs[number]
            whole.append((end - begin, of_step[0].closed - of_step[0].opened))
            apart.append((begin + offset, of_step[0].opened))
    times = sorted({time for row in spans.values() for span in row for time in (span.begin, span.end)})
    return {
        "marks": {stage: vars(agreement(each)) for stage, each in by_stage.items()},
        "pairs": vars(agreement(whole)),
        "begins": vars(agreement(apart)),
        "clock_error_ns": max((error for _, _, error in pairs.values()), default=None),
        "contradictions": found.pairs.contradictions,
        "empty_ns": empty,
        "timer_resolution_ns": math.gcd(*(after - before for before, after in pairwise(times))),
        "missing": vars(found.marks.reader.counts),
    }


def waits(model: Any, x: Any, several: bool, device: Any) -> bool:
    """Whether marks or pairs make the host wait, as PyTorch sees it."""
    import torch

    found = timed(len(model.layers), device, several, *sources())
    mark_stages(found.marks)
    run = runner("eager", model, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(1, 40):
            step(number, run, found)
            found.pairs.poll()
            found.marks.read()
    except RuntimeError as error:
        print(f"something waits: {error}", file=sys.stderr)
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
        mark_stages(None)
        torch.cuda.synchronize()
    return False


def experts_counted(mode: str, model: Any, x: Any, steps: int, device: Any) -> dict[str, Any]:
    """Tokens by expert as they are counted on the device, in graphs as well, beside a count of the same choices."""
    import torch
    from block import Around

    from stagetrace.adapters.experts import DeviceCounts

    written: dict[tuple[int, int], list[int]] = {}
    truth: dict[int, Any] = {}

    def write(instance: int, step: int, rank: int, layer: int, tokens: int, counts: bytes, width: int) -> None:
        written[step, layer] = [
            int.from_bytes(counts[at : at + width], "little") for at in range(0, len(counts), width)
        ]

    def seen(layer: int, chosen: Any) -> None:
        truth[layer] = torch.bincount(chosen[~padding].reshape(-1), minlength=experts).tolist()

    experts, layers = model.layers[0].size.experts, range(len(model.layers))
    padding = torch.arange(len(x), device=device) % 5 == 0
    Around.chosen = staticmethod(seen)
    run = model if "graph" in mode else runner(mode, model, x)
    run(x) if "graph" in mode else run()
    rank = types.SimpleNamespace(instance=1, step=0, rank=0)
    recorder = types.SimpleNamespace(experts=write)
    counts = DeviceCounts(types.SimpleNamespace(recorder=recorder), rank, layers, experts, device)  # type: ignore[arg-type]
    Around.chosen = staticmethod(lambda layer, chosen: counts.count(layer, chosen, padding))
    if "graph" in mode:
        run = runner(mode, model, x)
    for rank.step in range(1, steps + 1):
        counts.begin()
        run()
        counts.end()
        if rank.step % 4 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    counts.begin()
    Around.chosen = staticmethod(lambda layer, chosen: None)
    right = sum(written.get((step, layer)) == truth[layer] for step in range(1, steps + 1) for layer in layers)
    return {"right": right, "of": steps * len(layers), "left_out": counts.left_out}


def host_ns(several: bool, device: Any) -> dict[str, float]:
    """What the host does for a pair and for a mark, each beside what it cannot do without; ns, medians."""
    import torch

    from stagetrace.instrument.device_pairs import FORWARD

    timed_ = timed(1, device, several, *sources())
    pairs, marks = timed_.pairs, timed_.marks
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    number = 0

    def pair() -> None:
        nonlocal number
        number += 1
        pairs.step_begins()
        pairs.begin(FORWARD)
        pairs.end(FORWARD, 1, number, 0)

    def bare_pair() -> None:
        first.record()
        last.record()

    def bare_read() -> None:
        last.query()
        first.elapsed_time(last)

    x = torch.zeros(1, device=device)
    alternatives: dict[str, Callable[[], Any]] = {
        "pair, launching": pair,
        "pair, reading": pairs.poll,
        "two bare records": bare_pair,
        "bare query and elapsed_time": bare_read,
        "mark": lambda: marks.mark(0),
        "add_ of one number": lambda: x.add_(1),
    }
    took: dict[str, list[int]] = {name: [] for name in alternatives}
    for _ in range(CALLS):
        for name, function in alternatives.items():
            begin = time.perf_counter_ns()
            function()
            took[name].append(time.perf_counter_ns() - begin)
            torch.cuda.synchronize()
    return {name: sorted(each)[CALLS // 2] for name, each in took.items()}


def costs(mode: str, model: Any, x: Any, rounds: int, several: bool, device: Any) -> dict[str, Any]:
    """What a mark and a pair add to a step, with this many layers: runs with and without, in turn."""
    import torch

    from stagetrace.instrument.device_pairs import FORWARD

    found = timed(len(model.layers), device, several, *sources())
    plain = runner(mode, model, x)
    mark_stages(found.marks)
    marked = runner(mode, model, x)
    mark_stages(None)
    number = 0

    def paired() -> None:
        nonlocal number
        number += 1
        found.pairs.step_begins()
        found.pairs.begin(FORWARD)
        plain()
        found.pairs.end(FORWARD, 1, number, 0)

    def with_marks() -> None:
        if mode == "eager":
            mark_stages(found.marks)
        marked()
        mark_stages(None)

    alternatives = {"plain": plain, "marks": with_marks, "pairs": paired, "plain again": plain}
    took: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name in random.sample([*alternatives], len(alternatives)):
            run = alternatives[name]
            torch.cuda.synchronize()
            begin = time.perf_counter_ns()
            for _ in range(RUNS):
                run()
            torch.cuda.synchronize()
            took[name].append((time.perf_counter_ns() - begin) / RUNS)
            found.pairs.poll()
    marks = len(found.order) - 2
    return {
        "mode": mode,
        "layers": len(model.layers),
        "step_ns": sorted(took["plain"])[rounds // 2],
        "marks": marks,
        "mark": vars(cost(took["plain"], took["marks"], marks)),
        "pair": vars(cost(took["plain"], took["pairs"], 1)),
        "nothing": vars(cost(took["plain"], took["plain again"], 1)),
    }


# What is shown


def show(found: dict[str, Any]) -> None:
    """Two tables and the rest as lines."""
    print(f"{found['device']}, {found['ranks']} ranks, PyTorch {found['torch']}\n")
    rows = []
    for mode, each in found["accuracy"].items():
        spans = [(f"marks, {stage}", one) for stage, one in each["marks"].items()]
        spans += [("pair, forward", each["pairs"]), ("pair, begin on the host's clock", each["begins"])]
        for name, one in spans:
            about = Agreement(**one)
            share = "-" if about.within is None else f"{100 * about.within:.0f} %"
            rows.append(
                [mode, name, str(about.count), microseconds(about.median_ns), microseconds(about.worst_ns), share]
            )
    print(table(("mode", "what", "spans", "off by, median us", "most us", "within 2 us or 2 %"), rows), end="\n\n")
    rows = [
        [
            each["mode"],
            str(each["layers"]),
            microseconds(each["step_ns"]),
            str(each["marks"]),
            *(spread(each[what]) for what in ("mark", "pair", "nothing")),
        ]
        for each in found["costs"]
    ]
    print(table(("mode", "layers", "step us", "marks", "a mark us", "a pair us", "nothing us"), rows), end="\n\n")
    for mode, each in found["accuracy"].items():
        print(
            f"{mode}: clock error at most {microseconds(each['clock_error_ns'])} us, {each['contradictions']}"
            f" contradictions, the timer counts in {each['timer_resolution_ns']} ns, an empty span takes"
            f" {microseconds(each['empty_ns'])} us, not told: {each['missing']}"
        )
    for mode, why in found["misfits"].items():
        print(f"{mode}: its profile is not understood: {why}")
    for mode, each in found["experts"].items():
        print(f"{mode}: tokens by expert right in {each['right']} of {each['of']} layers of steps")
    rows = [[name, microseconds(ns)] for name, ns in found["host_ns"].items()]
    print("\n" + table(("on the host", "us"), rows), end="\n\n")
    print(f"waits for the device: {found['waits']}")


def spread(cost: dict[str, float]) -> str:
    """A median and its quartiles."""
    middle, low, high = (microseconds(cost[name]) for name in ("median", "low", "high"))
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    sys.exit(main())
