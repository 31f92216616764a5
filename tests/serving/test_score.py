"""Rows in, predictions out: what the trained model gives, for every pooling, type and form of rows; and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from flowps.errors import DataError, ModelError, SchemaError
from flowps.export import export
from flowps.predict import main as predict
from flowps.serving import Scorer, load, score
from flowps.trainer.models import ModelSpec
from tests.serving.samples import columns, inputs_by_hand, sigmoid


@pytest.fixture(scope="module")
def scorer(bundle: Path) -> Scorer:
    return load(bundle, verify=True)


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Samples that were not trained on; of half of the users nothing is known."""
    return columns(300, seed=1, users=100)


def by_hand(run: Path, scorer: Scorer, table: pa.Table) -> Any:
    """The logits of the run's own model, from the run's own files."""
    inputs = inputs_by_hand(run, table, [slot.settings for slot in scorer.manifest.slots])
    return keras.ops.convert_to_numpy(keras.saving.load_model(run / "model.keras")(inputs, training=False))[:, 0]


def views(values: list[Any], kind: pa.DataType) -> pa.Array:
    """An array of a type that Arrow casts nothing to; of dictionaries as polars gives them."""
    if not pa.types.is_dictionary(kind):
        return pa.array(values, kind)
    coded = pa.array(values).dictionary_encode()
    return pa.DictionaryArray.from_arrays(
        coded.indices.cast(kind.index_type), pa.array(coded.dictionary.to_pylist(), kind.value_type)
    )


def doctored(run: Path, to: Path) -> Path:
    """A copy of the run to change."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints"))
    return to


class TestScores:
    def test_are_those_of_the_trained_model(self, run, scorer, table):
        logits = by_hand(run, scorer, table)
        np.testing.assert_allclose(scorer.logits(table), logits, atol=1e-6, rtol=1e-6)
        found = scorer.score(table)
        np.testing.assert_allclose(found, sigmoid(logits), atol=1e-6)
        assert (found.dtype, found.shape) == (np.float32, (300,))
        assert found.std() > 0.05
        assert {slot.pooling for slot in scorer.manifest.slots} == {"sum", "mean", "sqrtn", "none"}

    def test_are_those_of_predict(self, run, scorer, table, tmp_path):
        pq.write_table(table, tmp_path / "rows.parquet")
        assert predict([str(run), str(tmp_path / "rows.parquet"), str(tmp_path / "predicted")]) == 0
        (file,) = (tmp_path / "predicted").rglob("*.parquet")
        predicted = pq.read_table(file).column("prediction").to_numpy()
        np.testing.assert_allclose(scorer.score(table), predicted, atol=1e-6)

    def test_tell_what_the_run_was(self, run, scorer):
        summary = json.loads((run / "summary.json").read_text())
        assert scorer.version == 1
        assert scorer.manifest.steps == summary["finished"]["steps"]
        assert scorer.manifest.test.auc == summary["test"]["auc"]
        # And the measure of the run's test is that of the scores.
        table = columns(1000)
        probabilities, labels = scorer.score(table).astype(float), table["label"].to_numpy()
        logloss = -np.mean(np.where(labels == 1, np.log(probabilities), np.log(1 - probabilities)))
        assert logloss == pytest.approx(summary["test"]["logloss"], abs=1e-5)

    def test_both_forms_of_the_model_give_them(self, run, bundle, scorer, table):
        inputs = inputs_by_hand(run, table, [slot.settings for slot in scorer.manifest.slots])
        expected = by_hand(run, scorer, table)
        of_keras = keras.saving.load_model(bundle / "1" / "model.keras")
        np.testing.assert_allclose(keras.ops.convert_to_numpy(of_keras(inputs))[:, 0], expected, atol=1e-6)
        saved = tf.saved_model.load(str(bundle / "1" / "saved_model"))
        for tensor in scorer.manifest.inputs:
            assert inputs[tensor.name].shape[1] == tensor.width == tensor.parts[-1][2]
            assert inputs[tensor.name].dtype == tensor.dtype
        for size in (1, 300):
            given = {name: tf.constant(value[:size]) for name, value in inputs.items()}
            found = saved.signatures["serving_default"](**given)[scorer.manifest.output.name]
            np.testing.assert_allclose(found.numpy()[:, 0], expected[:size], atol=1e-6)

    def test_are_the_same_in_chunks_and_in_threads(self, scorer, table, monkeypatch):
        expected = scorer.score(table)
        monkeypatch.setattr(score, "_CHUNK_ROWS", 7)
        np.testing.assert_allclose(scorer.score(table), expected, atol=1e-6)
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(scorer.score(table))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        for of in found:
            np.testing.assert_allclose(of, expected, atol=1e-6)

    def test_of_no_rows_are_none(self, scorer, table):
        assert scorer.score([]).shape == scorer.score(table.slice(0, 0)).shape == (0,)

    @pytest.mark.parametrize("dtype", ["float16", "int8"])
    def test_of_fewer_bits_are_within_the_error_that_is_told(self, run, scorer, table, tmp_path, dtype):
        export(run, tmp_path / "out", dtype)
        coarse = load(tmp_path / "out")
        assert coarse.manifest.slots[0].dtype == dtype
        for slot in coarse.manifest.slots:
            signs = scorer._tables.rows[slot.name].signs
            exact, found = (of._tables.rows[slot.name].read(signs)[0] for of in (scorer, coarse))
            assert np.abs(found - exact).max() == pytest.approx(slot.max_error, rel=1e-6)
            root = np.sqrt(np.mean((found - exact).astype(float) ** 2) / np.mean(exact.astype(float) ** 2))
            assert root == pytest.approx(slot.relative_error, rel=1e-4)
            assert slot.relative_error < (1e-3 if dtype == "float16" else 1e-2)
        difference = np.abs(coarse.score(table) - scorer.score(table)).max()
        assert 0 < difference < (1e-3 if dtype == "float16" else 1e-2)


class TestWhatTheRunWas:
    def test_negatives_that_were_left_out_shift_the_logits(self, run, scorer, table, tmp_path):
        changed = doctored(run, tmp_path / "run")
        config = (changed / "config.toml").read_text()
        assert "negative_rate = 1.0" in config
        (changed / "config.toml").write_text(config.replace("negative_rate = 1.0", "negative_rate = 0.1"))
        export(changed, tmp_path / "out")
        shifted = load(tmp_path / "out")
        np.testing.assert_allclose(shifted.logits(table), by_hand(run, scorer, table) + np.log(0.1), atol=1e-6)
        inputs = inputs_by_hand(run, table, [slot.settings for slot in scorer.manifest.slots])
        alone = keras.saving.load_model(tmp_path / "out" / "1" / "model.keras")(inputs)
        np.testing.assert_allclose(keras.ops.convert_to_numpy(alone)[:, 0], shifted.logits(table), atol=1e-6)
        assert shifted.manifest.logit_shift == pytest.approx(np.log(0.1))

    def test_several_labels_have_a_column_each(self, run, scorer, table, tmp_path):
        changed = doctored(run, tmp_path / "run")
        schema = json.loads((changed / "schema.json").read_text()) | {"labels": ["label", "bought"]}
        (changed / "schema.json").write_text(json.dumps(schema))
        slots = [slot.settings for slot in scorer.manifest.slots]
        max_lens = [slot.max_len if slot.pooling == "none" else 0 for slot in slots]
        spec = ModelSpec.of([s.name for s in slots], [s.dim for s in slots], 2, (4,), max_lens, labels=("label", "bought"))
        inputs = spec.inputs()
        model = keras.Model(inputs, keras.layers.Dense(2)(spec.concatenated(inputs)))
        model.save(changed / "model.keras")
        export(changed, tmp_path / "out")
        both = load(tmp_path / "out")
        assert both.manifest.labels == ("label", "bought")
        expected = keras.ops.convert_to_numpy(model(inputs_by_hand(run, table, slots)))
        np.testing.assert_allclose(both.logits(table), expected, atol=1e-6)
        assert both.score(table).shape == (300, 2)
        assert both.score([]).shape == (0, 2)


class TestForms:
    def test_of_rows_are_all_the_same(self, scorer, table):
        expected = scorer.score(table)
        forms = {
            "record batch": table.combine_chunks().to_batches()[0],
            "many chunks": pa.concat_tables([table.slice(0, 100), table.slice(100)]),
            "dict of columns": table.to_pydict(),
            "dict of arrays": {name: table.column(name) for name in table.column_names},
            "list of dicts": table.to_pylist(),
            "a data frame": SimpleNamespace(__arrow_c_stream__=table.__arrow_c_stream__),
            "other columns besides": table.append_column("more", table.column("price")),
            "no label": table.drop(["label"]),
            "in another order": table.select(table.column_names[::-1]),
        }
        for name, rows in forms.items():
            np.testing.assert_allclose(scorer.score(rows), expected, atol=1e-6, err_msg=name)

    def test_a_key_that_a_dict_lacks_is_null(self, scorer, table):
        rows = table.slice(0, 5).to_pylist()
        with_null = [{**rows[0], "words": None, "price": None}, *rows[1:]]
        without = [{k: v for k, v in rows[0].items() if k not in ("words", "price")}, *rows[1:]]
        np.testing.assert_array_equal(scorer.score(without), scorer.score(with_null))

    @pytest.mark.parametrize(
        ("column", "kind"),
        [
            ("user", pa.int8()), ("user", pa.uint64()), ("user", pa.float64()), ("user", pa.dictionary(pa.int8(), pa.int32())),
            ("words", pa.large_string()), ("words", pa.string_view()), ("words", pa.dictionary(pa.int32(), pa.string())),
            ("city", pa.string()), ("city", pa.dictionary(pa.int8(), pa.large_string())),
            ("city", pa.dictionary(pa.uint32(), pa.string_view())), ("tags", pa.large_list(pa.string_view())),
            ("tags", pa.large_list(pa.large_string())), ("tags", pa.list_view(pa.string())),
            ("tag_weights", pa.list_(pa.float32())), ("tag_weights", pa.large_list_view(pa.float64())),
            ("seen", pa.list_(pa.int64())), ("seen", pa.list_(pa.float32())), ("mobile", pa.int64()), ("mobile", pa.uint8()),
            ("price", pa.float64()), ("age", pa.decimal128(38, 20)),
        ],
        ids=str,
    )  # fmt: skip
    def test_of_a_type_that_loses_nothing_are_the_same(self, scorer, table, column, kind):
        try:
            cast = table.column(column).cast(kind, safe=False)
        except pa.ArrowNotImplementedError:
            cast = pa.chunked_array([views(table.column(column).to_pylist(), kind)])
        changed = table.set_column(table.column_names.index(column), column, cast)
        np.testing.assert_allclose(scorer.score(changed), scorer.score(table), atol=1e-6)

    @pytest.mark.parametrize("column", ["user", "tags", "tag_weights", "history", "city", "seen", "mobile", "price"])
    def test_of_nulls_alone_are_scored(self, scorer, table, column):
        names = ["tags", "tag_weights"] if column.startswith("tag") else [column]
        rows = table.slice(0, 3)
        typed = rows
        for name in names:
            at = rows.column_names.index(name)
            rows = rows.set_column(at, name, pa.nulls(3))
            typed = typed.set_column(at, name, pa.nulls(3, typed.column(name).type))
        np.testing.assert_array_equal(scorer.score(rows), scorer.score(typed))

    def test_of_empty_lists_alone_are_scored(self, scorer, table):
        rows = [{**row, "tags": [], "tag_weights": [], "history": [], "seen": []} for row in table.slice(0, 3).to_pylist()]
        assert np.isfinite(scorer.score(rows)).all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"user": None}, "no column 'user'"),
            ({"user": None, "users": [1]}, "no column 'user'; did you mean users?"),
            ({"user": ["5"]}, "column 'user' is string, expected integers or booleans: slot trained on int64, and a"),
            ({"user": [1.5]}, "column 'user' is double and cannot become int64 without loss"),
            ({"user": [[1]]}, "column 'user' is list<item: int64>, expected one value in each row"),
            ({"tags": ["a"]}, "column 'tags' is string, expected a list of values in each row"),
            ({"tags": [[1]]}, "column 'tags' is list<item: int64>, expected strings"),
            ({"city": [3]}, "column 'city' is int64, expected strings"),
            ({"price": ["cheap"]}, "column 'price' is string, expected numbers"),
            ({"tag_weights": [1.0]}, "column 'tag_weights' is double, expected a list of numbers in each row: it has"),
            ({"word_weight": ["x"]}, "column 'word_weight' is string, expected one number in each row"),
            ({"user": 5}, "column 'user' is 5, expected a list or array; one row is [{'user': value}]"),
            ({"words": "abc"}, "column 'words' is 'abc', expected a list or array"),
            ({"user": [1, "a"]}, "column 'user' is no column of one type"),
            ({"user": [2**70]}, "column 'user' is no column of one type"),
            ({"user": [1, 2]}, "columns of different lengths"),
        ],
    )  # fmt: skip
    def test_of_columns_say_what_was_expected(self, scorer, table, change, says):
        rows = table.slice(0, 1).to_pydict() | change
        with pytest.raises(SchemaError) as refused:
            scorer.score({name: values for name, values in rows.items() if values is not None})
        assert str(refused.value).startswith("rows to score: ")
        assert says in str(refused.value)

    def test_of_values_name_the_row(self, scorer, table, monkeypatch):
        monkeypatch.setattr(score, "_CHUNK_ROWS", 2)
        rows = table.slice(0, 5).to_pylist()
        rows[3]["age"] = float("inf")
        with pytest.raises(DataError, match=r"column 'age', row 3: found inf, expected a finite float32 number"):
            scorer.score(rows)
        rows = table.slice(4, 5).to_pylist()
        rows[1]["tags"], rows[1]["tag_weights"] = ["a", "b"], [1.0]
        with pytest.raises(DataError, match=r"column 'tag_weights', row 1: found a list of 1, expected a list of 2"):
            scorer.score(rows)

    def test_of_something_else_say_what_can_be_scored(self, scorer, table):
        for rows in (5, "rows", [1, 2], None):
            with pytest.raises(SchemaError, match=r"expected a pyarrow.Table, a data frame of pandas or polars, a dict of columns"):
                scorer.score(rows)
        twice = pa.table([*table.columns, table["user"]], [*table.column_names, "user"])
        with pytest.raises(SchemaError, match="more than one column is named 'user'"):
            scorer.score(twice)

    def test_of_a_prediction_that_is_none(self, scorer, table):
        broken = Scorer(scorer._tables, lambda inputs: np.full((len(inputs["embeddings"]), 1), np.nan, np.float32))
        with pytest.raises(ModelError, match="row 0: the prediction is NaN or infinite"):
            broken.score(table)


def test_it_needs_neither_dask_nor_grpc_and_tensorflow_only_to_load(bundle):
    code = f"""
import sys
import flowps.serving
assert not {{"tensorflow", "keras", "grpc", "dask", "distributed"}} & set(sys.modules)
import warnings; warnings.simplefilter("error")
found = flowps.serving.load({str(bundle)!r}).score([])
assert found.shape == (0,)
assert not {{"grpc", "dask", "distributed", "bokeh"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)
