"""The shard's benchmark: what it draws, and that it gives what it promises."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from bench import shard, workload


@pytest.mark.parametrize("name", workload.NAMES)
def test_batches_have_the_shape_of_their_workload(name: str) -> None:
    """Every sample has a sign in every slot, no two slots share one, and as many values as the slot has."""
    shape = workload.shape_of(name, 26_000)
    source = workload.draw(shape)
    batch = next(source)
    lengths = np.diff(batch.offsets).reshape(shape.num_slots, shape.size)
    assert lengths.min() >= 1
    np.testing.assert_allclose(lengths.mean(axis=1), shape.mean_signs, rtol=0.1, atol=0.2)
    of_slots = np.split(batch.signs, batch.offsets[shape.size : -1 : shape.size])
    assert len(np.unique(batch.signs)) == sum(len(np.unique(signs)) for signs in of_slots)
    for slot, (signs, values) in enumerate(zip(of_slots, shape.cardinalities, strict=True)):
        assert np.isin(signs, workload.sign(slot, np.arange(values))).all()
    assert not np.array_equal(next(source).signs[:100], batch.signs[:100])


@pytest.mark.parametrize(("name", "evict", "threads"), [("uniform", False, 1), ("criteo", True, 2)])
def test_the_result_has_what_it_promises(name: str, evict: bool, threads: int) -> None:
    """Times, their floors, and what the table holds."""
    found = shard.run(name, threads, resident=200_000, turns=3, evict=evict)
    times = ("lookup_ms_p50", "lookup_ms_p99", "push_ms_p50", "floor_lookup_ms", "floor_push_ms")
    assert all(found[key] > 0 for key in times)
    assert found["signs_per_batch"] >= 26 * 4096
    assert 0 < found["rows"] <= (210_000 if evict else 3_000_000)
    assert found["bytes_per_row"] > 128
    assert (found["evicted"] > 0) == evict


def test_the_command_writes_json(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["bench.shard", "uniform", "--rows", "26000", "--turns", "2", "--json", str(to)])
    shard.main()
    written = json.loads(to.read_text())
    printed = json.loads(capsys.readouterr().out)
    assert printed == {key: value for key, value in written.items() if key != "machine"}
    assert written["workload"] == "uniform"
