"""Run by the engine's Python: the extractors on vLLM's own classes, against a plain loop; prints what differs."""

import json
import random
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from step_cost import CASES, Load, Unhooked

from stagetrace.adapters.vllm import extract
from stagetrace.adapters.vllm.scheduler import SNAPSHOT_EVERY, Tracker
from stagetrace.instrument.recorder import Recorder
from stagetrace.instrument.stages import STEP_COMPOSITION, Finish, Level


def batch(chance: random.Random) -> tuple[SchedulerOutput, list[tuple[int, int, int]], dict[str, int]]:
    """A random batch, its prefill chunks, and the composition that a plain loop finds."""
    expected = dict.fromkeys((attribute.name for attribute in STEP_COMPOSITION), 0)
    cached = CachedRequestData.make_empty()
    output = SchedulerOutput.make_empty()
    chunks = []
    everybody, width = chance.random() < 0.5, chance.choice((0, 3))
    for number in range(chance.randint(1, 40)):
        name = f"request-{number}"
        before = chance.randint(0, 500)
        new = chance.random() < 0.2
        in_prefill = new or chance.random() < 0.2
        q = chance.randint(1, 300) if in_prefill else 1
        # Drafts: of everybody in decode or of some, equally many or not; and of a request that is resumed.
        if not new and chance.random() < (0.2 if in_prefill else 1.0 if everybody else 0.3):
            drafts = [0] * (width or chance.randint(1, 5))
            output.scheduled_spec_decode_tokens[name] = drafts
            q += len(drafts)
            expected["draft_tokens"] += len(drafts)
        kv = before + q
        output.num_scheduled_tokens[name] = q
        output.total_num_scheduled_tokens += q
        if new:
            output.scheduled_new_reqs.append(
                NewRequestData(name, [0] * kv, [], None, None, ([],), before, lora_request=None)
            )
        else:
            cached.req_ids.append(name)
            cached.num_computed_tokens.append(before)
            cached.num_output_tokens.append(0 if in_prefill else 3)
        if in_prefill:
            chunks.append((q, kv, before if new else 0))
            expected["cached_tokens"] += before if new else 0
        phase = "prefill" if in_prefill else "decode"
        expected[f"{phase}_requests"] += 1
        expected[f"{phase}_tokens"] += q
        expected[f"{phase}_context"] += kv
        expected[f"{phase}_q_q"] += q * q
        expected[f"{phase}_q_kv"] += q * kv
    output.scheduled_cached_reqs = cached
    expected |= {"waiting": 3, "running": 4, "kv_usage": 250_000, "preempted": 1}
    return output, chunks, expected


def tracked(case: str) -> list[Any]:
    """Steps one after another, whose sums a tracker carries on where it can: against those taken from each step alone.

    At times the engine takes tokens of a request back, which it then computes again.
    """
    recorder = Recorder()
    recorder.level = bytes([Level.STEP])
    tracker, engine, load = Tracker(recorder), Unhooked(), Load(case, 9)
    differences, carried = [], 0
    plainly = extract.composition

    def both(*given: Any) -> tuple[int, ...]:
        nonlocal carried
        carried += given[6] >= 0
        found, expected = plainly(*given), plainly(*given[:6])
        if found != expected:
            differences.append([case, found, expected])
        return found

    with patch.object(extract, "composition", both):
        for number in range(3 * SNAPSHOT_EVERY):
            output, engine.running = load.next()
            if number % 50 == 49:
                _take_back(output, load)
            engine.requests = {request.request_id: request for request in engine.running}
            tracker.scheduled(engine, output, 1, 2)
            ran = load.ran(output)
            tracker.updating(output, ran)
            if tracker.accepted != len(output.scheduled_spec_decode_tokens):  # one of each request's
                differences.append([case, "accepted", tracker.accepted])
            tracker.updated(engine, output, ran, 3, 4)
    if (carried > 2 * SNAPSHOT_EVERY) != case.startswith("decode"):
        differences.append([case, "steps whose sum was carried on", carried])
    return differences


def _take_back(output: SchedulerOutput, load: Load) -> None:
    """The first request has lost three tokens, which are computed again in this step."""
    output.scheduled_cached_reqs.num_computed_tokens[0] -= 3
    output.num_scheduled_tokens[load.requests[0].request_id] += 3
    output.total_num_scheduled_tokens += 3


def main() -> None:
    chance = random.Random(1)
    differences: list[Any] = []
    for _ in range(500):
        output, chunks, expected = batch(chance)
        found = extract.composition(output, chunks, waiting=3, running=4, kv_usage=0.25, preempted=1)
        named = dict(zip(expected, found, strict=True))
        if named != expected:
            differences.append([named, expected])
    for case in CASES:
        differences += tracked(case)
    reasons = {reason.name: extract.finish_of_reason(reason).name for reason in FinishReason}
    differences += [[name, found] for name, found in reasons.items() if name != found]
    ended = [status for status in RequestStatus if RequestStatus.is_finished(status)]
    differences += [[str(status), "?"] for status in ended if extract.finish_of_status(status) is Finish.UNKNOWN]
    json.dump(differences[:3], sys.stdout)


if __name__ == "__main__":
    main()
