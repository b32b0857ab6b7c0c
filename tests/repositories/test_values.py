"""Shows that every key, text, number, time and JSON value comes out equal, or is refused by the name of its field."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text as sql

from mesh_storage import (
    ConfigEntry,
    ConflictError,
    InvalidInputError,
    LogEntry,
    MeshStorage,
    MeshStorageError,
    Message,
    Node,
    UnitOfWork,
)
from mesh_storage.testing import Databases, MeshFactory, MessageFactory, NodeFactory


class Text(NamedTuple):
    """A text that is stored somewhere: its field, its limits, and how it goes in and comes out."""

    field: str
    limit: int | None
    empty: bool
    trip: Callable[[UnitOfWork, str], str]


class Json(NamedTuple):
    """A JSON value that is stored somewhere: its field, and how it goes in and comes out."""

    field: str
    trip: Callable[[UnitOfWork, Any], Any]


def message_trip(field: str) -> Callable[[UnitOfWork, str], str]:
    def trip(uow: UnitOfWork, value: str) -> str:
        stored = uow.messages.store(MessageFactory.build(**{field: value}))
        return str(getattr(uow.messages.get(stored.id), field))

    return trip


def node_trip(field: str) -> Callable[[UnitOfWork, str], str]:
    def trip(uow: UnitOfWork, value: str) -> str:
        return str(getattr(uow.nodes.get(uow.nodes.add(NodeFactory.build(**{field: value})).id), field))

    return trip


def mesh_trip(field: str) -> Callable[[UnitOfWork, str], str]:
    def trip(uow: UnitOfWork, value: str) -> str:
        return str(getattr(uow.meshes.get(uow.meshes.add(MeshFactory.build(**{field: value})).id), field))

    return trip


def state_trip(uow: UnitOfWork, key: str) -> str:
    uow.state.put(key, b"")
    return uow.state.get(key).key


def node_state_trip(uow: UnitOfWork, key: str) -> str:
    uow.node_states.put_many({key: {}})
    return uow.node_states.get(key).node_id


def destination_trip(uow: UnitOfWork, key: str) -> str:
    uow.routing_table.replace_all({key: {}})
    (found,) = uow.routing_table.all()
    return found


def setting_trip(uow: UnitOfWork, key: str) -> str:
    uow.runtime_config.put(key, 1)
    (found,) = uow.runtime_config.all(key)
    return found


TEXTS = [
    Text("Message.id", 64, empty=False, trip=message_trip("id")),
    Text("Message.from_node", 64, empty=False, trip=message_trip("from_node")),
    Text("Message.to_node", 64, empty=False, trip=message_trip("to_node")),
    Text("StateEntry.key", 255, empty=False, trip=state_trip),
    Text("NodeState.node_id", 64, empty=False, trip=node_state_trip),
    Text("RoutingEntry.destination", 255, empty=False, trip=destination_trip),
    Text("ConfigEntry.key", 255, empty=False, trip=setting_trip),
    Text("Node.name", 255, empty=False, trip=node_trip("name")),
    Text("Node.ip_address", 255, empty=False, trip=node_trip("ip_address")),
    Text("Node.description", None, empty=True, trip=node_trip("description")),
    Text("Node.platform", 255, empty=True, trip=node_trip("platform")),
    Text("Node.version", 255, empty=True, trip=node_trip("version")),
    Text("Node.public_key", None, empty=True, trip=node_trip("public_key")),
    Text("Mesh.name", 255, empty=False, trip=mesh_trip("name")),
    Text("Mesh.description", None, empty=True, trip=mesh_trip("description")),
    Text("Mesh.public_key", None, empty=True, trip=mesh_trip("public_key")),
]
every_text = pytest.mark.parametrize("kind", TEXTS, ids=lambda kind: kind.field)


def put_many_trip(uow: UnitOfWork, value: Any) -> Any:
    uow.node_states.put_many({"n": value})
    return uow.node_states.get("n").state


def log_trip(uow: UnitOfWork, value: Any) -> Any:
    index = uow.consensus_log.last_index() + 1
    uow.consensus_log.append(1, index, value)
    return uow.consensus_log.get(index).entry


def log_many_trip(uow: UnitOfWork, value: Any) -> Any:
    index = uow.consensus_log.last_index() + 1
    uow.consensus_log.append_many([LogEntry(term=1, index=index, entry=value)])
    return uow.consensus_log.get(index).entry


def replace_trip(uow: UnitOfWork, value: Any) -> Any:
    uow.routing_table.replace_all({})
    uow.routing_table.replace_all({"d": value})
    return uow.routing_table.all()["d"]


def put_trip(uow: UnitOfWork, value: Any) -> Any:
    uow.runtime_config.put("k", value)
    return uow.runtime_config.value("k")


def returned_trip(uow: UnitOfWork, value: Any) -> Any:
    return uow.runtime_config.put("k", value).value


def merge_trip(uow: UnitOfWork, value: Any) -> Any:
    return uow.node_states.merge("merged", {"k": value}).state["k"]


JSONS = [
    Json("ConfigEntry.value", put_trip),
    Json("ConfigEntry.value", returned_trip),
    Json("NodeState.state", put_many_trip),
    Json("RoutingEntry.route", replace_trip),
    Json("LogEntry.entry", log_trip),
    Json("LogEntry.entry", log_many_trip),
    Json("patch", merge_trip),
]
every_json = pytest.mark.parametrize("kind", JSONS, ids=lambda kind: kind.trip.__name__)


def strict(value: Any) -> str:
    """Write a JSON value so that 1, 1.0 and true are three, and the order of keys is nothing."""
    return json.dumps(value, sort_keys=True)


def nested(depth: int) -> Any:
    return json.loads("[" * depth + "]" * depth)


@pytest.fixture(scope="module")
def shared(mesh_storage_databases: Databases) -> Iterator[MeshStorage]:
    with mesh_storage_databases.fresh() as url, MeshStorage.open(url) as storage:
        yield storage


many_values = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

STORABLE = {
    "one character": "a",
    "spaces": "  a \t\n\r ",
    "right to left": "\u202e\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "astral": "\U0001f600\U0010ffff\U00010000",
    "combining": "e\u0301\u00e9",
    "wildcards": "%_%%__",
    "quotes": "'\"`''--;/*",
    "backslashes": "\\\\n\\u0000\\",
    "braces": "{} {0} {key!r} %(key)s %s $1 :key",
    "array": '{"a",NULL,b}',
    "control characters": "".join(map(chr, range(1, 32))) + "\x7f\x80",
    "noncharacters": "\ufffe\uffff\ufeff\ufffd\ud7ff\ue000",
    "NULL": "NULL",
}


@every_text
@pytest.mark.parametrize("value", STORABLE.values(), ids=list(STORABLE))
def test_a_text_is_stored_and_found_equal(shared: MeshStorage, kind: Text, value: str) -> None:
    with shared.unit_of_work() as uow:
        assert kind.trip(uow, value) == value


@every_text
def test_a_text_has_its_limit_in_characters(shared: MeshStorage, kind: Text) -> None:
    with shared.unit_of_work() as uow:
        for character in ("x", "\U0001f600"):
            assert kind.trip(uow, character * (kind.limit or 100_000)) == character * (kind.limit or 100_000)
            if kind.limit is not None:
                with pytest.raises(InvalidInputError) as error:
                    kind.trip(uow, character * (kind.limit + 1))
                assert error.value.field == kind.field


@every_text
@pytest.mark.parametrize("value", ["\0", "a\0b", "\ud800", "a\udfff", b"bytes", 5, 1.5])
def test_what_is_no_storable_text_is_refused_by_name(shared: MeshStorage, kind: Text, value: Any) -> None:
    with shared.unit_of_work() as uow:
        with pytest.raises(InvalidInputError) as error:
            kind.trip(uow, value)
        assert error.value.field == kind.field
        assert not error.value.retryable
        assert isinstance(error.value, ValueError)
        uow.runtime_config.put("the unit of work", "goes on")


@every_text
def test_an_empty_text_is_stored_or_refused_by_name(shared: MeshStorage, kind: Text) -> None:
    with shared.unit_of_work() as uow:
        if kind.empty:
            assert kind.trip(uow, "") == ""
            return
        with pytest.raises(InvalidInputError) as error:
            kind.trip(uow, "")
        assert error.value.field == kind.field


any_text = st.text(st.characters(exclude_categories=()), max_size=80) | st.text(
    "ab\0\ud800%_\\'{}\U0010ffff", max_size=8
)


@many_values
@given(values=st.lists(any_text, min_size=1, max_size=6, unique=True))
def test_any_text_comes_out_equal_or_is_refused_by_name(shared: MeshStorage, values: list[str]) -> None:
    with shared.unit_of_work() as uow:
        for kind in (TEXTS[0], TEXTS[3], TEXTS[4], TEXTS[9]):
            for value in values:
                storable = "\0" not in value and not re.search("[\ud800-\udfff]", value)
                fits = len(value) <= (kind.limit or len(value)) and (kind.empty or value != "")
                if storable and fits:
                    assert kind.trip(uow, value) == value
                else:
                    with pytest.raises(InvalidInputError) as error:
                        kind.trip(uow, value)
                    assert error.value.field == kind.field


short_text = st.text("ab%_\\\u00e9\ue000\ud7ff\U0010ffff\x01", min_size=1, max_size=5)


@many_values
@given(keys=st.sets(short_text, max_size=12), prefix=st.just("") | short_text)
def test_any_prefix_finds_the_keys_that_begin_with_it(shared: MeshStorage, keys: set[str], prefix: str) -> None:
    keys |= {prefix + key for key in keys if len(key) % 2}
    with shared.unit_of_work() as uow:
        for key in keys:
            uow.state.put(key, b"")
            uow.runtime_config.put(key, key)
        expected = sorted(key for key in keys if key.startswith(prefix))
        assert [entry.key for entry in uow.state.stream(prefix, batch_size=3)] == expected
        assert uow.state.count(prefix) == len(expected)
        assert list(uow.runtime_config.all(prefix).items()) == [(key, key) for key in expected]


NUMBERS = {
    "zero": 0,
    "a fraction of zero": 0.0,
    "one": 1,
    "one as a float": 1.0,
    "true": True,
    "2**53 + 1": 2**53 + 1,
    "2**63": 2**63,
    "-2**64": -(2**64),
    "10**400": 10**400,
    "4,300 digits": 10**4299,
    "the largest float": 1.7976931348623157e308,
    "1e308": 1e308,
    "-1e308": -1e308,
    "the smallest float": 5e-324,
    "the smallest normal float": 2.2250738585072014e-308,
    "1e15": 1e15,
    "1e16": 1e16,
    "9007199254740993.0": 9007199254740993.0,
    "1e22": 1e22,
    "1e23": 1e23,
    "1e-7": 1e-7,
    "0.1": 0.1,
    "1/3": 1 / 3,
}
OTHERS = {
    "null": None,
    "false": False,
    "an empty text": "",
    "an empty list": [],
    "an empty object": {},
    "an empty key": {"": None},
    "empty containers in containers": {"a": [], "b": {}, "c": [[], {}], "d": [{"e": []}]},
    "all kinds": {
        "a": [1, 1.0, True, None, "x", {"b": [1e300, -1e16, 10**30]}],
        "\u00e9": {"\U0001f600": "\U0010ffff"},
    },
    "keys that differ in case or form": {"a": 1, "A": 2, "e\u0301": 3, "\u00e9": 4, " a": 5},
    "keys that look like numbers": {"1": 1, "01": 2, "1.0": 3, "null": 4},
    "texts that look like JSON": ["null", "1e400", "\\u0000", '"', "\\", "{}", "NaN", "\u2028\u2029"],
    "control characters": "".join(map(chr, range(1, 32))),
    "nested 200 deep": nested(200),
    "a long list": list(range(10_000)),
    "a long text": "\u00e9" * 1_000_000,
    "a large object": {f"key {number}": {"n": number} for number in range(5000)},
}
REFUSED = {
    "NaN": float("nan"),
    "infinity": float("inf"),
    "minus infinity": float("-inf"),
    "NaN inside": {"a": [1, {"b": float("nan")}]},
    "a tuple": (1, 2),
    "a tuple inside": [1, (2,)],
    "a set": {1},
    "a frozen set": {"a": frozenset()},
    "bytes": b"x",
    "a Decimal": Decimal(1),
    "a datetime": datetime.now(UTC),
    "an object": object(),
    "an int subclass": IntEnum("Number", "ONE").ONE,
    "an int as key": {1: 2},
    "None as key": {"a": {None: 1}},
    "True as key": {True: 1},
    "a float as key": [{1.5: 1}],
    "NUL": "a\0",
    "NUL in a key": {"a\0": 1},
    "NUL inside": [["\0"]],
    "a lone surrogate": "\ud800",
    "a lone surrogate in a key": {"\udc00": 1},
    "a pair of surrogates": "\ud83d\ude00",
    "too many digits": 10**4300,
    "nested 201 deep": nested(201),
    "nested 500 deep": nested(500),
}


@every_json
@pytest.mark.parametrize("value", (NUMBERS | OTHERS).values(), ids=list(NUMBERS | OTHERS))
def test_a_json_value_comes_out_equal_and_of_the_same_type(shared: MeshStorage, kind: Json, value: Any) -> None:
    if kind.field == "patch" and strict(value) == strict(nested(200)):
        value = nested(199)
    with shared.unit_of_work() as uow:
        found = kind.trip(uow, value)
        assert found == value
        assert type(found) is type(value)
        assert strict(found) == strict(value)


@every_json
@pytest.mark.parametrize("value", REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_json_value_is_refused_by_name(shared: MeshStorage, kind: Json, value: Any) -> None:
    with shared.unit_of_work() as uow:
        for given_value in (value, [value], {"k": value}):
            with pytest.raises(InvalidInputError) as error:
                kind.trip(uow, given_value)
            assert error.value.field == kind.field
        uow.runtime_config.put("the unit of work", "goes on")


def test_a_value_that_holds_itself_is_refused(uow: UnitOfWork) -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(InvalidInputError) as error:
        uow.runtime_config.put("k", value)
    assert error.value.field == "ConfigEntry.value"


@every_json
def test_minus_zero_is_found_equal(shared: MeshStorage, kind: Json) -> None:
    with shared.unit_of_work() as uow:
        found = kind.trip(uow, -0.0)
        assert found == 0.0
        assert type(found) is float


def test_a_comparison_of_the_callers_that_raises_decides_nothing(uow: UnitOfWork) -> None:
    class Strange(dict[str, int]):
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, _: object) -> bool:
            raise ZeroDivisionError

    assert put_trip(uow, [Strange(a=1)]) == [{"a": 1}]


class Celsius(float):
    """A number with a unit."""


class Color(Enum):
    """Equal to its JSON, but none."""

    RED = "red"

    def __eq__(self, other: object) -> bool:
        return other == self.value

    def __hash__(self) -> int:
        return hash(self.value)


@pytest.mark.parametrize("beside", [None, 1e300, -0.0], ids=["alone", "beside an exponent", "beside a negative zero"])
@pytest.mark.parametrize(
    "value", [Celsius(2.5), Color.RED, itertools.count()], ids=["a float subclass", "an enumeration", "endless"]
)
def test_what_is_refused_is_so_whatever_it_is_equal_to(uow: UnitOfWork, value: Any, beside: float | None) -> None:
    with pytest.raises(InvalidInputError), uow.savepoint():
        uow.runtime_config.put("k", [value, beside])


def test_an_ordered_dict_is_found_as_an_equal_dict(uow: UnitOfWork) -> None:
    assert put_trip(uow, OrderedDict(b=1, a=2)) == {"a": 2, "b": 1}


plain_text = st.text(max_size=12).map(lambda value: value.replace("\0", ""))
floats = st.floats(allow_nan=False, allow_infinity=False).map(lambda value: value + 0.0)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | st.integers(-(10**60), 10**60) | plain_text,
    lambda children: st.lists(children, max_size=5) | st.dictionaries(plain_text, children, max_size=5),
    max_leaves=20,
)


@many_values
@given(values=st.lists(any_json, min_size=1, max_size=5))
def test_any_json_value_comes_out_equal_and_of_the_same_type(shared: MeshStorage, values: list[Any]) -> None:
    with shared.unit_of_work() as uow:
        for kind in JSONS:
            assert [strict(kind.trip(uow, value)) for value in values] == [strict(value) for value in values]


@many_values
@given(value=any_json, poison=st.sampled_from(sorted(REFUSED)), wrap=st.sampled_from(["list", "object", "deep"]))
def test_one_bad_part_makes_any_json_value_refused(shared: MeshStorage, value: Any, poison: str, wrap: str) -> None:
    bad = {
        "list": [value, REFUSED[poison], value],
        "object": {"a": value, "b": REFUSED[poison]},
        "deep": {"a": [value, {"b": [REFUSED[poison]]}]},
    }[wrap]
    with shared.unit_of_work() as uow:
        for kind in JSONS:
            with pytest.raises(InvalidInputError) as error:
                kind.trip(uow, bad)
            assert error.value.field == kind.field


def test_an_integer_of_an_older_service_is_read_however_long_it_is(uow: UnitOfWork) -> None:
    long = [10**5000 - 1, {"a": -(10**100_000)}]
    made = "CAST(:json AS jsonb)"
    written = "[" + "9" * 5000 + ', {"a": -1' + "0" * 100_000 + "}]"
    uow.session.execute(sql(f"INSERT INTO mesh_runtime_config VALUES ('long', {made}), ('n', '1')"), {"json": written})
    uow.session.execute(sql(f"INSERT INTO mesh_consensus_log VALUES (1, 1, {made})"), {"json": written})
    assert uow.runtime_config.all() == {"long": long, "n": 1}
    assert [entry.value for entry in uow.runtime_config.page().items] == [long, 1]
    assert uow.session.get_one(ConfigEntry, "long").value == long
    assert uow.consensus_log.get(1).entry == long
    with pytest.raises(ConflictError), uow.savepoint():
        uow.consensus_log.append(1, 1, [1, {"a": 1}])


def test_nesting_of_an_older_service_is_read_or_says_what_it_is(uow: UnitOfWork) -> None:
    for key, depth in (("deep", 500), ("deeper", 5000)):
        nest = "CAST(repeat('[', :depth) || repeat(']', :depth) AS jsonb)"
        uow.session.execute(sql(f"INSERT INTO mesh_runtime_config VALUES (:key, {nest})"), {"key": key, "depth": depth})
    assert isinstance(uow.runtime_config.value("deep"), list)
    try:
        json.loads("[" * 5000 + "]" * 5000)
    except RecursionError:  # as Python 3.11 does
        refused: Any = pytest.raises(
            MeshStorageError, match="a JSON value stored by another service is nested too deep"
        )
    else:
        refused = nullcontext()
    with refused, uow.savepoint():
        assert isinstance(uow.runtime_config.all()["deeper"], list)
    with refused, uow.savepoint():
        assert isinstance(uow.session.get_one(ConfigEntry, "deeper").value, list)
    uow.session.expire_all()
    uow.runtime_config.put("deeper", 1)
    assert uow.runtime_config.value("deeper") == 1


@pytest.mark.parametrize("content", [b"", b"\0", bytes(range(256)), b"\\x00", b"\xff" * 10_000], ids=len)
def test_bytes_come_out_equal(uow: UnitOfWork, content: bytes) -> None:
    uow.state.put("k", content)
    uow.messages.store(MessageFactory.build(id="one", content=content))
    uow.messages.store_many([MessageFactory.build(id="many", content=content)])
    found = [uow.state.get("k").value, uow.messages.get("one").content, uow.messages.get("many").content]
    assert found == [content] * 3
    assert {type(value) for value in found} == {bytes}


def test_content_of_a_hundred_megabytes_comes_out_equal(storage: MeshStorage) -> None:
    content = os.urandom(100_000_000)
    with storage.begin() as uow:
        uow.messages.store(Message(id="large", from_node="a", to_node="b", content=content))
    with storage.unit_of_work(read_only=True) as uow:
        assert uow.messages.get("large").content == content


@pytest.mark.parametrize(
    "moment",
    [
        datetime(1, 1, 1, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(1970, 1, 1, tzinfo=timezone(timedelta(hours=14))),
        datetime(2024, 2, 29, 12, 0, 0, 1, tzinfo=timezone(timedelta(hours=-12, minutes=-30))),
        datetime(1883, 11, 18, 12, tzinfo=timezone(timedelta(seconds=-17_762))),
    ],
    ids=str,
)
def test_a_time_comes_out_equal(uow: UnitOfWork, moment: datetime) -> None:
    node = uow.nodes.add(NodeFactory.build(created=moment))
    assert uow.nodes.get(node.id).created == moment


@pytest.mark.parametrize(
    "moment",
    [
        datetime(2024, 1, 1),  # noqa: DTZ001
        datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1))),
        datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-2))),
        "2024-01-01",
        0,
        datetime.now(UTC).date(),
    ],
    ids=str,
)
def test_a_time_without_zone_or_beyond_the_calendar_is_refused_by_name(uow: UnitOfWork, moment: Any) -> None:
    with pytest.raises(InvalidInputError) as error:
        uow.nodes.add(Node(name="n", ip_address="10.0.0.1", created=moment))
    assert error.value.field == "Node.created"
