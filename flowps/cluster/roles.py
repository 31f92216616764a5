"""`Roles`: the shards and trainers of one attempt of a run, on their workers: started, asked, watched, stopped.

Covers what Dask is told and asked; `watch` says which workers are lost, and what the run makes of it is `run`'s business.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import distributed
import msgspec

from flowps.checkpoint.ledger import Ledger
from flowps.cluster.cut import go_on
from flowps.cluster.long_task import request_stop
from flowps.cluster.offer import TRAINER_KEY, Offer
from flowps.cluster.plan import Plan
from flowps.cluster.reroute import lose, reroute
from flowps.cluster.resume import Resume
from flowps.cluster.role_status import forget
from flowps.cluster.shard_role import ShardActor
from flowps.cluster.tracing import collect
from flowps.cluster.trainer_role import Handout, Trained, TrainerTask, reserve_port, train
from flowps.cluster.watch import WATCH_S, Watch
from flowps.errors import ClusterError, FlowpsError, StoppedError
from flowps.status.figures import ShardFigures, Usage, usage_here

_STOP_S = 60.0  # for a step to end and the model to be saved
_NOTICED_S = 4.0  # until the scheduler knows that a worker has gone

_CANCELLED = FlowpsError("a trainer was cancelled by somebody else on the cluster")


class Roles:
    """Of run `run_id`; `remark` is told what people should know."""

    def __init__(self, client: distributed.Client, plan: Plan, run_id: str, remark: Callable[[str], None]) -> None:
        self._client, self._plan, self._run_id = client, plan, run_id
        self._watch = Watch(client, plan.config.cluster, plan.assignment, remark)
        self._token = secrets.token_hex(32)  # that shards want to see
        self._shards: list[Any] = []
        self.trainers: list[distributed.Future] = []
        self._handout: Any = None
        self._used: list[Usage] = []  # as last heard

    def start(self, model_path: str, saves_to: str, resume: Resume | None, ledger: Ledger, trains: bool = True) -> None:
        """Create the shards, serve them where a trainer is in another process, and start the trainers.

        saves_to         folder of the checkpoints; "": none
        resume, ledger   where to begin: a checkpoint, or None for the beginning, and what was trained until there
        trains           whether anything is to be trained: otherwise only the test is left
        """
        plan, addresses = self._plan, self.start_shards(resume)
        peers, handout = self._group() if plan.config.trainer.count > 1 else ([], None)
        for number in range(len(plan.assignment.trainers)):
            task = TrainerTask(
                self._run_id, number, addresses, self._token, model_path, peers, handout, saves_to,
                "" if resume is None else resume.url, None if resume is None else resume.state,
                resume is not None and not resume.goes_on, ledger, trains,
            )  # fmt: skip
            self.start_trainer(train, task)

    def start_shards(self, resume: Resume | None) -> list[str]:
        """Create the shards, with their rows of a checkpoint; where each is served, "" where a trainer calls it directly."""
        for future in [self._create(k) for k in range(len(self._plan.assignment.shards))]:
            self._shards.append(self._wait(future))
        if resume is not None:
            self.ask_shards("restore", resume.url, resume.chain, resume.taken)
        if self._plan.assignment.is_one_process:
            return [""] * len(self._shards)
        return self.ask_shards("serve", self._token)

    def start_trainer(self, work: Callable[..., object], task: Any) -> None:
        """Start `work(task, plan)` where the next trainer is to be."""
        number = len(self.trainers)
        offer = self._plan.assignment.trainers[number]
        self.trainers.append(
            self._submit(work, task, self._plan, offer=offer, retries=0, key=f"{TRAINER_KEY}{self._run_id}-{number}")
        )

    @property
    def token(self) -> str:
        """That shards want to see."""
        return self._token

    def _group(self) -> tuple[list[str], Any]:
        """Where the trainers wait for each other, and who gives them partitions."""
        trainers = self._plan.assignment.trainers
        ports = self._run(reserve_port, workers=[offer.address for offer in trainers])
        peers = [f"[{o.host}]:{ports[o.address]}" if ":" in o.host else f"{o.host}:{ports[o.address]}" for o in trainers]
        self._handout = self._wait(self._submit(Handout, offer=trainers[0], actor=True))  # lives as long as this refers to it
        return peers, self._handout

    def lose(self, shards: Sequence[int]) -> bool:
        """Have the trainers wait for these shards, which are lost. Returns whether all of them do."""
        if any(trainer.done() for trainer in self.trainers) or len(self.trainers) < len(self._plan.assignment.trainers):
            return False
        workers = [offer.address for offer in self._plan.assignment.trainers]
        answers = self._run(lose, self._run_id, shards, workers=workers, on_error="return")
        return all(waits is True for waits in answers.values())

    def replace(self, shards: Sequence[int], plan: Plan, resume: Resume | None) -> list[int]:
        """Create these shards anew where `plan` says, with their rows of a checkpoint, and lead the trainers to them.

        Returns of each, of how many samples its rows have not learned.
        """
        self._plan, self._watch.assignment = plan, plan.assignment
        for k, future in [(k, self._create(k)) for k in shards]:
            self._shards[k] = self._wait(future)
        if resume is not None:
            self._ask(shards, "restore", resume.url, resume.chain, resume.taken)
        step = resume.last.step if resume is not None and resume.goes_on else 0
        workers, left_out = [offer.address for offer in plan.assignment.trainers], []
        for k, address in zip(shards, self._ask(shards, "serve", self._token), strict=True):
            left_out.append(sum(self._run(reroute, self._run_id, k, address, step, workers=workers).values()))
        return left_out

    def _create(self, k: int) -> distributed.Future:
        planned = replace(self._plan, build=None)  # a shard has no use for the model, and may lack what it imports
        return self._submit(ShardActor, self._run_id, planned, k, offer=self._plan.assignment.shards[k], actor=True)

    def ask_shards(self, method: str, *arguments: object) -> list[Any]:
        """Call a method of all shards' actors at once; their answers in order."""
        return self._ask(range(len(self._shards)), method, *arguments)

    def _ask(self, shards: Sequence[int], method: str, *arguments: object) -> list[Any]:
        try:
            asked = [getattr(self._shards[k], method)(*arguments) for k in shards]
            return [self._wait(answer) for answer in asked]
        except FlowpsError:
            raise
        except Exception:  # Dask has errors of many kinds for an actor whose worker has gone
            self._raise_loss()
            raise

    def figures(self) -> list[ShardFigures]:
        """What every shard measures of itself. Those that have been lost raise LostRoleError."""
        workers = [offer.name for offer in self._plan.assignment.shards]
        return [msgspec.structs.replace(of, worker=name) for of, name in zip(self.ask_shards("figures"), workers, strict=True)]

    def usage(self) -> list[Usage]:
        """What every process of the run has used, the first trainer's first."""
        workers = self._workers()
        asked = self._ask_workers(usage_here, workers=workers, on_error="ignore")  # `check` tells of one that has gone
        try:
            found = asked.result(timeout=WATCH_S)
        except TimeoutError:  # one of them, perhaps a hub, does not answer
            return self._used
        self._used = list({of.process: of for address in workers if (of := found.get(address)) is not None}.values())
        return self._used

    def trace(self, path: Path) -> str:
        """Write what all roles have traced; returns what to say of it."""
        return collect(self._run, self._run_id, self._workers(), path)

    def _workers(self) -> list[str]:
        """Addresses of all that have a role and are there, the first trainer's first."""
        assignment, there = self._plan.assignment, self._watch.there()
        offers = (*assignment.trainers, *assignment.shards, *assignment.hubs)
        return list(dict.fromkeys(offer.address for offer in offers if offer.address in there))

    def _raise_loss(self) -> None:
        """Raise LostRoleError if a worker has gone; the scheduler may hear of it a little later."""
        deadline = time.monotonic() + _NOTICED_S
        while time.monotonic() < deadline:
            self._watch.check()
            time.sleep(_NOTICED_S / 20)

    def trained(self) -> Trained:
        """What the first trainer has returned, who speaks for all, once all have ended. Raises what any of them has raised."""
        while distributed.wait(self.trainers, timeout=_STOP_S).not_done:
            self._watch.check()
        if any(trainer.status == "error" for trainer in self.trainers):
            self.raise_first()
        return self.trainers[0].result()

    def check(self) -> None:
        """See Watch."""
        self._watch.check()

    def request_stop(self, failed: bool = False) -> None:
        """Ask all trainers to stop after their step; if a role has `failed`, without waiting for each other."""
        there = self._watch.there()
        workers = [offer.address for offer in self._plan.assignment.trainers if offer.address in there]
        if workers:
            self._run(request_stop, self._run_id, failed, workers=workers)

    def go_on(self, step: int) -> None:
        """Let the trainers go on after their cut."""
        workers = [offer.address for offer in self._plan.assignment.trainers]
        self._run(go_on, self._run_id, step, workers=workers, on_error="ignore")  # `check` tells of one that has gone

    def raise_first(self) -> None:
        """Raise the error of the trainer that has failed by itself, not because of another."""
        self._watch.check()
        errors = [trainer.exception() for trainer in self.trainers if trainer.status == "error"]
        raise next((e for e in errors if not isinstance(e, StoppedError | ClusterError)), errors[0] if errors else _CANCELLED)

    def stop(self) -> None:
        """End trainers that still run, because something else has failed: nothing may be taken from under them."""
        there = self._watch.there()
        trainers = zip(self.trainers, self._plan.assignment.trainers, strict=False)
        running = [trainer for trainer, offer in trainers if not trainer.done() and offer.address in there]
        if running:
            for shard in self._shards:
                with suppress(Exception):  # it may be what has failed
                    shard.release().result(timeout=WATCH_S)
            with suppress(Exception):  # one does not answer, or has gone
                self.request_stop(failed=True)
            with suppress(TimeoutError):  # one is stuck: the error that ended the run matters more
                distributed.wait(running, timeout=_STOP_S)

    def close(self) -> None:
        """Give the shards' memory back, and let nothing of this attempt be started anew by Dask."""
        with suppress(Exception):
            self._client.cancel(self.trainers, force=True)
            self._ask_workers(forget, self._run_id, workers=self._workers(), on_error="ignore").result(timeout=WATCH_S)
        for shard in self._shards:
            with suppress(Exception):  # the error that ends the run is the one to show
                shard.close().result(timeout=_STOP_S)

    def _submit(self, function: Callable[..., object], *arguments: object, offer: Offer, **how: Any) -> distributed.Future:
        return self._client.submit(function, *arguments, workers=[offer.address], allow_other_workers=False, pure=False, **how)

    def _run(self, function: Callable[..., object], *arguments: object, workers: Sequence[str], on_error: str = "raise") -> Any:
        """Call a function on workers; by worker what it returned. As `Client.run`, as long as all that have a role are there."""
        return self._wait(self._ask_workers(function, *arguments, workers=workers, on_error=on_error))

    def _ask_workers(
        self, function: Callable[..., object], *arguments: object, workers: Sequence[str], on_error: str
    ) -> Future[dict[str, Any]]:
        """Answers that may be waited for with a deadline: `Client.run` waits for a worker that hangs for as long as it does."""
        answers: Future[dict[str, Any]] = Future()

        def ask() -> None:
            try:
                answers.set_result(self._client.run(function, *arguments, workers=workers, on_error=on_error))
            except BaseException as error:  # handed over whole
                answers.set_exception(error)

        threading.Thread(target=ask, name="flowps-ask", daemon=True).start()
        return answers

    def _wait(self, future: Any) -> Any:
        """The result of something that runs on a worker, as long as all workers are there."""
        while True:
            try:
                return future.result(timeout=WATCH_S)
            except TimeoutError:
                self._watch.check()
