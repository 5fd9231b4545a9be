"""What writing a record and a whole hooked call cost, against two clock reads and against an OpenTelemetry SDK span.

    .venv/bin/python benchmarks/record_cost.py [--json] [--quick]

The hooked call is a method that does nothing, with the hook that stagetrace has on vLLM's GPUModelRunner.execute_model:
level check, two clock reads, the call itself, one record. All alternatives are timed in turn in one loop. Beside the
times it looks at what must not happen at all: growing memory, threads, system calls.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import resource
import signal
import struct
import sys
import threading
import time
import tracemalloc
import types
from _thread import get_ident
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
import rings
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

from stagetrace.adapters.vllm import worker
from stagetrace.adapters.vllm.hooks import HOOK_POINTS
from stagetrace.instrument.hooks import Hook
from stagetrace.instrument.recorder import RECORDER
from stagetrace.instrument.records import HEAD, TAILS, RecordType, header_word
from stagetrace.instrument.stages import BY_NAME, STEP_COMPOSITION, Level

if TYPE_CHECKING:
    from collections.abc import Callable

    from stagetrace.instrument.recorder import Recorder
    from stagetrace.instrument.ring import Ring

ROUNDS, QUICK_ROUNDS = 1000, 20
CALLS, FEW_CALLS = 200, 20
RECORDS, QUICK_RECORDS = 1_000_000, 100_000
CLOCKS = "two clock reads"
GOALS = {"ratio_to_two_clock_reads": 4.0, "hooked_call_ratio": 8.0, "off_ratio": 2.0}
SPAN_GOAL = 20.0  # hooked calls that an SDK span costs, at least

# seccomp: what a process may still ask of the kernel; only to end, by exit_group
_EXIT_GROUP = {"x86_64": 231, "aarch64": 94}
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000


class Engine:
    """A rank whose functions do nothing, so that what is timed is the hooks on them; its classes are its own."""

    def __init__(self, recorder: Recorder | None = None, targets: tuple[str, ...] = ()):
        class GPUModelRunner:
            """The calls of vLLM's, with its parameters, and who calls whom."""

            def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> None:
                pass

            def _model_forward(
                self,
                input_ids: Any = None,
                positions: Any = None,
                intermediate_tensors: Any = None,
                inputs_embeds: Any = None,
                **model_kwargs: Any,
            ) -> None:
                pass

            def sample_tokens(self, grammar_output: Any) -> None:
                pass

            def _bookkeeping_sync(
                self,
                scheduler_output: Any,
                sampler_output: Any,
                logits: Any,
                hidden_states: Any,
                num_scheduled_tokens: Any,
            ) -> None:
                pass

        class Nested(GPUModelRunner):
            """Where they do call one another."""

            def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> None:
                self._model_forward(input_ids=None, positions=None, intermediate_tensors=None, inputs_embeds=None)

            def sample_tokens(self, grammar_output: Any) -> None:
                self._bookkeeping_sync(None, None, None, None, None)

        class Worker:
            """The calls of vLLM's."""

            runner = Nested()

            def execute_model(self, scheduler_output: Any) -> None:
                return self.runner.execute_model(scheduler_output, None)

            def sample_tokens(self, grammar_output: Any) -> None:
                return self.runner.sample_tokens(grammar_output)

        self.runner, self.worker = GPUModelRunner(), Worker()
        module = types.ModuleType("engine")
        module.Worker = Worker  # type: ignore[attr-defined]
        # One function alone is timed, or a whole step, in which they call one another.
        module.GPUModelRunner = GPUModelRunner if len(targets) == 1 else Nested  # type: ignore[attr-defined]
        points = {point.target: (index, point) for index, point in enumerate(HOOK_POINTS)}
        for target in targets:
            index, point = points[target]
            hook = Hook(point, index, recorder or RECORDER)
            hook.install(module)
            if hook.status != "installed":
                raise RuntimeError(f"the hook on {target} does not fit: {hook.why}")

    def step(self, scheduler_output: Any) -> None:
        """A rank's step, as vLLM's executor makes it."""
        self.worker.execute_model(scheduler_output)
        self.worker.sample_tokens(None)


class Output:
    """What the hooks read of a SchedulerOutput."""

    total_num_scheduled_tokens = 256
    _stagetrace = (1 << 62, 1, False)  # adapters.vllm.scheduler.STEP_ATTRIBUTE


_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_WORKER = "vllm.v1.worker.gpu_worker:Worker"
ONE = (f"{_RUNNER}.execute_model",)
ALL = (
    *(f"{_WORKER}.{name}" for name in ("execute_model", "sample_tokens")),
    *(f"{_RUNNER}.{name}" for name in ("execute_model", "_model_forward", "sample_tokens", "_bookkeeping_sync")),
)


def alternatives(recorder: Recorder, ring: Ring, hooked: Engine) -> dict[str, Callable[[], float]]:
    """What is timed, by name; each gives ns a call."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SpanProcessor())  # which does nothing with a span that ended
    begin, end = time.monotonic_ns() - 10_000, time.monotonic_ns()
    names = {
        "clock": time.monotonic_ns,
        "append": deque(maxlen=CALLS).append,
        "segment": recorder.segment,
        "put": recorder.put,
        "head": HEAD.pack(header_word(RecordType.SEGMENT, BY_NAME["forward"].id), get_ident()),
        "tail": TAILS[2].pack(1 << 62, 1, 0, 256),
        "state": recorder.state,
        "step_begin": recorder.step_begin,
        "composition": tuple(range(len(STEP_COMPOSITION))),
        "forward": header_word(RecordType.SEGMENT, BY_NAME["forward"].id),
        "decode": header_word(RecordType.STATE, BY_NAME["decode"].id),
        "handle": recorder.handle("chatcmpl-0"),
        "begin": begin,
        "end": end,
        "instance": 1 << 62,
        "hooked": hooked.runner,
        "plain": Engine().runner,
        "rank": Engine(recorder, ALL).step,
        "plain_rank": Engine().step,
        "output": Output(),
        "span": provider.get_tracer("benchmark").start_span,
        "attributes": {"stagetrace.step": 1, "stagetrace.phase": "decode", "stagetrace.rank": 0, "tokens": 256},
    }

    def timed(statement: str, calls: int = CALLS) -> Callable[[], float]:
        return measure.per_call(statement, names, calls)

    def in_step(statement: str) -> Callable[[], float]:
        run = timed(statement)

        def between() -> float:
            worker.RANK.start(
                *Output._stagetrace[:2], Output.total_num_scheduled_tokens, 0
            )  # without a step it would record nothing
            return run()

        return between

    def off(statement: str, calls: int = CALLS) -> Callable[[], float]:
        run = timed(statement, calls)

        def between() -> float:
            worker.RANK.start(
                *Output._stagetrace[:2], Output.total_num_scheduled_tokens, 0
            )  # so that it is the level that is looked at
            rings.set_level(ring, Level.OFF)
            taken = run()
            rings.set_level(ring, Level.STEP)
            return taken

        return between

    def with_room(statement: str) -> Callable[[], float]:
        run = timed(statement)

        def after_collecting() -> float:
            rings.make_room(ring)
            return run()

        return after_collecting

    return {
        "loop": timed("pass"),
        CLOCKS: timed("clock(); clock()"),
        "tuple append": timed("append((forward, begin, end, instance, 1, 0, 0))"),
        "record: a segment": timed("segment(forward, begin, end, instance, 1, 0, 256)"),
        "record: a segment, one of several of a step": timed("put(head, begin, end, tail)"),
        "record: a state of a request": with_room("state(decode, end, handle, instance, 1, 256)"),
        "record: a step's begin, in two slots": timed("step_begin(begin, end, instance, 1, composition)"),
        "the call, not hooked": timed("plain.execute_model(None, None)"),
        "the call, hooked, off": off("hooked.execute_model(None, None)"),
        "the call, hooked, recording": in_step("hooked.execute_model(None, None)"),
        "a rank's step, not hooked": timed("plain_rank(output)", FEW_CALLS),
        "a rank's step, hooked, off": off("rank(output)", FEW_CALLS),
        "a rank's step, hooked, recording": timed("rank(output)", FEW_CALLS),
        "SDK span, 4 attributes": timed("span('forward decode', attributes=attributes).end()", FEW_CALLS),
    }


def memory_growth(call: Callable[[], None], count: int) -> dict[str, int]:
    """Bytes that so many calls leave behind: of Python's allocator (also at most, meanwhile) and of the process."""
    for _ in range(2000):
        call()
    before = _resident()
    for _ in range(count):
        call()
    resident = _resident() - before
    tracemalloc.start()
    try:
        call()
        traced = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(count):
            call()
        current, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return {"python_bytes": current - traced, "python_peak_bytes": peak - traced, "resident_bytes": resident}


def counters(call: Callable[[], None], count: int) -> dict[str, int]:
    """What the kernel counted over so many calls: reads and writes, waits, page faults; and threads started."""
    io, usage, threads = _io(), resource.getrusage(resource.RUSAGE_SELF), threading.active_count()
    for _ in range(count):
        call()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "read_write_calls": _io() - io - 1,  # less the one that read the first count
        "voluntary_switches": after.ru_nvcsw - usage.ru_nvcsw,
        "page_faults": after.ru_minflt + after.ru_majflt - usage.ru_minflt - usage.ru_majflt,
        "threads": threading.active_count() - threads,
    }


def makes_no_system_call(call: Callable[[], None], count: int) -> bool | None:
    """Whether so many calls are made by a process that the kernel kills at its first system call but its exit.

    None where the kernel does not offer this (seccomp), or on a processor whose numbers are not known here.
    """
    exit_group = _EXIT_GROUP.get(platform.machine())
    if exit_group is None:
        return None
    instructions = (
        (_LOAD, 0, 0, 0),
        (_JUMP_IF_EQUAL, 0, 1, exit_group),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _KILL),
    )
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in instructions))
    filter_ = ctypes.create_string_buffer(struct.pack("@HP", len(instructions), ctypes.addressof(program)))
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    call()
    child = os.fork()
    if not child:
        for _ in range(10):
            call()
        refused = prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(
            _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(filter_), 0, 0
        )
        if refused:
            os._exit(2)
        for _ in range(count):
            call()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: True, -signal.SIGSYS: False}.get(status)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _io() -> int:
    """Calls of read and write so far."""
    descriptor = os.open("/proc/self/io", os.O_RDONLY)
    try:
        lines = dict(line.split(": ") for line in os.read(descriptor, 4096).decode().splitlines())
    finally:
        os.close(descriptor)
    return int(lines["syscr"]) + int(lines["syscw"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser)
    options = parser.parse_args()
    machine = measure.machine()
    records = QUICK_RECORDS if options.quick else RECORDS
    with rings.recording() as (recorder, ring):
        hooked = Engine(recorder, ONE)

        def call() -> None:
            hooked.runner.execute_model(None, None)

        times = measure.rounds(alternatives(recorder, ring, hooked), QUICK_ROUNDS if options.quick else ROUNDS)
        if rings.dropped(ring):
            raise RuntimeError(f"{rings.dropped(ring)} records were dropped: dropping one is not what is measured")
        engine = Engine(recorder, ALL)
        engine.step(Output())  # between this one and the next the rank is idle, which is recorded as well
        before = rings.detail_slots(ring)
        engine.step(Output())
        rank_slots = rings.detail_slots(ring) - before
        worker.RANK.start(*Output._stagetrace[:2], Output.total_num_scheduled_tokens, 0)
        growth = memory_growth(call, records)
        counted = counters(call, records)
        no_call = makes_no_system_call(call, records)
    loop = times.pop("loop")
    times = {name: values - loop for name, values in times.items()}
    ratios = {name: measure.spread(values / times[CLOCKS]) for name, values in times.items()}
    figures = {
        "ratio_to_two_clock_reads": ratios["record: a segment"],
        "hooked_call_ratio": ratios["the call, hooked, recording"],
        "off_ratio": ratios["the call, hooked, off"],
        "sdk_span_over_hooked_call": measure.spread(
            times["SDK span, 4 attributes"] / times["the call, hooked, recording"]
        ),
    }
    out = measure.console()
    out.print(measure.machine_line(machine))
    rows = [[name, measure.figure(measure.spread(times[name])), measure.figure(ratios[name])] for name in times]
    out.print(measure.table("What it costs", ["", "ns (quartiles)", f"x {CLOCKS}"], rows))
    rows = [
        [name, measure.figure(figures[name]), measure.met(figures[name].median, goal)] for name, goal in GOALS.items()
    ]
    span = figures["sdk_span_over_hooked_call"]
    verdict = f"{'met' if span.median >= SPAN_GOAL else 'MISSED'} (goal: at least {SPAN_GOAL:g})"
    rows.append(["sdk_span_over_hooked_call", measure.figure(span), verdict])
    out.print(measure.table("\nGoals", ["", "median (quartiles)", ""], rows))
    said = {True: "none", False: "at least one", None: "not checked here"}[no_call]
    rows = [[name.replace("_", " "), f"{value:,}"] for name, value in (growth | counted).items()]
    rows.append(["system calls (seccomp)", said])
    out.print(measure.table(f"\n{records:,} hooked calls", ["left behind, asked of the kernel", ""], rows))
    if options.json:
        measure.print_json(
            {
                "benchmark": "record_cost",
                "machine": machine,
                "rounds": len(loop),
                "nanoseconds": {name: measure.spread(values).median for name, values in times.items()},
                **{name: one.median for name, one in figures.items()},
                **{f"{name}_iqr": one.json() for name, one in figures.items()},
                "rank_step_slots": rank_slots,
                "records": records,
                **growth,
                **counted,
                "no_system_call": no_call,
            }
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
