"""Train a CTR model: `python -m flowps.train [run.toml] [--section.key value ...]`.

Plans the run (files, schema, memory), starts the cluster, watches the training, evaluates, and leaves a run directory.
Exit status: 0 trained, 2 a bad config, 1 bad data or a failed run, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import io
import os
import sys
import tomllib
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import chain, count
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
from rich.console import Console

from flowps.arguments import parse
from flowps.checkpoint.ledger import Ledger
from flowps.cluster import tracing
from flowps.cluster.announce import announce_plan, announce_result
from flowps.cluster.dashboard.show import show_run
from flowps.cluster.interrupt import interruptible
from flowps.cluster.launch import gather_anew, gather_workers, launch
from flowps.cluster.plan import Plan, plan
from flowps.cluster.prometheus import serve_runs
from flowps.cluster.resume import Resume, choose, find, place_of, prepare
from flowps.cluster.run import Result, Start, run
from flowps.cluster.run_dir import RunDir
from flowps.config import GIVEN, Config
from flowps.errors import ConfigError, FlowpsError, RunDirError, StoppedError
from flowps.knob import from_mapping
from flowps.status.json_lines import JsonConsole, JsonDisplay, json_line
from flowps.status.progress import Display, PlainConsole
from flowps.version import __version__


def train(
    config: Config | Mapping[str, Any], console: Console | None = None, *, model: Callable[[Any], Any] | None = None
) -> Result:  # fmt: skip
    """Train as `config` says, a Config or nested mappings like a TOML file's, telling `console` (stdout by default) about it.

    model   a function from a ModelSpec to a keras.Model, or a Keras model whose Embedding layers are to give way to slots
            (`flowps.from_keras`); None: the one that config.model names

    Raises FlowpsError for everything that a user can mend.
    """
    config = config if isinstance(config, Config) else from_mapping(config)
    build = None if model is None else as_function(model)
    if build is not None:
        config = msgspec.structs.replace(config, model=name_of(build))
    as_json = config.log_format == "json"
    console = console or (JsonConsole() if as_json else PlainConsole())
    if config.tensorboard and "://" not in config.tensorboard:  # workers are elsewhere
        config = msgspec.structs.replace(config, tensorboard=os.path.abspath(config.tensorboard))
    console.print(f"flowps {__version__}")
    with interruptible(as_json) as interrupts, launch(config) as (client, dashboard):

        def say(text: str) -> None:
            console.print(text, soft_wrap=True)

        def plan_on(resume: Resume | None) -> Plan:
            return replace(plan(config, gather_workers(client, config, say, lambda: bool(interrupts)), resume), build=build)

        def plan_shards(planned: Plan, lost: Sequence[int]) -> Plan:
            anew = gather_anew(client, config, planned.assignment, lost, say, lambda: bool(interrupts))
            return replace(planned, assignment=anew)

        serve_runs(client, say)
        resume = find(config, say)
        planned = plan_on(resume)
        resume = resume and choose(resume, planned.schema, say)
        announce_plan(console, planned)
        console.print(f"dashboard: {dashboard or 'off'}", soft_wrap=True)
        if resume is not None:
            where = f"{resume.url}/{resume.last.name}: step {resume.last.step:,}"
            say(
                f"going on from {where}, {resume.ledger.explain()}"
                if resume.goes_on
                else f"beginning with rows and weights of {where}"
            )
        recovery = config.checkpoint.recovery if config.cluster.has_processes else "none"
        start = Start(
            resume=resume,
            again=None if recovery == "none" else plan_on,
            replace=plan_shards if recovery == "partial" else None,
        )
        return _train(client, dashboard, planned, console, interrupts, start)


def _train(
    client: Any, dashboard: str, planned: Plan, console: Console, interrupts: list[int], start: Start
) -> Result:  # fmt: skip
    config, knobs, resume = planned.config, planned.config.checkpoint, start.resume
    # Absolute: workers are elsewhere.
    run_dir = RunDir(_run_dir_path(config).absolute())
    with closing(run_dir):
        if config.trace:
            tracing.prepare(Path(config.trace).absolute())
        anew = msgspec.structs.replace(config, resume=False, resume_from="", warm_start="")  # run again, it begins at the beginning
        url = place_of(config, run_dir.path)
        # Also where one of its own checkpoints was named: it must not be put aside with the rest.
        if run_dir.prepare(anew, planned.schema, goes_on=resume is not None and (config.resume or resume.url == url)):
            console.print(
                f"{run_dir.path} held an earlier run with this schema; it is in {run_dir.previous} until this one has finished",
                soft_wrap=True,
            )
        live = config.status.progress == "live" or (config.status.progress == "auto" and console.is_terminal)
        shows = (
            JsonDisplay(console) if isinstance(console, JsonConsole) else Display(console, live, config.epochs, planned.train_rows)
        )
        with shows as display:
            saves_to = url if knobs.is_on else ""
            if saves_to:
                goes_on = resume is not None and resume.goes_on
                prepare(saves_to, resume if goes_on else None, is_newest=config.resume and not config.resume_from)
            start = replace(start, saves_to=saves_to)
            ledger = Ledger() if resume is None else resume.ledger
            with show_run(client, dashboard, planned, run_dir.path, ledger, partial(console.print, soft_wrap=True)) as shown:
                result = run(client, planned, run_dir, [run_dir.record, display, shown], lambda: bool(interrupts), start)
                shown.conclude(result.ledger)
        run_dir.finish(result.summary(planned))
        announce_result(console, planned, result, run_dir)
        if not result.ledger.adds_up:
            raise FlowpsError(f"{result.ledger.explain()}; this is a bug of flowps: please report it with {run_dir.path}")
        if result.finished.stopped:
            raise StoppedError(
                f"stopped by a signal after {result.finished.examples:,} examples; what was trained is in {run_dir.path}"
            )
    return replace(result, run_dir=str(run_dir.path))


def _run_dir_path(config: Config) -> Path:
    """The directory asked for, or a new one, created at once so that no other run of this second takes it."""
    if config.run_dir:
        return Path(config.run_dir)
    first = Path(f"runs/{datetime.now():%Y%m%d-%H%M%S}")
    for path in chain([first], (first.with_name(f"{first.name}-{n}") for n in count(2))):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise RunDirError(
                f"run directory {path}: cannot be written: {error.strerror or error}; choose another with --run_dir"
            ) from None
        return path
    raise AssertionError("the names do not end")


def as_function(model: Any) -> Callable[[Any], Any]:
    """The function that builds a model. Raises ConfigError for what is neither a function nor a Keras model."""
    if hasattr(model, "layers"):  # a Keras model; TensorFlow takes seconds to import, and it has been
        from flowps.trainer.models.from_keras import from_keras

        return from_keras(model)
    if not callable(model):
        raise ConfigError(f"model: expected a function from a ModelSpec to a keras.Model, or a keras.Model, found {model!r}")
    return model


def name_of(function: Callable[[Any], Any]) -> str:
    """How a function can be named in a run's config: "module:function" if it can be imported by that."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__name__", type(function).__name__)
    importable = module not in ("", "__main__") and getattr(sys.modules.get(module), name, None) is function
    return f"{module}:{name}" if importable else f"{name.replace(':', '_')}{GIVEN}"


class _Command(ModuleType):
    """This module, which `python -m flowps.train` runs, is also the function: `flowps.train(config)`."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Result:
        return train(*arguments, **keywords)


sys.modules[__name__].__class__ = _Command


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a column's name may hold what the terminal cannot show
    argv = sys.argv[1:] if argv is None else argv
    as_json = _wants_json(argv)  # also of a command line that is refused
    try:
        config = parse("python -m flowps.train", __doc__ or "", argv)
        as_json = config.log_format == "json"
        train(config)
    except FlowpsError as error:
        return _fail(error, " ".join(str(error).split()), error.exit_code, as_json)
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted before training began", StoppedError.exit_code, as_json)
    except Exception as error:
        if not as_json:
            raise
        return _fail(error, f"{error!r}; this is a bug of flowps", 1, as_json, traceback=traceback.format_exc())
    return 0


def _fail(error: BaseException, message: str, status: int, as_json: bool, **fields: object) -> int:
    """Say why the run has failed; returns the exit status."""
    said = f"error: {message}"
    print(json_line("error", type(error).__name__, said, exit_status=status, **fields) if as_json else said, file=sys.stderr)
    return status


def _wants_json(argv: Sequence[str]) -> bool:
    """Whether the command line or its TOML file says log_format = json, as far as they can be read."""
    if "--log_format json" in " ".join(argv).replace("=", " ").replace("--log-format", "--log_format"):
        return True
    with suppress(OSError, ValueError):
        return any(tomllib.loads(Path(word).read_text()).get("log_format") == "json" for word in argv if word.endswith(".toml"))
    return False


if __name__ == "__main__":
    sys.exit(main())
