"""What recording costs a real engine under load: the hooks' own time, CPU time, and what the client notices.

    .venv/bin/python benchmarks/engine_overhead.py [--json] [--quick] [--level layer] [--collector] [--native]
                                                   [--torch-profiler]

A vLLM server of the quickstart's tiny model runs under `stagetrace run` and a steady load; recording is switched on and
off, window by window, in that one run. With --collector there are also windows that record while the collector is
stopped, which tells its share of the processors from what the hooks do to the engine. With --native and
--torch-profiler it measures vLLM's own tracing and torch.profiler as well, in runs of their own.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples" / "quickstart"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import measure
import numpy as np
import servers
from stream import HOST, Load, Seen
from windows import METRICS, STOPPED, WITH, WITHOUT, Difference, Window, cpu_seconds, differences

from stagetrace.exporters.control import set_level
from stagetrace.exporters.session import Session
from stagetrace.instrument.ring import ring_directory
from stagetrace.instrument.stages import BY_NAME, Level

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

ARGUMENTS = ("--enforce-eager", "--max-num-seqs", "32", "--no-enable-prefix-caching")
WIDTH, PROMPT_TOKENS, OUTPUT_TOKENS = 8, 64, 64
WARM_UP_S = 5.0
SETTLE_S = 0.5  # after a switch, before a window begins
CATCH_UP_S = 1.5  # that a collector which was stopped gets before that
GOALS_PCT = {"step": 0.5, "layer": 2.0}  # of a step of GOAL_STEP_MS
GOAL_STEP_MS = 3.0
END_TIMEOUT_S = 90.0
LEVELS = ("off", "request", "step", "layer")
SCHEDULER_CASES = {"request": "decode_request", "step": "decode"}  # of step_cost
RINGS = ("control", "detail")
KEYS = ("steps", "step_ms", "detail_slots_per_step", "timed_slots_per_step", "control_slots_per_step")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    pairs: int
    window_s: float
    other_pairs: int  # of the engine's tracing and of torch.profiler


FULL, QUICK = Plan(24, 3.5, 8), Plan(5, 2.0, 3)


class Failed(Exception):
    """It cannot be measured; the message says why."""


# Servers


@contextmanager
def running(
    directory: Path, wrapper: tuple[str, ...] = (), arguments: tuple[str, ...] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server with its port, ready; ended on leaving. Raises Failed when it does not start."""
    port = servers.free_port()
    log = directory / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*wrapper, *servers.VLLM.command(directory / "model", port, *ARGUMENTS, *arguments)],
            env=servers.VLLM.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C is for this program, which then ends the server
        )
    try:
        servers.wait_until_healthy(port, process.poll)
        yield process, port
    except servers.StartError as error:
        raise Failed(f"{error}; the end of its log:\n{servers.tail(log)}") from error
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a server as Ctrl-C does, harder when it does not end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
        try:
            process.wait(END_TIMEOUT_S)
            return
        except subprocess.TimeoutExpired:
            say(f"process {process.pid} has not ended after {number.name}")


def processes_of(session: Session, wrapper: int) -> dict[str, int]:
    """The processes of a server that records, by role, and its collector: name -> pid."""
    found = {}
    for ring in sorted(ring_directory(session.identity.session).glob("*.ring")):
        role, pid, _ = ring.stem.rsplit("-", 2)
        found[role.replace("_", " ")] = int(pid)
    for child in Path(f"/proc/{wrapper}/task/{wrapper}/children").read_text().split():
        if b"stagetrace.cli.main" in Path(f"/proc/{child}/cmdline").read_bytes():
            found["collector"] = int(child)
    return found


def post(port: int, path: str) -> None:
    """An empty POST; raises Failed when the server refuses it."""
    connection = http.client.HTTPConnection(HOST, port, timeout=300)
    try:
        connection.request("POST", path)
        answer = connection.getresponse()
        if answer.status != 200:
            raise Failed(f"{path}: the server answered {answer.status}")
    finally:
        connection.close()


# Windows


def alternate(
    plan_pairs: int,
    window_s: float,
    switch: Callable[[str], None],
    processes: Mapping[str, int],
    kinds: tuple[str, ...] = (WITH, WITHOUT),
) -> list[Window]:
    """Runs pairs of windows (or threes) under the load that is there, each in an order that is left to chance.

    Every order comes equally often, as far as the number of pairs lets it.
    """
    orders = list(itertools.permutations(kinds))
    orders *= -(-plan_pairs // len(orders))
    random.Random(plan_pairs).shuffle(orders)
    windows = []
    for pair, order in enumerate(orders[:plan_pairs]):
        for kind in order:
            switch(kind)
            time.sleep(SETTLE_S)
            windows.append(watch(pair, kind, window_s, processes))
    return windows


def watch(pair: int, kind: str, window_s: float, processes: Mapping[str, int]) -> Window:
    """One window, from now on."""
    before = {name: cpu_seconds(pid) for name, pid in processes.items()}
    begin = time.monotonic()
    time.sleep(window_s)
    used = {name: cpu_seconds(pid) - before[name] for name, pid in processes.items()}
    return Window(pair, kind, begin, time.monotonic(), used)


def load_on(port: int) -> Load:
    """The load on a server."""
    return Load(port, servers.MODEL_NAME, WIDTH, PROMPT_TOKENS, OUTPUT_TOKENS)


def checked(seen: Seen) -> Seen:
    """What was seen, if nothing failed. Raises Failed."""
    if seen.errors or not seen.tokens:
        raise Failed(f"{len(seen.errors)} requests failed: {seen.errors[:1]}")
    return seen


# What is measured


@dataclass(frozen=True)
class Recorded:
    """What recording did in one run of a server: to the client's metrics and the CPU time of each process."""

    client: dict[str, Difference]
    cpu: dict[str, Difference]
    stopped: dict[str, Difference]  # the client's metrics while the collector was stopped; empty when not asked for
    collector: dict[str, Difference]  # and what the collector adds to them when it runs
    session: Session


def measure_recording(directory: Path, plan: Plan, stop: bool, level: Level) -> Recorded:
    """stagetrace armed against disarmed, in one run of a server; with `stop`, also with its collector stopped."""
    path = directory / "session"
    stagetrace = Path(sys.executable).parent / "stagetrace"
    wrapper = (str(stagetrace), "run", "--no-report", "--level", level.name.lower(), "--session", str(path), "--")
    with running(directory, wrapper) as (process, port):
        session = Session.open(path)
        processes = processes_of(session, process.pid)
        collector = processes["collector"]
        stopped = False

        def let_go() -> None:
            nonlocal stopped
            if stopped:
                os.kill(collector, signal.SIGCONT)
                stopped = False
                time.sleep(CATCH_UP_S)

        def switch(kind: str) -> None:
            nonlocal stopped
            let_go()
            set_level(session, Level.OFF if kind == WITHOUT else level)
            if kind == STOPPED:
                os.kill(collector, signal.SIGSTOP)
                stopped = True

        kinds = (WITH, WITHOUT, STOPPED) if stop else (WITH, WITHOUT)
        try:
            with load_on(port) as load:
                time.sleep(WARM_UP_S)
                windows = alternate(plan.pairs, plan.window_s, switch, processes, kinds)
                let_go()
                set_level(session, level)
        finally:
            let_go()
    seen = checked(load.seen)
    client, cpu = differences(windows, seen)
    if not stop:
        return Recorded(client, cpu, {}, {}, session)
    return Recorded(
        client, cpu, differences(windows, seen, STOPPED)[0], differences(windows, seen, WITH, STOPPED)[0], session
    )


def measure_native(directory: Path, plan: Plan) -> dict[str, Difference]:
    """vLLM's own tracing to a local receiver against a server without: runs in the order without, with, with, without.

    The first two runs are paired, and the last two, so that what drifts with time is in both directions.
    """
    from backends.receiver import GrpcReceiver

    found: dict[tuple[str, int], list[Window]] = {}
    seen = Seen()
    for number, kind in enumerate((WITHOUT, WITH, WITH, WITHOUT)):
        with GrpcReceiver() as receiver:
            arguments = ("--otlp-traces-endpoint", f"grpc://127.0.0.1:{receiver.port}") if kind == WITH else ()
            say(f"{kind} the engine's own tracing, run {number + 1} of 4")
            with running(directory, (), arguments) as (_, port), load_on(port) as load:
                time.sleep(WARM_UP_S)
                first = number // 2 * plan.other_pairs
                found[kind, number // 2] = [
                    watch(first + pair, kind, plan.window_s, {}) for pair in range(plan.other_pairs)
                ]
            checked(load.seen)
            if kind == WITH and not receiver.requests:
                raise Failed("the engine's own tracing sent nothing to its endpoint")
        seen.tokens += load.seen.tokens
        seen.firsts += load.seen.firsts
    return differences([window for windows in found.values() for window in windows], seen)[0]


def measure_torch_profiler(directory: Path, plan: Plan) -> dict[str, Difference]:
    """torch.profiler on against off, in one run of a server that has it; without stacks, which cost the most.

    Its windows are few and short: for each it writes tens of MB when it is switched off, and the server stands still.
    """
    configuration = {
        "profiler": "torch",
        "torch_profiler_dir": str(directory / "profiles"),
        "torch_profiler_with_stack": False,
        "torch_profiler_use_gzip": False,
        "ignore_frontend": True,
    }
    with running(directory, (), ("--profiler-config", json.dumps(configuration))) as (_, port), load_on(port) as load:
        on = False

        def switch(kind: str) -> None:
            nonlocal on
            if on != (kind == WITH):
                post(port, "/start_profile" if kind == WITH else "/stop_profile")
                on = kind == WITH

        time.sleep(WARM_UP_S)
        windows = alternate(min(plan.other_pairs, 5), min(plan.window_s, 2.0), switch, {})
        switch(WITHOUT)
    return differences(windows, checked(load.seen))[0]


def hook_costs() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What record_cost, step_cost and layer_cost find on this machine, now."""
    programs = {
        "record_cost.py": ["--quick"],
        "step_cost.py": ["--cases", *SCHEDULER_CASES.values(), "--batches", str(WIDTH), "--rounds", "20"],
        "layer_cost.py": ["--quick"],
    }
    found = []
    for program, options in programs.items():
        command = [sys.executable, str(Path(__file__).with_name(program)), "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"{program} failed:\n{done.stderr}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found[0], found[1], found[2]


def self_times(session: Session, record: dict[str, Any], step: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """The hooks' own time on a step, in µs by level, from what they cost and how often they were called.

    `session` says how long a step was and how many records it had; the programs say what the calls cost. The layer
    level is that of layer_cost's step, whose calls are those of the model here.
    """
    steps = session.read_table("steps", ["begin_ns", "end_ns", "status"]).to_pandas()
    steps = steps[steps.status == "complete"]
    if not len(steps):
        raise Failed(f"no step was recorded in {session.path}")
    losses = session.read_manifest().losses
    engine = {process.key for process in session.read_manifest().processes if process.role in ("engine_core", "worker")}
    slots = {ring: sum(one.read for one in losses if one.process in engine and one.ring == ring) for ring in RINGS}
    # A collection of garbage is the engine's, not a step's: how many there are depends on how long a step takes.
    segments = session.read_table("segments", ["process", "stage"]).to_pandas()
    pauses = (segments["stage"] == BY_NAME["gc_pause"].id) & segments["process"].isin(engine)
    slots["detail"] -= int(pauses.sum())
    ns = record["nanoseconds"]
    rank, rank_off = (
        ns[f"a rank's step, hooked, {how}"] - ns["a rank's step, not hooked"] for how in ("recording", "off")
    )
    scheduler_off = 2 * (ns["the call, hooked, off"] - ns["the call, not hooked"])  # schedule and update_from_output
    control = slots["control"] / len(steps) * ns["record: a state of a request"]
    scheduler = {level: step["microseconds"][case][str(WIDTH)] for level, case in SCHEDULER_CASES.items()}
    return {
        "steps": len(steps),
        "step_ms": float(np.median(steps.end_ns - steps.begin_ns)) / 1e6,
        "detail_slots_per_step": slots["detail"] / len(steps),
        "timed_slots_per_step": record["rank_step_slots"] + step["slots"]["decode"],
        "control_slots_per_step": slots["control"] / len(steps),
        "off": (rank_off + scheduler_off) / 1e3,
        "request": scheduler["request"] + (rank_off + control) / 1e3,
        "step": scheduler["step"] + (rank + control) / 1e3,
        "layer": scheduler["step"] + (rank + control + layer["nanoseconds"]["a step, recording"]) / 1e3,
    }


# What is shown


def say(text: str) -> None:
    """A line of progress, not among the figures."""
    print(f"engine_overhead: {text}", file=sys.stderr, flush=True)


def rows_of(found: Mapping[str, Difference]) -> list[list[str]]:
    """A row for each of the client's metrics."""
    units = {"tpot": (1e3, "ms"), "ttft": (1e3, "ms"), "throughput": (1.0, "tokens/s")}
    return [
        [text, f"{measure.figure(found[name].without * units[name][0])} {units[name][1]}", str(found[name])]
        for name, text in METRICS.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser)
    parser.add_argument(
        "--collector", action="store_true", help="measure with the collector stopped as well (half as long again)"
    )
    parser.add_argument(
        "--level", choices=("step", "layer"), default="step", help="what is recorded in the windows that record (step)"
    )
    parser.add_argument("--native", action="store_true", help="measure vLLM's own tracing as well (four more runs)")
    parser.add_argument("--torch-profiler", action="store_true", help="measure torch.profiler as well (one more run)")
    options = parser.parse_args()
    if not servers.VLLM.python.is_file():
        parser.error(f"there is no engine in {servers.VLLM.python.parent.parent}: run `make engines-env`")
    try:
        return run(options)
    except Failed as error:
        say(str(error))
        return 1


def run(options: argparse.Namespace) -> int:
    """All that was asked for; returns the exit status."""
    plan = QUICK if options.quick else FULL
    machine = measure.machine()
    others: dict[str, dict[str, Difference]] = {}
    with tempfile.TemporaryDirectory(prefix="stagetrace-benchmark-") as name:
        directory = Path(name)
        build = [str(servers.VLLM.python), str(servers.MODEL_SCRIPT), str(directory / "model")]
        built = subprocess.run(build, env=servers.VLLM.environment(), capture_output=True, text=True, check=False)
        if built.returncode:
            raise Failed(f"the model could not be built:\n{built.stderr}")
        costs = hook_costs()
        say(f"a server under stagetrace, {plan.pairs} pairs of windows of {plan.window_s} s, recording and not")
        recorded = measure_recording(directory, plan, options.collector, Level[options.level.upper()])
        client, cpu = recorded.client, recorded.cpu
        own = self_times(recorded.session, *costs)
        if options.collector:
            others |= {"collector_stopped": recorded.stopped, "collector": recorded.collector}
        if options.native:
            others["native"] = measure_native(directory, plan)
        if options.torch_profiler:
            say("torch.profiler, window by window")
            others["torch_profiler"] = measure_torch_profiler(directory, plan)
    percent = {level: own[level] / own["step_ms"] / 10 for level in LEVELS}
    of_goal = {level: own[level] / GOAL_STEP_MS / 10 for level in LEVELS}
    out = measure.console()
    out.print(measure.machine_line(machine))
    load = f"{WIDTH} requests at once, {PROMPT_TOKENS} prompt and {OUTPUT_TOKENS} output tokens each"
    out.print(f"load: {load}; {own['steps']} steps recorded, {measure.figure(own['step_ms'])} ms each (median)\n")
    rows = [
        [
            level,
            f"{measure.figure(own[level])} µs",
            f"{measure.figure(percent[level])} %",
            f"{measure.figure(of_goal[level])} %",
            measure.met(of_goal[level], GOALS_PCT[level]) if level in GOALS_PCT else "",
        ]
        for level in percent
    ]
    counted, timed = (f"{own[f'{which}_slots_per_step']:.2f}" for which in ("detail", "timed"))
    out.print(f"records of a step, in slots: {counted} in the session, {timed} in the steps that were timed")
    columns = ["level", "on a step", "of the step here", f"of a {GOAL_STEP_MS:g} ms step", ""]
    out.print(measure.table("Hooks' own time in the engine's process", columns, rows))
    rows = [[one, f"{measure.figure(found.without * 1e6)} µs", str(found)] for one, found in cpu.items()]
    columns = ["process", "not recording", "recording (95 % interval)"]
    out.print(measure.table("\nCPU time for each output token", columns, rows))
    columns = ["as the client saw it", "without", "change (95 % interval)"]
    out.print(measure.table(f"\nRecording at level {options.level}", columns, rows_of(client)))
    titles = {
        "collector_stopped": "The same with the collector stopped",
        "collector": "The collector running against stopped, recording in both",
        "native": "vLLM's own tracing (between runs)",
        "torch_profiler": "torch.profiler",
    }
    for which, found in others.items():
        out.print(measure.table(f"\n{titles[which]}", columns, rows_of(found)))
    if options.json:
        measure.print_json(
            {
                "benchmark": "engine_overhead",
                "machine": machine,
                "level": options.level,
                "hook_self_time_pct": percent,
                "hook_self_time_pct_of_3ms": of_goal,
                "hook_self_time_us": {level: own[level] for level in percent},
                **{key: own[key] for key in KEYS},
                "cpu": {one: found.json("cpu") for one, found in cpu.items()},
                **as_keys(client),
                **{which: as_keys(found) for which, found in others.items()},
            }
        )
    return 0


def as_keys(found: Mapping[str, Difference]) -> dict[str, Any]:
    """The client's metrics as keys of the JSON object."""
    return {key: value for name, one in found.items() for key, value in one.json(name).items()}


if __name__ == "__main__":
    sys.exit(main())
