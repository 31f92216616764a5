"""The whole tree of errors, on one page.

Every error that a user can cause or has to act on is a :class:`FlowpsError`; a command prints its message without a stack
trace and exits with `exit_code`. A message says what was being done, what was found, what was expected and what to do.
Anything else that escapes is a bug in flowps and keeps its stack trace.
"""

from __future__ import annotations


class FlowpsError(Exception):
    """Base of all errors that flowps raises on purpose."""

    exit_code = 1


class ConfigError(FlowpsError):
    """A knob has an unknown name, a wrong type or a value out of range, or two knobs contradict each other."""

    exit_code = 2


class DataError(FlowpsError):
    """Sample files are missing, unreadable, or hold values that cannot be trained on."""


class SchemaError(DataError):
    """Columns are missing, of an unsupported type, or differ between files."""


class RunDirError(FlowpsError):
    """The run directory cannot be written, or belongs to another model."""


class CheckpointError(FlowpsError):
    """A checkpoint cannot be written, is missing or damaged, or is of another model."""


class BundleError(FlowpsError):
    """A bundle for serving is missing, damaged, of another version of flowps, or cannot be written."""


class OutputError(FlowpsError):
    """Standard output, or a file that a command was asked for, cannot be written: its reader has gone, or the disk is full."""


class ModelError(FlowpsError):
    """A model cannot be built, has the wrong shape, or produced NaN or infinity."""


class CapacityError(FlowpsError):
    """Tables or feeds need more memory, or more rows, than there is."""


class UnknownBatchError(FlowpsError):
    """A batch's id does not fit: a push of a batch that is not in flight, or a second lookup of one that is."""


class ClusterError(FlowpsError):
    """A Dask cluster cannot be reached, does not offer what a run needs, or has lost it."""


class MissingWorkersError(ClusterError):
    """A cluster's workers do not offer all that a run needs; more may join."""


class LostRoleError(ClusterError):
    """A worker that held a shard or a trainer has gone, or gives no sign of life.

    shards   the numbers of the shards that were lost with it; none when a trainer was lost too
    """

    def __init__(self, message: str, shards: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.shards = shards


class WireError(FlowpsError):
    """A shard's server cannot be started or reached, or refused a call."""


class UnreachableError(WireError):
    """A shard's server did not answer in time: it may have gone, or the way there."""


class StoppedError(FlowpsError):
    """The run was asked to stop while something waited."""

    exit_code = 130
