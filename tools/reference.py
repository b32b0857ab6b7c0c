"""Writes what the documents take from the code: the attributes of models, the log events, the picture of the tables.

python tools/reference.py [--check] [--docs DIRECTORY]
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from schema_picture import draw, is_unique, type_of
from sqlalchemy import CheckConstraint, Column, LargeBinary, Numeric
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.schema import CallableColumnDefault, DefaultClause, ScalarElementColumnDefault

from mesh_storage.models import Base, columns, infrastructure, runtime
from mesh_storage.models.base import attribute_names, table_of
from mesh_storage.postgres.jsonb import MAX_DEPTH
from mesh_storage.repositories import checks

ROOT = Path(__file__).parent.parent
GENERATED = re.compile(r"(<!-- generated from the code by make sync -->\n).*?(<!-- end -->)", re.DOTALL)


def models() -> list[type[Base]]:
    """Return the models in the order in which they are defined, infrastructure first."""
    return [
        each
        for module in (infrastructure, runtime)
        for each in vars(module).values()
        if inspect.isclass(each) and issubclass(each, Base) and each.__module__ == module.__name__
    ]


# Attributes


def attributes(model: type[Base]) -> str:
    """Describe a model: a table of its attributes, and a list of its relationships."""
    hints, texts = typing.get_type_hints(model), docstrings(model)
    lines = [
        f"### {model.__name__}",
        "",
        f"{inspect.getdoc(model)} Table `{table_of(model).name}`.",
        "",
        "| attribute | type | column | default | limits | meaning and unit |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, column in zip(attribute_names(model), table_of(model).columns, strict=True):
        (hint,) = typing.get_args(hints[name])
        place = f"`{column.name}` {type_of(column)}"
        # What the database gives at every write is None only before the first one.
        kind = "`int`" if column is model.__mapper__.version_id_col else type_name(hint)
        cells = [f"`{name}`", kind, place, default(column), limits(column), texts[name]]
        lines.append(f"| {' | '.join(cells)} |")
    relationships = model.__mapper__.relationships.items()
    if relationships:
        lines += ["", "Relationships:", ""]
    for name, relationship in relationships:
        other = f"{'list of ' if relationship.uselist else ''}`{relationship.mapper.class_.__name__}`"
        lines.append(f"- `{name}` ({other}): {texts[name]}")
    return "\n".join(lines)


def docstrings(model: type[Base]) -> dict[str, str]:
    """Return the docstring of each attribute of a model: its own, or that of its annotated type."""
    shared = dict(documented(ast.parse(inspect.getsource(columns)).body))
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(definition, ast.ClassDef)
    own = dict(documented(definition.body))
    annotated = {ast.unparse(each.target): each for each in definition.body if isinstance(each, ast.AnnAssign)}
    types = {name: ast.unparse(each.annotation).removeprefix("Mapped[")[:-1] for name, each in annotated.items()}
    texts = {name: own.get(name) or shared.get(kind) for name, kind in types.items()}
    missing = [name for name, text in texts.items() if text is None]
    if missing:
        raise SystemExit(f"{model.__name__} has attributes without a docstring: {', '.join(missing)}")
    return {name: str(text) for name, text in texts.items()}


def documented(body: Sequence[ast.stmt]) -> Iterator[tuple[str, str]]:
    """Yield the names that are assigned to, each with the text that follows it."""
    for assignment, following in pairwise(body):
        if isinstance(assignment, ast.AnnAssign):
            target: ast.expr = assignment.target
        elif isinstance(assignment, ast.Assign):
            target = assignment.targets[0]
        else:
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            yield ast.unparse(target), " ".join(str(following.value.value).split())


def type_name(hint: Any) -> str:
    """Spell a type of Python out."""
    if hint is Any:
        return "`JSON`"
    if hint is NoneType:
        return "`None`"
    if isinstance(hint, type):
        return f"`{hint.__name__}`"
    return " or ".join(map(type_name, typing.get_args(hint)))


def default(column: Column[Any]) -> str:
    """Say what is stored where no value is given."""
    if isinstance(column.default, CallableColumnDefault) or column.server_onupdate is not None:
        return "a new one"
    if isinstance(column.default, ScalarElementColumnDefault):
        return f"`{column.default.arg!r}`"
    if isinstance(column.server_default, DefaultClause):
        return f"`{column.server_default.arg}`"
    return "`None`" if column.nullable else "required"


def limits(column: Column[Any]) -> str:
    """Say what a value must be: by the constraints of the database, then by what the library checks beyond them."""
    table, found = column.table, list[str]()
    if list(table.primary_key) == [column]:
        found.append("primary key")
    elif column.primary_key:
        found.append(f"primary key ({', '.join(each.name for each in table.primary_key)})")
    if is_unique(column):
        found.append("unique")
    found += [f"references `{key.target_fullname}`" for key in column.foreign_keys]
    by_name = {each.name: each for each in table.constraints if isinstance(each, CheckConstraint)}
    check = by_name.get(f"{table.name}_{column.name}_check")
    if check is not None:
        found.append(f"`{check.sqltext}`")
    elif column.info.get("not_empty"):
        found.append("not empty")
    if isinstance(column.type, LargeBinary):
        found.append(f"at most {checks._CONTENT_BYTES >> 20} MiB")
    elif isinstance(column.type, JSONB):
        found.append(f"nested at most {MAX_DEPTH} levels deep")
    elif isinstance(column.type, Numeric):
        found.append(f"at most {checks._NUMERIC_DIGITS:,} digits before the point, {checks._NUMERIC_SCALE:,} after it")
    return "; ".join(found)


# Log events


class Event(NamedTuple):
    """A call of the logger that has an event."""

    name: str
    level: str
    message: str
    fields: tuple[str, ...]


def events(package: Path) -> set[Event]:
    """Find each call of the logger in the source that has the extra field `event`."""
    calls = (
        node
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    )
    found = set[Event]()
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        for keyword in call.keywords:
            if keyword.arg == "extra" and ast.unparse(call.func.value) == "logger":
                assert isinstance(keyword.value, ast.Dict), ast.unparse(call)
                fields = {
                    ast.literal_eval(key): value
                    for key, value in zip(keyword.value.keys, keyword.value.values, strict=True)
                    if key
                }
                name, message = ast.literal_eval(fields.pop("event")), ast.literal_eval(call.args[0])
                found.add(Event(name, call.func.attr.upper(), message, tuple(fields)))
    return found


def event_table(found: set[Event]) -> str:
    """Describe the events."""
    rows = [
        f"| `{each.name}` | {each.level} | {each.message} | {' '.join(f'`{field}`' for field in each.fields)} |"
        for each in sorted(found)
    ]
    return "\n".join(["| event | level | message | other fields |", "| --- | --- | --- | --- |", *rows])


# Documents


def outdated(docs: Path) -> dict[Path, str]:
    """Return the documents that are not what the code says, with what they should be."""
    found = models()
    sections = {
        docs / "models.md": "\n\n".join(map(attributes, found)),
        docs / "logging.md": event_table(events(ROOT / "mesh_storage")),
    }
    wanted = {docs / "schema.svg": draw([table_of(model) for model in found])}
    for path, section in sections.items():
        text, count = GENERATED.subn(
            lambda match, section=section: f"{match[1]}\n{section}\n\n{match[2]}",  # type: ignore[misc]
            path.read_text(encoding="utf-8"),
        )
        if count != 1:
            raise SystemExit(f"{path} has {count} generated sections, not one")
        wanted[path] = text
    return {
        path: text
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say what is out of date, and fail then")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the documents are")
    given = parser.parse_args(arguments)
    found = outdated(given.docs)
    for path, text in found.items():
        if given.check:
            print(f"{path} is out of date; run make sync", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
    return int(given.check and bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
