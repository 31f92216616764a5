"""flowps from Python: `Trainer`, one run with all that can be done with it. The commands do the same from a shell.

Everything runs where the config says: in this process by default. Called by the user's code, on one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from flowps.cluster.run import Result
from flowps.cluster.trained_run import TrainedRun, open_run
from flowps.config import Config
from flowps.errors import RunDirError
from flowps.evaluate import evaluate
from flowps.export import export
from flowps.knob import from_mapping, load
from flowps.predict import predict
from flowps.quality import Quality
from flowps.run_record import RunRecord, read_run
from flowps.serving.manifest import Dtype
from flowps.status.progress import PlainConsole
from flowps.train import train

Sources = str | Path | Sequence[str | Path]


class Trainer:
    """A run.

    Parameters
    ----------
    config : a Config, or nested mappings like a run's TOML file: `{"data": {"train": "clicks/*.parquet"}, "epochs": 2}`.
    model : a function from a ModelSpec to a keras.Model, or a Keras model whose `Embedding` layers are to give way to slots; None:
        the one that config.model names. Evaluation and prediction in another process need one that can be imported, or layers that
        are registered with Keras.
    console : told what happens; stdout by default.

    Examples
    --------
    >>> trainer = Trainer({"data": {"train": "ml1m/train.parquet"}, "run_dir": "runs/ml1m"})  # doctest: +SKIP
    >>> trainer.fit().ledger.trained  # doctest: +SKIP
    591296
    >>> trainer.evaluate("ml1m/test.parquet", group="user_id").auc  # doctest: +SKIP
    0.868
    """

    def __init__(
        self, config: Config | Mapping[str, Any], *, model: Callable[[Any], Any] | None = None, console: Console | None = None
    ) -> None:
        self.config = config if isinstance(config, Config) else from_mapping(config)
        self._model, self._console = model, console or PlainConsole()
        self._run_dir = Path(self.config.run_dir) if self.config.run_dir else None

    @classmethod
    def load(cls, run_dir: str | Path, console: Console | None = None) -> Trainer:
        """The run in a directory, to evaluate, predict or export it. Raises RunDirError where there is none."""
        path = read_run(Path(run_dir)).path
        return cls(msgspec.structs.replace(load(path / "config.toml"), run_dir=str(path)), console=console)

    @property
    def run_dir(self) -> Path:
        """Where the run has left its files. Raises RunDirError before there are any."""
        if self._run_dir is None or not self._run_dir.exists():
            raise RunDirError("the run has no directory yet: call fit() first")
        return self._run_dir

    @property
    def record(self) -> RunRecord:
        """What the run directory says: metrics of every interval, times of every stage, the end. Raises RunDirError."""
        return read_run(self.run_dir)

    def fit(self, resume: bool = False) -> Result:
        """Train. `resume`: go on from the newest checkpoint. Raises FlowpsError for everything that a user can mend."""
        config = msgspec.structs.replace(self.config, resume=resume or self.config.resume)
        if resume and not config.run_dir and self._run_dir is not None:
            config = msgspec.structs.replace(config, run_dir=str(self._run_dir))
        result = train(config, self._console, model=self._model)
        self._run_dir = Path(result.run_dir)
        return result

    def evaluate(
        self, data: Sources, *, group: str = "", slices: Sequence[str] = (), buckets: int = 10, checkpoint: str = ""
    ) -> Quality | dict[str, Quality]:  # fmt: skip
        """The quality of the predictions on `data`, Parquet files with labels; of several labels by label. See flowps.evaluate."""
        found = evaluate(
            self._trained(checkpoint), _listed(data), group=group, slices=slices, buckets=buckets, console=self._console
        )
        return next(iter(found.values())) if len(found) == 1 else found

    def predict(
        self, data: Sources, out: str | Path, *, columns: Sequence[str] = (), overwrite: bool = False, checkpoint: str = ""
    ) -> int:  # fmt: skip
        """Write predictions for `data` to the folder `out`; how many samples were scored. See flowps.predict."""
        run = self._trained(checkpoint)
        return predict(run, _listed(data), str(out), columns=columns, overwrite=overwrite, console=self._console)

    def export(self, out: str | Path, dtype: Dtype = "float32") -> Path:
        """Make a bundle for serving in `out`; the folder of its new version. See flowps.export."""
        return export(self.run_dir, Path(out), dtype).folder

    def _trained(self, checkpoint: str) -> TrainedRun:
        return open_run(self.run_dir, (), checkpoint, lambda text: self._console.print(text, soft_wrap=True))


def _listed(data: Sources) -> list[str]:
    return [str(data)] if isinstance(data, str | Path) else [str(source) for source in data]
