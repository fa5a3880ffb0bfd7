"""The command line: each command parses, calls one library function, and prints or writes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper

import typer

from tl_flash.cli.live import explore
from tl_flash.cli.machine import bench
from tl_flash.cli.maps import compare, decode, find, report, show
from tl_flash.cli.models import clamp, demo, explain, layout, lens, validate

app = typer.Typer(
    help="Say what each MLP neuron of a language model stands for, straight from its weights.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for command in (decode, find, show, compare, clamp, validate, explain, lens, layout, report, explore, demo, bench):
    app.command()(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, 1 for a refusal (told in one line), 2 for wrong usage, 130 when interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a console that cannot show a token shows its escape
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=argv, prog_name="tl-flash")
    except SystemExit as end:
        return int(end.code or 0)
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
        return 1
    return 0
