"""`python -m bench.status [--json FILE]`: what it costs that a run says where its time goes.

    observation   one time added to a stage; a `with` block timed; the same while traced. Medians of many turns
    training      `dsp_ctr` in one process by turns: without any observation (they are replaced by nothing), as always, and with
                  --trace of every batch; and from the counts of such a run, what its observations have cost by the figures above

Speeds of single runs differ by more than what is measured here: the medians of the ratios of each round count, and the accounted
share beside them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import timeit
from pathlib import Path
from typing import Any

from bench import machine
from bench.end_to_end import TRAINED, command_of, training
from flowps.status.run_status import RunStatus
from flowps.status.trace import Trace

WORKLOAD = "dsp_ctr"
TARGETS = {"observation_us": 1.0, "status_share": 0.01, "trace_share": 0.02}
_TURNS, _EACH = 30, 20_000


def observation() -> dict[str, float]:
    """µs of one observation, in its three forms."""
    plain, traced = RunStatus(), RunStatus(Trace())
    stage = plain.stage("Step")

    def timed(status: RunStatus) -> None:
        with status.timed("Step", 1):
            pass

    forms = {
        "observe_us": lambda: stage.observe(0.00123),
        "timed_us": lambda: timed(plain),
        "traced_us": lambda: timed(traced),
    }
    found = {}
    for name, work in forms.items():
        turns = []
        for _ in range(_TURNS):
            turns.append(timeit.timeit(work, number=_EACH) / _EACH * 1e6)
            if traced.trace is not None:
                traced.trace.take("bench", "here")
        found[name] = statistics.median(turns)
    return found


def of_training(rounds: int) -> dict[str, Any]:
    """Speeds of the three variants, each round in another order, and their ratios to the run without."""
    speeds: dict[str, list[float]] = {"without": [], "always": [], "traced": []}
    with tempfile.TemporaryDirectory() as folder:
        knobs = {"without": [], "always": [], "traced": ["--trace", f"{folder}/trace.json"]}
        off = {"DASK_DISTRIBUTED__WORKER__PRELOAD": __file__}
        for turn in range(rounds):
            names = list(speeds)[turn % 3 :] + list(speeds)[: turn % 3]
            for name in names:
                command = command_of(WORKLOAD, TRAINED[WORKLOAD].net, None, knobs[name])
                with training(command, off if name == "without" else {}) as (run_dir, _):
                    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
                    if name == "always":
                        last = json.loads((run_dir / "status.jsonl").read_text(encoding="utf-8").splitlines()[-1])
                        seconds = summary["finished"]["seconds"]
                speeds[name].append(summary["finished"]["steady_examples_per_s"])
    roles = [last, *last["shards"]]
    return {
        "rounds": rounds,
        "examples_per_s": {name: statistics.median(of) for name, of in speeds.items()},
        "runs": speeds,
        **{
            f"{name}_ratio": statistics.median(
                with_ / without for with_, without in zip(speeds[name], speeds["without"], strict=True)
            )
            for name in ("always", "traced")
        },
        "observations": sum(stage["count"] for role in roles for stage in role["stages"].values()),
        "seconds": seconds,
    }


def dask_setup(worker: Any) -> None:
    """Dask calls it in the run's process before anything is measured: what would be observed is not."""
    from flowps.ps.hot import HotSigns
    from flowps.status.run_status import Timed
    from flowps.status.stage import Stage

    def nothing(*arguments: Any, **named: Any) -> None:
        pass

    methods = {Stage: ["observe"], RunStatus: ["observe", "span", "count"], Timed: ["__enter__", "__exit__"], HotSigns: ["observe"]}
    for owner, names in methods.items():
        for name in names:
            setattr(owner, name, nothing)


def markdown(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    one, train = result["observation"], result["training"]
    accounted = result["accounted_share"]
    return "\n".join(
        [
            "| | measured | target |",
            "|---|---|---|",
            f"| one observation: a time added, a block timed, and traced | {one['observe_us']:.2f}, {one['timed_us']:.2f}, "
            f"{one['traced_us']:.2f} µs | ≤ 1 µs |",
            f"| `{WORKLOAD}`: examples/s with run status, of those without | {train['always_ratio']:.1%} | ≥ 99 % |",
            f"| – {train['observations']:,} observations in {train['seconds']:.0f} s, one at a time | {accounted:.3%} | ≤ 1 % |",
            f"| – examples/s with run status and `--trace`, of those without | {train['traced_ratio']:.1%} | ≥ 98 % |",
        ]
    )


def main() -> None:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    arguments = parser.parse_args()
    found = observation()
    train = of_training(arguments.rounds)
    result = {
        "observation": found,
        "training": train,
        "accounted_share": train["observations"] * found["timed_us"] / 1e6 / train["seconds"],
        "targets": TARGETS,
        "machine": machine.describe(),
    }
    print(markdown(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
