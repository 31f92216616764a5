"""TensorFlow as a run wants it: seeds, threads, determinism."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import keras
import tensorflow as tf

from flowps.config import Config


def prepare_tensorflow(config: Config) -> None:
    """Seeds, threads and determinism, before the first operation. Threads stay as they are if TensorFlow has started already."""
    keras.utils.set_random_seed(config.seed % (1 << 32))
    if config.trainer.tensorflow_threads:
        # One process, one pool: a second run in the same process keeps the first one's threads.
        with suppress(RuntimeError):
            tf.config.threading.set_intra_op_parallelism_threads(config.trainer.tensorflow_threads)
    knobs = config.trainer
    is_exact = knobs.in_flight == 1 or (knobs.max_staleness == 0 and knobs.count == 1)
    if is_exact and not knobs.jit_compile:
        tf.config.experimental.enable_op_determinism()


def multiplies_bfloat16() -> bool:
    """Whether TensorFlow multiplies matrices of bfloat16 several times as fast as those of float32: a processor with AMX, no GPU.

    On Linux; elsewhere it is not known.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return " amx_bf16" in flags and not tf.config.list_physical_devices("GPU")


def devices() -> list[str]:
    """What TensorFlow computes on: its GPUs, or the CPU."""
    return [device.name.removeprefix("/physical_device:") for device in tf.config.list_physical_devices("GPU")] or ["CPU"]
