"""Streaming quality against scikit-learn and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.metrics import log_loss, roc_auc_score

from flowps.batch import Float32
from flowps.status.event import Metrics
from flowps.trainer import metrics as metrics_module
from flowps.trainer.metrics import LabelMetrics, StreamingMetrics

N = 100_000


def sample(scale: float, shift: float = 0.0, n: int = N, seed: int = 0) -> tuple[Float32, Float32]:
    """Labels drawn from the probabilities that the logits mean, logits float32."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(shift, scale, n)
    return (rng.random(n) < expit(logits)).astype(np.float32), logits.astype(np.float32)


def scored(*parts: tuple[Float32, Float32]) -> Metrics:
    metrics = StreamingMetrics()
    for labels, logits in parts:
        metrics.update(labels, logits)
    return metrics.result()


def exact_logloss(labels: Float32, logits: Float32) -> float:
    """In float64, without clipping."""
    x, y = logits.astype(np.float64), labels.astype(np.float64)
    return float(np.mean(np.logaddexp(0, x) - x * y))


def check(labels: Float32, logits: Float32, found: Metrics) -> None:
    assert found.examples == len(labels)
    assert found.auc == pytest.approx(roc_auc_score(labels, logits), abs=1e-5)
    assert found.logloss == pytest.approx(exact_logloss(labels, logits), rel=1e-5, abs=1e-9)
    assert found.prob_mean == pytest.approx(expit(logits.astype(np.float64)).mean(), rel=1e-5)
    assert found.real_mean == pytest.approx(labels.mean(dtype=np.float64), rel=1e-12)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.0, -4.0), (0.1, 0.0), (0.01, 0.0), (5.0, 2.0), (12.0, 0.0)])
def test_sklearn_agrees(scale: float, shift: float):
    labels, logits = sample(scale, shift)
    found = scored((labels, logits))
    check(labels, logits, found)
    probabilities = expit(logits.astype(np.float64))
    if abs(logits).max() < 30:  # scikit-learn clips probabilities
        assert found.logloss == pytest.approx(log_loss(labels, probabilities), rel=1e-5)


@pytest.mark.parametrize("values", [2, 3, 10])
def test_sklearn_agrees_on_heavy_ties(values: int):
    rng = np.random.default_rng(values)
    logits = rng.choice(np.linspace(-3, 1, values), N).astype(np.float32)
    labels = (rng.random(N) < expit(logits)).astype(np.float32)
    check(labels, logits, scored((labels, logits)))


def test_all_predictions_equal_is_an_auc_of_one_half():
    labels, _ = sample(1.0, n=1_000)
    assert scored((labels, np.full(1_000, -2.0, np.float32))).auc == 0.5


@pytest.mark.parametrize("right", [True, False])
def test_a_perfect_and_a_perfectly_wrong_order(right: bool):
    labels = np.repeat(np.array([0, 1], np.float32), 500)
    logits = np.linspace(-2, 2, 1_000, dtype=np.float32)
    assert scored((labels, logits if right else -logits)).auc == float(right)


@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_sklearn_agrees_with_extreme_logits(share: float):
    labels, logits = sample(2.0)
    rng = np.random.default_rng(1)
    extreme = rng.random(N) < share
    logits[extreme] = np.where(rng.random(extreme.sum()) < 0.5, -1e4, 1e4)
    found = scored((labels, logits))
    check(labels, logits, found)
    assert found.logloss > 1, "a sure prediction that is wrong costs its logit"


@pytest.mark.parametrize(
    ("label", "logit", "logloss", "prob"),
    [(1, 1e4, 0.0, 1.0), (0, 1e4, 1e4, 1.0), (1, -1e4, 1e4, 0.0), (0, -1e4, 0.0, 0.0), (1, 0.0, math.log(2), 0.5)],
)
def test_a_single_sure_prediction(label: float, logit: float, logloss: float, prob: float):
    found = scored((np.array([label], np.float32), np.array([logit], np.float32)))
    assert found.logloss == pytest.approx(logloss, abs=1e-7)
    assert found.prob_mean == pytest.approx(prob, abs=1e-7)
    assert (found.examples, found.auc, found.real_mean) == (1, None, label)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_has_no_auc(label: float):
    _, logits = sample(1.0, n=100)
    found = scored((np.full(100, label, np.float32), logits))
    assert found.auc is None
    assert found.real_mean == label
    assert found.logloss == pytest.approx(exact_logloss(np.full(100, label, np.float32), logits), rel=1e-5)


def test_nothing_has_no_auc_and_no_means():
    found = StreamingMetrics().result()
    assert (found.examples, found.auc) == (0, None)
    assert all(math.isnan(value) for value in (found.logloss, found.prob_mean, found.real_mean))


@pytest.mark.parametrize("flush_examples", [1, 999, 1 << 30])
def test_batches_add_up_to_the_whole(flush_examples: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics_module, "_FLUSH_EXAMPLES", flush_examples)
    labels, logits = sample(1.5, n=5_000)
    parts = np.array_split(np.arange(5_000), [1, 1, 300, 1_300, 4_999])  # one of them empty
    found = scored(*[(labels[part], logits[part]) for part in parts])
    whole = scored((labels, logits))
    assert (found.examples, found.auc, found.real_mean) == (whole.examples, whole.auc, whole.real_mean)
    assert found.logloss == pytest.approx(whole.logloss, rel=1e-9)
    assert found.prob_mean == pytest.approx(whole.prob_mean, rel=1e-9)


def test_the_result_can_be_asked_for_in_between():
    labels, logits = sample(1.0, n=4_000)
    metrics = StreamingMetrics()
    metrics.update(labels[:1_000], logits[:1_000])
    assert metrics.result() == scored((labels[:1_000], logits[:1_000])) == metrics.result()
    metrics.update(labels[1_000:], logits[1_000:])
    check(labels, logits, metrics.result())


@pytest.mark.parametrize("flushed", [True, False])
def test_merge_equals_the_union(flushed: bool):
    labels, logits = sample(1.0, n=6_000)
    one, other = StreamingMetrics(), StreamingMetrics()
    one.update(labels[:2_000], logits[:2_000])
    other.update(labels[2_000:], logits[2_000:])
    if flushed:
        one.result()
        other.result()
    one.merge(other)
    check(labels, logits, one.result())
    assert other.result() == scored((labels[2_000:], logits[2_000:])), "the other one stays as it is"


def test_merging_nothing_changes_nothing():
    labels, logits = sample(1.0, n=100)
    metrics = StreamingMetrics()
    metrics.merge(StreamingMetrics())
    metrics.update(labels, logits)
    metrics.merge(StreamingMetrics())
    assert metrics.result() == scored((labels, logits))


# --- as numbers that add up, for trainers that know a part each -----------------------------------------------------------


def of_parts(*parts: tuple[Float32, Float32]) -> list[StreamingMetrics]:
    found = [StreamingMetrics() for _ in parts]
    for metrics, (labels, logits) in zip(found, parts, strict=True):
        metrics.update(labels, logits)
    return found


@pytest.mark.parametrize("bounds", [[2_000], [0], [6_000], [1, 17, 4_000]], ids=["two", "nothing first", "nothing last", "four"])
def test_states_add_up_to_that_of_a_merge(bounds: list[int]):
    labels, logits = sample(1.5, n=6_000)
    parts = list(zip(np.split(labels, bounds), np.split(logits, bounds), strict=True))
    total = StreamingMetrics.of_state(np.sum([metrics.state() for metrics in of_parts(*parts)], axis=0))
    first, *others = of_parts(*parts)
    for other in others:
        first.merge(other)
    assert total.result() == first.result()
    np.testing.assert_array_equal(total.state(), first.state())
    check(labels, logits, total.result())


def test_what_comes_of_a_state_goes_on():
    """It is an object like any other: it can be updated and merged, and leaves the one that it came of alone."""
    labels, logits = sample(1.0, n=3_000)
    (first,) = of_parts((labels[:1_000], logits[:1_000]))
    again = StreamingMetrics.of_state(first.state())
    again.update(labels[1_000:2_000], logits[1_000:2_000])
    (last,) = of_parts((labels[2_000:], logits[2_000:]))
    again.merge(last)
    check(labels, logits, again.result())
    assert first.result() == scored((labels[:1_000], logits[:1_000]))


def test_the_state_of_nothing():
    state = StreamingMetrics().state()
    assert (state.dtype, state.any()) == (np.float64, False)
    found = StreamingMetrics.of_state(state + state).result()
    assert (found.examples, found.auc) == (0, None)
    assert math.isnan(found.logloss)


def test_states_are_exact_for_more_examples_than_int32_counts():
    labels, logits = sample(1.0, n=1_000)
    (few,) = of_parts((labels, logits))
    times = 3 << 30
    many = StreamingMetrics.of_state(few.state() * times).result()
    assert many.examples == 1_000 * times
    assert many.auc == pytest.approx(few.result().auc, rel=1e-12)
    assert many.real_mean == few.result().real_mean


def naive_auc(labels: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    """The share of (positive, negative) pairs in the right order, ties counting half."""
    difference = logits[labels == 1][:, None] - logits[labels == 0][None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


# Multiples of 1/64 are never in one bin unless they are equal.
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-64 * 32, 64 * 32)), min_size=2, max_size=30))
def test_the_auc_is_that_of_all_pairs(pairs: list[tuple[bool, int]]):
    labels = np.array([label for label, _ in pairs], np.float32)
    logits = np.array([k / 64 for _, k in pairs], np.float32)
    found = scored((labels, logits)).auc
    if labels.min() == labels.max():
        assert found is None
    else:
        assert found == pytest.approx(naive_auc(labels, logits), abs=1e-12)


# --- several labels -----------------------------------------------------------------------------------------------------

NAMES = ("click", "buy", "call")


def several(n: int = 3_000, seed: int = 0) -> tuple[Float32, Float32]:
    """Of three labels that are of different difficulty, [n, 3] each."""
    parts = [sample(scale, shift, n, seed + k) for k, (scale, shift) in enumerate([(1.0, 0.0), (3.0, -2.0), (0.3, 1.0)])]
    return np.stack([labels for labels, _ in parts], 1), np.stack([logits for _, logits in parts], 1)


def of_labels(*parts: tuple[Float32, Float32], names: tuple[str, ...] = NAMES) -> LabelMetrics:
    metrics = LabelMetrics(names)
    for labels, logits in parts:
        metrics.update(labels, logits)
    return metrics


def test_each_label_has_its_own_figures_the_first_ones_first():
    labels, logits = several()
    first, more = of_labels((labels, logits)).result()
    assert list(more) == ["buy", "call"]
    for k, found in enumerate((first, *more.values())):
        check(np.ascontiguousarray(labels[:, k]), np.ascontiguousarray(logits[:, k]), found)
    assert len({found.auc for found in (first, *more.values())}) == 3


def test_one_label_is_as_without_it():
    labels, logits = sample(1.0, n=500)
    assert of_labels((labels, logits), names=("click",)).result() == (scored((labels, logits)), {})


def test_of_several_labels_one_may_be_of_one_class():
    labels, logits = several(200)
    labels[:, 1] = 0
    first, more = of_labels((labels, logits)).result()
    assert (first.auc is None, more["buy"].auc, more["call"].auc is None) == (False, None, False)
    assert more["buy"].real_mean == 0


@pytest.mark.parametrize("way", ["merge", "state", "arrays"])
@pytest.mark.parametrize("names", [NAMES, ("click",)], ids=["three", "one"])
def test_parts_of_several_labels_add_up_to_the_whole(way: str, names: tuple[str, ...]):
    """As they are merged, summed over trainers, or kept in a checkpoint and gone on with."""
    labels, logits = several() if len(names) == 3 else sample(1.0, n=3_000)
    parts = [(labels[:1_000], logits[:1_000]), (labels[1_000:], logits[1_000:])]
    first, second = of_labels(parts[0], names=names), of_labels(parts[1], names=names)
    whole = of_labels(*parts, names=names).result()
    if way == "merge":
        first.merge(second)
        found = first
    elif way == "state":
        assert len(first.state()) == len(names) * len(StreamingMetrics().state())
        found = LabelMetrics.of_state(names, first.state() + second.state())
    else:
        found = LabelMetrics.of_arrays(names, first.arrays())
        assert sum(array.nbytes for array in first.arrays().values()) < 200_000, "empty bins are left out"
        found.update(*parts[1])
    for ours, wanted in zip((found.result()[0], *found.result()[1].values()), (whole[0], *whole[1].values()), strict=True):
        assert (ours.examples, ours.auc, ours.real_mean) == (wanted.examples, wanted.auc, wanted.real_mean)
        assert ours.logloss == pytest.approx(wanted.logloss, rel=1e-12)
        assert ours.prob_mean == pytest.approx(wanted.prob_mean, rel=1e-12)


def test_arrays_of_a_version_that_knew_one_label_are_taken():
    (before,) = of_parts(sample(1.0, n=100))
    assert LabelMetrics.of_arrays(("click",), before.arrays()).result() == (before.result(), {})


def test_arrays_of_nothing():
    found = LabelMetrics.of_arrays(NAMES, of_labels().arrays()).result()
    assert found[0].examples == 0
    assert [of.auc for of in found[1].values()] == [None, None]
