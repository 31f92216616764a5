"""A trainer's client of all shards, each reached by the shortest way there is: called directly, or over the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from flowps.cluster.plan import Plan
from flowps.cluster.reroute import Ways, registered
from flowps.cluster.shard_role import security_of, shard_here, signature
from flowps.errors import FlowpsError
from flowps.ps.client import PsClient
from flowps.ps.endpoint import Endpoint
from flowps.ps.replaceable import Replaceable
from flowps.ps.shard import Shard
from flowps.ps.wire.remote import RemoteShard
from flowps.status.run_status import RunStatus


@contextmanager
def shard_client(
    run_id: str, addresses: Sequence[str], token: str, plan: Plan, status: RunStatus, way_out: Callable[[Callable[[], None]], None]
) -> Iterator[tuple[PsClient, Ways]]:
    """The client, and the ways that lead to other processes.

    addresses   where each shard is served; "" for one that is not
    way_out     told what frees the trainer from waiting for a shard
    """
    cluster, slots = plan.config.cluster, plan.schema.slots
    # A shard that makes one step of several trainers answers when the last of them has come.
    timeout_s = max(cluster.rpc_timeout_s, cluster.collective_timeout_s) if plan.steps_together else cluster.rpc_timeout_s

    def connect(k: int, address: str) -> RemoteShard:
        remote = RemoteShard(
            address, k, run_id, signature(plan, k), security_of(plan.config, token), half=cluster.wire == "float16",
            max_message_bytes=cluster.max_message_mib << 20, timeout_s=timeout_s, count=status.count,
        )  # fmt: skip
        way_out(remote.close)
        try:
            if plan.placement.shards[k]:
                remote.connect(cluster.connect_timeout_s)
        except BaseException:
            remote.close()
            raise
        return remote

    with ExitStack() as opened:
        shards: list[Shard | Endpoint] = []
        ways = Ways(connect)
        for k, address in enumerate(addresses):
            here = shard_here(run_id, k)
            if here is not None:
                shards.append(here)
                continue
            if not address:
                raise FlowpsError(f"shard {k} is not in the trainer's process, and is not served to others")
            shard: RemoteShard | Replaceable = connect(k, address)
            if plan.config.checkpoint.recovery == "partial":
                shard = ways.shards[k] = Replaceable(shard, cluster.lost_after_s)
                way_out(shard.close)
            opened.callback(shard.close)
            shards.append(shard)
        client = PsClient(shards, plan.placement, slots, status)
        opened.callback(client.close)
        opened.enter_context(registered(run_id, ways))
        yield client, ways
