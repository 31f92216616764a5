"""The model of a large cluster: its arithmetic, by hand."""

from __future__ import annotations

import dataclasses

import pytest

from bench.hundred import Cluster, Work, best, bounds

WORK = Work(
    batch_size=1000, partition_batches=10.0, hub_s=0.01, shard_s=0.02, trainer_s=0.04, sign_bytes=1e6, pooled_bytes=2e6,
    dense_bytes=1e6, call_s=1e-3, byte_s=2e-9,
)  # fmt: skip
CLUSTER = Cluster(cores=2, network_gbit=8.0, latency_us=100.0, tasks_per_s=50.0, busiest=1.25)


def test_what_each_part_allows() -> None:
    found = bounds(WORK, CLUSTER, trainers=4, shards=5, hubs=3)
    # 5 MB between trainer and shards, at half of 2 ns a byte; ten calls of 1 ms, half of it at each end.
    assert found["hubs"] == pytest.approx(3 * 2 / (0.01 + 1e6 * 1e-9))
    assert found["shards"] == pytest.approx(5 * 2 / (0.02 + 0.005 + 0.005) / 1.25)
    ring_s = 2 * 3 * (1e6 / 4 / 1e9 + 1e-4)
    assert found["trainers"] == pytest.approx(4 / ((0.04 + 0.006 + 0.005) / 2 + ring_s))
    assert found["network of trainers"] == pytest.approx(4 * 1e9 / 3e6)
    assert found["network of shards"] == pytest.approx(5 * 1e9 / 3e6 / 1.25)
    assert found["network of hubs"] == pytest.approx(3 * 1e9 / 1e6)
    assert found["Dask's scheduler"] == 500


def test_one_trainer_has_no_ring() -> None:
    assert bounds(WORK, CLUSTER, 1, 1, 1)["trainers"] == pytest.approx(2 / (0.04 + 0.006 + 0.001))


def test_the_best_roles_are_better_than_all_others() -> None:
    found = best(WORK, CLUSTER, 9)
    assert found["trainers"] + found["shards"] + found["hubs"] == 9
    rates = [
        min(bounds(WORK, CLUSTER, trainers, shards, 9 - trainers - shards).values())
        for trainers in range(1, 8)
        for shards in range(1, 9 - trainers)
    ]
    assert found["examples_per_s"] == pytest.approx(max(rates) * 1000)
    assert found["examples_per_s_of_each"][found["bound_by"]] == found["examples_per_s"]


def test_a_slow_network_bounds_it() -> None:
    assert best(WORK, dataclasses.replace(CLUSTER, network_gbit=0.1), 9)["bound_by"].startswith("network of ")
