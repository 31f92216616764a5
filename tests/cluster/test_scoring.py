"""Scoring on several processes: who scores what, and what becomes of a loss.

`long_scoring_alike` has figures and predictions, `long_scoring` workers that are killed and commands that are stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flowps import evaluate
from flowps.cluster import scoring
from flowps.cluster.prediction_folder import PredictionFolder
from flowps.cluster.scoring import Scoring, run_scoring
from flowps.cluster.tally_sink import Wanted
from flowps.errors import DataError, FlowpsError, LostRoleError, StoppedError
from flowps.hub.partition import Partition, SampleFile
from flowps.knob import from_mapping
from tests.scored import main_words, train_run

# --- who scores what --------------------------------------------------------------------------------------------------


def sample_file(name: str, *row_groups: int) -> SampleFile:
    return SampleFile(f"/data/{name}", {}, {"user": pa.int64()}, row_groups)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_files_are_given_out_whole_and_evenly(count: int) -> None:
    files = [sample_file(f"{k}.parquet", *[10] * k) for k in range(6)]
    shares = PredictionFolder("/out", "step-1", ("label",), (), 20).shares(count, files)
    assert len(shares) == count
    urls = [[part.url for part in share.partitions] for share in shares]
    given = [sorted(set(of)) for of in urls]
    assert sorted(chain(*given)) == [f"/data/{k}.parquet" for k in range(1, 6)], "one without samples has no partition"
    for share in shares:
        order = [(part.url, part.first_row) for part in share.partitions]
        assert all(a[0] != b[0] or a[1] < b[1] for a, b in pairwise(order)), "in the order of the file"
        assert order == sorted(order, key=lambda at: [url for url, _ in order].index(at[0])), "one file after the other"
    rows = [sum(part.num_rows for part in share.partitions) for share in shares]
    assert sum(rows) == 150
    assert max(rows) <= max(50, 150 / count + 30)


def test_of_every_label_its_own_samples_are_added_up() -> None:
    wanted = Wanted(("click", "buy"), ("city",), "user")
    assert wanted.columns == ("city", "user")
    assert Wanted(("click",), ("user",), "user").columns == ("user",)
    columns = pa.table({"user": [1, 1, 2], "city": ["a", "b", "a"]})
    labels = np.array([[0, 1], [1, 1], [1, 0]], np.float32)
    logits = np.array([[-1, 2], [3, -1], [2, -2]], np.float32)
    with wanted.sink() as sink:
        sink.take(Partition("/x", (0,), 0, 3), columns, labels, logits)
        found = {label: tally.result() for label, tally in sink.result().items()}
    assert {label: (of.samples, of.positives, of.auc) for label, of in found.items()} == {"click": (3, 2, 1.0), "buy": (3, 2, 1.0)}
    for k, label in enumerate(found):
        assert found[label].mean_prediction == pytest.approx((1 / (1 + np.exp(-logits[:, k]))).mean(), rel=1e-6)
        assert [row.samples for row in found[label].slices[0].rows] == [2, 1]
    with wanted.sink() as sink, pytest.raises(DataError, match=r"^/x: slice column 'city' is double"):
        sink.take(Partition("/x", (0,), 0, 3), columns.set_column(1, "city", pa.array([0.5, 1, 2])), labels, logits)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Any], list[str], list[int]]]:
    """Score with attempts that end so, one after the other; what came of it, what was said, and the plan of each."""

    def run(*ends: Any, mode: str = "processes", interrupted: bool = False) -> tuple[list[Any], list[str], list[int]]:
        left, said, plans, made = list(ends), list[str](), list[int](), iter(range(100))

        def attempt(client: Any, planned: Any, *rest: Any) -> list[Any]:
            plans.append(planned.number)
            end = left.pop(0)
            if isinstance(end, Exception):
                raise end
            return [end]

        monkeypatch.setattr(scoring, "_attempt", attempt)
        config = from_mapping({"cluster": {"mode": mode}})
        described: Any = SimpleNamespace(plan=lambda: SimpleNamespace(config=config, number=next(made)))
        task: Scoring = described
        try:
            return run_scoring(None, task, said.append, lambda: interrupted), said, plans
        except FlowpsError as error:
            return [error], said, plans

    return run


def test_after_a_loss_it_is_planned_and_begun_again(attempts: Callable[..., tuple[list[Any], list[str], list[int]]]) -> None:
    lost, said = LostRoleError("worker a was lost"), "worker a was lost; what was not finished is scored again"
    assert attempts(lost, lost, "done") == (["done"], [said] * 2, [0, 1, 2])
    assert attempts(lost, lost, lost, lost, "never") == ([lost], [said] * 3, [0, 1, 2, 3])


def test_what_another_attempt_would_not_mend_is_raised(attempts: Callable[..., tuple[list[Any], list[str], list[int]]]) -> None:
    lost, bad, stopped = LostRoleError("lost"), DataError("bad"), StoppedError("stopped")
    assert attempts(lost, "never", mode="embedded") == ([lost], [], [0])
    assert attempts(lost, "never", interrupted=True) == ([lost], [], [0])
    assert attempts(bad, "never") == ([bad], [], [0])
    assert attempts(stopped, "never") == ([stopped], [], [0])


def leaves(spec: Any) -> Any:
    """A model that would end the process."""
    import sys

    if getattr(sys, "leaves", False):
        sys.exit(3)
    inputs = spec.inputs()
    import keras

    return keras.Model(inputs, keras.layers.Dense(1)(spec.concatenated(inputs)))


def test_a_model_that_ends_the_process_ends_the_command_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_run(tmp_path, model=f"{__name__}:leaves")
    monkeypatch.setattr("sys.leaves", True, raising=False)
    capsys.readouterr()
    assert evaluate.main(main_words(run, tmp_path / "test.parquet")) == 1
    assert "leaves raised SystemExit: 3" in capsys.readouterr().err
