"""What `bench.shard --rivals` compares a shard with: what can be installed instead, each in the fastest form found for it.

All do what a shard does with a batch: a row for each sign, found or created, rows summed bag by bag; then an Adagrad step of each
distinct row, whose gradients are summed first. All begin with the same rows, which lie in the same order as the shard's. A rival's
new row is zeros and no rival keeps recency, counts or statistics: less work than flowps does. What else is less:

    dict, DenseHashTable    nothing: they find out which signs are new, and create their rows, as a shard does
    searchsorted            all signs are there before the first batch, also those that are new to the others
    torch                   no map: it is told the rows of a batch before the clock runs

flowps adds `epsilon` under the root; a rival's sums of squares begin that much higher instead, which is the same.
"""

from __future__ import annotations

import collections
import importlib
import itertools
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import contender
from bench.workload import SignBatch
from flowps.batch import Float32, Uint64
from flowps.config import Slot
from flowps.ps.memory import aligned_empty
from flowps.ps.shard import Shard

_SLOT = Slot(name="any", dim=contender.DIM)
DIM, RATE = _SLOT.dim, np.float32(_SLOT.learning_rate)


@dataclass(frozen=True)
class Rows:
    """Rows and what will be asked for.

    signs     uint64 [n], each once, in the order in which their rows lie
    weights   float32 [n, DIM]
    squares   float32 [n, DIM], sums of squares
    new       uint64 [m], signs that will come and have no row, each once, in the order in which they come
    """

    signs: Uint64
    weights: Float32
    squares: Float32
    new: Uint64

    @property
    def every_sign(self) -> Uint64:
        """Those with and without rows."""
        return np.concatenate([self.signs, self.new])

    def with_room(self) -> tuple[Float32, Float32]:
        """A copy of weights and squares, both with rows for new signs, and epsilon in the squares."""
        shape = len(self.new), DIM
        squares = np.concatenate([self.squares, np.full(shape, _SLOT.initial_accumulator, np.float32)])
        return np.concatenate([self.weights, np.zeros(shape, np.float32)]), squares + np.float32(_SLOT.epsilon)


class Contender(ABC):
    """A table of `rows`, for one caller; its operations run on `threads` threads, if they can."""

    name = package = ""

    @abstractmethod
    def __init__(self, rows: Rows, threads: int) -> None: ...

    @abstractmethod
    def prepare(self, batch: SignBatch, grads: Float32) -> None:
        """What comes next, before the clock runs: no bag at the end is empty; the gradient of the bags is float32 [bags, DIM]."""

    @abstractmethod
    def look_up(self) -> Any:
        """The sums of the bags, of which NumPy can make float32 [bags, DIM]."""

    @abstractmethod
    def push(self) -> None:
        """Step the rows of the last lookup."""


class Flowps(Contender):
    """A shard that is there already, with its rows."""

    name, package = "flowps Shard", "flowps"

    def __init__(self, shard: Shard, num_slots: int) -> None:
        self._shard, self._slots = shard, np.arange(num_slots)
        self._out = self._grads = np.empty((0, num_slots * DIM), np.float32)

    def prepare(self, batch: SignBatch, grads: Float32) -> None:
        self._batch = batch
        lines = grads.reshape(len(self._slots), -1, DIM).swapaxes(0, 1)
        self._grads = lines.reshape(lines.shape[0], -1)
        if self._out.shape != self._grads.shape:
            self._out = aligned_empty(self._grads.shape)

    def look_up(self) -> Any:
        batch, out = self._batch, self._out
        self._shard.lookup(0, batch.signs, batch.offsets, len(out), self._slots, self._slots * DIM, out, training=True)
        return out.reshape(len(out), -1, DIM).swapaxes(0, 1)

    def push(self) -> None:
        self._shard.push(0, self._grads)


class _NumPyRows(Contender):
    """Rows in NumPy arrays, by numbers that a subclass finds.

    SciPy's sparse product sums: in a third of the time that `np.take` and `np.add.reduceat` took, in a quarter with gradients.
    """

    package = "scipy"

    def __init__(self, rows: Rows, threads: int) -> None:
        self._sparse: Any = importlib.import_module("scipy.sparse")
        self._weights, self._squares = rows.with_room()

    @abstractmethod
    def find(self, signs: Uint64) -> NDArray[np.int64]:
        """Row numbers."""

    def prepare(self, batch: SignBatch, grads: Float32) -> None:
        self._batch, self._grads = batch, grads

    def look_up(self) -> Any:
        self._numbers = self.find(self._batch.signs)
        return self._sums(self._numbers, self._batch.offsets, self._weights)

    def _sums(self, numbers: NDArray[Any], bounds: NDArray[Any], vectors: Float32) -> Any:
        shape = len(bounds) - 1, len(vectors)
        return self._sparse.csr_array((np.ones(len(numbers), np.float32), numbers, bounds), shape) @ vectors

    def push(self) -> None:
        order = np.argsort(self._numbers)
        ordered = self._numbers[order]
        firsts = np.flatnonzero(np.diff(ordered, prepend=-1))
        bags = np.repeat(np.arange(len(self._grads)), np.diff(self._batch.offsets))
        grads, numbers = self._sums(bags[order], np.append(firsts, len(order)), self._grads), ordered[firsts]
        squares = np.take(self._squares, numbers, axis=0)
        squares += grads * grads
        self._squares[numbers] = squares
        grads *= RATE
        grads /= np.sqrt(squares, out=squares)
        self._weights[numbers] -= grads


class Dict(_NumPyRows):
    """Row numbers in a dict, which gives a new sign the next one."""

    name = "dict + NumPy rows"

    def __init__(self, rows: Rows, threads: int) -> None:
        super().__init__(rows, threads)
        n = len(rows.signs)
        self._number_of = collections.defaultdict(itertools.count(n).__next__, zip(rows.signs.tolist(), range(n), strict=True))

    def find(self, signs: Uint64) -> NDArray[np.int64]:
        return np.array(operator.itemgetter(*signs.tolist())(self._number_of), np.int64).reshape(-1)


class Sorted(_NumPyRows):
    """All signs, sorted, with the row number of each."""

    name = "NumPy searchsorted"

    def __init__(self, rows: Rows, threads: int) -> None:
        super().__init__(rows, threads)
        self._map = _sorted(rows)

    def find(self, signs: Uint64) -> NDArray[np.int64]:
        return self._map.find(signs)


class DenseHashTable(Contender):
    """Row numbers in TensorFlow's table of open addressing, which took half the time of MutableHashTable; rows in variables.

    Eager. Sums are faster of gathered rows than by SparseSegmentSum; a step made of gather and scatter is faster than
    ResourceSparseApplyAdagrad. TensorFlow takes its number of threads once in a process: the caller's business.
    """

    name, package = "TensorFlow DenseHashTable", "tensorflow"

    def __init__(self, rows: Rows, threads: int) -> None:
        tf = self._tf = contender.tensorflow()
        self._weights, self._squares = (tf.Variable(of, trainable=False) for of in rows.with_room())
        least = np.iinfo(np.int64).min
        self._table = tf.lookup.experimental.DenseHashTable(np.int64, np.int64, -1, empty_key=least, deleted_key=least + 1)
        self._table.insert(rows.signs.view(np.int64), np.arange(len(rows.signs)))
        self._used = len(rows.signs)

    def prepare(self, batch: SignBatch, grads: Float32) -> None:
        constant = self._tf.constant
        self._signs, self._offsets, self._grads = constant(batch.signs.view(np.int64)), constant(batch.offsets), constant(grads)

    def look_up(self) -> Any:
        tf = self._tf
        self._numbers = self._table.lookup(self._signs)
        missing = tf.where(self._numbers < 0)
        if len(missing):
            new, numbers = tf.unique(tf.gather_nd(self._signs, missing), out_idx=np.int64)
            first, self._used = self._used, self._used + len(new)
            self._table.insert(new, tf.range(first, self._used, dtype=np.int64))
            self._numbers = tf.tensor_scatter_nd_update(self._numbers, missing, numbers + first)
        lengths = self._offsets[1:] - self._offsets[:-1]
        self._bags = tf.repeat(tf.range(len(lengths)), lengths)
        return tf.math.segment_sum(tf.gather(self._weights, self._numbers), self._bags)

    def push(self) -> None:
        tf = self._tf
        numbers, inverse = tf.unique(self._numbers)
        grads = tf.math.unsorted_segment_sum(tf.gather(self._grads, self._bags), inverse, len(numbers))
        squares = tf.gather(self._squares, numbers) + grads * grads
        self._squares.scatter_update(tf.IndexedSlices(squares, numbers))
        self._weights.scatter_sub(tf.IndexedSlices(RATE * grads * tf.math.rsqrt(squares), numbers))


class EmbeddingBag(Contender):
    """No map: an EmbeddingBag with sparse gradients, and torch's Adagrad."""

    name, package = "torch EmbeddingBag, optim.Adagrad", "torch"

    def __init__(self, rows: Rows, threads: int) -> None:
        torch = self._torch = importlib.import_module("torch")
        torch.set_num_threads(threads)
        torch.sparse.check_sparse_tensor_invariants.disable()  # as they are; torch warns where nobody has said so
        weights, self._squares = map(torch.from_numpy, rows.with_room())
        self._bag = torch.nn.EmbeddingBag(*weights.shape, mode="sum", sparse=True, include_last_offset=True, _weight=weights)
        self._optimizer = torch.optim.Adagrad(self._bag.parameters(), lr=float(RATE), eps=0.0)
        self._optimizer.state[self._bag.weight]["sum"] = self._squares
        self._map = _sorted(rows)

    def prepare(self, batch: SignBatch, grads: Float32) -> None:
        numbers = self._map.find(batch.signs).astype(np.int32)  # half the bytes: a third faster
        self._numbers, self._offsets, self._grads = map(self._torch.from_numpy, (numbers, batch.offsets, grads))

    def look_up(self) -> Any:
        self._out = self._bag(self._numbers, self._offsets)
        return self._out.detach()

    def push(self) -> None:
        self._out.backward(self._grads)
        self._optimizer.step()
        self._optimizer.zero_grad()


class EmbeddingBagByHand(EmbeddingBag):
    """The same, with a step of torch's plain operations: half the time of `backward` and Adagrad, which sort and look for more."""

    name = "torch EmbeddingBag, a step by hand"

    def push(self) -> None:
        torch, weights, squares_of = self._torch, self._bag.weight.detach(), self._squares
        ordered, order = torch.sort(self._numbers)
        numbers, counts = torch.unique_consecutive(ordered, return_counts=True)
        numbers, bounds = numbers.long(), torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        bags = torch.repeat_interleave(self._offsets.diff())[order]
        grads = torch.nn.functional.embedding_bag(bags, self._grads, bounds, mode="sum", include_last_offset=True)
        squares = squares_of.index_select(0, numbers).addcmul_(grads, grads)
        squares_of.index_copy_(0, numbers, squares)
        weights.index_add_(0, numbers, grads.div_(squares.sqrt_()), alpha=-float(RATE))


RIVALS: tuple[type[Contender], ...] = (Dict, Sorted, DenseHashTable, EmbeddingBag, EmbeddingBagByHand)


def _sorted(rows: Rows) -> contender.Sorted:
    """The map of `bench.map`, without its rows."""
    made = contender.Sorted(0, 1)
    made.enter(rows.every_sign, 0)
    return made
