"""What a dump may say to restore on other servers than the one it is from."""

from __future__ import annotations

import re

# Of columns, tables and indexes (PostgreSQL manual: ALTER TABLE, CREATE TABLE and CREATE INDEX). The server refuses a
# statement with any other.
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
# Only who has such a server can set them.
_SINCE_18 = "autovacuum_vacuum_max_threshold vacuum_max_eager_freeze_failure_rate"
_KNOWN = frozenset(f"{_COLUMN} {_TABLE} {_INDEX} {_SINCE_18}".split())

_WORDS = re.compile(r"""--[^\n]*|"(?:[^"]|"")*"|'(?:[^']|'')*'""")
"""Comments, quoted names and texts, in which anything may stand."""
_NO_BRACKETS = str.maketrans("", "", "()")
_OPTIONS = re.compile(r"^(?:ALTER .*? SET|.*?\bWITH) \(([^()]+)\)", re.MULTILINE)


def unknown_options(script: str) -> list[str]:
    """Find the options of columns, tables and indexes in the SQL of a dump that not every server knows."""
    bare = _WORDS.sub(lambda word: word[0].translate(_NO_BRACKETS) if word[0].startswith('"') else "", script)
    options = [option for found in _OPTIONS.finditer(bare) for option in found[1].split(",")]
    names = {option.partition("=")[0].strip().removeprefix("toast.") for option in options}
    return sorted(names - _KNOWN)
