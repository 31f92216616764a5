"""Two labels, one model: mmoe learns clicks, and purchases that only a click may lead to.

python -m flowps.synthetic data/quickstart
python examples/multi_task.py
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import flowps

# The second label, beside the first: one click in two of those with an even C5 is a purchase, of the others one in ten.
random = np.random.default_rng(1)
for path in sorted(Path("data/quickstart").glob("t*-0000*.parquet")):
    table = pq.read_table(path)
    even = np.array([value[-1] in "02468ace" for value in table["C5"].to_pylist()])
    bought = (random.random(len(even)) < np.where(even, 0.5, 0.1)) & (table["label"].to_numpy() == 1)
    Path("data/multi_task").mkdir(exist_ok=True)
    pq.write_table(table.append_column("purchase", pa.array(bought.astype(np.int8))), f"data/multi_task/{path.name}")

trainer = flowps.Trainer(
    {
        "model": "mmoe",
        "run_dir": "runs/multi_task",
        "data": {
            "train": "data/multi_task/train-*.parquet",
            "test": "data/multi_task/test-*.parquet",
            "extra_labels": "purchase",  # besides `label`
            "log1p": True,
        },
        "net": {"hidden": [128], "experts": 4, "tower": [32]},
    }
)
trainer.fit()
for label, quality in trainer.evaluate("data/multi_task/test-*.parquet").items():
    print(f"{label}: AUC {quality.auc:.4f}, {quality.positives:,} of {quality.samples:,} are positive")
