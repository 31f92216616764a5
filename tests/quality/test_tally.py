"""A tally adds up: any cut, any order of merging, through pickle; and what it refuses."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowps.errors import DataError, FlowpsError, ModelError
from flowps.quality import Quality, Tally, cells
from flowps.quality import column as column_module
from flowps.quality import tally as tally_module
from flowps.quality.exact import Sums
from tests.quality.naive import column, sample

N = 2_000


class Samples:
    """Samples with slice columns `age` and `city` and users; parts of them are tallied."""

    def __init__(self, n: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.labels, self.logits = sample(n, 3.0, seed=seed)
        self.logits[rng.random(n) < 0.2] = 0.5
        self.logits[rng.random(n) < 0.01] = 1e4
        self.age = column([None if k == 9 else int(k) for k in rng.zipf(1.6, n) % 40], pa.int64())
        self.city = column([f"city {k}" for k in rng.integers(0, 5, n)])
        self.user = column([f"user {k}" for k in rng.zipf(1.5, n) % 200])

    def tally(self, rows: Any = slice(None), batch: int = 1 << 30) -> Tally:
        taken = np.arange(len(self.labels))[rows]
        tally = Tally(("age", "city"), "user")
        for start in range(0, len(taken), batch):
            of = taken[start : start + batch]
            # A part has its own dictionary, as files have.
            city = self.city.take(pa.array(of)).dictionary_encode()
            tally.update(
                self.labels[of], self.logits[of], {"age": self.age.take(pa.array(of)), "city": city}, self.user.take(pa.array(of))
            )
        return tally


SAMPLES = Samples(N)
WHOLE = SAMPLES.tally().result(rows=7)
FEW_CELLS = 300


@pytest.fixture(scope="module")
def whole_of_few_cells() -> Quality:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "MAX_CELLS", FEW_CELLS)
        return SAMPLES.tally().result(rows=7)


def merged(tallies: list[Tally], tree: bool) -> Tally:
    while len(tallies) > 1:
        if tree:
            pairs = [tallies[k : k + 2] for k in range(0, len(tallies), 2)]
            for pair in pairs:
                for other in pair[1:]:
                    pair[0].merge(other)
            tallies = [pair[0] for pair in pairs]
        else:
            tallies[0].merge(tallies.pop())
    return tallies[0]


@given(
    seed=st.integers(0, 2**32),
    bounds=st.lists(st.integers(0, N), max_size=8).map(sorted),
    batch=st.sampled_from([97, 1_000, 1 << 30]),
    tree=st.booleans(),
    pickled=st.booleans(),
    few=st.booleans(),
    flush=st.sampled_from([1, 500, 1 << 19]),
)
@settings(max_examples=60, deadline=None)
def test_neither_the_cut_nor_the_order_leaves_a_trace(
    whole_of_few_cells: Quality, seed: int, bounds: list[int], batch: int, tree: bool, pickled: bool, few: bool, flush: int
):
    rows, order = list(range(N)), Random(seed)
    order.shuffle(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally_module, "_FLUSH_SAMPLES", flush)
        patch.setattr(cells, "_WAITING", flush)
        if few:
            patch.setattr(cells, "MAX_CELLS", FEW_CELLS)
        tallies = [SAMPLES.tally(part, batch) for part in np.split(np.array(rows), bounds)]
        if pickled:
            tallies = pickle.loads(pickle.dumps(tallies))
        order.shuffle(tallies)
        found = merged(tallies, tree).result(rows=7)
    assert found == (whole_of_few_cells if few else WHOLE)


def _of_rows(start: int, stop: int) -> Tally:
    return SAMPLES.tally(slice(start, stop), 100)


def test_many_processes_find_the_same():
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        tallies = list(processes.map(_of_rows, [0, 300, 1_000], [300, 1_000, N]))
    assert merged(tallies, tree=False).result(rows=7) == WHOLE


def test_few_cells_are_coarser(whole_of_few_cells: Quality):
    """Or the property above would say nothing of it."""
    assert [of.bin_width > cells.BIN_WIDTH for of in whole_of_few_cells.slices] == [True, True]
    assert [of.bin_width for of in WHOLE.slices] == [cells.BIN_WIDTH] * 2


def test_cells_stay_below_their_limit_down_to_one_bin():
    found = cells.Cells(64)
    rng = np.random.default_rng(0)
    for _ in range(20):
        found.add(rng.integers(0, 32, 1_000), rng.integers(0, cells.BINS, 1_000), rng.random(1_000) < 0.5)
    counts = found.counts()
    assert (len(counts.bins), int((counts.positives + counts.negatives).sum())) == (32, 20_000)
    assert found.bin_width == 64


@given(
    parts=st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**60 + 2**40)), max_size=30), max_size=5),
    values=st.sets(st.integers(0, 9)),
)
def test_sums_are_exact(parts: list[list[tuple[int, int]]], values: set[int]):
    total = Sums()
    for part in parts:
        sums = Sums()
        sums.add(np.array([value for value, _ in part], np.int64), np.array([units for _, units in part], np.int64))
        total.merge(sums, np.arange(6)[::-1].copy())
    expected = sum(units for part in parts for value, units in part if 5 - value in values)
    assert total.total(np.array(sorted(values), np.int64)) == expected


def test_sums_carry():
    sums = Sums()
    for _ in range(3):
        sums.add(np.zeros(3_000_000, np.int64), np.full(3_000_000, 2**60 + 2**40 - 1))
    assert sums.total(np.zeros(1, np.int64)) == 9_000_000 * (2**60 + 2**40 - 1)


def test_the_result_can_be_asked_for_in_between():
    tally = SAMPLES.tally(slice(0, 700))
    first = tally.result(rows=7)
    assert first == tally.result(rows=7) == SAMPLES.tally(slice(0, 700)).result(rows=7)
    assert tally.samples == 700
    tally.merge(SAMPLES.tally(slice(700, None)))
    assert (tally.result(rows=7), tally.samples) == (WHOLE, N)


def test_the_other_tally_stays_as_it_is():
    one, other = SAMPLES.tally(slice(0, 900)), SAMPLES.tally(slice(900, None))
    before = other.result()
    one.merge(other)
    one.merge(SAMPLES.tally())
    assert other.result() == before
    other.merge(SAMPLES.tally(slice(0, 900)))
    assert other.result(rows=7) == WHOLE


def test_strings_that_look_alike_are_in_the_same_order():
    """They are bytes that are no UTF-8."""
    names = pa.array([b"\xfe", b"\xff"], pa.binary()).view(pa.string())

    def found(order: list[int]) -> Quality:
        tally = Tally(("x",))
        for k in order:
            tally.update(np.array([k], np.float32), np.array([k], np.float32), {"x": names[k : k + 1]})
        return tally.result()

    assert found([0, 1]) == found([1, 0])


def test_arrays_may_change_after_an_update():
    labels, logits = SAMPLES.labels.copy(), SAMPLES.logits.copy()
    tally, same = Tally(), Tally()
    tally.update(labels, logits)
    same.update(SAMPLES.labels, SAMPLES.logits)
    labels[:], logits[:] = 1 - labels, 0
    assert tally.result() == same.result()


def test_a_pickle_is_small():
    assert len(pickle.dumps(Tally(("age", "city"), "user"))) < 3_000
    tally = Tally()
    tally.update(*sample(100_000))
    assert len(pickle.dumps(tally)) < 500_000, "most of the 2^20 bins are empty: 5 bytes for each that is not"
    with_group = Tally(group="user")
    with_group.update(*sample(100_000), group=column(np.arange(100_000)))
    assert len(pickle.dumps(with_group)) < 500_000 + 13 * 100_000


def test_a_million_samples():
    samples = sample(1_000_000)
    rng = np.random.default_rng(0)
    tally = Tally(("x",), "user")
    tally.update(*samples, {"x": column(rng.integers(0, 1_000, 1_000_000))}, column(rng.integers(0, 50_000, 1_000_000)))
    found = tally.result()
    assert found.samples == 1_000_000
    assert found.gauc is not None
    assert found.gauc.samples + found.gauc.one_class_samples == 1_000_000
    assert sum(row.samples for row in found.slices[0].rows) + found.slices[0].others.samples == 1_000_000


# --- refusals -------------------------------------------------------------------------------------------------------------

TWO = np.array([0, 1], np.float32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_predictions_that_are_no_numbers_are_refused(bad: float):
    tally = Tally()
    with pytest.raises(ModelError, match=r"1 of 2 predictions are NaN or infinite, expected finite logits; look for NaN"):
        tally.update(TWO, np.array([bad, 0], np.float32))
    assert tally.samples == tally.result().samples == 0


@pytest.mark.parametrize(("bad", "said"), [(0.5, "0.5"), (-1, "-1"), (2, "2"), (np.nan, "nan")])
def test_other_labels_are_refused(bad: float, said: str):
    with pytest.raises(DataError, match=rf"^a label is {said}, expected 0 or 1; correct the label column"):
        Tally().update(np.array([1, bad], np.float32), TWO)


@pytest.mark.parametrize("role", ["slice", "group"])
@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (pa.float32(), "bucket the numbers"),
        (pa.decimal128(5, 2), "bucket the numbers"),
        (pa.list_(pa.int64()), "one value a sample"),
        (pa.large_list(pa.string()), "one value a sample"),
        (pa.struct([("a", pa.int8())]), "one value a sample"),
        (pa.timestamp("us"), "cast the column"),
        (pa.binary(), "cast the column"),
        (pa.dictionary(pa.int8(), pa.float64()), "bucket the numbers"),
    ],
    ids=str,
)
def test_other_types_are_refused(role: str, kind: pa.DataType, advice: str):
    array = pa.array([None, None], kind)
    tally = Tally(("price",)) if role == "slice" else Tally(group="price")
    with pytest.raises(DataError) as refused:
        tally.update(TWO, TWO, **({"slices": {"price": array}} if role == "slice" else {"group": array}))
    text = str(refused.value)
    assert f"{role} column 'price' is {kind}, expected integers, strings, booleans or dictionaries of those; " in text
    assert advice in text


@pytest.mark.parametrize("role", ["slice", "group"])
@pytest.mark.parametrize("merge", [True, False])
def test_another_type_in_another_file_is_refused(role: str, merge: bool):
    def tally(array: pa.Array, into: Tally | None = None) -> Tally:
        made = into or (Tally(("x",)) if role == "slice" else Tally(group="x"))
        made.update(TWO, TWO, **({"slices": {"x": array}} if role == "slice" else {"group": array}))
        return made

    first = tally(column([1, 2]))
    with pytest.raises(
        DataError, match=f"{role} column 'x': string in some files, integer in others, expected one type; cast the column"
    ):
        first.merge(tally(column(["1", "2"]))) if merge else tally(column(["1", "2"]), first)


@pytest.mark.parametrize("merge", [True, False])
def test_too_many_values_are_refused(merge: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(column_module, "MAX_VALUES", 3)
    tally, other = Tally(("user",)), Tally(("user",))
    tally.update(TWO, TWO, {"user": column([1, 2])})
    tally.update(TWO, TWO, {"user": column([None, 2])})
    other.update(TWO, TWO, {"user": column([1, 4])})
    with pytest.raises(DataError, match=r"slice column 'user': more than 3 different values, .*bucket it first .*group column"):
        tally.merge(other) if merge else tally.update(TWO, TWO, {"user": column([1, 4])})
    if not merge:
        assert [(row.value, row.samples) for row in tally.result().slices[0].rows] == [(2, 2), (1, 1), (None, 1)]


def test_a_refused_update_adds_nothing():
    tally = Tally(("a", "b"), "g")
    good = {"slices": {"a": column([1, 2]), "b": column(["x", "y"])}, "group": column([1, 2])}
    tally.update(TWO, TWO, **good)
    before = tally.result()
    for bad in (
        {"slices": {"a": column([3, 4]), "b": column([1.5, 2])}, "group": column([1, 2])},
        {"slices": {"a": column([3, 4]), "b": column(["x", "y"])}, "group": column(["1", "2"])},
    ):
        with pytest.raises(FlowpsError):
            tally.update(TWO, TWO, **bad)
    assert tally.result() == before


def test_wrong_calls():
    with pytest.raises(ValueError, match="twice"):
        Tally(("a", "a"))
    tally = Tally(("a",), "g")
    good: dict[str, Any] = {"slices": {"a": column([1, 2])}, "group": column([1, 2])}
    for wrong in ({"slices": {}}, {"slices": {"a": column([1, 2]), "b": column([1, 2])}}, {"group": None}):
        with pytest.raises(ValueError, match="in a tally of"):
            tally.update(TWO, TWO, **{**good, **wrong})
    for wrong in ({"slices": {"a": column([1])}}, {"group": column([1])}):
        with pytest.raises(ValueError, match="expected all to be"):
            tally.update(TWO, TWO, **{**good, **wrong})
    with pytest.raises(ValueError, match="expected all to be"):
        Tally().update(TWO[:1], TWO)
    with pytest.raises(ValueError, match="expected all to be"):
        Tally().update(TWO[:, None], TWO[:, None])
    with pytest.raises(ValueError, match="do not add up"):
        tally.merge(Tally(("a",)))
    for settings_ in ({"buckets": 0}, {"rows": 0}):
        with pytest.raises(ValueError, match="expected 1 or more"):
            tally.result(**settings_)
