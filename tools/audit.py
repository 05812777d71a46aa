"""The dependency audit, from what is on this machine alone: ``make audit``, or ``python tools/audit.py``.

It compares ``constraints.txt``, ``pyproject.toml``, the imports of the package and the metadata of what is installed.
It knows of no vulnerability: ``pip-audit -r constraints.txt`` asks the databases of those, and needs a network.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "emerging-optimizers"
UNPINNED = {"pip", "setuptools", "wheel"}  # what a virtual environment may bring along

# A CUDA build of torch brings these; they follow that build's own pins, and NVIDIA's licence.
CUDA_BUILD = re.compile(r"nvidia-.*|cuda-.*|triton")
CUDA_LICENCE = re.compile(r"LicenseRef-NVIDIA.*|.*NVIDIA.*|Other/Proprietary License")

LICENCES = {
    "0BSD", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "HPND", "ISC", "LLVM-exception",
    "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib",
}  # fmt: skip

# What metadata says that is older than SPDX expressions; "BSD" alone leaves open which.
LICENCE_NAMES = {
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}


@dataclass(frozen=True)
class Distribution:
    """What the audit needs of an installed distribution.

    Attributes:
        name: canonical name.
        version: as installed, local version included.
        requires: requirements as written in its metadata.
        licence: what its metadata says, "" if nothing.
        modules: top-level modules that it provides.
    """

    name: str
    version: str
    requires: tuple[str, ...] = ()
    licence: str = ""
    modules: frozenset[str] = field(default_factory=frozenset)


def installed_distributions() -> dict[str, Distribution]:
    """Read the metadata of everything that is installed."""
    modules: dict[str, set[str]] = {}
    for module, names in metadata.packages_distributions().items():
        for name in names:
            modules.setdefault(canonicalize_name(name), set()).add(module)
    found: dict[str, Distribution] = {}
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        found[name] = Distribution(
            name=name,
            version=distribution.version,
            requires=tuple(distribution.requires or ()),
            licence=licence_of(distribution.metadata),
            modules=frozenset(modules.get(name, ())),
        )
    return found


def licence_of(data: metadata.PackageMetadata) -> str:
    """Read a licence: the SPDX expression, else the classifiers, else the field ``License`` if it is a name."""

    def field_of(name: str) -> list[str]:
        return [value.strip() for value in data.get_all(name) or []]

    if expressions := field_of("License-Expression"):
        return expressions[0]
    classifiers = [value.rpartition(" :: ")[2] for value in field_of("Classifier") if value.startswith("License :: ")]
    names = classifiers or [value for value in field_of("License") if value and "\n" not in value]
    return " OR ".join(LICENCE_NAMES.get(name, name) for name in names)


def closure(roots: Iterable[str], installed: Mapping[str, Distribution]) -> list[str]:
    """Follow requirements, with extras and markers, from `roots` to everything they need, sorted by name."""
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(root), "") for root in roots]
    while waiting:
        requirement, extra = waiting.pop()
        if not _applies(requirement.marker, extra):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                needs = installed[name].requires if name in installed else ()
                waiting += [(Requirement(need), wanted) for need in needs]
    return sorted({name for name, _ in seen})


def _applies(marker: Marker | None, extra: str) -> bool:
    return marker is None or marker.evaluate({"extra": extra})


def check_pins(constraints: str, installed: Mapping[str, Distribution]) -> list[str]:
    """Compare what is installed with ``constraints.txt``: every distribution pinned, exactly, and to that version."""
    problems: list[str] = []
    pins: dict[str, str] = {}
    for number, line in enumerate(constraints.splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^=*,;\s]+)", text)
        if match is None:
            problems.append(f"constraints.txt:{number}: {text!r} is not an exact pin, name==version")
        elif canonicalize_name(match[1]) in pins:
            problems.append(f"constraints.txt:{number}: {canonicalize_name(match[1])} is pinned twice")
        else:
            pins[canonicalize_name(match[1])] = match[2]
    left_to_torch = [name for name in closure(["torch"], installed) if CUDA_BUILD.fullmatch(name)]
    for name, distribution in sorted(installed.items()):
        if name in UNPINNED or name == PROJECT or name in left_to_torch:
            continue
        version = distribution.version
        # A local version (2.13.0+cpu) names a build, not a release.
        if name not in pins:
            problems.append(f"{name} {version} is installed, but not pinned in constraints.txt")
        elif pins[name] not in (version, version.partition("+")[0]):
            problems.append(f"{name} {version} is installed, but constraints.txt pins {pins[name]}")
    return problems


def check_requirements(project: Mapping[str, object], installed: Mapping[str, Distribution]) -> list[str]:
    """Check that the core needs torch alone, in pyproject.toml as in the metadata of what is installed."""
    problems = []
    declared = [canonicalize_name(Requirement(str(r)).name) for r in _list(project.get("dependencies"))]
    if declared != ["torch"]:
        problems.append(f"pyproject.toml: the core may depend on torch alone, got {', '.join(declared) or 'nothing'}")
    if PROJECT not in installed:
        problems.append(f"{PROJECT} is not installed: pip install -e .")
    else:
        requirements = map(Requirement, installed[PROJECT].requires)
        core = [canonicalize_name(r.name) for r in requirements if _applies(r.marker, "")]
        if core != declared:
            problems.append(f"{PROJECT} as installed depends on {', '.join(core) or 'nothing'}: install it again")
    return problems


def check_imports(package: Path, lab_extra: Iterable[str], installed: Mapping[str, Distribution]) -> list[str]:
    """Check that modules import the standard library, torch and the package; in ``lab/`` what the extra names too."""
    allowed = {*sys.stdlib_module_names, "torch"}
    in_lab = {canonicalize_name(Requirement(requirement).name) for requirement in lab_extra}
    lab_modules = {module for name in in_lab if name in installed for module in installed[name].modules}
    problems = []
    for path in sorted(package.rglob("*.py")):
        inside_lab = (package / "lab") in path.parents
        for line, module in _imports(path):
            top, where = module.partition(".")[0], f"{path.relative_to(package.parent).as_posix()}:{line}"
            if top == package.name:
                if not inside_lab and module.startswith(f"{package.name}.lab"):
                    problems.append(f"{where}: the core imports {module}")
            elif top not in allowed and not (inside_lab and top in lab_modules):
                wanted = "torch or an entry of the lab extra" if inside_lab else "torch"
                problems.append(f"{where}: imports {module}, which is neither standard library nor {wanted}")
    return problems


def _imports(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def check_licences(names: Iterable[str], installed: Mapping[str, Distribution]) -> list[str]:
    """Check that every distribution is installed and says that it has one of `LICENCES`."""
    problems = []
    for name in names:
        if name not in installed:
            problems.append(f"{name} is needed at run time, but not installed")
            continue
        licence = installed[name].licence
        unknown = [word for word in _licence_words(licence) if word not in LICENCES]
        if not licence:
            problems.append(f"{name} has no licence in its metadata")
        elif unknown and not (CUDA_BUILD.fullmatch(name) and CUDA_LICENCE.fullmatch(licence)):
            problems.append(f"{name} has an unexpected licence: {', '.join(unknown)}")
    return problems


def _licence_words(expression: str) -> list[str]:
    words = re.split(r"\s+(?:AND|OR|WITH)\s+", expression)
    return [word.strip("() ") if word.strip("() ") in LICENCES else word.strip() for word in words]


def table(core: Sequence[str], names: Iterable[str], installed: Mapping[str, Distribution]) -> str:
    """Lay out what is needed at run time: name, version, who needs it, licence."""
    rows = [
        (name, installed[name].version, "core" if name in core else "lab", installed[name].licence or "none")
        for name in names
        if name in installed
    ]
    rows.insert(0, ("distribution", "version", "needed by", "licence"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]] for row in rows)
    return "\n".join(map("  ".join, lines))


def audit(root: Path, installed: Mapping[str, Distribution]) -> tuple[str, list[str]]:
    """Run every check on a checkout; return the table and the problems."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = _list(project.get("optional-dependencies", {}).get("lab"))
    core = closure(_list(project.get("dependencies")), installed)
    everything = closure([*_list(project.get("dependencies")), *extra], installed)
    problems = [
        *check_pins((root / "constraints.txt").read_text(encoding="utf-8"), installed),
        *check_requirements(project, installed),
        *check_imports(root / "emerging_optimizers", extra, installed),
        *check_licences(everything, installed),
    ]
    return table(core, everything, installed), problems


def _list(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def main() -> int:
    """Print the table, every problem and the verdict; return the exit code, 1 if there is a problem."""
    installed = installed_distributions()
    shown, problems = audit(ROOT, installed)
    print(shown)
    print(f"\n{len(installed)} distributions are installed; the table has those that are needed at run time.")
    print("Vulnerability databases were not asked: where there is a network, run pip-audit -r constraints.txt")
    for problem in problems:
        print(f"  {problem}")
    print(f"audit: {len(problems)} problem(s)" if problems else "audit: no problem found")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
