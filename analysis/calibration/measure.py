"""Measures the components of a step on one device: the program that runs in the environment that has torch.

    PYTHON -P -m stagetrace.analysis.calibration.measure '{"device": "cpu", "quick": false, "threads": 0, "ranks": 2}'

Standard library, torch and our own files alone. Its standard output has one JSON object a line: {"device": ...} first,
{"doing": NAME, "done": i, "of": n} as it goes, {"row": ...} or {"skipped": NAME, "why": ...} a case, {"end": ...}
last; whatever else is printed goes to standard error. Times are of the device's own clock where it has one (events),
else the host's.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stagetrace.adapters.device import processor_name

from . import cases
from .cases import COLLECTIVE, GIB, MIB, Case, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MODULE = "stagetrace.analysis.calibration.measure"
ROUNDS, QUICK_ROUNDS = 5, 3  # over all cases: what disturbs one round is not in all
SAMPLES = 10  # in a round
LONG_CALL_S, LONG_SAMPLES = 0.1, 2  # a call that takes so long is disturbed little, and costs much
EXCHANGES = 20  # samples of a collective: it waits for other processes, which the system wakes sooner or later
SAMPLE_S = 0.004  # a sample is as many calls as take so long
LONGEST_CALL_S = 2.0  # a case that would take longer is left out
MOST_CALLS = 20_000
RANKS_PATIENCE_S = 900.0


@dataclass
class Asked:
    """What to measure."""

    device: str  # cpu, cuda, cuda:1
    quick: bool = False
    threads: int = 0  # of the host; 0: torch's own choice
    ranks: int = 1
    only: tuple[str, ...] = ()  # components; none: all
    rank: int = -1  # of a process of the collectives
    meeting: str = ""  # the file at which these find one another


class Clock:
    """Times calls on a device."""

    def __init__(self, torch: Any, device: Any):
        self.torch, self.device = torch, device

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        """Of so many calls, one after the other."""
        if self.device.type == "cpu":
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            return time.perf_counter() - begin
        module = self.torch.get_device_module(self.device)
        first, last = module.Event(enable_timing=True), module.Event(enable_timing=True)
        first.record()
        for _ in range(calls):
            run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def samples(self, run: Callable[[], object]) -> list[float]:
        """Seconds a call, several times, each over as many calls as take SAMPLE_S."""
        once = self.seconds(run, 1)  # warms up, too
        once = min(once, self.seconds(run, 1))
        if once > LONG_CALL_S:
            return [self.seconds(run, 1) for _ in range(LONG_SAMPLES)]
        calls = max(1, min(MOST_CALLS, round(SAMPLE_S / max(once, 1e-7))))
        self.seconds(run, max(1, calls // 4))
        return self.fixed(run, calls, SAMPLES)

    def fixed(self, run: Callable[[], object], calls: int, samples: int) -> list[float]:
        """Seconds a call, `samples` times over so many calls: the same on every rank."""
        return [self.seconds(run, calls) / calls for _ in range(samples)]


@dataclass
class Bench:
    """The cases of a run, their samples, and how undisturbed it was."""

    say: Callable[[dict[str, Any]], None]
    samples: dict[Case, list[list[float]]] = field(default_factory=dict)  # by round
    skipped: dict[Case, str] = field(default_factory=dict)
    rates: dict[tuple[str, str, str], float] = field(default_factory=dict)  # operations or bytes per second, the last

    def measure(self, case: Case, samples: Callable[[], list[float]]) -> None:
        """One round of one case. Whatever goes wrong in it is a reason to skip it."""
        if case in self.skipped:
            return
        kind = (case.component, case.op, case.arithmetic)
        amount = case.operations or case.bytes
        if amount / self.rates.get(kind, amount) > LONGEST_CALL_S:
            self.skipped[case] = f"a call would take over {LONGEST_CALL_S:g} s"
            return
        try:
            found = samples()
        except Exception as error:  # of torch, in a device's own words
            first = (str(error).strip().splitlines() or [""])[0]
            self.skipped[case] = (
                first[:300] if isinstance(error, Unsupported) else f"{type(error).__name__}: {first}"[:300]
            )
            return
        self.samples.setdefault(case, []).append(found)
        self.rates[kind] = amount / max(min(found), 1e-9)

    def rows(self) -> Iterator[dict[str, Any]]:
        """What came of each case, as results.Row has it."""
        for case, rounds in self.samples.items():
            every = sorted(sample for found in rounds for sample in found)
            yield {
                "component": case.component,
                "op": case.op,
                "arithmetic": case.arithmetic,
                "kernel": case.kernel,
                "size": case.size,
                "bytes": case.bytes,
                "operations": case.operations,
                "ranks": case.ranks,
                "shape": case.shape,
                "samples": len(every),
                "best_s": every[0],
                "median_s": every[len(every) // 2],
                "q1_s": every[len(every) // 4],
                "q3_s": every[3 * len(every) // 4],
                "rounds_s": [min(found) for found in rounds],
            }


def name_of(case: Case) -> str:
    """For people: what is being measured."""
    return " ".join(word for word in (case.component, case.op, case.arithmetic, case.size) if word)


def device_of(torch: Any, asked: Asked) -> tuple[Any, dict[str, Any]]:
    """The device, and what it is. Raises RuntimeError, in torch's words, when it is not there."""
    device = torch.device(asked.device)
    about: dict[str, Any] = {
        "device": device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "host": platform.node(),
    }
    if device.type == "cpu":
        return device, about | {"name": processor_name() or platform.machine(), "processors": os.cpu_count() or 1}
    module = torch.get_device_module(device)
    if not module.is_available():
        raise RuntimeError(f"this torch ({torch.__version__}) sees no {device.type} device")
    module.set_device(device)
    properties = module.get_device_properties(device)
    return device, about | {
        "name": str(module.get_device_name(device)),
        "multiprocessors": int(getattr(properties, "multi_processor_count", 0)),
        "memory": int(properties.total_memory),
        "runtime": str(torch.version.cuda or torch.version.hip or ""),
    }


def plan(torch: Any, device: Any, quick: bool, only: Sequence[str] = ()) -> list[Case]:
    """The cases of one process: of all components, or of some."""
    accelerator = device.type != "cpu"
    if accelerator:
        free = torch.get_device_module(device).mem_get_info(device)[0]
        limit = min(4 * GIB, free // 4)
    else:
        limit = min((256 if quick else 1024) * MIB, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16)
    found = [
        *cases.memory(limit, quick),
        *cases.gemm(accelerator, quick),
        *cases.attention(accelerator, quick),
        *cases.experts(accelerator, quick),
    ]
    return [case for case in found if not only or case.component in only]


class Others:
    """What share of the machine other programs, and the hypervisor, took: from /proc/stat; None where there is none."""

    def __init__(self) -> None:
        self.begin, self.busy, self.own = time.monotonic(), _busy_s(), _own_s()

    def processors(self) -> float | None:
        """On average, in processors."""
        busy, own, wall = _busy_s(), _own_s(), time.monotonic() - self.begin
        if busy is None or self.busy is None or wall <= 0:
            return None
        return max(0.0, (busy - self.busy) - (own - self.own)) / wall


def _busy_s() -> float | None:
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, interrupt, soft, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    return sum(os.times()[:4])


def main() -> int:
    """The program."""
    asked = Asked(**json.loads(sys.argv[1]))
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what torch's libraries print, from C as well
    with answer:

        def say(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=answer, flush=True)

        import torch

        if asked.threads:
            torch.set_num_threads(asked.threads)
        torch.set_grad_enabled(False)
        if asked.rank >= 0:
            _take_part(torch, asked, say)
            return 0
        try:
            device, about = device_of(torch, asked)
        except (RuntimeError, AssertionError) as error:
            say({"unusable": str(error).splitlines()[0]})
            return 1
        say({"device": about})
        others = Others()
        bench = Bench(say)
        _alone(torch, device, asked, bench)
        if asked.ranks > 1 and (not asked.only or COLLECTIVE in asked.only):
            _together(asked, say)
        for row in bench.rows():
            say({"row": row})
        for case, why in bench.skipped.items():
            say({"skipped": name_of(case), "why": why})
        say({"end": {"other_processors": others.processors()}})
    return 0


def _alone(torch: Any, device: Any, asked: Asked, bench: Bench) -> None:
    clock = Clock(torch, device)
    planned = plan(torch, device, asked.quick, asked.only)
    rounds = QUICK_ROUNDS if asked.quick else ROUNDS
    for round_ in range(rounds):
        for number, case in enumerate(planned):
            bench.say({"doing": name_of(case), "done": round_ * len(planned) + number, "of": rounds * len(planned)})

            def samples(case: Case = case) -> list[float]:
                return clock.samples(case.make(torch, device))

            bench.measure(case, samples)


# Collectives: a process each rank


def _together(asked: Asked, say: Callable[[dict[str, Any]], None]) -> None:
    """Runs the ranks and hands on what rank 0 says; the ranks' trouble is a reason to skip them all."""
    with tempfile.TemporaryDirectory(prefix="stagetrace-calibrate-") as directory:
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        threads = max(1, (asked.threads or os.cpu_count() or 1) // asked.ranks)
        ranks = []
        for rank in range(asked.ranks):
            own = vars(asked) | {"rank": rank, "meeting": os.path.join(directory, "meeting"), "threads": threads}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", MODULE, json.dumps(own)],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    text=True,
                )
            )
        spoken = ranks[0].stdout
        assert spoken is not None
        overdue = threading.Timer(RANKS_PATIENCE_S, ranks[0].kill)  # a rank that failed leaves the others waiting
        overdue.start()
        try:
            for line in spoken:
                say(json.loads(line))
            ended = [process.wait(60) for process in ranks]
        except subprocess.TimeoutExpired:
            ended = [-1]
        finally:
            overdue.cancel()
            for process in ranks:
                process.kill()
                process.wait()
            spoken.close()
    if any(ended):
        say({"skipped": f"collectives of {asked.ranks} ranks", "why": "a rank's process failed; its words are above"})


def _take_part(torch: Any, asked: Asked, say: Callable[[dict[str, Any]], None]) -> None:
    """One rank: the same cases in the same order as all others."""
    accelerator = torch.device(asked.device).type != "cpu"
    device = torch.device(f"{torch.device(asked.device).type}:{asked.rank}" if accelerator else "cpu")
    if accelerator:
        torch.get_device_module(device).set_device(device)
    torch.distributed.init_process_group(
        "nccl" if accelerator else "gloo",
        init_method=f"file://{asked.meeting}",
        rank=asked.rank,
        world_size=asked.ranks,
    )
    clock, bench = Clock(torch, device), Bench(say)
    planned = list(cases.collectives(asked.ranks, accelerator, asked.quick))
    rounds = QUICK_ROUNDS if asked.quick else ROUNDS
    for round_ in range(rounds):
        for number, case in enumerate(planned):
            if asked.rank == 0:
                say({"doing": name_of(case), "done": round_ * len(planned) + number, "of": rounds * len(planned)})

            def samples(case: Case = case) -> list[float]:
                run = case.make(torch, device)
                torch.distributed.barrier()
                calls = max(2, min(50, 8 * MIB // case.bytes))
                clock.seconds(run, calls)  # warms up
                return clock.fixed(run, calls, EXCHANGES)

            bench.measure(case, samples)
    torch.distributed.destroy_process_group()
    if asked.rank == 0:
        for row in bench.rows():
            say({"row": row})
        for case, why in bench.skipped.items():
            say({"skipped": name_of(case), "why": why})


if __name__ == "__main__":
    sys.exit(main())
