"""The figures against scikit-learn, float64 and loops."""

from __future__ import annotations

import json
import math

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from flowps.batch import Float32
from flowps.quality import Quality, Tally, cells
from tests.quality.naive import column, gauc, logloss, sample, scored

N = 100_000


def check(labels: Float32, logits: Float32, found: Quality) -> None:
    probabilities = expit(logits.astype(np.float64))
    assert (found.samples, found.positives) == (len(labels), labels.sum())
    assert found.auc == pytest.approx(roc_auc_score(labels, logits), abs=1e-5)
    assert found.pr_auc == pytest.approx(average_precision_score(labels, logits), abs=1e-5)
    assert found.logloss == pytest.approx(logloss(labels, logits), abs=1e-12)
    assert found.mean_prediction == pytest.approx(probabilities.mean(), abs=1e-12)
    assert found.mean_label == labels.mean(dtype=np.float64)
    assert found.calibration == pytest.approx(probabilities.sum() / labels.sum(dtype=np.float64), rel=1e-9)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.0, -4.0), (0.1, 0.0), (0.01, 0.0), (5.0, 2.0), (12.0, 0.0)])
def test_sklearn_agrees(scale: float, shift: float):
    labels, logits = sample(N, scale, shift)
    found = scored(labels, logits)
    check(labels, logits, found)
    if abs(logits).max() < 30:  # scikit-learn clips probabilities
        assert found.logloss == pytest.approx(log_loss(labels, expit(logits.astype(np.float64))), rel=1e-9)


@pytest.mark.parametrize("values", [2, 3, 10])
def test_sklearn_agrees_on_heavy_ties(values: int):
    rng = np.random.default_rng(values)
    logits = rng.choice(np.linspace(-3, 1, values), N).astype(np.float32)
    labels = (rng.random(N) < expit(logits)).astype(np.float32)
    check(labels, logits, scored(labels, logits))


def test_sklearn_agrees_with_extreme_logits():
    labels, logits = sample(N, 2.0)
    rng = np.random.default_rng(1)
    extreme = rng.random(N) < 0.3
    logits[extreme] = np.where(rng.random(extreme.sum()) < 0.5, -1e4, 1e4)
    found = scored(labels, logits)
    check(labels, logits, found)
    assert (found.logloss or 0) > 1, "a sure prediction that is wrong costs its logit"


def test_a_logit_beyond_all_measure_costs_as_much_as_the_limit():
    found = scored(np.zeros(3, np.float32), np.array([3e38, -3e38, 2.0**20], np.float32))
    assert found.logloss == pytest.approx(2 * 2.0**20 / 3)
    assert found.mean_prediction == pytest.approx(2 / 3)


def test_all_predictions_equal():
    labels, _ = sample(1_000)
    found = scored(labels, np.full(1_000, -2.0, np.float32))
    assert (found.auc, found.pr_auc) == (0.5, found.mean_label)
    (bucket,) = found.buckets
    assert bucket.samples == 1_000
    assert bucket.low == bucket.high == pytest.approx(expit(-2.0), rel=1e-12), "the middle of its bin is that very logit"


@pytest.mark.parametrize("right", [True, False])
def test_a_perfect_and_a_perfectly_wrong_order(right: bool):
    labels = np.repeat(np.array([0, 1], np.float32), 500)
    logits = np.linspace(-2, 2, 1_000, dtype=np.float32)
    assert scored(labels, logits if right else -logits).auc == float(right)


def test_the_normalised_entropy_of_the_mean_label_is_one():
    labels = np.array([1, 0, 0, 0], np.float32)
    assert scored(labels, np.full(4, -math.log(3), np.float32)).normalised_entropy == pytest.approx(1, abs=1e-7)
    assert scored(labels, np.zeros(4, np.float32)).normalised_entropy == pytest.approx(
        math.log(2) / -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    )


# --- calibration ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buckets", [1, 3, 10, 64])
def test_sklearn_agrees_on_calibration_by_bucket(buckets: int):
    """Its quantiles fall between other samples: means of labels differ by a sample or two."""
    labels, logits = sample(N)
    found = scored(labels, logits, buckets=buckets).buckets
    real, predicted = calibration_curve(labels, expit(logits.astype(np.float64)), n_bins=buckets, strategy="quantile")
    np.testing.assert_allclose([of.mean_prediction for of in found], predicted, rtol=5e-4)
    np.testing.assert_allclose([of.mean_label for of in found], real, atol=5 * buckets / N)
    np.testing.assert_allclose([of.samples for of in found], N / buckets, atol=30)


def test_buckets_add_up_and_say_their_range():
    labels, logits = sample(5_000)
    found = scored(labels, logits)
    assert sum(of.samples for of in found.buckets) == 5_000
    assert sum(of.samples * of.mean_label for of in found.buckets) == pytest.approx(found.positives)
    assert sum(of.samples * of.mean_prediction for of in found.buckets) / 5_000 == pytest.approx(found.mean_prediction, rel=3e-5)
    edges = [edge for of in found.buckets for edge in (of.low, of.high)]
    assert edges == sorted(edges)
    for of in found.buckets:
        assert of.low <= of.mean_prediction <= of.high
        assert of.calibration == pytest.approx(of.mean_prediction / of.mean_label)
    error = sum(of.samples / 5_000 * abs(of.mean_prediction - of.mean_label) for of in found.buckets)
    assert found.ece == pytest.approx(error)


def test_equal_predictions_are_not_parted():
    logits = np.array([-1] * 70 + [0] * 20 + [1] * 10, np.float32)
    found = scored((np.arange(100) % 2).astype(np.float32), logits)
    assert [of.samples for of in found.buckets] == [70, 20, 10]


def test_fewer_samples_than_buckets():
    labels, logits = sample(4)
    assert [of.samples for of in scored(labels, logits).buckets] == [1, 1, 1, 1]


# --- edges ----------------------------------------------------------------------------------------------------------------


def test_nothing_has_no_figures():
    found = Tally(("age",), "user").result()
    assert (found.samples, found.positives, found.buckets) == (0, 0, [])
    for value in (
        found.auc, found.pr_auc, found.logloss, found.normalised_entropy, found.mean_prediction, found.mean_label,
        found.calibration, found.ece,
    ):  # fmt: skip
        assert value is None
    assert found.gauc is not None
    assert (found.gauc.value, found.gauc.groups, found.gauc.one_class_groups) == (None, 0, 0)
    (table,) = found.slices
    assert (table.values, table.rows, table.others) == (0, [], None)
    assert Tally().result().gauc is None


def test_an_empty_update_is_nothing():
    tally = Tally(("age",), "user")
    tally.update(np.empty(0, np.float32), np.empty(0, np.float32), {"age": column([], pa.int8())}, column([], pa.string()))
    assert tally.result() == Tally(("age",), "user").result()


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class(label: float):
    _, logits = sample(100)
    labels = np.full(100, label, np.float32)
    found = scored(labels, logits, {"age": column([1] * 100)}, column(["x"] * 100))
    assert (found.auc, found.pr_auc, found.normalised_entropy) == (None, None, None)
    assert found.mean_label == label
    assert found.logloss == pytest.approx(logloss(labels, logits), abs=1e-12)
    assert (found.calibration is None) == (label == 0)
    assert found.gauc is not None
    assert (found.gauc.value, found.gauc.one_class_groups, found.gauc.one_class_samples) == (None, 1, 100)
    assert found.slices[0].rows[0].auc is None


def test_json_and_back():
    labels, logits = sample(500)
    found = scored(
        labels, logits, {"b": column([True, None] * 250), "u": column([2**64 - 1] * 500, pa.uint64())}, column(["é"] * 500)
    )
    text = msgspec.json.encode(found)
    assert msgspec.json.decode(text, type=Quality) == found
    assert json.loads(text)["slices"][1]["rows"][0]["value"] == 2**64 - 1


# --- GAUC -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 7, 300])
@pytest.mark.parametrize("digits", [0, 7], ids=["ties", "no ties"])
def test_gauc_as_a_loop_over_groups(groups: int, digits: int):
    labels, logits = sample(2_000)
    logits = np.round(logits, digits)
    users = np.random.default_rng(2).zipf(1.5, 2_000) % groups
    found = scored(labels, logits, group=column(users)).gauc
    assert found is not None
    value, *counts = gauc(labels, logits, users.tolist())
    assert found.value == pytest.approx(value, rel=1e-12)
    assert [found.groups, found.samples, found.one_class_groups, found.one_class_samples] == counts


@pytest.mark.parametrize(
    "kind",
    [pa.int8(), pa.uint64(), pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int16(), pa.string())],
    ids=str,
)
def test_gauc_is_the_same_whatever_the_type(kind: pa.DataType):
    labels, logits = sample(3_000)
    users = [None if k == 5 else k for k in np.random.default_rng(3).integers(0, 100, 3_000).tolist()]
    text = not pa.types.is_integer(kind)
    array = column([str(k) if k is not None and text else k for k in users], None if text else kind)
    found = scored(labels, logits, group=array.cast(kind)).gauc
    assert found is not None
    assert (found.value, found.groups) == (pytest.approx(gauc(labels, logits, users)[0], rel=1e-12), 100), "null is a group"


def test_positives_and_negatives_of_a_group_may_come_in_different_updates():
    tally = Tally(group="user")
    for label, logit in ((0, -1.0), (1, 1.0), (1, -1.0)):
        tally.update(np.array([label], np.float32), np.array([logit], np.float32), group=column(["a"]))
    found = tally.result().gauc
    assert found is not None
    assert (found.value, found.groups, found.samples) == (0.75, 1, 3)


def test_nearly_equal_predictions_are_told_apart_within_a_group():
    logits = np.array([1.0, np.nextafter(np.float32(1), np.float32(2))], np.float32)
    found = scored(np.array([0, 1], np.float32), logits, group=column([1, 1]))
    assert found.gauc is not None
    assert (found.auc, found.gauc.value) == (0.5, 1.0)


# --- slices ---------------------------------------------------------------------------------------------------------------


def test_slices_as_scoring_each_alone():
    labels, logits = sample(20_000)
    ages = np.random.default_rng(4).zipf(1.5, 20_000) % 30
    table = scored(labels, logits, {"age": column(ages)}, rows=100).slices[0]
    assert (table.column, table.values, table.others) == ("age", len(set(ages)), None)
    assert [row.samples for row in table.rows] == sorted(np.bincount(ages)[np.unique(ages)], reverse=True)
    for row in table.rows:
        alone = scored(labels[ages == row.value], logits[ages == row.value])
        assert (row.samples, row.mean_label, row.mean_prediction, row.calibration, row.auc, row.logloss) == (
            alone.samples, alone.mean_label, alone.mean_prediction, alone.calibration, alone.auc, alone.logloss,
        )  # fmt: skip


def test_the_others_are_added_up():
    labels, logits = sample(5_000)
    ages = np.random.default_rng(4).integers(0, 30, 5_000)
    table = scored(labels, logits, {"age": column(ages)}, rows=3).slices[0]
    assert (table.values, len(table.rows)) == (30, 3)
    rest = ~np.isin(ages, [row.value for row in table.rows])
    alone = scored(labels[rest], logits[rest])
    assert table.others is not None
    assert (table.others.value, table.others.samples, table.others.auc) == (None, alone.samples, alone.auc)
    assert (table.others.logloss, table.others.mean_prediction) == (alone.logloss, alone.mean_prediction)


@pytest.mark.parametrize(
    ("array", "values"),
    [
        (column([3, None, 3, -1], pa.int8()), [3, -1, None]),
        (column([3, None, 3, 2**64 - 1], pa.uint64()), [3, 2**64 - 1, None]),
        (column(["b", None, "b", ""]), ["b", "", None]),
        (column(["b", None, "b", ""], pa.large_string()), ["b", "", None]),
        (column([True, None, True, False]), [True, False, None]),
        (column([None] * 4), [None]),
        (column(["b", None, "b", "a"]).dictionary_encode(), ["b", "a", None]),
        (pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 3]), pa.array(["b", None, "b", "a"])), ["b", "a", None]),
        (pa.chunked_array([["b"], [None, "b"], [], ["a"]], pa.string()), ["b", "a", None]),
        (pa.chunked_array([pa.array(["b", None]).dictionary_encode(), pa.array(["b", "a"]).dictionary_encode()]), ["b", "a", None]),
        (column([b"\xff", None, b"\xff", b"a"], pa.binary()).view(pa.string()), ["�", "a", None]),
    ],
    ids=[
        "int8",
        "uint64",
        "string",
        "large",
        "bool",
        "null",
        "dictionary",
        "double entries",
        "chunks",
        "chunked dictionary",
        "no UTF-8",
    ],
)
def test_the_types_of_slices(array: pa.Array, values: list[object]):
    found = scored(np.array([0, 1, 1, 0], np.float32), np.zeros(4, np.float32), {"x": array}, group=array)
    table = found.slices[0]
    assert [row.value for row in table.rows] == values, "equal counts: by value, null last"
    assert [type(row.value) for row in table.rows] == [type(value) for value in values]
    assert found.gauc is not None
    assert found.gauc.groups + found.gauc.one_class_groups == len(values)


def test_a_file_where_all_is_null_fits_any_type():
    tally = Tally(("x",))
    for array in (column([None]), column(["a"]), column([None])):
        tally.update(np.ones(1, np.float32), np.ones(1, np.float32), {"x": array})
    assert [(row.value, row.samples) for row in tally.result().slices[0].rows] == [(None, 2), ("a", 1)]


def test_many_values_make_the_bins_of_slices_coarser(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cells, "MAX_CELLS", 20_000)
    labels, logits = sample(N)
    ages = np.random.default_rng(5).integers(0, 20, N)
    found = scored(labels, logits, {"age": column(ages)})
    table = found.slices[0]
    assert cells.BIN_WIDTH < table.bin_width <= 1 / 64
    for row in table.rows:
        assert row.auc == pytest.approx(roc_auc_score(labels[ages == row.value], logits[ages == row.value]), abs=1e-4)
    assert found.auc == pytest.approx(roc_auc_score(labels, logits), abs=1e-5), "the whole keeps its bins"
