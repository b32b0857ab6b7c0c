"""The privileges that a service needs on the tables of its units of work, and which of them its role lacks."""

from __future__ import annotations

from collections.abc import Mapping

from mesh_storage.schema.tables import SINCE, Fetch

_STALE = "mesh_consensus_log_stale"
"""Written by migrations and read by backups only."""
_NEVER_UPDATED = ("mesh_messages", "mesh_consensus_log")
_NEEDED = {
    table: ("SELECT", "INSERT", "DELETE") if table in _NEVER_UPDATED else ("SELECT", "INSERT", "UPDATE", "DELETE")
    for table in SINCE
    if table != _STALE
}


def missing(fetch: Fetch, tables: Mapping[str, int]) -> tuple[str, ...]:
    """Return what this role lacks, as in `INSERT, UPDATE ON nodes`, given the OIDs of the tables.

    A privilege on a single column counts as granted: which columns a service needs depends on what it does.
    """
    needed = [
        f"('{table}', {tables[table]}, '{privilege}')"
        for table, privileges in _NEEDED.items()
        if table in tables
        for privilege in privileges
    ]
    if not needed:
        return ()
    query = f"""
        SELECT name, privilege FROM (VALUES {", ".join(needed)}) AS needed (name, id, privilege)
        WHERE NOT CASE privilege WHEN 'DELETE' THEN has_table_privilege(id::oid, privilege)
            ELSE has_any_column_privilege(id::oid, privilege) END
    """  # noqa: S608 - our own names
    lacking = {(name, privilege) for name, privilege in fetch(query)}
    found = {
        table: [privilege for privilege in privileges if (table, privilege) in lacking]
        for table, privileges in _NEEDED.items()
    }
    return tuple(f"{', '.join(privileges)} ON {table}" for table, privileges in found.items() if privileges)
