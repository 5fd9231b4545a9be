"""Handlers of SGLang releases that no test runs, called as those releases call the functions (by their sources)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from stagetrace.adapters.sglang import scheduler
from stagetrace.adapters.sglang.hooks import HOOK_POINTS
from stagetrace.instrument.hooks import Hook, in_range
from stagetrace.instrument.recorder import Recorder
from stagetrace.instrument.stages import Finish

ABORT = "sglang.srt.managers.scheduler:Scheduler.send_abort_output"
LAUNCH = "sglang.srt.managers.scheduler:Scheduler.launch_batch_sample_if_needed"


class AbortReq:
    pass


def of_release(place: str, release: tuple[int, ...]) -> Hook:
    (point,) = [point for point in HOOK_POINTS if point.place == place and in_range(point, release)]
    return Hook(point, 0, Recorder())


@pytest.mark.parametrize("release", [(0, 5, 15), (0, 5, 22)])
def test_an_abort_outside_a_batch_is_seen_in_what_is_sent(monkeypatch: pytest.MonkeyPatch, release: tuple[int, ...]):
    freed: list[Any] = []
    tracker = SimpleNamespace(free=lambda req, end, stop, finish: freed.append((req, finish)))
    monkeypatch.setattr(scheduler._Here, "tracker", tracker)
    hook = of_release(ABORT, release)
    after: Any = hook.point.handler(hook).after
    request = object()
    after(output=object(), recv_obj=None)  # a batch of tokens
    after(output=AbortReq(), recv_obj=None)
    after(output=AbortReq(), recv_obj=request)
    assert freed == [(request, Finish.ABORT)]
    monkeypatch.setattr(scheduler._Here, "tracker", None)
    after(output=AbortReq(), recv_obj=request)


@pytest.mark.parametrize("delayed", [True, False])
def test_sampling_that_waited_is_of_the_schedulers_batch_before_0_5_16(monkeypatch: pytest.MonkeyPatch, delayed: bool):
    started: list[tuple[int, int, int]] = []
    monkeypatch.setattr(scheduler.RANK, "start", lambda step, tokens, begin: started.append((step, tokens, begin)))
    monkeypatch.setattr(scheduler.extract, "is_step", lambda batch: True)
    mode = SimpleNamespace(is_extend=lambda: False)
    engine = SimpleNamespace(cur_batch=SimpleNamespace(forward_iter=7, forward_mode=mode, reqs=[1, 2, 3]))
    hook = of_release(LAUNCH, (0, 5, 15))
    assert hook.point.parameters == ("self", "batch_result")
    before: Any = hook.point.handler(hook).before
    before(engine, SimpleNamespace(delay_sample_func=print if delayed else None), 100)
    before(engine, None, 100)
    assert started == ([(7, 3, 100)] if delayed else [])
