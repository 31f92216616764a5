"""The shard beside its rivals: they do the same thing, and every one of them gets its figures."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench import all as bench_all
from bench import shard as shard_bench
from bench import shard_contender as contenders
from bench import table, workload
from bench.workload import SignBatch
from flowps.config import Slot
from flowps.ps.shard import Shard

SLOTS, SIZE, DIM = 2, 4, contenders.DIM
KNOWN = workload.sign(0, np.arange(40))
NEW = workload.sign(1, np.arange(3))


def of(bags: list[list[int]], signs: np.ndarray) -> SignBatch:
    offsets = np.cumsum([0, *map(len, bags)]).astype(np.int32)
    return SignBatch(signs[np.concatenate(bags).astype(np.int64)], offsets)


# Signs twice in a bag, in two bags of a slot, and an empty bag; then some of them again, and new ones.
FIRST = of([[0, 1, 1], [1], [], [2, 0, 3, 0, 0], [20], [21, 20], [22, 22], [23]], KNOWN)
SECOND = of([[40, 40], [1, 41], [41, 40], [2], [42], [20, 23], [20], [42, 42, 20]], np.concatenate([KNOWN, NEW]))
ONE_BY_ONE = of([[k] for k in range(40)], KNOWN)


@pytest.fixture
def shard() -> Iterator[Shard]:
    """Rows that have taken a step already, of different size."""
    slots = [Slot(name=f"s{k}", dim=DIM, initializer="zeros") for k in range(SLOTS)]
    made = Shard(slots, [1000] * SLOTS, 7, 1)
    flowps = contenders.Flowps(made, SLOTS)
    batch = of([[k, *range(k)] if k < 20 else [k, *range(20, k)] for k in range(40)], KNOWN)
    flowps.prepare(batch, np.random.default_rng(0).standard_normal((40, DIM), np.float32))
    flowps.look_up()
    flowps.push()
    yield made
    made.close()


def rows_of(shard: Shard) -> contenders.Rows:
    """Its rows, in some order."""
    found = list(shard.rows())
    signs, weights, state = (np.concatenate([getattr(of, name) for of in found]) for name in ("signs", "weights", "state"))
    order = np.random.default_rng(1).permutation(len(signs))
    return contenders.Rows(signs[order], weights[order], state[order], NEW)


def pooled(contender: contenders.Contender, batch: SignBatch, grads: np.ndarray) -> np.ndarray:
    contender.prepare(batch, grads)
    return np.array(contender.look_up()).reshape(-1, DIM)


def read(shard: Shard, batch: SignBatch) -> np.ndarray:
    """Of an evaluation: it changes nothing."""
    out = np.zeros(((len(batch.offsets) - 1) // SLOTS, SLOTS * DIM), np.float32)
    positions = np.arange(SLOTS)
    shard.lookup(9, batch.signs, batch.offsets, len(out), positions, positions * DIM, out, training=False)
    return out.reshape(len(out), SLOTS, DIM).swapaxes(0, 1).reshape(-1, DIM)


@pytest.mark.parametrize("kind", contenders.RIVALS, ids=lambda kind: kind.__name__)
def test_all_do_what_the_shard_does(kind: type[contenders.Contender], shard: Shard) -> None:
    if importlib.util.find_spec(kind.package) is None:
        pytest.skip(f"{kind.package} is not installed")
    rival, flowps = kind(rows_of(shard), 1), contenders.Flowps(shard, SLOTS)
    np.testing.assert_array_equal(pooled(rival, ONE_BY_ONE, np.zeros((40, DIM), np.float32)), read(shard, ONE_BY_ONE))
    random = np.random.default_rng(2)
    for batch in (FIRST, SECOND, SECOND, FIRST):
        grads = random.standard_normal((SLOTS * SIZE, DIM), np.float32)
        expected = pooled(flowps, batch, grads)
        np.testing.assert_allclose(pooled(rival, batch, grads), expected, rtol=1e-5, atol=1e-6)
        flowps.push()
        rival.push()
        every = of([[k] for k in range(40)], batch.signs[np.arange(40) % len(batch.signs)])
        np.testing.assert_allclose(pooled(rival, every, grads), read(shard, every), rtol=1e-5, atol=1e-6)
        assert np.abs(read(shard, every)).max() > 0.01
    assert shard.num_rows == len(KNOWN) + len(NEW)


def test_rivals_begin_with_the_rows_of_the_shard() -> None:
    """In the order of the arena; signs of the batches that have none are new, in the order in which they come."""
    bench = shard_bench.Bench("criteo", 1, 20_000, evict=False, admit_after=1)
    known = bench.shard.num_rows
    batches = [next(bench.source) for _ in range(2)]
    rows = bench.resident(batches)
    assert len(rows.signs) == len(rows.weights) == len(rows.squares) == bench.shard.num_rows == known
    ((_, shard_table),) = bench.shard._tables
    has_row, weights, state = shard_table.values(rows.signs)
    assert has_row.all()
    np.testing.assert_array_equal(rows.weights, weights)
    np.testing.assert_array_equal(rows.squares, state)
    seen, known_signs = dict.fromkeys(np.concatenate([batch.signs for batch in batches]).tolist()), set(rows.signs.tolist())
    assert rows.new.tolist() == [sign for sign in seen if sign not in known_signs]
    bench.shard.close()
    bench.team.close()


@pytest.mark.long
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its result has all contenders, and makes a table of its own, not a line of the shard's."""
    to = tmp_path / "shard-rivals-1-criteo.json"
    arguments = ["criteo", "--rows", "20000", "--turns", "1", "--rivals", "--rival-turns", "2", "--json", str(to)]
    done = subprocess.run([sys.executable, "-m", "bench.shard", *arguments], capture_output=True, text=True, check=True)
    result = json.loads(to.read_text(encoding="utf-8"))
    assert json.loads(done.stdout) == {key: value for key, value in result.items() if key != "machine"}
    assert done.stderr == ""
    here = [kind for kind in contenders.RIVALS if importlib.util.find_spec(kind.package) is not None]
    assert list(result["rivals"]) == ["flowps Shard", *(kind.name for kind in here)]
    assert result["left_out"] == {k.name: f"{k.package} is not installed" for k in contenders.RIVALS if k not in here}
    for found in result["rivals"].values():
        assert list(found) == ["lookup_ms_p50", "push_ms_p50", "lookup_ratio", "push_ratio"]
        assert min(found.values()) > 0
    assert result["rivals"]["flowps Shard"]["lookup_ratio"] == result["rivals"]["flowps Shard"]["push_ratio"] == 1
    assert result["rival_turns"] == 2

    monkeypatch.setattr(table, "RESULTS", tmp_path)
    (tmp_path / "shard-1-criteo-1.json").write_text(to.read_text(encoding="utf-8"), encoding="utf-8")
    assert table.shard().count("`criteo`") == 1
    made = table.shard_rivals()
    assert made.count("`criteo`") == 1 + len(here)
    assert made.startswith("| workload | contender | lookup ms | × flowps | push ms | × flowps |\n")
    assert all(f"| {kind.name} |" in made for kind in here)
    assert "medians of 2 batches." in made
    assert table.filled("<!-- bench:shard_rivals -->\n<!-- end -->") == f"<!-- bench:shard_rivals -->\n{made}<!-- end -->"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evict"], "cannot be measured with --evict"),
        (["--admit-after", "2"], "or --admit-after"),
        (["--rival-turns", "0"], "expected at least 1"),
    ],
)
def test_what_cannot_be_measured_beside_rivals_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.shard", "criteo", "--rivals", *arguments])
    with pytest.raises(SystemExit, match="2"):
        shard_bench.main()
    assert message in capsys.readouterr().err


def test_who_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = "no_such_package_of_tables"
    kind = type("Absent", (contenders.Dict,), {"name": "absent", "package": absent})
    monkeypatch.setattr(contenders, "RIVALS", (contenders.Dict, kind))
    found = shard_bench.run("criteo", resident=20_000, turns=1, rival_turns=1)
    assert list(found["rivals"]) == ["flowps Shard", contenders.Dict.name]
    assert found["left_out"] == {"absent": f"{absent} is not installed"}
    assert list(found["versions"]) == ["scipy"]


def test_make_bench_measures_them() -> None:
    commands = {name: command.split() for name, command in bench_all._COMMANDS.items() if "--rivals" in command}
    assert [command[1] for command in commands.values()] == ["dsp_ctr", "criteo"]
    assert all(name.startswith("shard-rivals-") for name in commands)
