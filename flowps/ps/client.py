"""`PsClient`: what a trainer calls. Slices a batch by placement, asks every shard at once, puts the answers in one buffer.

A shard in the same process that holds whole slots writes straight into the buffer; of all others, `parcel` takes the answers apart.
Any thread may call any method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from flowps.batch import Batch, Float32
from flowps.config import Slot
from flowps.ps.endpoint import Endpoint, LocalEndpoint
from flowps.ps.load import LoadMeter
from flowps.ps.memory import aligned_empty
from flowps.ps.numbering import step_of
from flowps.ps.parcel import Parcel, Route, SplitSlot
from flowps.ps.placement import Placement
from flowps.ps.shard import Shard
from flowps.ps.team import Team
from flowps.status.run_status import RunStatus


class PsClient:
    """Lookups and pushes over `shards`, placed as `placement` says, for the slots `slots`.

    shards   one for each of the placement: a Shard in this process, or an Endpoint; of a shard without slots, anything
    status   gets LookupShardK and PushShardK, the time of each call to shard K, where there are several or the way leads elsewhere
    """

    def __init__(
        self, shards: Sequence[Shard | Endpoint], placement: Placement, slots: Sequence[Slot], status: RunStatus | None = None
    ) -> None:
        self._route = Route(placement, slots)
        self._paths: list[_Path] = []
        for k, pieces in enumerate(placement.shards):
            shard = shards[k]
            if not pieces:
                continue
            if not isinstance(shard, Shard):
                self._paths.append(_Packed(shard, self._route, k))
            elif self._route.positions(k) is None:
                widths = [slots[piece.slot].width for piece in pieces]
                self._paths.append(_Packed(LocalEndpoint(shard, widths), self._route, k))
            else:
                self._paths.append(_Direct(shard, self._route, k))
        self._status = status if any(isinstance(path, _Packed) for path in self._paths) or len(self._paths) > 1 else None
        self._meter = LoadMeter(len(slots))
        self._team = Team(max(1, len(self._paths)), "flowps-ps-client")

    @property
    def meter(self) -> LoadMeter:
        """What the training lookups have asked for."""
        return self._meter

    def lookup(self, batch_id: int, batch: Batch, training: bool) -> Float32:
        """Pooled embeddings of `batch`, float32 [size, width]. See `Shard.lookup` for `training` and the errors.

        When one shard fails, the others forget the batch.
        """
        split = self._route.split(batch)
        holding: list[_Path] | None = [] if training else None
        return self._gather(batch_id, batch, lambda path, out: path.lookup(batch_id, batch, split, out, training), holding)

    def find(self, batch_id: int, batch: Batch) -> Callable[[], Float32]:
        """Find or create the rows of `batch`, for a step. What is returned pools them, once: the other half of a training lookup.

        It reads no weights, so it may come before the pushes that the batch is to see. When one shard fails, in either half, the
        others forget the batch.
        """
        split = self._route.split(batch)
        holding: list[_Path] = []
        found_s: dict[_Path, float] = {}

        def find(path: _Path) -> None:
            began = time.perf_counter()
            path.find(batch_id, batch, split)
            found_s[path] = time.perf_counter() - began

        self._ask(self._paths, find, batch_id, holding)
        return lambda: self._gather(batch_id, batch, lambda path, out: path.pool(batch_id, batch, out), holding, found_s)

    def _gather(
        self, batch_id: int, batch: Batch, read: Callable[[_Path, Float32], Float32 | None], holding: list[_Path] | None,
        found_s: Mapping[_Path, float] | None = None,
    ) -> Float32:  # fmt: skip
        """What `read` writes, or returns, for every shard, in one buffer.

        holding   paths that remember the batch, to which those that answer are added; None: an evaluation
        found_s   seconds that each has searched for it already; None: it has not been found
        """
        answers: list[Float32 | None] = [None] * self._route.num_shards

        def ask(path: _Path) -> None:
            answers[path.shard] = read(path, out)

        out = aligned_empty((batch.size, self._route.width))
        self._ask(self._paths, self._timed(ask, "Lookup", batch_id, found_s), batch_id, holding)
        self._route.add_up(answers, out)
        if holding is not None:
            self._meter.observe(batch)
        return out

    def _ask(self, paths: Sequence[_Path], ask: Callable[[_Path], object], batch_id: int, holding: list[_Path] | None) -> None:
        """`ask` on all `paths`. Those that succeed remember the batch, as those of `holding` do: if one fails, they forget it."""

        def ask_one(n: int) -> None:
            ask(paths[n])
            if holding is not None and paths[n] not in holding:
                holding.append(paths[n])

        try:
            self._team.run(ask_one, len(paths))
        except BaseException:
            for path in holding or ():
                with suppress(Exception):  # the error that was raised is the one to show
                    path.forget(batch_id)
            raise

    def push(self, batch_id: int, grads: Float32, rate_scale: float = 1.0) -> None:
        """Give every shard the gradient of the embeddings that `lookup` returned, float32 [size, width], C-contiguous.

        rate_scale   what the learning rates of all slots are multiplied by in this push
        """
        self._run(lambda path: path.push(batch_id, grads, rate_scale), "Push", batch_id)

    def attend(self, batch_id: int) -> None:
        """A lookup without samples, for trainers that step together: the others' batches wait for it. There is no push after it."""
        self._run(lambda path: path.attend(batch_id), "Lookup", batch_id)

    def forget(self, batch_id: int) -> None:
        """There will be no push of this batch. All shards are told, whatever one of them raises."""
        errors: list[Exception] = []
        for path in self._paths:  # not by the team: its threads may wait for what this ends
            try:
                path.forget(batch_id)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """End the client's threads."""
        self._team.close()

    def _run(self, work: Callable[[_Path], object], what: str, batch_id: int) -> None:
        """`work` on all paths, timed."""
        timed = self._timed(work, what, batch_id)
        self._team.run(lambda n: timed(self._paths[n]), len(self._paths))

    def _timed(
        self, work: Callable[[_Path], object], what: str, batch_id: int, before_s: Mapping[_Path, float] | None = None
    ) -> Callable[[_Path], object]:
        """`work`, timed for each shard, if that is of interest; `before_s`: seconds that count as part of it."""
        status, step = self._status, step_of(batch_id)
        if status is None:
            return work

        def timed(path: _Path) -> None:
            name, began = f"{what}Shard{path.shard}", time.perf_counter()
            work(path)
            ended = time.perf_counter()
            if before_s is None:
                status.span(name, began, ended, step)
            else:
                status.observe(name, before_s.get(path, 0.0) + ended - began)

        return timed


class _Path(Protocol):
    """The way to one shard."""

    shard: int

    def lookup(self, batch_id: int, batch: Batch, split: dict[int, SplitSlot], out: Float32, training: bool) -> Float32 | None:
        """Write what lives whole on the shard into `out`; the answer itself, where there are parts to add up."""

    def find(self, batch_id: int, batch: Batch, split: dict[int, SplitSlot]) -> None:
        """The first half of a training lookup."""

    def pool(self, batch_id: int, batch: Batch, out: Float32) -> Float32 | None:
        """The other, with what `lookup` gives."""

    def push(self, batch_id: int, grads: Float32, rate_scale: float) -> object:
        """Give the shard its part of `grads`."""

    def attend(self, batch_id: int) -> None:
        """Look up no samples."""

    def forget(self, batch_id: int) -> None:
        """There will be no push."""


class _Direct(_Path):
    """A shard in this process that holds whole slots: it works in the batch's own arrays."""

    def __init__(self, shard: Shard, route: Route, k: int) -> None:
        positions = route.positions(k)
        assert positions is not None
        self.shard = k
        self._shard, self._positions, self._columns = shard, positions, route.columns(k)

    def lookup(self, batch_id: int, batch: Batch, split: dict[int, SplitSlot], out: Float32, training: bool) -> None:
        """See _Path."""
        self._shard.lookup(
            batch_id, batch.signs, batch.offsets, batch.size, self._positions, self._columns, out, training, batch.shares
        )

    def find(self, batch_id: int, batch: Batch, split: dict[int, SplitSlot]) -> None:
        """See _Path."""
        self._shard.find(batch_id, batch.signs, batch.offsets, batch.size, self._positions, self._columns, batch.shares)

    def pool(self, batch_id: int, batch: Batch, out: Float32) -> None:
        """See _Path."""
        self._shard.pool(batch_id, out)

    def push(self, batch_id: int, grads: Float32, rate_scale: float) -> object:
        """See _Path."""
        return self._shard.push(batch_id, grads, rate_scale)

    def attend(self, batch_id: int) -> None:
        """See _Path. A trainer alone waits for nobody."""

    def forget(self, batch_id: int) -> None:
        """See _Path."""
        self._shard.forget(batch_id)


class _Packed(_Path):
    """A shard that is asked with a parcel and answers with lines of its own."""

    def __init__(self, endpoint: Endpoint, route: Route, k: int) -> None:
        self.shard = k
        self._endpoint, self._route = endpoint, route

    def lookup(self, batch_id: int, batch: Batch, split: dict[int, SplitSlot], out: Float32, training: bool) -> Float32:
        """See _Path."""
        answer = self._endpoint.lookup(batch_id, self._route.parcel(self.shard, batch, split), training)
        self._route.scatter(self.shard, answer, out)
        return answer

    def find(self, batch_id: int, batch: Batch, split: dict[int, SplitSlot]) -> None:
        """See _Path."""
        self._endpoint.find(batch_id, self._route.parcel(self.shard, batch, split))

    def pool(self, batch_id: int, batch: Batch, out: Float32) -> Float32:
        """See _Path."""
        answer = self._endpoint.pool(batch_id, batch.size)
        self._route.scatter(self.shard, answer, out)
        return answer

    def push(self, batch_id: int, grads: Float32, rate_scale: float) -> object:
        """See _Path."""
        return self._endpoint.push(batch_id, self._route.gather(self.shard, grads), rate_scale)

    def attend(self, batch_id: int) -> None:
        """See _Path."""
        self._endpoint.lookup(batch_id, Parcel(0, [], []), training=True)

    def forget(self, batch_id: int) -> None:
        """See _Path."""
        self._endpoint.forget(batch_id)
