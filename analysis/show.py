"""How numbers and tables are shown: units in cells, strings from outside made safe, rich tables or plain text."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

MISSING = "-"
LONGEST_NAME = 200

# Cells


def duration_text(nanoseconds: float | None) -> str:
    """A time with three significant digits, in ns, µs, ms or s, whichever has one to three digits before the point."""
    if nanoseconds is None:
        return MISSING
    for unit, size in (("ns", 1.0), ("µs", 1e3), ("ms", 1e6)):
        digits = _three_digits(nanoseconds / size)
        if abs(float(digits)) < 1000:
            return f"{digits} {unit}"
    return f"{_three_digits(nanoseconds / 1e9)} s"


def number_text(number: float | None) -> str:
    """A count as it is, another number with three significant digits, more when it has more before the point."""
    if number is None:
        return MISSING
    return str(number) if isinstance(number, int) else _three_digits(number)


def rate_text(amount: float | None, unit: str) -> str:
    """A large number with three significant digits and a decimal prefix, k to E, and its unit."""
    if amount is None:
        return MISSING
    for prefix in ("", "k", "M", "G", "T", "P"):
        digits = _three_digits(amount)
        if abs(float(digits)) < 1000:
            return f"{digits} {prefix}{unit}".rstrip()
        amount /= 1000
    return f"{_three_digits(amount)} E{unit}"


def _three_digits(number: float) -> str:
    if not number:
        return "0"
    exponent = int(f"{number:.2e}".partition("e")[2])  # after rounding: 9.999 has two digits before the point
    return f"{number:.{max(2 - exponent, 0)}f}"


def share_text(share: float | None) -> str:
    """A share in percent."""
    return MISSING if share is None else f"{share:.1%}"


def plain(text: str, longest: int = LONGEST_NAME) -> str:
    """A string from outside, safe to show: bounded, what could steer a terminal or turn the text around spelled out."""
    shown = text if len(text) <= longest else text[:longest] + "..."
    return "".join(
        character.encode("unicode_escape").decode("ascii") if _steers(character) else character for character in shown
    )


def _steers(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def message_text(message: str) -> str:
    """A message with a line of its own for what to do; what came from outside is safe to show."""
    lines = message.replace(" What to do: ", "\nWhat to do: ").splitlines()
    return "\n".join("".join(plain(piece) for piece in _pieces(line)) for line in lines)


def _pieces(line: str) -> list[str]:
    """A line in pieces that `plain` does not cut: unlike a name, a message is to be read whole."""
    return [line[at : at + LONGEST_NAME] for at in range(0, len(line), LONGEST_NAME)]


# Tables


@dataclass(frozen=True)
class Grid:
    """A table before it is drawn. The first column is a name, the others are numbers unless `text` says otherwise."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: bool = False


Part = Grid | str


def print_parts(parts: Iterable[Part], console: Console) -> None:
    """Prints tables and texts: rich tables on a terminal, else aligned plain text that no width wraps."""
    for part in parts:
        if not console.is_terminal:
            text = (_aligned(part) if isinstance(part, Grid) else part) + "\n"
            console.out(encodable(text, console.encoding), highlight=False)
        elif isinstance(part, Grid):
            console.print(Text(part.title, style="bold"), _drawn(part), sep="\n")
        else:
            console.print(Text(part + "\n"))


def _drawn(grid: Grid) -> Table:
    headed = any(grid.columns)
    table = Table(box=box.SIMPLE, show_header=headed, pad_edge=False)
    for number, name in enumerate(grid.columns):
        table.add_column(name, justify=_justify(grid, number), overflow="fold")
    for row in grid.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _aligned(grid: Grid) -> str:
    lines = [list(grid.columns), *grid.rows] if any(grid.columns) else list(grid.rows)
    widths = [max(cell_len(line[number]) for line in lines) for number in range(len(grid.columns))] if lines else []
    drawn = [grid.title]
    for line in lines:
        cells = []
        for number, (cell, width) in enumerate(zip(line, widths, strict=True)):
            space = " " * (width - cell_len(cell))
            cells.append(cell + space if _justify(grid, number) == "left" else space + cell)
        drawn.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(drawn)


def _justify(grid: Grid, column: int) -> Literal["left", "right"]:
    return "left" if grid.text or column == 0 else "right"


def encodable(text: str, encoding: str) -> str:
    """The text in what the output can encode: a pipe may be ASCII, and a report must not end in an error for a µ."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return text.replace("µ", "u").encode("ascii", "backslashreplace").decode("ascii")
    return text
