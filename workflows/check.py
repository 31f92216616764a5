"""A slot's samples as a few numbers, and how far these may be from the last accepted ones.

Labels are counted in all samples; nulls and values that the live model does not know in a sample of them, partitions from all over
the slot. Reads on the calling thread, creates no rows, needs no cluster.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flowps.batch import Uint64
from flowps.cluster.trained_run import TrainedRun
from flowps.config import Data
from flowps.hub.decode import Columns, Dense, decode
from flowps.hub.partition import Partition, SampleFile, partitions, read_table
from flowps.hub.schema import Schema, matches
from flowps.serving.manifest import EMBEDDINGS
from flowps.serving.pack import files_of
from workflows.pipeline import Validate


class Profile(msgspec.Struct, frozen=True):
    """What a slot's samples are like.

    label_rate   share of positive labels; of several labels the first
    nulls        column → share of samples where it is null
    new_signs    slot of the model → share of distinct values that have no row in the live model; empty: there is none
    """

    rows: int
    label_rate: float
    nulls: dict[str, float]
    new_signs: dict[str, float]


def profile(files: Sequence[SampleFile], data: Data, run: TrainedRun | None, sample_rows: int) -> Profile:
    """Of the samples of some files, read as `data` says.

    run   of the live model; None: there is none

    Raises DataError and SchemaError where they cannot be trained.
    """
    parts = partitions(files, 1 << 16)
    rows = sum(part.num_rows for part in parts)
    positives = sum(pc.sum(pc.greater(read_table(part, [data.label])[data.label], 0)).as_py() or 0 for part in parts)
    sample = _spread(parts, sample_rows)
    schema = None if run is None else run.schema_for(files, labelled=True)
    columns = [*schema.features, *schema.labels] if schema is not None else files[0].columns
    names = sorted(name for name in {*columns} if not matches(name, data.exclude))
    nulls, seen = dict.fromkeys(names, 0), dict[str, list[Uint64]]()
    for part in sample:
        table = read_table(part, names)
        for name in names:
            nulls[name] += table[name].null_count
        if run is not None and schema is not None:
            dense = Dense(data.dense_fill, data.log1p)
            _see(decode(table, schema, dense, part.url, part.first_row), schema, seen)
    count = max(1, sum(part.num_rows for part in sample))
    return Profile(
        rows, positives / max(1, rows), {name: of / count for name, of in nulls.items()},
        {} if run is None else {name: _unknown(run, name, np.unique(np.concatenate(of))) for name, of in seen.items()},
    )  # fmt: skip


def complaints(found: Profile, history: Sequence[Profile], knobs: Validate, is_whole: bool = True) -> list[str]:
    """What speaks against training on a slot, in words; nothing: it is like the last accepted ones, or they are too few.

    is_whole   whether it is all of the slot, and not some files that came later
    """
    if not found.rows:
        return ["no rows"]
    if len(history) < knobs.least:
        return []
    said = []
    rows = statistics.median(of.rows for of in history)
    if is_whole and not knobs.fewest_rows * rows <= found.rows <= knobs.most_rows * rows:
        said.append(
            f"{found.rows:,} rows; the median of the last {len(history)} slots is {rows:,.0f}, and validate.fewest_rows and "
            f"most_rows allow {knobs.fewest_rows * rows:,.0f} to {knobs.most_rows * rows:,.0f}"
        )
    rate = statistics.median(of.label_rate for of in history)
    if abs(found.label_rate - rate) > knobs.label_rate * rate:
        said.append(f"{found.label_rate:.2%} positive labels; the median is {rate:.2%} (validate.label_rate {knobs.label_rate:g})")
    for what, bound, knob, shares, past in (
        ("null", knobs.null_rate, "null_rate", found.nulls, [of.nulls for of in history]),
        (
            "values that the live model does not know",
            knobs.new_signs,
            "new_signs",
            found.new_signs,
            [of.new_signs for of in history],
        ),
    ):
        for name, share in shares.items():
            known = [of[name] for of in past if name in of]
            if len(known) >= knobs.least and share > max(known) + bound:
                said.append(f"column {name!r}: {share:.1%} {what}; the most so far is {max(known):.1%} (validate.{knob} {bound:g})")
    return said


def _spread(parts: Sequence[Partition], rows: int) -> list[Partition]:
    """Partitions at even distances, of about so many rows."""
    total = sum(part.num_rows for part in parts)
    count = max(1, min(len(parts), round(len(parts) * rows / max(1, total))))
    return [parts[k * len(parts) // count] for k in range(count)] if parts else []


def _see(columns: Columns, schema: Schema, seen: dict[str, list[Uint64]]) -> None:
    for slot, bags in zip(schema.slots, columns.slots, strict=True):
        seen.setdefault(slot.name, []).append(np.unique(bags.signs))


def _unknown(run: TrainedRun, slot: str, signs: Uint64) -> float:
    """The share of distinct signs without a row. Folded values are known by their sign, too."""
    if not len(signs):
        return 0.0
    known = np.zeros(len(signs), bool)
    for path in files_of(run.path / EMBEDDINGS).get(slot, []):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["sign"]):
                known |= np.isin(signs, batch.column(0).to_numpy())
    return float(1 - known.mean())
