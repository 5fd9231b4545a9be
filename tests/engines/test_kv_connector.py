"""KV that comes from elsewhere: vLLM's ExampleConnector on a real server, loading in a step and beside the steps.

There is no local prefix cache, so that all that is found is in the store. Requests that cannot be taken in at once are
recorded as well: the connector does not know yet, the engine is paused, another LoRA adapter is in use.
"""

from __future__ import annotations

import json
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pandas as pd
import pytest
from engines.recording import Recording, complete, metrics, record
from engines.server import environment

from stagetrace.instrument.stages import BY_ID, BY_NAME

if TYPE_CHECKING:
    from engines.server import Server

BLOCK, LAYERS = 32, 4
ADAPTERS = ("one", "two")
MAKE_ADAPTERS = Path(__file__).with_name("lora.py")
PROMPTS = {name: f"{name} " * 150 for name in ("apple", "berry", "cherry")}
ARGUMENTS = (
    *("--enforce-eager", "--max-model-len", "1024", "--block-size", str(BLOCK), "--no-enable-prefix-caching"),
    *("--enable-prompt-tokens-details", "--enable-lora", "--max-loras", "1", "--max-lora-rank", "8"),
)


@dataclass
class Recorded:
    """What the tests of this file look at."""

    recording: Recording
    before: dict[str, float]
    after: dict[str, float]
    answers: dict[str, dict[str, Any]]
    refused: list[int]
    failed: int  # the HTTP status of a request that the engine ended

    @property
    def requests(self) -> pd.DataFrame:
        return self.recording.frames()["requests"].set_index("external_id")

    def row(self, name: str) -> dict[str, Any]:
        """The row of a request by its name here."""
        found: dict[str, Any] = self.requests.loc[f"{self.answers[name]['id']}-0"].to_dict()
        return found

    def stages(self, name: str) -> list[str]:
        """The states of a request, in order."""
        states = self.recording.frames()["states"]
        mine = states[states["handle"] == self.row(name)["handle"]].sort_values(["begin_ns", "stage"])
        named = [BY_ID[stage].name for stage in mine["stage"]]
        return [name for name in named if name != "prefill_chunk"]


@pytest.fixture(scope="module")
def recorded(dense_model, engine_python, tmp_path_factory) -> Recorded:  # type: ignore[no-untyped-def]
    directory = tmp_path_factory.mktemp("connector")
    adapters = {name: directory / name for name in ADAPTERS}
    subprocess.run(
        [engine_python, MAKE_ADAPTERS, dense_model, *adapters.values()],
        env=environment(),
        check=True,
        capture_output=True,
    )
    connector = {
        "kv_connector": "StoreConnector",
        "kv_connector_module_path": "kv_store",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(directory / "store")},
    }
    arguments = (*ARGUMENTS, "--kv-transfer-config", json.dumps(connector), "--lora-modules")
    arguments += tuple(f"{name}={path}" for name, path in adapters.items())
    env = {"PYTHONPATH": str(Path(__file__).parent), "VLLM_SERVER_DEV_MODE": "1"}
    answers: dict[str, dict[str, Any]] = {}
    with record(dense_model, directory, *arguments, env=env, run=("--level", "layer", "--no-report")) as recording:
        server = recording.server
        before = metrics(server)

        def ask(name: str, fruit: str, **params: object) -> None:
            body = {"prompt": PROMPTS[fruit], "max_tokens": 6, "ignore_eos": True, "temperature": 0}
            answers[name] = complete(server, **body, **({"kv_transfer_params": params} if params else {}))

        for fruit in PROMPTS:
            ask(f"{fruit} stored", fruit)
        ask("in the step", "apple")
        ask("beside", "berry", beside=True)
        ask("undecided", "cherry", undecided=3)
        after = metrics(server)
        lost = {"prompt": PROMPTS["berry"], "kv_transfer_params": {"lost": True}}
        failed = _status(server, **lost)
        refused = [_status(server, **body) for body in ({"model": "unknown"}, {"prompt": "word " * 5000})]
        _told(server, "pause")
        waiting = threading.Thread(target=ask, args=("paused", "apple"))
        waiting.start()
        waiting.join(1.0)  # it waits
        assert waiting.is_alive()
        _told(server, "resume")
        waiting.join()
        _told(server, "collective_rpc", json={"method": "reload_weights"})
        _told(server, "sleep")
        _told(server, "wake_up")
        ask("awake", "apple")

        def adapted(name: str) -> None:
            body = {"model": name, "prompt": f"by adapter {name}", "max_tokens": 150, "ignore_eos": True}
            answers[name] = complete(server, **body)

        threads = [threading.Thread(target=adapted, args=(name,)) for name in ADAPTERS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return Recorded(recording, before, after, answers, refused, failed)


def _status(server: Server, **body: object) -> int:
    wanted = {"model": server.model, "prompt": "too much", "max_tokens": 4, **body}
    return httpx.post(f"{server.base_url}/completions", json=wanted, timeout=60).status_code


def _told(server: Server, what: str, **named: Any) -> None:
    httpx.post(f"{server.root_url}/{what}", timeout=60, **named).raise_for_status()


def test_nothing_failed(recorded: Recorded) -> None:
    manifest = recorded.recording.manifest
    assert manifest.counts["accounting_conflict"] == 0
    assert not any(process.errors for process in manifest.processes)
    assert sum(losses.lost for losses in manifest.losses) == 0
    assert set(recorded.requests["status"].dropna()) == {"finished", "error"}
    first, second = (recorded.answers[name]["choices"][0]["text"] for name in ("apple stored", "in the step"))
    assert first == second
    assert [recorded.answers[name]["choices"][0]["text"] for name in ("berry stored", "cherry stored")] == [
        recorded.answers[name]["choices"][0]["text"] for name in ("beside", "undecided")
    ]


def test_states_of_a_request_whose_kv_is_fetched(recorded: Recorded) -> None:
    front, rest = ["request_tokenize", "request_dispatch", "queue"], ["prefill", "decode", "output"]
    assert recorded.stages("beside") == [*front, "kv_transfer", "queue", *rest]
    for name in ("apple stored", "in the step", "undecided"):
        assert recorded.stages(name) == [*front, *rest]
    row = recorded.row("beside")
    assert row["kv_transfer_ns"] > 0
    assert recorded.requests["kv_transfer_ns"].notna().sum() == 1
    states = recorded.recording.frames()["states"]
    (transfer,) = states[states["stage"] == BY_NAME["kv_transfer"].id].to_dict("records")
    assert transfer["a0"] == row["external_tokens"]
    assert row["prompt_tokens"] - BLOCK <= row["external_tokens"] <= row["prompt_tokens"]


def test_cached_tokens_of_both_kinds(recorded: Recorded) -> None:
    for name, answer in recorded.answers.items():
        row, usage = recorded.row(name), answer["usage"]
        assert (row["prompt_tokens"], row["output_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        assert row["cached_tokens"] == row["external_tokens"] == cached, name
        assert (cached > 0) == (name in ("in the step", "beside", "undecided", "paused", "awake"))
    asked = ("in the step", "beside", "undecided")
    counted = recorded.after["vllm:external_prefix_cache_hits_total"]
    counted -= recorded.before.get("vllm:external_prefix_cache_hits_total", 0.0)
    assert counted == sum(recorded.row(name)["external_tokens"] for name in asked)


def test_the_queue_is_told_by_cause(recorded: Recorded) -> None:
    causes = {"undecided": "remote_kv_ns", "paused": "paused_ns"}
    for name in recorded.answers:
        row = recorded.row(name)
        for column in causes.values():
            assert pd.notna(row[column]) == (causes.get(name) == column), (name, column)
            assert pd.isna(row[column]) or 0 < row[column] <= row["queue_ns"]


def test_one_adapter_at_a_time(recorded: Recorded) -> None:
    rows = [recorded.row(name) for name in ADAPTERS]
    assert [row["lora"] for row in rows] == [*ADAPTERS]
    assert recorded.requests["lora"].notna().sum() == recorded.requests["lora_limit_ns"].notna().sum() + 1 == 2
    first, second = sorted(rows, key=lambda row: row["scheduled_ns"])
    assert pd.isna(first["lora_limit_ns"])
    assert 0 < second["lora_limit_ns"] <= second["queue_ns"]
    assert first["last_token_ns"] <= second["scheduled_ns"]


def test_what_the_worker_did_for_it(recorded: Recorded) -> None:
    frames = recorded.recording.frames()
    segments, steps = frames["segments"], frames["steps"]
    for stage, outer in (("kv_load", "prepare"), ("kv_store", "forward")):
        rows = segments[segments["stage"] == BY_NAME[stage].id]
        named = {BY_ID[int(parent)].name for parent in rows["parent_stage"].dropna()}
        assert named and named <= {*BY_NAME[stage].inside}, named
        assert outer in named
        assert set(steps["step"]) <= set(rows["step"].dropna()), "a connector is called in every step"
        # One call a step, and one a layer.
        assert (rows.groupby("step").size() == 1 + LAYERS).all()
    # While the KV came there was nothing to compute: the connector was called without a step.
    alone = segments[(segments["stage"] == BY_NAME["kv_load"].id) & segments["step"].isna()]
    assert len(alone) > 0


def test_refused_requests_are_errors(recorded: Recorded) -> None:
    rows = recorded.recording.frames()["requests"].query("status == 'error' and refused.notna()")
    assert recorded.refused == [404, 400]
    assert rows["refused"].tolist() == recorded.refused
    assert rows["external_id"].isna().all()
    assert (rows["last_sent_ns"] > rows["arrival_ns"]).all()


def test_a_request_that_the_engine_ends_with_an_error(recorded: Recorded) -> None:
    """Its KV could not be loaded: it never had a token, though the step that should have given one went by."""
    log = recorded.recording.server.log.read_text("utf-8", "replace")
    assert recorded.failed == 500
    assert log.count("request(s) due to KV load failure") == 1
    (row,) = recorded.requests.query("status == 'error' and refused.isna()").to_dict("records")
    assert (row["finish"], row["output_tokens"], row["partial"]) == ("error", 0, False)
    assert pd.isna(row["first_token_ns"]) and pd.isna(row["decode_ns"])
    assert 0 < row["external_tokens"] == row["cached_tokens"] <= row["prompt_tokens"]
    times = [row[name] for name in ("arrival_ns", "dispatched_ns", "queued_ns", "scheduled_ns", "end_ns")]
    assert times == sorted(times)


def test_sleep_and_new_weights(recorded: Recorded) -> None:
    segments = recorded.recording.frames()["segments"]
    for stage in ("sleep", "weight_update"):
        rows = segments[segments["stage"] == BY_NAME[stage].id]
        assert len(rows) == 1
        assert rows["step"].isna().all()
