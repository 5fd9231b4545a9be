"""The command `stagetrace`: its subcommands, one file each."""

from __future__ import annotations

import typer

from .calibrate import calibrate
from .collect import collect
from .compare import compare
from .ctl import ctl
from .diagnose import diagnose
from .doctor import doctor
from .export import export
from .follow import follow
from .rebuild import rebuild
from .report import report
from .run import run
from .top import top

app = typer.Typer(
    name="stagetrace",
    help="Where the time goes in LLM inference, and what to do about it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PASS_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}
app.command(context_settings=PASS_ON)(run)
app.command()(report)
app.command()(compare)
app.command()(diagnose)
app.command()(top)
app.command()(collect)
app.command()(export)
app.command()(rebuild)
app.command()(calibrate)
app.command()(doctor)
app.command(hidden=True)(follow)
app.add_typer(ctl)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
