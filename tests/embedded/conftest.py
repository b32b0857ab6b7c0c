"""The directories in which these tests let servers run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Yield a directory outside of pytest's own, which every new run of pytest closes to other accounts.

    Root's servers run under another account, and some start anew in the middle of a test.
    """
    with tempfile.TemporaryDirectory(prefix="lifecycle-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)
