"""The application: opens the storage, starts the background work, and turns the library's errors into responses."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, Response, status
from fastapi.responses import FileResponse, JSONResponse
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from mesh_storage import (
    AlreadyExistsError,
    ConflictError,
    InvalidInputError,
    MeshStorageError,
    MissingReferenceError,
    NotFoundError,
    Telemetry,
)
from mesh_storage.aio import AsyncMeshStorage
from service import migration
from service.api import router
from service.background import Config, maintain, running, stand_for_leader, workers

_PAGE = Path(__file__).parent / "page.html"
_STATUS: dict[type[MeshStorageError], int] = {
    NotFoundError: status.HTTP_404_NOT_FOUND,
    AlreadyExistsError: status.HTTP_409_CONFLICT,
    ConflictError: status.HTTP_409_CONFLICT,
    MissingReferenceError: status.HTTP_409_CONFLICT,
    InvalidInputError: status.HTTP_422_UNPROCESSABLE_CONTENT,
}
"""Whatever else goes wrong is not the client's fault, and may be over when it asks again."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    """Open the storage and work in the background until the application is shut down."""
    name = f"{os.uname().nodename}-{secrets.token_hex(4)}"
    config = Config()
    meters = MeterProvider([PrometheusMetricReader()])
    async with AsyncMeshStorage.open(telemetry=Telemetry(meters)) as storage:
        await migration.upgrade(storage)
        redis_url = os.environ.get("REDIS_URL")
        app.state.storage, app.state.config = storage, config
        app.state.cached = storage.cached(redis_url) if redis_url else None
        works = [config.follow(storage), stand_for_leader(storage, name, config), maintain(storage), *workers(storage)]
        async with running(*works, on_failure=app.state.on_failure):
            yield
    meters.shutdown()


def create_app(on_failure: Callable[[], None]) -> FastAPI:
    """Return the application; the database is that of the environment's `MESH_STORAGE_URL`, and Redis of `REDIS_URL`.

    If the work in the background fails for good, as it does without a privilege, `on_failure` is called. It should end
    the process, for whoever started it to start it anew: one that answers requests but does nothing else is worse than
    none, and to be not ready would keep it as it is.
    """
    app = FastAPI(title="mesh", lifespan=lifespan)
    app.state.on_failure = on_failure
    app.include_router(router)

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return FileResponse(_PAGE)

    @app.get("/live")
    def live() -> str:
        """Say that the process works; this needs no database, whose outage a restart would not end."""
        return "alive"

    @app.get("/ready")
    async def ready(request: Request) -> Response:
        """Say whether requests can be served."""
        storage: AsyncMeshStorage = request.app.state.storage
        health = await storage.health()
        code = status.HTTP_200_OK if health.ok else status.HTTP_503_SERVICE_UNAVAILABLE
        return JSONResponse({"ready": health.ok, "detail": health.error and str(health.error)}, code)

    @app.get("/metrics")
    def metrics() -> Response:  # in a thread, since it asks the database for its statistics
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(MeshStorageError)
    async def report(_request: Request, error: MeshStorageError) -> Response:
        code = _STATUS.get(type(error), status.HTTP_503_SERVICE_UNAVAILABLE)
        headers = {"Retry-After": "1"} if code == status.HTTP_503_SERVICE_UNAVAILABLE else None
        return JSONResponse({"detail": str(error)}, code, headers)

    return app
