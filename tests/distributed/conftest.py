"""The distributed tests' fixture: groups of real processes."""

from collections.abc import Iterator

import pytest

from tests.distributed.harness import Processes


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Runs functions in groups of processes that have a gloo process group."""
    found = Processes()
    yield found
    found.close()
