"""Big tables and retention, each in a small size: what is measured, and that it adds up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import large, retention

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("options", [[], ["--ordered", "--server", "shared_buffers=8MB"]])
def test_a_table_is_measured_at_each_size(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    sizes = ["--sizes", "2000,6000", "--batch", "700", "--purge", "150", "--wait", "0"]
    large.main([*options, *sizes, "--json", str(figures)])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "| messages | 2,000 | 6,000 | 3.00 |"
    assert len(lines) == 24
    small, big = json.loads(figures.read_text())
    assert [small["messages"], big["messages"]] == [2_000, 6_000]
    for cost in (one[name] for one in (small, big) for name in ("store", "count", "stream", "backup", "purge")):
        assert 0 < cost["seconds"] < math.inf
        assert 0 <= cost["cpu"]
        assert cost["peak"] > 2**20
    assert [small["purged"], big["purged"]] == [200, 600]
    assert 0 < small["purge_slowest"] < small["purge"]["seconds"]
    assert small["table"] < big["table"]
    assert small["backup_size"] < big["backup_size"]


@pytest.mark.parametrize("deliveries", [False, True])
def test_messages_are_kept_no_longer_than_they_should_be(
    deliveries: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["--seconds", "8", "--interval", "2", "--settled", "4", "--rate", "200", "--writers", "2"]
    arguments += ["--batch", "20", "--keep", "1", "--every", "1", "--set", "mesh_messages:fillfactor=90"]
    retention.main([*arguments, "--json", str(figures), *(["--deliveries"] if deliveries else [])])
    printed = capsys.readouterr().out.splitlines()
    samples = json.loads(figures.read_text())
    assert len(printed) == 2 + len(samples) + 2
    assert printed[-1].startswith("After ")
    assert len(samples) == 4
    last = samples[-1]
    assert last["sent"] > 0
    assert 0 < last["median"] <= last["late"] <= last["slowest"]
    assert last["tables"]["mesh_messages"]["heap"] > 0
    assert (last["tables"]["mesh_deliveries"]["indexes"] > 4 * 8192) == deliveries  # a page each when empty
    assert last["overdue"] < sum(sample["sent"] * 2 for sample in samples), "some have been removed"
