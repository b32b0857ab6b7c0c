"""A storage whose telemetry is recorded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mesh_storage import MeshStorage
from tests.telemetry.recorder import Recorder


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def measured(mesh_storage_url: str, recorder: Recorder) -> Iterator[MeshStorage]:
    """Yield a storage with telemetry."""
    with MeshStorage.open(mesh_storage_url, telemetry=recorder.telemetry()) as storage:
        yield storage
