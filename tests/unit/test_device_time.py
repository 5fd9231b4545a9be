"""Tests of event pairs in the engines' hooks. No GPU: a module of the test's stands in for a torch built for CUDA."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from unit.devices import ASIDE, FakeDevice, LiveDevice
from unit.rings import opened, read_all
from unit.sessions import SessionBuilder

from stagetrace.adapters.device_time import DeviceTime, built, on_device
from stagetrace.adapters.sglang import scheduler as sglang_scheduler
from stagetrace.adapters.sglang import worker as sglang
from stagetrace.adapters.vllm import hooks as vllm_hooks
from stagetrace.adapters.vllm import worker as vllm
from stagetrace.analysis.gap import Part, spent
from stagetrace.analysis.load import load
from stagetrace.analysis.report import summarise
from stagetrace.analysis.speed_of_light import own_times
from stagetrace.exporters.assembly.assemble import Assembler
from stagetrace.instrument.around import Around, wrap
from stagetrace.instrument.device_pairs import FORWARD
from stagetrace.instrument.hooks import ERRORS_UNTIL_OUT, Hook, HookPoint
from stagetrace.instrument.records import LEVEL_OFFSET
from stagetrace.instrument.stages import BY_ID, STEP_COMPOSITION, Level

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stagetrace.exporters.drain import RingReader
    from stagetrace.instrument.recorder import Recorder

MS = 1_000_000
HELD_UP = 1000 * MS  # a device that is busy for so long, so that a slow machine does not see it finish too soon
INSTANCE = 9
V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"


def torch_with(device: FakeDevice) -> Any:
    def event(enable_timing: bool) -> Any:
        assert enable_timing
        return device.event()

    cuda = SimpleNamespace(
        Event=event,
        current_device=lambda: 0,
        Stream=lambda: ASIDE,
        is_current_stream_capturing=device.capturing,
        is_initialized=lambda: True,
        current_stream=lambda: SimpleNamespace(cuda_stream=device.stream()),
    )
    return SimpleNamespace(
        cuda=cuda,
        backends=SimpleNamespace(cuda=SimpleNamespace(is_built=lambda: True)),
        compiler=SimpleNamespace(is_compiling=lambda: False),
        _C=SimpleNamespace(_cuda_getCurrentRawStream=lambda _: device.stream()),
    )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LiveDevice:
    found = LiveDevice()
    monkeypatch.setitem(sys.modules, "torch", torch_with(found))
    return found


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[tuple[Recorder, RingReader]]:
    with opened(tmp_path, role="worker") as (recorder, reader):
        yield recorder, reader
    for module in (vllm, sglang):
        module.RANK.forget()
        module.DEVICE.pairs = module.DEVICE.event = None
    sglang.RANK.instance = 0


def spans(ring: tuple[Recorder, RingReader]) -> list[dict[str, Any]]:
    """The rows of device stages, in the order of their begins; nothing is to be amiss."""
    recorder, reader = ring
    assembler = Assembler(recorder.key)
    assembler.add(read_all(reader))
    rows = assembler.finish()["segments"].to_pylist()
    assert not +assembler.counts
    found = [row | {"stage": BY_ID[row["stage"]].name} for row in rows]
    return sorted(
        (row for row in found if row["stage"].startswith("device_")), key=lambda row: (row["begin_ns"], -row["end_ns"])
    )


def hooked(function: Any, handler: Any, recorder: Recorder, level: Level = Level.STEP) -> Any:
    """The function with a hook, as if the engine had it."""
    point = HookPoint("engine:function", (), level, "worker", handler, "")
    hook = Hook(point, 0, recorder)
    return wrap(function, handler(hook), hook)


class Worker:
    """vLLM's worker with the V1 model runner, as far as the hooks see it; its functions are this object's own."""

    def __init__(self, device: LiveDevice, recorder: Recorder, draft: str = ""):
        def model_forward(input_ids: Any) -> None:
            device.launch(3 * MS)

        def runner_execute_model(scheduler_output: Any) -> None:
            self.model_forward(None)

        def propose() -> None:
            device.launch(MS)

        def bookkeeping_sync(wait: bool) -> None:
            if wait:
                device.wait()

        def execute_model(scheduler_output: Any) -> None:
            runner(scheduler_output)

        def runner_sample_tokens(grammar_output: Any) -> None:
            device.launch(MS)
            if draft == "inside":
                self.propose()
            self.bookkeeping_sync(self.waits)
            if draft == "after":
                self.propose()

        def sample_tokens(grammar_output: Any) -> None:
            sampler(grammar_output)

        def get_output() -> None:
            device.wait()

        self.waits = True
        self.model_forward = hooked(model_forward, vllm.model_forward, recorder)
        runner = hooked(runner_execute_model, vllm.runner_execute_model, recorder)
        self.propose = hooked(propose, vllm.propose_drafts, recorder)
        self.bookkeeping_sync = hooked(bookkeeping_sync, vllm.bookkeeping_sync, recorder)
        sampler = hooked(runner_sample_tokens, vllm.runner_sample_tokens, recorder)
        self.execute_model = hooked(execute_model, vllm.worker_execute_model, recorder)
        self.sample_tokens = hooked(sample_tokens, vllm.worker_sample_tokens, recorder)
        self.get_output = hooked(get_output, vllm.output_fetched, recorder)

    def step(self, number: int) -> None:
        output = SimpleNamespace(total_num_scheduled_tokens=4, **{vllm.STEP_ATTRIBUTE: (INSTANCE, number, False)})
        self.execute_model(output)
        self.sample_tokens(None)


def test_vllm_a_step_that_waits(device: LiveDevice, ring: tuple[Recorder, RingReader]):
    said = vllm.DEVICE.open("cuda", ring[0])
    assert said["device_time"]["by"] == "event pairs"  # type: ignore[index]
    worker = Worker(device, ring[0])
    for number in (1, 2):
        worker.step(number)
    rows = spans(ring)
    assert [(row["stage"], row["step"]) for row in rows] == [
        ("device_forward", 1), ("device_sample", 1), ("device_forward", 2), ("device_sample", 2)
    ]  # fmt: skip
    for row in rows:
        assert row["instance"] == INSTANCE and row["thread"] == 1 and row["parent"] is None
        rank, delay, error = (row[f"a{i}"] for i in range(3))
        assert rank == 0 and delay >= 0 and 0 < error < 50 * MS
        width = 3 * MS if row["stage"] == "device_forward" else MS
        assert width - 2 * error <= row["end_ns"] - row["begin_ns"]


@pytest.mark.parametrize("draft", ["inside", "after"])
def test_vllm_drafts(device: LiveDevice, ring: tuple[Recorder, RingReader], draft: str):
    vllm.DEVICE.open("cuda", ring[0])
    worker = Worker(device, ring[0], draft)
    worker.step(1)
    device.wait()
    worker.step(2)
    device.wait()
    vllm.DEVICE.fetched()
    rows = spans(ring)
    assert [row["stage"] for row in rows] == ["device_forward", "device_sample", "device_draft"] * 2
    parents = {BY_ID[row["parent_stage"]].name for row in rows if row["parent_stage"] is not None}
    assert parents == ({"device_sample"} if draft == "inside" else set())


def test_vllm_steps_that_overlap_are_fetched_on_a_thread_of_their_own(
    device: LiveDevice, ring: tuple[Recorder, RingReader]
):
    vllm.DEVICE.open("cuda", ring[0])
    worker = Worker(device, ring[0])
    worker.waits = False
    device.launch(HELD_UP)
    for number in range(1, 6):
        worker.step(number)
    thread = threading.Thread(target=worker.get_output)
    thread.start()
    thread.join()
    rows = spans(ring)
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert rows[-1]["a1"] > 5 * MS, "it was launched long before it ran"


def test_what_the_hooks_record_is_what_the_report_reads(
    device: LiveDevice, ring: tuple[Recorder, RingReader], tmp_path: Path
):
    """Four steps of a worker, through ring, assembly and session, to the devices' tables and the parts of the gap."""
    recorder, reader = ring
    said = vllm.DEVICE.open("cuda", recorder)
    worker = Worker(device, recorder)
    begun = time.monotonic_ns()
    for number in range(1, 5):
        begin = time.monotonic_ns()
        recorder.step_begin(begin, begin, INSTANCE, number, [1, 0, 4] + [0] * (len(STEP_COMPOSITION) - 3))
        worker.step(number)
        recorder.step_end(time.monotonic_ns(), INSTANCE, number)
        time.sleep(0.002)
    ended = time.monotonic_ns()
    assembler = Assembler(recorder.key)
    assembler.add(read_all(reader))
    tables = assembler.finish()
    builder = SessionBuilder(tmp_path / "read", level="step")
    builder.process(reader.key, "worker", info={"device": "cuda", "instance": INSTANCE, **said})
    session = builder.write()
    for name in ("steps", "segments"):
        session.write_table(name, tables[name], 3)
    summary = summarise(session)
    (found,) = summary.device
    assert found.busy_ns + sum(each.total_ns for each in found.still) == found.observed_ns <= ended - begun
    assert found.busy_ns >= 4 * 4 * MS - 8 * (found.clock_error_most_ns or 0) and found.launch_delay.count == 4
    (line,) = (each for each in summary.stages.timelines if each.name == "device")
    assert {stage.stage: stage.count for stage in line.stages} == {"device_forward": 4, "device_sample": 4}
    frames = load(session)
    steps = frames["steps"]
    assert steps["status"].tolist() == ["complete"] * 4
    begins = (steps["end_ns"] - own_times(steps)).to_numpy()
    parts = spent(steps, begins, frames["segments"], frames.manifest, {})
    assert parts.launch_told
    assert (parts.times[[part.value for part in Part]].sum(axis=1) == parts.times["time"]).all()
    assert 0 < parts.times["kernel"].sum() <= found.busy_ns, "as long as the device was busy in the steps"


def test_vllm_below_the_level_nothing_is_recorded_nor_kept(device: LiveDevice, ring: tuple[Recorder, RingReader]):
    recorder = ring[0]
    vllm.DEVICE.open("cuda", recorder)
    worker = Worker(device, recorder)
    worker.waits = False
    device.launch(HELD_UP)
    worker.step(1)
    assert recorder.ring is not None
    recorder.ring.memory[LEVEL_OFFSET] = Level.REQUEST
    worker.step(2)
    device.wait()
    recorder.ring.memory[LEVEL_OFFSET] = Level.STEP
    worker.waits = True
    worker.step(3)
    assert [row["step"] for row in spans(ring)] == [3, 3]


def test_every_function_of_vllms_table_has_its_part(device: LiveDevice, ring: tuple[Recorder, RingReader]):
    handlers = {point.target: point.handler for point in vllm_hooks.HOOK_POINTS}
    hook = Hook(HookPoint("a:b", (), Level.STEP, "worker", vllm.sample, ""), 0, ring[0])
    for target in (f"{V1}._model_forward", f"{V1}._bookkeeping_sync", f"{V1}.propose_draft_token_ids"):
        assert handlers[target](hook).before is not None
    fetched = [target for target, handler in handlers.items() if handler is vllm.output_fetched]
    assert len(fetched) == 2 and all(handlers[target](hook).after is not None for target in fetched)


@pytest.mark.parametrize("level", [Level.STEP, Level.REQUEST])
def test_sglang_with_overlap(device: LiveDevice, ring: tuple[Recorder, RingReader], level: Level):
    """Three steps are launched before the first result; until then the level may be switched."""
    recorder = ring[0]
    sglang.DEVICE.open("cuda", recorder)
    sglang.RANK.instance = INSTANCE
    target = SimpleNamespace(is_draft_worker=False)
    drafter = SimpleNamespace(is_draft_worker=True)
    forward = hooked(lambda self, forward_batch: device.launch(3 * MS), sglang.forward, recorder)
    sample = hooked(lambda: device.launch(MS), sglang.sample, recorder)

    def run(self: Any, batch: Any) -> None:
        forward(target, None)
        forward(drafter, None)
        sample()

    run_batch = hooked(run, sglang_scheduler.run_batch, recorder, Level.REQUEST)
    result = hooked(lambda batch: device.wait(), sglang_scheduler.process_result, recorder, Level.REQUEST)
    mode = SimpleNamespace(is_extend=lambda: False)
    device.launch(HELD_UP)
    for number in range(3):
        mode.is_idle = mode.is_prebuilt = lambda: False
        batch = SimpleNamespace(forward_mode=mode, reqs=[1, 2])
        run_batch(SimpleNamespace(forward_ct=number), batch)
    assert not spans_written(ring)
    assert recorder.ring is not None
    recorder.ring.memory[LEVEL_OFFSET] = level
    result(batch)
    expected = [(stage, step) for step in (1, 2, 3) for stage in ("device_forward", "device_draft", "device_sample")]
    assert [(row["stage"], row["step"]) for row in spans(ring)] == (expected if level == Level.STEP else [])


def spans_written(ring: tuple[Recorder, RingReader]) -> bool:
    """Whether a device's span is in the ring, which keeps what it has."""
    slots = read_all(ring[1], commit=False).detail
    return any(BY_ID[int(header) >> 32].name.startswith("device_") for header in slots["header"] if int(header) >> 32)


# Where there is no such device, and where it fails


def test_on_a_processor_hooks_are_what_they_are_without(monkeypatch: pytest.MonkeyPatch):
    around = Around(before=lambda begin: None)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert not built() and on_device(around, before=print, after=print, off=print) is around
    torch = torch_with(FakeDevice())
    torch.backends.cuda.is_built = lambda: False
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert not built() and on_device(around, before=print) is around


@pytest.mark.parametrize("kind", ["cpu", "xpu", ""])
def test_a_cuda_build_that_runs_on_something_else(kind: str, device: LiveDevice, ring: tuple[Recorder, RingReader]):
    assert vllm.DEVICE.open(kind, ring[0]) == {}
    worker = Worker(device, ring[0])
    worker.step(1)
    assert device.made == 0 and not spans(ring)


def test_a_device_that_does_not_answer(device: LiveDevice, ring: tuple[Recorder, RingReader]):
    sys.modules["torch"].cuda.current_device = lambda: 1 / 0
    assert vllm.DEVICE.open("cuda", ring[0]) == {}
    Worker(device, ring[0]).step(1)


def test_errors_take_the_pairs_out_and_leave_the_hooks(
    device: LiveDevice, ring: tuple[Recorder, RingReader], caplog: pytest.LogCaptureFixture
):
    recorder, reader = ring
    time_ = DeviceTime(SimpleNamespace(rank=0, instance=INSTANCE, step=1))
    time_.open("cuda", recorder)
    assert time_.pairs is not None
    time_.pairs.begin = lambda stage: 1 / 0  # type: ignore[method-assign,assignment]
    begins = time_.begins(FORWARD)
    for _ in range(2 * ERRORS_UNTIL_OUT):
        begins()
    time_.step_begins(), time_.ends(FORWARD)(), time_.fetched(), time_.forget()
    assert time_.pairs is None and caplog.text.count("error in timing the device") == 1
    assembler = Assembler(recorder.key)
    assembler.add(read_all(reader))
    assembler.finish()
    assert assembler.info[reader.key]["device_time"] == {"by": "nothing", "errors": ERRORS_UNTIL_OUT}


def test_what_is_left_out_is_told(device: LiveDevice, ring: tuple[Recorder, RingReader]):
    recorder, reader = ring
    rank = SimpleNamespace(rank=0, instance=INSTANCE, step=1)
    time_ = DeviceTime(rank)
    time_.open("cuda", recorder)
    device.free[7] = device.now + 3600 * 1000 * MS
    begins, ends = time_.begins(FORWARD), time_.ends(FORWARD)
    for _ in range(300):
        time_.step_begins(), begins(), ends()
    assembler = Assembler(recorder.key)
    assembler.add(read_all(reader))
    assembler.finish()
    told = assembler.info[reader.key]["device_time"]
    assert 30 < told["skipped"] <= time_.pairs.skipped == 300 - 191  # type: ignore[union-attr]
