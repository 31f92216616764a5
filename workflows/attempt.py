"""One attempt: a slot's way through the steps, each of which is done once, however often the command is killed and begun again.

    files      which files are trained, by content; those that another slot was published with are left out
    check      what the samples are like, beside the last accepted slots
    preview    how good the live model is on the slot, before it is trained on it
    train      on from the live model's checkpoint
    evaluate   the new model and the live one on the fixed set
    judge      the gate
    publish    a bundle, its record, and last of all `current`; or reject
    prune      what nobody needs any more

What a step found is in the ledger before the next one begins. Who is live decides everything: if that changes meanwhile, by hand,
the attempt is superseded, and the slot begins anew. Called by one thread, under the pipeline's lease.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import pyarrow as pa
from rich.console import Console

from flowps.checkpoint.manifest import newest_valid
from flowps.checkpoint.store import Store
from flowps.cluster.resume import place_of
from flowps.cluster.trained_run import TrainedRun, open_run
from flowps.config import Config
from flowps.errors import CheckpointError, ConfigError, DataError, FlowpsError, ModelError, RunDirError
from flowps.evaluate import evaluate
from flowps.export import export
from flowps.hub.partition import SampleFile, list_files
from flowps.hub.schema import matches
from flowps.quality import Quality
from flowps.run_record import read_run
from flowps.status.progress import PlainConsole
from flowps.train import train
from workflows.check import Profile, complaints, profile
from workflows.gate import Verdict, judge
from workflows.ledger import Attempt, Lease, Ledger, TrainedFile
from workflows.pipeline import Read, glob_of
from workflows.report import FIGURES, cell, page
from workflows.slots import File
from workflows.store import Record, Registry


class Files(msgspec.Struct, frozen=True):
    """What is trained: `urls`. left_out: url → why a file is not."""

    urls: list[str]
    rows: int
    left_out: dict[str, str]


class Checked(msgspec.Struct, frozen=True):
    """`against`: what speaks against training on the slot."""

    profile: Profile
    against: list[str]


class Trained(msgspec.Struct, frozen=True):
    """Where the new model is."""

    run: str
    checkpoint: str
    examples: int


class Compared(msgspec.Struct, frozen=True):
    """On the fixed set."""

    new: Quality
    live: Quality | None


@dataclass(frozen=True)
class Around:
    """What attempts of a pipeline work with. `tell`: of something that happened, for `notify`."""

    read: Read
    ledger: Ledger
    registry: Registry
    lease: Lease
    console: Console
    tell: Callable[[str, dict[str, Any]], None]

    def say(self, text: str) -> None:
        """A line for people."""
        self.console.print(text, soft_wrap=True)

    @property
    def runs(self) -> Path:
        """Folder of run directories."""
        return self.read.state / "runs"

    def run_of(self, version: int) -> TrainedRun:
        """The run of a published model. Raises RunDirError where it is not here."""
        record = self.registry.record(version)
        if not Path(record.run).is_dir():
            raise RunDirError(
                f"model {version} was trained in {record.run}, which is not here; retraining goes on from that run's checkpoint: "
                "bring it back, or roll back to a model whose run is here"
            )
        return open_run(Path(record.run), (), record.checkpoint, self.say)


def go(around: Around, attempt: Attempt, found: Sequence[File]) -> Attempt:
    """Take an attempt to its end; it may have come some way before.

    found   the files of its slot that are to be trained, of an attempt that has not taken them yet

    Raises FlowpsError for what another start may mend: the attempt stays where it was.
    """
    return _Way(around, attempt).go(found)


class _Way:
    def __init__(self, around: Around, attempt: Attempt) -> None:
        self._around, self._attempt, self._ledger = around, attempt, around.ledger
        self._run_dir = around.runs / attempt.name

    def go(self, found: Sequence[File]) -> Attempt:
        around, attempt = self._around, self._attempt
        if self._was_published:
            return self._published()
        if around.registry.live() != attempt.base and not self._is_noted:
            return self._supersede()
        try:
            files = self._once("files", Files, lambda: self._files(found))
            for url, why in files.left_out.items():
                around.say(f"{attempt.slot}: {url} is left out: {why}")
            if not files.rows:
                why = "; ".join(dict.fromkeys(files.left_out.values())) or "it has no rows"
                return self._end("skipped", f"nothing to train: {why}")
            checked = self._once("check", Checked, lambda: self._check(files))
            if checked.against:
                return self._reject(checked.against)
            preview = self._once("preview", Quality | None, lambda: self._preview(files))
            if preview is not None:
                around.say(f"{attempt.slot}: live model {attempt.base} on the slot, before it is trained: {_shown(preview)}")
            trained = self._once("train", Trained, lambda: self._train(files))
            compared = self._once("evaluate", Compared, lambda: self._evaluate(trained))
        except (DataError, ModelError) as error:
            if _may_pass(error) and not self._has_failed_before(error):
                raise
            return self._reject([f"{type(error).__name__}: {error}"])
        verdict = self._once("judge", Verdict, lambda: judge(compared.new, compared.live, around.read.pipeline.gate))
        for reason in verdict.reasons:
            around.say(f"{attempt.slot}: {reason}")
        if not verdict.accepted:
            return self._reject(verdict.reasons)
        return self._publish(checked, preview, trained, compared, verdict)

    def _has_failed_before(self, error: FlowpsError) -> bool:
        """Whether an error like this one ended a start before this one; it is noted for the next."""
        before = self._ledger.result(self._attempt, "failed") is not None
        self._ledger.done(self._attempt, "failed", {"of": str(error)}, 0.0)
        return before

    def _once(self, step: str, of: Any, work: Callable[[], Any]) -> Any:
        """What a step has found, now or before."""
        found = self._ledger.result(self._attempt, step)
        if found is not None:
            return msgspec.convert(found["of"], of)
        self._around.lease.check()
        start = time.perf_counter()
        result = work()
        self._around.lease.check()
        self._ledger.done(self._attempt, step, {"of": msgspec.to_builtins(result)}, time.perf_counter() - start)
        return result

    # --- steps --------------------------------------------------------------------------------------------------------

    def _files(self, found: Sequence[File]) -> Files:
        if not found:
            return Files([], 0, {})
        # Before they are read: a slot that is rejected for one that is broken must not be due again for it.
        self._ledger.take(self._attempt, [TrainedFile(file.url, file.size, file.modified, "", 0) for file in found])
        listed = {file.url: file for file in _listed([file.url for file in found])}
        taken, urls, left_out = list[TrainedFile](), list[str](), dict[str, str]()
        seen: dict[str, str] = {}
        for file in found:
            of = listed[file.url]
            taken.append(TrainedFile(file.url, file.size, file.modified, of.digest, of.num_rows))
            twin = seen.get(of.digest) or self._ledger.twin(of.digest, self._attempt.slot if self._attempt.kind == "again" else "")
            if of.num_rows and twin and _same(twin, file.url):
                left_out[file.url] = f"it has the content of {twin}"
            elif of.num_rows:
                urls.append(file.url)
                seen[of.digest] = file.url
        self._ledger.take(self._attempt, taken)
        return Files(urls, sum(listed[url].num_rows for url in urls), left_out)

    def _check(self, files: Files) -> Checked:
        knobs, base = self._around.read.pipeline.validate, self._attempt.base
        run = self._around.run_of(base) if base else None
        listed = run.files(files.urls) if run is not None else _listed(files.urls)
        found = profile(listed, self._around.read.config.data, run, knobs.sample_rows)
        results = self._ledger.last_results("check", "published", knobs.history)
        history = [msgspec.convert(result["of"], Checked).profile for result in results]
        return Checked(found, complaints(found, history, knobs, is_whole=self._attempt.kind != "more"))

    def _preview(self, files: Files) -> Quality | None:
        if not self._attempt.base:
            return None
        return self._quality(self._around.run_of(self._attempt.base), files.urls)

    def _train(self, files: Files) -> Trained:
        around = self._around
        if not self._has_finished:
            log = around.read.state / "logs" / f"{self._attempt.name}.log"
            log.parent.mkdir(exist_ok=True)
            around.say(f"{self._attempt.slot}: training on {files.rows:,} samples; {log} has what the run says")
            with log.open("a", encoding="utf-8") as file:
                train(self._config(files), PlainConsole(file=file))
        ending = read_run(self._run_dir).ending
        assert ending is not None, "train has returned"
        return Trained(str(self._run_dir), ending.checkpoint, ending.finished.examples)

    def _config(self, files: Files) -> Config:
        """The run of this slot. One that was begun goes on."""
        config, base = self._around.read.config, self._attempt.base
        warm_start, exclude = "", config.data.exclude
        if base:
            live = self._around.run_of(base)
            warm_start = f"{live.resume.url}/{live.resume.last.name}"
            exclude += tuple(glob_of(name) for name in self._new_columns(live, files))
        url = config.checkpoint.url and f"{config.checkpoint.url.rstrip('/')}/{self._attempt.name}"
        begun = msgspec.structs.replace(
            config,
            data=msgspec.structs.replace(config.data, train=tuple(files.urls), exclude=exclude),
            checkpoint=msgspec.structs.replace(config.checkpoint, url=url),
            run_dir=str(self._run_dir),
        )
        goes_on = _has_checkpoint(Store(place_of(begun, self._run_dir)))
        return msgspec.structs.replace(begun, **({"resume": True} if goes_on else {"warm_start": warm_start}))

    def _new_columns(self, live: TrainedRun, files: Files) -> list[str]:
        """The columns that the live model was not trained on: a model with other inputs is for a new pipeline to begin."""
        config, columns = self._around.read.config.data, _listed(files.urls)[0].columns
        known = live.columns | {config.sample_weight}
        new = [name for name in columns if name not in known and not matches(name, config.exclude)]
        if new:
            self._around.say(f"{self._attempt.slot}: left out, for the live model does not know them: columns {', '.join(new)}")
        return new

    def _evaluate(self, trained: Trained) -> Compared:
        fixed, base = self._around.read.pipeline.gate.fixed, self._attempt.base
        new = open_run(Path(trained.run), (), trained.checkpoint, self._around.say)
        try:
            live = self._quality(self._around.run_of(base), fixed) if base else None
            return Compared(self._quality(new, fixed), live)
        except DataError as error:  # no fault of the slot
            raise ConfigError(f"gate.fixed: {error}") from error

    def _quality(self, run: TrainedRun, data: Sequence[str]) -> Quality:
        found = evaluate(run, data, console=PlainConsole(file=io.StringIO()))
        return found[self._around.read.config.data.label]

    def _publish(
        self, checked: Checked, preview: Quality | None, trained: Trained, compared: Compared, verdict: Verdict
    ) -> Attempt:  # fmt: skip
        around, registry = self._around, self._around.registry
        if registry.live() != self._attempt.base:
            return self._supersede()
        self._attempt = self._ledger.reserve(self._attempt, registry.next_version())
        staging = around.read.state / "staging"
        shutil.rmtree(staging, ignore_errors=True)
        bundle = export(Path(trained.run), staging, around.read.pipeline.publish.dtype)
        record = Record(
            version=self._attempt.version, created=time.time(), attempt=self._attempt.id, slot=self._attempt.slot,
            kind=self._attempt.kind, parent=self._attempt.base, run=trained.run, checkpoint=trained.checkpoint,
            examples=trained.examples, pipeline=str(around.read.path), quality=compared.new, live=compared.live,
            preview=preview, profile=msgspec.to_builtins(checked.profile), reasons=verdict.reasons,
        )  # fmt: skip
        around.lease.check()
        registry.put(bundle.folder, record, page(record, self._history(), bundle.manifest))
        around.lease.check()
        if registry.live() != self._attempt.base:
            return self._supersede()
        registry.promote(record.version, "published")
        return self._published()

    # --- ends ---------------------------------------------------------------------------------------------------------

    @property
    def _is_noted(self) -> bool:
        """Whether the last promotion that was noted is this attempt's, though it may not have been done."""
        history = self._around.registry.promotions() if self._attempt.version else []
        return bool(history) and history[-1].version == self._attempt.version

    @property
    def _was_published(self) -> bool:
        """Whether the model went live, though the ledger may not know, and something else may be live since."""
        version, registry = self._attempt.version, self._around.registry
        if not version or all(of.version != version for of in registry.promotions()):
            return False
        return not self._is_noted or registry.live() == version

    def _published(self) -> Attempt:
        version, registry = self._attempt.version, self._around.registry
        ended = self._end("published", f"as model {version}")
        self._tell("published", version=version, quality=msgspec.to_builtins(registry.record(version).quality),
                   report=registry.report_place(version))  # fmt: skip
        shutil.rmtree(self._around.read.state / "staging", ignore_errors=True)
        return ended

    def _supersede(self) -> Attempt:
        """The live model was changed by hand: this one was neither trained on from it nor compared with it."""
        live = self._around.registry.live()
        return self._end("superseded", f"model {live} became live, in place of {self._attempt.base}, while this one was trained")

    def _reject(self, reasons: Sequence[str]) -> Attempt:
        """Keep the live model, and what speaks against the new one."""
        folder = self._around.read.state / "evidence"
        folder.mkdir(parents=True, exist_ok=True)
        steps = {step: {"seconds": seconds, **result} for step, (seconds, result) in self._ledger.steps(self._attempt).items()}
        evidence = {"attempt": msgspec.to_builtins(self._attempt), "reasons": list(reasons), "steps": steps}
        path = folder / f"{self._attempt.name}.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(evidence)) + b"\n")
        ended = self._end("rejected", "; ".join(reasons))
        self._tell("rejected", reasons=list(reasons), evidence=str(path), live=self._around.registry.live())
        return ended

    def _end(self, status: Any, why: str) -> Attempt:
        self._around.lease.check()
        self._attempt = self._ledger.end(self._attempt, status, why)
        self._around.say(f"{self._attempt.slot}: {status}: {why}")
        return self._attempt

    def _tell(self, event: str, **fields: Any) -> None:
        of = self._attempt
        self._around.tell(event, {"slot": of.slot, "kind": of.kind, "attempt": of.id, **fields})

    @property
    def _has_finished(self) -> bool:
        """Whether the run was trained to its end, though the ledger may not know."""
        try:
            ending = read_run(self._run_dir).ending
        except RunDirError:
            return False
        return ending is not None and not ending.finished.stopped

    def _history(self) -> list[Record]:
        """Of the models before, the newest last."""
        versions = self._around.registry.versions()[-60:]
        return [self._around.registry.record(version) for version in versions]


def prune(around: Around) -> None:
    """Delete models beyond publish.keep, and the run directories and checkpoints of those that are gone."""
    registry, pipeline = around.registry, around.read.pipeline
    gone = registry.prune(pipeline.publish.keep)
    needed = {Path(registry.record(version).run).name for version in registry.kept()}
    ended = [attempt for attempt in around.ledger.attempts() if attempt.status != "running"]
    recent = {attempt.name for attempt in ended[-pipeline.keep_runs :]}
    url = around.read.config.checkpoint.url
    for attempt in ended:
        path = around.runs / attempt.name
        if attempt.name in recent or attempt.name in needed:
            continue
        if path.exists():
            shutil.rmtree(path)
        if url:
            Store(url).delete(attempt.name)
    if gone:
        around.say(f"models {', '.join(map(str, gone))} are deleted: publish.keep is {pipeline.publish.keep}")


def _may_pass(error: FlowpsError) -> bool:
    """Whether another start may find the samples readable: a store did not answer, a file was just being replaced.

    What is wrong with the samples themselves has no cause but Arrow's refusal to read them.
    """
    cause = error.__cause__
    said = str(error)
    is_arrows = isinstance(cause, pa.ArrowException)
    return (cause is not None and not is_arrows) or (not is_arrows and "cannot be read: " in said) or "has gone since" in said


def _has_checkpoint(store: Store) -> bool:
    """Whether there is one to go on from. What a killed run has left of one is none."""
    try:
        newest_valid(store, lambda text: None)
    except CheckpointError:
        return False
    return True


def _listed(urls: Sequence[str]) -> list[SampleFile]:
    """As `list_files`; files without rows are no error."""
    return list_files(urls, "partitions.root", allow_empty=True)


def _same(one: str, other: str) -> bool:
    """Whether two files have the same content, byte for byte; not if one of them cannot be read any more."""
    try:
        return _hash(one) == _hash(other)
    except OSError:
        return False


def _hash(url: str) -> bytes:
    with fsspec.open(url, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _shown(quality: Quality) -> str:
    return ", ".join(f"{name} {cell(quality, key, form)}" for name, key, form in FIGURES)
