"""The dependency audit: this checkout passes it, and it sees every kind of trouble that is planted."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from email.message import Message
from pathlib import Path

import pytest

from tools.audit import (
    Distribution,
    check_imports,
    check_licences,
    check_pins,
    check_requirements,
    closure,
    licence_of,
    table,
)

ROOT = Path(__file__).parents[2]
EXTRA = ["typer", "scikit-learn>=1"]
CONSTRAINTS = "# comment\nfilelock==3.1\ntorch==2.13.0  # the CPU build\n\nscikit_learn==1.9\nTyper==0.2\n"


def fakes(**changes: Distribution | None) -> dict[str, Distribution]:
    """A small environment without a fault, and then the changes."""
    found = {
        "emerging-optimizers": Distribution("emerging-optimizers", "0.1.0", ("torch>=2", 'typer; extra == "lab"')),
        "torch": Distribution("torch", "2.13.0+cpu", ("filelock", 'none; sys_platform == "never"'), "MIT AND BSL-1.0"),
        "filelock": Distribution("filelock", "3.1", (), "MIT"),
        "typer": Distribution("typer", "0.2", ("filelock",), "(MIT OR Apache-2.0)", frozenset({"typer"})),
        "scikit-learn": Distribution("scikit-learn", "1.9", (), "BSD-3-Clause", frozenset({"sklearn"})),
        "pip": Distribution("pip", "23"),
        "setuptools": Distribution("setuptools", "84"),
        "wheel": Distribution("wheel", "1"),
    }
    named = {name.replace("_", "-"): value for name, value in changes.items()}
    return {name: value for name, value in (found | named).items() if value is not None}


def test_this_checkout_passes_the_audit() -> None:
    # In a process of its own: setuptools, once imported, shows what it brings along as installed.
    done = subprocess.run([sys.executable, ROOT / "tools" / "audit.py"], capture_output=True, text=True)
    assert done.stdout.endswith("\naudit: no problem found\n"), done.stdout
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("distribution ")
    assert "databases were not asked" in done.stdout
    assert re.search(r"^torch +\S+ +core +Apache-2.0 AND ", done.stdout, flags=re.MULTILINE)
    assert re.search(r"^rich +\S+ +lab +MIT$", done.stdout, flags=re.MULTILINE)
    assert "pytest" not in done.stdout


@pytest.mark.parametrize("file", ["constraints.txt", "pyproject.toml", "emerging_optimizers/soap/planted.py"])
def test_the_command_fails_on_a_checkout_with_a_fault(tmp_path: Path, file: str) -> None:
    for name in ("constraints.txt", "pyproject.toml", "tools/audit.py", "emerging_optimizers/soap/planted.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text() if (ROOT / name).exists() else "import torch\n")
    command = [sys.executable, tmp_path / "tools" / "audit.py"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    match file:
        case "constraints.txt":
            text = re.sub(r"^rich==.*$", "rich>=1", (tmp_path / file).read_text(), flags=re.MULTILINE)
        case "pyproject.toml":
            text = (tmp_path / file).read_text().replace('["torch>=2.13"]', '["torch>=2.13", "numpy"]')
        case _:
            text = "import numpy\n"
    (tmp_path / file).write_text(text)
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"^audit: \d problem\(s\)$", done.stdout, flags=re.MULTILINE)


def test_the_packages_of_a_cuda_build_are_left_to_it_and_only_if_torch_needs_them() -> None:
    build = replace(fakes()["torch"], requires=("filelock", "nvidia-cublas==1.2", "triton==3"))
    cuda = {"nvidia_cublas": Distribution("nvidia-cublas", "1.2", (), "LicenseRef-NVIDIA-Proprietary"),
            "triton": Distribution("triton", "3", (), "MIT")}  # fmt: skip
    installed = fakes(torch=build, **cuda)
    assert check_pins(CONSTRAINTS, installed) == []
    assert check_licences(closure(["torch"], installed), installed) == []
    (problem, _) = check_pins(CONSTRAINTS, fakes(**cuda))
    assert problem == "nvidia-cublas 1.2 is installed, but not pinned in constraints.txt"


@pytest.mark.parametrize(
    ("constraints", "installed", "problem"),
    [
        (CONSTRAINTS, fakes(rich=Distribution("rich", "15.0")), "rich 15.0 is installed, but not pinned"),
        (CONSTRAINTS, fakes(typer=Distribution("typer", "3")), "typer 3 is installed, but constraints.txt pins 0.2"),
        (CONSTRAINTS, fakes(torch=Distribution("torch", "2.13.1+cpu")), "torch 2.13.1+cpu is installed, but"),
        (CONSTRAINTS.replace("2.13.0", "2.13.0+cu1"), fakes(), "torch 2.13.0+cpu is installed, but"),
        (CONSTRAINTS + "rich>=15", fakes(), "constraints.txt:7: 'rich>=15' is not an exact pin"),
        (CONSTRAINTS + "rich==15.*", fakes(), "constraints.txt:7: 'rich==15.*' is not an exact pin"),
        (CONSTRAINTS + "rich", fakes(), "'rich' is not an exact pin"),
        (CONSTRAINTS + "rich===15", fakes(), "'rich===15' is not an exact pin"),
        (CONSTRAINTS + "rich @ file:rich.whl", fakes(), "is not an exact pin"),
        (CONSTRAINTS + "-r more.txt", fakes(), "'-r more.txt' is not an exact pin"),
        (CONSTRAINTS + "rich==1,!=2", fakes(), "is not an exact pin"),
        (CONSTRAINTS + "scikit-learn==1.9", fakes(), "constraints.txt:7: scikit-learn is pinned twice"),
        (CONSTRAINTS, fakes(), ""),
        (CONSTRAINTS.replace("2.13.0", "2.13.0+cpu"), fakes(), ""),  # whatever the build of torch
        (CONSTRAINTS, fakes(torch=Distribution("torch", "2.13.0")), ""),
    ],
)
def test_a_pin_that_is_missing_wrong_or_loose_is_seen(
    constraints: str, installed: dict[str, Distribution], problem: str
) -> None:
    found = check_pins(constraints, installed)
    assert len(found) == bool(problem)
    assert not problem or problem in found[0]


@pytest.mark.parametrize(
    ("dependencies", "installed", "problem"),
    [
        (["torch>=2", "numpy"], fakes(), "pyproject.toml: the core may depend on torch alone, got torch, numpy"),
        ([], fakes(), "the core may depend on torch alone, got nothing"),
        (["torch>=2"], fakes(emerging_optimizers=None), "emerging-optimizers is not installed"),
        (["torch"], fakes(emerging_optimizers=Distribution("emerging-optimizers", "0.1.0", ("torch", "numpy"))),
         "emerging-optimizers as installed depends on torch, numpy"),
    ],
)  # fmt: skip
def test_a_core_that_needs_more_than_torch_is_seen(
    dependencies: list[str], installed: dict[str, Distribution], problem: str
) -> None:
    assert check_requirements({"dependencies": ["torch>=2"]}, fakes()) == []
    found = check_requirements({"dependencies": dependencies}, installed)
    assert any(problem in line for line in found)


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("soap/x.py", "import numpy", "soap/x.py:1: imports numpy, which is neither standard library nor torch"),
        ("soap/x.py", "\nfrom numpy.linalg import qr", "soap/x.py:2: imports numpy.linalg.qr"),
        ("x.py", "def f():\n    import typer", "x.py:2: imports typer"),
        ("x.py", "from emerging_optimizers.lab.race import Race", "the core imports emerging_optimizers.lab.race.Race"),
        ("x.py", "from emerging_optimizers import lab", "the core imports emerging_optimizers.lab"),
        ("lab/tasks/x.py", "import pandas", "pandas, which is neither standard library nor torch or an entry of"),
        ("lab/x.py", "import filelock", "imports filelock"),  # there, but only because something else needs it
        ("soap/x.py", "import json, math\nfrom torch import nn\nfrom emerging_optimizers.soap import y", ""),
        ("soap/x.py", "from . import y\nfrom __future__ import annotations", ""),
        ("lab/x.py", "import typer, sklearn.datasets, torch, json\nfrom emerging_optimizers.lab import race", ""),
    ],
)
def test_an_import_that_is_not_declared_is_seen(tmp_path: Path, file: str, source: str, problem: str) -> None:
    path = tmp_path / "emerging_optimizers" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    found = check_imports(tmp_path / "emerging_optimizers", EXTRA, fakes())
    assert len(found) == bool(problem)
    assert not problem or problem in found[0]


@pytest.mark.parametrize(
    ("licence", "problem"),
    [
        ("", "typer has no licence in its metadata"),
        ("GPL-3.0-only", "typer has an unexpected licence: GPL-3.0-only"),
        ("MIT AND LGPL-2.1-only", "typer has an unexpected licence: LGPL-2.1-only"),
        ("LicenseRef-NVIDIA-Proprietary", "unexpected licence"),
        ("UNKNOWN", "unexpected licence: UNKNOWN"),
        ("(MIT OR Apache-2.0) AND BSD-3-Clause", ""),
        ("Apache-2.0 WITH LLVM-exception", ""),
    ],
)
def test_a_licence_that_is_missing_or_not_expected_is_seen(licence: str, problem: str) -> None:
    found = check_licences(["typer"], fakes(typer=Distribution("typer", "0.2", (), licence)))
    assert len(found) == bool(problem)
    assert not problem or problem in found[0]
    assert check_licences(["absent"], fakes()) == ["absent is needed at run time, but not installed"]


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ([("License-Expression", "MIT"), ("Classifier", "License :: OSI Approved :: BSD License")], "MIT"),
        ([("Classifier", "License :: OSI Approved :: MIT License"), ("License", "whatever")], "MIT"),
        ([("License", "Apache 2.0")], "Apache-2.0"),
        ([("License", "Copyright someone\nall of it")], ""),
        ([("Classifier", "Topic :: Text")], ""),
        ([("Classifier", "License :: OSI Approved :: GNU General Public License (GPL)")],
         "GNU General Public License (GPL)"),
    ],
)  # fmt: skip
def test_a_licence_is_read_from_where_it_stands(fields: list[tuple[str, str]], licence: str) -> None:
    data = Message()
    for name, value in fields:
        data[name] = value
    assert licence_of(data) == licence  # type: ignore[arg-type]


def test_the_closure_follows_extras_and_markers_and_the_table_says_who_needs_what() -> None:
    installed = fakes(
        typer=Distribution("typer", "0.2", ("rich[jupyter]", 'old; python_version < "3"'), "MIT"),
        rich=Distribution("rich", "15", ('ipython; extra == "jupyter"', 'other; extra == "unused"', "typer"), "MIT"),
        ipython=Distribution("ipython", "9", (), "BSD-3-Clause"),
    )
    assert closure(["torch"], installed) == ["filelock", "torch"]
    assert closure(["typer"], installed) == ["ipython", "rich", "typer"]
    assert closure(["emerging-optimizers[lab]"], installed) == sorted(
        ["emerging-optimizers", "torch", "filelock", "typer", "rich", "ipython"]
    )
    lines = table(["filelock", "torch"], closure(["torch", "typer"], installed), installed).splitlines()
    assert [line.split()[:4] for line in lines[1:3]] == [["filelock", "3.1", "core", "MIT"],
                                                         ["ipython", "9", "lab", "BSD-3-Clause"]]  # fmt: skip
