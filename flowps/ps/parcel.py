"""`Parcel`: what one shard gets of a batch; `Route`: how a batch becomes parcels, and the shards' answers one buffer.

Covers slicing by placement and putting together. Does not call shards (client). Any thread may call any method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from flowps.batch import Batch, Float32, Int32, Uint64, offsets_of
from flowps.config import Slot
from flowps.ps.kernels import pool as pool_kernels
from flowps.ps.kernels import split as split_kernels
from flowps.ps.placement import Piece, Placement

Int64 = NDArray[np.int64]
_POOLING = {"sum": pool_kernels.SUM, "mean": pool_kernels.MEAN, "sqrtn": pool_kernels.SQRTN}
_NONE = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class Parcel:
    """The bags of a shard's slots for `size` samples, slot after slot, in pieces that need not lie side by side.

    signs    uint64 [nnz] in all
    lengths  int32 [num_slots * size] in all: signs of every bag, each slot's samples in order
    shares   float32 [nnz] in all, the weight of each sign in its bag; None: all 1
    """

    size: int
    signs: Sequence[Uint64]
    lengths: Sequence[Int32]
    shares: Sequence[Float32] | None = None

    def joined(self) -> tuple[Uint64, Int32, Float32 | None]:
        """Signs, offsets as in Batch, and shares, each one array. Copies unless there is one piece."""
        shares = None if self.shares is None else _joined(self.shares, np.float32)
        lengths = _joined(self.lengths, np.int32).reshape(-1, self.size or 1)
        return _joined(self.signs, np.uint64), offsets_of(lengths), shares


class Lines:
    """A shard's columns of a gradient, float32 [size, width], put side by side when and where they are wanted."""

    def __init__(self, source: Float32, columns: Columns | None = None, width: int = 0) -> None:
        self._source = source
        # One run as wide as the source is the source.
        self._columns = None if columns is None or (len(columns.widths) == 1 and width == source.shape[1]) else columns
        self.size = len(source)
        self.width = source.shape[1] if self._columns is None else width

    def array(self) -> Float32:
        """C-contiguous; the source itself where it has no other columns."""
        if self._columns is None:
            return self._source
        out = np.empty((self.size, self.width), np.float32)
        self._columns.move_back(self._source, out)
        return out

    def write_to(self, out: Float32) -> None:
        """Copy them into `out`, float32 [size, width], C-contiguous."""
        if self._columns is None:
            np.copyto(out, self._source)
        else:
            self._columns.move_back(self._source, out)


class Route:
    """The way of batches of the slots `slots` to the shards of `placement` and back."""

    def __init__(self, placement: Placement, slots: Sequence[Slot]) -> None:
        self.width = placement.width
        self._slots = slots
        self._shards = [_ShardRoute(pieces, placement.columns, slots) for pieces in placement.shards]
        # Of every slot that is split: its parts as (shard, first float in that shard's line), in the order of their sign ranges,
        # in which they are added up: the same sum every time.
        found: dict[int, list[tuple[int, int, int]]] = {}
        for k, of_shard in enumerate(self._shards):
            for piece, column in of_shard.split:
                found.setdefault(piece.slot, []).append((piece.part, k, column))
        self._split = {s: [(k, column) for _, k, column in sorted(parts)] for s, parts in found.items()}
        self._columns = placement.columns

    @property
    def num_shards(self) -> int:
        """Shards of the placement, those without slots too."""
        return len(self._shards)

    def positions(self, shard: int) -> Int64 | None:
        """Where the shard's slots stand in a batch; None when it holds parts of slots."""
        of_shard = self._shards[shard]
        return None if of_shard.split else np.array([piece.slot for piece in of_shard.pieces], np.int64)

    def columns(self, shard: int) -> Int64:
        """Where the shard's slots begin in a line of the whole buffer."""
        return np.array([self._columns[piece.slot] for piece in self._shards[shard].pieces], np.int64)

    def split(self, batch: Batch) -> dict[int, SplitSlot]:
        """The signs of every slot that is split, sorted by range; what `parcel` needs of a batch."""
        return {s: SplitSlot.of(batch, s, len(parts), self._slots[s]) for s, parts in self._split.items()}

    def parcel(self, shard: int, batch: Batch, split: dict[int, SplitSlot]) -> Parcel:
        """What `shard` gets of `batch`: views of it, and of `split`."""
        size, bounds = batch.size, batch.offsets[:: batch.size]
        signs: list[Uint64] = []
        lengths: list[Int32] = []
        shares: list[Float32] = []
        for first, last, piece in self._shards[shard].runs:
            if piece is None:
                signs.append(batch.signs[bounds[first] : bounds[last]])
                lengths.append(np.diff(batch.offsets[first * size : last * size + 1]))
                shares.append(_NONE if batch.shares is None else batch.shares[bounds[first] : bounds[last]])
            else:
                part = split[piece.slot].part(piece.part, size)
                signs.append(part[0])
                lengths.append(part[1])
                shares.append(part[2])
        if not any(len(of_piece) for of_piece in shares):
            return Parcel(size, signs, lengths)
        filled = [given if len(given) else np.ones(len(of), np.float32) for of, given in zip(signs, shares, strict=True)]
        return Parcel(size, signs, lengths, filled)

    def scatter(self, shard: int, answer: Float32, out: Float32) -> None:
        """Put the whole slots of the shard's `answer`, float32 [size, shard width], into `out`, float32 [size, width]."""
        self._shards[shard].whole.move(answer, out)

    def add_up(self, answers: Sequence[Float32 | None], out: Float32) -> None:
        """Put the sums of all split slots into `out`, from every shard's answer."""
        for s, parts in self._split.items():
            width = self._slots[s].width
            target = out[:, self._columns[s] : self._columns[s] + width]
            for n, (k, column) in enumerate(parts):
                answer = answers[k]
                assert answer is not None
                part = answer[:, column : column + width]
                if n:
                    target += part
                else:
                    target[:] = part

    def gather(self, shard: int, grads: Float32) -> Lines:
        """The shard's part of `grads`, float32 [size, width]: parts of a slot all get its own."""
        return Lines(grads, self._shards[shard].all, self._shards[shard].width)


@dataclass(frozen=True, slots=True)
class SplitSlot:
    """One slot's signs, sorted by range: see `kernels.split.split`."""

    starts: Int64
    lengths: Int32
    signs: Uint64
    shares: Float32

    @staticmethod
    def of(batch: Batch, s: int, parts: int, slot: Slot) -> SplitSlot:
        size = batch.size
        first = s * size
        count = int(batch.offsets[first + size] - batch.offsets[first])
        weighted = batch.shares is not None or slot.pooling != "sum"
        found = SplitSlot(
            np.empty(parts + 1, np.int64), np.empty(parts * size, np.int32), np.empty(count, np.uint64),
            np.empty(count if weighted else 0, np.float32),
        )  # fmt: skip
        split_kernels.split(
            batch.signs, _NONE if batch.shares is None else batch.shares, batch.offsets, first, size, np.uint64(parts),
            _POOLING[slot.pooling], found.starts, found.lengths, found.signs, found.shares,
        )  # fmt: skip
        return found

    def part(self, part: int, size: int) -> tuple[Uint64, Int32, Float32]:
        """Signs, lengths and shares of one range."""
        at = slice(self.starts[part], self.starts[part + 1])
        return self.signs[at], self.lengths[part * size : (part + 1) * size], self.shares[at]


class Columns:
    """Runs of floats that stand side by side in a shard's line and in that of the whole buffer."""

    def __init__(self, runs: Sequence[tuple[int, int, int]]) -> None:
        joined: list[list[int]] = []
        for packed, whole, width in runs:
            if joined and joined[-1][0] + joined[-1][2] == packed and joined[-1][1] + joined[-1][2] == whole:
                joined[-1][2] += width
            else:
                joined.append([packed, whole, width])
        self.packed, self.whole, self.widths = (np.array([run[n] for run in joined], np.int64) for n in range(3))

    def move(self, packed: Float32, whole: Float32) -> None:
        """From a shard's lines to the whole buffer."""
        split_kernels.move(
            packed.reshape(-1), packed.shape[1], self.packed, whole.reshape(-1), whole.shape[1], self.whole, self.widths, len(whole)
        )

    def move_back(self, whole: Float32, packed: Float32) -> None:
        """From the whole buffer to a shard's lines."""
        split_kernels.move(
            whole.reshape(-1), whole.shape[1], self.whole, packed.reshape(-1), packed.shape[1], self.packed, self.widths, len(whole)
        )


class _ShardRoute:
    """How one shard's pieces stand in a batch, in its own line and in that of the whole buffer.

    runs   (first slot, one past the last, None) for neighbouring whole slots, (slot, slot + 1, piece) for a part
    split  parts, with their first float in the shard's line
    """

    def __init__(self, pieces: Sequence[Piece], columns: Sequence[int], slots: Sequence[Slot]) -> None:
        self.pieces = pieces
        widths = [slots[piece.slot].width for piece in pieces]
        starts = [sum(widths[:k]) for k in range(len(pieces))]
        self.width = sum(widths)
        self.split = [(piece, start) for piece, start in zip(pieces, starts, strict=True) if piece.parts > 1]
        found = [(start, columns[piece.slot], width) for piece, start, width in zip(pieces, starts, widths, strict=True)]
        self.all = Columns(found)
        self.whole = Columns([run for run, piece in zip(found, pieces, strict=True) if piece.parts == 1])
        self.runs: list[tuple[int, int, Piece | None]] = []
        # Neighbours keep the same distance from their place in the list.
        numbered = enumerate(pieces)
        for _, group in groupby(numbered, lambda found: (found[1].slot - found[0], found[1].parts > 1)):
            run = [piece for _, piece in group]
            if run[0].parts > 1:
                self.runs += [(piece.slot, piece.slot + 1, piece) for piece in run]
            else:
                self.runs.append((run[0].slot, run[-1].slot + 1, None))


def _joined(pieces: Sequence[NDArray], kind: type[np.generic]) -> NDArray:  # type: ignore[type-arg]
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces) if pieces else np.empty(0, kind)
