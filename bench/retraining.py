"""`python -m bench.retraining ML100K_FOLDER`: three weeks of retraining (`workflows.demo`), and what each day's AUC was."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import machine
from flowps.status.progress import PlainConsole
from workflows.demo import BAD, DAYS, FIRST, means, replay, show
from workflows.ledger import Ledger
from workflows.store import Registry

RESULTS = Path(__file__).resolve().parent / "results" / "retraining.json"


def main() -> int:
    """Run the demonstration as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m bench.retraining", description=__doc__)
    parser.add_argument("data", type=Path, metavar="ML100K_FOLDER", help="folder of the data")
    parser.add_argument("--to", type=Path, default=Path("runs/retrain-demo"), metavar="FOLDER", help="is written anew")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of the results (default: that of the documentation)")
    options = parser.parse_args()
    console = PlainConsole()
    series = replay(options.data, options.to, console)
    show(series, options.to, console)
    attempts = Ledger(options.to / "state").attempts()
    registry = Registry(str(options.to / "registry"))
    result = {
        "first": str(FIRST), "days": DAYS, "shuffled": BAD, "auc": series, "mean": means(series),
        "rejected": [{"slot": of.slot, "why": of.why} for of in attempts if of.status == "rejected"],
        "published": registry.live(), "fixed_auc": [registry.record(1).quality.auc, registry.record(registry.live()).quality.auc],
        "machine": machine.describe(),
    }  # fmt: skip
    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def markdown(result: Mapping[str, Any]) -> str:
    """Means over weeks, and what the gate rejected."""
    lines = ["| | first week | second week | third week | all |", "|---|---|---|---|---|"]
    for way, aucs in result["auc"].items():
        good = [None if k == result["shuffled"] else of for k, of in enumerate(aucs)]
        weeks = [[of for of in good[first : first + 7] if of is not None] for first in range(0, result["days"], 7)]
        lines.append(f"| {way} | {' | '.join(f'{sum(week) / len(week):.4f}' for week in weeks)} | {result['mean'][way]:.4f} |")
    rejected = "; ".join(f"{of['slot']}: {of['why'].split(' (gate')[0]}" for of in result["rejected"])
    first, last = result["fixed_auc"]
    return "\n".join([
        *lines, "",
        f"AUC of a day before it is trained, mean over days but the shuffled one. {result['published']} models were published (on "
        f"the fixed set {first:.4f} at first, {last:.4f} in the end). Rejected: {rejected}.",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
