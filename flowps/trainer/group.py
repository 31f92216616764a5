"""`Group`: the trainers of a run, each a process, and sums over them by TensorFlow's collective operations.

Covers joining and adding up. What is added up is `group_step`'s. Ring on CPUs, NCCL on GPUs. The trainers find each other at
addresses that they are given; every collective has a deadline.

Why not `MultiWorkerMirroredStrategy` itself: it can be made once per process, before TensorFlow is used, and a Dask worker lives
for many runs. This uses the operations under it (tensorflow/python/ops/collective_ops.py), and a private function,
`_reset_context`, to let a process join a second group: variables and functions from before are then dead, and the old server's
threads and port stay until the process ends.

Threads: `begin`, `join` and `add` are the trainer's; `abort` may come from any thread.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.core.protobuf import tensorflow_server_pb2
from tensorflow.python.eager import context
from tensorflow.python.ops import collective_ops

from flowps.errors import ClusterError, StoppedError

_JOB = "trainer"
_NO_PROXY = "no_grpc_proxy"
_GROUP = 1
_STOPPED = "the run was stopped because of another role's error"
_has_joined = False  # whether this process has been in a group: TensorFlow keeps what it was told then
_held: dict[int, socket.socket] = {}  # ports of this process on which no group listens yet, in the order of asking
_MOST_HELD = 16  # a worker lives for many runs, and some end before their group listens: their ports are let go, the oldest first


def hold_port() -> int:
    """A port that is this process's until its group listens there. TensorFlow does not tell which one it has chosen itself.

    A socket that is bound and does not listen holds it: the kernel gives the port to no connection and to nobody who asks for any
    free one, and still lets TensorFlow listen, which sets SO_REUSEADDR as this does.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    port = int(holder.getsockname()[1])
    _held[port] = holder
    if len(_held) > _MOST_HELD:
        let_go(next(iter(_held)))
    return port


def let_go(port: int) -> None:
    """Hold `port` no longer."""
    if port in _held:
        _held.pop(port).close()


class Group:
    """This process as trainer `number` of those at `addresses` (host:port), in the same order everywhere.

    timeout_s   how long a trainer waits for the others in one collective
    """

    def __init__(self, addresses: Sequence[str], number: int, timeout_s: float) -> None:
        self.size, self.number = len(addresses), number
        self._addresses, self._timeout_s = addresses, timeout_s
        self._aborted = False
        self._sums: dict[int, Any] = {}

    def begin(self) -> None:
        """Before TensorFlow is set up for this run: forget an earlier group of this process, and all variables with it."""
        global _has_joined
        if _has_joined:
            context._reset_context()
        _has_joined = True
        keras.backend.clear_session()

    def join(self) -> None:
        """Meet the others; before the first variable of this run. Raises ClusterError where this trainer's port cannot be had."""
        # gRPC inside TensorFlow obeys http_proxy, and would look for the others there.
        hosts = sorted({address.rpartition(":")[0].strip("[]") for address in self._addresses})
        known = os.environ.get(_NO_PROXY) or os.environ.get("no_proxy")
        os.environ[_NO_PROXY] = ",".join(filter(None, [known, *hosts]))
        ours = context.context()
        server = tensorflow_server_pb2.ServerDef(protocol="grpc", job_name=_JOB, task_index=self.number)
        tasks = server.cluster.job.add(name=_JOB).tasks
        for number, address in enumerate(self._addresses):
            tasks[number] = address
        server.default_session_config.CopyFrom(ours.config)
        server.default_session_config.experimental.collective_group_leader = f"/job:{_JOB}/replica:0/task:0"
        server.default_session_config.device_filters.append(f"/job:{_JOB}/task:{self.number}")
        absl = logging.getLogger("absl")
        level = absl.level
        absl.setLevel(logging.ERROR)  # it warns of variables made before, of which this run has none
        try:
            ours.enable_collective_ops(server)
            ours.ensure_initialized()
        except tf.errors.OpError as error:
            raise ClusterError(
                f"trainer {self.number} cannot listen on {self._addresses[self.number]} for the other trainers: {error.message}"
            ) from None
        finally:
            absl.setLevel(level)
            let_go(int(self._addresses[self.number].rpartition(":")[2]))

    def sum(self, values: Any, key: int) -> Any:
        """In a graph: the sum of all trainers' `values`, a flat tensor; the same bits for each. `key`: one per place in code."""
        return collective_ops.all_reduce_v2(
            values, group_size=self.size, group_key=_GROUP, instance_key=key, communication_hint="nccl", timeout=self._timeout_s
        )

    def add(self, values: NDArray[np.float64], key: int) -> NDArray[np.float64]:
        """The sum of all trainers' `values`, float64 [n]; every trainer must call it. Raises as `guarded`."""
        if key not in self._sums:
            self._sums[key] = tf.function(lambda flat: self.sum(flat, key), input_signature=[tf.TensorSpec((None,), tf.float64)])
        return np.array(self.guarded(self._sums[key], tf.constant(values, tf.float64)))

    def guarded(self, collective: Any, *arguments: Any) -> Any:
        """Call `collective`. Raises StoppedError when it was aborted, ClusterError when another trainer is lost or too late."""
        if self._aborted:  # before this process has met the others: TensorFlow has forgotten it since
            raise StoppedError(_STOPPED)
        try:
            return collective(*arguments)
        except (tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.AbortedError, tf.errors.CancelledError,
                tf.errors.InternalError) as error:  # fmt: skip
            if self._aborted:
                raise StoppedError(_STOPPED) from None
            late = isinstance(error, tf.errors.DeadlineExceededError)
            raise ClusterError(
                f"trainer {self.number}: another trainer {f'did not come within {self._timeout_s:g} s' if late else 'was lost'}: "
                f"{' '.join(error.message.split())[:200]}"
            ) from None

    def abort(self) -> None:
        """Free whoever waits for the other trainers here. There is no going on after it."""
        self._aborted = True
        context.context().abort_collective_ops(tf.errors.CANCELLED, "the run is being stopped")
