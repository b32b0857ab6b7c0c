"""Without telemetry a storage is what it was, and OpenTelemetry need not be installed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from mesh_storage import InvalidInputError, Lease, MeshStorage, Telemetry, UnitOfWork, repositories
from mesh_storage.postgres.pool import Pool
from mesh_storage.unit_of_work import Scope
from mesh_storage.watch import Watch


def python(code: str, *arguments: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_without_telemetry_its_classes_are_the_plain_ones(storage: MeshStorage) -> None:
    assert type(storage._pool) is Pool
    assert (storage._scope, storage._lease, storage._watch) == (Scope, Lease, Watch)
    assert storage._observed is None
    with storage.begin() as uow:
        assert type(uow) is UnitOfWork
        assert type(uow.messages) is repositories.MessageRepository


def test_opentelemetry_is_imported_only_for_telemetry(mesh_storage_url: str) -> None:
    assert (
        python(
            "import sys\n"
            "from mesh_storage import MeshStorage, Telemetry\n"
            "with MeshStorage.open(sys.argv[1]) as storage, storage.begin() as uow:\n"
            "    uow.state.put('k', b'v')\n"
            "print([name for name in sys.modules if name.startswith('opentelemetry')])",
            mesh_storage_url,
        )
        == "[]"
    )


def test_without_the_extra_all_but_telemetry_works(mesh_storage_url: str) -> None:
    assert (
        python(
            "import sys\n"
            "sys.modules['opentelemetry'] = None\n"
            "import mesh_storage\n"
            "with mesh_storage.MeshStorage.open(sys.argv[1], telemetry=None) as storage, storage.begin() as uow:\n"
            "    uow.state.put('k', b'v')\n"
            "try:\n"
            "    mesh_storage.Telemetry()\n"
            "except mesh_storage.ConfigurationError as error:\n"
            "    print(error)",
            mesh_storage_url,
        )
        == "telemetry needs OpenTelemetry: pip install 'mesh-storage[otel]'"
    )


def test_the_api_alone_is_enough(mesh_storage_url: str) -> None:
    assert (
        python(
            "import sys\n"
            "sys.modules['opentelemetry.sdk'] = None\n"
            "from mesh_storage import MeshStorage, Telemetry\n"
            "with MeshStorage.open(sys.argv[1], telemetry=Telemetry()) as storage, storage.begin() as uow:\n"
            "    uow.state.put('k', b'v')\n"
            "    print(uow.state.get('k').value, len(list(uow.state.stream())))",
            mesh_storage_url,
        )
        == "b'v' 1"
    )


def test_the_global_providers_are_used_whenever_they_are_set(mesh_storage_url: str) -> None:
    assert python(
        "import sys\n"
        "from opentelemetry import metrics, trace\n"
        "from mesh_storage import MeshStorage, Telemetry\n"
        "from tests.telemetry.recorder import Recorder\n"
        "recorder = Recorder()\n"
        "with MeshStorage.open(sys.argv[1], telemetry=Telemetry()) as before:\n"
        "    metrics.set_meter_provider(recorder.meter_provider)\n"
        "    trace.set_tracer_provider(recorder.tracer_provider)\n"
        "    with MeshStorage.open(sys.argv[1], telemetry=Telemetry(recorder.meter_provider)) as after:\n"
        "        for storage in (before, after):\n"
        "            with storage.begin() as uow:\n"
        "                uow.state.put('k', b'v')\n"
        "        print(len(recorder.spans('state.put')))\n"
        "        print(list(recorder.by('db.client.operation.duration', 'db.operation.name').values()))\n"
        "        print(list(recorder.by('db.client.connection.count', 'db.client.connection.state').values()))",
        mesh_storage_url,
    ).split("\n") == ["2", "[2]", "[2, 0]"]


@pytest.mark.parametrize("given", [True, {}, Telemetry, TracerProvider()])
def test_what_is_no_telemetry_is_refused_before_anything_is_opened(given: Any) -> None:
    with pytest.raises(InvalidInputError, match="telemetry") as error:
        MeshStorage.open("postgresql://nowhere.invalid/none", telemetry=given)
    assert error.value.field == "telemetry"


@pytest.mark.parametrize("name", ["meter_provider", "tracer_provider"])
def test_a_wrong_provider_is_refused_by_name(name: str) -> None:
    wrong: Any = {name: object()}
    with pytest.raises(InvalidInputError, match=name) as error:
        Telemetry(**wrong)
    assert error.value.field == name
