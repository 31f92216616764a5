"""Slows one stage down, in every worker process: for `DASK_DISTRIBUTED__WORKER__PRELOAD`, and in this process with `slow`.

FLOWPS_DELAY names the stage, FLOWPS_DELAY_S the seconds that each of its calls takes longer. FLOWPS_OWN_HOSTS makes a cluster of
this machine's processes, as far as the use of cores goes.
"""

from __future__ import annotations

import os
import pkgutil
import time
from collections.abc import Callable
from typing import Any

Replace = Callable[[object, str, object], None]


_STAGES = {
    "decode": ("flowps.hub.stream", "decode"),
    "transfer": ("distributed:Future", "result"),  # the hub's stream has waited for a task before it asks for the result
    "lookup": ("flowps.ps.table:Table", "_pool"),
    "wire": ("flowps.ps.wire.remote:RemoteShard", "_send"),
    "stage": ("flowps.trainer.step:Step", "stage"),
    "step": ("flowps.trainer.step:Step", "train"),
    "push": ("flowps.ps.table:Table", "push"),
    "checkpoint": ("flowps.cluster.shard_role:ShardActor", "save"),
}


def slow(stage: str, seconds: float, replace: Replace) -> None:
    """Replace one function of flowps by a slower one; `replace` is setattr, or a monkeypatch's."""
    place, name = _STAGES[stage]
    owner = pkgutil.resolve_name(place)  # imported only where it is slowed
    function = getattr(owner, name)

    def slowed(*arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments, **named)

    replace(owner, name, slowed)


def dask_setup(worker: Any) -> None:
    """Dask calls it in every worker; FLOWPS_DELAY_ON names the only one to be slowed."""
    stage = os.environ.get("FLOWPS_DELAY")
    if stage and worker.name == os.environ.get("FLOWPS_DELAY_ON", worker.name):
        slow(stage, float(os.environ["FLOWPS_DELAY_S"]), setattr)
    if os.environ.get("FLOWPS_OWN_HOSTS"):
        _pretend_own_host(str(worker.name))


def _pretend_own_host(name: str) -> None:
    """Say that this process has a machine to itself: the cores of the others are not its own."""
    import msgspec

    from flowps.status import figures

    usage_here = figures.usage_here
    figures.usage_here = lambda: msgspec.structs.replace(usage_here(), host=name)
