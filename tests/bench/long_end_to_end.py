"""Benchmarks that train, as commands. For `make test-long`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from bench import end_to_end, placement, rival
from flowps.synthetic import criteo, dsp_ctr, generate
from tests.bench.test_placement import IN_SHARD_NS


def test_files_of_the_same_columns_made_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = generate(criteo(), tmp_path / "made", rows=60_000, test_rows=5_000)
    for split, files in (("train", made.train_files), ("test", made.test_files)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for file in files:
            file.rename(tmp_path / "data" / split / f"part-{file.name}")
    result = tmp_path / "result.json"
    arguments = [
        "criteo",
        "--data",
        str(tmp_path / "data"),
        "--runs",
        "1",
        "--json",
        str(result),
        "--",
        "--data.batch_size",
        "1024",
        "--status.print_interval",
        "10",
    ]
    monkeypatch.setattr(sys, "argv", ["bench.end_to_end", *arguments])
    assert end_to_end.main() == 0
    found = json.loads(result.read_text(encoding="utf-8"))
    assert (found["workload"], found["net"], found["mode"]) == ("criteo", "small", "embedded")
    assert found["examples_per_s"] > 0
    assert found["cpu_s_per_million"] > 0
    # A part of the run's; and there is one process.
    assert 0 < found["tree_cpu_s_per_million"] < found["run_cpu_s"] / 60_000 * 1e6
    assert 1 << 26 < found["peak_rss_sum_bytes"] < 1.05 * found["peak_rss_bytes"]
    assert set(found["counted"]) <= set(found)
    assert found["peak_rss_bytes"] > 1 << 26
    assert found["first_step_s"] > 0
    assert found["first_step_cold_s"] > 0
    assert 0 <= found["trainer_wait_share"] <= 1
    assert found["empty_reads"] == 0
    assert 0.5 < found["test_auc"] < found["best_auc"] == pytest.approx(made.best_auc)
    assert found["machine"]["cores"] >= 1


@pytest.mark.parametrize("name", list(rival.RIVALS))
def test_beside_the_same_net_without_flowps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    made = generate(criteo(), tmp_path / "data", rows=60_000, test_rows=5_000)
    result = tmp_path / "result.json"
    arguments = ["criteo", "--rival", name, "--data", str(tmp_path / "data"), "--runs", "1", "--json", str(result)]
    monkeypatch.setattr(sys, "argv", ["bench.end_to_end", *arguments, "--", "--data.batch_size", "1024"])
    assert end_to_end.main() == 0
    found = json.loads(result.read_text(encoding="utf-8"))
    for side in ("flowps", "rival"):
        assert all(found[side][figure] > 0 for figure in rival.FIGURES if figure != "trainer_wait_share")
        assert 0 <= found[side]["trainer_wait_share"] <= 1
        assert 0.6 < found[side]["test_auc"] < made.best_auc
    assert found["flowps"]["test_auc"] == pytest.approx(found["rival"]["test_auc"], abs=0.02)
    assert found["rival"]["runs"][0]["examples"] == 60_000
    assert found["ratio"] == found["ratio_least"] == found["ratio_most"] > 0
    assert len(rival.markdown(found).splitlines()) == 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dsp_ctr")
    slots = tuple(replace(slot, cardinality=1000) for slot in dsp_ctr().slots[:8])
    generate(replace(dsp_ctr(), slots=slots), folder, rows=2000, test_rows=100)
    return folder


def test_a_run_on_several_processes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it used is that of all processes; what the shards did is what they have reported."""
    used: list[end_to_end.Usage] = []
    train = end_to_end.training

    @contextmanager
    def training(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[tuple[Path, end_to_end.Usage]]:
        with train(arguments, environment) as (run_dir, usage):
            used.append(usage)
            yield run_dir, usage

    monkeypatch.setattr(end_to_end, "training", training)
    knobs = ["--data.batch_size", "50", "--status.print_interval", "10"]
    found = placement.placed(2, "processes", IN_SHARD_NS, data, knobs)
    assert (found["shards"], found["mode"], found["steps"], found["split"]) == (2, "processes", 40, [])
    for what in ("predicted", "measured"):
        shares = found[what]["shares"]
        for of in ("lookups", "rows", "time"):
            assert sum(share[of] for share in shares) == pytest.approx(1)
            assert found[what][of] == pytest.approx(2 * max(share[of] for share in shares))
    assert sum(found["fitted"]["shares"]) == pytest.approx(1)
    # Signs are counted, not timed: as predicted, up to chance.
    assert found["measured"]["lookups"] == pytest.approx(found["predicted"]["lookups"], rel=0.02)
    (usage,) = used
    cpu_s = [cpu for _, cpu, _ in usage.samples]
    assert cpu_s == sorted(cpu_s)
    assert 0 < cpu_s[-1] < usage.cpu_s + 0.1
    assert max(peak for _, _, peak in usage.samples) > 1.2 * usage.peak_rss_bytes  # of five processes, beside the largest
    assert [line["step"] for line, _, _ in usage.samples if line["type"] == "Interval"] == [10, 20, 30, 40]
