"""Writes docs/stages.md, the vocabulary's page, from the table in instrument/stages.py.

python docs/generate.py            writes the page
python docs/generate.py --check    exits with 1 when the page is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path

from stagetrace.instrument.stages import (
    MAX_ATTRIBUTES,
    STAGES,
    STEP_COMPOSITION,
    Attribute,
    Finish,
    Kind,
    Level,
    Phase,
    Stage,
    Timeline,
    Unit,
)

PAGE = Path(__file__).with_name("stages.md")

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
    Timeline.DEVICE: "one stream of a device, on the device's own clock",
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
}
# One table each; a stage is in the first that takes it.
SECTIONS = {
    "Envelopes": lambda stage: stage.kind is Kind.ENVELOPE,
    "States of a request": lambda stage: stage.kind is Kind.STATE,
    "Occasions": lambda stage: stage.kind is Kind.OCCASION,
    "Segments of the layer level": lambda stage: stage.level >= Level.LAYER,
    "Segments of the scheduler": lambda stage: stage.timeline is Timeline.SCHEDULER,
    "Segments of a rank": lambda stage: stage.timeline is Timeline.RANK,
    "Segments on the device": lambda stage: stage.timeline is Timeline.DEVICE,
    "Segments of the front end": lambda stage: True,
}


def page() -> str:
    """The whole page."""
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


def main(arguments: list[str]) -> int:
    """Writes the page or, with --check, compares it; the exit status."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    if not arguments:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE} is stale: run `python docs/generate.py`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
