"""The table of what one server carries: its arithmetic, its picture, and a short measurement."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from benchmarks.capacity import SIZES, Load, Measured, main

FIGURES = {
    "heartbeats": 40_000.0,
    "messages": 5_000.0,
    "node_bytes": 800.0,
    "message_bytes": 500.0,
    "heartbeat_wal": 150.0,
    "message_wal": 1_600.0,
}


def test_the_table_is_computed_from_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "it.svg"
    figures.write_text(json.dumps(FIGURES))
    main(["--figures", str(figures), "--picture", str(picture)])
    _, _, small, middle, _ = capsys.readouterr().out.splitlines()
    # 1,000 / 30 s and 1,000 a minute; 33.3 / 40,000 + 16.7 / 5,000; 1,000 * 800 B; 16.7 * 86,400 s * 500 B
    assert small.split(" | ") == ["| 1,000", "33", "17", "0.4%", "0.001 GiB", "1,440,000", "0.7 GiB", "2.5 GiB |"]
    assert middle.split(" | ")[1:4] == ["3,333", "1,667", "41.7%"]
    drawn = "".join(ET.fromstring(picture.read_text()).itertext())  # noqa: S314 - it was just drawn
    assert all(words in drawn for words in ("1,000,000", "41.7%", "heartbeats", "messages"))


def test_a_server_that_does_twice_as_much_is_half_as_busy() -> None:
    load, one = Load.of(100_000, 30, 1), Measured(**FIGURES)
    two = Measured(**{**FIGURES, "heartbeats": 80_000.0, "messages": 10_000.0})
    assert sum(load.shares(two).values()) == pytest.approx(sum(load.shares(one).values()) / 2)
    assert Load.of(100_000, 60, 2) == Load(100_000, 100_000 / 60, 200_000 / 60)


@pytest.mark.slow
def test_it_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    main(["--seconds", "0.2", "--json", str(figures)])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(SIZES)
    measured = json.loads(figures.read_text())
    assert measured.keys() == FIGURES.keys()
    assert all(0 < value < math.inf for value in measured.values())
    assert 300 < measured["message_bytes"] < 1_500
