"""Where the CPU time of a batch goes: every stage of a travel over small data, and the table of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import stages
from flowps.synthetic import criteo, generate


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generate(criteo(), folder, rows=10_000, test_rows=100)
    return folder


def test_every_stage_has_its_times(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run only what is asked of it is made up: whole runs are trained by the long tests."""
    run = {"stages_ms": dict.fromkeys(("DecodePartition", "TrainStep"), 1.5), "cpu_ms": 1e6, "examples_per_s": 2e5}
    monkeypatch.setattr(stages, "in_a_run", lambda *arguments: run)
    found = stages.measure("criteo", "small", "float32", 1, data)
    assert [of["stage"] for of in found["stages"]] == list(stages.STAGES)
    by_name = {of["stage"]: of for of in found["stages"]}
    for name in ("ReadPartition", "DecodePartition", "EmbeddingLookup", "TrainStep", "PushGrad"):
        assert by_name[name]["cpu_ms"] > 0
        assert by_name[name]["floor_cpu_ms"] > 0
        assert by_name[name]["ratio"] == pytest.approx(by_name[name]["cpu_ms"] / by_name[name]["floor_cpu_ms"])
    assert by_name["Metrics"]["ratio"] is None
    assert (by_name["TrainStep"]["run_wall_ms"], by_name["PushGrad"]["run_wall_ms"]) == (1.5, None)
    assert found["sum_cpu_ms"] == pytest.approx(sum(of["cpu_ms"] for of in found["stages"]))
    table = stages.markdown({"workloads": [found]})
    assert "`criteo`, net small, float32, batches of 4,096:" in table
    assert f"| everything else in a run | {1e6 - found['sum_cpu_ms']:.2f} | | | | |" in table
    assert "| **a run** (200,000 examples/s) | **1000000.00** | | | | |" in table


@pytest.mark.parametrize("shapes", [[(8, 4), (4, 1)]])
def test_the_floor_of_a_step_has_three_products_for_each_dense_layer(shapes: Sequence[tuple[int, int]]) -> None:
    model = SimpleNamespace(trainable_variables=[np.zeros(shape) for of in shapes for shape in (of, of[1:])])
    multiply = stages._products(model, 16, "mixed_bfloat16")
    assert np.isfinite(float(multiply()))
    products: Any = multiply.__closure__[1].cell_contents  # type: ignore[attr-defined]
    layers: Any = multiply.__closure__[0].cell_contents  # type: ignore[attr-defined]
    found = products(layers)
    assert [[tuple(of.shape) for of in layer] for layer in found] == [[(16, b), (a, b), (16, a)] for a, b in shapes]
    assert {of.dtype.name for layer in found for of in layer} == {"bfloat16"}


def test_medians_leave_out_the_first_ones() -> None:
    clock = stages.Clock()
    for seconds in (9.0, 9.0, 9.0, 9.0, 0.001, 0.002, 0.003, 0.002, 0.001):
        clock.seconds.setdefault("TrainStep", []).append((seconds, 2 * seconds))
    assert clock.ms("TrainStep", 0) == pytest.approx(2.0)
    assert clock.ms("TrainStep", 1) == pytest.approx(4.0)


def test_what_is_timed_is_given_back_and_cut_into_its_batches() -> None:
    clock = stages.Clock()
    assert clock.timed("ReadPartition", 4, lambda: "table") == "table"
    assert clock.timed("ReadPartition", 1e-9, lambda: None) is None
    (first, _), (second, _) = clock.seconds["ReadPartition"]
    assert 0 < first < second
