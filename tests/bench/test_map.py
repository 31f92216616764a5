"""The table beside other maps: they do the same thing, and every one of them gets its figures."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import contender as contenders
from bench import map as bench_map
from flowps.ps.table import aligned_empty
from flowps.ps.team import Team

ROWS, DIM = 2000, contenders.DIM


@pytest.fixture(params=contenders.CONTENDERS, ids=lambda kind: kind.__name__)
def contender(request: pytest.FixtureRequest) -> Iterator[contenders.Contender]:
    kind = request.param
    if importlib.util.find_spec(kind.package) is None:
        pytest.skip(f"{kind.package} is not installed")
    made = kind(ROWS, 2)
    yield made
    made.close()


def read(contender: contenders.Contender, batch: contenders.Batch) -> np.ndarray:
    return contender.read(batch, aligned_empty((len(batch.signs), DIM))).copy()


def test_all_return_the_same_rows(contender: contenders.Contender) -> None:
    bench_map.fill(contender, ROWS)
    naive = np.zeros((ROWS, DIM), np.float32)
    naive -= np.float32(contenders.RATE) * np.random.default_rng(0).standard_normal(naive.shape, np.float32)
    np.testing.assert_array_equal(read(contender, bench_map.every(ROWS)), naive)
    batch = bench_map.cut(bench_map.drawn(ROWS, 1.05), 500)[0]
    assert len(np.unique(batch.signs)) < len(batch.signs)
    np.testing.assert_array_equal(read(contender, batch), naive[batch.ranks])
    grads = np.random.default_rng(1).standard_normal((500, DIM), np.float32)
    contender.write(batch, aligned_empty(grads.shape), grads)
    for rank, grad in zip(batch.ranks, grads, strict=True):
        naive[rank] -= np.float32(contenders.RATE) * grad
    np.testing.assert_allclose(read(contender, bench_map.every(ROWS)), naive, atol=1e-5)


def test_a_batch_may_have_one_sign(contender: contenders.Contender) -> None:
    bench_map.fill(contender, ROWS)
    one = bench_map.cut(bench_map.every(ROWS), 1)[7]
    np.testing.assert_array_equal(read(contender, one), read(contender, bench_map.every(ROWS))[7:8])


def test_callers_at_once_lose_nothing(contender: contenders.Contender, hurried_switching: None) -> None:
    parts = bench_map.cut(bench_map.every(ROWS), ROWS // 4)
    drawn = bench_map.cut(bench_map.drawn(ROWS, 1.05), 64)[:100]
    grads = np.ones((64, DIM), np.float32)
    team = Team(4, "test")
    team.run(lambda caller: contender.insert(parts[caller], aligned_empty((ROWS // 4, DIM))), 4)

    def work(caller: int) -> None:
        for batch in drawn:
            contender.write(batch, aligned_empty(grads.shape), grads)

    team.run(work, 4)
    team.close()
    times = 4 * np.bincount(np.concatenate([batch.ranks for batch in drawn]), minlength=ROWS)
    # Sums of powers of two: exact in any order.
    np.testing.assert_array_equal(read(contender, bench_map.every(ROWS)), np.repeat(-contenders.RATE * times[:, None], DIM, axis=1))


@pytest.mark.long
def test_the_command(tmp_path: Path) -> None:
    to = tmp_path / "map.json"
    arguments = ["--rows", str(ROWS), "--seconds", "0.01", "--threads", "1", "2", "--batches", "64", "500", "--json", str(to)]
    done = subprocess.run([sys.executable, "-m", "bench.map", *arguments], capture_output=True, text=True, check=True)
    result = json.loads(to.read_text(encoding="utf-8"))
    assert list(result) == ["rows", "seconds", "figures", "left_out", "machine"]
    assert (result["rows"], result["seconds"]) == (ROWS, 0.01)
    assert result["machine"]["cores"] >= 1
    assert done.stdout == bench_map.markdown(result) + "\n"
    assert done.stderr == ""
    for kind in contenders.CONTENDERS:
        assert kind.name in done.stdout
        figures = [figure for figure in result["figures"] if figure["contender"] == kind.name]
        if importlib.util.find_spec(kind.package) is None:
            assert not figures
            assert result["left_out"][kind.name] == f"{kind.package} is not installed"
            assert f"{kind.name} is left out: {kind.package} is not installed." in done.stdout
            continue
        expected = {
            (operation, draw, size, threads, callers)
            for operation in kind.operations
            for draw in (["new"] if operation == "insert" else ["zipf", "uniform"])
            for size in (64, 500)
            for threads, callers in [(1, 1), (1, 2)] + [(2, 1)] * kind.shares_calls
        }
        keys = ("operation", "draw", "batch_signs", "threads", "callers")
        assert {tuple(figure[key] for key in keys) for figure in figures} == expected
        assert len(figures) == len(expected)
        for figure in figures:
            assert 0 < figure["p10"] <= figure["million_signs_per_s"] <= figure["p90"] < math.inf
            assert figure["samples"] >= 3


def figure(**of: Any) -> dict[str, Any]:
    return {"threads": 1, "callers": 1, "operation": "read", "draw": "zipf", "batch_signs": 4096, "million_signs_per_s": 12.34} | of


def test_markdown() -> None:
    figures = [
        figure(contender="ours"),
        figure(contender="ours", operation="insert", draw="new"),
        figure(contender="ours", callers=2),
        figure(contender="theirs", threads=4, million_signs_per_s=1),
    ]
    assert bench_map.markdown({"figures": figures, "left_out": {"torch": "it is not here"}}).splitlines() == [
        "| million signs/s |        | threads       | zipf 4,096 | new 4,096 |",
        "| --------------- | ------ | ------------- | ---------: | --------: |",
        "| read            | ours   | 1             |       12.3 |           |",
        "| read            | ours   | 2 callers     |       12.3 |           |",
        "| read            | theirs | 4 in one call |        1.0 |           |",
        "| insert          | ours   | 1             |            |      12.3 |",
        "",
        "torch is left out: it is not here.",
    ]
