"""The command line of a run: `[run.toml] [--section.key value …]`, and its `--help`, both made from the list of `knob`."""

from __future__ import annotations

import argparse
import io
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NoReturn

from flowps.config import Config, Slot, SlotDefault
from flowps.errors import ConfigError, FlowpsError, StoppedError
from flowps.knob import Knob, closest, knobs, load, slot_knob
from flowps.version import __version__

_SLOT_HELP = """\
In a TOML file, [[slot]] entries set what differs for one column from [slot_default]:

    [[slot]]
    name = "user_id"
    dim = 32
    capacity_rows = 5_000_000

On the command line: --slot.user_id.dim 32. Every knob of [slot_default] can be set so, and
what only a slot has:
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse like every other bad input, without the page of usage."""
        raise ConfigError(f"{message}; --help lists all knobs")


def parse(command: str, description: str, argv: Sequence[str]) -> Config:
    """The run that `argv` describes. `--help` and `--version` print and exit; anything wrong raises ConfigError."""
    parser = _Parser(command, description=description, epilog=_slot_help(), formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False, usage=f"{command} [run.toml] [--section.key value ...]")  # fmt: skip
    parser.add_argument("toml", nargs="?", type=Path, metavar="run.toml", help="a run's description; knobs below override it")
    parser.add_argument("--version", action="version", version=f"flowps {__version__}")
    argv = [_underscored(arg) for arg in argv]
    _add_knobs(parser, chain(knobs(), _slot_knobs(argv)))
    found, unknown = parser.parse_known_args(_joined(argv))
    if unknown:
        name = unknown[0].split("=")[0]
        known = [f"--{knob.path}" for knob in knobs()]
        what = "no such knob" if name.startswith("-") else "one TOML file at most, before the knobs; did you mean it for a knob?"
        raise ConfigError(f"{name}: {what}{closest(name, known) if name.startswith('-') else ''}")
    values = vars(found)
    toml = values.pop("toml")
    return load(toml, [(path, _as_list(value)) for path, value in values.items()])


class CommandParser(_Parser):
    """Of a command that takes up a run: arguments of its own, and those of a run's knobs that it lets be other than in training.

    wanted   which knobs
    """

    def __init__(self, command: str, description: str, wanted: Callable[[str], bool]) -> None:
        super().__init__(command, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self._command = command
        self.add_argument("--version", action="version", version=f"flowps {__version__}")
        self._wanted = wanted

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, list[str]]]]:
        """The command's own arguments, and the knobs as `load` takes them. Raises ConfigError for anything else."""
        taken = {knob.path: knob for knob in knobs() if self._wanted(knob.path)}
        self.usage = f"{self._command} {' '.join(map(_use, self._actions[2:]))} [--section.key value ...]"
        _add_knobs(self, taken.values())
        found, unknown = self.parse_known_intermixed_args(_joined([_underscored(arg) for arg in argv]))
        if unknown:
            name = next((arg for arg in unknown if arg.startswith("-")), unknown[0]).split("=")[0]
            all_knobs = {knob.path for knob in knobs()}
            if name[2:] in all_knobs or name.startswith("--slot."):
                raise ConfigError(f"{name}: belongs to the trained model, and cannot be other than in the run")
            own = [option for action in self._actions for option in action.option_strings]
            raise ConfigError(f"{name}: no such option{closest(name, own)}")
        overrides = [(path, _as_list(value)) for path, value in vars(found).items() if path in taken]
        return found, overrides


def run_command(work: Callable[[], object]) -> int:
    """Do the work of a command that only reads runs: its exit status; errors for people are one line on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a slot's name may hold what the terminal cannot show
    try:
        work()
    except FlowpsError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return StoppedError.exit_code
    return 0


def _use(action: argparse.Action) -> str:
    """An argument of a command as its usage shows it."""
    name = action.metavar if isinstance(action.metavar, str) else ""
    many = {"+": f"{name} [{name} ...]"}.get(str(action.nargs), name)
    return f"[{' '.join(filter(None, [action.option_strings[0], many]))}]" if action.option_strings else many


def _add_knobs(parser: argparse.ArgumentParser, wanted: Iterable[Knob]) -> None:
    """Options for these knobs, by section."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for knob in wanted:
        section = knob.path.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(f"[{section}]" if section else "the run")
        groups[section].add_argument(f"--{knob.path}", dest=knob.path, nargs=_arity(knob), metavar=_metavar(knob),
                                     help=_help(knob), default=argparse.SUPPRESS)  # fmt: skip


def _slot_knobs(argv: Sequence[str]) -> Iterator[Knob]:
    """The knobs of single slots that `argv` sets: which there are, only the data knows."""
    for path in dict.fromkeys(arg[2:].partition("=")[0] for arg in argv if arg.startswith("--slot.")):
        if (knob := slot_knob(path)) is not None:
            yield knob


def _slot_help() -> str:
    """The end of `--help`: how a slot is described."""
    keys = [key for key in Slot.__struct_fields__ if key not in SlotDefault.__struct_fields__]
    own = [knob for key in keys if (knob := slot_knob(f"slot.NAME.{key}")) is not None]
    shown = [textwrap.fill(_help(k), 90, initial_indent=" " * 8, subsequent_indent=" " * 8) for k in own]
    return "\n".join([_SLOT_HELP, *(f"    --{k.path} {_metavar(k)}\n{text}" for k, text in zip(own, shown, strict=True))])


def _arity(knob: Knob) -> str | None:
    if knob.is_list:
        return "*"
    return "?" if knob.is_bool else None


def _metavar(knob: Knob) -> str:
    return {bool: "true|false", int: "N", float: "X"}.get(type(knob.default), "TEXT")


def _help(knob: Knob) -> str:
    default = " ".join(map(str, knob.default)) if knob.is_list else str(knob.default).lower() if knob.is_bool else str(knob.default)
    bounds = f"; {knob.range}" if knob.range else ""
    return f"{knob.description} (default: {default or 'none'}{bounds})".replace("%", "%%")


def _underscored(arg: str) -> str:
    """`--data.batch-size` is `--data.batch_size`; a slot's name stays as it is."""
    if not arg.startswith("--"):
        return arg
    option, equals, value = arg.partition("=")
    of_slot, dot, key = option.rpartition(".") if option.startswith("--slot.") else ("", "", option[2:])
    return f"{of_slot or '--'}{dot}{key.replace('-', '_')}{equals}{value}"


def _joined(argv: list[str]) -> list[str]:
    """`--knob -1e5` as `--knob=-1e5`: argparse takes negative numbers with an exponent for options."""
    joined: list[str] = []
    for arg in argv:
        if re.fullmatch(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", arg) and joined and re.fullmatch(r"--[^=]+", joined[-1]):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined


def _as_list(value: str | list[str] | None) -> list[str]:
    if value is None:  # a switch without a value
        return ["true"]
    return value if isinstance(value, list) else [value]
