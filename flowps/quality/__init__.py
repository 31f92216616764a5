"""The quality of predictions: what `flowps.evaluate` says of a model and samples with labels.

`Tally` is what scored samples add up to: every process makes its own, they are merged in any order, and the figures are the same
to the last bit. Its `result` is a `Quality`, plain data for JSON; `show` prints one. Covers nothing of scoring or reading.
"""

from flowps.quality.figures import Bucket, Gauc, Quality, SliceRow, SliceTable
from flowps.quality.table import show
from flowps.quality.tally import Tally

__all__ = ["Bucket", "Gauc", "Quality", "SliceRow", "SliceTable", "Tally", "show"]
