"""The command line ``soap``. Mistakes are answered with one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from typing import Annotated

from emerging_optimizers import __version__
from emerging_optimizers.lab.common import EXTRA, LabError, printable

try:
    import typer
except ModuleNotFoundError:
    print(f"soap: {EXTRA}", file=sys.stderr)
    raise SystemExit(2) from None

from emerging_optimizers.lab.inspect import inspect  # noqa: E402 (typer first: all else needs it)
from emerging_optimizers.lab.plan import plan  # noqa: E402
from emerging_optimizers.lab.race.command import race  # noqa: E402

ABOUT = "Plan the SOAP optimizer for a model, race it, or look into its state."
#: typer's own sentences for these two take four lines of the help.
COMPLETION_HELP = {
    "install_completion": "set up Tab completion for this shell and exit",
    "show_completion": "print that set-up and exit",
}
app = typer.Typer(help=ABOUT, rich_markup_mode=None)
app.command(short_help="what SOAP will cost on a model, in memory and FLOPs")(plan)
app.command(short_help="train a model with SOAP and its rivals, and see who wins")(race)
app.command(short_help="is a saved optimizer state healthy?")(inspect)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"soap {__version__}")
        raise typer.Exit


@app.callback()
def soap(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Plan the SOAP optimizer for a model, race it, or look into its state."""


def _in_command(error: typer.TyperException, arguments: list[str]) -> str:
    """The command in which a mistake was made, as its user typed it."""
    context = getattr(error, "ctx", None)
    if context is not None:
        return str(context.command_path)
    return " ".join(["soap", *(word for word in arguments[:1] if word in ("plan", "race", "inspect"))])


def _complain(message: str) -> int:
    print(f"soap: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after ``soap``, none of them for the help; None takes the process's own.

    Returns:
        The exit code: 0, 1 for a budget that no options meet, 2 for a mistake in the command, 130 or 143 after a stop
        by signal.
    """
    command = typer.main.get_command(app)
    for parameter in command.params:
        if isinstance(parameter, typer.core.TyperOption):
            parameter.help = COMPLETION_HELP.get(str(parameter.name), parameter.help)
    given = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = command(given, standalone_mode=False, prog_name="soap")
    except LabError as error:
        return _complain(str(error))
    except typer.TyperException as error:
        message = error.format_message()
        stop = "" if message.endswith((".", "?", "!")) else "."
        return _complain(f"{message}{stop} See {_in_command(error, given)} --help.")
    except OSError as error:  # a full disk, a folder that was taken away during the race
        return _complain(f"{error.filename or 'the output folder'}: {error.strerror}")
    except ModuleNotFoundError as error:
        if error.name not in {"matplotlib", "numpy", "rich", "sklearn"}:
            raise
        return _complain(EXTRA)
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
