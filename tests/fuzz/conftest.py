"""The valid files that the fuzz tests spoil, written once per session."""

from __future__ import annotations

import pytest
from valid_files import ValidFiles, write_valid_files


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> ValidFiles:
    """Two adapters, and a pair of Fishers of every structure; no model."""
    return write_valid_files(tmp_path_factory.mktemp("valid"))
