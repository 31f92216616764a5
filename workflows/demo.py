"""Three weeks of retraining in a few minutes: `python -m workflows.demo ML100K_FOLDER [--to FOLDER]`.

Cuts MovieLens 100k into days by its timestamps: all up to 4 November 1997 is the first slot, then come 21 days, one after the
other, each followed by `python -m workflows.retrain`, as a scheduler would call it. One day has its labels shuffled: the gate is to
reject the model of that day. In the end the live model is rolled back.

Beside that, two others predict the same days, before any of them has seen them: the first model, never retrained, and one trained
from scratch every day, on all days before. AUC over days is printed, and drawn in FOLDER/demo.html.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from flowps import knob
from flowps.arguments import run_command
from flowps.cluster.trained_run import open_run
from flowps.errors import DataError
from flowps.evaluate import evaluate
from flowps.status.progress import PlainConsole
from flowps.train import train
from workflows import registry as registry_command
from workflows.pipeline import read_pipeline
from workflows.report import curve
from workflows.retrain import Wanted, retrain
from workflows.store import Registry

FIRST, DAYS, BAD = date(1997, 11, 5), 21, 8  # the bad day is the ninth
FIXED_SHARE = 0.1
WAYS = ("retrained every day", "from scratch every day", "never retrained")

RUN = """\
model = "dnn"
epochs = 1
[data]
exclude = ["timestamp"]
batch_size = 128
[slot_default]
dim = 8
pooling = "mean"
learning_rate = 0.02
[net]
hidden = [64, 32]
[trainer]
in_flight = 1              # the same figures every time
[cluster]
dashboard = ""
"""

PIPELINE = """\
config = "run.toml"
state = "state"

[partitions]
root = "days"
slots = "date=%Y-%m-%d"

[validate]
most_rows = 10.0           # days are uneven here, and small: labels vary much
label_rate = 1.0
new_signs = 1.0

[gate]
fixed = ["fixed.parquet"]
auc_drop = 0.005
ne_rise = 0.03
calibration = 0.3

[publish]
registry = "registry"
keep = 30
"""


def prepare(data: Path, to: Path) -> list[Path]:
    """Write the fixed set and the pipeline to `to`, and the first slot and each day to files that are no slots yet: these."""
    sources = [data / f"{name}.parquet" for name in ("train", "valid", "test")]
    missing = [str(path) for path in sources if not path.exists()]
    if missing:
        raise DataError(f"{', '.join(missing)}: no such file; give the folder of MovieLens 100k as train, valid and test.parquet")
    table = pa.concat_tables([pq.read_table(path) for path in sources])
    day = table["timestamp"].to_numpy() // 86_400 - (FIRST - date(1970, 1, 1)).days
    random = np.random.default_rng(0)
    fixed = (random.random(len(table)) < FIXED_SHARE) & (day < DAYS)
    shutil.rmtree(to, ignore_errors=True)
    (to / "later").mkdir(parents=True)
    pq.write_table(table.filter(pa.array(fixed)), to / "fixed.parquet")
    (to / "run.toml").write_text(RUN, encoding="utf-8")
    (to / "pipeline.toml").write_text(PIPELINE, encoding="utf-8")
    _put(table, (day < 0) & ~fixed, to / "first.parquet")
    paths = [to / "later" / f"{FIRST + timedelta(days=k)}.parquet" for k in range(DAYS)]
    for k, path in enumerate(paths):
        _put(table, (day == k) & ~fixed, path, random if k == BAD else None)
    return [to / "first.parquet", *paths]


def _put(table: pa.Table, rows: NDArray[np.bool_], path: Path, shuffles: np.random.Generator | None = None) -> None:
    """Write some rows; with labels that are those of others, if something shuffles them."""
    found = table.filter(pa.array(rows))
    if shuffles is not None:
        at = found.schema.get_field_index("label")
        found = found.set_column(at, "label", pa.array(shuffles.permutation(found["label"].to_numpy())))
    pq.write_table(found, path)


def arrive(path: Path, to: Path, day: date) -> None:
    """Let a slot be there, whole."""
    folder = to / "days" / f"date={day}"
    folder.mkdir(parents=True)
    shutil.copy(path, folder / "part-0.parquet")
    (folder / "_SUCCESS").touch()


def auc_of(run: Path, data: Path) -> float | None:
    """Of a run's last checkpoint."""
    found = evaluate(open_run(run, (), "", lambda text: None), [str(data)], console=PlainConsole(file=io.StringIO()))
    return found["label"].auc


def from_scratch(to: Path, seen: Sequence[Path], data: Path) -> float | None:
    """Train on some files, and predict another."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = str(Path(folder) / "run")
        files = [str(path) for path in seen]
        train(knob.load(to / "run.toml", [("data.train", files), ("run_dir", [run_dir])]), PlainConsole(file=io.StringIO()))
        return auc_of(Path(run_dir), data)


def replay(data: Path, to: Path, console: Console) -> dict[str, list[float | None]]:
    """The three weeks: AUC of each day, before it was trained, of each of the three ways."""
    files = prepare(data, to)
    read = read_pipeline(to / "pipeline.toml")
    arrive(files[0], to, FIRST - timedelta(days=1))
    retrain(read, Wanted(), console)
    registry = Registry(read.registry)
    first = Path(registry.record(1).run)
    kept = to / "first-run"  # pruning would take it
    shutil.copytree(first, kept)
    series: dict[str, list[float | None]] = {name: [] for name in WAYS}
    for k, path in enumerate(files[1:]):
        live = Path(registry.record(registry.live()).run)
        good = [
            of for n, of in enumerate(files[: k + 1]) if n != BAD + 1
        ]  # whoever trains from scratch has found the bad day by now
        for name, auc in zip(WAYS, (auc_of(live, path), from_scratch(to, good, path), auc_of(kept, path)), strict=True):
            series[name].append(auc)
        arrive(path, to, FIRST + timedelta(days=k))
        retrain(read, Wanted(), console)
    return series


def means(series: dict[str, list[float | None]]) -> dict[str, float]:
    """Of each way, over all days but the shuffled one."""
    return {name: float(np.mean([of for k, of in enumerate(aucs) if of is not None and k != BAD])) for name, aucs in series.items()}


def show(series: dict[str, list[float | None]], to: Path, console: Console) -> None:
    """Print the table and draw the page."""
    days = [str(FIRST + timedelta(days=k)) for k in range(DAYS)]
    table = Table("day", *WAYS, title="AUC of a day before it is trained", title_justify="left")
    for k, day in enumerate(days):
        cells = [series[name][k] for name in WAYS]
        table.add_row(f"{day}{' (labels shuffled)' if k == BAD else ''}", *("–" if of is None else f"{of:.4f}" for of in cells))
    table.add_row("mean, without the shuffled day", *(f"{mean:.4f}" for mean in means(series).values()))
    console.print(table)
    keys = " · ".join(f'<span class="key{k}">● {name}</span>' for k, name in enumerate(WAYS))
    page = _PAGE.format(curve=curve([day[5:] for day in days], series), keys=keys)
    (to / "demo.html").write_text(page, encoding="utf-8")
    console.print(f"drawn in {to / 'demo.html'}", soft_wrap=True)


_PAGE = """<!doctype html><meta charset="utf-8"><title>three weeks of retraining</title>
<style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:900px;margin:2rem auto}} svg text{{font-size:11px;fill:#667}}
.grid{{stroke:#d8dce2}} polyline{{fill:none;stroke-width:2}}
.line0 polyline{{stroke:#0a6dc2}} .line0 circle{{fill:#0a6dc2}} .key0{{color:#0a6dc2}}
.line1 polyline{{stroke:#2a8a3e;stroke-dasharray:5 4}} .line1 circle{{fill:#2a8a3e}} .key1{{color:#2a8a3e}}
.line2 polyline{{stroke:#c2570a;stroke-dasharray:2 3}} .line2 circle{{fill:#c2570a}} .key2{{color:#c2570a}}
</style>
<h1>AUC of a day, before it is trained</h1>{curve}<p>{keys}</p>
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m workflows.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="ML100K_FOLDER", help="has train.parquet, valid.parquet and test.parquet")
    parser.add_argument("--to", type=Path, default=Path("runs/retrain-demo"), metavar="FOLDER", help="is written anew")
    options = parser.parse_args(argv)

    def work() -> None:
        console, start = PlainConsole(), time.monotonic()
        show(replay(options.data, options.to, console), options.to, console)
        registry_command.main(["rollback", str(options.to / "registry")])
        registry_command.main(["list", str(options.to / "registry")])
        console.print(f"took {time.monotonic() - start:.0f} s")

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
