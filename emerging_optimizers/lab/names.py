"""What the command line needs before torch is there: names to complete, and how its options are written.

A shell waits for a completion, so nothing here imports torch. The names stand here a second time, and
``tests/lab/test_completion.py`` compares them with those that the commands know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from emerging_optimizers.lab.common import LabError

PRESETS = ("gpt2", "gpt2-xl", "llama-3-8b", "llama-3-70b", "resnet50", "vit-b")
TASKS = ("charlm", "digits", "pinn")
OPTIMIZERS = ("soap", "soap-kronecker", "kl-soap", "adamw", "muon")
DTYPES = ("float32", "bfloat16", "float16", "float64")
LARGEST = 10**15


def option(metavar: str, text: str, complete: Callable[[str], list[str]] | None = None) -> Any:
    """Describe an option that takes a word."""
    return typer.Option(metavar=metavar, help=text, autocompletion=complete)


def number(name: str, text: str, least: int = 1, most: int = LARGEST) -> Any:
    """Describe an option that takes a whole number; ``name`` is for the complaint."""

    def read(word: str) -> int:
        try:
            value = int(word)
        except ValueError:  # no number, or one of more digits than Python reads
            value = least - 1
        if not least <= value <= most:
            limits = f"of at least {least}" if most == LARGEST else f"from {least} to {most:,}"
            raise LabError(f"{name} {word}: expected a whole number {limits}")
        return value

    return typer.Option(metavar="N", parser=read, help=text)


def flag(name: str, text: str) -> Any:
    """Describe an option that is there or not."""
    return typer.Option(name, help=text)


def one_of(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Complete one of these names; nothing where it is none, so that the shell goes on with files."""
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]


def optimizer_names(incomplete: str) -> list[str]:
    """Complete the last name of a comma list, with those that are not in it yet."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in one_of(OPTIMIZERS)(last) if name not in before.split(",")]


def files(incomplete: str) -> list[str]:
    """Leave a file to the shell, which completes one where a command has nothing to say."""
    return []
