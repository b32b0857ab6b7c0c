"""What squawk says about the SQL of each revision: nothing but the exceptions that stand there with a reason."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.script import ScriptDirectory

from mesh_storage import schema

SQUAWK = Path(sys.executable).with_name("squawk")
SCRIPTS = ScriptDirectory(str(schema.script_location()))


def sql(revision: str, direction: str) -> str:
    """Write the SQL of one revision alone: a table that is made in the same file would hide what is done to it."""
    before = SCRIPTS.get_revision(revision).down_revision or "base"
    config = schema.alembic_config()
    config.output_buffer = written = io.StringIO()
    with contextlib.redirect_stdout(written):
        if direction == "upgrade":
            command.upgrade(config, f"{before}:{revision}", sql=True)
        else:
            command.downgrade(config, f"{revision}:{before}", sql=True)
    return written.getvalue()


def squawk(text: str, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    process = subprocess.run(
        [SQUAWK, "--pg-version", "15.0", "--reporter", "json", *arguments],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd="/",  # no .squawk.toml has a say
    )
    return process.returncode, json.loads(process.stdout)


def exceptions(revision: str, direction: str) -> dict[str, str]:
    name = {"upgrade": "EXCEPTIONS", "downgrade": "DOWNGRADE_EXCEPTIONS"}[direction]
    found: dict[str, str] = getattr(SCRIPTS.get_revision(revision).module, name, {})
    return found


@pytest.mark.parametrize("revision", schema.revisions())
@pytest.mark.parametrize("direction", ["upgrade", "downgrade"])
def test_a_revision_passes_but_for_its_own_exceptions(revision: str, direction: str) -> None:
    text = sql(revision, direction)
    assert re.search("(UPDATE|INSERT INTO|DELETE FROM) mesh_alembic_version", text)
    if revision == "0001":
        # Alembic's own table, which is made before the first revision and dropped after it.
        text = re.sub(r"(CREATE TABLE mesh_alembic_version [^;]*|DROP TABLE mesh_alembic_version);", "", text)
    allowed = exceptions(revision, direction)
    arguments = [f"--exclude={','.join(allowed)}"] if allowed else []
    assert squawk(text, *arguments) == (0, [])
    code, found = squawk(text)
    assert {each["rule_name"] for each in found} == set(allowed)
    assert code == (1 if allowed else 0)
    assert all(len(reason.split()) > 3 for reason in allowed.values())


def test_squawk_would_notice() -> None:
    code, found = squawk(sql("0002", "upgrade").replace("COMMIT", "CREATE INDEX i ON nodes (port);\n\nCOMMIT"))
    assert code == 1
    assert {each["rule_name"] for each in found} >= {"require-concurrent-index-creation"}


@pytest.mark.parametrize("revision", schema.revisions())
@pytest.mark.parametrize("direction", ["upgrade", "downgrade"])
def test_every_revision_runs_in_its_own_transaction_or_may_be_done_twice(revision: str, direction: str) -> None:
    text = sql(revision, direction)
    statements = [line for line in text.splitlines() if line and not line.startswith(("--", " "))]
    assert statements[0] == "BEGIN;"
    assert statements[-1] == "COMMIT;"
    inside = True
    for line in statements:
        if line in {"BEGIN;", "COMMIT;"}:
            inside = line == "BEGIN;"
        elif "CONCURRENTLY" in line:
            assert not inside, line
            assert "IF NOT EXISTS" in line or "IF EXISTS" in line
        elif line.startswith("ALTER") and not re.search(r"VALIDATE CONSTRAINT|SET \(fillfactor|RESET \(", line):
            # Only after the locks that hold nobody up.
            assert inside, line
            assert text.index("LOCK TABLE") < text.index(line)
