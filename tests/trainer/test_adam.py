"""`FusedAdam` beside Keras's own."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from flowps.trainer.adam import FusedAdam

STEPS = 7


def trained(optimizer: Any, compiled: bool, steps: range = range(STEPS), first: Any = None) -> tuple[list[Any], list[Any]]:
    """Two variables, and the optimizer's, after steps with seeded gradients; `first`: what both begin with."""
    random = np.random.default_rng(0)
    variables = [keras.Variable(random.standard_normal(shape).astype(np.float32)) for shape in ((5, 3), (4,))]
    grads = [[random.standard_normal(v.shape).astype(np.float32) * 10.0**k for k, v in enumerate(variables)] for _ in range(STEPS)]
    optimizer.build(variables)
    if first is not None:
        for variable, value in zip([*variables, *optimizer.variables], [*first[0], *first[1]], strict=True):
            variable.assign(value)
    apply = tf.function(lambda of: optimizer.apply(of, variables)) if compiled else lambda of: optimizer.apply(of, variables)
    for step in steps:
        apply([tf.constant(grad) for grad in grads[step]])
    return [np.array(v) for v in variables], [np.array(v) for v in optimizer.variables]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "knobs", [{}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}, {"weight_decay": 0.1}, {"beta_1": 0.5, "epsilon": 0.1}]
)
def test_steps_are_those_of_keras(knobs: dict[str, float], compiled: bool) -> None:
    theirs = keras.optimizers.Adam(0.01, **knobs)
    ours = FusedAdam.instead_of(keras.optimizers.Adam(0.01, **knobs))
    assert type(ours) is FusedAdam
    for mine, expected in zip(trained(ours, compiled), trained(theirs, compiled), strict=True):
        for a, b in zip(mine, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)


def test_one_goes_on_from_the_state_of_the_other() -> None:
    whole = trained(keras.optimizers.Adam(0.01), False)
    half = trained(keras.optimizers.Adam(0.01), False, range(4))
    for a, b in zip(trained(FusedAdam(0.01), False, range(4, STEPS), half)[0], whole[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)


@pytest.mark.parametrize("other", [keras.optimizers.AdamW(), keras.optimizers.SGD(), keras.optimizers.Adam(amsgrad=True)])
def test_others_stay_as_they_are(other: Any) -> None:
    assert FusedAdam.instead_of(other) is other
