"""flowps: trains CTR and recommendation models with huge sparse embeddings.

The words, one per thing:

sample, example   one row of the data set (rates are printed as examples/sec)
partition         the unit a hub task reads: some row groups of one file
hub               the role that turns partitions into batches
slot              one sparse feature column; each has a dim, a pooling, an optimizer
sign              uint64 id of one feature value: xxh64 of the value, seeded by the slot
row               one sign's weights and optimizer state, side by side
table             rows of all slots that share dim, optimizer and storage
shard             one PS partition of all tables, held by one Dask actor
placement         which slots, or sign ranges of a heavy slot (its pieces), live on which shard
load              what a slot or shard has to do: signs, distinct rows, bytes
parcel            what one shard gets of a batch: the bags of its pieces
endpoint          a shard as its clients call it, in their process or over the wire
wire              the way to a shard in another process: gRPC
offer             a Dask worker with the roles it can take; the assignment says who takes which
group             the trainers of a run that share every dense update
feed              a batch with its looked-up embeddings, waiting for a step
ticket            a batch's number in the order of reading; its id between lookup and push
permit            the right to have a batch in flight: taken before lookup, returned after push
lookup, push      read pooled rows, send gradients
in flight         looked up, not yet pushed; bounded by permits
staleness         pushes that happened between a feed's lookup and its own push
bag               the signs of one slot of one sample, pooled into one vector
share             the weight of one sign in its bag, from the column that the slot's `weights` names
arena, index      a table's rows side by side in memory, and the map from signs to them
stripe            a part of a table by the upper bits of the signs: its entries, its rows, its counts
stamp             the number of a sign's last use: later uses have larger ones
cut               a moment of a run at which nothing is in flight: rows, weights and ledger belong together
checkpoint        a cut on disk; a delta has only what has changed since the one before, and needs it
chain             a full checkpoint and the deltas up to one, in order
part, section     what one shard has in a checkpoint, and some columns of it: a file of their own
store             the folder of a run's checkpoints, on a disk or elsewhere
manifest          the file whose presence makes a checkpoint exist
ledger            what was read, trained, dropped, replayed: counts that must add up; and which samples of the epoch are trained
run status        the always-on timings and counters of every role
stage             something that is done to every batch, and timed: ReadSample, EmbeddingLookup, TrainStep, …
figures           what a role, or a process, has measured of itself until a moment
verdict           which stage bounds the run, the evidence, and what to change
span, trace       one time of a stage with its two ends and its thread; all of them of some batches
glance            what the dashboard page shows of a run at one moment
task, label       what is learned from a label column: a logit of its own, a figure of its own
model spec        what a dense model is built from: its slots, dense columns and labels, and the knobs `net.*`
evaluation        the model on data that it does not train on; the best one may be what a run ends with
tally, quality    what scored samples add up to, and the figures that come of it: AUC, logloss, calibration, by slice, by group
scorer            what gives predictions without training: a Dask task over a checkpoint, or rows in Python over a bundle
sink              where a scorer puts predictions: a tally, or a folder of files
bundle            what is exported of a run for serving: versions of model, rows, schema and hash, of which one is live
knob              one setting of a run: unit, default and range are in `config`
plan              all that is decided before a role starts
run directory     what a run leaves on disk
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flowps.config import Config
from flowps.errors import FlowpsError
from flowps.knob import from_mapping, load
from flowps.version import __version__

if TYPE_CHECKING:
    from flowps.notebook import Trainer
    from flowps.train import train
    from flowps.trainer.models.from_keras import from_keras

__all__ = ["Config", "FlowpsError", "Trainer", "__version__", "from_keras", "from_mapping", "load", "train"]

_LATER = {"Trainer": "flowps.notebook", "train": "flowps.train", "from_keras": "flowps.trainer.models.from_keras"}


def __getattr__(name: str) -> Any:
    """What takes Dask, or TensorFlow, is imported when it is first asked for."""
    if name not in _LATER:
        raise AttributeError(f"module 'flowps' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
