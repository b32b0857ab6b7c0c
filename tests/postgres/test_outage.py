"""The pauses of a loop that waits out an outage."""

from __future__ import annotations

import random

import pytest

from mesh_storage import UnavailableError
from mesh_storage.postgres.outage import Outage


@pytest.mark.parametrize(("chance", "share"), [(0.0, 0.5), (1.0, 1.0)])
def test_pauses_double_up_to_a_second_minus_half_of_that_by_chance(
    monkeypatch: pytest.MonkeyPatch, chance: float, share: float
) -> None:
    monkeypatch.setattr(random, "random", lambda: chance)
    outage = Outage()
    error = UnavailableError("away", retryable=True)
    assert [outage.pause(error) for _ in range(8)] == [
        pytest.approx(share * longest) for longest in (0.05, 0.1, 0.2, 0.4, 0.8, 1, 1, 1)
    ]
    outage.over()
    assert outage.pause(error) == pytest.approx(share * 0.05)
