"""Which load the slots are placed by: what an earlier run has measured, or what the first partition holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flowps.cluster.run_dir import read_placement
from flowps.config import Config
from flowps.errors import ConfigError, RunDirError
from flowps.hub.partition import Partition
from flowps.hub.schema import Schema
from flowps.hub.stream import ReadSpec, read_partition
from flowps.ps.load import SlotLoad, measure

_MOST_BATCHES = 16  # of the first partition: more tell no more about a slot's share


@dataclass(frozen=True)
class Forecast:
    """The load of every slot, and where it is from, in words."""

    loads: tuple[SlotLoad, ...]
    source: str


def forecast(config: Config, schema: Schema, first: Partition, spec: ReadSpec) -> Forecast:
    """The run named by ps.load_from, or an earlier one in the run directory if it had the same slots, or the first partition.

    Raises ConfigError when ps.load_from has no load of these slots, and what reading a partition raises.
    """
    names = [slot.name for slot in schema.slots]
    folder = config.ps.load_from or config.run_dir
    if folder:
        try:
            found = read_placement(Path(folder)).loads
            return Forecast(tuple(found[name] for name in names), f"measured by the run in {folder}")
        except RunDirError as error:
            why = str(error)
        except KeyError as error:
            why = f"it has no slot {error}"
        if config.ps.load_from:
            raise ConfigError(
                f"ps.load_from: {folder} has no measured load of these slots ({why}); name the directory of a finished run on the "
                "same columns, or leave it out to measure the first partition"
            )
    batches = read_partition(first, spec, 0, 0).batches[:_MOST_BATCHES]
    samples = sum(batch.size for batch in batches)
    return Forecast(tuple(measure(batches)), f"measured on the first {samples:,} examples")
