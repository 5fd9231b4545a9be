"""A calibration as tables for people, and as a drawing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..sharding import BUS_FACTORS
from ..show import Grid, duration_text, plain, rate_text, share_text
from .cases import size_text
from .ceilings import ceilings_of
from .results import CalibrationError, by_chance, changes

if TYPE_CHECKING:
    from pathlib import Path

    from ..show import Part
    from .results import Calibration, Row

FORMATS = (".svg", ".png", ".pdf")
_TITLES = {
    "memory": "Memory",
    "gemm": "Matrix products: rows x inputs x outputs",
    "attention": "Attention",
    "experts": "Experts, in one grouped product",
    "collective": "Collectives",
}
_MOST_CHANGES = 5


def parts(found: Calibration, before: Calibration | None) -> list[Part]:
    """All that was measured, what was not, the ceilings that follow, and how they compare with those before."""
    about = found.device
    shown: list[Part] = [plain(f"{found.source}; torch {about.get('torch')}; {len(found.rows)} measurements")]
    for component, title in _TITLES.items():
        rows = [row for row in found.rows if row.component == component]
        if rows:
            shown.append(_grid(title, rows))
    for why, names in _by_reason(found.skipped).items():
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        shown.append(plain(f"Left out: {some}: {why}", 500))
    ceilings = ceilings_of(found)
    peaks = ", ".join(f"{plain(name)} {rate_text(rate, '/s')}" for name, rate in ceilings.peaks.items())
    shown.append(f"Ceilings: {peaks or 'no arithmetic'}; memory {_bandwidth(ceilings.bandwidths)}.")
    if found.busy:
        shown.append(
            f"THE MACHINE WAS BUSY: {found.busy}. These ceilings may be too low: measure again when it is quiet."
        )
    if before is not None:
        beyond, both = changes(found, before)
        shown.append(
            f"Against the one before: of {both} measurements {len(beyond)} differ by more than their spread"
            f" (where nothing has changed, about {by_chance(found, before):.0f} do)."
        )
        for change in beyond[:_MOST_CHANGES]:
            words = " ".join(str(word) for word in change.row.name[:-1] if word)
            shown.append(plain(f"  {words}: {change.ratio:.2f} of its rate before"))
    return shown


def _bandwidth(rates: tuple[tuple[float, float], ...]) -> str:
    if not rates:
        return "not measured"
    (small, fast), (large, slow) = rates[0], rates[-1]
    return f"{rate_text(fast, 'B/s')} at {size_text(int(small))}, {rate_text(slow, 'B/s')} at {size_text(int(large))}"


def _by_reason(skipped: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, why in skipped.items():
        found.setdefault(why, []).append(name)
    return found


def _grid(title: str, rows: list[Row]) -> Grid:
    computes = any(row.operations for row in rows)
    lines = []
    for row in rows:
        bus = BUS_FACTORS[row.op](row.ranks) if row.component == "collective" and row.op in BUS_FACTORS else 1.0
        lines.append(
            [
                plain(", ".join(word for word in (row.op, row.arithmetic, row.kernel, row.size) if word)),
                duration_text(row.best_s * 1e9),
                duration_text(row.median_s * 1e9),
                share_text(row.spread),
                *([rate_text(row.operations_per_s, "/s")] if computes else []),
                rate_text(row.bytes_per_s * bus, "B/s"),
            ]
        )
    rates = ("operations", "memory") if computes else ("rate",)
    return Grid(title, ("", "best", "median", "spread", *rates), lines)


# Drawing


def check_plot(path: Path) -> None:
    """Raises CalibrationError when it cannot be drawn: before minutes of measuring."""
    if path.suffix not in FORMATS:
        raise CalibrationError(f"{path} cannot be drawn: name a file that ends in {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CalibrationError("to draw needs matplotlib: pip install 'stagetrace[plots]'") from None


def draw(found: Calibration, path: Path) -> None:
    """Rates over sizes: memory, matrix products, collectives; bands are the middle half of the samples."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(18, 5.5), layout="constrained")
    memory = [row for row in found.rows if row.component == "memory"]
    _lines(axes[0], memory, lambda row: f"{row.op} ({row.kernel})", lambda row: float(row.bytes), "bytes", 1e9)
    axes[0].set(title="Memory by working set", xlabel="bytes", ylabel="GB/s")
    products = [row for row in found.rows if row.component in ("gemm", "experts")]
    _lines(
        axes[1],
        products,
        lambda row: f"{row.component} {row.arithmetic}",
        lambda row: row.operations / max(row.bytes, 1),
        "operations",
        1e12,
    )
    axes[1].set(title="Matrix products by intensity", xlabel="operations per byte", ylabel="TFLOP/s")
    together = [row for row in found.rows if row.component == "collective"]
    _lines(axes[2], together, lambda row: row.op, lambda row: float(row.bytes), "bytes", 1e9)
    axes[2].set(title="Collectives" if together else "Collectives: not measured", xlabel="bytes", ylabel="GB/s")
    figure.suptitle(found.source)
    figure.savefig(path)
    pyplot.close(figure)


def _lines(axis: Any, rows: list[Row], label: Any, where: Any, amount: str, unit: float) -> None:
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(label(row), []).append(row)
    for name, own in lines.items():
        own.sort(key=where)
        at = [where(row) for row in own]
        (drawn,) = axis.plot(at, [getattr(row, amount) / row.best_s / unit for row in own], marker="o", label=name)
        low = [getattr(row, amount) / row.q3_s / unit for row in own]
        high = [getattr(row, amount) / row.q1_s / unit for row in own]
        axis.fill_between(at, low, high, alpha=0.15, color=drawn.get_color())
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(visible=True, which="both", alpha=0.2)
    if lines:
        axis.legend(fontsize="small")
