"""For the tests of trace backends: receivers of our own, sessions of real engines, no OTEL_* variables but theirs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from backends.receiver import GrpcReceiver, HttpReceiver, Receiver
from backends.recorded.keep import ENGINES, rebuilt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stagetrace.exporters.session import Session


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture(params=[GrpcReceiver, HttpReceiver], ids=["grpc", "http"])
def receiver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A running receiver of either protocol, named by the environment."""
    with request.param() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", running.protocol)
        yield running


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
    """A session of each real engine (recorded/record.py), by its name."""
    directory = tmp_path_factory.mktemp("recordings")
    return {engine: rebuilt(engine, directory) for engine in ENGINES}


@pytest.fixture(params=ENGINES)
def recording(request: pytest.FixtureRequest, recordings: dict[str, Session]) -> Session:
    """A session of either real engine."""
    return recordings[request.param]
