"""The README's table of the contract is the one that the tests make."""

import importlib
from pathlib import Path

from tests.contract import table

ROOT = Path(__file__).parent.parent.parent


def test_the_readme_has_the_table() -> None:
    assert table.table_in(ROOT / "README.md") == table.markdown(), "paste the output of python -m tests.contract.table"


def test_every_test_is_a_row_of_the_table_and_says_what_it_is_for() -> None:
    files = {path.stem for path in Path(__file__).parent.glob("test_*.py")} - {"test_table"}
    assert files == set(table.SUBJECTS)
    assert all(importlib.import_module(f"tests.contract.{name}").__doc__ for name in files)
    sentences = [table.sentence(test) for test in table.tests()]
    assert all(text.endswith(".") and len(text) < 130 for text in sentences), sentences
    assert len(set(sentences)) == len(sentences)


def test_soap_has_no_expected_failure() -> None:
    assert {table.verdict(test, "SOAP") for test in table.tests()} == {"yes"}
    assert {table.verdict(test, "AdamW") for test in table.tests()} == {"yes", "no"}
