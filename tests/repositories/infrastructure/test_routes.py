"""Shows the routes: configured between nodes that exist, and found from either end where they are bidirectional."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from mesh_storage import AlreadyExistsError, InvalidInputError, MeshStorage, MissingReferenceError, Route, UnitOfWork
from mesh_storage.models.base import new_id
from mesh_storage.testing import NodeFactory, RouteFactory


def add(uow: UnitOfWork, source: str, target: str, **given: Any) -> str:
    """Add a route and give its id."""
    return uow.routes.add(Route(source_node_id=source, target_node_id=target, **given)).id


def nodes(uow: UnitOfWork, number: int) -> list[str]:
    return [node.id for node in NodeFactory.create_batch(number, uow=uow)]


def ids(routes: list[Route]) -> list[str]:
    return [route.id for route in routes]


def test_add_gives_the_route_back_with_its_id_defaults_and_times(uow: UnitOfWork) -> None:
    a, b = nodes(uow, 2)
    route = Route(source_node_id=a, target_node_id=b)
    assert uow.routes.add(route) is route
    assert route.id.startswith("route_")
    assert (route.bidirectional, route.latency_ms, route.bandwidth_mbps) == (False, 0, 0)
    assert (route.cost, route.status) == (100, "STATUS_PENDING")
    assert route.created is not None
    assert route.created == route.updated


def test_add_keeps_everything_that_is_given(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        a, b = nodes(uow, 2)
        given: dict[str, Any] = {
            "id": new_id("route"),
            "source_node_id": a,
            "target_node_id": b,
            "bidirectional": True,
            "latency_ms": Decimal("12.3450"),
            "bandwidth_mbps": Decimal(10**30),
            "cost": 2**31 - 1,
            "status": "STATUS_CONNECTED",
        }
        uow.routes.add(Route(**given))
    with storage.unit_of_work() as uow:
        found = uow.routes.get(str(given["id"]))
        assert {name: getattr(found, name) for name in given} == given


def test_a_taken_id_is_refused(uow: UnitOfWork) -> None:
    route = RouteFactory.create(uow=uow)
    with pytest.raises(AlreadyExistsError) as error, uow.savepoint():
        add(uow, route.source_node_id, route.target_node_id, id=route.id)
    assert error.value.constraint == "routes_pkey"


@pytest.mark.parametrize("end", ["source_node_id", "target_node_id"])
def test_an_end_that_is_no_node_is_a_missing_reference(uow: UnitOfWork, end: str) -> None:
    a, b = nodes(uow, 2)
    there = RouteFactory.create(uow=uow, source_node_id=a, target_node_id=b)
    new = RouteFactory.build(**{"source_node_id": a, "target_node_id": b, end: new_id("node")})
    with pytest.raises(MissingReferenceError) as error, uow.savepoint():
        uow.routes.add_many([RouteFactory.build(source_node_id=b, target_node_id=a), new])
    assert (error.value.sqlstate, error.value.constraint) == ("23503", f"routes_{end}_fkey")
    setattr(there, end, new_id("node"))
    with pytest.raises(MissingReferenceError), uow.savepoint():
        uow.routes.update(there)
    assert ids(list(uow.routes.stream())) == [there.id]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"source_node_id": None}, "source_node_id"),
        ({"target_node_id": "b"}, "target_node_id"),
        ({"latency_ms": -1}, "latency"),
        ({"latency_ms": float("nan")}, "latency"),
        ({"latency_ms": float("inf")}, "latency"),
        ({"latency_ms": Decimal("NaN")}, "latency"),
        ({"latency_ms": Decimal("sNaN")}, "latency"),
        ({"latency_ms": Decimal("1e200000")}, "latency"),
        ({"latency_ms": Decimal("1e-20000")}, "latency"),
        ({"latency_ms": "10"}, "latency"),
        ({"bandwidth_mbps": -0.1}, "bandwidth"),
        ({"bandwidth_mbps": Decimal("Infinity")}, "bandwidth"),
        ({"bandwidth_mbps": True}, "bandwidth"),
        ({"cost": -1}, "cost"),
        ({"cost": 2**31}, "cost"),
        ({"cost": 2**63}, "cost"),
        ({"cost": 1.5}, "cost"),
        ({"bidirectional": 1}, "bidirectional"),
        ({"status": "up"}, "status"),
    ],
)
def test_a_route_that_cannot_be_stored_is_refused_by_name(uow: UnitOfWork, given: dict[str, Any], field: str) -> None:
    a, b = nodes(uow, 2)
    with pytest.raises(InvalidInputError) as error, uow.savepoint():
        uow.routes.add(RouteFactory.build(**({"source_node_id": a, "target_node_id": b} | given)))
    assert error.value.field is not None
    assert field in error.value.field
    assert uow.routes.count() == 0


@pytest.mark.parametrize("name", ["latency_ms", "bandwidth_mbps"])
def test_a_metric_below_zero_is_refused_before_it_is_sent(uow: UnitOfWork, name: str) -> None:
    a, b = nodes(uow, 2)
    with pytest.raises(InvalidInputError, match="0 or more"):
        uow.routes.add(Route(source_node_id=a, target_node_id=b, **{name: -0.5}))
    assert uow.routes.count() == 0


def test_a_route_from_a_node_to_itself_is_refused(uow: UnitOfWork) -> None:
    (a,) = nodes(uow, 1)
    with pytest.raises(InvalidInputError) as error, uow.savepoint():
        add(uow, a, a)
    assert error.value.constraint == "routes_target_node_id_check"


@pytest.mark.parametrize(
    "value", [0, 7, 0.1, 1e-7, 5e-324, 1e308, Decimal("0.10"), Decimal(10) ** 300, Decimal("1e-300")]
)
def test_latency_and_bandwidth_are_exact(uow: UnitOfWork, value: Any) -> None:
    route = RouteFactory.create(uow=uow, latency_ms=value, bandwidth_mbps=value)
    found = uow.routes.get(route.id)
    assert isinstance(found.latency_ms, Decimal)
    assert found.latency_ms == found.bandwidth_mbps == value


def test_between_gives_what_leads_there_bidirectional_ones_of_the_other_direction_among_them(uow: UnitOfWork) -> None:
    a, b, c = nodes(uow, 3)
    there, back = add(uow, a, b), add(uow, b, a)
    both, both_back = add(uow, a, b, bidirectional=True), add(uow, b, a, bidirectional=True)
    add(uow, a, c, bidirectional=True)
    assert ids(uow.routes.between(a, b)) == sorted([there, both, both_back])
    assert ids(uow.routes.between(b, a)) == sorted([back, both, both_back])
    assert uow.routes.between(b, c) == []
    assert uow.routes.between(a, new_id("node")) == []
    assert uow.routes.between(a, a) == []


def test_for_node_gives_what_can_be_taken_from_there(uow: UnitOfWork) -> None:
    a, b, c = nodes(uow, 3)
    out, both_out = add(uow, a, b), add(uow, a, c, bidirectional=True)
    into, both_in = add(uow, b, a), add(uow, c, a, bidirectional=True)
    other = add(uow, b, c)
    assert ids(uow.routes.for_node(a)) == sorted([out, both_out, both_in])
    assert ids(uow.routes.for_node(b)) == sorted([into, other])
    assert ids(uow.routes.for_node(c)) == sorted([both_out, both_in])
    assert uow.routes.for_node(new_id("node")) == []


def test_ends_that_are_no_ids_are_refused_by_name(uow: UnitOfWork) -> None:
    a = new_id("node")
    for call, arguments, field in (
        (uow.routes.between, ("a\0", a), "a"),
        (uow.routes.between, (a, ""), "b"),
        (uow.routes.between, ("x" * 256, a), "a"),
        (uow.routes.between, (a, "x" * 256), "b"),
        (uow.routes.for_node, ("x" * 256,), "node_id"),
        (uow.routes.for_node, (None,), "node_id"),
    ):
        with pytest.raises(InvalidInputError) as error:
            call(*arguments)
        assert error.value.field == field
    assert uow.routes.between("no id", "x" * 255) == uow.routes.for_node("x" * 255) == []


def test_update_stores_what_was_changed(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        route = RouteFactory.create(uow=uow, bidirectional=True)
        elsewhere = nodes(uow, 1)[0]
    with storage.begin() as uow:
        found = uow.routes.get(route.id)
        found.latency_ms, found.bidirectional, found.target_node_id = Decimal("0.5"), False, elsewhere
        uow.routes.update(found)
    with storage.unit_of_work() as uow:
        found = uow.routes.get(route.id)
        assert (found.latency_ms, found.bidirectional, found.target_node_id) == (Decimal("0.5"), False, elsewhere)
        assert found.cost == route.cost
        assert found.created == route.created
        assert found.updated is not None
        assert route.updated is not None
        assert found.updated > route.updated
