"""Dense networks over pooled embeddings: the built-in ones, and yours.

A model is a function from a :class:`ModelSpec` to a `keras.Model` that maps the spec's inputs to one logit per sample. `build`
finds it by name or by `"module:function"` and checks what it gives.
"""

from flowps.trainer.models.build import build, build_or_read
from flowps.trainer.models.spec import ModelSpec, SlotSpec

__all__ = ["ModelSpec", "SlotSpec", "build", "build_or_read"]
