"""What every release in the lock has at the targets of the hook tables: read from its sources, kept in git.

One file for each release, releases/NAME-VERSION.json: for every target of the tables that lies in the package, the
parameters of the function there, or why there is none; and the digest of every source file that was read for it. So
`make test` needs no index and no sources, a reviewer sees in a diff what a release changed, and what is in git can be
held against the sources again (`make test-all` does). Only targets are kept, not whole modules: a new hook point needs
`make releases` once, which reads what the cache has and asks the index for the rest; a test says so.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.functions import Code, Fact
from contracts.sources import Release, Wheel, locked

from stagetrace.adapters.inspect import ENGINES
from stagetrace.instrument.hooks import ABSENT, absence, compare, in_range, release_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stagetrace.instrument.hooks import HookPoint

KEPT = Path(__file__).resolve().parent / "releases"
HOW = "run `make releases`, and commit what it writes"


@dataclass(frozen=True)
class Facts:
    """What is known of a release."""

    release: Release
    targets: dict[str, Fact]
    sources: dict[str, str]  # path -> sha256 of the file's text

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return KEPT / f"{self.release.name}-{self.release.version}.json"


def tables() -> dict[str, tuple[HookPoint, ...]]:
    """The hook points by engine, of those that are supported."""
    return {name: tuple(points) for name, (_, points, _) in ENGINES.items() if points}


def package_of(target: str) -> str:
    """The package that a target lies in."""
    return target.partition(":")[0].partition(".")[0]


def targets_of(package: str) -> list[str]:
    """The targets in a package, of all tables."""
    found = {point.target for points in tables().values() for point in points}
    return sorted(target for target in found if package_of(target) == package)


def ranged(point: HookPoint, release: Release) -> bool:
    """Whether the table has the hook point in a release; ranges are the engine's, other packages have none."""
    return release.name not in ENGINES or in_range(point, release_of(release.version))


def gather(release: Release, targets: Iterable[str], read: Callable[[str], str | None]) -> Facts:
    """What a release has at the targets, by its files."""
    sources: dict[str, str] = {}

    def noted(path: str) -> str | None:
        text = read(path)
        if text is not None:
            sources[path] = hashlib.sha256(text.encode()).hexdigest()
        return text

    code = Code(noted)
    found = {target: code.find(target) for target in targets}
    return Facts(release, found, dict(sorted(sources.items())))


def fetch(release: Release) -> Facts:
    """The same from the release's wheel. Raises CannotFetch."""
    return gather(release, targets_of(release.name), Wheel(release).read)


def kept(release: Release) -> Facts:
    """What git has of a release. Raises FileNotFoundError."""
    data = json.loads(Facts(release, {}, {}).path.read_text("utf-8"))
    targets = {
        target: Fact(**{**fact, "parameters": tuple(fact.get("parameters", ()))})
        for target, fact in data["targets"].items()
    }
    return Facts(Release(release.name, release.version, data["wheel"]), targets, data["sources"])


def keep(facts: Facts) -> None:
    """Writes what is known of a release."""
    facts.path.parent.mkdir(exist_ok=True)
    facts.path.write_text(as_json(facts), "utf-8")


def as_json(facts: Facts) -> str:
    """One line for each target and each file."""
    targets = {target: _short(fact) for target, fact in facts.targets.items()}
    blocks = [
        f' "release": {json.dumps(str(facts.release))}',
        f' "wheel": {json.dumps(facts.release.sha256)}',
        _lines("targets", targets),
        _lines("sources", facts.sources),
    ]
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def _lines(name: str, rows: dict[str, Any]) -> str:
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items())
    return f' "{name}": {{\n{lines}\n }}'


def _short(fact: Fact) -> dict[str, Any]:
    usual = asdict(Fact())
    return {name: value for name, value in asdict(fact).items() if value != usual[name]}


def judge(point: HookPoint, fact: Fact) -> tuple[str, str]:
    """What instrument.hooks.check says of a hook point in range, and why; by what is at its target."""
    if fact.missing:
        return "missing", fact.missing
    if fact.kind != "function":
        return "mismatch", f"it is a {fact.kind}, not a function"
    return compare(fact.parameters, point.parameters)


def judged(facts: Facts, point: HookPoint) -> tuple[str, str]:
    """What check says in a release, and why. Raises KeyError for a target of which nothing is kept."""
    if not ranged(point, facts.release):
        return ABSENT, absence(point)
    return judge(point, facts.targets[point.target])


def main() -> None:
    """Reads every release of the lock again; what is kept of others goes."""
    releases = [release for release in locked() if targets_of(release.name)]
    for path in {*KEPT.glob("*.json")} - {Facts(release, {}, {}).path for release in releases}:
        path.unlink()
    for release in releases:
        facts = fetch(release)
        changed = "" if facts.path.is_file() and facts.path.read_text("utf-8") == as_json(facts) else ", changed"
        keep(facts)
        print(f"{release}: {len(facts.targets)} targets, {len(facts.sources)} files{changed}", flush=True)


if __name__ == "__main__":
    main()
