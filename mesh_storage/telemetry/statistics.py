"""The server's statistics: gauges that a single cheap query fills at each collection."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import psycopg

from mesh_storage.errors import MeshStorageError
from mesh_storage.models import ConfigEntry, LogEntry, Mesh, Message, Node, NodeState, Route, RoutingEntry, StateEntry
from mesh_storage.models.base import table_of
from mesh_storage.postgres import engine
from mesh_storage.postgres.pool import keep_for_parent
from mesh_storage.postgres.timed import TimedConnection

logger = logging.getLogger("mesh_storage")

_MOST_RECEIVERS = 10_000
_TIMEOUT_S = 2.0
"""Longest time that one collection waits for the server, connecting included."""

COLLECTIONS = {
    "meshes": table_of(Mesh).name,
    "nodes": table_of(Node).name,
    "routes": table_of(Route).name,
    "messages": table_of(Message).name,
    "state": table_of(StateEntry).name,
    "node_states": table_of(NodeState).name,
    "consensus_log": table_of(LogEntry).name,
    "routing_table": table_of(RoutingEntry).name,
    "runtime_config": table_of(ConfigEntry).name,
}
"""The tables, by the names of the repositories that concern one."""
_HOT = ("state", "node_states", "routing_table", "runtime_config")
"""The repositories that update the same rows all the time."""
_TABLES = f"unnest(ARRAY[{', '.join(repr(COLLECTIONS[name]) for name in _HOT)}]) AS name, to_regclass(name) AS id"

_CLAIMABLE = "SELECT receiver, available_at FROM mesh_deliveries WHERE state IN ('queued', 'leased')"
# From receiver to receiver by the index of claims, whose first row of each is the one that was due first.
_FIRST_DUE = f"""
    WITH RECURSIVE first (receiver, due, number) AS (
        (SELECT *, 1 FROM ({_CLAIMABLE} ORDER BY receiver, available_at LIMIT 1) AS one)
        UNION ALL
        SELECT next.*, number + 1 FROM first, LATERAL (
            {_CLAIMABLE} AND mesh_deliveries.receiver > first.receiver ORDER BY receiver, available_at LIMIT 1
        ) AS next WHERE number < {_MOST_RECEIVERS}
    ) SELECT due FROM first
"""  # noqa: S608 - our own names


class Gauge(NamedTuple):
    """A value of the server, or one for each label."""

    name: str
    unit: str
    description: str
    sql: str
    """Selects labels and values; a label may be null."""
    attribute: str = ""
    """What the label is; empty if there is none."""


GAUGES = (
    Gauge(
        "mesh_storage.changes.length",
        "{change}",
        "Changes that are kept for watchers, estimated.",
        "SELECT NULL, pg_stat_get_live_tuples(to_regclass('mesh_changes'))",
    ),
    Gauge(
        "mesh_storage.delivery.backlog",
        "{delivery}",
        "Deliveries that are not acknowledged yet, dead ones too, estimated.",
        "SELECT NULL, pg_stat_get_live_tuples(to_regclass('mesh_deliveries'))",
    ),
    Gauge(
        "mesh_storage.delivery.oldest_age",
        "s",
        "How long the delivery has been due that was due first; 0 if none is.",
        f"SELECT NULL, greatest(0, extract(epoch FROM clock_timestamp() - min(due))) FROM ({_FIRST_DUE}) AS first",  # noqa: S608
    ),
    Gauge(
        "mesh_storage.table.dead_rows",
        "{row}",
        "Row versions that vacuum has not removed yet, estimated.",
        f"SELECT name, pg_stat_get_dead_tuples(id) FROM {_TABLES}",  # noqa: S608 - our own names
        "db.collection.name",
    ),
    Gauge(
        "mesh_storage.table.hot_ratio",
        "1",
        "Share of updates that changed no index, since the statistics were reset.",
        "SELECT name, pg_stat_get_tuples_hot_updated(id)::float8 / nullif(pg_stat_get_tuples_updated(id), 0) "  # noqa: S608
        f"FROM {_TABLES}",
        "db.collection.name",
    ),
    Gauge(
        "mesh_storage.transaction.oldest_age",
        "s",
        "Age of the oldest transaction that is open or prepared in the database; 0 if there is none.",
        "SELECT NULL, coalesce(extract(epoch FROM clock_timestamp() - min(begun)), 0) FROM ("
        "SELECT xact_start AS begun FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " UNION ALL SELECT prepared FROM pg_prepared_xacts WHERE database = current_database()) AS open",
    ),
    Gauge(
        "mesh_storage.replication.lag",
        "s",
        "How far each standby is behind this server, or this standby is behind its primary.",
        "SELECT application_name, extract(epoch FROM max(coalesce(replay_lag, '0'))) FROM pg_stat_replication"
        " WHERE state = 'streaming' GROUP BY application_name UNION ALL SELECT NULL, CASE"
        " WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() THEN 0"
        " ELSE extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()) END WHERE pg_is_in_recovery()",
        "mesh_storage.replica",
    ),
)
"""Another one is an entry here: all are parts of one query."""

# What a distributed database has is in other tables than those of these names, also on the coordinator.
_OF_TABLES = ("mesh_storage.changes.", "mesh_storage.delivery.", "mesh_storage.table.")


def _query(without: tuple[str, ...] = ()) -> bytes:
    return " UNION ALL ".join(
        f"SELECT {number}, label::text, value::float8 "  # noqa: S608 - our own statements
        f"FROM ({gauge.sql}) AS _ (label, value) WHERE value IS NOT NULL"
        for number, gauge in enumerate(GAUGES)
        if not gauge.name.startswith(without)
    ).encode()


QUERY = _query()
"""All gauges: the number, the label and the value of each."""
WITHOUT_TABLES = _query(_OF_TABLES)
"""The same without those of tables, for a distributed database, which refuses `QUERY`."""

Values = list[tuple[str | None, float]]


class Statistics:
    """Reads all gauges at once, and gives each value out once, so that a collection takes one query.

    It has a blocking connection of its own, since a collection may run in any thread, also in that of an event loop.
    """

    def __init__(self, connect: Mapping[str, Any]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._connection: TimedConnection | None = None
        self._process = os.getpid()
        self._sql = QUERY
        self._read: dict[Gauge, Values] = {}
        self._closed = False

    def take(self, gauge: Gauge) -> Values:
        """Return the labels and values of a gauge, read anew if they were given out before; none without a server."""
        with self._lock:
            if gauge not in self._read and not self._closed:
                self._read = self._query()
            return self._read.pop(gauge, [])

    def close(self) -> None:
        """Close the connection for good."""
        with self._lock:
            self._closed = True
            self._disconnect()

    def _query(self) -> dict[Gauge, Values]:
        read: dict[Gauge, Values] = {gauge: [] for gauge in GAUGES}
        try:
            connection = self._connected()
            try:
                rows = connection.execute(self._sql).fetchall()
            except psycopg.errors.FeatureNotSupported:
                self._sql = WITHOUT_TABLES  # from now on, so that the server logs no error at each collection
                rows = connection.execute(self._sql).fetchall()
            for number, label, value in rows:
                read[GAUGES[number]].append((label, value))
        except (MeshStorageError, psycopg.Error) as error:
            logger.debug("no statistics", exc_info=error)
            self._disconnect()
        return read

    def _connected(self) -> TimedConnection:
        if self._process != os.getpid():  # in a forked child, it is the parent's
            keep_for_parent(self._connection)
            self._connection, self._process = None, os.getpid()
        deadline = time.monotonic() + _TIMEOUT_S
        if self._connection is None:
            with engine.connect_before(deadline):
                self._connection = engine.connect(self._connect)
        self._connection.deadline = deadline
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None and self._process == os.getpid():
            self._connection.close()
        self._connection = None
