"""A Keras model that is there already: its Embedding layers give way to slots, and all else is trained as it stands.

python -m flowps.synthetic data/quickstart
python examples/keras_model.py
"""

import keras

import flowps

# The model as it was: ids that were looked up in vocabularies, and embeddings that fit into the memory of one process.
ids = [keras.Input((), name=f"C{k}", dtype="int32") for k in range(1, 27)]
counts = keras.Input((13,), name="counts")
vectors = [keras.layers.Embedding(100_000, 8)(one) for one in ids]
x = keras.layers.concatenate([*vectors, counts])
x = keras.layers.Dense(128, activation="relu")(x)
x = keras.layers.Dense(64, activation="relu")(x)
model = keras.Model([*ids, counts], keras.layers.Dense(1, activation="sigmoid")(x), name="clicks")

# The same model in flowps: the inputs C1 to C26 are the slots of these names, `counts` is all dense columns.
config = {
    "run_dir": "runs/keras_model",
    "data": {"train": "data/quickstart/train-0000*.parquet", "test": "data/quickstart/test-*.parquet", "log1p": True},
    "slot_default": {"dim": 8},
}
result = flowps.train(config, model=model)
print(f"{result.rows:,} rows instead of {26 * 100_000:,}; test AUC {result.test.auc:.4f}")
