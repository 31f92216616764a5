"""Results side by side: what is matched, what is judged, and that nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import compare
from bench.table import RESULTS

MACHINE = {"processor": "P", "cores": 2, "versions": {"numba": "1", "numpy": "2"}}


def paths(result: Any) -> dict[str, float]:
    return {" / ".join(path): value for path, value in compare.figures_of(result)}


def one(name: str, old: Any, new: Any, threshold: float = 0.1) -> dict[str, Any]:
    ((figure),) = compare.compare({"f": {name: old}}, {"f": {name: new}}, threshold)["figures"]
    return figure


def write(path: Path, **result: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def called(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench.compare", *map(str, arguments)])
    return compare.main()


def test_figures_are_numbers_and_not_what_the_run_was_told() -> None:
    result = {"a": {"b": 1, "text": "t", "yes": True, "none": None}, "c": [1.5, 2], "machine": {"cores": 2}, "targets": {"a": 1}}
    assert paths(result) == {"a / b": 1, "c / #0": 1.5, "c / #1": 2}


def test_items_are_named_after_what_they_are_of() -> None:
    result = [
        {"contender": "x", "threads": 1, "keep": True, "rows": 5, "ms": 1},
        {"contender": "x", "threads": 2, "keep": True, "rows": 5, "ms": 2},
        {"contender": "x", "threads": 2, "keep": True, "rows": 5, "ms": 3},
        {"rows": 5, "ms": 4},
        {"ms": 5},
    ]
    first = "contender=x, threads=1, keep=True"
    assert [name for name in paths(result) if name.endswith("ms")] == [
        f"{first} / ms", f"{first.replace('1', '2')} / ms", f"{first.replace('1', '2')} #2 / ms", "rows=5 / ms", "#4 / ms"
    ]  # fmt: skip
    assert paths(result)[f"{first} / rows"] == 5


def test_items_are_matched_whatever_their_order() -> None:
    old, new = (
        {"f": {"results": [{"net": net, "ms": ms} for net, ms in pairs]}} for pairs in ([("a", 1), ("b", 2)], [("b", 2), ("c", 3)])
    )
    found = compare.compare(old, new, 0.1)
    assert [(of["figure"], of["ratio"]) for of in found["figures"]] == [("results / net=b / ms", 1.0)]
    assert found["only"] == {"old": ["f: results / net=a / ms"], "new": ["f: results / net=c / ms"]}


@pytest.mark.parametrize(
    ("path", "better"),
    [
        (("examples_per_s",), "higher"),
        (("figures", "contender=flowps Shard", "million_signs_per_s"), "higher"),
        (("figures", "contender=dict", "million_signs_per_s"), None),
        (("test_auc", "1"), "higher"),
        (("save_bandwidth_share",), "higher"),
        (("save_s",), "lower"),
        (("lookup_ms_p50",), "lower"),
        (("lookup_ns_per_sign",), "lower"),
        (("lookup_ratio",), "lower"),
        (("rivals", "dict", "lookup_ratio"), None),
        (("floor_lookup_ms",), None),
        (("echo", "ms"), None),
        (("flowps", "ms"), "lower"),
        (("bytes_per_row",), "lower"),
        (("cpu_s_per_million",), "lower"),
        (("trainer_wait_share",), "lower"),
        (("evaluate", "seconds"), "lower"),
        (("evaluate", "runs", "#0"), None),
        (("runs", "#0", "examples_per_s"), None),
        (("seconds",), None),
        (("signs_per_batch",), None),
        (("ratio",), None),
    ],
)
def test_names_say_what_is_better(path: tuple[str, ...], better: str | None) -> None:
    assert compare.direction(path) == better


@pytest.mark.parametrize(
    ("name", "old", "new", "worse"),
    [
        ("save_s", 1, 1.09, False), ("save_s", 1, 1.11, True), ("save_s", 1, 0.5, False), ("save_s", 0, 0, False),
        ("save_s", 0, 1, True), ("call_ns", -100, -80, True), ("call_ns", -100, -120, False), ("save_s", 1, float("nan"), True),
        ("test_auc", 0.8, 0.73, False), ("test_auc", 0.8, 0.7, True), ("test_auc", 0.7, 0.8, False), ("signs", 1, 9, False),
    ],
)  # fmt: skip
def test_worse_is_the_wrong_direction_by_more_than_the_threshold(name: str, old: float, new: float, worse: bool) -> None:
    assert one(name, old, new)["worse"] is worse


def test_the_ratio_is_that_of_the_new_one() -> None:
    assert (one("save_s", 2, 3)["ratio"], one("save_s", 0, 3)["ratio"], one("save_s", 0, 0)["ratio"]) == (1.5, None, 1.0)
    assert one("save_s", 2, 3, threshold=0.6)["worse"] is False


def test_what_differs_is_said_first() -> None:
    same = {"machine": MACHINE, "workload": "w", "save_s": 1}
    assert compare.text(compare.compare({"f": same}, {"f": same}, 0.1)).startswith(
        "Made on the same machine with the same versions.\n"
    )
    other = {"machine": MACHINE | {"cores": 4, "versions": {"numba": "1", "torch": "3"}}, "workload": "v", "save_s": 1}
    assert compare.text(compare.compare({"f": same, "g": same}, {"f": other, "g": other}, 0.1)).splitlines()[:4] == [
        "Not the same: cores 2 → 4 (f, g)",
        "Not the same: numpy 2 → none (f, g)",
        "Not the same: workload w → v (f, g)",
        "Not the same: torch none → 3 (f, g)",
    ]
    assert "Not known of both: machine and versions (f)\n" in compare.text(compare.compare({"f": {"save_s": 1}}, {"f": same}, 0.1))


def test_what_is_read() -> None:
    old = {"f": {"machine": MACHINE, "save_s": 1, "gone_s": 1, "signs": 1000}, "g": {}}
    new = {"f": {"machine": MACHINE, "save_s": 2, "signs": 2000}, "h": {}}
    assert compare.text(compare.compare(old, new, 0.1)).splitlines() == [
        "Made on the same machine with the same versions.",
        "",
        "f                OLD           NEW  NEW/OLD",
        "save_s             1             2    2.000  worse (lower is better)",
        "signs          1,000         2,000    2.000  ?",
        "",
        "Only in OLD:",
        "g",
        "f: gone_s",
        "",
        "Only in NEW:",
        "h",
        "",
        "2 figures, 1 judged (the others: ?), 1 worse by more than 10%.",
    ]


def test_folders_and_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "old" / "a.json", machine=MACHINE, save_s=1)
    write(tmp_path / "old" / "b.json", machine=MACHINE, save_s=1)
    write(tmp_path / "new" / "a.json", machine=MACHINE, save_s=1.3)
    folders, to = (tmp_path / "old", tmp_path / "new"), tmp_path / "comparison.json"
    assert called(monkeypatch, *folders, "--json", to) == 0
    assert called(monkeypatch, *folders, "--fail-on-regression") == 1
    assert called(monkeypatch, *folders, "--fail-on-regression", "--threshold", 0.4) == 0
    assert "Only in OLD:\nb.json\n" in capsys.readouterr().out
    written = json.loads(to.read_text(encoding="utf-8"))
    assert written["figures"] == [
        {"file": "a.json", "figure": "save_s", "old": 1.0, "new": 1.3, "ratio": 1.3, "better": "lower", "worse": True}
    ]
    assert written["only"] == {"old": ["b.json"], "new": []}


def test_files_may_have_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, write(tmp_path / "x.json", save_s=1), write(tmp_path / "y.json", save_s=1)) == 0
    assert "y.json" in capsys.readouterr().out


def test_bad_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good, other = write(tmp_path / "new" / "good.json", save_s=1), write(tmp_path / "old" / "other.json", load_s=1)
    for name, content in (("broken.json", "{"), ("list.json", "[1]")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    for arguments, message in (
        ((tmp_path / "missing.json", good), "missing.json: does not exist"),
        ((tmp_path / "broken.json", good), "broken.json: is no JSON"),
        ((tmp_path / "list.json", good), "list.json: found a JSON list, expected an object"),
        ((tmp_path / "old", good), "one is a folder and the other a file"),
        ((tmp_path / "old", tmp_path / "new"), "no file *.json of the same name"),
        ((other, good), "have no figure in common"),
        ((good, good, "--threshold", "-1"), "--threshold is -1.0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            called(monkeypatch, *arguments)
        assert message in capsys.readouterr().err


def test_the_command_compares_what_is_kept_here() -> None:
    """Every result of a benchmark has figures, and is as good as itself."""
    command = [sys.executable, "-m", "bench.compare", str(RESULTS), str(RESULTS), "--fail-on-regression"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Made on the same machine with the same versions.\n")
    assert "Only in" not in done.stdout
    assert all(f"\n{path.name} " in done.stdout for path in RESULTS.glob("*.json"))
    assert done.stdout.endswith(", 0 worse by more than 10%.\n")
