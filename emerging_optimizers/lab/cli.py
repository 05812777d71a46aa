"""The command line ``soap``. Mistakes are answered with one line on stderr and exit code 2."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated

# Not by the name: on an index it stands for another distribution.
EXTRA = 'this command needs an extra; in your clone of the repository: pip install ".[lab]"'

try:
    import typer
except ModuleNotFoundError:
    print(f"soap: {EXTRA}", file=sys.stderr)
    raise SystemExit(2) from None

from emerging_optimizers import __version__  # noqa: E402 (typer first: all else needs it)
from emerging_optimizers.lab import arguments as words  # noqa: E402
from emerging_optimizers.lab.errors import LabError  # noqa: E402
from emerging_optimizers.lab.planning import plan  # noqa: E402
from emerging_optimizers.lab.printable import printable  # noqa: E402

if TYPE_CHECKING:
    from emerging_optimizers.lab.options import Options
    from emerging_optimizers.lab.race import Race

SECONDS_BETWEEN_SAVES = 60.0
COMMANDS = ("plan", "race", "inspect")

ABOUT = "Plan the SOAP optimizer for a model, race it, or look into its state."
#: typer's own sentences for these two take four lines of the help.
COMPLETION_HELP = {
    "install_completion": "set up Tab completion for this shell and exit",
    "show_completion": "print that set-up and exit",
}
app = typer.Typer(help=ABOUT, rich_markup_mode=None)
app.command(short_help="what SOAP will cost on a model, in memory and FLOPs")(plan)


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


@app.command(short_help="train a model with SOAP and its rivals, and see who wins")
def race(
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="charlm, digits, pinn or package.module:TaskClass  [default: charlm]",
            autocompletion=words.task_names,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="UTF-8 text for charlm, instead of the built-in one", autocompletion=words.files
        ),
    ] = None,
    optimizers: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="comma list of soap, soap-kronecker, kl-soap, adamw, muon  [default: all but kl-soap]",
            autocompletion=words.optimizer_names,
        ),
    ] = None,
    lr: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=RATES", help="soap=6e-3,3e-3: peak rates, each a run of its own; repeatable"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", parser=words.whole_number("--steps"), help="optimizer steps per run  [default: the task's]"
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="SEEDS", help="comma list, each a start and batches of its own  [default: 0]")
    ] = None,
    frequency: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=words.whole_number("--frequency"),
            help="steps between SOAP's eigenbasis refreshes  [default: 10]",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=words.whole_number("--threads", most=1024),
            help="torch's threads  [default: torch's choice]",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="for the report  [default: race-TASK]", autocompletion=words.files),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="continue the stopped race in it", autocompletion=words.files),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start over where a race was stopped")] = False,
) -> None:
    """Train one model with several optimizers, from the same start on the same batches, and say which wins."""
    for package in ("matplotlib", "rich", "numpy"):  # found missing now, not when the race has been run
        if importlib.util.find_spec(package) is None:
            raise LabError(EXTRA)
    import torch

    from emerging_optimizers.lab import checkpoint, report
    from emerging_optimizers.lab.race import Race, saved_options

    if resume is not None:
        given = {"--task": task, "--text": text, "--optimizers": optimizers, "--lr": lr, "--steps": steps,
                 "--seeds": seeds, "--frequency": frequency, "--threads": threads, "--out": out,
                 "--overwrite": overwrite or None}  # fmt: skip
        if extra := [option for option, value in given.items() if value not in (None, [])]:
            raise LabError(f"--resume takes its settings from the folder: leave out {', '.join(extra)}")
        state = checkpoint.load(resume)
        torch.set_num_threads(saved_options(state).threads)
        _play(Race.restore(state), resume)
        return
    task, seeds = "charlm" if task is None else task, "0" if seeds is None else seeds
    options = _options(task, text, optimizers, lr or [], steps, seeds, frequency or 10, threads)
    folder = out or Path(f"race-{options.task.rpartition(':')[2]}")
    torch.set_num_threads(options.threads)
    fresh = Race(options)
    report.claim(folder)
    if (folder / checkpoint.CHECKPOINT).exists() and not overwrite:
        instead = f"go on with soap race --resume {folder}, or start over with --overwrite"
        raise LabError(f"--out {folder}: a race was stopped there; {instead}")
    checkpoint.discard(folder)
    report.write_results(folder, report.collect(fresh))
    _play(fresh, folder)


@app.command(short_help="is a saved optimizer state healthy?")
def inspect(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="file of torch.save: an optimizer's state dict or a dict with one",
            autocompletion=words.files,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="for a page with the spectra of all factors", autocompletion=words.files),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON instead of a table")] = False,
) -> None:
    """Measure a saved optimizer state: is every basis fresh and orthogonal, does every gradient live?

    The worst tensors come first, and what is wrong is said in words. The file is only read, and nothing in it executed.
    """
    for package in ("matplotlib", "rich"):
        if importlib.util.find_spec(package) is None:
            raise LabError(EXTRA)
    from emerging_optimizers.lab import inspection, inspection_report

    if out is not None:
        inspection_report.claim(out)
    found = inspection.inspect_file(checkpoint)
    if out is not None:
        inspection_report.write(out, checkpoint, found)
    if as_json:
        print(json.dumps(inspection.to_json(checkpoint, found), indent=1, allow_nan=False))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a pipe has no width of its own
    inspection_report.show(found, console)
    if out is not None:
        page = f"Page: {printable(out / inspection_report.PAGE)}"
        console.print(page, markup=False, highlight=False, soft_wrap=True)


def _options(task: str, text: Path | None, optimizers: str | None, lr: list[str], steps: int | None, seeds: str,
             frequency: int, threads: int | None) -> Options:  # fmt: skip
    """Read the words of the command line.

    Raises:
        LabError: one of them is wrong.
    """
    import torch

    from emerging_optimizers.lab.optimizers import DEFAULT_OPTIMIZERS, is_tuned
    from emerging_optimizers.lab.options import Options, read_learning_rates, read_optimizers, read_seeds
    from emerging_optimizers.lab.tasks import task_class

    task_class(task)
    if text is not None and task != "charlm":
        raise LabError(f"--text belongs to the task charlm, not to {task}")
    names = DEFAULT_OPTIMIZERS if optimizers is None else read_optimizers(optimizers)
    rates = read_learning_rates(lr, names, task)
    untuned = [name for name in names if not any(word.startswith(f"{name}=") for word in lr)]
    if untuned and not is_tuned(task):
        print(f"Learning rates of {', '.join(untuned)} are not tuned for this task; compare several with --lr.")
    return Options(
        task=task,
        text=None if text is None else str(text.absolute()),
        learning_rates=rates,
        seeds=read_seeds(seeds),
        steps=steps,
        frequency=frequency,
        threads=threads or torch.get_num_threads(),
    )


def _play(race: Race, folder: Path) -> None:
    """Run a race to its end or to Ctrl-C, and leave report and checkpoint in the folder."""
    from rich.console import Console

    from emerging_optimizers.lab import checkpoint, display, report
    from emerging_optimizers.lab.signals import StopRequest

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a pipe has no width of its own
    if (note := report.note(race)) is not None:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    display.print_routing(race, console)
    with StopRequest() as stop:
        saved = monotonic()
        with display.display_for(race, console) as show:
            for run in race.play():
                show.update(run)
                if stop.received is not None:
                    break
                if monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    checkpoint.save(folder, race.state())
                    saved = monotonic()
        if not race.finished:
            checkpoint.save(folder, race.state())
        lines, verdict = report.write(folder, race)
        if race.finished:  # only after the report: until then the checkpoint is all there is
            checkpoint.discard(folder)
    display.print_summary(lines, console)
    console.print(verdict, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report: {printable(folder / 'report.html')}", markup=False, highlight=False, soft_wrap=True)
    if stop.received is not None and not race.finished:
        again = f"Stopped. To go on: soap race --resume {printable(folder)}"
        console.print(again, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(128 + stop.received)


def _in_command(error: typer.TyperException, arguments: list[str]) -> str:
    """The command in which a mistake was made, as its user typed it."""
    context = getattr(error, "ctx", None)
    if context is not None:
        return str(context.command_path)
    return " ".join(["soap", *(word for word in arguments[:1] if word in COMMANDS)])


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
