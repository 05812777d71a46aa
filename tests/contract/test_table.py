"""Every test of the contract says what it is for, and SOAP does what AdamW does and more."""

import importlib
from pathlib import Path

from tests.contract import table


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
