"""`python -m bench.quality ML1M_FOLDER`: the built-in models beside the same models in plain Keras, on MovieLens-style data.

ML1M_FOLDER has `train.parquet` and `test.parquet`. Each model is trained from several seeds in three ways: in plain Keras with all
rows in memory (`bench.plain_keras`), by flowps with one batch in flight, and with eight. All have the same samples, epochs, batch
size, learning rates, optimizers, initial distributions and layers; what is compared is the test AUC.

The settings hold for all three. They are near the best of plain Keras, and such that eight batches in flight do no harm:

- Lists are averaged. Their sum is dozens of vectors, which makes the model worse in plain Keras too, and moves so far in eight
  steps that gradients of embeddings that are seven pushes old lead astray.
- The rates rise over the first 100 steps. Adagrad's first steps are its largest, and eight of them from the same rows go eight
  times as far.
- 512 samples a batch: more is worse in plain Keras, and more samples are in flight.
- Three epochs: by then all have learned what there is; after one, what staleness costs is time.

Plain Keras shuffles all samples in every epoch, flowps the partitions and the samples in each. The file at hand is sorted by user
and has row groups of 65,536, of which a partition is at least one. So the samples are written anew first: in a random order, in row
groups of 4096. What the order of a file matters is measured too (`--orders`): of one model with one batch in flight, for the file
as it is and for random orders in large and in small row groups.

What is in the file of the results, with the same settings, is not trained again: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from bench import machine
from flowps.config import Config
from flowps.knob import load
from flowps.status.progress import PlainConsole
from flowps.train import train

Knobs = Mapping[str, Sequence[str]]

RESULTS = Path(__file__).resolve().parent / "results" / "quality.json"
_ROW_GROUP = 4096
WITHIN = 0.002  # of plain Keras's AUC
WAYS = ("plain", "sync", "async")
MODELS = ("lr", "fm", "dnn", "wide_deep", "deepfm", "dcn", "xdeepfm", "autoint", "dlrm", "din")
SETTINGS: Knobs = {
    "epochs": ["3"],
    "data.batch_size": ["512"],
    "data.partition_rows": [str(_ROW_GROUP)],
    "net.hidden": ["128", "64"],
    "slot_default.dim": ["16"],
    "slot_default.pooling": ["mean"],
    "slot_default.optimizer": ["adagrad"],
    "slot_default.learning_rate": ["0.05"],
    "trainer.optimizer": ["adam"],
    "trainer.learning_rate": ["0.001"],
    "trainer.warmup_steps": ["100"],
}
_OF_MODEL: Mapping[str, Knobs] = {
    "lr": {"slot_default.dim": ["1"]},
    "din": {"net.target": ["movie_id"], "slot.hist_like.pooling": ["none"], "slot.hist_like.max_len": ["20"]},
}
_OF_WAY: Mapping[str, Knobs] = {
    "sync": {"trainer.in_flight": ["1"]},
    "async": {"trainer.in_flight": ["8"], "trainer.feed_threads": ["2"]},
}
_QUIET: Knobs = {"cluster.dashboard": [""], "checkpoint.every_s": ["0"], "status.progress": ["plain"]}
_QUICK_ROWS = 50_000
_ORDER_MODEL, _ORDER_WAY = "dnn", "sync"
ORDERS: Mapping[str, int] = {"as the file is, sorted by user": 0, "random": 1 << 16, "random, small row groups": _ROW_GROUP}
"""In words → samples of a row group; 0: the file at hand."""


def main() -> int:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="ML1M_FOLDER", help="folder of the data")
    parser.add_argument("--models", type=_names(MODELS), default=MODELS, help="names, with commas between (default: all)")
    parser.add_argument("--ways", type=_names(WAYS), default=WAYS, help="plain, sync, async, likewise")
    parser.add_argument("--seeds", type=int, default=3, help="seeds, from 1 (default: 3)")
    parser.add_argument("--orders", action="store_true", help="train the orders of samples instead of the models")
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK_ROWS:,} samples and one seed; the results are not kept")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of the results (default: that of the documentation)")
    options = parser.parse_args()
    to, seeds = (None, 1) if options.quick else (options.json, options.seeds)
    with tempfile.TemporaryDirectory() as folder:
        files = prepare(options.data, Path(folder), _QUICK_ROWS if options.quick else None)
        if options.orders:
            result = measure_orders(options.data, Path(folder), range(1, seeds + 1), to)
        else:
            result = measure(files, options.models, options.ways, range(1, seeds + 1), to)
    print(orders(result) if options.orders else markdown(result))
    return 0


def prepare(data: Path, to: Path, rows: int | None = None, row_group: int = _ROW_GROUP) -> Knobs:
    """Write the samples for training in a random order, or `rows` of them; the knobs that name the files.

    row_group   samples of a row group; 0: the samples stay where they are, as they are
    """
    test = {"data.test": [str(data.absolute() / "test.parquet")]}
    if not row_group:
        return {"data.train": [str(data.absolute() / "train.parquet")], **test}
    table = pq.read_table(data / "train.parquet")
    table = table.take(np.random.default_rng(0).permutation(len(table))[:rows])
    pq.write_table(table, to / "train.parquet", row_group_size=row_group)
    return {"data.train": [str(to / "train.parquet")], **test}


def _begun(to: Path | None) -> dict[str, Any]:
    """What `to` has."""
    result: dict[str, Any] = json.loads(to.read_text(encoding="utf-8")) if to and to.exists() else {"models": {}}
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of the processes that train
    return result | {"within": WITHIN, "settings": SETTINGS, "machine": machine.describe()}


def measure_orders(data: Path, folder: Path, seeds: Sequence[int], to: Path | None) -> dict[str, Any]:
    """Train from `data` in every order that `to` does not have; all that it has then. `folder` is for files in between."""
    result = _begun(to)
    knobs = {**SETTINGS, "model": [_ORDER_MODEL]}
    if result.get("orders", {}).get("knobs") != knobs:
        result["orders"] = {"knobs": knobs, "model": _ORDER_MODEL, "of": {}}
    for order, row_group in ORDERS.items():
        of_seeds = result["orders"]["of"].setdefault(
            order, {"row_group": row_group or pq.ParquetFile(data / "train.parquet").metadata.row_group(0).num_rows, "test_auc": {}}
        )["test_auc"]
        files = prepare(data, folder, None, row_group)
        partition_rows = {"data.partition_rows": [str(row_group)]} if row_group else {}
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            for seed in (of for of in seeds if str(of) not in of_seeds):
                chosen = {**_QUIET, **knobs, **files, **partition_rows, "seed": [str(seed)]}
                of_seeds[str(seed)] = process.submit(test_auc, _ORDER_WAY, chosen).result()
                print(f"{order}, seed {seed}: {of_seeds[str(seed)]:.4f}", file=sys.stderr, flush=True)
                if to:
                    _write(to, result)
    return result


def measure(files: Knobs, models: Sequence[str], ways: Sequence[str], seeds: Sequence[int], to: Path | None) -> dict[str, Any]:
    """Train what `to` does not have; all that it has then."""
    result = _begun(to)
    for model in models:
        knobs = {**SETTINGS, **_OF_MODEL.get(model, {})}
        if result["models"].get(model, {}).get("knobs") != knobs:
            result["models"][model] = {"knobs": knobs, "ways": {}}
        of_ways = result["models"][model]["ways"]
        for way in ways:
            of_seeds = of_ways.setdefault(way, {"test_auc": {}})["test_auc"]
            # A process of its own: with one batch in flight flowps makes TensorFlow deterministic, for good.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                for seed in seeds:
                    if str(seed) in of_seeds:
                        continue
                    auc = process.submit(
                        test_auc, way, {**_QUIET, **files, **knobs, "model": [model], "seed": [str(seed)]}
                    ).result()
                    of_seeds[str(seed)] = auc
                    print(f"{model}, {way}, seed {seed}: {auc:.4f}", file=sys.stderr, flush=True)
                    _sum_up(of_ways)
                    if to:
                        _write(to, result)
    return result


def _write(to: Path, result: Mapping[str, Any]) -> None:
    """Whole or not at all: it holds hours of work."""
    beside = to.with_suffix(".new")
    beside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    beside.replace(to)


def test_auc(way: str, knobs: Knobs) -> float:
    """Train once."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = {**knobs, **_OF_WAY.get(way, {}), "run_dir": [f"{folder}/run"]}
        config = load(None, [(path, list(values)) for path, values in chosen.items()])
        return _plain(config) if way == "plain" else _flowps(config)


def _plain(config: Config) -> float:
    from bench import plain_keras  # TensorFlow, which only the processes that train need

    return plain_keras.test_auc(config)


def _flowps(config: Config) -> float:
    said = io.StringIO()
    test = train(config, PlainConsole(file=said)).test
    if test is None or test.auc is None:
        raise SystemExit(f"the training gave no test AUC:\n{said.getvalue()}")
    return test.auc


def _sum_up(of_ways: dict[str, dict[str, Any]]) -> None:
    """Mean, least and most of each way, and by how much its mean is above plain Keras's, over the seeds that both have."""
    plain = of_ways.get("plain", {"test_auc": {}})["test_auc"]
    for found in of_ways.values():
        aucs = found["test_auc"]
        if not aucs:
            continue
        both = [seed for seed in aucs if seed in plain]
        found["mean"], found["least"], found["most"] = statistics.mean(aucs.values()), min(aucs.values()), max(aucs.values())
        found["above_plain"] = statistics.mean(aucs[seed] - plain[seed] for seed in both) if both else None


def markdown(result: Mapping[str, Any]) -> str:
    """What `measure` has found, as a Markdown table."""
    lines = [
        "| model | plain Keras | flowps, in flight 1 | above plain Keras | flowps, in flight 8 | above plain Keras |",
        "|---|---|---|---|---|---|",
    ]
    for model, found in result["models"].items():
        ways = [found["ways"].get(way, {}) for way in WAYS]
        cells = [_range(ways[0])]
        for of in ways[1:]:
            cells += [_range(of), f"{of['above_plain']:+.4f}" if of.get("above_plain") is not None else "–"]
        lines.append(f"| `{model}` | {' | '.join(cells)} |")
    knobs = {path: " ".join(values) for path, values in result["settings"].items()}
    rows = f"{knobs['slot_default.optimizer']} {knobs['slot_default.learning_rate']}"
    dense = f"{knobs['trainer.optimizer']} {knobs['trainer.learning_rate']}"
    lines += [
        "",
        f"Test AUC, means over {_most_seeds(result)} seeds (least–most). For all: {knobs['epochs']} epochs, batches of "
        f"{knobs['data.batch_size']}, dim {knobs['slot_default.dim']} (`lr`: 1), pooling {knobs['slot_default.pooling']}, hidden "
        f"layers of {knobs['net.hidden']}; rows by {rows}, dense weights by {dense}, rates rising over "
        f"{knobs['trainer.warmup_steps']} steps; samples in a random "
        f"order, in row groups of {_ROW_GROUP:,}. "
        f"Target: not more than {result['within']} below plain Keras.",
    ]
    return "\n".join(lines)


def _most_seeds(result: Mapping[str, Any]) -> int:
    return max((len(way["test_auc"]) for found in result["models"].values() for way in found["ways"].values()), default=0)


def orders(result: Mapping[str, Any]) -> str:
    """What `measure_orders` has found, as a Markdown table, beside plain Keras, which shuffles all samples."""
    found = result["orders"]
    plain = result["models"].get(found["model"], {}).get("ways", {}).get("plain", {})
    lines = ["| order of the samples in the file | samples of a row group | test AUC |", "|---|---|---|"]
    for order, of in found["of"].items():
        aucs = list(of["test_auc"].values())
        mean = _range({"mean": statistics.mean(aucs), "least": min(aucs), "most": max(aucs)})
        lines.append(f"| {order} | {of['row_group']:,} | {mean} |")
    lines.append(f"| any, in plain Keras | – | {_range(plain)} |")
    return "\n".join([*lines, "", f"`{found['model']}`, one batch in flight; seeds and settings as for the models."])


def _range(found: Mapping[str, Any]) -> str:
    return f"{found['mean']:.4f} ({found['least']:.4f}–{found['most']:.4f})" if "mean" in found else "–"


def _names(known: Sequence[str]) -> Any:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := set(found) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
        return found

    return names


if __name__ == "__main__":
    sys.exit(main())
