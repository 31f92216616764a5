"""The synthetic data sets: what is promised about their shape, their truth, their files, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from flowps.errors import ConfigError, DataError
from flowps.synthetic import (
    WORKLOADS,
    DenseColumn,
    Description,
    GroundTruth,
    Slot,
    criteo,
    dsp_ctr,
    generate,
    quickstart,
    rank_auc,
    true_probability,
)
from flowps.synthetic.__main__ import main

SMALL = Description(
    name="small",
    dense=(DenseColumn("d0"), DenseColumn("d1", null_rate=0.3)),
    slots=(
        Slot("s0", 20),
        Slot("s1", 3_000),
        Slot("l0", 50, "uint64_list", mean_signs=3.5),
        Slot("l1", 400, "uint64_list", mean_signs=1.0),
    ),
    zipf_exponent=1.1,
    label_rate=0.2,
    target_auc=0.8,
    row_group_rows=4_096,
    train_rows=40_000,
    test_rows=30_000,
    dense_share=0.3,
    interaction_share=0.1,
    interaction_rank=2,
)
# For the tests of files, where the rows do not matter.
TINY = replace(SMALL, row_group_rows=500, train_rows=6_100, test_rows=1_200)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    return generate(SMALL, tmp_path_factory.mktemp("data") / "small")


def read(files) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in files])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- the files -------------------------------------------------------------------------------------------------------


def test_columns_types_and_row_groups(small):
    assert [file.name for file in small.train_files] == [f"train-{i:05}.parquet" for i in range(3)]
    assert [file.name for file in small.test_files] == ["test-00000.parquet"]
    assert names(small.directory) == ["dataset.json", "test-00000.parquet", *(file.name for file in small.train_files)]
    schema = pq.read_schema(small.train_files[0])
    assert schema.names == ["label", "d0", "d1", "s0", "s1", "l0", "l1"]
    assert [schema.field(name).type for name in ("label", "d0", "s0")] == [pa.int8(), pa.float32(), pa.string()]
    assert pa.types.is_list(schema.field("l0").type)
    assert schema.field("l0").type.value_type == pa.uint64()

    sizes = []
    for file in small.train_files:
        metadata = pq.read_metadata(file)
        assert metadata.row_group(0).column(0).compression == "SNAPPY"
        sizes += [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sizes == [4_096] * 9 + [40_000 - 9 * 4_096]
    assert read(small.test_files).num_rows == 30_000
    assert small.size_bytes == sum(file.stat().st_size for file in (*small.train_files, *small.test_files))


def test_label_rate_and_null_rates(small):
    train = read(small.train_files)
    label = train["label"].to_numpy()
    assert set(np.unique(label)) == {0, 1}
    assert label.mean() == pytest.approx(0.2, abs=0.012)
    assert label.mean() == pytest.approx(small.train_label_rate)
    assert read(small.test_files)["label"].to_numpy().mean() == pytest.approx(small.test_label_rate)
    assert train["d0"].null_count == 0
    assert train["d1"].null_count / len(train) == pytest.approx(0.3, abs=0.01)
    counts = train["d0"].to_numpy()
    assert counts.min() >= 0
    assert (counts == np.floor(counts)).all()
    assert counts.max() > 20 * np.median(counts), "a heavy tail"


def test_best_figures_are_those_of_the_true_probabilities(small):
    label = read(small.test_files)["label"].to_numpy()
    probability = true_probability(SMALL, "test")
    assert small.best_auc == pytest.approx(roc_auc_score(label, probability), abs=1e-12)
    assert small.best_logloss == pytest.approx(log_loss(label, probability), abs=1e-12)
    assert small.best_auc == pytest.approx(0.8, abs=0.01)
    for file in (*small.test_files, *small.train_files):
        metadata = pq.read_schema(file).metadata
        assert metadata[b"flowps.workload"] == b"small"
        assert float(metadata[b"flowps.best_auc"]) == small.best_auc
        assert float(metadata[b"flowps.best_logloss"]) == small.best_logloss
    content = json.loads((small.directory / "dataset.json").read_text())
    assert content["best_auc"] == small.best_auc
    assert content["description"]["seed"] == 7
    assert set(content["versions"]) == {"numpy", "pyarrow", "python"}


def test_true_probability_follows_the_labels(small):
    label = read(small.train_files)["label"].to_numpy()
    probability = true_probability(SMALL, "train")
    for low in np.arange(0, 0.8, 0.1):
        inside = (probability >= low) & (probability < low + 0.1)
        error = 4 * np.sqrt(0.25 / max(1, inside.sum()))
        assert label[inside].mean() == pytest.approx(probability[inside].mean(), abs=error)


# --- the truth -------------------------------------------------------------------------------------------------------


def test_the_truth_can_be_learned_from_what_the_files_show():
    """Without interactions the logit is linear in one-hot values, list counts and log1p of dense cells (null as 0)."""
    slots = (Slot("s0", 6), Slot("s1", 9), Slot("l0", 7, "uint64_list", mean_signs=4.0))
    description = replace(SMALL, slots=slots, interaction_share=0.0, interaction_rank=0)
    table, probability = GroundTruth(description).examples("train", 0, 2_000)
    features = [np.ones((2_000, 1))]
    for column in ("d0", "d1"):
        features.append(np.log1p(table[column].fill_null(0).to_numpy())[:, None])
    for column in ("s0", "s1"):
        features.append(np.equal.outer(table[column].to_numpy(), np.unique(table[column].to_numpy())))
    lists = table["l0"].chunk(0)
    signs = np.unique(lists.values.to_numpy())
    example = np.repeat(np.arange(2_000), np.diff(lists.offsets.to_numpy()))
    counts = np.zeros((2_000, len(signs)))
    np.add.at(counts, (example, np.searchsorted(signs, lists.values.to_numpy())), 1)
    matrix = np.hstack([*features, counts])
    logit = np.log(probability / (1 - probability))
    residual = logit - matrix @ np.linalg.lstsq(matrix, logit)[0]
    assert np.abs(residual).max() < 1e-4 * logit.std()


@pytest.mark.parametrize("workload", ["quickstart", "criteo", "dsp_ctr"])
def test_standard_workloads_reach_label_rate_and_auc(workload):
    description = WORKLOADS[workload]()
    assert description.name == workload
    rows = 12_000 if workload == "dsp_ctr" else 40_000
    probability = GroundTruth(description).examples("test", 0, rows).probability
    # With the probabilities as weights it is the AUC expected over all labels they could give: less noise than one.
    assert rank_auc(probability, probability) == pytest.approx(description.target_auc, abs=0.008)
    assert probability.mean() == pytest.approx(description.label_rate, abs=0.006)


def test_standard_workloads_have_the_defined_columns():
    for description, most in ((criteo(), 1_000_000), (quickstart(), 100_000)):
        cardinalities = [slot.cardinality for slot in description.slots]
        assert [column.name for column in description.dense] == [f"I{i}" for i in range(1, 14)]
        assert [slot.name for slot in description.slots] == [f"C{i}" for i in range(1, 27)]
        assert (cardinalities[0], cardinalities[-1]) == (10, most)
        assert np.allclose(np.diff(np.log(cardinalities)), np.log(most / 10) / 25, atol=0.05), "geometric"
        assert {slot.kind for slot in description.slots} == {"string8hex"}
        assert (description.dense[0].null_rate, description.dense[-1].null_rate) == (0.0, 0.45)
    slots = dsp_ctr().slots
    assert [slot.name for slot in slots] == [f"slot_{i}" for i in range(76)]
    assert [slots[i].mean_signs for i in (0, 1, 2, 22, 37)] == [2, 81.1, 42.4, 28.8, 1.1]
    assert [slots[38 + i].mean_signs for i in (0, 1, 2, 22, 37)] == [2, 4.0, 4.0, 4.0, 1.1]
    assert sum(slot.mean_signs for slot in slots) == pytest.approx(390, abs=2)
    assert {(slot.cardinality, slot.kind) for slot in slots} == {(100_001, "uint64_list")}


@pytest.mark.parametrize("num_scores", [2, 7, 10_000])
def test_rank_auc_equals_scikit_learn(num_scores):
    random = np.random.default_rng(num_scores)
    scores = random.integers(0, num_scores, 3_000) / num_scores
    label = random.random(3_000) < 0.2 + 0.5 * scores
    assert rank_auc(scores, label) == pytest.approx(roc_auc_score(label, scores), abs=1e-12)
    probability = random.random(3_000)
    both, weights = np.repeat([1, 0], 3_000), np.concatenate([probability, 1 - probability])
    expected = roc_auc_score(both, np.tile(scores, 2), sample_weight=weights)
    assert rank_auc(scores, probability) == pytest.approx(expected, abs=1e-12)


def test_rank_auc_of_one_class_is_nan():
    assert np.isnan(rank_auc(np.array([0.1, 0.2]), [1, 1]))
    assert np.isnan(rank_auc(np.array([0.1, 0.2]), [0, 0]))


# --- the values ------------------------------------------------------------------------------------------------------


def test_values_follow_zipf(small):
    share = np.arange(1, 3_001) ** -1.1
    share /= share.sum()
    counts = np.sort(read(small.train_files)["s1"].value_counts().field("counts").to_numpy())[::-1]
    for rank in (0, 1, 4, 19):
        assert counts[rank] / 40_000 == pytest.approx(share[rank], rel=0.1)
    assert counts[:100].sum() / 40_000 == pytest.approx(share[:100].sum(), abs=0.01)
    assert len(counts) == pytest.approx((1 - (1 - share) ** 40_000).sum(), rel=0.02), "distinct values, the rare ones too"


def test_values_are_scrambled_and_independent(small):
    train = read(small.train_files)
    for slot in ("s0", "s1"):
        strings = train[slot].unique().to_pylist()
        assert all(len(value) == 8 and set(value) <= set("0123456789abcdef") for value in strings)
        assert max(int(value, 16) for value in strings) > 2**31 > min(int(value, 16) for value in strings)
    counts = train["s1"].value_counts().to_pylist()
    most_frequent = [int(entry["values"], 16) for entry in sorted(counts, key=lambda entry: -entry["counts"])[:50]]
    assert np.abs(np.diff(np.sort(most_frequent))).min() > 1_000, "frequent values are no neighbours"
    signs = {slot: set(train[slot].chunk(0).values.unique().to_pylist()) for slot in ("l0", "l1")}
    assert len(signs["l0"]) <= 50
    assert not signs["l0"] & signs["l1"]
    assert max(signs["l1"]) >= 2**63, "the full range of uint64"


def test_list_lengths(small):
    for slot, mean in (("l0", 3.5), ("l1", 1.0)):
        lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in read(small.train_files)[slot].chunks])
        assert lengths.min() == 1
        assert lengths.mean() == pytest.approx(mean, rel=0.02)
        assert (lengths.max() > 1) == (mean > 1)


# --- the same again --------------------------------------------------------------------------------------------------


def test_same_seed_same_bytes_whatever_the_threads(tmp_path):
    one = generate(TINY, tmp_path / "one", threads=1)
    two = generate(TINY, tmp_path / "two", threads=3)
    for name in names(tmp_path / "one"):
        assert (one.directory / name).read_bytes() == (two.directory / name).read_bytes()


def test_other_seed_other_data(tmp_path):
    one, two = generate(TINY, tmp_path / "one"), generate(TINY, tmp_path / "two", seed=8)
    assert two.description.seed == 8
    first, second = read(one.test_files), read(two.test_files)
    for column in first.column_names:
        assert first[column] != second[column]
    assert not set(first["s1"].to_pylist()) & set(second["s1"].to_pylist())


def test_more_rows_extend_the_same_data(tmp_path):
    short, long = generate(TINY, tmp_path / "short"), generate(TINY, tmp_path / "long", rows=9_000)
    assert read(long.train_files).num_rows == 9_000
    assert read(short.train_files).slice(0, 6_000).equals(read(long.train_files).slice(0, 6_000))
    assert read(short.test_files).equals(read(long.test_files))
    assert long.best_auc == short.best_auc


def test_equal_data_set_is_reused_and_no_other(tmp_path):
    first = generate(TINY, tmp_path)
    assert not first.reused
    written_ns = {file: file.stat().st_mtime_ns for file in first.train_files}
    again = generate(TINY, tmp_path)
    assert again == replace(first, reused=True)
    assert {file: file.stat().st_mtime_ns for file in again.train_files} == written_ns
    shorter = generate(TINY, tmp_path, rows=1_000)
    assert not shorter.reused
    assert names(tmp_path) == ["dataset.json", "test-00000.parquet", "train-00000.parquet"]
    assert not generate(TINY, tmp_path, rows=1_000, test_rows=1_300).reused
    assert not generate(TINY, tmp_path, rows=1_000, test_rows=1_300, seed=9).reused


@pytest.mark.parametrize("damage", ["missing", "truncated", "summary", "format"])
def test_damaged_data_set_is_written_again(tmp_path, damage):
    first = generate(TINY, tmp_path)
    last, summary = first.train_files[-1], tmp_path / "dataset.json"
    whole = last.read_bytes()
    if damage == "missing":
        last.unlink()
    elif damage == "truncated":
        last.write_bytes(whole + b"PAR1")
    elif damage == "summary":
        summary.unlink()
    else:
        content = json.loads(summary.read_text()) | {"format": "flowps.synthetic/0"}
        summary.write_text(json.dumps(content))
    assert generate(TINY, tmp_path) == first
    assert last.read_bytes() == whole


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_interrupted_generation_is_not_a_data_set(tmp_path, monkeypatch, threads, failure):
    generate(TINY, tmp_path, rows=1_000)
    draw = GroundTruth.examples

    def fail_late(self, split, chunk, rows):
        if split == "train" and chunk == 6:
            raise failure
        return draw(self, split, chunk, rows)

    with monkeypatch.context() as patch:
        patch.setattr(GroundTruth, "examples", fail_late)
        with pytest.raises(failure):
            generate(TINY, tmp_path, threads=threads)
    left = names(tmp_path)
    assert "dataset.json" not in left
    assert "train-00001.parquet" not in left
    assert not [name for name in left if name.endswith(".partial")]
    for name in left:
        pq.read_table(tmp_path / name)
    assert not generate(TINY, tmp_path).reused
    assert len(names(tmp_path)) == 6


def test_leftovers_of_a_killed_process_are_cleared(tmp_path):
    for name in (".train-00000.parquet.partial", ".dataset.json.partial"):
        (tmp_path / name).write_bytes(b"half")
    generate(TINY, tmp_path, rows=1_000)
    assert names(tmp_path) == ["dataset.json", "test-00000.parquet", "train-00000.parquet"]


@pytest.mark.parametrize("name", ["notes.txt", "train-00000.parquet", "train-00009.parquet", "dataset.json", "folder/x"])
def test_foreign_directory_is_refused_untouched(tmp_path, name):
    foreign = tmp_path / name
    foreign.parent.mkdir(exist_ok=True)
    if name == "train-00009.parquet":
        pq.write_table(pa.table({"label": [0, 1]}), foreign)
    else:
        foreign.write_text("{}")
    content = foreign.read_bytes()
    expected = f"holds files that are not from a synthetic data set \\({name.split('/')[0]}\\); name a new or empty"
    with pytest.raises(DataError, match=expected):
        generate(TINY, tmp_path)
    assert foreign.read_bytes() == content
    assert len(names(tmp_path)) == 1


def test_foreign_file_beside_an_earlier_data_set_is_kept(tmp_path):
    generate(TINY, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = names(tmp_path)
    with pytest.raises(DataError, match=r"notes\.txt"):
        generate(TINY, tmp_path, seed=8)
    assert names(tmp_path) == before
    assert generate(TINY, tmp_path).reused


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match="name a directory that can be written"):
            generate(TINY, directory)


def test_test_labels_all_alike(tmp_path):
    with pytest.raises(DataError, match=r"test_rows = 1: all their labels are [01], so no AUC exists; ask for more"):
        generate(TINY, tmp_path, test_rows=1)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_rows": 0}, "data set 'small': rows = 0; expected at least 1"),
        ({"test_rows": -1}, "test_rows = -1; expected at least 1"),
        ({"row_group_rows": 0}, "row_group_rows = 0"),
        ({"seed": -1}, "seed = -1; expected 0 or more"),
        ({"label_rate": 1.0}, "label_rate = 1.0"),
        ({"target_auc": 0.5}, "target_auc = 0.5"),
        ({"zipf_exponent": 0.0}, "zipf_exponent = 0.0"),
        ({"rarity_damping": -0.1}, "rarity_damping = -0.1"),
        ({"slots": ()}, "no slots"),
        ({"dense_share": 0.95}, "add up to at most 1"),
        ({"dense": ()}, "no dense columns"),
        ({"interaction_rank": 0}, "needs interaction_rank >= 1"),
        ({"dense": (DenseColumn("s0"),)}, "column names used twice: s0"),
        ({"dense": (DenseColumn("d0", 1.5),)}, "dense column 'd0': null_rate = 1.5"),
        ({"slots": (Slot("a", 0), Slot("b", 9))}, "slot 'a': cardinality = 0"),
        ({"slots": (Slot("a", 9, mean_signs=2.0), Slot("b", 9))}, "a string slot has exactly 1"),
        ({"slots": (Slot("a", 9, "uint64_list", 0.5), Slot("b", 9))}, "slot 'a': mean_signs = 0.5"),
    ],
)
def test_impossible_descriptions_are_refused(change, message):
    with pytest.raises(ConfigError) as caught:
        replace(SMALL, **change)
    assert message in str(caught.value)


def test_unreachable_auc_is_refused():
    few_values = (Slot("a", 2), Slot("b", 2))
    with pytest.raises(ConfigError, match=r"target_auc = 0\.99, but no more than 0\.\d+ can be reached; lower it"):
        GroundTruth(replace(SMALL, dense=(), dense_share=0.0, slots=few_values, interaction_share=0.0, target_auc=0.99))


def test_threads_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match="threads = 0"):
        generate(TINY, tmp_path, threads=0)


# --- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-W", "error", "-m", "flowps.synthetic", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def test_command_writes_and_summarises(tmp_path):
    arguments = (tmp_path / "out", "--rows", 2_000, "--test-rows", 1_000, "--seed", 3)
    first = command(*arguments)
    assert (first.returncode, first.stderr) == (0, "")
    dataset = generate(quickstart(), tmp_path / "out", 2_000, 1_000, 3)
    assert dataset.reused
    lines = first.stdout.splitlines()
    assert lines[0] == f"quickstart, seed 3, written to {tmp_path / 'out'}"
    assert [line.split("  ")[1] for line in lines[1:]] == [
        *("rows", "label rate", "files", "size", "best AUC", "best logloss", "time")
    ]
    assert "2,000 train, 1,000 test" in lines[1]
    assert f"{dataset.best_auc:.4f}" in lines[5]
    assert command(*arguments).stdout.startswith("quickstart, seed 3, found in")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", 0), "error: data set 'quickstart': rows = 0; expected at least 1\n"),
        (("--rows", 10, "--test-rows", 10), "error: {out} holds files that are not"),
    ],
)
def test_command_refuses_without_a_stack_trace(tmp_path, arguments, message):
    (tmp_path / "notes.txt").write_text("mine")
    result = command(tmp_path, *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(message.format(out=tmp_path))
    assert result.stderr.count("\n") == 1


def test_interrupted_command_says_so(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(GroundTruth, "examples", interrupt)
    assert main([str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted: the data set is incomplete; run the same command again\n"
    assert names(tmp_path) == []


def test_command_help_names_the_workloads():
    result = command("--help")
    assert result.returncode == 0
    for workload in WORKLOADS:
        assert workload in result.stdout
