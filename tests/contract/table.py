"""The contract as a table, which ``tools/tables.py`` writes into ``docs/contract.md``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

SUBJECTS = (
    "test_construction",
    "test_options",
    "test_step",
    "test_layouts",
    "test_gradients",
    "test_hooks",
    "test_copies",
    "test_state_dicts",
    "test_loading",
    "test_schedulers",
    "test_tools",
    "test_threads",
    "test_compile",
)


def tests() -> Iterator[Callable[..., None]]:
    """Every test of the contract, in the order of the files."""
    for subject in SUBJECTS:
        module = importlib.import_module(f"tests.contract.{subject}")
        yield from (value for name, value in vars(module).items() if name.startswith("test_") and callable(value))


def cases(test: Callable[..., None]) -> Iterator[Any]:
    """The parameter sets of a test that are for one of the optimizers."""
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            yield from (case for case in mark.args[1] if str(getattr(case, "id", "")).startswith(("AdamW-", "SOAP-")))


def verdict(test: Callable[..., None], optimizer: str) -> str:
    """Whether an optimizer does what is tested: "no" where a case of it is an expected failure."""
    own = [case for case in cases(test) if case.id.startswith(f"{optimizer}-")]
    if not own:
        return "not tested"
    return "no" if any(mark.name == "xfail" for case in own for mark in case.marks) else "yes"


def sentence(test: Callable[..., None]) -> str:
    return (test.__doc__ or "").strip().split("\n")[0].replace("|", "\\|")


def markdown() -> str:
    rows = [f"| {sentence(test)} | {verdict(test, 'AdamW')} | {verdict(test, 'SOAP')} |" for test in tests()]
    return "\n".join(["| What is tested | AdamW | SOAP |", "| --- | --- | --- |", *rows])
