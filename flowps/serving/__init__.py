"""Serving: the bundle that is made of a run, and all that reads one: no Dask, no shards, and TensorFlow only to score.

`manifest` is what a bundle says of itself and `bundle` the folder of its versions; `pack` writes rows, in fewer bits by `quantize`,
and `rows` finds them by sign; `model` is the dense model, `vectors` the hash's test vectors. `score` makes predictions of rows that
`columns` has brought into shape. `live` follows a bundle as newer versions come, `wire` answers lookups over gRPC and `client`
asks. The commands are `flowps.export` and `flowps.serve`.

    scorer = flowps.serving.load("OUT")
    scorer.score([{"user": 7, "tags": ["a", "b"], "price": 1.5}])
"""

from flowps.errors import BundleError
from flowps.serving.score import Scorer, load
from flowps.serving.vectors import signs_of

__all__ = ["BundleError", "Scorer", "load", "signs_of"]
