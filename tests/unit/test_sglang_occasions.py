"""Tests of what happens now and then in SGLang, without it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from unit.decoded import decoded_batch
from unit.rings import opened, read_all

from stagetrace.adapters.sglang import occasions
from stagetrace.instrument.stages import BY_NAME

if TYPE_CHECKING:
    from pathlib import Path


def segments(reader: Any) -> list[tuple[int, ...]]:
    """Stage, begin and end of each."""
    return [(words[1], *words[3:5]) for words in decoded_batch(read_all(reader)).segments]


def test_a_rank_sleeps_until_nothing_is_released_any_more(tmp_path: Path) -> None:
    with opened(tmp_path) as (recorder, reader):
        read_all(reader)
        hook: Any = SimpleNamespace(recorder=recorder)
        sleeps: Any = occasions.falls_asleep(hook).before
        wakes: Any = occasions.wakes_up(hook).after
        wakes(SimpleNamespace(), 5)  # it was awake
        sleeps(10)
        sleeps(20)
        wakes(SimpleNamespace(offload_tags={"weights"}), 30)
        wakes(SimpleNamespace(offload_tags=set()), 40)
        wakes(SimpleNamespace(offload_tags=set()), 50)
        assert segments(reader) == [(BY_NAME["sleep"].id, 10, 40)]


def test_a_time_without_records_is_no_sleep(tmp_path: Path) -> None:
    with opened(tmp_path) as (recorder, reader):
        read_all(reader)
        hook: Any = SimpleNamespace(recorder=recorder)
        around: Any = occasions.wakes_up(hook)
        sleeps: Any = occasions.falls_asleep(hook).before
        sleeps(10)
        around.off()  # it woke while nothing was recorded
        around.after(SimpleNamespace(), 40)
        assert segments(reader) == []


def test_an_occasion_is_a_segment_of_no_step(tmp_path: Path) -> None:
    with opened(tmp_path) as (recorder, reader):
        read_all(reader)
        after: Any = occasions.occasion("eplb_rebalance")(SimpleNamespace(recorder=recorder)).after  # type: ignore[arg-type]
        after(10, 30)
        assert segments(reader) == [(BY_NAME["eplb_rebalance"].id, 10, 30)]
