"""What `bench.map` compares: maps from signs to rows, each in the fastest form that its library has."""

from __future__ import annotations

import importlib
import itertools
import operator
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Float32, Uint64
from flowps.config import Slot
from flowps.ps.shard import Shard

DIM = 16
RATE = 0.0625  # a power of two: it rounds nothing
OPERATIONS = ("read", "write", "mixed", "insert")
MOST_SIGNS = 1 << 20  # of a batch


@dataclass(frozen=True)
class Batch:
    """Signs, uint64 [n], and their ranks, int64 [n]: what their row numbers would be without a map."""

    signs: Uint64
    ranks: NDArray[np.int64]


class Contender(ABC):
    """An empty map with room for `capacity` rows, whose calls `threads` threads share, if they can. Any thread may call.

    out     float32 [n, DIM] that start on a cache line: the caller's; who can, writes the rows there
    grads   float32 [n, DIM]
    """

    name = package = ""
    operations: tuple[str, ...] = OPERATIONS
    shares_calls = False

    @abstractmethod
    def __init__(self, capacity: int, threads: int) -> None: ...

    @abstractmethod
    def read(self, batch: Batch, out: Float32) -> Float32:
        """The rows of signs that are there."""

    @abstractmethod
    def write(self, batch: Batch, out: Float32, grads: Float32) -> None:
        """Subtract RATE times `grads` from the rows of signs that are there."""

    def insert(self, batch: Batch, out: Float32) -> None:  # noqa: B027  who has all rows has nothing to do
        """Give new signs, each once, rows of zeros."""

    def close(self) -> None:  # noqa: B027  most have none
        """End its threads."""


class Flowps(Contender):
    """A shard of one slot."""

    name, package, shares_calls = "flowps Shard", "flowps", True

    def __init__(self, capacity: int, threads: int) -> None:
        slot = Slot(name="map", dim=DIM, optimizer="sgd", learning_rate=RATE, initializer="zeros")
        # A quarter more than needed: nothing is evicted, however unevenly the stripes fill.
        self.shard = Shard([slot], [capacity + capacity // 4], 7, 1024, threads, [True])
        self._numbers, self._zero = itertools.count(), np.zeros(1, np.int64)
        self._offsets = np.arange(max(MOST_SIGNS, capacity) + 1, dtype=np.int32)

    def read(self, batch: Batch, out: Float32) -> Float32:
        self._look_up(batch, out, training=False)
        return out

    def write(self, batch: Batch, out: Float32, grads: Float32) -> None:
        self.shard.push(self._look_up(batch, out, training=True), grads)

    def insert(self, batch: Batch, out: Float32) -> None:
        self.shard.forget(self._look_up(batch, out, training=True))

    def close(self) -> None:
        self.shard.close()

    def _look_up(self, batch: Batch, out: Float32, training: bool) -> int:
        number, n = next(self._numbers), len(batch.signs)
        self.shard.lookup(number, batch.signs, self._offsets[: n + 1], n, self._zero, self._zero, out, training)
        return number


class _Numbered(Contender):
    """Rows in a NumPy array, by numbers that a subclass finds and gives."""

    package = "numpy"

    def __init__(self, capacity: int, threads: int) -> None:
        self._rows = np.full((capacity, DIM), 0, np.float32)
        self._used, self._lock = 0, threading.Lock()

    @abstractmethod
    def find(self, signs: Uint64) -> NDArray[np.int64]:
        """Row numbers of signs that are there."""

    @abstractmethod
    def enter(self, signs: Uint64, first: int) -> None:
        """Give new signs the row numbers from `first` on. The lock is held."""

    def read(self, batch: Batch, out: Float32) -> Float32:
        return np.take(self._rows, self.find(batch.signs), axis=0, out=out, mode="clip")  # "raise" would buffer

    def write(self, batch: Batch, out: Float32, grads: Float32) -> None:
        # Float by float: two to four times as fast as `subtract.at` with rows, or as summing the gradients of a sign first.
        floats = (self.find(batch.signs)[:, None] * DIM + np.arange(DIM)).reshape(-1)
        steps = (grads * np.float32(RATE)).reshape(-1)
        with self._lock:
            np.subtract.at(self._rows.reshape(-1), floats, steps)

    def insert(self, batch: Batch, out: Float32) -> None:
        with self._lock:
            first, self._used = self._used, self._used + len(batch.signs)
            self._rows[first : self._used] = 0
            self.enter(batch.signs, first)


class Dict(_Numbered):
    """Row numbers in a dict."""

    name = "dict + NumPy rows"

    def __init__(self, capacity: int, threads: int) -> None:
        super().__init__(capacity, threads)
        self._number_of: dict[int, int] = {}

    def find(self, signs: Uint64) -> NDArray[np.int64]:
        # Faster than a comprehension or `map`. Of a single sign it gives no tuple.
        return np.array(operator.itemgetter(*signs.tolist())(self._number_of), np.int64).reshape(-1)

    def enter(self, signs: Uint64, first: int) -> None:
        self._number_of.update(zip(signs.tolist(), itertools.count(first), strict=False))


class Sorted(_Numbered):
    """Sorted signs, and the row number of each."""

    name = "NumPy searchsorted"

    def __init__(self, capacity: int, threads: int) -> None:
        super().__init__(capacity, threads)
        self._index = np.empty(0, np.uint64), np.empty(0, np.int64)

    def find(self, signs: Uint64) -> NDArray[np.int64]:
        # Three to six times as fast as searching in the order of the batch, which misses the caches at every step.
        order, (known, numbers) = np.argsort(signs), self._index
        found = np.empty(len(signs), np.int64)
        found[order] = numbers[np.searchsorted(known, signs[order])]
        return found

    def enter(self, signs: Uint64, first: int) -> None:
        order, (known, numbers) = np.argsort(signs), self._index
        at = np.searchsorted(known, signs[order])
        self._index = np.insert(known, at, signs[order]), np.insert(numbers, at, first + order)


class MutableHashTable(Contender):
    """Row numbers in a table of TensorFlow's, rows in a variable; called eagerly, which was faster than `tf.function`."""

    name, package = "TensorFlow MutableHashTable", "tensorflow"

    def __init__(self, capacity: int, threads: int) -> None:
        self._tf, self._used, self._lock = tensorflow(), 0, threading.Lock()
        self._table = self._new_table()
        self._rows = self._tf.Variable(self._tf.zeros((capacity, DIM)), trainable=False)

    def _new_table(self) -> Any:
        return self._tf.lookup.experimental.MutableHashTable(np.int64, np.int64, -1)

    def _find(self, batch: Batch) -> Any:
        return self._table.lookup(batch.signs.view(np.int64))

    def read(self, batch: Batch, out: Float32) -> Float32:
        return self._tf.gather(self._rows, self._find(batch)).numpy()

    def write(self, batch: Batch, out: Float32, grads: Float32) -> None:
        # `scatter_sub` takes no lock, and is hardly faster.
        self._rows.scatter_nd_sub(self._find(batch)[:, None], grads * np.float32(RATE))

    def insert(self, batch: Batch, out: Float32) -> None:
        n = len(batch.signs)
        with self._lock:
            first, self._used = self._used, self._used + n
        numbers = np.arange(first, first + n)
        self._rows.scatter_nd_update(numbers[:, None], self._tf.zeros((n, DIM)))
        self._table.insert(batch.signs.view(np.int64), numbers)


class DenseHashTable(MutableHashTable):
    """The same with open addressing. It takes keys for their hashes; a sign is one."""

    name = "TensorFlow DenseHashTable"

    def _new_table(self) -> Any:
        least = np.iinfo(np.int64).min
        return self._tf.lookup.experimental.DenseHashTable(np.int64, np.int64, -1, empty_key=least, deleted_key=least + 1)


class EmbeddingBag(Contender):
    """No map: rows by their numbers, all of them there from the start."""

    name, package, shares_calls = "torch EmbeddingBag, row numbers", "torch", True
    operations = ("read", "write", "mixed")

    def __init__(self, capacity: int, threads: int) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._threads, self._lock, self._offsets = threads, threading.Lock(), self._torch.arange(max(MOST_SIGNS, capacity))
        self._bag = self._torch.nn.EmbeddingBag(capacity, DIM, mode="sum", _weight=self._torch.zeros(capacity, DIM))

    def read(self, batch: Batch, out: Float32) -> Float32:
        self._torch.set_num_threads(self._threads)  # of the calling thread's operations
        with self._torch.no_grad():
            return self._bag(self._torch.from_numpy(batch.ranks), self._offsets[: len(batch.ranks)]).numpy()

    def write(self, batch: Batch, out: Float32, grads: Float32) -> None:
        self._torch.set_num_threads(self._threads)
        # Twice as fast as a backward pass and a step of sparse SGD.
        with self._lock, self._torch.no_grad():
            self._bag.weight.index_add_(0, self._torch.from_numpy(batch.ranks), self._torch.from_numpy(grads), alpha=-RATE)


CONTENDERS: tuple[type[Contender], ...] = (Flowps, Dict, Sorted, MutableHashTable, DenseHashTable, EmbeddingBag)


def tensorflow() -> Any:
    """TensorFlow, without its greeting."""
    importlib.import_module("flowps.trainer")
    return importlib.import_module("tensorflow")
