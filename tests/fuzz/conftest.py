"""The kinds of files that every test here reads."""

import fuzz_kinds
import pytest
from harness import Kind


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """Every kind of file by its name."""
    return fuzz_kinds.kinds(tmp_path_factory.mktemp("whole"))
