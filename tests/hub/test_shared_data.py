"""Real data sets, where they lie beside the checkout: listed, decoded and cut as a run would, against the slow twin."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowps.config import Config, Data
from flowps.hub.decode import Dense
from flowps.hub.partition import list_files, partitions, read_table
from flowps.hub.schema import infer
from flowps.hub.stream import ReadSpec, read_partition
from tests.hub import naive

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
SMALL_PARTITION_ROWS = 1024
BATCH_SIZE = 32
DENSE = {"criteo": ("I*",)}  # columns that a person would take as numbers, besides the float ones
FILES = [
    "avazu/train.parquet",
    "beauty/train.parquet",
    "criteo/criteo_kaggle_first10k.parquet",
    "criteo/criteo_1tb_day_1000.parquet",
    "ipinyou/train.parquet",
    "lastfm/valid.parquet",
    "ml100k/train.parquet",
    "ml1m/test.parquet",
    "obd/obd_random_men_women_20k.parquet",
]


@pytest.mark.parametrize("name", FILES)
def test_a_partition_of_real_data(name: str) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path.resolve()} is not here: the shared data sets are not part of the repository")
    files = list_files([str(path)], "data.train")
    schema = infer(files[0].columns, Config(data=Data(dense=DENSE.get(path.parent.name, ()))))
    part = partitions(files, SMALL_PARTITION_ROWS)[-1]
    how = Dense(fill=-1.0, log1p=True)
    found = read_partition(part, ReadSpec(schema, how, BATCH_SIZE, False, 0), 0, 0).batches
    assert sum(batch.size for batch in found) == part.num_rows
    table = read_table(part, schema.columns)
    for k in {0, len(found) // 2, len(found) - 1}:
        sample = table.slice(k * BATCH_SIZE, BATCH_SIZE)
        naive.assert_same(found[k], naive.batch(naive.samples(sample, schema, how)))
