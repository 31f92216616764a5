"""`python -m bench.table`: write the tables of `bench/results/*.json` into README.md and docs, between their markers.

Numbers there are generated here and nowhere else; `tests/test_packaging.py` holds that the files have what this gives.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from bench import checkpoint as checkpoint_bench
from bench import end_to_end as end_to_end_bench
from bench import faults as faults_bench
from bench import hundred as hundred_bench
from bench import map as map_bench
from bench import placement as placement_bench
from bench import quality as quality_bench
from bench import retraining as retraining_bench
from bench import rival as rival_bench
from bench import rpc as rpc_bench
from bench import scale as scale_bench
from bench import serving as serving_bench
from bench import status as status_bench
from flowps.config import RowOptimizer, Slot
from flowps.ps import optimizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "pictures" / "scale.svg"
DOCS = [
    ROOT / "docs" / name
    for name in (
        "tables.md",
        "cluster.md",
        "checkpoints.md",
        "status.md",
        "serving.md",
        "models.md",
        "training.md",
        "retraining.md",
        "performance.md",
    )
]


def main() -> int:
    """Rewrite the files, and draw the picture."""
    scale_bench.picture(_read("scale.json")).savefig(PICTURE, metadata={"Date": None, "Description": digest("scale.json")})
    for path in (README, *DOCS):
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def digest(name: str) -> str:
    """Of a result, so that a picture says which one it shows."""
    return hashlib.blake2b((RESULTS / name).read_bytes(), digest_size=16).hexdigest()


def filled(text: str) -> str:
    """`text` with every table between `<!-- bench:NAME -->` and `<!-- end -->` made anew."""

    def make(found: re.Match[str]) -> str:
        return found[1] + _MAKERS[found[2]]() + found[3]

    return re.sub(r"(<!-- bench:(\w+) -->\n).*?(<!-- end -->)", make, text, flags=re.S)


def end_to_end() -> str:
    """Speed, memory and quality of the workloads, one line per result."""
    names = [name + suffix for name in ("criteo-small", "criteo-deepfm", "dsp_ctr-dnn") for suffix in ("", "-bfloat16")]
    results = [_read(f"end_to_end-{name}.json") for name in (*names, "ml1m-small")]
    lines = [
        "| workload | net | precision | examples/s | CPU s per million | peak memory | first step, warm / cold | trainer waited "
        "| test AUC / best |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        spread = [run["examples_per_s"] for run in r["runs"]]
        precision = r["knobs"][r["knobs"].index("--trainer.precision") + 1] if "--trainer.precision" in r["knobs"] else "float32"
        best = "" if r["best_auc"] is None else f" / {r['best_auc']:.4f}"
        lines.append(
            f"| `{r['workload']}` | {r['net']} | {precision} "
            f"| {r['examples_per_s']:,.0f} ({min(spread):,.0f}–{max(spread):,.0f}) "
            f"| {r['cpu_s_per_million']:.1f} | {r['peak_rss_bytes'] / 2**30:.1f} GiB "
            f"| {r['first_step_s']:.1f} s / {r['first_step_cold_s']:.1f} s | {r['trainer_wait_share']:.1%} "
            f"| {r['test_auc']:.4f}{best} |"
        )
    return "\n".join([*lines, "", _machine(results[0]), ""])


def rivals() -> str:
    """flowps beside the same in Keras and PyTorch."""
    results = [_read(path.name) for path in sorted(RESULTS.glob("rival-*.json"))]
    about = results[0]["machine"] | {"versions": {name: v for of in results for name, v in of["machine"]["versions"].items()}}
    return "\n".join([rival_bench.markdown(*results), "", _machine({"machine": about, "rounds": "2 or 3"}), ""])


def stages() -> str:
    """Where the CPU time of a batch goes."""
    from bench.stages import markdown  # which loads TensorFlow

    return _with_machine(markdown, "stages.json")


def hundred() -> str:
    """What a cluster of many workers would do."""
    return hundred_bench.markdown(_read("hundred.json")) + "\n"


def feed() -> str:
    """What the knobs of the feed queue cost and bring."""
    result = _read("feed.json")
    lines = [
        "| workload | in flight | staleness at most | feed threads | TensorFlow threads | examples/s | trainer waited | test AUC |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in result["settings"]:
        knobs = f"{r['in_flight']} | {r['max_staleness']} | {r['feed_threads']} | {r['tensorflow_threads'] or 'all cores'}"
        found = f"{r['examples_per_s']:,.0f} | {r['trainer_wait_share']:.1%} | {r['test_auc']:.4f}"
        lines.append(f"| `{r['workload']}` | {knobs} | {found} |")
    return "\n".join([*lines, "", _machine(result), ""])


def optimizers() -> str:
    """The optimizers of rows, from their descriptions."""
    lines = ["| `optimizer` | a step of a touched row | floats of state, dim 16 |", "|---|---|---|"]
    for name in get_args(RowOptimizer):
        found = optimizer.of_slot(Slot(name="s", dim=16, optimizer=name))
        text = " ".join((type(found.tag).__doc__ or "").split()).replace("|", "\\|").replace("‖", "\\|\\|")
        lines.append(f"| `{name}` | {text} | {found.state_width(16)} |")
    return "\n".join([*lines, ""])


def shard() -> str:
    """Lookups and pushes of the workloads beside their floors."""
    lines = [
        "| workload | threads | signs / new rows a batch | lookup ms, P50 / P99 | × floor | push ms, P50 | × floor "
        "| bytes per row |",
        "|---|---|---|---|---|---|---|---|",
    ]
    files = sorted(RESULTS.glob("shard-[0-9]*.json"))
    for found in (_read(path.name) for path in files):
        name = f"`{found['workload']}`{', evicting' if found['evict'] else ''}"
        lines.append(
            f"| {name} | {found['threads']} | {found['signs_per_batch']:,.0f} / {found['new_rows_per_batch']:,.0f} "
            f"| {found['lookup_ms_p50']:.2f} / {found['lookup_ms_p99']:.2f} | {found['lookup_ratio']:.2f} "
            f"| {found['push_ms_p50']:.2f} | {found['push_ratio']:.2f} | {found['bytes_per_row']:.0f} |"
        )
    return "\n".join([*lines, "", _machine(_read(files[0].name)), ""])


def shard_rivals() -> str:
    """Lookups and pushes beside those of other tables."""
    lines = ["| workload | contender | lookup ms | × flowps | push ms | × flowps |", "|---|---|---|---|---|---|"]
    results = [_read(path.name) for path in sorted(RESULTS.glob("shard-rivals-*.json"))]
    lines += [
        f"| `{found['workload']}` | {name} | {r['lookup_ms_p50']:.1f} | {r['lookup_ratio']:.1f} "
        f"| {r['push_ms_p50']:.1f} | {r['push_ratio']:.1f} |"
        for found in results
        for name, r in found["rivals"].items()
    ]
    first = results[0]
    lines += [f"\n{name} is left out: {why}." for name, why in first["left_out"].items()]
    about = first["machine"] | {"versions": first["machine"]["versions"] | first["versions"]}
    return "\n".join([*lines, "", _machine({"machine": about, "turns": first["rival_turns"]}), ""])


def scale() -> str:
    """The cost of a sign against the number of rows."""
    found = _read("scale.json")
    lines = [
        "| rows | lookup, ns per sign (floor) | push, ns per sign (floor) | new rows per s | bytes per row |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {size['rows']:,} | {size['lookup_ns_per_sign']:.0f} ({size['floor_lookup_ns_per_sign']:.0f}) "
        f"| {size['push_ns_per_sign']:.0f} ({size['floor_push_ns_per_sign']:.0f}) "
        f"| {_millions(size['inserts_per_s'])} | {size['bytes_per_row']:.0f} |"
        for size in found["sizes"]
    ]
    left_out = [f"{why}." for why in found["left_out"].values()]
    return "\n".join([*lines, "", *left_out, _machine(found), ""])


def scale_rows() -> str:
    """The cost of a sign, and of a row, against the number of rows when signs are drawn zipf."""
    found = _read("scale.json")
    lines = [
        "| rows | distinct, of a batch's signs | lookup, ns per sign | per distinct one | push, ns per sign | per distinct one |",
        "|---|---|---|---|---|---|",
    ]
    for point in found["axes"]["rows"]:
        costs = [point[f"{call}_ns_per_sign"] for call in ("lookup", "push")]
        each = " | ".join(f"{ns:.0f} | {ns / point['distinct_share']:.0f}" for ns in costs)
        lines.append(f"| {point['rows']:,} | {point['distinct_share']:.0%} | {each} |")
    return "\n".join([*lines, "", _machine(found), ""])


def kernel() -> str:
    """The kernels beside themselves without their tricks."""
    found = _read("kernel.json")
    floor = found["results"]["gather floor"]["median_s"]
    lines = ["| kernel | ms, median (10–90 %) | million signs per s | × gather floor |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {r['median_s'] * 1e3:.2f} ({r['p10_s'] * 1e3:.2f}–{r['p90_s'] * 1e3:.2f}) "
        f"| {r['signs_per_s'] / 1e6:.0f} | {r['median_s'] / floor:.2f} |"
        for name, r in found["results"].items()
    ]
    return "\n".join([*lines, "", _machine(found), ""])


def storage() -> str:
    """Quality against what weights are stored in."""
    found = _read("storage.json")
    lines = ["| `storage` | test AUC of each seed | mean | less float32's |", "|---|---|---|---|"]
    lines += [
        f"| `{name}` | {', '.join(f'{auc:.4f}' for auc in r['test_auc'])} | {r['mean']:.4f} | {r['difference']:+.4f} |"
        for name, r in found["results"].items()
    ]
    return "\n".join([*lines, "", _machine(found), ""])


def map_table() -> str:
    """The table as a map, beside what else there is."""
    found = _read("map.json")
    return "\n".join([map_bench.markdown(found).rstrip(), "", _machine(found), ""])


def rpc() -> str:
    """Lookups and pushes from process to process, beside a bare echo."""
    return _with_machine(rpc_bench.markdown, "rpc.json")


def placement() -> str:
    """The costs that slots are placed by, and how even the shards are."""
    return _with_machine(placement_bench.markdown, "placement.json")


def roles() -> str:
    """One process beside several."""
    return _with_machine(end_to_end_bench.markdown, "roles.json")


def _with_machine(markdown: Callable[[dict[str, Any]], str], file: str) -> str:
    found = _read(file)
    return "\n".join([markdown(found), "", _machine(found), ""])


def _millions(rate: float | None) -> str:
    return "–" if rate is None else f"{rate / 1e6:.1f} million"


def _machine(result: dict[str, Any]) -> str:
    found = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    counts = {"runs": "medians of {} runs (least–most)", "rounds": "medians of {} rounds", "turns": "medians of {} batches"}
    how = [text.format(len(result[key]) if key == "runs" else result[key]) for key, text in counts.items() if key in result]
    return (
        f"{found['cores']} cores of {found['processor']}, Python {found['python']}, {versions}{'; ' if how else ''}{''.join(how)}."
    )


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def checkpoint() -> str:
    """What saving and going on cost."""
    return _with_machine(checkpoint_bench.markdown, "checkpoint.json")


def faults() -> str:
    """How runs come through kills."""
    return _with_machine(faults_bench.markdown, "faults.json")


def serving() -> str:
    """What becomes of a trained model."""
    return _with_machine(serving_bench.markdown, "serving.json")


def quality() -> str:
    """The built-in models beside plain Keras."""
    return _with_machine(quality_bench.markdown, "quality.json")


def orders() -> str:
    """What the order of the samples matters."""
    return _with_machine(quality_bench.orders, "quality.json")


def retraining() -> str:
    """Three weeks of retraining beside none, and beside training from scratch."""
    return _with_machine(retraining_bench.markdown, "retraining.json")


def status() -> str:
    """What run status and traces cost."""
    return _with_machine(status_bench.markdown, "status.json")


_MAKERS: dict[str, Callable[[], str]] = {
    "checkpoint": checkpoint,
    "end_to_end": end_to_end,
    "faults": faults,
    "feed": feed,
    "hundred": hundred,
    "optimizers": optimizers,
    "orders": orders,
    "quality": quality,
    "shard": shard,
    "shard_rivals": shard_rivals,
    "scale": scale,
    "scale_rows": scale_rows,
    "kernel": kernel,
    "map": map_table,
    "placement": placement,
    "retraining": retraining,
    "rivals": rivals,
    "roles": roles,
    "rpc": rpc,
    "serving": serving,
    "status": status,
    "stages": stages,
    "storage": storage,
}


if __name__ == "__main__":
    sys.exit(main())
