"""Makes the pictures in docs/pictures anew, of the kept sessions of real engines, in a headless browser.

make pictures        (PYTHONPATH=tests:examples .venv/bin/python -m backends.pictures)
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from backends.browser import Browser
from backends.exported import export_otlp
from backends.recorded.keep import ENGINES, rebuilt
from backends.test_phoenix import PROJECT, given_back, running
from backends.test_viewers import open_in_perfetto, viewers

from stagetrace.exporters.session import Session

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
_AROUND_NS = 6_000_000
_SETTLED_S = 3.0  # after the last thing that was told to the page


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="stagetrace-pictures-") as name:
        directory = Path(name)
        recordings = {engine: rebuilt(engine, directory) for engine in ENGINES}
        timeline(recordings, directory)
        trace_page(recordings["vllm"], directory)
    for path in sorted(PICTURES.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")


def timeline(recordings: dict[str, Session], directory: Path) -> None:
    """Ten requests in Perfetto's UI, the thread of the rank, and the steps."""
    requests = recordings["vllm"].read_table("requests").to_pandas()
    together = requests[requests["child"].notna()]
    begin, end = together["arrival_ns"].min() - _AROUND_NS, together["end_ns"].max() + _AROUND_NS
    site = directory / "site"
    site.mkdir()
    with viewers(site, recordings) as url, Browser(directory / "one", 1500, 1330) as browser:
        open_in_perfetto(browser, url, "vllm.pftrace", f"&visStart={begin}&visEnd={end}")
        browser.run("app.commands.runCommand('dev.perfetto.ToggleLeftSidebar')")
        browser.run("app.trace.workspace.flatTracks.forEach(t => t.name == 'System' ? t.remove() : t.expand())")
        time.sleep(_SETTLED_S)
        browser.screenshot(PICTURES / "perfetto.png")


def trace_page(session: Session, directory: Path) -> None:
    """A request's page in Phoenix."""
    os.environ["OTEL_RESOURCE_ATTRIBUTES"] = f"openinference.project.name={PROJECT}"
    (directory / "phoenix").mkdir()
    with running(directory / "phoenix") as endpoints, Browser(directory / "two", 1500, 900) as browser:
        url = endpoints["http/protobuf"]
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoints["grpc"], "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
        spans = {span.context.span_id.hex(): span for span in export_otlp(session, variables, timeout_s=30)}
        given_back(url, set(spans))
        chunked = max((span for span in spans.values() if span.name == "request"), key=lambda span: len(span.links))
        browser.open(f"{url}/redirects/traces/{chunked.context.trace_id.hex()}")
        browser.wait("document.body.innerText.includes('prefill')")
        time.sleep(_SETTLED_S)
        browser.screenshot(PICTURES / "phoenix.png")


if __name__ == "__main__":
    main()
