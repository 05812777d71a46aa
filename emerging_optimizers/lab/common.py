"""What the commands share: their error, text fit for a terminal, output folders, signals, and the machine."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import signal
import zipfile
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self

from emerging_optimizers import __version__

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Not by the name: on an index it stands for another distribution.
EXTRA = 'this command needs an extra; in your clone of the repository: pip install ".[lab]"'


class LabError(Exception):
    """A mistake that the user can put right. Its text is one line that says what to do."""


def require(*packages: str) -> None:
    """Complain of missing packages now, not when the work has been done."""
    if not all(importlib.util.find_spec(package) for package in packages):
        raise LabError(EXTRA)


def printable(text: object) -> str:
    """Show control, format and undecodable characters as escapes, as `repr` does, and any white space as a space.

    A name from outside must not move the cursor, set a title or hide what is there.
    """
    return "".join(
        c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in str(text)
    )


def make_console() -> Console:
    """Make a console on stdout; a pipe, which has no width of its own, gets 120 columns."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)


def make_table(headings: Iterable[str], overflow: Literal["fold", "ellipsis"] = "ellipsis") -> Table:
    """Make a table whose first column is of words and the others of numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", overflow=overflow)
    return table


def tell(console: Console, what: Any, soft_wrap: bool = True) -> None:
    """Print a text or a table as it is, without reading it for markup; ``soft_wrap`` leaves long lines of text long."""
    console.print(what, markup=False, highlight=False, soft_wrap=soft_wrap and isinstance(what, str))


def read_results(file: Path) -> dict[str, Any]:
    """Read a JSON file of ours; empty where there is none."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return results if isinstance(results, dict) else {}


def claim_folder(folder: Path, results: str, kind: str, owner: str) -> None:
    """Make the output folder of ``owner``, or take over one whose JSON file ``results`` is of the format ``kind``."""
    if folder.is_dir() and any(folder.iterdir()) and read_results(folder / results).get("format") != kind:
        raise LabError(f"--out {folder}: the folder is not empty and not {owner}; name another with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"--out {folder}: cannot be made ({error.strerror}); name another with --out") from error


def temporary(path: Path) -> Path:
    """Name the file that becomes ``path`` when it is whole; the next attempt overwrites what a crash has left of it."""
    # In the same folder, as a rename is atomic only within one file system.
    return path.with_name(f".{path.name}.tmp")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that its name always stands for one complete version."""
    try:
        with temporary(path).open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # the content is on the disk before the name points to it
        os.replace(temporary(path), path)
    except BaseException:  # a full disk is not to stay full of half a file
        temporary(path).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is already durable
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def damaged_entry(path: Path) -> str | None:
    """Name what a zip file has damaged: torch writes check sums and reads none, and a flipped bit is a wrong weight."""
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


class StopRequest:
    """While entered, SIGINT and SIGTERM are noted in `received`. A second one ends the program at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)


# What a reader needs to judge a timing; no host name, no path, no user name.


def versions() -> dict[str, str]:
    """Collect the versions of Python, the library and what its numbers depend on."""
    import torch

    found = {"python": platform.python_version(), "emerging-optimizers": __version__, "torch": torch.__version__}
    for package in ("numpy", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int | float | None]:
    """Describe the processor, the cores that this process may use, torch's threads and the memory in GiB."""
    import torch

    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not POSIX, or a POSIX without these names
        memory = None
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
