"""Words of the command line: whole numbers with their limits, and what a shell may complete.

Nothing here imports torch: a shell waits for a completion. So the names that can be completed stand here a second time,
and ``tests/lab/test_completion.py`` compares them with those that the commands know.
"""

from __future__ import annotations

from collections.abc import Callable

from emerging_optimizers.lab.errors import LabError

PRESETS = ("gpt2", "gpt2-xl", "llama-3-8b", "llama-3-70b", "resnet50", "vit-b")
TASKS = ("charlm", "digits", "pinn")
OPTIMIZERS = ("soap", "soap-kronecker", "kl-soap", "adamw", "muon")
DTYPES = ("float32", "bfloat16", "float16", "float64")
LARGEST = 10**15


def whole_number(option: str, least: int = 1, most: int = LARGEST) -> Callable[[str], int]:
    """Make a parser for an option that is a whole number.

    Args:
        option: Its name, for the complaint.
        least: The smallest that is allowed.
        most: The largest.
    """

    def read(word: str) -> int:
        try:
            number = int(word)
        except ValueError:  # no number, or one of more digits than Python reads
            number = least - 1
        if not least <= number <= most:
            limits = f"of at least {least}" if most == LARGEST else f"from {least} to {most:,}"
            raise LabError(f"{option} {word}: expected a whole number {limits}")
        return number

    return read


def preset_names(incomplete: str) -> list[str]:
    """Complete a model; nothing where it is none of the presets, so that the shell goes on with files."""
    return _beginning(PRESETS, incomplete)


def task_names(incomplete: str) -> list[str]:
    """Complete a built-in task."""
    return _beginning(TASKS, incomplete)


def dtype_names(incomplete: str) -> list[str]:
    """Complete a dtype."""
    return _beginning(DTYPES, incomplete)


def optimizer_names(incomplete: str) -> list[str]:
    """Complete the last name of a comma list, with those that are not in it yet."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in _beginning(OPTIMIZERS, last) if name not in before.split(",")]


def files(incomplete: str) -> list[str]:
    """Leave a file to the shell, which completes one where a command has nothing to say."""
    return []


def _beginning(names: tuple[str, ...], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
