"""`python -m bench.serving [--json FILE]`: what becomes of a trained model: evaluated, predicted, exported, scored, looked up.

`criteo` is trained for an epoch; then the commands `flowps.evaluate` and `flowps.predict` on its test data, medians of three; for
each type of rows a bundle: its size, the error of its rows, samples/s of `Scorer.score` (by turns), the largest difference of a
score, test AUC; and milliseconds of a lookup over loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bench import machine
from bench.end_to_end import TRAINED, command_of, training
from flowps import serving
from flowps.serving.client import EmbeddingClient
from flowps.serving.manifest import Dtype

WORKLOAD = "criteo"
_TURNS = 5
_SIGNS = (1, 100, 1000)  # of every slot


def measure() -> dict[str, Any]:
    """All of it."""
    command = command_of(WORKLOAD, TRAINED[WORKLOAD].net, None, [])
    test = command[command.index("--data.test") + 1 : command.index("--data.batch_size")]
    with training(command, {}) as (run_dir, _), tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        rows = sum(pq.read_metadata(file).num_rows for file in test)
        result: dict[str, Any] = {"workload": WORKLOAD, "test_rows": rows, "rounds": _TURNS}
        for name, more in (("evaluate", []), ("predict", [str(out / "predictions"), "--overwrite"])):
            seconds = [_seconds(name, run_dir, test, more) for _ in range(3)]
            result[name] = {"seconds": statistics.median(seconds), "runs": seconds}
        dtypes = get_args(Dtype)
        for dtype in dtypes:
            _command("flowps.export", str(run_dir), str(out / dtype), "--dtype", dtype)
        result["bundles"] = _bundles({dtype: out / dtype for dtype in dtypes}, test)
        with _served(out / "float32") as address, EmbeddingClient(address) as client:
            result["lookup"] = [_lookup(client, out / "float32", signs) for signs in _SIGNS]
    return {**result, "machine": machine.describe()}


def _bundles(folders: dict[str, Path], test: list[str]) -> list[dict[str, Any]]:
    """Size, error and scores of each bundle; speeds by turns."""
    table = pq.read_table(test)
    labels = table.column("label").to_numpy().astype(np.float64)
    scorers = {dtype: serving.load(folder) for dtype, folder in folders.items()}
    scores = {dtype: scorer.score(table) for dtype, scorer in scorers.items()}  # warm
    seconds: dict[str, list[float]] = {dtype: [] for dtype in scorers}
    for _ in range(_TURNS):
        for dtype, scorer in scorers.items():
            seconds[dtype].append(_timed(lambda scorer=scorer: scorer.score(table)))  # type: ignore[misc]
    found = []
    for dtype, scorer in scorers.items():
        slots = scorer.manifest.slots
        found.append(
            {
                "dtype": dtype,
                "bytes": sum(file.size_bytes for file in scorer.manifest.files),
                "rows": sum(slot.rows for slot in slots),
                "rms_error": [min(slot.relative_error for slot in slots), max(slot.relative_error for slot in slots)],
                "samples_per_s": len(labels) / statistics.median(seconds[dtype]),
                "max_difference": float(np.abs(scores[dtype] - scores["float32"]).max()),
                "auc": _auc(labels, scores[dtype].astype(np.float64)),
            }
        )
    return found


def _lookup(client: EmbeddingClient, bundle: Path, signs: int) -> dict[str, Any]:
    """Milliseconds of a lookup of so many known signs of every slot."""
    version = bundle / (bundle / "current").read_text(encoding="utf-8").strip()
    random = np.random.default_rng(0)
    files = sorted((version / "embeddings").glob("*.parquet"))
    asked = {}
    for file in files:
        table = pq.read_table(file, columns=["slot", "sign"])
        known = table.column("sign").to_numpy()
        asked[str(table.column("slot")[0])] = known[random.integers(0, len(known), signs)]
    times = []
    for turn in range(20 + 200):
        seconds = _timed(lambda: client.lookup(asked))
        if turn >= 20:
            times.append(seconds * 1e3)
    return {"signs": signs * len(asked), "p50_ms": float(np.percentile(times, 50)), "p99_ms": float(np.percentile(times, 99))}


def _seconds(name: str, run_dir: Path, test: list[str], more: list[str]) -> float:
    """Wall time of a command."""
    options = [word for word in more if word.startswith("--")]
    places = [word for word in more if not word.startswith("--")]
    if places:
        subprocess.run(["rm", "-rf", *places], check=True)
    return _timed(lambda: _command(f"flowps.{name}", str(run_dir), *test, *places, *options, "--cluster.dashboard", ""))


def _command(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def _served(bundle: Path) -> Iterator[str]:
    """The address of a server of the bundle."""
    server = subprocess.Popen(
        [sys.executable, "-m", "flowps.serve", str(bundle), "--port", "0"], stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert server.stdout is not None
    try:
        for line in server.stdout:
            words = line.split()
            if address := next((word.rstrip(",;.") for word in words if word.startswith("127.0.0.1:")), None):
                break
        else:
            raise SystemExit("the server said no address")
        yield address
    finally:
        server.terminate()
        server.wait()


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _auc(labels: NDArray[np.float64], scores: NDArray[np.float64]) -> float:
    from flowps.synthetic.truth import rank_auc

    return float(rank_auc(scores, labels))


def markdown(result: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    bundles = [
        "| `--dtype` | bundle | relative RMS error of the rows | largest difference of a score | test AUC | samples/s scored |",
        "|---|---|---|---|---|---|",
    ]
    for of in result["bundles"]:
        low, high = of["rms_error"]
        error = "0" if high == 0 else f"{low:.2%}" if f"{low:.2%}" == f"{high:.2%}" else f"{low:.2%}–{high:.2%}"
        bundles.append(
            f"| `{of['dtype']}` | {of['bytes'] / 1e6:.1f} MB | {error} | {of['max_difference']:.4f} | {of['auc']:.4f} "
            f"| {of['samples_per_s']:,.0f} |"
        )
    lookups = ["| signs in a lookup | P50 | P99 |", "|---|---|---|"]
    lookups += [f"| {of['signs']:,} | {of['p50_ms']:.1f} ms | {of['p99_ms']:.1f} ms |" for of in result["lookup"]]
    commands = ", ".join(f"`{name}` {result[name]['seconds']:.1f} s" for name in ("evaluate", "predict"))
    text = (
        f"{result['bundles'][0]['rows']:,} rows of 26 slots, dim 16, one epoch over a million samples; the test data are "
        f"{result['test_rows']:,} samples. Whole commands on them, start and TensorFlow's import included: {commands}."
    )
    return "\n".join([text, "", *bundles, "", *lookups])


def main() -> None:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    arguments = parser.parse_args()
    result = measure()
    print(markdown(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
