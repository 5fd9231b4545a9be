"""Tests of `stagetrace doctor`: engines that fit, do not fit or crash, what keeps them from us, and session views."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner
from unit.rings import die, opened
from unit.sessions import PROCESS, SessionBuilder
from unit.wheel import CHECKOUT, make_environment

from stagetrace.adapters.inspect import PLUGIN, lost
from stagetrace.adapters.sglang.hooks import HOOK_POINTS as SGLANG_HOOK_POINTS
from stagetrace.adapters.vllm.hooks import HOOK_POINTS
from stagetrace.analysis.doctor import file_system, observed_seconds, ring_directory_view, time_text
from stagetrace.cli.main import app
from stagetrace.exporters.session import Manifest, Process
from stagetrace.instrument import records, ring
from stagetrace.instrument.around import Around
from stagetrace.instrument.hooks import ABSENT, HookPoint, in_range, release_of
from stagetrace.instrument.identity import claim_identity
from stagetrace.instrument.stages import Level

if TYPE_CHECKING:
    from click.testing import Result

VERSION = "9.8.7"
POINTS = [point for point in HOOK_POINTS if in_range(point, release_of(VERSION))]
TARGETS = [point.target for point in POINTS]
SCHEDULER = "vllm.v1.core.sched.scheduler"
HTTPTOOLS, H11 = (f"uvicorn.protocols.http.{name}_impl" for name in ("httptools", "h11"))
NOISE = "import os\nprint('engine says hello')\nos.write(1, b'and so does its C code')\n"
EVIL = "\x1b]0;owned\x07\u202ered[bold]not bold[/bold]"


class FakeEngine:
    """Packages that have every function that is hooked in the version, as the table says, and nothing else."""

    def __init__(self, root: Path, version: str = VERSION):
        self.root, self.version = root, version
        modules: dict[str, dict[str, list[str]]] = {}
        for point in HOOK_POINTS:
            if not in_range(point, release_of(version)):
                continue
            owner, _, name = point.target.partition(":")[2].rpartition(".")
            parameters = ", ".join((*point.parameters, "*more"))
            functions = modules.setdefault(point.module, {}).setdefault(owner, [])
            functions.append(f"{'    ' if owner else ''}def {name}({parameters}): pass\n")
        for module, classes in modules.items():
            bodies = (("" if not name else f"class {name}:\n") + "".join(body) for name, body in classes.items())
            self.write(module, NOISE + "".join(bodies))
        self.start("")

    def path(self, module: str) -> Path:
        return self.root.joinpath(*module.split(".")).with_suffix(".py")

    def write(self, module: str, text: str) -> None:
        path = self.path(module)
        path.parent.mkdir(parents=True, exist_ok=True)
        for package in path.relative_to(self.root).parents[:-1]:
            (self.root / package / "__init__.py").touch()
        path.write_text(text, "utf-8")

    def start(self, text: str) -> None:
        """What happens when the engine's package is imported."""
        (self.root / "vllm" / "__init__.py").write_text(f"__version__ = {self.version!r}\n{text}", "utf-8")

    def change(self, module: str, old: str, new: str) -> None:
        text = self.path(module).read_text("utf-8")
        assert old in text
        self.path(module).write_text(text.replace(old, new), "utf-8")


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STAGETRACE_SESSION", "STAGETRACE_LEVEL", "VLLM_PLUGINS", "SGLANG_PLUGINS", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("STAGETRACE_RING_DIR", str(tmp_path / "rings"))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return FakeEngine(tmp_path / "site")


def doctor(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def viewed(*arguments: str | Path, status: int) -> dict[str, Any]:
    """The JSON object, which is all that the command prints on standard output."""
    result = doctor(*arguments, "--json")
    assert result.exit_code == status, result.output
    view: dict[str, Any] = json.loads(result.stdout)
    assert view["status"] == status
    return view


def points_of(view: dict[str, Any]) -> dict[str, dict[str, Any]]:
    (engine,) = view["inspection"]["engines"]
    return {point["target"]: point for point in engine["points"]}


# An environment


def test_an_engine_that_fits(engine: FakeEngine):
    view = viewed(status=0)
    (found,) = view["inspection"]["engines"]
    assert (found["name"], found["version"]) == ("vllm", VERSION)
    assert found["plugin"] == "stagetrace.adapters.vllm.plugin:register"
    points = points_of(view)
    for point in POINTS:
        said = points.pop(point.target)
        told = (point.process, point.level.name.lower(), point.gives, "fits", "", True, True)
        assert tuple(said[key] for key in ("process", "level", "gives", "status", "why", "found", "matches")) == told
    assert {point["status"] for point in points.values()} <= {ABSENT}
    assert view["troubles"] == found["unusable"] == []
    assert view["inspection"]["executable"] == sys.executable


def test_as_plain_text(engine: FakeEngine):
    result = doctor()
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    for point in POINTS:
        level = point.level.name.lower()
        name = point.target.partition(":")[2]
        wanted = [name, "always" if level == "off" else level, "yes", "matches", *point.gives.split()]
        assert wanted in lines, point.target
    assert ["engine", "vllm", VERSION] in lines
    assert "All hook points can be used." in result.stdout
    assert "engine says hello" not in result.stdout
    assert "importing the engine's modules" in result.stderr


MISFITS = {
    "a function that is missing": ("    def schedule(self", "    def plan(self", "missing", False, "schedule"),
    "a class that is missing": ("class Scheduler", "class Planner", "missing", False, "Scheduler"),
    "another signature": ("schedule(self,", "schedule(this,", "mismatch", True, "the hook needs (self)"),
    "no function": ("    def schedule(self", "    schedule = 7\n    def other(self", "mismatch", True, "it is a int"),
    "an import error": ("class", "import sys.nothing\nclass", "no module", False, "No module named 'sys.nothing'"),
    "an error on import": ("class", "raise OSError('no driver')\nclass", "error", False, "OSError: no driver"),
    "an exit on import": ("class", "import sys; sys.exit('no licence')\nclass", "error", False, "no licence"),
    "a lazy module that fails": (
        "class Scheduler",
        "def __getattr__(name): raise RuntimeError('lazy')\nclass Planner",
        "error",
        False,
        "RuntimeError: lazy",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_is_named_and_the_rest_is_usable(engine: FakeEngine, what: str):
    old, new, status, found, why = MISFITS[what]
    engine.change(SCHEDULER, old, new)
    view = viewed(status=1)
    points = points_of(view)
    said = points[f"{SCHEDULER}:Scheduler.schedule"]
    assert (said["status"], said["found"], said["matches"]) == (status, found, False)
    assert why in said["why"]
    unusable = {target for target, point in points.items() if not point["matches"] and point["status"] != ABSENT}
    assert {target.partition(":")[0] for target in unusable} == {SCHEDULER}
    assert view["inspection"]["engines"][0]["unusable"] == [target for target in TARGETS if target in unusable]
    assert f"{len(unusable)} of {len(TARGETS)} hook points do not fit vllm {VERSION}" in view["troubles"][0]
    text = doctor().stdout
    assert f"{SCHEDULER}:Scheduler.schedule" in text
    assert why in text
    assert "All hook points" not in text


def test_an_engine_that_cannot_be_imported_at_all(engine: FakeEngine):
    engine.start("raise ImportError('libcuda.so.1')")
    view = viewed(status=1)
    vllm = [target for target in TARGETS if target.startswith("vllm.")]
    assert view["inspection"]["engines"][0]["unusable"] == vllm
    assert all("libcuda.so.1" in points_of(view)[target]["why"] for target in vllm)


def test_a_module_that_is_not_installed_is_not_missed_where_another_gives_the_same(engine: FakeEngine):
    engine.change(HTTPTOOLS, "class", "import httptools_of_nobody\nclass")
    view = viewed(status=0)
    assert points_of(view)[f"{HTTPTOOLS}:RequestResponseCycle.send"]["status"] == "no module"
    assert "not needed: another gives the same" in doctor().stdout
    engine.change(H11, "class", "import h11_of_nobody\nclass")
    assert {target.partition(":")[0] for target in viewed(status=1)["inspection"]["engines"][0]["unusable"]} == {
        HTTPTOOLS,
        H11,
    }


def test_a_module_that_is_there_but_does_not_fit_is_missed_though_another_gives_the_same(engine: FakeEngine):
    engine.change(HTTPTOOLS, "def send(self, message", "def send(self, text")
    assert viewed(status=1)["inspection"]["engines"][0]["unusable"] == [f"{HTTPTOOLS}:RequestResponseCycle.send"]


# Versions


STEP_TIMING = "vllm.v1.worker.gpu.async_utils"
FORWARD_START = f"{STEP_TIMING}:StepTimingCollector.forward_start"  # from 0.28 on, and missed before
NEWER = "the hook points were held against"


@pytest.mark.parametrize(("version", "known"), [("0.32.0+cpu", True), (VERSION, False), ("0.1.dev1", False)])
def test_a_version_that_the_table_was_not_held_against_is_said_to_be_so(engine: FakeEngine, version: str, known: bool):
    engine.version = version
    engine.start("")
    view = viewed(status=0)
    (found,) = view["inspection"]["engines"]
    assert (found["version"], found["known"], found["lost"]) == (version, known, [])
    assert len(view["notes"]) == (not known)
    assert (NEWER in doctor().stdout) == (not known)


def test_what_an_older_version_has_not_is_lost_and_not_missing(engine: FakeEngine):
    engine.path(STEP_TIMING).unlink()
    FakeEngine(engine.root, "0.24.0")
    view = viewed(status=0)
    (found,) = view["inspection"]["engines"]
    assert found["known"]
    assert FORWARD_START in found["lost"]
    assert FORWARD_START not in found["unusable"]
    assert {points_of(view)[target]["status"] for target in found["lost"]} == {"not in this version"}
    said = points_of(view)[FORWARD_START]
    assert (said["found"], said["matches"], said["why"]) == (
        False,
        False,
        "the hook point is for the releases from 0.28 on",
    )
    (note,) = view["notes"]
    assert note.startswith("Not to be had from vllm 0.24.0")
    assert "where prepare becomes forward (StepTimingCollector.forward_start)" in note
    text = doctor().stdout
    assert "Not to be had from vllm 0.24.0" in text
    assert "lost in this version" in text


def test_what_a_newer_version_has_not_is_missing_and_the_rest_is_used(engine: FakeEngine):
    engine.change(SCHEDULER, "    def schedule(self", "    def plan(self")
    view = viewed(status=1)
    (found,) = view["inspection"]["engines"]
    assert (found["known"], found["unusable"], found["lost"]) == (False, [f"{SCHEDULER}:Scheduler.schedule"], [])
    text = doctor().stdout
    assert NEWER in text
    assert f"1 of {len(TARGETS)} hook points do not fit vllm {VERSION}" in text


def row(target: str, since: str = "", before: str = "", stands_for: str = "", missed: bool = True) -> HookPoint:
    return HookPoint(
        f"a:{target}", (), Level.STEP, "worker", lambda hook: Around(), "x", since, before, stands_for, missed
    )


def test_what_is_lost_in_a_release():
    rows = [row("new", "0.28"), row("old", "", "0.28", "a:new"), row("late", "0.30"), row("op", "0.30", missed=False)]
    assert lost(rows, (0, 31, 0)) == lost(rows, ()) == []
    assert lost(rows, (0, 29, 0)) == lost(rows, (0, 27, 1)) == ["a:late"]


CRASHES = {
    "a signal": ("os.kill(os.getpid(), 11)", "was ended by a signal (Segmentation fault)"),
    "an exit": ("os._exit(3)", "ended with exit status 3"),
}


@pytest.mark.parametrize("how", CRASHES)
def test_a_crash_is_reported_with_its_last_words(engine: FakeEngine, how: str):
    code, said = CRASHES[how]
    words = f"import os\nos.write(2, {EVIL!r}.encode() + b'\\nthe driver is gone\\n')\n{code}\n"
    engine.change(SCHEDULER, "class", f"{words}class")
    view = viewed(status=2)
    assert view["inspection"] is None
    assert f"{said} while it imported {SCHEDULER}" in view["troubles"][0]
    assert view["troubles"][0].endswith("the driver is gone")
    text = doctor().stdout
    assert "the driver is gone" in text
    assert not {"\x1b", "\x07", "\u202e"} & {*text}


def test_nothing_is_patched_though_armed_and_loading_plugins(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STAGETRACE_SESSION", str(tmp_path / "session"))
    called, found = tmp_path / "called", tmp_path / "found"
    engine.start(f"""
import atexit, pathlib, sys
from importlib.metadata import entry_points
(plugin,) = entry_points(group="vllm.general_plugins", name="{PLUGIN}")
plugin.load()()
pathlib.Path({str(called)!r}).touch()
def look():
    finders = [type(each).__name__ for each in sys.meta_path]
    from {SCHEDULER} import Scheduler
    marks = [hasattr(each, "_stagetrace_hook") for each in vars(Scheduler).values()]
    pathlib.Path({str(found)!r}).write_text(f"{{'Hooks' in finders}} {{any(marks)}}")
atexit.register(look)
""")
    view = viewed(status=0)
    assert called.exists()
    assert found.read_text() == "False False"
    assert view["session"] == {"path": str(tmp_path / "session"), "exists": False}
    assert not (tmp_path / "session").exists()
    assert not (tmp_path / "rings").exists()


def test_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "site" / "vllm").mkdir(parents=True)  # a folder that has the name is no engine
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    view = viewed(status=2)
    assert view["inspection"]["engines"] == []
    assert "There is no engine in this environment" in view["troubles"][0]
    assert "--python" in view["troubles"][0]


def test_two_engines_in_one_environment(engine: FakeEngine):
    assert "sglang" not in doctor().stdout
    engine.write("sglang.version", "raise RuntimeError('no hook point is here: must not be imported')")
    view = viewed(status=1)
    assert [each["name"] for each in view["inspection"]["engines"]] == ["vllm", "sglang"]
    # It has none of its modules, so none of its hooks fits; those on the HTTP server are the other engine's too.
    vllm, sglang = view["inspection"]["engines"]
    assert vllm["unusable"] == []
    assert sglang["plugin"] == "stagetrace.adapters.sglang.plugin:register"
    newest = [point for point in SGLANG_HOOK_POINTS if in_range(point, ())]
    assert sglang["unusable"] == [point.target for point in newest if point.module.startswith("sglang.")]
    assert set(view["plugin_variables"]) == {"VLLM_PLUGINS", "SGLANG_PLUGINS"}


@pytest.mark.parametrize(
    ("value", "excludes"), [("other", True), ("", True), ("other,stagetrace", False), ("stagetrace", False)]
)
def test_vllm_plugins(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, value: str, excludes: bool):
    monkeypatch.setenv("VLLM_PLUGINS", value)
    view = viewed(status=int(excludes))
    assert view["plugin_variables"] == {"VLLM_PLUGINS": {"value": value, "excludes": excludes}}
    assert len(view["troubles"]) == excludes
    if excludes:
        wanted = ",".join(filter(None, (value, "stagetrace")))
        assert f"set VLLM_PLUGINS={wanted}, or start the engine with `stagetrace run`" in view["troubles"][0]


def test_plugins_of_an_engine_that_is_not_here(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert viewed(status=0)["troubles"] == []


# Another environment


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("bare") / "venv")


def test_an_environment_without_stagetrace(bare_python: Path):
    view = viewed("--python", bare_python, status=2)
    assert f"{bare_python} has no stagetrace" in view["troubles"][0]
    assert f"{bare_python} -m pip install --no-deps" in view["troubles"][0]


def test_an_environment_without_our_dependencies_and_without_the_entry_point(
    bare_python: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    # Its modules are there and its metadata is not, as where somebody copied a folder.
    monkeypatch.setenv("PYTHONPATH", f"{CHECKOUT / '.check'}:{engine.root}")
    view = viewed("--python", bare_python, status=1)
    assert view["inspection"]["executable"] == str(bare_python)
    assert view["inspection"]["stagetrace"] == "unknown"
    (found,) = view["inspection"]["engines"]
    assert (found["plugin"], found["unusable"]) == (None, [])
    assert "does not find stagetrace's entry point in vllm.general_plugins" in view["troubles"][0]


@pytest.mark.parametrize(("python", "why"), [("gone/bin/python", "No such file"), ("/bin/echo", "exit status 0")])
def test_what_is_no_python(python: str, why: str):
    assert why in viewed("--python", python, status=2)["troubles"][0]


# Rings


def test_ring_directory(engine: FakeEngine, tmp_path: Path):
    root = tmp_path / "rings"
    rings = viewed(status=0)["rings"]
    assert (rings["directory"], rings["exists"], root.exists()) == (str(root), False, False)
    assert rings["ring_bytes"] == records.HEADER_SIZE + 128 * (ring.CONTROL_SLOTS + ring.DETAIL_SLOTS)
    root.mkdir()
    assert viewed(status=0)["rings"]["exists"]


def test_what_a_ring_takes_is_what_it_takes(tmp_path: Path):
    with opened(tmp_path, ring.CONTROL_SLOTS, ring.DETAIL_SLOTS) as (recorder, _):
        assert recorder.ring is not None
        assert recorder.ring.path.stat().st_size == ring_directory_view()["ring_bytes"]


def test_a_ring_directory_that_cannot_be(engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STAGETRACE_RING_DIR", str(tmp_path / "file" / "rings"))
    (trouble,) = viewed(status=1)["troubles"]
    assert f"{tmp_path / 'file'} cannot be written" in trouble


def test_too_little_room(monkeypatch: pytest.MonkeyPatch):
    assert ring_directory_view()["trouble"] is None
    monkeypatch.setattr(ring, "chosen_slots", lambda maximum: (1 << 20, 1 << 50))
    assert "rings will be smaller" in ring_directory_view()["trouble"]


def test_the_default_directory_open_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "default"
    root.mkdir(mode=0o700)
    monkeypatch.delenv("STAGETRACE_RING_DIR")
    monkeypatch.setattr(ring, "ring_directory", lambda session: root / session)
    assert ring_directory_view()["trouble"] is None
    root.chmod(0o777)
    assert "open to all" in ring_directory_view()["trouble"]


MOUNTS = """\
/dev/vda / ext4 rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
/dev/vdb /a\\040b xfs rw 0 0
overlay /over overlay rw 0 0
tmpfs /over tmpfs rw 0 0
broken
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/dev/shm", "tmpfs"), ("/dev/shm/x/y", "tmpfs"), ("/dev/shmoo", "ext4"), ("/a b/c", "xfs"), ("/over/x", "tmpfs")],
)
def test_file_system(path: str, kind: str):
    assert file_system(Path(path), MOUNTS) == kind


def test_file_system_unknown():
    assert file_system(Path("/x"), "") is None


# A session


def hook(name: str, status: str, why: str = "", gives: str = "") -> dict[str, str]:
    return {"name": name, "status": status, "why": why, "gives": gives or name}


def recorded(path: Path, *hooks: dict[str, str], seconds: int = 100, **values: Any) -> SessionBuilder:
    """A session with one process that has run for so many seconds."""
    builder = SessionBuilder(path, anchors=[(0, time.time_ns() - seconds * 1_000_000_000)])
    builder.process(hooks=list(hooks), **values)
    return builder


def test_rings_in_seconds_at_the_observed_rate(tmp_path: Path):
    with opened(tmp_path, control=1024, detail=2048) as (recorder, reader):
        builder = recorded(tmp_path / "session", ring=reader.path.name)
        builder.losses(read=900, overwritten=80, torn=20, ring="detail")
        builder.losses(ring="control", dropped=7)
        builder.write()
        (process,) = viewed(tmp_path / "session", status=0)["processes"]
        assert process["alive"] is True
        detail, control = process["rings"]
        assert (detail["slots"], detail["bytes"]) == (2048, 256 * 1024)
        assert detail["slots_per_s"] == pytest.approx(10.0, rel=0.1)
        assert detail["holds_s"] == pytest.approx(204.8, rel=0.1)
        assert {reason: count for reason, count in detail["losses"].items() if count} == {"overwritten": 80, "torn": 20}
        assert (control["slots"], control["slots_per_s"], control["holds_s"]) == (1024, None, None)
        text = doctor(tmp_path / "session").stdout
        (line,) = [line for line in text.splitlines() if "detail" in line]
        words = line.split()
        assert words[:5] == ["engine_core", "1", "detail", "2048", "0.2"]
        assert words[6] == "min"
        assert "80 overwritten, 20 torn" in line
        (line,) = [line for line in text.splitlines() if "control" in line]
        assert "no traffic yet" in line
        assert "7 dropped" in line
        die(recorder)
        assert viewed(tmp_path / "session", status=0)["processes"][0]["alive"] is False


def test_a_ring_that_is_gone(tmp_path: Path):
    builder = recorded(tmp_path)
    builder.process(key=PROCESS + 1, pid=2, ended=True)
    builder.losses(read=1000)
    builder.write()
    view = viewed(tmp_path, status=0)
    assert [process["alive"] for process in view["processes"]] == [None, False]
    (one,) = view["processes"][0]["rings"]
    assert (one["slots"], one["holds_s"]) == (None, None)
    assert one["slots_per_s"] == pytest.approx(10.0, rel=0.1)
    assert "The size of a ring is known only while it is there" in doctor(tmp_path).stdout


def test_observed_seconds():
    process = Process(1, "r", "worker", 1, "h", started_ns=5_000_000_000)
    manifest = Manifest(updated_ns=1_030_000_000_000, anchors=[(0, 0), (20_000_000_000, 1_020_000_000_000)])
    assert observed_seconds(process, manifest) == 25.0
    manifest.updated_ns = 1_005_000_000_000
    assert observed_seconds(process, manifest) is None
    assert observed_seconds(process, Manifest(updated_ns=1)) is None


@pytest.mark.parametrize(("status", "rc"), [("missing", 1), ("mismatch", 1), ("error", 1), ("out", 1), ("waiting", 0)])
def test_hooks_that_are_not_installed(tmp_path: Path, status: str, rc: int):
    builder = recorded(tmp_path, hook("a:good", "installed"), hook("a:bad", status, "because", "something"))
    builder.write()
    (process,) = viewed(tmp_path, status=rc)["processes"]
    assert process["hooks_installed"] == 1
    assert process["hooks_not_installed"] == [hook("a:bad", status, "because", "something")]
    assert f"a:bad  {status}" in doctor(tmp_path).stdout


def test_a_hook_that_waits_where_it_is_not_needed_is_not_told(tmp_path: Path):
    builder = recorded(tmp_path, hook("a:here", "installed"), hook("a:there", "waiting"))
    builder.process(key=PROCESS + 1, pid=2, hooks=[hook("a:here", "waiting"), hook("a:there", "installed")])
    builder.write()
    assert [process["hooks_not_installed"] for process in viewed(tmp_path, status=0)["processes"]] == [[], []]


def test_contained_errors(tmp_path: Path):
    recorded(tmp_path, hook("a:b", "installed"), errors={"a:b": 3, "a:a": 1}).write()
    assert viewed(tmp_path, status=0)["processes"][0]["errors"] == {"a:a": 1, "a:b": 3}
    assert ["engine_core", "1", "a:b", "3"] in [line.split() for line in doctor(tmp_path).stdout.splitlines()]


def test_what_a_compiler_hides_in_a_worker(tmp_path: Path):
    builder = recorded(tmp_path, hook("a:b", "installed"), info={"not_visible_under_compile": ["embed", "moe_route"]})
    builder.process(key=PROCESS + 1, pid=2, info={"not_visible_under_compile": "no list"})
    builder.write()
    processes = viewed(tmp_path, status=0)["processes"]
    assert [each["not_visible_under_compile"] for each in processes] == [["embed", "moe_route"], []]
    lines = [line.split() for line in doctor(tmp_path).stdout.splitlines()]
    assert ["engine_core", "1", "embed,", "moe_route"] in lines
    assert "Not visible under compile" in doctor(tmp_path).stdout


def test_strings_from_outside_cannot_steer_the_terminal(tmp_path: Path):
    info = {"engine": EVIL, "engine_version": EVIL}
    recorded(tmp_path, hook(EVIL, "missing", EVIL), errors={EVIL: 1}, role=EVIL, host=EVIL, info=info).write()
    text = doctor(tmp_path).stdout
    assert not {"\x1b", "\x07", "\u202e"} & {*text}
    assert "\\x1b]0;owned\\x07\\u202ered[bold]not bold[/bold]" in text


def test_how_devices_are_timed(tmp_path: Path):
    told = {"by": "event pairs", "skipped": 7, "contradictions": 1, "errors": 0}
    builder = recorded(tmp_path, hook("a:b", "installed"), info={"device_time": told})
    builder.process(key=PROCESS + 1, pid=2, info={"device_time": {"by": "nothing", "errors": 5, "skipped": "many"}})
    builder.process(key=PROCESS + 2, pid=3, info={"device_time": "x"})
    builder.write()
    found = [process["device_time"] for process in viewed(tmp_path, status=0)["processes"]]
    assert found == [told, {"by": "nothing", "skipped": 0, "contradictions": 0, "errors": 5}, None]
    lines = [line.split() for line in doctor(tmp_path).stdout.splitlines()]
    assert ["engine_core", "1", "event", "pairs", "7", "1", "0"] in lines
    assert ["engine_core", "2", "nothing", "0", "0", "5"] in lines


def test_which_marks_there_are(tmp_path: Path):
    told = {"by": "marks", "stages": ["attention", "moe"], "layers": [0, 31], "per_step": 12, "not_visible": ["mlp"]}
    builder = recorded(
        tmp_path, hook("a:b", "installed"), info={"marks": {**told, "empty_ns": 1184, "absent": 12, "halves": 3}}
    )
    info = {"world_size": 3, "marks": {"by": "nothing", "why": f"{EVIL} no Triton", "errors": 0}}
    builder.process(key=PROCESS + 1, role="worker", pid=2, info={**info, "rank": 1})
    builder.process(key=PROCESS + 2, role="worker", pid=3, info={**info, "rank": 2})
    builder.process(key=PROCESS + 3, pid=4, info={"marks": "x"})
    builder.write()
    view = viewed(tmp_path, status=0)
    found = [process["marks"] for process in view["processes"]]
    assert (found[0]["stages"], found[0]["marked_layers"]) == (["attention", "moe"], [0, 31])
    assert (found[0]["empty_ns"], found[1]["empty_ns"]) == (1184, None)
    assert found[0]["not_told"] == {"absent": 12, "halves": 3} and found[1]["by"] == "nothing" and found[3] is None
    nothing, hidden = view["troubles"]
    assert "in worker, rank 1; worker, rank 2: " in nothing and "no Triton. What to do: marks need a CUDA" in nothing
    assert "No marks around mlp in engine_core" in hidden and "--enforce-eager" in hidden
    text = doctor(tmp_path).stdout
    lines = [line.split() for line in text.splitlines()]
    places = ("attention,", "moe", "0,", "31")
    cells = ("engine_core", "1", "marks", *places, "up", "to", "12", "1184", "ns", "12", "absent,", "3", "halves")
    assert [*cells] in lines and ["worker", "2", "nothing", "-", "-", "-", "-", "none"] in lines
    assert "\x1b" not in text and "What to do: marks need a CUDA" in text


def test_a_session_without_processes(tmp_path: Path):
    SessionBuilder(tmp_path).write()
    (trouble,) = viewed(tmp_path, status=2)["troubles"]
    assert "No process has opened a ring" in trouble
    assert "stagetrace doctor --python" in trouble


def test_rings_that_nobody_reads(tmp_path: Path):
    with opened(tmp_path):
        (trouble,) = viewed(tmp_path / "session", status=2)["troubles"]
        assert trouble.startswith("1 rings of this session are read by no collector")
        assert f"stagetrace collect {tmp_path / 'session'}" in trouble


def test_a_session_before_its_first_commit(tmp_path: Path):
    claim_identity(tmp_path)
    viewed(tmp_path, status=2)


def test_what_is_no_session(tmp_path: Path):
    result = doctor(tmp_path)
    assert result.exit_code == 2
    assert "is not a stagetrace session" in result.stderr


def test_a_session_or_an_environment(tmp_path: Path):
    SessionBuilder(tmp_path).write()
    result = doctor(tmp_path, "--python", sys.executable)
    assert result.exit_code == 2
    assert "leave out SESSION, or --python" in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.2 s"),
        (3.14, "3.1 s"),
        (42, "42 s"),
        (300, "5.0 min"),
        (5000, "83 min"),
        (7200, "2.0 h"),
        (864000, "10 days"),
    ],
)
def test_time_text(seconds: float, text: str):
    assert time_text(seconds) == text
