"""The scrape endpoint against a real Prometheus, and every query of the Grafana dashboard on what it scraped."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import requests
from backends.tables import MS, Builder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from unit.commands import commands_in, said, wait_for

from stagetrace.exporters.otel_settings import scrape_address
from stagetrace.exporters.prometheus import serve
from stagetrace.exporters.session import Losses, Manifest, Process, Session
from stagetrace.exporters.spans import Clock
from stagetrace.exporters.stage_metrics import MOST_VALUES, StageMetrics
from stagetrace.instrument.identity import claim_identity
from stagetrace.instrument.ids import request_span_id
from stagetrace.instrument.stages import BY_ID, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "stagetrace.json"
GROUP = 77


def commit(number: int) -> dict[str, pa.Table]:
    """Ten steps of every kind, with collectives, experts and a request each."""
    build = Builder()
    for step in range(number * 10, number * 10 + 10):
        begin = step * 10 * MS
        kind = {"prefill_tokens": 30} if step % 3 == 0 else {"decode_tokens": 4}
        of = (7, step, "prefill" if step % 3 == 0 else "decode")
        build.step(7, step, begin, begin + 8 * MS, process=1, unattributed_ns=MS // 10, kv_usage=250_000, waiting=3,
                   running=4, **kind)  # fmt: skip
        build.segment("schedule", 1, begin, begin + MS, of=of)
        build.segment("execute", 1, begin + MS, begin + 7 * MS, of=of)
        build.segment("forward", 2, begin + 2 * MS, begin + 6 * MS, of=of, tokens=4)
        build.segment(
            "collective", 2, begin + 3 * MS, begin + 5 * MS, of=of, op=1, group=GROUP, bytes=1000, sequence=step
        )
        build.add("experts", process=2, instance=7, step=step, layer=0, tokens=4, counts=[3, 1, 0, 0])
        build.request(
            f"r{step}", arrival_ns=begin, first_output_ns=begin + 20 * MS, first_token_ns=begin + 19 * MS,
            last_token_ns=begin + 49 * MS, last_output_ns=begin + 50 * MS, end_ns=begin + 51 * MS, output_tokens=4,
            prompt_tokens=30, queue_ns=5 * MS, decode_ns=30 * MS, instance=7,
        )  # fmt: skip
    return build.tables()


def light(tables: Any, _: Manifest) -> Any:
    """What the analysis adds of a model and a device that are known."""
    steps = tables["steps"]
    columns = {"own_ns": 8e6, "mfu": 0.4, "mbu": 0.3, "light_share": 0.5, "gap_host_ns": 1e6, "operations": 1e9}
    for name, value in columns.items():
        steps = steps.append_column(name, pa.array(np.full(steps.num_rows, value)))
    return {**tables, "steps": steps}


class Growing:
    """A session that gets a commit whenever it is told to."""

    def __init__(self, path: Path):
        self.session = Session(path, claim_identity(path))
        self.manifest = Manifest(session=self.session.identity.session, anchors=[(0, time.time_ns())], started_ns=1)
        self.manifest.processes = [
            Process(2, "w", "worker", 2, "h", 0, info={"names": {str(GROUP): "tp:0 (ranks 0-1)"}})
        ]
        self.manifest.losses = [Losses(2, "detail", read=100)]

    def grow(self) -> None:
        self.manifest.derived += 1
        for name, table in commit(self.manifest.derived).items():
            self.session.write_table(name, table, self.manifest.derived)
        self.session.write_manifest(self.manifest)


@pytest.fixture
def growing(tmp_path: Path) -> Growing:
    made = Growing(tmp_path / "session")
    made.grow()
    return made


@contextmanager
def served(session: Session, enrich: Any = None) -> Iterator[int]:
    """The port of a session's endpoint."""
    over, ports = threading.Event(), []
    ready = threading.Event()

    def told(port: int) -> None:
        ports.append(port)
        ready.set()

    thread = threading.Thread(target=serve, args=(session, ("127.0.0.1", 0), over.is_set, enrich, told))
    thread.start()
    try:
        assert ready.wait(20)
        yield ports[0]
    finally:
        over.set()
        thread.join()


@pytest.fixture
def port(growing: Growing) -> Iterator[int]:
    """The endpoint of the session while it grows."""
    with served(growing.session, light) as port:
        yield port


def test_both_formats_can_be_read_and_exemplars_lead_to_traces(growing: Growing, port: int) -> None:
    url = f"http://127.0.0.1:{port}/metrics"
    plain = {family.name: family for family in parse_text(requests.get(url, timeout=5).text)}
    assert {sample.labels["status"]: sample.value for sample in plain["stagetrace_requests"].samples} == {
        "finished": 10
    }
    answer = requests.get(url, headers={"Accept": "application/openmetrics-text; version=1.0.0"}, timeout=5)
    families = {family.name: family for family in parse_openmetrics(answer.text)}
    first = families["gen_ai_server_time_to_first_token_seconds"]
    exemplars = [sample.exemplar for sample in first.samples if sample.exemplar]
    assert [each.value for each in exemplars] == [0.02]
    traces = {
        row["trace_id"]: request_span_id(growing.session.identity.key, row["handle"]).hex()
        for row in growing.session.read_table("requests").to_pylist()
    }
    assert traces[exemplars[0].labels["trace_id"]] == exemplars[0].labels["span_id"]
    for family in families.values():
        for sample in family.samples:
            assert set(sample.labels) <= {"le", "status", "finish", "kind", "phase", "stage", "timeline", "state", "op",
                                          "group", "layer", "process", "fate", "ring", "reason", "hook", "roof",
                                          "part"}  # fmt: skip


def test_labels_are_bounded() -> None:
    metrics = StageMetrics(b"key", 0)
    build = Builder()
    for layer in range(MOST_VALUES + 50):
        build.add("experts", process=2, instance=7, step=1, layer=layer, tokens=1, counts=[1, 0])
    metrics.add(build.tables(), {}, Clock([(0, 0)]))
    (tokens,) = [metric for metric in metrics.metrics(5) if metric.name == "stagetrace.expert.tokens"]
    points = {point.attributes["stagetrace.layer"]: point.value for point in tokens.data.data_points}
    assert len(points) == MOST_VALUES + 1 and points["other"] == 50


def test_a_collector_serves_its_session_when_the_variables_ask_for_it(tmp_path: Path) -> None:
    with commands_in(tmp_path) as commands, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        commands.environment |= {"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": str(port)}
        until = tmp_path / "until"
        collector = commands.collect(tmp_path / "session")
        recording = commands.recording("--requests", "3", "--until", until, session=tmp_path / "session")
        assert said(recording) == "recorded 3 requests"

        def finished() -> bool:
            try:
                text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
            except requests.ConnectionError:
                return False
            return re.search(r'^stagetrace_requests_total\{.*status="finished"\} 3.0$', text, re.MULTILINE) is not None

        wait_for(finished, 60)
        until.touch()
        recording.communicate(timeout=30)
        collector.terminate()
        assert collector.wait(30) == 0
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5)


def test_address_is_loopback_unless_asked() -> None:
    assert scrape_address({}) is None and scrape_address({"OTEL_METRICS_EXPORTER": "otlp"}) is None
    asked = {"OTEL_METRICS_EXPORTER": "otlp,prometheus"}
    assert scrape_address(asked) == ("127.0.0.1", 9464)
    more = {"OTEL_EXPORTER_PROMETHEUS_HOST": "0.0.0.0", "OTEL_EXPORTER_PROMETHEUS_PORT": "1"}
    assert scrape_address(asked | more) == ("0.0.0.0", 1)
    with pytest.raises(ValueError, match="no port"):
        scrape_address(asked | {"OTEL_EXPORTER_PROMETHEUS_PORT": "http"})


@pytest.fixture
def prometheus(port: int, tmp_path: Path) -> Iterator[str]:
    """A Prometheus that scrapes the endpoint."""
    with scraping(tmp_path, stagetrace=port) as url:
        yield url


@contextmanager
def scraping(tmp_path: Path, **ports: int) -> Iterator[str]:
    """A Prometheus that scrapes these jobs."""
    program = shutil.which("prometheus")
    assert program, "these tests need Prometheus: apt-get install prometheus (make backends does it for root)"
    config = tmp_path / "prometheus.yml"
    config.write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "250ms", "scrape_timeout": "250ms"},
                "scrape_configs": [
                    {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
                    for name, port in ports.items()
                ],
            }
        )
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = free.getsockname()[1]
    arguments = [
        f"--config.file={config}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        "--enable-feature=exemplar-storage",
    ]
    with open(tmp_path / "prometheus.log", "wb") as log:
        process = subprocess.Popen([program, *arguments, f"--web.listen-address=127.0.0.1:{own}"], stderr=log)
    url = f"http://127.0.0.1:{own}"

    def is_ready() -> bool:
        assert process.poll() is None, (tmp_path / "prometheus.log").read_text()
        try:
            return requests.get(f"{url}/-/ready", timeout=1).ok
        except requests.ConnectionError:
            return False

    try:
        wait_for(is_ready)
        yield url
    finally:
        process.terminate()
        process.wait()


def asked(url: str, query: str) -> list[Any]:
    answer = requests.get(f"{url}/api/v1/query", params={"query": query}, timeout=10).json()
    assert answer["status"] == "success", (query, answer)
    return list(answer["data"]["result"])


def test_a_prometheus_has_the_figures_of_real_engines_sessions(recordings: dict[str, Session], tmp_path: Path) -> None:
    with ExitStack() as stack:
        ports = {engine: stack.enter_context(served(session)) for engine, session in recordings.items()}
        url = stack.enter_context(scraping(tmp_path, **ports))
        for engine, session in recordings.items():
            tables = {name: session.read_table(name).to_pandas() for name in ("requests", "steps", "segments")}
            whole = f"sum(stagetrace_requests_total{{job='{engine}'}}) == {len(tables['requests'])}"
            wait_for(lambda whole=whole: asked(url, whole))
            series = [
                (each["metric"], float(each["value"][1])) for each in asked(url, f'{{job="{engine}",__name__=~".+"}}')
            ]

            def value(name: str, series: list[Any] = series, **labels: str) -> float:
                wanted = {"__name__": name, **labels}.items()
                return float(sum(number for metric, number in series if wanted <= metric.items()))

            for status, count in tables["requests"]["status"].value_counts().items():
                assert value("stagetrace_requests_total", status=status) == count
            complete = tables["steps"][tables["steps"]["status"] == "complete"]
            for phase, took in (complete["end_ns"] - complete["begin_ns"]).groupby(complete["phase"]):
                assert value("stagetrace_step_duration_seconds_count", phase=phase) == len(took)
                assert value("stagetrace_step_duration_seconds_sum", phase=phase) == pytest.approx(took.sum() / 1e9)
                below = value("stagetrace_step_duration_seconds_bucket", phase=phase, le="0.005")
                assert below == (took <= 5_000_000).sum()
            stages = tables["segments"].groupby("stage")["self_ns"].agg(["sum", "count"])
            assert len(stages) > 10
            for number, row in stages.iterrows():
                stage = BY_ID[number]
                assert value("stagetrace_stage_calls_total", stage=stage.name) == row["count"]
                own = 0 if stage.kind is Kind.ENVELOPE else row["sum"] / 1e9  # envelopes hold the others
                assert value("stagetrace_stage_self_time_seconds_total", stage=stage.name) == pytest.approx(own)
            experts = session.read_table("experts").to_pandas()
            for layer, tokens in experts["counts"].map(sum).groupby(experts["layer"]).sum().items():
                assert value("stagetrace_expert_tokens_total", layer=str(layer)) == tokens


def test_every_query_of_the_dashboard_finds_something(growing: Growing, prometheus: str) -> None:
    wait_for(lambda: asked(prometheus, "stagetrace_requests_total"))
    for more in (20, 30):
        growing.grow()
        wait_for(
            lambda more=more: (
                [each["value"][1] for each in asked(prometheus, "stagetrace_requests_total")] == [str(more)]
            )
        )
        time.sleep(0.6)
    for config in DASHBOARD.parents[1].rglob("prometheus.yml"):
        subprocess.run(["promtool", "check", "config", config], check=True, capture_output=True)
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 20
    empty = []
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "1m")
            result = asked(prometheus, query)
            values = [float(each["value"][1]) for each in result]
            labels = {label for each in result for label in each["metric"]}
            for name in ("status", "phase", "stage", "state", "kind", "op", "group", "layer", "part", "fate"):
                assert f"{{{{{name}}}}}" not in target["legendFormat"] or name in labels, (panel["title"], result)
            if not values or not all(np.isfinite(values)):
                empty.append((panel["title"], target["expr"], values))
    assert not empty
    (imbalance,) = asked(prometheus, next(t["expr"] for p in panels for t in p["targets"] if "imbalance" in p["title"])
                         .replace("$__rate_interval", "1m"))  # fmt: skip
    assert float(imbalance["value"][1]) == pytest.approx(3.0), "the busiest of four has three of four tokens"
    (bandwidth,) = asked(prometheus, next(t["expr"] for p in panels for t in p["targets"] if "bandwidth" in p["title"])
                         .replace("$__rate_interval", "1m"))  # fmt: skip
    assert bandwidth["metric"] == {"op": "all_reduce", "group": "tp:0 (ranks 0-1)"}
    assert float(bandwidth["value"][1]) == pytest.approx(500_000.0), "1000 bytes in 2 ms"
