"""The run status of the roles in this process, by run and role: for traces and for the metrics that the process serves."""

from __future__ import annotations

from flowps.config import Config
from flowps.status.run_status import RunStatus
from flowps.status.trace import Trace

# Written by the roles' own threads, read by any.
_statuses: dict[tuple[str, str], RunStatus] = {}


def status_of(config: Config, run_id: str, role: str) -> RunStatus:
    """A new status of a role in this process, with a trace if the run is traced."""
    first, count = config.status.trace_from, config.status.trace_batches
    trace = Trace(first, first + count if count else float("inf")) if config.trace else None
    found = _statuses[run_id, role] = RunStatus(trace)
    return found


def statuses_here() -> dict[tuple[str, str], RunStatus]:
    """All of this process: run and role → status."""
    return dict(_statuses)


def forget(run_id: str) -> None:
    """The run has ended here. Run on every worker."""
    for key in [key for key in list(_statuses) if key[0] == run_id]:
        _statuses.pop(key, None)
