"""A model of your own: FiBiNET's squeeze and excitation (Huang et al., RecSys 2019) before an MLP.

python -m flowps.train examples/quickstart.toml --model examples.own_model:build --run_dir runs/own_model
"""

import keras


def build(spec):
    """How much the vector of each slot counts depends on all of them."""
    inputs = spec.inputs()  # "embeddings" [batch, width] and "dense_columns" [batch, dense_width], each if there are any
    vectors = spec.stacked(inputs["embeddings"])  # [batch, slots, dim]
    squeezed = keras.ops.mean(vectors, axis=2)  # [batch, slots]
    hidden = keras.layers.Dense(len(spec.slots) // 2, activation="relu")(squeezed)
    shares = keras.layers.Dense(len(spec.slots), activation="sigmoid")(hidden)
    x = keras.layers.Flatten()(vectors * keras.ops.expand_dims(shares, 2))
    if "dense_columns" in inputs:
        x = keras.layers.concatenate([x, inputs["dense_columns"]])
    for units in spec.hidden:  # net.hidden
        x = keras.layers.Dense(units, activation="relu")(x)
    return keras.Model(inputs, keras.layers.Dense(1)(x))  # the logit: no sigmoid
