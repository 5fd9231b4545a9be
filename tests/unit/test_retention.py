"""What `--keep` means, and which commits go."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagetrace.exporters.parts import Part
from stagetrace.exporters.retention import Keep, last_to_remove, parse_keep

HOUR = 3600


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("24h", Keep(24 * HOUR)),
        ("10GB", Keep(None, 10**10)),
        ("1.5h, 500 MiB", Keep(1.5 * HOUR, 500 << 20)),
        ("10gb,7d", Keep(7 * 24 * HOUR, 10**10)),
        ("all", Keep()),
    ],
)
def test_bounds(text: str, keep: Keep) -> None:
    assert parse_keep(text) == keep


@pytest.mark.parametrize(
    "text", ["", "much", "10", "0GB", "-1h", "1h,2h", "1GB,2GB", "1e9GB", "24H", "10 GBs", "9" * 400 + "GB"]
)
def test_what_is_no_bound_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="write an age"):
        parse_keep(text)


PARTS = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 100)), max_size=20)


@given(PARTS, st.none() | st.integers(0, 100), st.none() | st.integers(0, 20_000))
def test_the_oldest_go_until_the_rest_is_within_bounds(
    drawn: list[tuple[int, int]], age: int | None, size: int | None
) -> None:
    drawn.sort(key=lambda one: -one[1])  # the oldest first
    sizes = [(Part(number, number, Path()), part) for number, (part, _) in enumerate(drawn, 1)]
    last = last_to_remove(sizes, [age_s for _, age_s in drawn], Keep(age, size))
    assert last <= max(len(drawn) - 1, 0), "the newest stays"
    rest = drawn[last:]
    if len(rest) > 1:
        assert size is None or sum(part for part, _ in rest) <= size
        assert age is None or rest[0][1] <= age
    if last:  # and no more went than had to
        kept = drawn[last - 1 :]
        large = size is not None and sum(part for part, _ in kept) > size
        assert large or (age is not None and kept[0][1] > age)
