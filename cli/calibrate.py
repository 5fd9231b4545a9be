"""stagetrace calibrate: measures what this machine's device does at most, for reports to compare with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    python: Annotated[
        str, typer.Option(help="The Python that has torch, as that of the engine. Default: this one.")
    ] = sys.executable,
    device: Annotated[str, typer.Option(help="As torch names it: cpu, cuda, cuda:1 (NVIDIA and AMD).")] = "cpu",
    threads: Annotated[
        int,
        typer.Option(min=0, max=4096, help="Of the processor, as the engine has (OMP_NUM_THREADS). 0: torch's own."),
    ] = 0,
    ranks: Annotated[
        int, typer.Option(min=1, max=64, help="Processes for the collectives, a device each. 1: none are measured.")
    ] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer sizes and rounds: a first look, in half a minute.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="A component: memory, gemm, attention, experts or collective; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file. Default: where `stagetrace report` finds it, by the device's name.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it as well: a file that ends in .svg, .png or .pdf (needs matplotlib).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the calibration as JSON instead of tables.")] = False,
) -> None:
    """Measure memory, matrix products, attention, experts and collectives of a device, each alone.

    Let the machine be quiet meanwhile: what else runs makes the ceilings too low, and is said. On a processor, measure
    with the number of threads that the engine has. Takes two to ten minutes; nothing is changed on the device. Exit
    status: 0, 2 when nothing could be measured.
    """
    # Imported here: pandas and rich take longer to import than most commands to run.
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import Progress

    from stagetrace.analysis.calibration import results, show
    from stagetrace.analysis.calibration.cases import COMPONENTS
    from stagetrace.analysis.calibration.measure import Asked
    from stagetrace.analysis.calibration.run import calibrate as measure
    from stagetrace.analysis.show import print_parts

    if unknown := set(only or ()) - set(COMPONENTS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: name some of {', '.join(COMPONENTS)}")
    try:
        if plot is not None:
            show.check_plot(plot)
        with Progress(transient=True, console=Console(stderr=True)) as bar:
            task = bar.add_task("starting torch", total=None)
            found = measure(
                python,
                Asked(device, quick, threads, ranks, tuple(only or ())),
                lambda name, done, of: bar.update(task, description=name, completed=done, total=of),
            )
        path = out or results.directory() / results.file_name(found.name, found.threads)
        before = results.load(path) if path.is_file() else None
        results.save(found, path)
        if plot is not None:
            show.draw(found, plot)
    except (results.CalibrationError, OSError) as error:
        typer.echo(f"stagetrace calibrate: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
    else:
        print_parts([*show.parts(found, before), str(path)], Console())
