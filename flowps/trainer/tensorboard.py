"""`Board`: a run for TensorBoard: the metrics of every interval, and at the end how well the model ranks and is calibrated.

Covers the event files: DIR/train has a point per interval, DIR/test those of the evaluation, so that their curves lie on each
other. They are written as protos: of TensorFlow's own summary operations most need the tensorboard package, which only who looks at
them has to install. Called by the trainer's thread alone.
"""

from __future__ import annotations

import io
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from flowps.errors import ConfigError, FlowpsError, RunDirError
from flowps.status.event import Emit, Evaluated, Event, Interval, Metrics
from flowps.trainer.metrics import BINS, LOGIT_RANGE, StreamingMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Float64 = NDArray[np.float64]

_THRESHOLDS = 1001  # of the precision-recall curve; click rates are small, and most predictions lie close together
_GROUPS = 20  # of the calibration curve
_DRAWN_POINTS = 500  # of the ROC curve, along each axis
_LEAST_COUNT = 1e-7  # as in TensorBoard: no precision where nothing is predicted, but no division by 0 either


class Board:
    """The board of a run in `folder`; "": none, and nothing that is told is written.

    rate_scale   what the learning rates are multiplied by at a step, counted from 0
    """

    def __init__(self, folder: str, rate_scale: Callable[[int], float]) -> None:
        self._folder, self._rate_scale = folder, rate_scale
        self._step = 0
        self._files: dict[str, _EventFile] = {}  # none unless it is open

    @contextmanager
    def opened(self, trainer: int, step: int) -> Iterator[None]:
        """While the run goes on; the first trainer writes.

        step   steps that were done before; an earlier board's points after that are not shown any more

        Raises ConfigError for a folder that cannot be written, and all else here RunDirError when it cannot be any more.
        """
        self._step = step
        if not self._folder or trainer:
            yield
            return
        self._file("train")
        try:
            yield
        except BaseException:
            with suppress(FlowpsError):  # the error that ends the run is the one to show
                self._close()
            raise
        self._close()

    def told(self, emit: Emit) -> Emit:
        """`emit`, of which the board hears every Interval."""

        def both(event: Event) -> None:
            if isinstance(event, Interval):
                self.interval(event)
            emit(event)

        return both

    def interval(self, event: Interval) -> None:
        """Add a point to the curves."""
        if not self._files:
            return
        scalars = {
            **_quality("", event.metrics), **_quality("epoch/", event.epoch_metrics), **_of_labels(event.more),
            "speed/examples_per_second": event.examples_per_s, "speed/steps_per_second": event.steps_per_s,
            "learning_rate_scale": self._rate_scale(event.step - 1),
        }  # fmt: skip
        self._file("train").write(event.step, [_scalar(tag, value) for tag, value in scalars.items()])

    def evaluated(self, event: Evaluated, metrics: StreamingMetrics) -> None:
        """Add the evaluation: its figures, and the curves of all that `metrics` has seen."""
        if not self._files:
            return
        figures = {**_quality("", event.metrics), **_of_labels(event.more)}
        values = [_scalar(tag, value) for tag, value in figures.items()]
        scores = Scores.of(metrics)
        if len(scores.probabilities):
            groups = scores.calibration()
            values += [
                _image("calibration_curve", lambda axes: _draw_calibration(axes, groups)),
                _text("calibration_curve/groups", _table(groups)),
            ]
        if event.metrics.auc is not None:  # there are both classes
            values += [
                _image("roc_curve", lambda axes: _draw_roc(axes, scores, event.metrics.auc or 0.0)),
                _tensor("pr_curve", "pr_curves", _pr_data(_THRESHOLDS), scores.precision_recall(_THRESHOLDS).astype(np.float32)),
            ]
        self._file(event.data).write(event.step, values)

    def _close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _file(self, name: str) -> _EventFile:
        found = self._files.get(name)
        if found is None:
            kind = RunDirError if self._files else ConfigError  # the first one is opened before training
            found = self._files[name] = _EventFile(self._folder, name, self._step, kind)
        return found


class _EventFile:
    """An event file in `folder`/`name`."""

    def __init__(self, folder: str, name: str, step: int, refusal: type[FlowpsError]) -> None:
        self._folder = folder
        # What TensorBoard looks for is the word tfevents; it reads them in the order of their names.
        file = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        with _refusing(folder, refusal):
            tf.io.gfile.makedirs(f"{folder}/{name}")
            self._writer = tf.io.TFRecordWriter(f"{folder}/{name}/{file}")
            start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
            self._put(tf.compat.v1.Event(wall_time=time.time(), file_version="brain.Event:2"))
            # TensorBoard forgets this step and those after it.
            self._put(tf.compat.v1.Event(wall_time=time.time(), step=step + 1, session_log=start))
            self._writer.flush()

    def write(self, step: int, values: list[Any]) -> None:
        """Add summaries of a step; on disk when this returns."""
        with _refusing(self._folder, RunDirError):
            self._put(tf.compat.v1.Event(wall_time=time.time(), step=step, summary=tf.compat.v1.Summary(value=values)))
            self._writer.flush()

    def close(self) -> None:
        """The end."""
        with _refusing(self._folder, RunDirError):
            self._writer.close()

    def _put(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


@contextmanager
def _refusing(folder: str, kind: type[FlowpsError]) -> Iterator[None]:
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        said = error.message.rpartition("; ")[2] if isinstance(error, tf.errors.OpError) else error.strerror or error
        what_to_do = "; choose another folder with --tensorboard" if kind is ConfigError else ""
        raise kind(f"tensorboard: {folder} cannot be written: {said}{what_to_do}") from None


# --- what the scores say --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Evaluated examples by their predictions, ascending: probabilities float64 [n], positives and negatives int64 [n]."""

    probabilities: Float64
    positives: NDArray[np.int64]
    negatives: NDArray[np.int64]

    @staticmethod
    def of(metrics: StreamingMetrics) -> Scores:
        """What was seen; predictions are exact to a bin of `StreamingMetrics`."""
        seen = metrics.arrays()
        logits = (seen["bins"] + 0.5) * (2 * LOGIT_RANGE / (BINS - 1)) - LOGIT_RANGE
        return Scores(1 / (1 + np.exp(-logits)), seen["positives"], seen["negatives"])

    def roc(self) -> tuple[Float64, Float64]:
        """Shares of the negatives and of the positives with the highest predictions, from none to all: float64 [n + 1] each."""
        negatives, positives = (
            np.concatenate([[0], np.cumsum(counts[::-1])]).astype(np.float64) for counts in (self.negatives, self.positives)
        )
        return negatives / negatives[-1], positives / positives[-1]

    def precision_recall(self, thresholds: int) -> Float64:
        """As TensorBoard's pr_curves have it: float64 [6, thresholds], at thresholds even from 0 to 1.

        The lines: true positives, false positives, true negatives, false negatives, precision, recall. An example is predicted
        positive when its prediction is at least the threshold.
        """
        first = np.searchsorted(self.probabilities, np.linspace(0, 1, thresholds))
        below_p, below_n = (
            np.concatenate([[0], np.cumsum(counts)]).astype(np.float64) for counts in (self.positives, self.negatives)
        )
        fn, tn = below_p[first], below_n[first]
        tp, fp = below_p[-1] - fn, below_n[-1] - tn
        return np.stack([tp, fp, tn, fn, tp / np.maximum(_LEAST_COUNT, tp + fp), tp / np.maximum(_LEAST_COUNT, tp + fn)])

    def calibration(self, groups: int = _GROUPS) -> Float64:
        """Of groups of about as many examples each, by ascending prediction: mean prediction, share of positives, examples.

        float64 [at most groups, 3]. Equal predictions stay together.
        """
        counts = self.positives + self.negatives
        group = (np.cumsum(counts) - counts) * groups // counts.sum()
        sizes, positives, predicted = (
            np.bincount(group, weights, groups) for weights in (counts, self.positives, self.probabilities * counts)
        )
        there = sizes > 0
        return np.stack([predicted[there] / sizes[there], positives[there] / sizes[there], sizes[there]], axis=1)


# --- summaries ------------------------------------------------------------------------------------------------------------


def _of_labels(more: Mapping[str, Metrics]) -> dict[str, float]:
    """Scalars of every label but the first."""
    return {tag: value for label, metrics in more.items() for tag, value in _quality(f"{label}/", metrics).items()}


def _quality(prefix: str, metrics: Metrics) -> dict[str, float]:
    """Tag → value, of those that exist. `calibration`: mean prediction over mean label."""
    found = {"logloss": metrics.logloss, "prediction_mean": metrics.prob_mean, "label_mean": metrics.real_mean}
    if metrics.auc is not None:
        found["auc"] = metrics.auc
    if metrics.real_mean:
        found["calibration"] = metrics.prob_mean / metrics.real_mean
    return {f"{prefix}{tag}": value for tag, value in found.items() if not math.isnan(value)}


def _scalar(tag: str, value: float) -> Any:
    return tf.compat.v1.Summary.Value(tag=tag, simple_value=value)


def _text(tag: str, text: str) -> Any:
    return _tensor(tag, "text", b"", np.array([text.encode()], object))


def _tensor(tag: str, plugin: str, content: bytes, value: NDArray[Any]) -> Any:
    data = tf.compat.v1.SummaryMetadata.PluginData(plugin_name=plugin, content=content)
    metadata = tf.compat.v1.SummaryMetadata(plugin_data=data, data_class="DATA_CLASS_TENSOR")
    return tf.compat.v1.Summary.Value(tag=tag, metadata=metadata, tensor=tf.make_tensor_proto(value))


def _pr_data(thresholds: int) -> bytes:
    """The message PrCurvePluginData of tensorboard/plugins/pr_curve/plugin_data.proto: num_thresholds is field 2, a varint."""
    content = bytearray([2 << 3])
    while thresholds > 0x7F:
        content.append(thresholds & 0x7F | 0x80)
        thresholds >>= 7
    return bytes([*content, thresholds])


def _image(tag: str, draw: Callable[[Axes], None]) -> Any:
    """A picture that `draw` draws on axes from 0 to 1."""
    from matplotlib.figure import Figure  # takes a second, and most runs draw nothing

    figure = Figure((5, 5), dpi=100, layout="tight")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1)
    draw(axes)
    axes.grid(color="0.9")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    image = tf.compat.v1.Summary.Image(height=500, width=500, colorspace=4, encoded_image_string=png.getvalue())
    return tf.compat.v1.Summary.Value(tag=tag, image=image)


def _draw_roc(axes: Axes, scores: Scores, auc: float) -> None:
    fpr, tpr = scores.roc()
    even = np.linspace(0, 1, _DRAWN_POINTS)
    drawn = np.unique(np.concatenate([np.searchsorted(fpr, even), np.searchsorted(tpr, even)]))
    axes.plot(fpr[drawn], tpr[drawn])
    axes.set(title=f"ROC curve, AUC {auc:.4f}", xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1))


def _draw_calibration(axes: Axes, groups: Float64) -> None:
    most = 1.05 * float(groups[:, :2].max()) or 1.0
    axes.plot(groups[:, 0], groups[:, 1], marker="o", markersize=4)
    axes.set(title="calibration", xlabel="mean prediction", ylabel="share of positives", xlim=(0, most), ylim=(0, most))


def _table(groups: Float64) -> str:
    lines = [f"| {predicted:.6f} | {observed:.6f} | {size:,.0f} |" for predicted, observed, size in groups]
    return "\n".join(["| mean prediction | share of positives | examples |", "|---:|---:|---:|", *lines])
