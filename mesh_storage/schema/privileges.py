"""The privileges that the roles of a service and of a reader need on the tables, and which of them one lacks."""

from __future__ import annotations

from collections.abc import Mapping

from mesh_storage.schema.tables import EPOCH, LOG, SINCE, TABLES, VERSION_TABLE, Fetch

_STALE = "mesh_consensus_log_stale"
"""Written by migrations and read by backups only."""
_ALL = ("SELECT", "INSERT", "UPDATE", "DELETE")
_NEVER_UPDATED = ("mesh_messages", "mesh_consensus_log")
_NEEDED = {
    table: ("SELECT", "INSERT", "DELETE") if table in _NEVER_UPDATED else _ALL for table in SINCE if table != _STALE
}
"""What the units of work of a service need."""
SERVICE: Mapping[str, tuple[str, ...]] = {
    **_NEEDED,
    # A column that may be updated is what FOR UPDATE needs.
    "mesh_messages": ("SELECT", "INSERT", "UPDATE (queued)", "DELETE"),
    LOG: ("SELECT", "DELETE"),
    EPOCH: ("SELECT", "UPDATE (compacted)"),
    VERSION_TABLE: ("SELECT",),
}
"""What a service needs on each table that also watches, runs `maintain`, and queues or removes messages of others."""
READER: Mapping[str, tuple[str, ...]] = dict.fromkeys(TABLES, ("SELECT",))
"""What reads and backups need on each table."""


def grants(needed: Mapping[str, tuple[str, ...]], *, namespace: str, owner: str, role: str) -> list[str]:
    """Return the statements that give a role what it needs, and take what it has by default beyond that.

    Args:
        needed: `SERVICE` or `READER`.
        namespace: The PostgreSQL schema of the tables; this and the other names are quoted.
        owner: The owner of the tables, who creates those of later versions.
        role: The role.
    """
    default = ", ".join(privilege for privilege in _ALL if any(privilege in each for each in needed.values()))
    excess: dict[str, list[str]] = {}
    granted: dict[str, list[str]] = {}
    for table in TABLES:
        privileges = needed.get(table, ())
        if privileges:
            granted.setdefault(", ".join(privileges), []).append(f"{namespace}.{table}")
        if taken := ", ".join(each for each in default.split(", ") if each not in privileges):
            excess.setdefault(taken, []).append(f"{namespace}.{table}")
    return [
        f"GRANT USAGE ON SCHEMA {namespace} TO {role}",
        f"ALTER DEFAULT PRIVILEGES FOR ROLE {owner} IN SCHEMA {namespace} GRANT {default} ON TABLES TO {role}",
        *(f"REVOKE {privileges} ON {', '.join(tables)} FROM {role}" for privileges, tables in excess.items()),
        *(f"GRANT {privileges} ON {', '.join(tables)} TO {role}" for privileges, tables in granted.items()),
    ]


def missing(
    fetch: Fetch,
    tables: Mapping[str, int],
    needed: Mapping[str, tuple[str, ...]] = _NEEDED,
    role: str = "current_user",
) -> tuple[str, ...]:
    """Return what a role lacks, as in `INSERT, UPDATE ON nodes`, given the OIDs of the tables.

    A privilege on a single column counts as granted: which columns a service needs depends on what it does.

    Args:
        fetch: Executes a query.
        tables: The tables that exist, with their OIDs.
        needed: What is needed on each.
        role: An SQL expression for the name of the role.
    """
    each = [
        f"('{table}', {tables[table]}, '{privilege.partition(' ')[0]}', '{privilege}')"
        for table, privileges in needed.items()
        if table in tables
        for privilege in privileges
    ]
    if not each:
        return ()
    query = f"""
        SELECT name, words FROM (VALUES {", ".join(each)}) AS needed (name, id, privilege, words)
        WHERE NOT CASE privilege WHEN 'DELETE' THEN has_table_privilege({role}, id::oid, privilege)
            ELSE has_any_column_privilege({role}, id::oid, privilege) END
    """  # noqa: S608 - our own names
    lacking = {(name, privilege) for name, privilege in fetch(query)}
    found = {
        table: [privilege for privilege in privileges if (table, privilege) in lacking]
        for table, privileges in needed.items()
    }
    return tuple(f"{', '.join(privileges)} ON {table}" for table, privileges in found.items() if privileges)
