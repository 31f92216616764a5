"""`python -m bench.compare OLD NEW [--threshold 0.1] [--json FILE] [--fail-on-regression]`: two sets of results side by side.

OLD and NEW are result files of one benchmark, or two folders of them, such as `bench/results` of two checkouts; of folders, files
of the same name are compared. Every number that both have is shown with NEW / OLD. Items of a list are matched by what they say
they are of (their texts, and fields such as "threads"), otherwise by their place. What a run was told or promised (machine,
versions, targets, knobs, …) is no figure; whether machines and versions are the same is said first: where they are not, ratios say
little.

A figure is worse when it went in the wrong direction by more than the threshold's share of OLD. The direction is known from its
name, or from the name of what holds it; a name that says none is shown without a judgement, as are single runs, floors and what
belongs to rivals. Exit status: 0; 1 with --fail-on-regression if something is worse; 2 where nothing can be compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import operator
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_NO_FIGURES = {"machine", "versions", "counted", "target", "targets", "knobs", "left_out"}
_OF = ("threads", "callers", "batch_signs", "in_flight", "feed_threads", "tensorflow_threads", "size", "slots", "shards", "step")
"""Numbers that say what an item of a list is of; so do its texts, its yes and no, and "rows" where it has no text."""
_UNJUDGED = re.compile(r"^(runs|rounds|points|rivals|used|every_s)$|floor|^raw_|^echo|^protobuf|contender=(?!flowps)")
_HIGHER = re.compile(r"per_s$|auc$|speed_up|throughput|bandwidth")
_LOWER = re.compile(r"_(s|ms|us|ns)(_p\d+)?$|^(ms|ns|seconds)(_p\d+)?$|_(ms|ns|s)_per_|bytes|cpu|wait|^(lookup|push)_ratio$")


def figures_of(result: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """The numbers of a result, and where each stands."""
    if isinstance(result, dict):
        for key, value in result.items():
            if key not in _NO_FIGURES:
                yield from figures_of(value, (*path, key))
    elif isinstance(result, list):
        seen: dict[str, int] = {}
        for place, item in enumerate(result):
            told = _identity(item) if isinstance(item, dict) else {}
            name = ", ".join(f"{key}={value}" for key, value in told.items()) or f"#{place}"
            seen[name] = seen.get(name, 0) + 1
            label = name if seen[name] == 1 else f"{name} #{seen[name]}"
            rest = {key: value for key, value in item.items() if key not in told} if told else item
            yield from figures_of(rest, (*path, label))
    elif isinstance(result, (int, float)) and not isinstance(result, bool):
        yield path, float(result)


def _identity(item: Mapping[str, Any]) -> dict[str, Any]:
    told = {key: value for key, value in item.items() if isinstance(value, (str, bool)) or key in _OF}
    if "rows" in item and not any(isinstance(value, str) for value in told.values()):
        told["rows"] = item["rows"]
    return told


def direction(path: tuple[str, ...]) -> str | None:
    """Which of two figures is the better one, "higher" or "lower"; None: the names do not say."""
    if path == ("seconds",) or any(_UNJUDGED.search(name) for name in path):  # an option, or what is no figure of flowps
        return None
    for name in reversed(path):
        for better, names in (("higher", _HIGHER), ("lower", _LOWER)):
            if names.search(name):
                return better
    return None


def surroundings(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a result was made on, with and of: names and values."""
    machine = dict(result.get("machine") or {})
    versions = {**machine.pop("versions", {}), **(result.get("versions") or {})}
    return machine | versions | ({"knobs": result["knobs"]} if "knobs" in result else {}) | _identity(result)


def compare(old: Mapping[str, Any], new: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """What differs between results, by file name; `old` and `new` need not have the same ones."""
    figures: list[dict[str, Any]] = []
    differ: list[dict[str, Any]] = []
    unknown: list[str] = []
    only: dict[str, list[str]] = {"old": sorted(old.keys() - new.keys()), "new": sorted(new.keys() - old.keys())}
    for file in sorted(old.keys() & new.keys()):
        made = [surroundings(of[file]) for of in (old, new)]
        unknown += [file] if not all(of[file].get("machine") for of in (old, new)) else []
        for name in dict.fromkeys([*made[0], *made[1]]):
            values = [of.get(name) for of in made]
            if values[0] != values[1]:
                differ.append({"file": file, "what": name, "old": values[0], "new": values[1]})
        before, after = dict(figures_of(old[file])), dict(figures_of(new[file]))
        for side, mine, other in (("old", before, after), ("new", after, before)):
            only[side] += [f"{file}: {' / '.join(path)}" for path in mine if path not in other]
        figures += [_figure(file, path, before[path], after[path], threshold) for path in before if path in after]
    return {"threshold": threshold, "differ": differ, "machine_unknown": unknown, "figures": figures, "only": only}


def _figure(file: str, path: tuple[str, ...], old: float, new: float, threshold: float) -> dict[str, Any]:
    better = direction(path)
    loss = {"higher": old - new, "lower": new - old, None: 0.0}[better]
    ratio = new / old if old else 1.0 if new == old else None
    worse = better is not None and not loss <= threshold * abs(old)  # so also where one is NaN
    return {"file": file, "figure": " / ".join(path), "old": old, "new": new, "ratio": ratio, "better": better, "worse": worse}


def text(found: Mapping[str, Any]) -> str:
    """A comparison to be read."""
    lines: list[str] = []
    changes: dict[tuple[str, str, str], list[str]] = {}
    for of in found["differ"]:
        changes.setdefault((of["what"], *("none" if of[k] is None else str(of[k]) for k in ("old", "new"))), []).append(of["file"])
    lines += [f"Not the same: {what} {old} → {new} ({', '.join(files)})" for (what, old, new), files in changes.items()]
    if found["machine_unknown"]:
        lines.append(f"Not known of both: machine and versions ({', '.join(found['machine_unknown'])})")
    lines = lines or ["Made on the same machine with the same versions."]
    for file, group in itertools.groupby(found["figures"], key=operator.itemgetter("file")):
        figures = list(group)
        width = max(len(name) for name in (file, *(of["figure"] for of in figures)))
        lines += ["", f"{file:<{width}} {'OLD':>13} {'NEW':>13} {'NEW/OLD':>8}"]
        for of in figures:
            ratio = "–" if of["ratio"] is None else f"{of['ratio']:.3f}"
            mark = f"  worse ({of['better']} is better)" if of["worse"] else "" if of["better"] else "  ?"
            lines.append(f"{of['figure']:<{width}} {of['old']:>13,.6g} {of['new']:>13,.6g} {ratio:>8}{mark}")
    for side, names in found["only"].items():
        lines += ["", f"Only in {side.upper()}:", *names] if names else []
    count, judged, worse = (len(found["figures"]), *(sum(bool(of[k]) for of in found["figures"]) for k in ("better", "worse")))
    share = f"{found['threshold']:.0%}"
    return "\n".join([*lines, "", f"{count:,} figures, {judged:,} judged (the others: ?), {worse:,} worse by more than {share}."])


def read(old: Path, new: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results by file name. Raises ValueError for what cannot be compared."""
    for path in (old, new):
        if not path.exists():
            raise ValueError(f"{path}: does not exist; expected a result file of a benchmark, or a folder of them")
    if old.is_dir() != new.is_dir():
        raise ValueError(f"{old} and {new}: one is a folder and the other a file; give two files or two folders")
    if old.is_file():
        return {new.name: _load(old)}, {new.name: _load(new)}
    found = tuple({path.name: path for path in folder.glob("*.json")} for folder in (old, new))
    if not found[0].keys() & found[1].keys():
        raise ValueError(f"{old} and {new}: no file *.json of the same name in both folders; nothing can be compared")
    before, after = ({name: _load(path) for name, path in of.items()} for of in found)
    return before, after


def _load(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}); expected what a benchmark writes with --json") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path}: found a JSON {type(result).__name__}, expected an object, as a benchmark writes with --json")
    return result


def main() -> int:
    """Compare, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--threshold", type=float, default=0.1, metavar="SHARE", help="of OLD, by which a figure may get worse")
    parser.add_argument("--fail-on-regression", action="store_true", help="exit with 1 if a figure is worse")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison there")
    options = parser.parse_args()
    if not 0 <= options.threshold < math.inf:
        parser.error(f"--threshold is {options.threshold}, expected a share, such as 0.1")
    try:
        found = compare(*read(options.old, options.new), options.threshold)
        if not found["figures"]:
            raise ValueError(f"{options.old} and {options.new}: have no figure in common; are they results of the same benchmark?")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(text(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(options.fail_on_regression and any(of["worse"] for of in found["figures"]))


if __name__ == "__main__":
    sys.exit(main())
