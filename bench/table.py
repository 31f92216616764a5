"""`python -m bench.table`: write the tables of `bench/results/*.json` into README.md, between their markers.

Numbers in the README are generated here and nowhere else; `tests/test_packaging.py` holds that the README has what this gives.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"


def main() -> int:
    """Rewrite the README."""
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def filled(text: str) -> str:
    """`text` with every table between `<!-- NAME -->` and `<!-- end -->` made anew."""
    for name, make in (("bench:end_to_end", end_to_end), ("bench:feed", feed)):
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        if not marked.search(text):
            raise SystemExit(f"README.md has no <!-- {name} --> … <!-- end -->")
        # Escaped: a table is no pattern.
        text = marked.sub("\\1" + make().replace("\\", "\\\\") + "\\2", text)
    return text


def end_to_end() -> str:
    """Speed, memory and quality of the workloads, one line per result."""
    results = [_read(f"end_to_end-{name}.json") for name in ("criteo-small", "criteo-deepfm", "dsp_ctr-dnn")]
    lines = [
        "| workload | net | examples/s | CPU s per million | peak memory | first step, warm / cold | trainer waited "
        "| test AUC / best |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        spread = [run["examples_per_s"] for run in r["runs"]]
        lines.append(
            f"| `{r['workload']}` | {r['net']} | {r['examples_per_s']:,.0f} ({min(spread):,.0f}–{max(spread):,.0f}) "
            f"| {r['cpu_s_per_million']:.1f} | {r['peak_rss_bytes'] / 2**30:.1f} GiB "
            f"| {r['first_step_s']:.1f} s / {r['first_step_cold_s']:.1f} s | {r['trainer_wait_share']:.1%} "
            f"| {r['test_auc']:.4f} / {r['best_auc']:.4f} |"
        )
    return "\n".join([*lines, "", _machine(results[0]), ""])


def feed() -> str:
    """What the knobs of the feed queue cost and bring."""
    result = _read("feed.json")
    lines = [
        "| workload | in flight | feed threads | TensorFlow threads | examples/s | trainer waited | test AUC |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r['workload']}` | {r['in_flight']} | {r['feed_threads']} | {r['tensorflow_threads'] or 'all cores'} "
        f"| {r['examples_per_s']:,.0f} | {r['trainer_wait_share']:.1%} | {r['test_auc']:.4f} |"
        for r in result["settings"]
    ]
    return "\n".join([*lines, "", _machine(result), ""])


def _machine(result: dict[str, Any]) -> str:
    found = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    runs = f"medians of {len(result['runs'])} runs (least–most)" if "runs" in result else f"medians of {result['rounds']} rounds"
    return f"{found['cores']} cores of {found['processor']}, Python {found['python']}, {versions}; {runs}."


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    sys.exit(main())
