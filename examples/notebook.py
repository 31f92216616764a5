"""A run from Python, cell by cell as in a notebook: data, training, evaluation, prediction, a bundle, a score.

python examples/notebook.py
"""

import pyarrow.parquet as pq

import flowps
import flowps.serving
from flowps.synthetic import generate, quickstart

# %% Eight million samples of 13 counts and 26 strings, whose best reachable AUC is known; if they are there, they stay.
data = generate(quickstart(), "data/quickstart")

# %% A run: knobs as in a TOML file.
trainer = flowps.Trainer(
    {
        "model": "deepfm",
        "run_dir": "runs/notebook",
        "data": {"train": "data/quickstart/train-0000*.parquet", "test": "data/quickstart/test-*.parquet", "log1p": True},
        "net": {"hidden": [128, 64], "dropout": 0.1},
    }
)
result = trainer.fit()
print(f"trained {result.ledger.trained:,} samples: test AUC {result.test.auc:.4f}, best reachable {data.best_auc:.4f}")

# %% Any files with labels, in any detail.
quality = trainer.evaluate("data/quickstart/test-*.parquet", slices=["C1"])
print(f"AUC {quality.auc:.4f}, calibration {quality.calibration:.3f}")
for row in quality.slices[0].rows[:3]:
    print(f"  C1 = {row.value}: {row.samples:,} samples, AUC {row.auc:.4f}")

# %% Predictions as Parquet, beside the columns you name.
trainer.predict("data/quickstart/test-*.parquet", "predictions/notebook", columns=["label"], overwrite=True)
predictions = pq.read_table("predictions/notebook")
print(predictions.schema.names, predictions.num_rows)

# %% A bundle, and rows scored by it; for this no trainer, shard or hub is needed.
print(trainer.export("bundles/notebook", dtype="float16"))
scorer = flowps.serving.load("bundles/notebook")
print(scorer.score(pq.read_table("data/quickstart/test-00000.parquet").slice(0, 3)))
