"""The event files as TensorBoard reads them: the same numbers as metrics.jsonl, and curves that scikit-learn agrees with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from sklearn.calibration import calibration_curve
from sklearn.metrics import auc as area
from sklearn.metrics import confusion_matrix, roc_auc_score

from flowps.errors import ConfigError, DataError, RunDirError
from flowps.status.event import Evaluated, Interval, Metrics
from flowps.train import main
from flowps.trainer.metrics import StreamingMetrics
from flowps.trainer.tensorboard import Board, Scores
from tests.test_train import command, good_columns, write
from tests.trainer.test_loop import ListStream, World, make_batches, make_config

METRICS = Metrics(examples=100, auc=0.75, logloss=0.5, prob_mean=0.25, real_mean=0.2)


def events_of(file: Path) -> list[Any]:
    """All of one file, in order."""
    return [tf.compat.v1.Event.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(file))]


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*tfevents*"))


def values_of(folder: Path, name: str) -> dict[str, dict[int, Any]]:
    """Of the one file in `folder`/`name`: tag → step → value."""
    (file,) = files_of(folder / name)
    found: dict[str, dict[int, Any]] = {}
    for event in events_of(file):
        for value in event.summary.value:
            assert event.step not in found.get(value.tag, {}), "one value a step"
            found.setdefault(value.tag, {})[event.step] = value
    return found


def scalars_of(folder: Path, name: str) -> dict[str, dict[int, float]]:
    values = values_of(folder, name)
    return {tag: {step: of.simple_value for step, of in steps.items()} for tag, steps in values.items()
            if all(of.HasField("simple_value") for of in steps.values())}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Training and test data."""
    return (
        write(tmp_path / "train.parquet", good_columns(2000), row_group_size=300),
        write(tmp_path / "test.parquet", good_columns(500, seed=1)),
    )


# --- a run as a command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The board of a run, and the lines of its metrics.jsonl."""
    folder = tmp_path_factory.mktemp("run")
    train = write(folder / "train.parquet", good_columns(2000), row_group_size=300)
    test = write(folder / "test.parquet", good_columns(500, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # a relative folder is the command's, wherever the trainer is
        arguments = ("--data.train", train, "--data.test", test, "--run_dir", "run", "--epochs", 2, "--tensorboard", "board",
                     "--trainer.warmup_steps", 20)  # fmt: skip
        assert main(command(*arguments)) == 0
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return folder / "board", [json.loads(line) for line in lines]


def test_every_interval_is_a_point_of_every_curve(run):
    board, lines = run
    intervals = [line for line in lines if line["type"] == "Interval"]
    scalars = scalars_of(board, "train")
    assert [line["step"] for line in intervals] == list(scalars["auc"])
    for prefix, metrics in (("", "metrics"), ("epoch/", "epoch_metrics")):
        for tag, figure in (("auc", "auc"), ("logloss", "logloss"), ("prediction_mean", "prob_mean"), ("label_mean", "real_mean")):
            wanted = [line[metrics][figure] for line in intervals]
            assert list(scalars[prefix + tag].values()) == pytest.approx(wanted), prefix + tag
        ratios = [line[metrics]["prob_mean"] / line[metrics]["real_mean"] for line in intervals]
        assert list(scalars[f"{prefix}calibration"].values()) == pytest.approx(ratios)
    for tag in ("examples_per_s", "steps_per_s"):
        written = scalars[f"speed/{tag.replace('_per_s', '_per_second')}"]
        assert list(written.values()) == pytest.approx([line[tag] for line in intervals])
    assert scalars["learning_rate_scale"] == {step: pytest.approx(min(1.0, step / 20)) for step in scalars["auc"]}


def test_the_evaluation_lies_on_the_same_curves(run):
    board, lines = run
    (evaluated,) = [line for line in lines if line["type"] == "Evaluated"]
    scalars, step = scalars_of(board, "test"), evaluated["step"]
    assert scalars["auc"] == {step: pytest.approx(evaluated["metrics"]["auc"])}
    assert scalars["logloss"] == {step: pytest.approx(evaluated["metrics"]["logloss"])}
    assert scalars.keys() <= scalars_of(board, "train").keys()


def test_the_curves_of_the_evaluation_are_there_and_agree_with_its_figures(run):
    board, lines = run
    (metrics,) = [line["metrics"] for line in lines if line["type"] == "Evaluated"]
    values = {tag: next(iter(steps.values())) for tag, steps in values_of(board, "test").items()}
    for tag in ("roc_curve", "calibration_curve"):
        picture = tf.io.decode_png(values[tag].image.encoded_image_string).numpy()
        assert picture.shape == (values[tag].image.height, values[tag].image.width, values[tag].image.colorspace)
        assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 3, "something is drawn"

    curve = values["pr_curve"]
    assert curve.metadata.plugin_data.plugin_name == "pr_curves"
    tp, fp, tn, fn, precision, recall = tf.make_ndarray(curve.tensor)
    assert curve.metadata.plugin_data.content == b"\x10" + bytes([len(tp) & 0x7F | 0x80, len(tp) >> 7]), "num_thresholds"
    positives = round(metrics["real_mean"] * metrics["examples"])
    np.testing.assert_array_equal(tp + fn, positives)
    np.testing.assert_array_equal(fp + tn, metrics["examples"] - positives)
    np.testing.assert_allclose(recall, tp / positives, rtol=1e-6)
    assert precision[0] == pytest.approx(metrics["real_mean"])
    assert area(fp[::-1], tp[::-1]) / positives / (metrics["examples"] - positives) == pytest.approx(metrics["auc"], abs=0.01)

    text = values["calibration_curve/groups"]
    assert text.metadata.plugin_data.plugin_name == "text"
    (table,) = tf.make_ndarray(text.tensor)
    rows = np.array(
        [[float(cell.replace(",", "")) for cell in line.strip("|").split("|")] for line in table.decode().split("\n")[2:]]
    )
    assert rows[:, 2].sum() == metrics["examples"]
    assert (rows[:, 0] * rows[:, 2]).sum() / metrics["examples"] == pytest.approx(metrics["prob_mean"], abs=1e-4)
    assert (rows[:, 1] * rows[:, 2]).sum() == pytest.approx(positives, abs=0.1)


def test_a_file_begins_as_tensorboard_wants_it(run):
    board, _ = run
    for file in files_of(board):
        version, start, *rest = events_of(file)
        assert version.file_version == "brain.Event:2"
        assert (start.step, start.session_log.status) == (1, tf.compat.v1.SessionLog.START)
        assert all(event.wall_time >= start.wall_time > 1e9 for event in rest)


# --- what goes wrong ------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path, files, capsys):
    (tmp_path / "file").write_text("in the way")
    arguments = command("--data.train", files[0], "--run_dir", tmp_path / "run", "--tensorboard", tmp_path / "file" / "board")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"error: tensorboard: {tmp_path}/file/board cannot be written: {tmp_path}/file is not a directory; "
        "choose another folder with --tensorboard"
    ]
    assert "step 10" not in out
    assert not (tmp_path / "run" / "model.keras").exists()
    assert not (tmp_path / "run" / "embeddings").exists()


class FullDisk:
    """A TFRecordWriter on a disk that has room for so many records more."""

    room = 0

    def __init__(self, path: str) -> None:
        pass

    def write(self, record: bytes) -> None:
        if not FullDisk.room:
            raise tf.errors.ResourceExhaustedError(None, None, "/board/train/events; No space left on device")
        FullDisk.room -= 1

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if not FullDisk.room:
            raise tf.errors.ResourceExhaustedError(None, None, "/board/train/events; No space left on device")


def test_a_disk_that_is_full_ends_the_run_and_keeps_what_was_trained(tmp_path, files, capsys, monkeypatch):
    monkeypatch.setattr(tf.io, "TFRecordWriter", FullDisk)
    FullDisk.room = 3  # the beginning, and one interval
    assert main(command("--data.train", files[0], "--run_dir", tmp_path / "run", "--tensorboard", tmp_path / "board")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: tensorboard: {tmp_path}/board cannot be written: No space left on device; what was trained before, "
    ), line
    assert (tmp_path / "run" / "model.keras").exists()


def test_the_error_that_ends_the_run_is_the_one_to_show(tmp_path, monkeypatch):
    monkeypatch.setattr(tf.io, "TFRecordWriter", FullDisk)
    FullDisk.room = 2
    board = Board(str(tmp_path), lambda step: 1.0)
    with pytest.raises(ZeroDivisionError), board.opened(0, 0):
        raise ZeroDivisionError
    FullDisk.room = 2
    with pytest.raises(RunDirError, match="No space left"), board.opened(0, 0):
        pass


def test_what_came_before_an_error_is_in_the_file(tmp_path):
    class Broken(World):
        def train(self, epoch: int) -> ListStream:
            return ListStream(self.train_batches, DataError("a bad file"))

    world = Broken(make_batches(6))
    with pytest.raises(DataError, match="a bad file"):
        world.run(make_config(print_interval=2, tensorboard=str(tmp_path)))
    told = [event.step for event in world.of_kind(Interval)]
    assert told[:2] == [2, 4]
    assert list(scalars_of(tmp_path, "train")["logloss"]) == told


def test_points_are_on_disk_when_their_interval_is_told(tmp_path):
    """Who looks while the run goes on sees what was printed."""
    seen: list[list[int]] = []

    class Looking(World):
        def emit(self, event: Any) -> None:
            super().emit(event)
            if isinstance(event, Interval):
                seen.append(list(scalars_of(tmp_path, "train")["logloss"]))

    Looking(make_batches(6)).run(make_config(print_interval=2, tensorboard=str(tmp_path)))
    assert seen == [[2], [2, 4], [2, 4, 6]]


# --- whose board it is ----------------------------------------------------------------------------------------------------


def told() -> Iterator[Interval | Evaluated]:
    yield Interval(1, 10, 5.0, 320.0, METRICS, METRICS)
    yield Evaluated(1, 10, 1.0, METRICS)


@pytest.mark.parametrize(("folder", "trainer"), [("", 0), ("board", 1)])
def test_without_a_folder_and_beside_the_first_trainer_nothing_is_written(tmp_path, monkeypatch, folder, trainer):
    monkeypatch.chdir(tmp_path)
    board = Board(folder, lambda step: 1.0)
    with board.opened(trainer, 0):
        for event in told():
            board.interval(event) if isinstance(event, Interval) else board.evaluated(event, StreamingMetrics())
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_puts_a_file_beside_the_first_and_takes_back_what_comes_again(tmp_path):
    for step in (0, 40):
        board = Board(str(tmp_path), lambda step: 1.0)
        with board.opened(0, step):
            board.interval(Interval(1, step + 10, 5.0, 320.0, METRICS, METRICS))
    first, second = files_of(tmp_path)
    starts = [[event.step for event in events_of(file) if event.HasField("session_log")] for file in (first, second)]
    assert starts == [[1], [41]]


def test_an_evaluation_without_clicks_or_examples_has_no_curves_of_ranking(tmp_path):
    board, metrics = Board(str(tmp_path), lambda step: 1.0), StreamingMetrics()
    with board.opened(0, 0):
        board.evaluated(Evaluated(1, 10, 1.0, metrics.result()), metrics)
        metrics.update(np.zeros(5, np.float32), np.linspace(-3, 0, 5, dtype=np.float32))
        board.evaluated(Evaluated(1, 20, 1.0, metrics.result()), metrics)
    values = values_of(tmp_path, "test")
    assert not [tag for tag, steps in values.items() if 10 in steps]
    assert {tag for tag, steps in values.items() if 20 in steps} == {
        "logloss", "prediction_mean", "label_mean", "calibration_curve", "calibration_curve/groups"
    }  # fmt: skip


def test_a_folder_that_is_a_file_is_a_config_error(tmp_path):
    (tmp_path / "board").write_text("")
    with pytest.raises(ConfigError, match="choose another folder with --tensorboard"), Board(
        str(tmp_path / "board"), lambda step: 1.0
    ).opened(0, 0):  # fmt: skip
        raise AssertionError("training began")


# --- scores ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 1, 2])
def scored(request) -> tuple[np.ndarray, np.ndarray, Scores]:
    """Labels, probabilities and their scores; many equal predictions, few clicks, and predictions near 0 and 1."""
    rng = np.random.default_rng(request.param)
    logits = [rng.normal(-3, 2, 3000), rng.integers(-3, 3, 3000) * 1.0, rng.normal(0, 12, 3000)][request.param].astype(np.float32)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    labels = (rng.random(3000) < probabilities).astype(np.float32)
    metrics = StreamingMetrics()
    metrics.update(labels, logits)
    return labels, probabilities, Scores.of(metrics)


def test_the_roc_curve_has_the_area_of_scikit_learn(scored):
    labels, probabilities, scores = scored
    fpr, tpr = scores.roc()
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert area(fpr, tpr) == pytest.approx(roc_auc_score(labels, probabilities), abs=1e-5)


def test_counts_at_thresholds_are_those_of_scikit_learn(scored):
    labels, probabilities, scores = scored
    counts = scores.precision_recall(11)
    for threshold, (tp, fp, tn, fn, precision, recall) in zip(np.linspace(0, 1, 11), counts.T, strict=True):
        near = np.abs(probabilities - threshold) < 1e-4  # a bin is 6e-5 of a logit wide
        assert not near.any() or threshold in (0.0, 0.5, 1.0)
        if threshold not in (0.5, 1.0):
            wanted = confusion_matrix(labels, probabilities >= threshold, labels=[0, 1])
            assert [tn, fp, fn, tp] == wanted.ravel().tolist()
        assert precision == pytest.approx(tp / (tp + fp) if tp + fp else 0)
        assert recall == pytest.approx(tp / labels.sum())
    assert counts[:4].sum(axis=0).tolist() == [3000.0] * 11


def test_calibration_is_that_of_scikit_learn(scored):
    labels, probabilities, scores = scored
    groups = scores.calibration(10)
    assert groups[:, 2].sum() == len(labels)
    assert np.all(np.diff(groups[:, 0]) > 0)
    assert (groups[:, 1] * groups[:, 2]).sum() == pytest.approx(labels.sum())
    if len(np.unique(probabilities)) > 1000:  # equal predictions stay together here, and do not there
        observed, predicted = calibration_curve(labels, probabilities, n_bins=10, strategy="quantile")
        np.testing.assert_allclose(groups[:, 0], predicted, atol=0.01)
        np.testing.assert_allclose(groups[:, 1], observed, atol=0.02)
