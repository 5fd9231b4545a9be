"""The hook tables held against the sources of the releases that they speak of, as tests/contracts/releases has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from contracts import facts
from contracts.facts import HOW, fetch, judge, judged, kept, package_of, ranged, tables, targets_of
from contracts.sources import LOCK, CannotFetch, Release, locked

from stagetrace.adapters import device_time
from stagetrace.adapters.inspect import ENGINES
from stagetrace.adapters.sglang import worker as sglang_worker
from stagetrace.instrument.around import Parameters, source
from stagetrace.instrument.hooks import FITS, Hook, release_of
from stagetrace.instrument.recorder import Recorder

if TYPE_CHECKING:
    from stagetrace.instrument.hooks import HookPoint

RELEASES = [release for release in locked() if targets_of(release.name)]
each_release = pytest.mark.parametrize("release", RELEASES, ids=str)


def of_engine(release: Release) -> list[HookPoint]:
    """The hook points in what the release has; those that several engines share once."""
    points = dict.fromkeys(point for table in tables().values() for point in table)
    return [point for point in points if package_of(point.target) == release.name]


@pytest.mark.parametrize("engine", tables())
def test_the_lock_has_the_releases_of_the_table(engine: str):
    wanted = ENGINES[engine][2]
    assert [release.version for release in locked() if release.name == engine] == list(wanted), f"{LOCK}: {HOW}"
    assert sorted(wanted, key=release_of) == list(wanted)


def test_the_lock_has_every_package_that_is_hooked():
    packages = {package_of(point.target) for points in tables().values() for point in points}
    assert packages == {release.name for release in RELEASES}, f"add releases of it to {LOCK}, and {HOW}"


@each_release
def test_what_is_kept_is_of_this_table_and_of_this_lock(release: Release):
    found = kept(release)
    assert found.release == release, HOW
    assert list(found.targets) == targets_of(release.name), f"the hook table has other targets: {HOW}"
    assert found.path.read_text("utf-8") == facts.as_json(found)


def test_nothing_is_kept_of_other_releases():
    assert {path.name for path in facts.KEPT.iterdir()} == {kept(release).path.name for release in RELEASES}


@each_release
def test_every_hook_point_fits_the_releases_that_it_is_for(release: Release):
    found = kept(release)
    points = [point for point in of_engine(release) if ranged(point, release)]
    assert points
    misfits = {point.target: said for point in points if (said := judged(found, point))[0] != FITS}
    assert not misfits, "give the row a range of releases, and a row of its own to what is there instead"


@each_release
def test_no_range_is_narrower_than_it_must_be(release: Release):
    """A row that is out of range would not fit, or another row has its place."""
    found, points = kept(release), of_engine(release)
    taken = {point.place for point in points if ranged(point, release)}
    for point in points:
        if not ranged(point, release) and point.place not in taken:
            assert judge(point, found.targets[point.target])[0] != FITS, point.target


@each_release
def test_a_place_is_taken_once(release: Release):
    places = [point.place for point in of_engine(release) if ranged(point, release)]
    assert len(places) == len(set(places))


@pytest.mark.parametrize("engine", tables())
def test_what_stands_for_another_names_a_row(engine: str):
    targets = {point.target for point in tables()[engine]}
    assert {point.stands_for for point in tables()[engine]} - {""} <= targets


@pytest.mark.parametrize("gpu", [False, True], ids=["processor", "GPU"])
@each_release
def test_what_the_handlers_ask_for_is_a_parameter_in_every_release(
    release: Release, gpu: bool, monkeypatch: pytest.MonkeyPatch
):
    """Also of the handlers as they are where PyTorch was built for a GPU."""
    for module in (device_time, sglang_worker):
        monkeypatch.setattr(module, "built", lambda: gpu)
    found = kept(release)
    for point in of_engine(release):
        if ranged(point, release):
            around = point.handler(Hook(point, 0, Recorder()))
            assert source(Parameters(found.targets[point.target].parameters), around)  # or ValueError


@pytest.mark.matrix
@each_release
def test_what_is_kept_is_what_the_sources_say(release: Release):
    try:
        found = fetch(release)
    except CannotFetch as error:
        pytest.fail(str(error), pytrace=False)
    assert facts.as_json(found) == found.path.read_text("utf-8"), HOW
