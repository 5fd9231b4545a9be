"""Writes the pages that are made from tables: stages, speed of light, diagnosis, compatibility.

In numbers.md and comparison.md it writes the parts between `<!-- definitions: ... -->` and `<!-- end -->` alone.

python docs/generate.py            writes the pages
python docs/generate.py --check    exits with 1 when a page is not what would be written
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stagetrace.analysis.comparison.metrics import METRICS, Group
from stagetrace.analysis.definitions import DEFINITIONS
from stagetrace.analysis.diagnosis.causes import CAUSES, Cause
from stagetrace.analysis.diagnosis.causes import Phase as OfRequest
from stagetrace.analysis.diagnosis.explain import NUMBERS
from stagetrace.analysis.diagnosis.thresholds import THRESHOLDS
from stagetrace.analysis.formats import READERS
from stagetrace.analysis.hardware import DEVICES, GIGA, TERA, Device
from stagetrace.analysis.model_config import FAMILIES
from stagetrace.analysis.operations import CONVENTIONS, FORMULAS
from stagetrace.analysis.sharding import BUS_FACTORS
from stagetrace.instrument import stages
from stagetrace.instrument.hooks import FITS, HookPoint, range_text
from stagetrace.instrument.stages import (
    MAX_ATTRIBUTES,
    STAGES,
    STEP_COMPOSITION,
    STEP_RESULT,
    Attribute,
    Finish,
    Kind,
    Level,
    Phase,
    Stage,
    Timeline,
    Unit,
)

# What releases of the engines have is kept beside the tests of it.
sys.path.insert(0, str(Path(stages.__file__).resolve().parents[1] / "tests"))
from contracts.facts import Facts, judged, kept, package_of, ranged, tables
from contracts.sources import locked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HERE = Path(__file__).parent

# What the enumerations' members mean, by member: a member without a line here fails.
KINDS = {
    Kind.SEGMENT: "a synchronous call on one timeline; the segments of a timeline nest or follow one another",
    Kind.ENVELOPE: "holds segments or states together; envelopes may overlap one another",
    Kind.STATE: "what a request is in; it is in one at a time (a prefill chunk is a part of prefill)",
    Kind.OCCASION: "a segment that belongs to no step: it happens now and then, or is a gap",
}
LEVELS = {
    Level.OFF: "nothing",
    Level.REQUEST: "requests with their states, and what happens now and then",
    Level.STEP: "each scheduler step, its batch and its segments (the default)",
    Level.LAYER: "the segments inside the forward pass",
    Level.KERNEL: "a window of steps under the device's profiler",
}
TIMELINES = {
    Timeline.SCHEDULER: "the thread that runs the scheduler's loop",
    Timeline.RANK: "the thread that runs one rank's worker; it may be the scheduler's",
    Timeline.DEVICE: "one stream of a device: its own times, put on the host's clock",
    Timeline.FRONT_END: "a thread of the process that talks to clients",
    Timeline.REQUEST: "no thread: the life of a request",
    Timeline.ANY: "whichever thread it happened on",
}
PHASES = {
    Phase.PREFILL: "prefill tokens alone were scheduled",
    Phase.DECODE: "no prefill token was scheduled",
    Phase.MIXED: "both were scheduled",
}
FINISHES = {
    Finish.UNKNOWN: "not known: the request is not over, or its end was not recorded",
    Finish.STOP: "an end token or a stop string",
    Finish.LENGTH: "the most tokens that were allowed",
    Finish.ABORT: "the client went away or asked for it",
    Finish.ERROR: "the engine could not go on with it",
    Finish.REPETITION: "the engine found the output repeating itself",
}
UNITS = {
    Unit.COUNT: "a number without a unit, a count or an index",
    Unit.TOKENS: "tokens",
    Unit.BYTES: "bytes",
    Unit.NANOSECONDS: "nanoseconds",
    Unit.PPM: "millionths",
    Unit.ENUM: "one of the values that its meaning lists",
    Unit.HANDLE: "an integer that stands for a name, which a record of its own tells; spans have the name",
}
# One table each; a stage is in the first that takes it.
SECTIONS = {
    "Envelopes": lambda stage: stage.kind is Kind.ENVELOPE,
    "States of a request": lambda stage: stage.kind is Kind.STATE,
    "Occasions": lambda stage: stage.kind is Kind.OCCASION,
    "Segments of the layer level": lambda stage: stage.level >= Level.LAYER and stage.timeline is not Timeline.DEVICE,
    "Segments of the scheduler": lambda stage: stage.timeline is Timeline.SCHEDULER,
    "Segments of a rank": lambda stage: stage.timeline is Timeline.RANK,
    "Segments on the device": lambda stage: stage.timeline is Timeline.DEVICE,
    "Segments of the front end": lambda stage: True,
}


def stages_page() -> str:
    """The vocabulary's page."""
    blocks = [
        "# Stages",
        "<!-- Written by docs/generate.py from instrument/stages.py: change it there. -->",
        "Everything that stagetrace times has one name, in records, spans, tables, metrics and reports. Times are"
        " integer nanoseconds of the host's monotonic clock. `step`, `rank_step` and the segments of a step carry the"
        " kind of their step (its phase) as well. [numbers.md](numbers.md) says how reports are made of these.",
    ]
    left = list(STAGES)
    for title, takes in SECTIONS.items():
        chosen = [stage for stage in left if takes(stage)]
        left = [stage for stage in left if not takes(stage)]
        if chosen:
            blocks += [f"## {title}", stage_table(chosen)]
    composition = [[code(each.name), unit(each), each.means] for each in STEP_COMPOSITION]
    blocks += [
        "## What is in the batch of a step",
        "Known when the step is scheduled. q: tokens of a request in this step; kv: its context after this step.",
        table(("name", "unit", "means"), composition),
        "## What came of a step",
        "Told at its end, where the engine says it.",
        table(("name", "unit", "means"), [[code(each.name), unit(each), each.means] for each in STEP_RESULT]),
        "## Kinds of step",
        table(("phase", "means"), [[code(each.value), PHASES[each]] for each in Phase]),
        "## Why a request ended",
        table(("finish", "number", "means"), [[code(e.name.lower()), str(e.value), FINISHES[e]] for e in Finish]),
        "## Levels",
        "How much is recorded; every level includes those before it.",
        table(("level", "number", "records"), [[code(e.name.lower()), str(e.value), LEVELS[e]] for e in Level]),
        "## Kinds of stage",
        table(("kind", "means"), [[code(each.value), KINDS[each]] for each in Kind]),
        "## Timelines",
        table(("timeline", "means"), [[each.value, TIMELINES[each]] for each in Timeline]),
        "## Units",
        f"Attributes are integers, at most {MAX_ATTRIBUTES} for a stage.",
        table(("unit", "means"), [[code(each.value), UNITS[each]] for each in Unit]),
    ]
    return "\n\n".join(blocks) + "\n"


ARITHMETIC = ("fp32", "tf32", "bf16", "fp16", "fp8", "fp6", "fp4", "int8", "int4")


def speed_of_light_page() -> str:
    """What is counted of a step, how, and the table of hardware."""
    formulas = [[code(each.stage), each.part, each.operations, each.moved, each.source] for each in FORMULAS]
    factors = [[code(op), *(f"{factor(n):g}" for n in (2, 4, 8, 72))] for op, factor in BUS_FACTORS.items()]
    sources = sorted({str(device.source_of(figure)) for device in DEVICES for figure in figures(device)})
    blocks = [
        "# Speed of light",
        "<!-- Written by docs/generate.py from analysis/operations.py, formats.py, sharding.py, model_config.py and"
        " hardware.py: change it there. -->",
        "What a step would take if the hardware did nothing else than what the result needs: the operations and bytes"
        " of every stage, from the model's `config.json` and the sums of the step's record"
        " ([stages.md](stages.md#what-is-in-the-batch-of-a-step)), and what devices can do at most.",
        "## What is counted",
        table(("", "convention"), [[name, text] for name, text in CONVENTIONS]),
        "## Formulas",
        "For each request q tokens in the step and kv after it; S: sums over the requests; pairs: of a token and one"
        " that it sees, S(q kv - q (q - 1) / 2); T: tokens of the step; R: rows of logits; d: width of a head; in and"
        " out: widths of a matrix. Stage `forward`: in no stage of the layer level. All for one rank: with its heads"
        " and its part of the matrices.",
        table(("stage", "part", "operations", "bytes", "source"), formulas),
        "## Collectives",
        "Bytes on the busiest link over bytes of the operation, for 2, 4, 8 and 72 ranks (nccl-tests,"
        " doc/PERFORMANCE.md): over the link's bandwidth in one direction they give the least time.",
        table(("operation", "2", "4", "8", "72"), factors),
        "## Models and formats",
        "Known by `model_type` (tests/engines/test_operations.py compares them with transformers' own code): "
        + ", ".join(code(name) for name in sorted(FAMILIES))
        + ". Another one is taken for a decoder like Llama with what its fields say, and that is said. Quantised"
        " weights: " + ", ".join(code(name) for name in sorted(READERS)) + ". What is not understood is named in each"
        " result.",
        "## Hardware",
        "Dense peaks in TFLOP/s (TOP/s for integers), never those with sparsity; memory in GB (10^9 bytes) and GB/s;"
        " links in GB/s and direction, all links of a device together. A dash is what is not known. Devices are found"
        " by the name that `torch.cuda.get_device_name()` gives; of others, and of parts of a device (MIG),"
        " nothing is known here.",
        table(("device", *ARITHMETIC, "memory", "GB/s", "link", "GB/s"), [device_row(device) for device in DEVICES]),
        "### Names and sources",
        table(("device", "names", "sources", "notes"), [source_row(device, sources) for device in DEVICES]),
        "\n".join(f"{number}. {source}" for number, source in enumerate(sources, 1)),
    ]
    return "\n\n".join(blocks) + "\n"


DIAGNOSIS_KEYS = (
    ("version", "1; a change that breaks readers raises it"),
    ("session", "`path`, `id`, `engine`, `engine_version`, `level`, `last_s` (the window, or null)"),
    ("requests", "how many were measured: neither lost, open nor partial"),
    ("steps", "how many were complete"),
    ("request_time_ns", "of all these requests, from arrival to end"),
    ("attributed", "by phase: `total_ns`, and the `share` of it that is accounted for (null without a time)"),
    ("answer", "null where there are findings, else that nothing stands out, or that there is not enough data"),
    (
        "findings",
        "a list, the most recoverable first: `cause`, `title`, `phase`, `share` (`value`, `low`, `high`),"
        " `measured_ns`, `recoverable_ns`, `recoverable_share` (of the request time), `attributed` (how much of the"
        " phase is accounted for, or null), `evidence` (`what`, `value`, `unit`), `examples` (`kind`: request or step,"
        " `name`, `trace_id`, `ns` of its time), `note` (or null), `next` (`flag`, empty where none does it, `why`)",
    ),
    ("below_threshold", "by cause: what was seen of those that do not stand out, with the same keys"),
    ("absent", "causes of which the session has nothing (no speculation, one rank, ...)"),
    ("not_looked_at", "by cause: `why`, and the level to record at (`record_at`, or null)"),
)


def diagnosis_page() -> str:
    """The causes, their thresholds, and what a finding says."""
    phases = [[each.value, each.means] for each in OfRequest]
    limits = [[code(each.name), f"{each.value:,g}", each.unit, each.reason] for each in THRESHOLDS]
    blocks = [
        "# Diagnosis",
        "<!-- Written by docs/generate.py from analysis/diagnosis/causes.py and thresholds.py: change it there. -->",
        "`stagetrace diagnose` looks for every cause below in a session and shows those that stand out, ranked by the"
        " time that could be recovered, each with its evidence, example traces, and what to try next. Nothing stands"
        " out, and not enough data, are answers as well. `--all` shows the rest too: what was looked at and is small,"
        " and what this session has nothing of. `--explain NAME` says what a cause, a threshold or a number means."
        " `--last 10m`, `--model-config` and `--calibration` are those of `report`.",
        "## What a finding says",
        table(("number", "unit", "means", "does not mean"), [[code(name), *rest] for name, *rest in NUMBERS]),
        "What is recoverable at most is a bound, never a promise: what takes its place is known once it was tried.",
        "* **To look at**: the requests or steps that lost the most, by the trace ids under which they were exported.\n"
        "* **Could not be looked at**: what is missing for it, and the level to record at where that would help.",
        table(("phase", "is"), phases),
        "## Causes",
        *(cause_block(cause) for cause in CAUSES),
        "## Thresholds",
        "Fixed on some seeds of `benchmarks/diagnosis_score.py` and then scored on others, with real engines and causes"
        " put there on purpose ([how often it is right](performance.md)). `usual` is what remains when it is mended.",
        table(("threshold", "value", "of", "reason"), limits),
        "## The JSON object",
        table(("key", "content"), [[code(name), text] for name, text in DIAGNOSIS_KEYS]),
    ]
    return "\n\n".join(blocks) + "\n"


def cause_block(cause: Cause) -> str:
    """A cause with its advice."""
    tries = "\n".join(
        f"* {ENGINES[engine]}: "
        + "; ".join(f"{code(each.flag)}: {each.why}" if each.flag else each.why for each in each_of)
        for engine, each_of in cause.next.items()
    )
    phases = " or ".join(each.value for each in cause.phases)
    return (
        f"### {code(cause.id)}\n\n**{cause.title[:1].upper()}{cause.title[1:]}** ({phases}; from level"
        f" {code(cause.level.name.lower())} on). {cause.means[:1].upper()}{cause.means[1:]}. It does not mean:"
        f" {cause.does_not_mean}. Try next:\n\n{tries}"
    )


ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}  # as they call themselves
LOST = "lost"


def compatibility_page() -> str:
    """What can be recorded of which release."""
    blocks = [
        "# Compatibility",
        "<!-- Written by docs/generate.py from adapters/*/hooks.py and tests/contracts/releases: change it there. -->",
        "Which functions are hooked in which release of an engine, and what is lost where one is not there. It is what"
        " the sources of these releases say (`make test` holds the hook tables against it, `make test-all` against the"
        " sources again); vLLM runs under test from 0.28 to 0.32. In releases between two columns that agree, the same"
        " holds unless the table gives a range. In a newer release than the last column the hooks that fit are"
        " installed, and `stagetrace doctor` says which they are and what is lost.",
        "A cell says `yes`; or the name of the function that is hooked in that release instead; or `none`: the release"
        " does nothing of the kind; or `lost`: it does, in a function that is not hooked, and what the hook point gives"
        " is not to be had.",
    ]
    for engine, points in tables().items():
        blocks += [f"## {ENGINES[engine]}", *compatibility_of(points, releases_of(engine))]
        others = sorted({package_of(point.target) for point in points} - {engine})
        for other in others:
            own = [point for point in points if package_of(point.target) == other]
            blocks += [f"### {other}, in {ENGINES[engine]}'s processes", *compatibility_of(own, releases_of(other))]
    return "\n\n".join(blocks) + "\n"


def releases_of(package: str) -> list[Facts]:
    """What is known of a package's releases, the oldest first."""
    return [kept(release) for release in locked() if release.name == package]


def compatibility_of(points: Sequence[HookPoint], releases: list[Facts]) -> list[str]:
    """The blocks about the hook points that lie in a package: one row for each place, and what is lost."""
    places: dict[str, list[HookPoint]] = {}
    for point in points:
        if package_of(point.target) == releases[0].release.name:
            places.setdefault(point.place, []).append(point)
    columns = ("hook point", "in", "level", *(facts.release.version for facts in releases), "gives")
    rows = []
    for place, candidates in places.items():
        point = next(one for one in candidates if one.target == place)
        cells = [held(place, candidates, facts) for facts in releases]
        rows.append([code(short(place)), code(point.module), point.level.name.lower(), *cells, point.gives])
    lost = [
        f"* {facts.release.version}: " + "; ".join(f"{row[-1]} ({row[0]})" for row in rows if row[number] == LOST)
        for number, facts in enumerate(releases, 3)
        if any(row[number] == LOST for row in rows)
    ]
    ranges = [
        f"* {code(point.target)}: {range_text(point)}"
        for candidates in places.values()
        for point in candidates
        if point.since or point.before
    ]
    return [
        table(columns, rows),
        *(["What is lost:", "\n".join(lost)] if lost else ["Nothing is lost in these releases."]),
        *(["Hook points that are for some releases:", "\n".join(ranges)] if ranges else []),
    ]


def held(place: str, candidates: Sequence[HookPoint], facts: Facts) -> str:
    """What a release has at a place: the cell."""
    ranged_here = [point for point in candidates if ranged(point, facts.release)]
    for point in ranged_here:
        if judged(facts, point)[0] == FITS:
            return "yes" if point.target == place else code(short(point.target))
    return LOST if ranged_here or any(point.missed for point in candidates) else "none"


def short(target: str) -> str:
    """A target without its module."""
    return target.partition(":")[2]


def figures(device: Device) -> list[str]:
    """The figures that a device has."""
    rest = ("memory", "bandwidth", "link_bandwidth")
    return [*device.peaks, *(name for name in rest if getattr(device, name) is not None)]


def device_row(device: Device) -> list[str]:
    """A device's figures, in the page's units."""
    peaks = [device.peaks[name] / TERA if name in device.peaks else None for name in ARITHMETIC]
    memory, bandwidth, link = (
        None if value is None else value / GIGA for value in (device.memory, device.bandwidth, device.link_bandwidth)
    )
    shown = [f"{value:.6g}" if value is not None else "-" for value in (*peaks, memory, bandwidth, link)]
    return [device.name, *shown[:-1], device.link or "-", shown[-1]]


def source_row(device: Device, sources: list[str]) -> list[str]:
    """A device's names, and the numbers of its sources: of all figures, then of the exceptions."""
    others: dict[str, list[str]] = {}
    for figure in figures(device):
        if device.source_of(figure) is not device.source:
            others.setdefault(str(device.source_of(figure)), []).append(figure)
    cited = [str(sources.index(str(device.source)) + 1)]
    cited += [f"{', '.join(names)}: {sources.index(source) + 1}" for source, names in others.items()]
    return [device.name, ", ".join(code(name) for name in device.names), "; ".join(cited), device.notes or "-"]


def stage_table(stages: list[Stage]) -> str:
    """One row a stage, all columns of the vocabulary."""
    columns = ("id", "name", "kind", "timeline", "level", "inside", "means", "does not mean", "attributes")
    rows = [
        [
            str(stage.id),
            code(stage.name),
            stage.kind.value,
            stage.timeline.value,
            stage.level.name.lower(),
            ", ".join(code(name) for name in stage.inside) or "-",
            stage.means,
            stage.does_not_mean,
            "<br>".join(f"{code(each.name)} ({unit(each)}): {each.means}" for each in stage.attributes) or "-",
        ]
        for stage in stages
    ]
    return table(columns, rows)


def table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(name: str) -> str:
    """A name as code."""
    return f"`{name}`"


def unit(attribute: Attribute) -> str:
    """The unit of an attribute, as code."""
    return code(attribute.unit.value)


BLOCK = re.compile(r"(<!-- (definitions|metrics): ([^>]+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def with_blocks(name: str) -> Callable[[], str]:
    """A page that is written by hand but for its blocks of definitions."""
    path = HERE / name

    def page() -> str:
        written = path.read_text("utf-8") if path.is_file() else ""
        return BLOCK.sub(lambda found: found[1] + block(found[2], found[3]) + found[5], written)

    return page


def block(kind: str, section: str) -> str:
    """The table of a section's definitions, or of a group's metrics. Raises ValueError for one that there is not."""
    if kind == "metrics":
        rows = [
            [code(each.name), each.unit.value, each.better.value] for each in METRICS if each.group is Group[section]
        ]
        return table(("metric", "unit", "better"), rows) + "\n"
    chosen = [each for each in DEFINITIONS if each.section == section]
    if not chosen:
        raise ValueError(f"no definition is in section {section!r}")
    columns = ("name", "unit", "means", "how it is made", "does not mean")
    rows = [[code(each.name), each.unit, each.means, each.formula, each.does_not_mean] for each in chosen]
    return table(columns, rows) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "stages.md": stages_page,
    "speed-of-light.md": speed_of_light_page,
    "diagnosis.md": diagnosis_page,
    "compatibility.md": compatibility_page,
    "numbers.md": with_blocks("numbers.md"),
    "comparison.md": with_blocks("comparison.md"),
}


def main(arguments: list[str]) -> int:
    """Writes the pages or, with --check, compares them; the exit status."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    status = 0
    for name, page in PAGES.items():
        path, text = HERE / name, page()
        if not arguments:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"{path} is stale: run `python docs/generate.py`", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
