"""Portability of dumps: what they may contain to restore on other servers."""

from __future__ import annotations

import re

# The storage parameters of columns, tables and indexes (PostgreSQL manual: ALTER TABLE, CREATE TABLE and CREATE INDEX).
# The server rejects a statement with any other.
_COLUMN = "n_distinct n_distinct_inherited"
_TABLE = """
    autovacuum_analyze_scale_factor autovacuum_analyze_threshold autovacuum_enabled autovacuum_freeze_max_age
    autovacuum_freeze_min_age autovacuum_freeze_table_age autovacuum_multixact_freeze_max_age
    autovacuum_multixact_freeze_min_age autovacuum_multixact_freeze_table_age autovacuum_vacuum_cost_delay
    autovacuum_vacuum_cost_limit autovacuum_vacuum_insert_scale_factor autovacuum_vacuum_insert_threshold
    autovacuum_vacuum_scale_factor autovacuum_vacuum_threshold fillfactor log_autovacuum_min_duration parallel_workers
    toast_tuple_target user_catalog_table vacuum_index_cleanup vacuum_truncate
"""
_INDEX = "autosummarize buffering deduplicate_items fastupdate fillfactor gin_pending_list_limit pages_per_range"
# Can only be set on such a server.
_SINCE_18 = "autovacuum_vacuum_max_threshold vacuum_max_eager_freeze_failure_rate"
_KNOWN = frozenset(f"{_COLUMN} {_TABLE} {_INDEX} {_SINCE_18}".split())

_WORDS = re.compile(r"""--[^\n]*|"(?:[^"]|"")*"|'(?:[^']|'')*'""")
"""Comments, quoted names and string literals, which may contain anything."""
_NO_BRACKETS = str.maketrans("", "", "()")
_OPTIONS = re.compile(r"^(?:ALTER .*? SET|.*?\bWITH) \(([^()]+)\)", re.MULTILINE)


def unknown_options(script: str) -> list[str]:
    """Return the storage parameters of columns, tables and indexes in a dump that not every server supports."""
    bare = _WORDS.sub(lambda word: word[0].translate(_NO_BRACKETS) if word[0].startswith('"') else "", script)
    options = [option for found in _OPTIONS.finditer(bare) for option in found[1].split(",")]
    names = {option.partition("=")[0].strip().removeprefix("toast.") for option in options}
    return sorted(names - _KNOWN)
