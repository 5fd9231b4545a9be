"""SGLang's requests as its server, its detokenizer and its client have them: against its answers and its metrics."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pandas as pd
import pytest
from engines.recording import Recording, abort_after, ask, complete, metrics, record
from quickstart.load import Request, Result, run_load
from quickstart.servers import SGLANG

from stagetrace.adapters.sglang.hooks import HOOK_POINTS
from stagetrace.analysis.breakdown import hook_troubles
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from engines.server import Server

    from stagetrace.analysis.load import Frames

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=1"}
SHORT = Request(({"role": "user", "content": "one question"},), max_tokens=20)
ABORTED_MAX_TOKENS = 3000
MOMENTS = [
    *("arrival_ns", "dispatched_ns", "queued_ns", "scheduled_ns", "first_token_ns", "first_output_ns"),
    *("last_output_ns", "first_sent_ns", "last_sent_ns"),
]


@dataclass
class Recorded:
    """What the tests of this file look at."""

    recording: Recording
    frames: Frames
    results: list[Result]  # of streamed chats
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)  # of /generate, by request id
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)

    @property
    def requests(self) -> pd.DataFrame:
        return self.frames["requests"].set_index("request_id")


def generate(server: Server, headers: dict[str, str] | None = None, **body: object) -> Any:
    """One answer of SGLang's own endpoint; a list of them where the body has several prompts."""
    response = httpx.post(f"{server.root_url}/generate", json=body, headers=headers, timeout=120)
    response.raise_for_status()
    return response.json()


def greedy(tokens: int) -> dict[str, object]:
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}


@pytest.fixture(scope="module")
def recorded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """One server: a load between two looks at its metrics, then requests of special kinds, then its end."""
    found: dict[str, Any] = {"answers": {}}
    directory = tmp_path_factory.mktemp("sglang")
    with record(model, directory, "--enable-metrics", engine=SGLANG) as recording:
        server = recording.server
        found["before"] = metrics(server)
        found["results"] = asyncio.run(run_load(server.base_url, server.model, requests=28, seed=3))
        for number in range(3):
            rid = f"plain-{number}"
            found["answers"][rid] = generate(server, rid=rid, text="a prompt", sampling_params=greedy(60))
        for answer in generate(
            server, rid="batch", text=["first prompt", "a second, longer prompt"], sampling_params=greedy(9)
        ):
            found["answers"][answer["meta_info"]["id"]] = answer
        found["after"] = metrics(server)
        found["results"] += ask(server, SHORT, headers=TRACEPARENT)
        generate(server, TRACEPARENT, rid="traced", text="a prompt", sampling_params=greedy(3))
        abort_after(server, chunks=5, max_tokens=ABORTED_MAX_TOKENS)
        body = {"max_tokens": 7, "n": 2, "ignore_eos": True, "rid": "several"}
        found["samples"] = complete(server, prompt="several answers", **body)
        refused = httpx.post(
            f"{server.root_url}/generate",
            json={"rid": "refused", "input_ids": [5] * 5000, "sampling_params": greedy(1)},
        )
        assert refused.status_code == 400
        time.sleep(0.5)  # the abort of a client that went away is noticed by and by
    return Recorded(recording, recording.frames(), **found)


def test_requests_and_tokens_are_the_clients(recorded: Recorded) -> None:
    requests = recorded.requests
    for result in recorded.results:
        row = requests.loc[result.id]
        assert (row["status"], row["finish"], row["partial"]) == ("finished", "length", False)
        assert (row["prompt_tokens"], row["output_tokens"]) == (result.prompt_tokens, result.output_tokens)
    for rid, answer in recorded.answers.items():
        row, meta = requests.loc[rid], answer["meta_info"]
        assert (row["status"], row["finish"], row["partial"]) == ("finished", "length", False)
        assert (row["prompt_tokens"], row["output_tokens"]) == (meta["prompt_tokens"], meta["completion_tokens"])
        assert row["cached_tokens"] == meta["cached_tokens"]


def test_every_request_is_there_once(recorded: Recorded) -> None:
    requests = recorded.frames["requests"]
    assert not requests["request_id"].duplicated().any()
    # the server's own warm-up, a traced one, an aborted one, two samples and their cache's warm-up, a refused one
    assert len(requests) == len(recorded.results) + len(recorded.answers) + 1 + 1 + 1 + 3 + 1
    counts = requests["status"].value_counts().to_dict()
    assert counts == {"finished": len(requests) - 2, "aborted": 1, "error": 1}
    assert not requests["request_id"].str.startswith("HEALTH_CHECK").any()


def test_order_of_a_requests_moments(recorded: Recorded) -> None:
    finished = recorded.requests.query("status == 'finished'")
    internal = finished[finished["last_sent_ns"].isna()]
    assert len(internal) == 1
    served = finished.drop(internal.index)
    assert served[MOMENTS].notna().all().all()
    before_output = [*MOMENTS[: MOMENTS.index("first_output_ns") + 1]]
    assert (served[before_output].astype("int64").diff(axis=1).iloc[:, 1:] >= 0).all().all()
    assert (served["first_sent_ns"] >= served["first_output_ns"]).all()
    assert (served["last_sent_ns"] >= served["last_output_ns"]).all()
    assert (served["last_output_ns"] >= served["last_token_ns"]).all()
    assert (served["end_ns"] == served["last_sent_ns"]).all()
    sums = ["tokenize_ns", "dispatch_ns", "queue_ns", "prefill_ns", "decode_ns", "output_ns"]
    assert (finished[sums].sum(axis=1) == finished["end_ns"] - finished["arrival_ns"]).all()


def close(ours_ns: float, theirs_s: float) -> bool:
    """Within 2 % or 100 µs of a request."""
    return abs(ours_ns / 1e9 - theirs_s) <= max(0.02 * theirs_s, 100e-6)


def test_latencies_are_those_of_sglangs_answers(recorded: Recorded) -> None:
    """None of these is streamed: the first token's time is then the scheduler's, in SGLang's answers too."""
    for rid, answer in recorded.answers.items():
        row, meta = recorded.requests.loc[rid], answer["meta_info"]
        assert close(row["last_output_ns"] - row["arrival_ns"], meta["e2e_latency"])
        assert close(row["first_token_ns"] - row["arrival_ns"], meta["first_token_latency"])
        assert close(row["queue_ns"], meta["queue_time"])


def test_the_size_of_the_kv_cache_is_sglangs(recorded: Recorded) -> None:
    sizes = [
        each.info["kv_cache_tokens"]
        for each in recorded.recording.session.read_manifest().processes
        if each.info.get("kv_cache_tokens")
    ]
    assert sizes == [recorded.after["sglang:max_total_num_tokens"]]


def test_sums_are_those_of_sglangs_metrics(recorded: Recorded) -> None:
    change = {name: value - recorded.before.get(name, 0.0) for name, value in recorded.after.items()}
    names = [result.id for result in recorded.results[:-1]] + [*recorded.answers]
    requests = recorded.requests.loc[names]
    streamed = requests.loc[[result.id for result in recorded.results[:-1]]]
    plain = requests.loc[[*recorded.answers]]
    assert change["sglang:num_requests_total"] == len(requests)
    assert change["sglang:prompt_tokens_total"] == requests["prompt_tokens"].sum()
    assert change["sglang:generation_tokens_total"] == requests["output_tokens"].sum()
    e2e = (requests["last_output_ns"] - requests["arrival_ns"]).sum()
    assert close(e2e, change["sglang:e2e_request_latency_seconds_sum"])
    first = (streamed["first_output_ns"] - streamed["arrival_ns"]).sum()
    first += (plain["first_token_ns"] - plain["arrival_ns"]).sum()
    assert close(first, change["sglang:time_to_first_token_seconds_sum"])


def test_times_are_within_what_the_client_saw(recorded: Recorded) -> None:
    for result in recorded.results:
        row = recorded.requests.loc[result.id]
        assert result.first_token_s is not None
        first = (row["first_sent_ns"] - row["arrival_ns"]) / 1e9
        last = (row["last_sent_ns"] - row["arrival_ns"]) / 1e9
        assert 0 < first <= result.first_token_s
        assert first <= last <= result.duration_s


def test_the_callers_trace_goes_on(recorded: Recorded) -> None:
    for rid in (recorded.results[-1].id, "traced"):
        row = recorded.requests.loc[rid]
        assert (row["trace_id"], row["parent_span_id"], row["trace_state"]) == (TRACE_ID, PARENT_ID, "vendor=1")
    assert pd.isna(recorded.requests.loc["plain-0", "parent_span_id"])


def test_a_client_that_goes_away(recorded: Recorded) -> None:
    (row,) = recorded.requests.query("status == 'aborted'").to_dict("records")
    assert row["finish"] == "abort"
    assert row["max_tokens"] == ABORTED_MAX_TOKENS
    assert 5 <= row["output_tokens"] < ABORTED_MAX_TOKENS
    assert row["first_sent_ns"] < row["end_ns"]


def test_a_refused_request_was_never_sent_to_the_scheduler(recorded: Recorded) -> None:
    row = recorded.requests.loc["refused"]
    assert (row["status"], row["finish"]) == ("error", "error")
    assert row[["dispatched_ns", "queued_ns", "first_output_ns"]].isna().all()
    assert row["end_ns"] == row["last_sent_ns"]


def test_samples_belong_to_the_clients_request(recorded: Recorded) -> None:
    """SGLang fills the cache with the prompt first, by a request of its own without output."""
    rows = recorded.requests[recorded.requests["external_id"] == "several_0"]
    usage = recorded.samples["usage"]
    assert sorted(rows["output_tokens"]) == [0, 7, 7]
    assert rows["output_tokens"].sum() == usage["completion_tokens"]
    assert recorded.samples["id"] in rows.index
    samples = rows[rows["parent"].notna()]
    assert samples["parent"].nunique() == 1
    assert sorted(samples["child"]) == [0, 1]
    assert set(samples["children"]) == {2}


def test_every_hook_of_the_front_end_is_installed(recorded: Recorded) -> None:
    processes = recorded.recording.manifest.processes
    assert hook_troubles(processes) == []
    assert not any(process.errors for process in processes)
    roles = {role: process for process in processes for role in process.role.split("+")}
    assert {"front_end", "detokenizer"} <= {*roles}
    front = {point.target for point in HOOK_POINTS if point.process == "front end" and "httptools" not in point.target}
    installed = {hook["name"] for hook in roles["front_end"].hooks if hook["status"] == "installed"}
    assert front <= installed


def test_segments_of_the_processes_around_the_scheduler(recorded: Recorded) -> None:
    roles = {process.key: process.role for process in recorded.recording.manifest.processes}
    segments = recorded.frames["segments"]
    found = {
        (roles[key], stage): len(part)
        for (key, stage), part in segments.groupby(["process", "stage"])
        if stage in WANTED
    }
    assert set(found) == {
        ("front_end", BY_NAME["tokenize"].id),
        ("front_end", BY_NAME["dispatch"].id),
        ("front_end", BY_NAME["detokenize"].id),  # waking the streams
        ("detokenizer", BY_NAME["detokenize"].id),
    }
    sent = recorded.requests["dispatched_ns"].notna().sum()
    assert found["front_end", BY_NAME["dispatch"].id] >= sent
    batches = segments[segments["stage"] == BY_NAME["detokenize"].id]
    streamed = sum(result.output_tokens for result in recorded.results)
    for role, part in batches.groupby(batches["process"].map(roles)):
        assert part["a0"].sum() >= streamed, role


WANTED = {BY_NAME[name].id for name in ("tokenize", "dispatch", "detokenize")}
