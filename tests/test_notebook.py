"""flowps from Python: train, `Trainer`, models given as functions and as Keras models, and what importing flowps costs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import flowps
import flowps.train
from flowps.config import Config
from flowps.errors import ConfigError, ModelError, RunDirError
from flowps.knob import load
from flowps.quality import Quality
from flowps.train import as_function, name_of
from tests.scored import TEST_ROWS, TRAIN_ROWS, by_hand, columns_of, config_of, other_columns, write

ROOT = Path(__file__).resolve().parents[1]


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of files to train and to test on."""
    folder = tmp_path_factory.mktemp("notebook")
    write(folder / "train.parquet", columns_of(TRAIN_ROWS))
    write(folder / "test.parquet", other_columns())
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> flowps.Trainer:
    """With everything as it comes."""
    trainer = flowps.Trainer(config_of(folder / "train.parquet", folder / "run"), console=quiet())
    result = trainer.fit()
    assert result.ledger.trained == TRAIN_ROWS
    assert result.run_dir == str(folder / "run")
    return trainer


# --- names ------------------------------------------------------------------------------------------------------------


def test_import_is_light_and_train_can_be_called_before_and_after_its_module_is_imported() -> None:
    """Neither Dask nor TensorFlow nor pyarrow for a config; the command's module is the function, too."""
    code = """
import sys
import flowps
heavy = {"dask", "distributed", "tensorflow", "keras", "pyarrow", "numba", "pandas"} & {name.split(".")[0] for name in sys.modules}
assert not heavy, heavy
assert flowps.from_mapping({"epochs": 2}).epochs == 2
assert flowps.Config().epochs == 1
try:
    flowps.nothing
except AttributeError as error:
    assert str(error) == "module 'flowps' has no attribute 'nothing'"
before = flowps.train
import flowps.train
from flowps import train
assert flowps.train is sys.modules["flowps.train"]
for found in (before, flowps.train, train, flowps.train.train):
    try:
        found({"cluster": {"dashbord": ""}})
    except flowps.FlowpsError as error:
        assert "cluster.dashbord: no such knob; did you mean cluster.dashboard" in str(error), error
    else:
        raise AssertionError
assert "tensorflow" not in sys.modules
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_all_names_are_there() -> None:
    from flowps.notebook import Trainer
    from flowps.trainer.models.from_keras import from_keras

    assert flowps.Trainer is Trainer
    assert flowps.from_keras is from_keras
    assert flowps.load is load
    assert flowps.Config is Config
    assert sorted(flowps.__all__) == sorted(set(flowps.__all__))
    assert callable(flowps.train)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_evaluate_and_predict_are_those_of_the_commands(folder: Path, trained: flowps.Trainer) -> None:
    from flowps.evaluate import main

    assert (
        main([str(trained.run_dir), str(folder / "test.parquet"), "--group", "user", "--json", str(folder / "figures.json")]) == 0
    )
    found = trained.evaluate(folder / "test.parquet", group="user")
    assert isinstance(found, Quality)
    of_command = json.loads((folder / "figures.json").read_text())["label"]
    assert (found.auc, found.logloss, found.gauc and found.gauc.value) == (
        of_command["auc"], of_command["logloss"], of_command["gauc"]["value"],
    )  # fmt: skip
    assert trained.predict([folder / "test.parquet"], folder / "out", columns=["request"]) == TEST_ROWS
    predicted = pq.read_table(folder / "out" / "test.parquet")
    by_us = by_hand(trained.run_dir, pq.read_table(folder / "test.parquet"))
    np.testing.assert_allclose(predicted["prediction"].to_numpy(), by_us, rtol=1e-5)
    assert trained.predict(str(folder / "test.parquet"), str(folder / "out"), columns=["request"]) == 0
    assert trained.predict(folder / "test.parquet", folder / "out", overwrite=True) == TEST_ROWS


def test_a_run_of_earlier_is_taken_up(folder: Path, trained: flowps.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    again = flowps.Trainer.load("run", console=quiet())
    assert again.config.net.hidden == (8,), "it is the run's own config"
    assert again.evaluate(["test.parquet"]) == trained.evaluate(folder / "test.parquet")
    assert again.record.ending is not None
    assert again.record.ending.finished.examples == TRAIN_ROWS
    (bundle,) = [again.export(folder / "bundles")]
    assert bundle.is_dir()
    with pytest.raises(RunDirError):
        flowps.Trainer.load(folder / "nowhere")
    with pytest.raises(RunDirError):
        flowps.Trainer.load(folder)


def test_before_fit_there_is_no_run(folder: Path, tmp_path: Path) -> None:
    for config in ({}, config_of(folder / "train.parquet", tmp_path / "run")):
        trainer = flowps.Trainer(config)
        for act in (lambda t: t.run_dir, lambda t: t.record, lambda t: t.evaluate("x"), lambda t: t.predict("x", "y")):
            with pytest.raises(RunDirError, match=r"the run has no directory yet: call fit\(\) first"):
                act(trainer)


def test_fit_goes_on_where_it_was(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a directory that the run has found for itself, and for more epochs."""
    monkeypatch.chdir(tmp_path)
    config = flowps.from_mapping({**config_of(folder / "train.parquet", Path()), "run_dir": ""})
    trainer = flowps.Trainer(config, console=quiet())
    first = trainer.fit()
    assert first.finished.epochs == 1
    assert trainer.run_dir.parent == tmp_path / "runs"
    loaded = flowps.Trainer.load(trainer.run_dir, console=quiet())
    loaded.config = flowps.from_mapping(
        {
            **config_of(folder / "train.parquet", trainer.run_dir),
            "epochs": 2,
            "data": {**_data(folder), "test": folder / "test.parquet"},
        }
    )
    second = loaded.fit(resume=True)
    assert (second.finished.epochs, second.ledger.trained) == (2, 2 * TRAIN_ROWS)
    assert second.test is not None
    assert trainer.fit(resume=True).run_dir == first.run_dir
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [Path(first.run_dir).name]


def _data(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = config_of(folder / "train.parquet", Path())["data"]
    return data


def test_settings_that_are_wrong_are_refused_at_once(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.in_fligth: no such knob; did you mean trainer\.in_flight"):
        flowps.Trainer({"trainer": {"in_fligth": 2}})
    with pytest.raises(ConfigError, match=r"a function from a ModelSpec to a keras\.Model, or a keras\.Model, found 'dnn'"):
        flowps.train(config_of(folder / "train.parquet", folder / "no run"), quiet(), model="dnn")  # type: ignore[arg-type]
    assert not (folder / "no run").exists()


# --- models -----------------------------------------------------------------------------------------------------------


def build_here(spec: Any) -> Any:
    """A model that can be imported."""
    import keras

    inputs = spec.inputs()
    return keras.Model(inputs, keras.layers.Dense(1)(spec.concatenated(inputs)))


def named(name: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    function.__name__ = name
    return function


class Callable_:  # noqa: N801
    def __call__(self, spec: Any) -> Any:
        return build_here(spec)


def test_functions_are_named_so_that_they_can_be_found_again() -> None:
    assert name_of(build_here) == f"{__name__}:build_here"
    assert name_of(lambda spec: None) == "<lambda> (a function)"
    assert name_of(named("build_here", lambda spec: None)) == "build_here (a function)", "another one of that name"
    assert name_of(Callable_()) == "Callable_ (a function)"
    assert name_of(named("a:b", lambda spec: None)) == "a_b (a function)", "not to be taken for one that can be imported"
    assert as_function(build_here) is build_here


def test_a_function_is_a_model(folder: Path) -> None:
    """One that nobody can import is read back from where it was saved; one that can is built."""

    def within(spec: Any) -> Any:
        assert spec.dense_names == ("price", "spent")
        return build_here(spec)

    scores = {}
    for name, function in (("within", within), ("importable", build_here)):
        run = folder / f"run-{name}"
        trainer = flowps.Trainer(
            config_of(folder / "train.parquet", run, trainer={"in_flight": 1}), model=function, console=quiet()
        )
        trainer.fit()
        assert load(run / "config.toml").model == name_of(function)
        trainer.predict(folder / "test.parquet", folder / f"out-{name}")
        scores[name] = pq.read_table(folder / f"out-{name}" / "test.parquet")["prediction"].to_numpy()
        np.testing.assert_allclose(scores[name], by_hand(run, pq.read_table(folder / "test.parquet")), rtol=1e-5)
    np.testing.assert_array_equal(scores["within"], scores["importable"])
    again = flowps.Trainer.load(folder / "run-within", console=quiet())
    assert again.evaluate(folder / "test.parquet") == flowps.Trainer.load(
        folder / "run-importable", console=quiet()
    ).evaluate(folder / "test.parquet")  # fmt: skip
    (folder / "run-within" / "model.keras").unlink()
    with pytest.raises(ModelError, match="the model, which was given as a function, cannot be read"):
        again.evaluate(folder / "test.parquet")


def test_a_function_that_fails_is_named(folder: Path) -> None:
    def broken(spec: Any) -> Any:
        raise KeyError("user_id")

    with pytest.raises(ModelError, match=r"broken \(a function\) raised KeyError: 'user_id'"):
        flowps.train(config_of(folder / "train.parquet", folder / "broken"), quiet(), model=broken)


def test_an_existing_keras_model_is_trained_with_slots(folder: Path) -> None:
    """From its own dense weights; without its embedding weights."""
    import keras

    layers = keras.layers
    user, tags = keras.Input((1,), name="user", dtype="int64"), keras.Input((3,), name="tags", dtype="int64")
    price = keras.Input((1,), name="price")
    vectors = [layers.Flatten()(layers.Embedding(100, 4)(user))]
    vectors.append(layers.GlobalAveragePooling1D()(layers.Embedding(50, 6, mask_zero=True)(tags)))
    x = layers.Dense(8, "relu")(layers.concatenate([*vectors, price]))
    model = keras.Model([user, tags, price], layers.Dense(1, "sigmoid", bias_initializer=keras.initializers.Constant(-3))(x))
    config = config_of(
        folder / "train.parquet", folder / "run-keras", data={"exclude": ["city", "spent"]}, epochs=8,
        slot=[{"name": "tags", "dim": 6, "pooling": "none", "max_len": 3}],
        trainer={"in_flight": 1, "learning_rate": 0.02},
    )  # fmt: skip
    trainer = flowps.Trainer(config, model=model, console=quiet())
    trainer.fit()
    found = trainer.evaluate(folder / "train.parquet")
    assert isinstance(found, Quality)
    assert found.auc is not None
    assert found.auc > 0.8
    kept = keras.models.load_model(folder / "run-keras" / "model.keras", compile=False)
    assert not any(isinstance(layer, layers.Embedding) for layer in kept.layers)
    assert trainer.predict(folder / "test.parquet", folder / "out-keras") == TEST_ROWS
    scores = pq.read_table(folder / "out-keras" / "test.parquet")["prediction"]
    assert pa.compute.min_max(scores)["min"].as_py() > 0
    with pytest.raises(ModelError, match=r"slot 'user' has dim 16, Embedding .* output_dim 4; set --slot.user.dim 4"):
        flowps.train({**config, "slot_default": {}, "run_dir": str(folder / "other")}, quiet(), model=model)


# --- beside what a notebook has open ----------------------------------------------------------------------------------


def test_a_run_in_this_process_beside_a_cluster_of_the_users(folder: Path, tmp_path: Path) -> None:
    """Whose client is the current one: the run's actors are not its."""
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        distributed.Client(cluster) as client,
    ):
        result = flowps.Trainer(config_of(folder / "train.parquet", tmp_path / "run"), console=quiet()).fit()
        assert result.ledger.trained == TRAIN_ROWS
        assert distributed.Client.current() is client
        assert client.submit(sum, [1, 2]).result() == 3
