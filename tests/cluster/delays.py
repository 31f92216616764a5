"""Slows one stage down, in every worker process: for `DASK_DISTRIBUTED__WORKER__PRELOAD`, and in this process with `slow`.

FLOWPS_DELAY names the stage, FLOWPS_DELAY_S the seconds that each of its calls takes longer. FLOWPS_OWN_HOSTS makes a cluster of
this machine's processes, as far as the use of cores goes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

Replace = Callable[[object, str, object], None]


def slow(stage: str, seconds: float, replace: Replace) -> None:
    """Replace one function of flowps by a slower one; `replace` is setattr, or a monkeypatch's."""
    owner, name = _STAGES[stage]()
    function = getattr(owner, name)

    def slowed(*arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments, **named)

    replace(owner, name, slowed)


def _decode() -> tuple[object, str]:
    from flowps.hub import stream

    return stream, "decode"


def _transfer() -> tuple[object, str]:
    """The hub's stream has waited for a task before it asks for the result."""
    import distributed

    return distributed.Future, "result"


def _lookup() -> tuple[object, str]:
    from flowps.ps.table import Table

    return Table, "_pool"


def _wire() -> tuple[object, str]:
    from flowps.ps.wire.remote import RemoteShard

    return RemoteShard, "_send"


def _stage() -> tuple[object, str]:
    from flowps.trainer.step import Step

    return Step, "stage"


def _step() -> tuple[object, str]:
    from flowps.trainer.step import Step

    return Step, "train"


def _push() -> tuple[object, str]:
    from flowps.ps.table import Table

    return Table, "push"


def _checkpoint() -> tuple[object, str]:
    from flowps.cluster.shard_role import ShardActor

    return ShardActor, "save"


_STAGES: dict[str, Callable[[], tuple[object, str]]] = {
    "decode": _decode, "transfer": _transfer, "lookup": _lookup, "wire": _wire, "stage": _stage, "step": _step, "push": _push,
    "checkpoint": _checkpoint,
}  # fmt: skip


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
