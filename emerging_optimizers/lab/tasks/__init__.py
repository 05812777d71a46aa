"""The tasks of a race, and how a name on the command line becomes one.

Built in: ``charlm``, ``digits``, ``pinn``. A user's own: ``package.module:TaskClass``, imported from the current folder
or wherever Python finds it.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from emerging_optimizers.lab.errors import LabError
from emerging_optimizers.lab.tasks.protocol import METHODS, Settings, Task, settings_of, step_generator
from emerging_optimizers.plan.user_modules import search_hint, spelling_hint

__all__ = ["BUILT_IN", "Settings", "Task", "make_task", "settings_of", "step_generator", "task_class"]

BUILT_IN = {
    "charlm": "emerging_optimizers.lab.tasks.charlm:CharLM",
    "digits": "emerging_optimizers.lab.tasks.digits:Digits",
    "pinn": "emerging_optimizers.lab.tasks.pinn:Burgers",
}


def task_class(name: str) -> Callable[..., Task]:
    """Find a task's class.

    Args:
        name: a built-in name, or ``package.module:TaskClass``.

    Raises:
        LabError: there is no such task, it cannot be imported, or it lacks one of the four methods.
    """
    if ":" not in name and name not in BUILT_IN:
        close = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise LabError(f"unknown task {name!r}: {hint}choose {', '.join(BUILT_IN)} or package.module:TaskClass")
    module_name, _, attribute = BUILT_IN.get(name, name).partition(":")
    if spelling := spelling_hint(module_name, attribute):
        raise LabError(f"task {name!r}: {spelling}")
    if name not in BUILT_IN and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises while it is imported
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        where = search_hint(module_name, error)
        raise LabError(f"task {name!r}: importing {module_name!r} failed ({reason}){where}") from error
    found = getattr(module, attribute, None)
    if not isinstance(found, type):
        raise LabError(f"task {name!r}: module {module_name!r} has no class {attribute!r}")
    missing = [method for method in METHODS if not callable(getattr(found, method, None))]
    if missing:
        raise LabError(f"task {name!r} lacks the method(s) {', '.join(missing)}; a task has {', '.join(METHODS)}")
    return cast(Callable[..., Task], found)


def make_task(name: str, seed: int, options: dict[str, Any]) -> Task:
    """Construct a task for one seed.

    Raises:
        LabError: as `task_class`, or the class cannot be constructed as ``TaskClass(seed=..., **options)``.
    """
    constructor = task_class(name)
    try:
        return constructor(seed=seed, **options)
    except TypeError as error:
        raise LabError(f"task {name!r} cannot be constructed with seed={seed}: {error}") from error
