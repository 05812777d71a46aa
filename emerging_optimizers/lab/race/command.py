"""``soap race``: the words of the command line, read, and the race run to its end or to Ctrl-C."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated

import typer

from emerging_optimizers.lab.common import LabError, StopRequest, claim_folder, make_console, printable, require, tell
from emerging_optimizers.lab.names import OPTIMIZERS, TASKS, files, flag, number, one_of, optimizer_names, option

if TYPE_CHECKING:
    from emerging_optimizers.lab.race.race import Race

SECONDS_BETWEEN_SAVES = 60.0


def race(
    task: Annotated[
        str | None,
        option("TASK", "charlm, digits, pinn or package.module:TaskClass  [default: charlm]", one_of(TASKS)),
    ] = None,
    text: Annotated[Path | None, option("FILE", "UTF-8 text for charlm, instead of the built-in one", files)] = None,
    optimizers: Annotated[
        str | None,
        option("NAMES", f"comma list of {', '.join(OPTIMIZERS)}  [default: all but kl-soap]", optimizer_names),
    ] = None,
    lr: Annotated[
        list[str] | None, option("NAME=RATES", "soap=6e-3,3e-3: peak rates, each a run of its own; repeatable")
    ] = None,
    steps: Annotated[int | None, number("--steps", "optimizer steps per run  [default: the task's]")] = None,
    seeds: Annotated[
        str | None, option("SEEDS", "comma list, each a start and batches of its own  [default: 0]")
    ] = None,
    frequency: Annotated[
        int | None, number("--frequency", "steps between SOAP's eigenbasis refreshes  [default: 10]")
    ] = None,
    threads: Annotated[int | None, number("--threads", "torch's threads  [default: torch's choice]", most=1024)] = None,
    out: Annotated[Path | None, option("FOLDER", "for the report  [default: race-TASK]", files)] = None,
    resume: Annotated[Path | None, option("FOLDER", "continue the stopped race in it", files)] = None,
    overwrite: Annotated[bool, flag("--overwrite", "start over where a race was stopped")] = False,
) -> None:
    """Train one model with several optimizers, from the same start on the same batches, and say which wins."""
    given = {name: value for name, value in locals().items() if name != "resume" and value not in (None, [], False)}
    require("matplotlib", "rich", "numpy")
    import torch

    from emerging_optimizers.lab.race import checkpoint, report
    from emerging_optimizers.lab.race.optimizers import DEFAULT_OPTIMIZERS, is_tuned
    from emerging_optimizers.lab.race.race import Options, Race, saved_options
    from emerging_optimizers.lab.tasks import task_class

    if resume is not None:
        if given:
            extra = ", ".join(f"--{name}" for name in given)
            raise LabError(f"--resume takes its settings from the folder: leave out {extra}")
        state = checkpoint.load(resume)
        torch.set_num_threads(saved_options(state).threads)
        play(Race.restore(state), resume)
        return
    task = "charlm" if task is None else task
    task_class(task)
    if text is not None and task != "charlm":
        raise LabError(f"--text belongs to the task charlm, not to {task}")
    names = DEFAULT_OPTIMIZERS if optimizers is None else read_optimizers(optimizers)
    rates = read_learning_rates(lr or [], names, task)
    untuned = [name for name in names if not any(word.startswith(f"{name}=") for word in lr or [])]
    if untuned and not is_tuned(task):
        print(f"Learning rates of {', '.join(untuned)} are not tuned for this task; compare several with --lr.")
    options = Options(
        task=task,
        text=None if text is None else str(text.absolute()),
        learning_rates=rates,
        seeds=read_seeds("0" if seeds is None else seeds),
        steps=steps,
        frequency=frequency or 10,
        threads=threads or torch.get_num_threads(),
    )
    folder = out or Path(f"race-{task.rpartition(':')[2]}")
    torch.set_num_threads(options.threads)
    fresh = Race(options)
    claim_folder(folder, checkpoint.RESULTS, report.FORMAT, "a race's")
    if (folder / checkpoint.CHECKPOINT).exists() and not overwrite:
        instead = f"go on with soap race --resume {folder}, or start over with --overwrite"
        raise LabError(f"--out {folder}: a race was stopped there; {instead}")
    checkpoint.discard(folder)
    report.write_results(folder, report.collect(fresh))
    play(fresh, folder)


def play(race: Race, folder: Path) -> None:
    """Run a race to its end or to Ctrl-C, and leave report and checkpoint in the folder."""
    from emerging_optimizers.lab.race import checkpoint, display, report

    console = make_console()
    if (note := report.note(race)) is not None:
        tell(console, note)
    display.print_routing(race, console)
    with StopRequest() as stop:
        saved = monotonic()
        with (display.live if console.is_terminal else display.plain)(race, console) as update:
            for run in race.play():
                update(run)
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
    tell(console, verdict)
    tell(console, f"Report: {printable(folder / 'report.html')}")
    if stop.received is not None and not race.finished:
        tell(console, f"Stopped. To go on: soap race --resume {printable(folder)}")
        raise typer.Exit(128 + stop.received)


def read_optimizers(names: str) -> tuple[str, ...]:
    """Read ``a,b,c``."""
    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        _check_optimizer(name, "--optimizers")
    if len(set(chosen)) < len(chosen):
        raise LabError(f"--optimizers {names}: an optimizer is there twice; name each once")
    return chosen


def read_seeds(text: str) -> tuple[int, ...]:
    """Read ``0,1,2``."""
    try:
        seeds = tuple(int(word) for word in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**31 for seed in seeds):
        raise LabError(f"--seeds {text}: expected different whole numbers below 2**31, for example --seeds 0,1,2")
    return seeds


def read_learning_rates(words: Sequence[str], optimizers: Sequence[str], task: str) -> dict[str, tuple[float, ...]]:
    """Read ``["soap=6e-3,3e-3", ...]``; an optimizer that is not mentioned gets its rate from the committed sweep."""
    from emerging_optimizers.lab.race.optimizers import tuned_rate

    given: dict[str, tuple[float, ...]] = {}
    for word in words:
        name, _, values = word.partition("=")
        try:
            rates = tuple(float(value) for value in values.split(","))
        except ValueError:
            rates = ()
        if not rates or not all(rate > 0 and math.isfinite(rate) for rate in rates):
            raise LabError(f"--lr {word}: expected optimizer=rate[,rate...], for example --lr soap=6e-3,3e-3")
        _check_optimizer(name, "--lr")
        if name not in optimizers:
            raise LabError(f"--lr {word}: {name} does not race; add it with --optimizers {','.join(optimizers)},{name}")
        if name in given or len(set(rates)) < len(rates):
            raise LabError(f"--lr {word}: give {name}'s rates once, all different: --lr {name}=6e-3,3e-3")
        given[name] = rates
    return {name: given.get(name) or (tuned_rate(task, name),) for name in optimizers}


def _check_optimizer(name: str, option: str) -> None:
    if name in OPTIMIZERS:
        return
    close = difflib.get_close_matches(name, OPTIMIZERS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise LabError(f"{option}: unknown optimizer {name!r}: {hint}choose from {', '.join(OPTIMIZERS)}")
