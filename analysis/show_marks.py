"""How a report shows what marks told of the device: tables for people, and a list of its JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .marks import NOT_TOLD, advice, unread
from .show import MISSING, Grid, Part, duration_text, message_text, plain, share_text
from .show_device import distribution_dict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stagetrace.instrument.stages import Level

    from .marks import MarkedStage, MarkInfo, RankMarks

_ABOUT = (
    "Of the layers with marks alone, in steps that passed them; `all layers` supposes that the others are like them."
    " Launch gaps around a stage's kernels are in its time, but for what two marks with nothing between them take."
    " A collective's time has the wait for other ranks in it: marks of one rank do not tell it from moving bytes."
)


def marks_dict(rank: RankMarks, names: Mapping[int, str]) -> dict[str, Any]:
    """What a report's JSON has of a rank's marks; `names` of processes, by their key."""
    return {"process": names.get(rank.process, ""), **info_dict(rank.info), "told": [_told(x) for x in rank.stages]}


def info_dict(info: MarkInfo) -> dict[str, Any]:
    """What a process said of its marks."""
    return {
        "by": info.by,
        "why": info.why,
        "stages": list(info.stages),
        "marked_layers": list(info.layers),
        "marks_per_step": info.per_step,
        "empty_ns": info.empty_ns,
        "not_visible": list(info.not_visible),
        "not_told": dict(info.not_told),
    }


def _told(stage: MarkedStage) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "phase": stage.phase,
        "passed_steps": stage.steps,
        "layers": stage.layers,
        "count": stage.count,
        "total_ns": stage.total_ns,
        "share_of_forward": stage.share,
        "estimated_share": stage.estimated_share,
        "duration": distribution_dict(stage.duration),
        "by_layer": [
            {
                "layer": each.layer,
                "count": each.count,
                "total_ns": each.total_ns,
                "duration": distribution_dict(each.duration),
            }
            for each in stage.by_layer
        ],
    }


def marks_parts(marks: Sequence[RankMarks], names: Mapping[int, str], level: Level | None) -> list[Part]:
    """A table of what marks told, one of what they did not, and what to do; nothing where no marks were chosen."""
    shown: list[Part] = []
    rows = []
    for rank in marks:
        name = plain(names.get(rank.process, ""))
        for each in rank.stages:
            times = (each.total_ns, each.duration.p50, each.duration.p95, each.duration.p99)
            total, *middle = map(duration_text, times)
            counts = str(each.layers), str(each.steps), str(each.count)
            shares = share_text(each.share), share_text(each.estimated_share)
            rows.append([name, each.stage, each.phase or MISSING, *counts, total, *shares, *middle])
            name = ""
    columns = (
        *("rank", "stage", "steps of", "layers", "steps", "spans", "total", "of forward", "all layers"),
        *("p50", "p95", "p99"),
    )
    if rows:
        shown += [Grid("Inside the forward pass on the device, by marks", columns, rows), _ABOUT]
    amiss = [rank for rank in marks if rank.info.not_told]
    if amiss:
        heads = ("rank", *(name.replace("_", " ") for name in NOT_TOLD))
        lines = [
            [plain(names.get(rank.process, "")), *(str(rank.info.not_told.get(name, 0)) for name in NOT_TOLD)]
            for rank in amiss
        ]
        shown.append(Grid("What marks did not tell", heads, lines))
    troubles = advice((names.get(rank.process, ""), rank.info) for rank in marks)
    if missing := unread(level, marks):
        troubles.append(missing)
    return shown + [message_text(trouble) for trouble in troubles]
