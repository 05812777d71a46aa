"""Words for ``package.module:name`` of a user: what to write instead, and where was looked."""

from __future__ import annotations

from pathlib import Path


def spelling_hint(module: str, name: str) -> str | None:
    """Say what to write where a file is named instead of a module; None where it is none."""
    if not module.endswith(".py") and "/" not in module:
        return None
    path = Path(module.removesuffix(".py"))
    if path.is_absolute() or ".." in path.parts:
        return f"start in {path.parent} and write {path.name}:{name}"
    return f"write {'.'.join(path.parts)}:{name}"


def search_hint(module: str, error: Exception) -> str:
    """Say where was looked, if the module itself was not found; nothing if one that it imports was not."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return f" (looked in {Path.cwd()} and on Python's path; start in its folder)"
    return ""
