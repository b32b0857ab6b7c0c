"""Many rows as arrays: any texts come to the server as they were, none missing and none more."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Text, select

from mesh_storage import MeshStorage, Message
from mesh_storage.postgres.batch import Batch
from mesh_storage.postgres.statement import Statement
from mesh_storage.testing import Databases

BATCH = Batch({"one": Text(), "two": Text()})
ECHO = Statement(lambda: select(BATCH.table()))
TEXTS = st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def connection(mesh_storage_databases: Databases) -> Iterator[psycopg.Connection[tuple[str | None, str | None]]]:
    with mesh_storage_databases.fresh() as url, psycopg.connect(url, autocommit=True) as made:
        yield made


@given(rows=st.lists(st.tuples(TEXTS, st.none() | TEXTS)))
def test_texts_and_none_come_as_they_were(
    connection: psycopg.Connection[tuple[str | None, str | None]], rows: list[tuple[str, str | None]]
) -> None:
    parameters = {"one": [one for one, _ in rows], "two": [two for _, two in rows]}
    assert connection.execute(ECHO.sql, parameters).fetchall() == rows


@pytest.mark.parametrize(
    "texts",
    [
        [""],
        ["", ""],
        ["\x1f"],
        ["\x1f\x1e", "\x1e", ""],
        ["\x1e", "a\x1fb"],
        ["".join(map(chr, range(1, 300)))],
        ["{a,b}", "NULL", '"', "\\", "'", ",", "a\nb\tc", "é\u2028🕸"],
    ],
)
def test_texts_that_look_like_parts_of_an_array(
    connection: psycopg.Connection[tuple[str | None, str | None]], texts: list[str]
) -> None:
    two = [None, *texts[1:]]
    assert connection.execute(ECHO.sql, {"one": texts, "two": two}).fetchall() == list(zip(texts, two, strict=True))


def test_a_message_may_hold_control_characters(storage: MeshStorage) -> None:
    froms = ["\x1f", "\x1e", "\x01\x02\x1f"]
    with storage.begin() as uow:
        uow.messages.store_many(
            Message(id=str(n), from_node=text, to_node="b", content=b"") for n, text in enumerate(froms)
        )
    with storage.begin(read_only=True) as uow:
        assert [uow.messages.get(str(n)).from_node for n in range(3)] == froms
